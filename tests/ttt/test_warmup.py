"""Kernels compiled before test-time training begins."""

import gc
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from model.network.compute_weights import fixed_weights
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.ttt import loop, warmup
from model.ttt.chunking import passes
from model.ttt.warmup import (
    UncapturedRunner,
    excerpts,
    launch_kernels,
    learn_excerpts,
    packed_texts,
    read_excerpts,
    warm_up_kernels,
)
from tests.helpers.kernels import CUDA, kernels_without_results, run_apart
from tests.helpers.models import execution_params, random_documents, small_model, ttt_params


@pytest.mark.parametrize("bptt_chunks", [0, 3])
def test_excerpts_make_passes_of_every_number_of_chunks(bptt_chunks):
    ttt = ttt_params(mode="cached", chunk=2, largest_chunk=8, context=64, bptt_chunks=bptt_chunks)
    documents = random_documents([5, 700, 300])
    found = list(excerpts(documents, ttt))
    assert [len(texts) for _, texts in found] == [2, 3] * 3
    for alike, texts in found:
        lengths = [text.size for text in texts]
        assert lengths == sorted(lengths, reverse=True)
        made = {(p.end - p.start, p.end - p.first) for p in passes(lengths[0], alike)}
        assert made == {(alike.chunk, alike.chunk * n) for n in range(1, bptt_chunks + 2)}
    assert {alike.chunk for alike, _ in found} == {p.end - p.start for p in passes(700, ttt)}


@pytest.mark.parametrize("lengths", [[300, 5], [40], [7, 9, 1], [3], [1] * 20])
def test_passes_over_packed_tokens_have_multiples_of_16_and_others(lengths):
    ttt = ttt_params(context=64)
    sizes = [text.size for text in packed_texts(random_documents(lengths), ttt)]
    whole = min(sum(lengths), 64) // 16 * 16
    assert sizes == ([whole, whole - 1] if sum(lengths) >= 16 else [sum(lengths)])


def test_texts_are_the_beginnings_of_documents():
    documents = random_documents([40, 30])
    for _, texts in excerpts(documents, ttt_params(chunk=8)):
        assert np.array_equal(texts[0], documents[0][: texts[0].size])


def test_nothing_is_done_on_a_cpu_or_without_documents():
    model = small_model()
    before = torch.get_rng_state()
    warm_up_kernels(model, [], ttt_params(), execution_params())
    warm_up_kernels(model, random_documents([20]), ttt_params(), execution_params())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["window", "cached"])
@pytest.mark.parametrize("captured", [False, True])
def test_one_session_at_a_time_takes_memory(mode, captured, monkeypatch):
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    sizes = []

    class Watched(warmup.Session):
        def __init__(self, model, ttt, capacity, runner):
            assert not alive
            super().__init__(model, ttt, capacity, runner)
            alive.add(self)
            sizes.append((ttt.chunk, capacity))

    monkeypatch.setattr(warmup, "Session", Watched)
    ttt = ttt_params(mode=mode, chunk=2, largest_chunk=4)
    execution = execution_params(ttt_documents=4, cuda_graphs=captured)
    model = small_model()
    gc.disable()
    try:
        with fixed_weights(model):
            read_excerpts(model, random_documents([300, *[9] * 8]), ttt, execution)
    finally:
        gc.enable()
    assert not alive
    assert sizes == [(2, 2), (2, 4), (4, 2), (4, 4)]


def test_steps_of_shared_weights_leave_them_and_their_gradients_as_they_were():
    model = small_model()
    before = [weight.detach().clone() for weight in model.parameters()]
    learn_excerpts(model, random_documents([40, 30, 5]), ttt_params(shared_lr=1e-3))
    for weight, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, value)
        assert weight.grad is None


CHANGES: list[dict[str, Any]] = [{}, {"lr_mixture": [0.0, 1.0]}, {"shared_lr": 1e-5}]


@pytest.mark.skipif(CUDA, reason="kernels are interpreted on the CPU alone")
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("mode", ["window", "cached"])
def test_it_launches_every_kind_of_kernel_that_reading_launches(mode, changes, monkeypatch):
    monkeypatch.setattr(loop, "graph_runner", lambda device, captures: UncapturedRunner(captures))
    model = small_model(width=256, head_width=64)
    model.compute_dtype = torch.bfloat16
    documents = random_documents([150, 140, 120, 61, 60, 59, 20] * 2)
    ttt = ttt_params(mode=mode, chunk=16, context=64, rank=16, round_tokens=500, **changes)
    execution, group = execution_params(), Group(0, 1, torch.device("cpu"))
    with kernels_without_results() as kinds, np.errstate(all="ignore"):
        launch_kernels(model, documents, ttt, execution)
        warm = set(kinds)
        # Losses are whatever lay in the memory that no kernel has written.
        with suppress(InputError):
            loop.ttt_losses(model, documents, ttt, execution, group)
    assert len(warm) > 20
    assert not kinds - warm


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("mode", ["window", "cached"])
def test_after_it_nothing_is_compiled_and_nothing_is_other(mode, changes, tmp_path):
    program = f"""
import numpy as np
import torch
import triton
from model.kernels import dispatch
from model.runtime.distributed import Group
from model.ttt.warmup import warm_up_kernels
from model.ttt.loop import ttt_losses
from tests.helpers.models import execution_params, random_documents, small_model, ttt_params

compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["repr"])
device = torch.device("cuda")
dispatch.configure("auto", device)
model = small_model(width=256, head_width=64).cuda()
documents = random_documents([150, 140, 120, 61, 60, 59, 20] * 2)
ttt = ttt_params(mode="{mode}", chunk=16, context=64, rank=16, round_tokens=500, **{changes})
execution = execution_params()
warm_up_kernels(model, documents, ttt, execution)
print(len(compiled))
compiled.clear()
before = torch.cuda.memory_allocated()
warm_up_kernels(model, documents, ttt, execution)
print(torch.cuda.memory_allocated() - before)
found = ttt_losses(model, documents, ttt, execution, Group(0, 1, device))
print(len(compiled))
again = ttt_losses(model, documents, ttt, execution, Group(0, 1, device))
print(int(all(np.allclose(a, b, atol=3e-2) for a, b in zip(found, again, strict=True))))
"""
    before, memory, after, same = run_apart(program, tmp_path)
    assert before > 15
    assert memory == 0
    assert after == 0
    assert same
