"""Text written by the model itself, to calibrate its own quantisation.

Token t+1 of sequence i is drawn by inverting the cumulative distribution of softmax(z / τ) at a
number u[i, t] in [0, 1) that was drawn beforehand from (seed, i). The text therefore depends
neither on how the sequences are batched and shared among processes nor on whether keys and values
are cached, up to the rounding of z: a token changes only if u falls within that rounding of the
border between two tokens.

Each sequence is one document: BOS, then text. Control tokens are never drawn: in packed documents
BOS begins the next document, so a sequence that contained one would be two, one of them empty of
context; every token of the calibration text is thus one that training has shown inside a document.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.documents import Documents
from model.gpt import GPT

ReportProgress = Callable[[int], None]


def sampling_noise(seed: int, sequences: Sequence[int], length: int) -> Tensor:
    """Uniform numbers that decide sequences `sequences`, fp64 (len(sequences), length − 1)."""
    rows = []
    for index in sequences:
        source = torch.Generator().manual_seed(seed * 2**31 + index)
        rows.append(torch.rand(length - 1, generator=source, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, length - 1, dtype=torch.float64)


def draw(logits: Tensor, noise: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Sample a token for each row, int64 (rows,).

    logits: (rows, vocabulary); noise: fp64 (rows,) in [0, 1); forbidden: bool (vocabulary,).
    """
    scaled = (logits.double() / temperature).masked_fill(forbidden, -torch.inf)
    cumulative = scaled.softmax(-1).cumsum(-1)
    # Scaling by the last entry, 1 up to rounding, keeps u below it; `right` skips tokens of
    # probability 0, such as forbidden ones, also where u is 0.
    target = noise[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: GPT,
    noise: Tensor,
    temperature: float,
    bos: int,
    forbidden: Tensor,
    progress: ReportProgress | None = None,
) -> Tensor:
    """Write one sequence per row of `noise`, all at once, with a key/value cache.

    noise: (rows, length − 1) of `sampling_noise`; forbidden: bool (vocabulary,), tokens never
    drawn; progress: called with 1 at every token. Returns int64 (rows, length), BOS first, on the
    model's device.
    """
    rows, length = noise.shape[0], noise.shape[1] + 1
    noise, forbidden = noise.to(model.device), forbidden.to(model.device)
    tokens = torch.full((rows, length), bos, dtype=torch.int64, device=model.device)
    if rows == 0:
        return tokens
    step = Documents.from_rows(rows, 1, model.device)
    cache = model.new_cache(rows, length)
    for t in range(length - 1):
        logits = model(tokens[:, t], step, cache=cache)
        tokens[:, t + 1] = draw(logits, noise[:, t], temperature, forbidden)
        if progress is not None:
            progress(1)
    return tokens


@torch.no_grad()
def generate_uncached(
    model: GPT, noise: Tensor, temperature: float, bos: int, forbidden: Tensor
) -> Tensor:
    """The specification of `generate`: the whole text so far is read again for every token."""
    rows, length = noise.shape[0], noise.shape[1] + 1
    noise, forbidden = noise.to(model.device), forbidden.to(model.device)
    tokens = torch.full((rows, 1), bos, dtype=torch.int64, device=model.device)
    for t in range(length - 1):
        documents = Documents.from_rows(rows, t + 1, model.device)
        logits = model(tokens.flatten(), documents).view(rows, t + 1, -1)[:, -1]
        drawn = draw(logits, noise[:, t], temperature, forbidden)
        tokens = torch.cat((tokens, drawn[:, None]), dim=1)
    return tokens
