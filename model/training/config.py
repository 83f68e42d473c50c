"""The `train` section of params.yaml: optimization.

What changes during training is set in shares of the run, so that the same values are right for one
minute on one GPU and for ten on eight.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

from model.runtime.settings import Settings, require, setting

PHASES = 16  # of a schedule, at most


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimization."""

    steps: int = setting("upper limit of optimizer steps", "steps", ge=1, le=10**9)
    budget_seconds: float | None = setting(
        "training clock at which to stop; null: stop at `steps`, shares are of these",
        "s",
        gt=0,
        le=1e9,
    )
    tokens_per_step: int = setting(
        "batch of one optimizer step, all processes together", "tokens", ge=1, le=2**30
    )
    tokens_per_microbatch: int = setting(
        "flat span one process takes at once; a part of it if a step has too few for all",
        "tokens",
        ge=1,
        le=2**30,
    )
    order_by_seed: bool = setting(
        "each seed reads the text in an order of its own; off: all in that of the shards"
    )
    batch_schedule: list[list[float]] = setting(
        "smaller batches first: [until, share of tokens_per_step] of each phase; [] = off",
        "share",
        max_length=PHASES,
    )
    batch_lr_power: float = setting(
        "a batch of a share s of tokens_per_step scales lr by s^power", ge=0, le=1
    )
    context_schedule: list[list[float]] = setting(
        "shorter contexts first: [until, share of model.sequence_length] of each phase; [] = off",
        "share",
        max_length=PHASES,
    )
    multi_token: list[list[float]] = setting(
        "also learn the tokens after the next: [until, weight] of each; [] = off",
        "share",
        max_length=PHASES,
    )
    prefix_loss: float = setting(
        "weight, at first, of the target's longest proper prefix as a target; 0 = off", ge=0, le=1
    )
    prefix_loss_until: float = setting(
        "part of the training in which this weight falls linearly to 0", "share", gt=0, le=1
    )
    cooldown: float = setting(
        "part of the training, at its end, over which lr falls", "share", ge=0, le=1
    )
    cooldown_power: float = setting(
        "lr falls as (remaining part of the cool-down)^power; 1 = linearly", gt=0, le=10
    )
    min_lr: float = setting("lr never falls below; 0 = off", "share of the peak", ge=0, le=1)
    matrix_lr: float = setting("Muon, matrices of the blocks", gt=0, le=1e6)
    embedding_lr: float = setting("AdamW, embedding tables", gt=0, le=1e6)
    scalar_lr: float = setting("AdamW, scalars, vectors and small projections", gt=0, le=1e6)
    muon_momentum: float = setting("Nesterov momentum after its warm-up", ge=0, lt=1)
    muon_momentum_start: float = setting("Nesterov momentum at the first step", ge=0, lt=1)
    muon_momentum_warmup: float = setting("length of the momentum warm-up", "share", ge=0, le=1)
    muon_momentum_end: float | None = setting(
        "Nesterov momentum at the end of the cool-down, in which it moves there linearly; null = "
        "off",
        ge=0,
        lt=1,
    )
    muon_row_norm: bool = setting("MuonEq-R: norm the rows of the update before Newton-Schulz")
    newton_schulz_steps: int = setting("iterations of the orthogonalization", ge=1, le=100)
    newton_schulz_coefficients: Literal["jordan", "polar_express"] = setting(
        "polynomials of the iterations: one for all, or one for each"
    )
    adam_beta1: float = setting("decay of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = setting("decay of AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = setting("added to the root of AdamW's second moment", gt=0, le=1)
    recurrence_start: float = setting(
        "share of the training from which model.layer_order holds; before, each layer once",
        "share",
        ge=0,
        lt=1,
    )
    last_pass_gradient: bool = setting(
        "gradients pass only through the last run of a layer that runs more than once"
    )
    weight_decay: float = setting("decoupled, all groups", "1/(lr*step)", ge=0, le=1e6)
    weight_decay_schedule: Literal["constant", "lr", "cosine"] = setting(
        "factor of weight_decay: 1, that of the cool-down, or a cosine from 1 to 0"
    )
    gradient_clip: float | None = setting(
        "global norm after the reduction; null = off", gt=0, le=1e9
    )
    ema_window: float = setting(
        "mean age, in steps, of the weights in the average that is the result; 0 = off",
        "share",
        ge=0,
        le=1,
    )
    qat_threshold: float = setting(
        "matrices are rounded once lr multiplier < this; 0 = off", ge=0, le=1
    )
    qat_bits: float = setting(
        "coded bits a weight that the matrices are rounded to then: as many as the artifact has",
        "bits",
        ge=1,
        le=10,
    )
    validation_documents: int | None = setting(
        "validation documents scored after training, evenly spaced; null = all", ge=1, le=10**9
    )

    def __post_init__(self) -> None:
        require(
            self.tokens_per_step % self.tokens_per_microbatch == 0,
            "tokens_per_step",
            f"{self.tokens_per_step} is not a multiple of tokens_per_microbatch "
            f"({self.tokens_per_microbatch})",
            "make it a whole number of microbatches",
        )
        for key in ("batch_schedule", "context_schedule"):
            _check_phases(key, getattr(self, key))
        for pair in self.multi_token:
            require(
                len(pair) == 2 and 0 < pair[0] <= 1 and 0 < pair[1] <= 1,
                "multi_token",
                f"{pair} is no pair [until, weight] of numbers above 0, up to 1",
                "name a pair for each token after the next, e.g. [[0.67, 0.5], [0.33, 0.25]]",
            )
        self._check_rounding()

    def _check_rounding(self) -> None:
        require(
            self.qat_threshold == 0 or self.cooldown > 0,
            "qat_threshold",
            f"{self.qat_threshold} is never reached: the lr stays at its full value because "
            "cooldown is 0",
            "set cooldown above 0 or qat_threshold to 0",
        )
        last = min(1.0, 1 / (self.cooldown * self.steps)) if self.cooldown else 0.0
        last = max(self.min_lr, last**self.cooldown_power)
        require(
            self.qat_threshold == 0 or last < self.qat_threshold,
            "qat_threshold",
            f"{self.qat_threshold} is never reached: the multiplier of the last step is "
            f"{last:.3g} by cooldown, steps, cooldown_power and min_lr",
            "raise cooldown, steps or qat_threshold, lower min_lr, or set qat_threshold to 0",
        )

    def batch(self, share: float) -> int:
        """Tokens of a step of a share of tokens_per_step: whole microbatches, at least one."""
        whole = self.tokens_per_step // self.tokens_per_microbatch
        return max(1, round(share * whole)) * self.tokens_per_microbatch

    def microbatch(self, processes: int) -> int:
        """Tokens that each of so many processes takes at once.

        `tokens_per_microbatch`, or the largest part of it of which every step has equally many for
        all; 0 if a step cannot be shared equally.
        """
        if self.uneven(processes):
            return 0
        return gcd(self.tokens_per_microbatch, *(batch // processes for batch in self._batches))

    def uneven(self, processes: int) -> str | None:
        """The key, and tokens of a step, of which so many processes cannot take equal parts."""
        first, *others = self._batches
        if first % processes:
            return f"train.tokens_per_step ({first})"
        uneven = next((batch for batch in others if batch % processes), None)
        return None if uneven is None else f"a batch of train.batch_schedule ({uneven})"

    @property
    def _batches(self) -> list[int]:
        """Tokens of the steps that a run has, `tokens_per_step` first."""
        return [self.tokens_per_step, *(self.batch(share) for _, share in self.batch_schedule)]


def _check_phases(key: str, phases: list[list[float]]) -> None:
    """Require pairs [until, share], the one rising inside of 0..1, the other a share."""
    before = 0.0
    for phase in phases:
        require(
            len(phase) == 2 and before < phase[0] < 1 and 0 < phase[1] <= 1,
            key,
            f"{phase} is no pair [until, share] with {before:.3g} < until < 1 and 0 < share <= 1",
            "name phases in their order, e.g. [[0.3, 0.25], [0.6, 0.5]]",
        )
        before = phase[0]
