"""The training state (weights, optimizer, average) and one optimizer step.

The state is a flat dictionary of tensors that does not depend on the number of processes, so that a
run saved by some is resumed by more or fewer. Nothing is random after the initialization, and the
batches follow from the tokens read before: with the weights, their average, the moments and the
number of steps these are the whole state.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.data.loader import Batch
from model.data.packing import Documents
from model.kernels import dispatch
from model.network.compute_weights import ComputeWeights
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.training.config import TrainConfig
from model.training.ema import Average
from model.training.multi_token import later_targets
from model.training.muon import StateTensor
from model.training.optimizer import Optimizer
from model.training.qat import StraightThrough
from model.training.schedule import Schedule

Batches = Iterator[Batch]


class Trainer:
    """Trains `model`, which is on the device of `group`, by the `train` section `params`.

    compiled: whether its parts are compiled; on CUDA only.
    prefixes: of `model.training.prefix_loss`, on the device; None: that loss is left out.
    """

    def __init__(
        self,
        model: GPT,
        params: TrainConfig,
        group: Group,
        compiled: bool,
        prefixes: Tensor | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.model, self.params, self.group = model, params, group
        self.span = params.microbatch(group.size)  # tokens of a microbatch
        self.compiled = compiled and group.device.type == "cuda"
        if self.compiled:
            model.compile_parts()
        self.optimizer = Optimizer(model, params, group)
        self.average = Average(dict(model.named_parameters()), params.ema_window)
        self.schedule = Schedule(params)
        self.rounding = StraightThrough(params.qat_bits)
        self.compute_weights = ComputeWeights(model)
        self.steps, self.tokens = 0, 0  # taken, and read by all processes
        self.use_recurrence(params.recurrence_start == 0)

    def use_recurrence(self, on: bool) -> None:
        """Let steps execute the layers in the order of the model's settings, or each once."""
        config = self.model.config
        self.recurrence_pending = bool(config.layer_order) and not on
        order = range(config.layers) if self.recurrence_pending else config.executed_layers
        self.model.execute(order, self.params.last_pass_gradient)

    def microbatches(self, progress: float) -> int:
        """Batches that this process takes in a step."""
        return self.schedule.tokens(progress) // self.span // self.group.size

    def step(self, batches: Batches, progress: float) -> Tensor:
        """Take one optimizer step on this process's next `microbatches` batches.

        progress: the share of the training that is over (`model.training.schedule`).
        Returns this process's share of the mean loss (nats per token, 0-dimensional, on the
        device): the sum over the processes is the mean over the step's tokens.
        """
        return self._step(batches, progress, self.microbatches(progress))

    def _step(self, batches: Batches, progress: float, microbatches: int) -> Tensor:
        schedule = self.schedule
        rounding = self.rounding if schedule.rounded(progress) else None
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.group.device)
        with self.compute_weights.in_use(rounding):
            for _ in range(microbatches):
                parts = microbatches * self.group.size
                total += self._microbatch(next(batches), progress, parts)
                self.compute_weights.collect()
        self.optimizer.step(
            schedule.multiplier(progress),
            schedule.momentum(progress),
            schedule.weight_decay(progress),
        )
        tokens = schedule.tokens(progress)
        self.average.update(self.steps + 1, self.tokens / tokens, progress)
        self.steps += 1
        self.tokens += tokens
        return total

    def _microbatch(self, batch: Batch, progress: float, parts: int) -> Tensor:
        """Accumulate the gradients of one of `parts` microbatches.

        Returns its part of the mean loss, that of the next tokens alone.
        """
        tokens, targets, documents = batch
        self.mark_dynamic(documents)
        further = self._further_targets(targets, progress)
        if not further:
            loss = objective = self.model.losses(tokens, targets, documents).mean() / parts
        else:
            each = [targets, *(one for one, _ in further)]
            losses = self.model.losses_of_each(tokens, each, documents)
            loss, *others = (one.mean() / parts for one in losses)
            objective = loss + sum(w * one for (_, w), one in zip(further, others, strict=True))
        objective.backward()
        return loss.detach()

    def _further_targets(self, targets: Tensor, progress: float) -> list[tuple[Tensor, float]]:
        """Targets beside the next tokens, and the weights of their losses."""
        weights = self.schedule.multi_token(progress)
        later = later_targets(targets, len(weights))
        further = [(one, w) for one, w in zip(later, weights, strict=True) if w]
        weight = self.schedule.prefix_loss(progress)
        if weight and self.prefixes is not None:
            further.append((self.prefixes[targets], weight))
        return further

    def mark_dynamic(self, documents: Documents) -> None:
        """Mark the number of documents as dynamic, so that it never causes a recompilation."""
        if self.compiled:
            dispatch.prepare_documents(documents, self.group.device)
            for tensor in (documents.cu_seqlens, documents.tiles):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def warm_up(self, batches: Batches) -> None:
        """Take a step of one microbatch in each of the coming ways, and undo them exactly.

        The ways are with each layer executed once and with recurrence, with each set of losses,
        without rounding and with it. A microbatch compiles everything; a step loads the optimizer's
        kernels and opens the connections between processes. The state is restored, and all
        processes get the main process's weights. Layers are left executed as at the beginning of
        training.
        """
        ways = [0.0, *self.schedule.losses_change(), *([1.0] if self.params.qat_threshold else [])]
        steps, tokens, state = self.steps, self.tokens, self.state()
        for recurrent in (True, False) if self.recurrence_pending else (True,):
            self.use_recurrence(recurrent)
            for progress in ways:
                self._step(batches, progress, 1)
        self.load(state, steps, tokens)

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of all tensors, in the main process; empty elsewhere. Collective."""
        copies = {}
        for name, entry in self._state_tensors().items():
            tensor = entry.tensor
            if tensor is None:
                tensor = torch.empty(entry.shape, device=self.group.device)
            if entry.owner is not None:
                self.group.broadcast(tensor, entry.owner)
            if self.group.is_main:
                copies[name] = tensor.detach().to("cpu", copy=True)
        return copies

    def load(self, state: dict[str, Tensor], steps: int, tokens: int) -> None:
        """Continue from the main process's `state`, after so many steps and tokens. Collective.

        Raises InputError if it is the state of another model.
        """
        state_tensors = self._state_tensors()
        if self.group.is_main:
            _require_same(state, state_tensors)
        with torch.no_grad():
            for name, entry in state_tensors.items():
                if self.group.is_main:
                    tensor = state[name].to(self.group.device)
                else:
                    tensor = torch.empty(entry.shape, device=self.group.device)
                self.group.broadcast(tensor)
                if entry.tensor is not None:
                    entry.tensor.copy_(tensor)
        self.steps, self.tokens = steps, tokens
        self.optimizer.set_step(steps)

    def _state_tensors(self) -> dict[str, StateTensor]:
        kinds: dict[str, Mapping[str, Tensor]] = {"weights": dict(self.model.named_parameters())}
        if self.params.ema_window:
            kinds["average"] = self.average.tensors
        tensors = {
            f"{kind}/{name}": t for kind, named in kinds.items() for name, t in named.items()
        }
        shared = {name: StateTensor(None, tensor.shape, tensor) for name, tensor in tensors.items()}
        return shared | self.optimizer.state_tensors()


def _require_same(state: dict[str, Tensor], state_tensors: dict[str, StateTensor]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(entry.shape) for name, entry in state_tensors.items()}
    differing = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"training state of another model ({name}: {found.get(name)} instead of "
            f"{wanted.get(name)}, {len(differing)} differences in all)",
            "delete the state file and train again",
        )
