"""What an evaluation does, seen from outside its loop: distributions, scores, updates, in order.

While the block of `observing` runs, these report what they do: the function that turns logits into
losses (`dispatch.softcapped_loss`), the reader of the TTT mode, which knows the targets of a pass,
the optimizer step of the adapters, and the reading by the model as it is, which a mixture may hold
besides adapters. The code between them, which decides what is scored when and what is returned,
runs as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from model.kernels import dispatch
from model.ttt import loop
from model.ttt.chunking import Pass, Shape
from model.ttt.document_adapters import DocumentAdapters
from model.ttt.rate_mixture import log_weights, mixed_losses
from model.ttt.reader import READERS, Reader


@dataclass(frozen=True)
class Event:
    """One thing that happened to a document that is evaluated alone.

    begin: its text is taken up; score: first pass over targets start + 1 … end; again: a further
    pass over them, for another step; update: the adapters learn from them; unadapted: a pass over
    them without adapters, to mix with those of score. logits (targets, rates, V) and losses
    (targets, rates): of the passes, by each of the document's adapters, which are one unless
    `ttt.lr_mixture` mixes several.
    """

    kind: Literal["begin", "score", "again", "update", "unadapted"]
    start: int = 0
    end: int = 0
    logits: Tensor | None = None
    losses: Tensor | None = None


@dataclass
class Observation:
    """All events in order; mixture_tokens: as in `ttt`; softcap: of the logits."""

    mixture_tokens: int
    events: list[Event] = field(default_factory=list)
    softcap: float = 0.0

    def kinds(self, *kinds: str) -> list[Event]:
        """The events of some kinds."""
        return [event for event in self.events if event.kind in kinds]

    def logits(self, targets: int) -> Tensor:
        """Logits, before the softcap, by which each target was scored, (targets, rates, V)."""
        return self._of_all(lambda event: event.logits, targets)

    def rate_losses(self, targets: int) -> np.ndarray:
        """Losses of each of so many targets when it was scored, fp32 (rates, targets)."""
        return self._of_all(lambda event: event.losses, targets).T.contiguous().cpu().numpy()

    def _of_all(self, values: Callable[[Event], Tensor | None], targets: int) -> Tensor:
        """What targets were scored by: adapters, and behind them the model as it is."""
        passes = [
            [value for event in self.kinds(kind) if (value := values(event)) is not None]
            for kind in ("score", "unadapted")
        ]
        return torch.cat([torch.cat(parts)[:targets] for parts in passes if parts], 1)

    def losses(self, targets: int) -> np.ndarray:
        """The same, fp32 (targets,), mixed if there are several rates."""
        return mixed_losses(self.rate_losses(targets), self.mixture_tokens)

    def log_probabilities(self, position: int) -> Tensor:
        """ln p of each token of the vocabulary as target number `position`, fp64 (V,)."""
        rows = self.logits(position)[-1]
        every = torch.arange(rows.shape[1], device=rows.device)
        losses = [
            dispatch.softcapped_loss(row.expand(every.numel(), -1), every, self.softcap)
            for row in rows
        ]
        weights = log_weights(self.rate_losses(position), self.mixture_tokens)[:, -1:]
        weighted = torch.from_numpy(weights) - torch.stack(losses).double().cpu()
        return weighted.logsumexp(0)


class _Observer:
    """Collects events; knows which pass of the reader runs, if one does."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self.running: Pass | None = None  # of the reader
        self.rows = 1  # of the reader
        self.first = True
        self.scored = 0  # targets, where no reader runs
        self.adapts = True  # else the model is read as it is, beside a reader

    def add(self, *values: Any) -> None:
        self.observation.events.append(Event(*values))

    def loss(self, original: Any) -> Any:
        def observed(z: Tensor, targets: Tensor, cap: float) -> Tensor:
            losses = original(z, targets, cap)
            rows = self.rows if self.adapts else 1
            count = losses.numel() // rows
            start, kind = self.scored, "score" if self.adapts else "unadapted"
            if self.running and self.adapts:
                start, kind = self.running.start, "score" if self.first else "again"
            else:
                self.scored += count
            self.observation.softcap = cap
            by_rate = [x.detach().unflatten(0, (rows, count)).transpose(0, 1) for x in (z, losses)]
            self.add(kind, start, start + count, *by_rate)
            return losses

        return observed

    def unadapted(self, original: Any) -> Any:
        def observed(*values: Any) -> Any:
            # A document of a single chunk has no reader: this is its score.
            self.adapts = self.running is None
            try:
                return original(*values)
            finally:
                self.adapts = True

        return observed

    def reader(self, mode: type[Reader]) -> type[Reader]:
        observer = self

        class Observed(mode):  # type: ignore[valid-type, misc]
            def begin(self, tokens: Tensor, targets: Tensor) -> None:
                observer.add("begin")
                observer.rows = tokens.shape[0]
                super().begin(tokens, targets)

            def seek(self, one: Pass, shape: Shape) -> None:
                observer.running = one
                super().seek(one, shape)

            def losses(self, first: bool) -> Tensor:
                observer.first = first
                return super().losses(first)

        return Observed

    def step(self, original: Any) -> Any:
        def observed(adapters: DocumentAdapters, loss: Tensor, scalars: Tensor) -> None:
            if self.running:
                self.add("update", self.running.start, self.running.end)
            original(adapters, loss, scalars)

        return observed


@contextmanager
def observing(mixture_tokens: int) -> Iterator[Observation]:
    """Observe the evaluation of one document in the block."""
    observation = Observation(mixture_tokens)
    observer = _Observer(observation)
    readers = {name: observer.reader(mode) for name, mode in READERS.items()}
    with (
        patch.dict(READERS, readers),
        patch.object(DocumentAdapters, "step", observer.step(DocumentAdapters.step)),
        patch.object(dispatch, "softcapped_loss", observer.loss(dispatch.softcapped_loss)),
        patch.object(loop, "unadapted_losses", observer.unadapted(loop.unadapted_losses)),
    ):
        yield observation
