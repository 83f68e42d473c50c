"""Text that continues a prompt, character by character as the model makes it."""

from collections.abc import Iterable, Iterator
from itertools import takewhile

import torch

from model.data.shards import BOS
from model.data.tokenizer import Tokenizer
from model.evaluation.generation import continuation
from model.network.gpt import GPT
from model.runtime.errors import InputError
from pocketlm.report.blocks import clean
from pocketlm.submission.standalone import as_document

TEMPERATURES = (1e-3, 1e3)


def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yield the prompt as the model reads it, then pieces of text, until the document ends.

    tokens: how many at most; temperature: 0 for the most probable token each time.
    Raises InputError for an impossible temperature.
    """
    lowest, highest = TEMPERATURES
    if temperature and not lowest <= temperature <= highest:
        raise InputError(
            f"--temperature: {temperature}",
            f"give 0, for the most probable token, or a number between {lowest} and {highest:.0f}",
        )
    document = as_document(tokenizer, prompt)
    noise = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    forbidden = torch.from_numpy(tokenizer.control.copy())
    forbidden[BOS] = False  # it ends the document
    drawn = continuation(model, document, noise, temperature, forbidden)
    yield from map(clean, spelled(tokenizer, document.tolist(), takewhile(BOS.__ne__, drawn)))


def spelled(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of a prompt, and what each token adds, once its characters are complete."""
    known, shown = list(prompt), tokenizer.decode(prompt)
    yield shown
    for token in tokens:
        known.append(token)
        if not tokenizer.is_byte(token):  # others may be a part of a character
            before, shown = shown, tokenizer.decode(known)
            yield shown[len(before) :]
    yield tokenizer.decode(known)[len(shown) :]
