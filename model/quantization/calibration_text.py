"""Calibration text for quantization, sampled from the model itself.

Token t+1 of sequence i is drawn by inverting the cumulative distribution of softmax(z / τ) at a
number u[i, t] in [0, 1) that was drawn beforehand from (seed, i). The text therefore depends
neither on how the sequences are batched and distributed over processes nor on whether keys and
values are cached, up to the rounding of z: a token changes only if u falls within that rounding of
the boundary between two tokens.

The shapes of a token's work depend only on the number of cache slots that are read, which grows by
blocks, or is fixed where a kernel skips the empty ones; and the work uses static buffers. So it can
be captured as a CUDA graph per number of slots and replayed, as its hundred or so kernels run
faster than Python launches them.

Each sequence is one document: BOS, then text. Control tokens are never drawn: in packed documents
BOS starts the next document, so a sequence that contained one would be two, the second without
context; every token of the calibration text is thus one that occurs inside documents in training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.data.packing import Documents
from model.evaluation.generation import draw
from model.kernels import dispatch
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.network.kv_cache import RingKVCache
from model.runtime.cuda_graphs import GraphRunner
from model.runtime.progress import ReportProgress

SLOTS = 256  # cache slots by which the number that is read grows


def sampling_noise(seed: int, sequences: Sequence[int], length: int) -> Tensor:
    """Uniform random numbers of the given sequences, fp64 (len(sequences), length − 1)."""
    rows = []
    for index in sequences:
        source = torch.Generator().manual_seed(seed * 2**31 + index)
        rows.append(torch.rand(length - 1, generator=source, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, length - 1, dtype=torch.float64)


class _Sampler:
    """Samples one token of every sequence at a time, in static buffers."""

    def __init__(
        self, model: GPT, noise: Tensor, temperature: float, bos: int, forbidden: Tensor
    ) -> None:
        rows, length = noise.shape[0], noise.shape[1] + 1
        device = model.device
        self._model, self._temperature = model, temperature
        self._noise, self._forbidden = noise.to(device), forbidden.to(device)
        self.tokens = torch.full((rows, length), bos, dtype=torch.int64, device=device)
        self._cache = RingKVCache(model.config, rows, length, device, model.dtype)
        self._step = Documents.from_rows(rows, 1, device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)

    def seek(self, position: int) -> int:
        """Move to the token at `position`; returns the number of cache slots that it reads."""
        slots = self.tokens.shape[1]
        if not dispatch.skips_empty_slots(self.tokens.device):
            slots = min(-(-position // SLOTS) * SLOTS, slots)
        self._cache.seek(position, slots)
        self._position.fill_(position)
        return slots

    def sample(self) -> Tensor:
        """Run the model on the token at the position and sample the next one, (rows,)."""
        self._cache.begin_forward(record=True)
        current = self.tokens.index_select(1, self._position).squeeze(1)
        logits = self._model(current, self._step, cache=self._cache)
        noise = self._noise.index_select(1, self._position).squeeze(1)
        drawn = draw(logits, noise, self._temperature, self._forbidden)
        self.tokens.index_copy_(1, self._position + 1, drawn[:, None])
        self._cache.commit()
        return drawn


@torch.no_grad()
def generate(
    model: GPT,
    noise: Tensor,
    temperature: float,
    bos: int,
    forbidden: Tensor,
    progress: ReportProgress | None = None,
    runner: GraphRunner | None = None,
) -> Tensor:
    """Sample one sequence per row of `noise`, all in one batch, with a key/value cache.

    noise: (rows, length − 1) of `sampling_noise`; forbidden: bool (vocabulary,), tokens never
    drawn; progress: called with 1 at every token. runner: runs a token's work; None: eagerly.
    Returns int64 (rows, length), BOS first, on the model's device.
    """
    runner = runner or GraphRunner(captured=False)
    with fixed_weights(model), runner.stream():
        sampler = _Sampler(model, noise, temperature, bos, forbidden)
        for position in range(noise.shape[1] if len(noise) else 0):
            runner.run(sampler.seek(position), sampler.sample)
            if progress is not None:
                progress(1)
    return sampler.tokens


@torch.no_grad()
def generate_uncached(
    model: GPT, noise: Tensor, temperature: float, bos: int, forbidden: Tensor
) -> Tensor:
    """The specification of `generate`: the whole prefix is recomputed for every token."""
    rows, length = noise.shape[0], noise.shape[1] + 1
    noise, forbidden = noise.to(model.device), forbidden.to(model.device)
    tokens = torch.full((rows, 1), bos, dtype=torch.int64, device=model.device)
    for t in range(length - 1):
        documents = Documents.from_rows(rows, t + 1, model.device)
        logits = model(tokens.flatten(), documents).view(rows, t + 1, -1)[:, -1]
        drawn = draw(logits, noise[:, t], temperature, forbidden)
        tokens = torch.cat((tokens, drawn[:, None]), dim=1)
    return tokens
