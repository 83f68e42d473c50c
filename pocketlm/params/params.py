"""The whole of params.yaml: its sections and what they must agree on.

The values live in `conf/` (presets) and params.yaml (the experiment in force); nothing has a
default, so a value is written in exactly one place. Each section is described beside the technique
that reads it, and checks itself; here are the checks across sections.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from model.data.config import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    DataConfig,
    TokenizerConfig,
)
from model.evaluation.config import EvaluateConfig
from model.kernels.config import OpsConfig
from model.network.config import ModelConfig
from model.quantization.config import QuantizeConfig
from model.runtime.config import ExecutionConfig
from model.runtime.settings import Settings, require, setting
from model.training.config import TrainConfig
from model.ttt.config import TTTConfig
from pocketlm.report.config import ReportConfig
from pocketlm.submission.config import SubmissionConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True, kw_only=True)
class Params(Settings):
    """The whole of params.yaml."""

    seeds: list[Seed] = setting("one model each; a p-value needs at least two")
    execution: ExecutionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainConfig
    quantize: QuantizeConfig
    evaluate: EvaluateConfig
    ttt: TTTConfig
    report: ReportConfig
    submission: SubmissionConfig
    ops: OpsConfig

    def __post_init__(self) -> None:
        self._check_seeds()
        self._check_vocabulary_and_budget()
        self._check_lengths()
        self._check_processes()

    def _check_seeds(self) -> None:
        require(bool(self.seeds), "seeds", "is empty", "name at least two, e.g. [0, 1, 2]")
        require(len(self.seeds) <= 1000, "seeds", f"lists {len(self.seeds)}", "name at most 1000")
        require(
            len(set(self.seeds)) == len(self.seeds),
            "seeds",
            f"{self.seeds} names a seed twice",
            "name each seed once",
        )
        require(
            len(self.seeds) > 1 or self.report.baseline == "none",
            "seeds",
            f"{self.seeds} is one seed, but report.baseline asks for a significance test",
            "add a seed, or set report.baseline to none",
        )

    def _check_vocabulary_and_budget(self) -> None:
        require(
            self.model.vocabulary == self.tokenizer.vocabulary,
            "model.vocabulary",
            f"{self.model.vocabulary} differs from tokenizer.vocabulary "
            f"({self.tokenizer.vocabulary})",
            "make them equal",
        )
        require(
            SMALLEST_VOCABULARY <= self.tokenizer.vocabulary <= LARGEST_VOCABULARY,
            "tokenizer.vocabulary",
            f"{self.tokenizer.vocabulary} is not between {SMALLEST_VOCABULARY} (256 bytes and 4 "
            f"control tokens) and {LARGEST_VOCABULARY} (shards hold 2 bytes per token)",
            "choose one between, e.g. 1024",
        )
        least = self.model.matrix_values // 4
        require(
            least <= self.quantize.budget_bytes - self.quantize.code_reserve_bytes,
            "quantize.budget_bytes",
            f"{self.quantize.budget_bytes} bytes less quantize.code_reserve_bytes cannot hold the "
            f"{self.model.matrix_values} values of the matrices: {least} bytes even at two bits "
            "each",
            "raise budget_bytes, or make the model smaller",
        )

    def _check_processes(self) -> None:
        execution = self.execution
        require(
            execution.processes % execution.nodes == 0,
            "execution.nodes",
            f"{execution.nodes} nodes cannot share {execution.processes} processes evenly",
            "make execution.processes a multiple of execution.nodes",
        )
        misfit = self.misfit(execution.processes)
        require(
            misfit is None,
            "execution.processes",
            f"{execution.processes} processes {misfit}",
            "change execution.processes, train.tokens_per_step or train.batch_schedule",
        )

    def misfit(self, processes: int) -> str | None:
        """Why so many processes cannot train together: what they would do; None if they can."""
        if uneven := self.train.uneven(processes):
            return f"do not divide {uneven}"
        span, least = self.train.microbatch(processes), self.model.sequence_length
        if span < least:
            return (
                f"would take {span} tokens of a step at once, fewer than "
                f"model.sequence_length ({least})"
            )
        return None

    def _check_lengths(self) -> None:
        require(
            self.train.tokens_per_microbatch >= self.model.sequence_length,
            "train.tokens_per_microbatch",
            f"{self.train.tokens_per_microbatch} is shorter than model.sequence_length "
            f"({self.model.sequence_length})",
            "make it at least one sequence",
        )
        require(
            self.evaluate.sliding_stride <= self.model.sequence_length,
            "evaluate.sliding_stride",
            f"{self.evaluate.sliding_stride} exceeds model.sequence_length "
            f"({self.model.sequence_length}): tokens would be skipped",
            "make it at most sequence_length",
        )
        require(
            self.quantize.calibration_tokens <= self.model.sequence_length,
            "quantize.calibration_tokens",
            f"{self.quantize.calibration_tokens} exceeds model.sequence_length "
            f"({self.model.sequence_length}): the model never saw such positions",
            "make it at most sequence_length",
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by the path of their keys (`train.steps`)."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
