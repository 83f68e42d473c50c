"""Continuations of a prompt: cached equals recomputed, over the end of the cache as well."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from model.data.packing import Documents
from model.evaluation.generation import continuation, draw
from model.network.gpt import GPT
from tests.helpers.models import TECHNIQUES, case_name, random_documents, small_model

NONE = torch.zeros(64, dtype=torch.bool)


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.no_grad()
def recomputed(
    model: GPT, prompt: np.ndarray, noise: torch.Tensor, temperature: float, forbidden: torch.Tensor
) -> list[int]:
    """The specification, for texts of up to sequence_length tokens: all is read for each token."""
    tokens = torch.from_numpy(prompt.astype(np.int64))
    for number in noise.split(1):
        logits = model(tokens, Documents.from_rows(1, len(tokens)))[-1:]
        if temperature:
            drawn = draw(logits, number, temperature, forbidden)
        else:
            drawn = logits.masked_fill(forbidden, -torch.inf).argmax(-1)
        tokens = torch.cat((tokens, drawn))
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [{}, *TECHNIQUES], ids=case_name)
@pytest.mark.parametrize(("length", "temperature"), [(1, 0.9), (11, 0)])
def test_cached_equals_recomputed(changes: dict, length: int, temperature: float) -> None:
    model = small_model(**changes)
    given = (random_documents([length])[0], uniform(32 - length), temperature, torch.arange(64) < 4)
    found = list(continuation(model, *given))
    assert found == recomputed(model, *given)
    assert not given[3][found].any()


@pytest.mark.parametrize("length", [1, 31, 33, 90])
def test_each_token_sees_the_latest_of_a_sequence(length: int) -> None:
    """In one layer without smear and bigram a token depends on what attention sees alone."""
    off: dict[str, Any] = {"smear_gate": False, "bigram_buckets": 0, "value_layers": []}
    model = small_model(layers=1, skips=False, **off)
    (prompt,), noise = random_documents([length]), uniform(70)
    found = list(continuation(model, prompt, noise, 0.9, NONE))
    text = np.concatenate([prompt, np.array(found, np.uint16)])
    for number in range(70):
        seen = text[: length + number][-32:]
        assert recomputed(model, seen, noise[number:][:1], 0.9, NONE) == found[number : number + 1]


def test_numbers_decide_the_text() -> None:
    model, (prompt,) = small_model(), random_documents([5])
    texts = [list(continuation(model, prompt, uniform(20, s), 0.9, NONE)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_come_one_by_one_and_the_model_is_as_it_was() -> None:
    model, (prompt,) = small_model(), random_documents([5])
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = continuation(model, prompt, uniform(20), 0.9, NONE)
    assert len(list(islice(text, 3))) == len(calls) == 3
    assert torch.is_grad_enabled()
    text.close()  # type: ignore[attr-defined]
    hook.remove()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.gpu
def test_the_gpu_writes_the_text_of_the_cpu_in_fp32() -> None:
    model, (prompt,), noise = small_model(), random_documents([9]), uniform(50)
    expected = list(continuation(model, prompt, noise, 0.9, NONE))
    model.compute_dtype = torch.float32
    assert list(continuation(model.cuda(), prompt, noise, 0.9, NONE)) == expected
