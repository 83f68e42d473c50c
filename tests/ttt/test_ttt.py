"""Test-time training against a naive loop, and the properties that make its scores honest."""

import dataclasses
import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.queue import simulate
from model.data.packing import Documents
from model.evaluation.losses import plain_losses, targets_of, to_indices
from model.evaluation.work_sharing import SharedProgress
from model.kernels import dispatch
from model.kernels.reference import exclude_own_value
from model.network import adapters as network_adapters
from model.network.adapters import (
    Adapters,
    BlockAdapters,
    adapters_by_input,
    concatenate_by_input,
    site_name,
)
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.runtime.cuda_graphs import GraphRunner
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.settings import ImpossibleValue
from model.ttt import window_mode
from model.ttt.batching import bytes_per_document, document_batches
from model.ttt.cached_mode import CachedReader
from model.ttt.chunking import Pass, chunks, documents_left, passes
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import (
    HASH_TABLE,
    DocumentAdapters,
    initial_parameters,
    values_per_document,
)
from model.ttt.loop import Session, ttt_losses
from model.ttt.rate_mixture import mixed_losses
from model.ttt.reader import READERS
from model.ttt.session_plan import PASS, STEP, SessionPlan, session_plan
from model.ttt.window_mode import WindowReader
from tests.helpers.models import (
    TECHNIQUES,
    case_name,
    execution_params,
    random_documents,
    small_model,
    ttt_params,
)
from tests.helpers.processes import run_processes
from tests.helpers.replay import ReplayRunner

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
EAGER = GraphRunner(captured=False)
LENGTHS = [1, 2, 7, 8, 9, 30, 55, 64]


@pytest.fixture(autouse=True)
def _windows_of_several_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_mode, "STEP", 16)
    monkeypatch.setattr(window_mode, "GROWTH", 0)


Weights = Mapping[str, Tensor]


class Added:
    """What `LowRank` makes of `of`, the deltas of x (n, width) that a derived class defines.

    A is the identity, so that `hidden` is x itself.
    """

    a = torch.eye(32)[None]

    def hidden(self, x: Tensor) -> Tensor:
        return x[None]

    def add(
        self,
        x: Tensor,
        base: Tensor,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return added(self.deltas(x), base if residual is None else base + residual, scale)

    def deltas(self, x: Tensor, query_positions: Tensor | None = None) -> dict[str, Tensor]:
        return self.of(x[0], query_positions)

    def of(self, x: Tensor, query_positions: Tensor | None) -> dict[str, Tensor]:
        raise NotImplementedError


class NaiveSites(Added):
    """Adapters of one document at some sites, written from the definition."""

    def __init__(self, weights: Weights, sites: Sequence[str], layer: int) -> None:
        self.weights = weights
        ordered = [
            site
            for group in network_adapters.SITES_BY_INPUT.values()
            for site in group
            if site in sites
        ]
        self.sites = tuple(ordered)
        self.names = {site: site_name(site, layer) for site in ordered}

    def of(self, x: Tensor, query_positions: Tensor | None) -> dict[str, Tensor]:
        found = {}
        for site, name in self.names.items():
            matrix = self.weights[f"{name}.b"] @ self.weights[f"{name}.a"]
            every = query_positions is None or site in ("key", "value")
            wanted = x if every else x[query_positions]
            found[site] = wanted @ matrix.T
        return found


def added(
    deltas: Mapping[str, Tensor], base: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not deltas:
        return base, base[:, :0]
    whole = torch.cat(list(deltas.values()), 1)
    whole = whole if scale is None else whole * scale
    return whole[:, : base.shape[1]] + base, whole[:, base.shape[1] :]


class NaiveTable:
    def __init__(self, weights: Weights) -> None:
        self.table = weights[HASH_TABLE]

    def rows(self, tokens: Tensor, before: Tensor) -> Tensor:
        pairs = zip(tokens.tolist(), before.tolist(), strict=True)
        return torch.stack([self.table[(2039 * b + t) % len(self.table)] for t, b in pairs])


def naive_adapters(weights: Weights, sites: Sequence[str], layers: int) -> Adapters:
    """One document's adapters; it need not have the shape of a batch."""
    first = [site for site in sites if site not in ("mlp", "head")]
    second = [site for site in sites if site == "mlp"]

    def block(layer: int) -> BlockAdapters:
        parts: Any = (NaiveSites(weights, part, layer) for part in (first, second))
        return BlockAdapters(*parts)

    blocks = [block(layer) for layer in range(layers)]
    head: Any = NaiveSites(weights, ["head"], 0) if "head" in sites else None
    table: Any = NaiveTable(weights) if HASH_TABLE in weights else None
    return Adapters(blocks, head, table)


class Naive:
    """One document at a time: score, then train with torch's AdamW, forward passes apart."""

    def __init__(self, model: GPT, document: np.ndarray, ttt: Any) -> None:
        self.model, self.ttt = model, ttt
        self.tokens = torch.tensor(document.tolist())
        self.targets = torch.tensor([*document[1:].tolist(), 1])
        self.spans = list(chunks(len(self.tokens), ttt))
        initial = initial_parameters(model.config, ttt)
        self.weights = {name: torch.nn.Parameter(t.clone()) for name, t in initial.items()}

    def run(self) -> np.ndarray:
        ttt = self.ttt
        factors = {n: ttt.hash_rate if n == HASH_TABLE else 1.0 for n in self.weights}
        alone = [{"params": [w], "factor": factors[n]} for n, w in self.weights.items()]
        optimizer = torch.optim.AdamW(
            alone, ttt.lr, (0.0, ttt.beta2), ttt.epsilon, ttt.weight_decay
        )
        scores = []
        for number, (start, full_end) in enumerate(self.spans):
            self.full_end, end = full_end, min(full_end, len(self.tokens))
            self.enter(number, start, end)
            with torch.no_grad():
                scores.append(self.losses(start, end))
            for group in optimizer.param_groups:
                decay = 1 + start / ttt.lr_decay_tokens if ttt.lr_decay_tokens else 1
                warm = (start + ttt.chunk) / ttt.lr_warmup_tokens if ttt.lr_warmup_tokens else 1
                group["lr"] = group["factor"] * ttt.lr / decay * min(1, warm)
            for _ in range(ttt.steps if end < len(self.tokens) else 0):
                optimizer.zero_grad()
                self.losses(start, end).mean().backward()
                optimizer.step()
        return torch.cat(scores).numpy()

    def enter(self, number: int, start: int, end: int) -> None:
        pass

    def losses(self, start: int, end: int) -> Tensor:
        begin = max(0, self.full_end - self.ttt.context)
        adapters = naive_adapters(self.weights, self.ttt.sites, len(self.model.visits))
        return self._read(begin, end, adapters)[start - begin :]

    def _read(self, begin: int, end: int, adapters: Any) -> Tensor:
        packed = Documents.from_lengths([end - begin])
        window = slice(begin, end)
        return self.model.losses(self.tokens[window], self.targets[window], packed, adapters)


class Spliced(Added):
    """Every piece of the text adapted by something of its own: the sizes of pieces, and what."""

    def __init__(self, sizes: list[int], parts: Sequence[Any]) -> None:
        self.sizes, self.parts = sizes, parts
        self.sites = getattr(parts[0], "sites", None)

    def of(self, x: Tensor, query_positions: Tensor | None) -> dict[str, Tensor]:
        assert query_positions is None
        found = [part.of(p, None) for part, p in zip(self.parts, x.split(self.sizes), strict=True)]
        return {site: torch.cat([deltas[site] for deltas in found]) for site in found[0]}

    def rows(self, tokens: Tensor, before: Tensor) -> Tensor:
        pieces = zip(self.parts, tokens.split(self.sizes), before.split(self.sizes), strict=True)
        return torch.cat([part.rows(*piece) for part, *piece in pieces])


def spliced_adapters(
    pieces: list[tuple[int, Weights]], sites: Sequence[str], layers: int
) -> Adapters:
    sizes = [size for size, _ in pieces]
    parts = [naive_adapters(weights, sites, layers) for _, weights in pieces]

    def splice(chosen: Sequence[Any]) -> Any:
        return Spliced(sizes, chosen) if chosen[0] is not None else None

    blocks = [
        BlockAdapters(*(splice([part.blocks[layer][at] for part in parts]) for at in (0, 1)))
        for layer in range(layers)
    ]
    head, table = (splice([getattr(part, name) for part in parts]) for name in ("head", "table"))
    return Adapters(blocks, head, table)


class NaiveCached(Naive):
    """Caches nothing: reads all the text for every chunk, each piece with its own adapters."""

    def __init__(self, model: GPT, document: np.ndarray, ttt: Any) -> None:
        super().__init__(model, document, ttt)
        self.passes = passes(len(self.tokens), ttt)
        self.kept = ttt.context - ttt.longest_pass  # tokens
        self.begin = self.renewed = 0  # where the text begins; what lies before was read at once
        self.pieces: list[tuple[int, Weights]] = []  # whose keys and values are cached
        self.oldest: list[int] = []  # token that each of theirs saw
        self.entering: list[tuple[int, Weights]] = []
        self.first = 0

    def enter(self, number: int, start: int, end: int) -> None:
        frozen = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.pieces += self.entering
        self.oldest += [self.first - self.kept for size, _ in self.entering for _ in range(size)]
        self.first = self.passes[number].first
        if number and self.ttt.refresh and number % self.ttt.refresh == 0:
            past = min(self.first, self.kept)
            self.begin, self.renewed = self.first - past, self.first
            self.pieces, self.oldest = [(past, frozen)] if past else [], [0] * past
        entering = self.passes[number].to_cache
        self.entering = [(entering, frozen)] if entering else []

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, exclusive: bool
    ) -> Tensor:
        own = v
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        at = torch.arange(self.begin, self.begin + len(q))
        present = [self.first - self.kept] * (len(q) - len(self.oldest))
        oldest = torch.tensor([*self.oldest, *present])
        hidden = (at > at[:, None]) | (at < oldest[:, None])
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        y = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return exclude_own_value(y, own) if exclusive else y

    def losses(self, start: int, end: int) -> Tensor:
        pieces = [*self.pieces, (end - self.first, self.weights)]
        adapters = spliced_adapters(pieces, self.ttt.sites, len(self.model.visits))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("model.kernels.dispatch.varlen_attention", self.attention)
            return self._read(self.begin, end, adapters)[start - self.begin :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk": 5, "context": 13},
        {"chunk": 8, "context": 8},
        # A first token that attends to itself alone has no gradient but rounding, which RMSProp
        # would blow up to a full step: no attention sites.
        {"chunk": 1, "context": 6, "sites": ["mlp", "head"]},
        {"hash_buckets": 16},
        {"hash_buckets": 16, "sites": []},
        {"chunk": 100, "context": 100},
        {"steps": 3, "lr_decay_tokens": 20, "hash_buckets": 16, "hash_rate": 3.0},
        {"mode": "cached", "context": 64, "hash_buckets": 16},
        {"mode": "cached", "chunk": 5, "context": 13},
        {"mode": "cached", "chunk": 7, "context": 31, "steps": 2},
        {"mode": "cached", "chunk": 8, "context": 8},
        {"mode": "cached", "chunk": 8, "context": 12, "lr_decay_tokens": 9},
        {
            "mode": "cached",
            "chunk": 8,
            "context": 29,
            "refresh": 2,
            "hash_buckets": 16,
            "hash_rate": 3.0,
        },
        {"chunk": 4, "largest_chunk": 16, "lr_decay_tokens": 9, "lr_warmup_tokens": 10},
        {"mode": "cached", "chunk": 4, "largest_chunk": 16, "context": 40, "refresh": 5},
        {"mode": "cached", "chunk": 5, "context": 29, "bptt_chunks": 2, "hash_buckets": 16},
        {
            "mode": "cached",
            "chunk": 4,
            "largest_chunk": 16,
            "context": 64,
            "bptt_chunks": 3,
            "steps": 2,
        },
        {"mode": "cached", "chunk": 4, "context": 16, "bptt_chunks": 3},
        {"mode": "cached", "chunk": 4, "context": 20, "bptt_chunks": 1, "refresh": 3},
    ],
)
def test_batched_loop_equals_the_naive_one(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.ttt.chunking.TOKENS_BEFORE", 2)  # chunks grow within short texts
    equals_the_naive_loop(small_model(), changes)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=case_name)
@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 5, "context": 13},
        {"chunk": 5, "context": 13, "sites": ["key", "attention"]},
        {"mode": "cached", "chunk": 5, "context": 29, "bptt_chunks": 2, "hash_buckets": 16},
    ],
)
def test_documents_adapt_with_every_technique(
    technique: dict[str, Any], changes: dict[str, Any]
) -> None:
    equals_the_naive_loop(small_model(**technique), changes, [2, 9, 30, 41])


def equals_the_naive_loop(
    model: GPT, changes: dict[str, Any], lengths: Sequence[int] = LENGTHS
) -> None:
    ttt = ttt_params(**changes)
    documents = random_documents(lengths)
    losses = ttt_losses(model, documents, ttt, execution_params(ttt_documents=3), ALONE)
    naive = NaiveCached if ttt.mode == "cached" else Naive
    for document, loss in zip(documents, losses, strict=True):
        assert loss.dtype == np.float32
        np.testing.assert_allclose(loss, naive(model, document, ttt).run(), atol=3e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "cached", "context": 29, "bptt_chunks": 2, "chunk": 5, "hash_buckets": 16},
        {"mode": "cached", "refresh": 2, "steps": 2, "lr_decay_tokens": 9, "weight_decay": 0.5},
    ],
)
def test_a_mixture_of_rates_is_that_of_documents_read_at_each(changes: dict[str, Any]) -> None:
    model, documents = small_model(), random_documents(LENGTHS)
    ttt = ttt_params(lr_mixture=[0.5, 0.0, 4.0], mixture_tokens=3, **changes)
    progress = list[int]()
    execution = execution_params(ttt_documents=3)
    mixed = ttt_losses(model, documents, ttt, execution, ALONE, progress.append)
    assert sum(progress) == sum(LENGTHS)
    alone = [
        ttt_losses(
            model, documents, dataclasses.replace(ttt, lr=lr, lr_mixture=[]), execution, ALONE
        )
        for lr in (0.5 * ttt.lr, 4 * ttt.lr)
    ]
    alone.append([losses_as_it_is(model, document, ttt.context) for document in documents])
    for one, *others in zip(mixed, *alone, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, mixed_losses(np.stack(others), 3), atol=3e-5)
    assert any(np.abs(one - two).max() > 0.01 for one, two in zip(*alone[1:], strict=True))


@torch.no_grad()
def losses_as_it_is(model: GPT, document: np.ndarray, context: int) -> np.ndarray:
    """Each target by a pass of its own: windows begin at multiples of a quarter of `context`."""
    stride, found = context // 4, []
    tokens, targets = (to_indices(t, CPU) for t in (document, targets_of(document)))
    for end in range(1, document.size + 1):
        start = stride * max(0, math.ceil((end - context) / stride))
        packed = Documents.from_lengths([end - start])
        found.append(model.losses(tokens[start:end], targets[start:end], packed)[-1].item())
    return np.array(found, np.float32)


def test_the_model_as_it_is_needs_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list[int]()
    begin = DocumentAdapters.__init__

    def noted(self: Any, model: GPT, ttt: TTTConfig, capacity: int) -> None:
        rows.append(capacity)
        begin(self, model, ttt, capacity)

    monkeypatch.setattr(DocumentAdapters, "__init__", noted)
    ttt = ttt_params(lr_mixture=[0.0, 1.0])
    ttt_losses(small_model(), random_documents([20, 30]), ttt, execution_params(), ALONE)
    assert rows == [2]
    assert ttt.lr_factors == [1.0]


@pytest.mark.parametrize("mixture", [[0.0], [0.0, 0.5, 0.0]])
def test_the_model_as_it_is_may_be_mixed_in_once(mixture: list[float]) -> None:
    with pytest.raises(ImpossibleValue, match=r"lr_mixture: .* twice or alone"):
        ttt_params(lr_mixture=mixture)


def test_one_rate_is_no_mixture() -> None:
    model, documents = small_model(), random_documents(LENGTHS)
    off, one = (
        ttt_losses(model, documents, ttt_params(lr_mixture=rates), execution_params(), ALONE)
        for rates in ([], [1.0])
    )
    for two, other in zip(off, one, strict=True):
        np.testing.assert_array_equal(two, other)


def test_passes_include_chunks_of_their_size_and_run_no_cached_token_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.ttt.chunking.TOKENS_BEFORE", 2)
    ttt = ttt_params(mode="cached", chunk=4, largest_chunk=8, context=64, bptt_chunks=2)
    found = passes(45, ttt)
    assert [(one.start, one.end) for one in found] == list(chunks(45, ttt))
    assert [one.first for one in found] == [0, 0, 0, 4, 4, 8, 16, 24]
    assert [one.to_cache for one in found] == [0, 0, 4, 0, 4, 8, 8, 8]
    for length in range(1, 45):
        assert passes(length, ttt) == [one for one in found if one.start < length]


def test_chunks_grow_with_what_was_read_up_to_the_largest() -> None:
    ttt = ttt_params(chunk=16, largest_chunk=64, context=64)
    spans = list(chunks(6000, ttt))
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    sizes = {16: range(2048), 32: range(2048, 4096), 64: range(4096, 6000)}
    assert all(start in sizes[end - start] for start, end in spans)
    assert spans[-1][0] < 6000 <= spans[-1][1]
    alike = ttt_params(chunk=16)
    assert list(chunks(40, alike)) == [(0, 16), (16, 32), (32, 48)]


MODES = pytest.mark.parametrize("mode", ["window", "cached"])


@MODES
def test_adaptation_changes_every_score_after_the_first_chunk_and_none_in_it(mode: str) -> None:
    model = small_model()
    documents = random_documents([64])
    (plain,) = plain_losses(model, documents, 64, ALONE)
    (adapted,) = ttt_losses(model, documents, ttt_params(mode=mode), execution_params(), ALONE)
    np.testing.assert_allclose(adapted[:8], plain[:8], atol=1e-5)
    assert (np.abs(adapted[8:32] - plain[8:32]) > 1e-4).mean() > 0.9


@MODES
@pytest.mark.parametrize("hash_buckets", [0, 16])
def test_zero_learning_rate_scores_as_the_model_alone(mode: str, hash_buckets: int) -> None:
    model = small_model()
    documents = random_documents([32, 20, 3])
    ttt = dataclasses.replace(ttt_params(mode=mode, hash_buckets=hash_buckets), lr=0.0)
    plain = plain_losses(model, documents, 64, ALONE)
    adapted = ttt_losses(model, documents, ttt, execution_params(), ALONE)
    for one, other in zip(adapted, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_fresh_adapters_change_nothing_at_all() -> None:
    model = small_model()
    ttt = ttt_params(hash_buckets=16)
    adapters = naive_adapters(initial_parameters(model.config, ttt), ttt.sites, 4)
    tokens = torch.tensor(random_documents([30])[0].tolist())
    packed = Documents.from_lengths([30])
    with torch.no_grad():
        assert torch.equal(model(tokens, packed, adapters), model(tokens, packed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "cached"},
        {"mode": "cached", "refresh": 2, "steps": 2},
        {"mode": "cached", "bptt_chunks": 2},
        {"steps": 2},
        {"mode": "cached", "lr_mixture": [0.5, 2.0]},
    ],
)
@pytest.mark.parametrize("position", [1, 8, 9, 31, 50, 63])
def test_later_tokens_leave_earlier_scores_bit_for_bit(
    position: int, changes: dict[str, Any]
) -> None:
    model = small_model()
    ttt = ttt_params(hash_buckets=16, **changes)
    documents = random_documents([64, 60, 20])
    before = ttt_losses(model, documents, ttt, execution_params(), ALONE)
    documents[0][position] = 4 + (documents[0][position] + 1) % 60
    after = ttt_losses(model, documents, ttt, execution_params(), ALONE)
    np.testing.assert_array_equal(after[0][: position - 1], before[0][: position - 1])
    assert after[0][position - 1] != before[0][position - 1]
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[2], before[2])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "cached"},
        {"mode": "cached", "bptt_chunks": 2, "refresh": 3, "hash_buckets": 16},
        {"mode": "cached", "lr_mixture": [0.5, 2.0]},
    ],
)
def test_batch_mates_batch_size_and_order_change_nothing(changes: dict[str, Any]) -> None:
    """So neither execution.ttt_documents nor execution.ttt_tokens needs to be a cache key."""
    model, ttt = small_model(), ttt_params(**changes)
    documents = random_documents(LENGTHS)
    whole = execution_params(ttt_documents=100)
    together = ttt_losses(model, documents, ttt, whole, ALONE)
    smaller = [dataclasses.replace(whole, ttt_documents=count) for count in (1, 3)]
    smaller += [dataclasses.replace(whole, ttt_tokens=count) for count in (1, 24, 70)]
    for execution in smaller:
        other = ttt_losses(model, documents[::-1], ttt, execution, ALONE)[::-1]
        for one, two in zip(together, other, strict=True):
            np.testing.assert_allclose(one, two, atol=3e-5)


def _adapt(
    group: Group, documents: list[np.ndarray], changes: dict[str, Any]
) -> tuple[list[np.ndarray], int]:
    done: list[int] = []
    ttt, execution = ttt_params(**changes), execution_params(ttt_documents=2)
    losses = ttt_losses(small_model(), documents, ttt, execution, group, done.append)
    return losses, sum(done)


@pytest.mark.parametrize(
    ("changes", "lengths", "tolerance"),
    [
        ({}, LENGTHS, 3e-5),
        ({"shared_lr": 0.003, "round_tokens": 64}, [30, 9, 40, 3, 25, 64, 8, 17], 2e-4),
    ],
    ids=["fixed weights", "rounds"],
)
def test_two_processes_equal_one(
    changes: dict[str, Any], lengths: list[int], tolerance: float
) -> None:
    documents = random_documents(lengths)
    expected, total = _adapt(ALONE, documents, changes)
    assert total == sum(lengths)
    (losses, main_total), (nothing, other_total) = run_processes(2, _adapt, documents, changes)
    assert nothing == []
    assert main_total == other_total == total
    for one, other in zip(losses, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


@pytest.mark.parametrize(("mode", "rows"), [("window", [2, 3, 2, 2]), ("cached", [3, 3, 1, 2])])
def test_batches_hold_each_document_once_longest_first_within_both_bounds(
    mode: str, rows: list[int]
) -> None:
    lengths = [9, 90, 10, 40, 11, 5, 1, 33, 64]
    bounds = execution_params(ttt_documents=3, ttt_tokens=70)
    batches = document_batches(lengths, ttt_params(mode=mode), bounds, 1, CPU)
    flat = [number for batch in batches for number in batch.members]
    assert sorted(flat) == list(range(len(lengths)))
    ordered = [lengths[number] for number in flat]
    assert ordered == sorted(lengths, reverse=True)
    assert [len(batch.members) for batch in batches] == rows
    assert [batch.adapts for batch in batches] == [True, True, True, False]


def test_the_rates_of_a_document_are_read_at_once() -> None:
    ttt = ttt_params(mode="cached", lr_mixture=[0.5, 1.0, 2.0])
    bounds = execution_params(ttt_documents=3, ttt_tokens=70)
    batches = document_batches([90, 80, 70, 60], ttt, bounds, 1, CPU)
    assert [len(batch.members) for batch in batches] == [2, 2]  # 2 · 3 rows · 8 tokens, of 70


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=60),
    st.integers(1, 4),
    st.sampled_from([3000, 20_000]),
)
def test_what_is_read_at_once_is_bounded_pass_by_pass(
    lengths: list[int], processes: int, limit: int
) -> None:
    ttt = ttt_params(chunk=32, context=2048)
    bounds = execution_params(ttt_documents=40, ttt_tokens=limit)
    batches = document_batches(lengths, ttt, bounds, processes, CPU)
    assert sorted(n for batch in batches for n in batch.members) == list(range(len(lengths)))
    for batch in (batch for batch in batches if batch.adapts):
        members = np.array([lengths[number] for number in batch.members])
        assert members.tolist() == sorted(members, reverse=True)
        assert members.size <= 40
        over = passes(int(members[0]), ttt)
        for one, left in zip(over, documents_left(over, members), strict=True):
            # A window ends with a chunk, up to one token short of it behind the document's end.
            assert left * (min(one.end, 2048) - 31) <= limit or left == 1


def test_chunks_that_run_again_count_as_read() -> None:
    ttt = ttt_params(mode="cached", chunk=8, context=64)
    tokens_at_once = READERS["cached"].tokens_at_once
    assert tokens_at_once(90, ttt) == 8
    assert tokens_at_once(90, dataclasses.replace(ttt, bptt_chunks=2)) == 24
    alone, longer = (
        bytes_per_document(small_model(), dataclasses.replace(ttt, bptt_chunks=count))
        for count in (0, 2)
    )
    assert longer > alone
    mixed = bytes_per_document(small_model(), dataclasses.replace(ttt, lr_mixture=[0.5, 1.0, 2.0]))
    assert mixed == 3 * alone
    hashing = bytes_per_document(small_model(), dataclasses.replace(ttt, hash_buckets=64))
    assert hashing - alone == 64 * 32 * 16  # values, second moments, gradients twice; fp32


@pytest.mark.parametrize("changes", [{}, {"sites": ["head", "mlp"]}, {"hash_buckets": 16}])
def test_values_of_a_document_are_those_it_starts_from(changes: dict[str, Any]) -> None:
    model, ttt = small_model().config, ttt_params(**changes)
    initial = initial_parameters(model, ttt)
    assert values_per_document(model, ttt) == sum(x.numel() for x in initial.values())


def planned(lengths: Sequence[int], ttt: Any) -> tuple[Sequence[int], SessionPlan]:
    return lengths, session_plan(lengths, ttt, CPU, captured=False)


def test_several_processes_get_batches_small_enough_to_keep_all_busy() -> None:
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(7, 1, 400)).astype(int).tolist()
    ttt = ttt_params(mode="cached", chunk=32, context=2048)
    bounds = execution_params(ttt_documents=256, ttt_tokens=65536)

    def seconds(rows: int, start: int, end: int) -> int:
        return PASS + rows * (end - start + STEP)

    def makespan(processes: int, known: int) -> float:
        batches = document_batches(lengths, ttt, bounds, known, CPU)
        assert sorted(n for batch in batches for n in batch.members) == list(range(400))
        plans = [planned([lengths[n] for n in batch.members], ttt) for batch in batches]
        return simulate(plans, processes, seconds).makespan

    assert makespan(4, 4) < 0.5 * makespan(1, 1)
    assert makespan(4, 4) < 0.6 * makespan(4, 1)


def test_only_the_first_batches_are_smaller_for_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "skips_empty_slots", lambda device: True)  # as on a GPU
    lengths = [5000, 4000, 1000, *[300] * 40]
    ttt = ttt_params(mode="cached", chunk=32, context=2048)
    bounds = execution_params(ttt_documents=16, ttt_tokens=65536)
    for processes in (2, 3):
        batches = document_batches(lengths, ttt, bounds, processes, CPU)
        sizes = [len(batch.members) for batch in batches]
        assert 1 < len(sizes) <= processes + 3
        assert all(size == 16 for size in sizes[processes - 1 : -1])
        assert sizes[0] < 3


def test_windows_of_few_documents_grow_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_mode, "STEP", 128)
    monkeypatch.setattr(window_mode, "GROWTH", 2048)
    ttt = ttt_params(chunk=32, context=2048)
    over, counts = passes(4096, ttt), (1, 2, 7, 16, 500)

    def tokens(one: Pass, documents: int) -> int:
        return WindowReader.shapes([one], documents, ttt, CPU, captured=True)[0].tokens

    found = {n: {tokens(one, n) for one in over} for n in counts}
    assert [min(found[n]) for n in counts] == [2048, 1024, 512, 128, 128]
    for number, lengths in found.items():
        step = min(lengths)
        assert lengths == set(range(step, 2049, step))
        for one in over:
            assert tokens(one, number) >= min(one.end, 2048)


def test_simulation_of_a_queue_worked_out_by_hand() -> None:
    """Batches of 3, 2 and 1 chunks of 8 tokens; a chunk of n rows takes n."""
    plans = [planned(lengths, ttt_params()) for lengths in ([24, 10], [9, 7], [5])]
    alone = simulate(plans, 1, lambda rows, start, end: rows)
    assert (alone.busy, alone.makespan, alone.longest, alone.wasted_rows) == (9, 9, 5, 0)
    padded = [(n, dataclasses.replace(p, rows=(2,) * len(p.passes))) for n, p in plans]
    two = simulate(padded, 2, lambda rows, start, end: rows)
    assert (two.busy, two.makespan, two.longest) == (12, 6, 6)
    assert two.wasted_rows == pytest.approx(3 / 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "cached"},
        {"mode": "cached", "steps": 2, "refresh": 3, "hash_buckets": 16},
        {"mode": "cached", "bptt_chunks": 3},
        {"mode": "cached", "lr_mixture": [0.5, 2.0, 4.0]},
        {"mode": "window"},
        {"mode": "window", "chunk": 4, "steps": 2, "hash_buckets": 16},
        {"mode": "window", "chunk": 4, "largest_chunk": 16},
    ],
)
def test_replayed_chunks_equal_those_run_as_they_are(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.ttt.chunking.TOKENS_BEFORE", 8)
    for reader in READERS.values():
        monkeypatch.setattr(reader, "ROWS_PER_OCTAVE", 1)  # rows above the documents left
    model = small_model()
    ttt = ttt_params(context=40, **changes)
    documents = random_documents([150, 140, 120, 61, 60, 59, 20])
    runner = ReplayRunner()
    with fixed_weights(model):
        expected = Session(model, ttt, 7, EAGER).losses(documents, SharedProgress(None))
        session = Session(model, ttt, 7, runner)
        for part in (documents, documents[2:], documents):  # the memory is used again
            found = session.losses(part, SharedProgress(None))
            for one, other in zip(found[::-1], expected[::-1], strict=False):
                np.testing.assert_allclose(one, other, atol=3e-5)
    assert runner.played.total() > 20
    assert len({rows for rows, _ in runner.played}) > 1
    if ttt.mode == "window":  # those that grow, too
        assert {shape.tokens for rows, shape in runner.played} == {16, 32, 40}


def test_padded_windows_equal_those_that_end_with_the_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ttt = small_model(), ttt_params(context=40, hash_buckets=16)
    tokens = torch.tensor(np.stack(random_documents([64] * 3)).astype(np.int64))

    def found(step: int) -> list[tuple[int, list[Tensor]]]:
        monkeypatch.setattr(window_mode, "STEP", step)
        torch.manual_seed(0)
        adapters = DocumentAdapters(model, ttt, 3)
        for group in adapters._groups:
            group._compute_weights += 0.05 * torch.randn_like(group._compute_weights)
        adapters.keep_first(3)
        leaves = [group.leaf for group in adapters._groups]
        reader = WindowReader(model, adapters, ttt, 3, captured=True)
        reader.begin(tokens, tokens.roll(-1, 1))
        results = []
        for one in passes(64, ttt):
            reader._window_tokens.fill_(5)  # left by others
            reader.seek(one, *reader.shapes([one], 3, ttt, CPU, captured=True))
            assert not reader._window.view(3, -1)[:, one.end :].any()
            losses = reader.losses(first=True)
            gradients = torch.autograd.grad(losses.sum(), leaves)
            results.append((reader._packed.max_seqlen, [losses, *gradients]))
        return results

    with fixed_weights(model):
        ending, filled = found(1), found(16)
    assert [length for length, _ in ending] == [8, 16, 24, 32, 40, 40, 40, 40]
    assert [length for length, _ in filled] == [16, 16, 32, 32, 40, 40, 40, 40]
    for (_, one), (_, other) in zip(ending, filled, strict=True):
        for first, second in zip(one, other, strict=True):
            assert first.abs().max() > 1e-3
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@MODES
def test_the_memory_of_a_session_is_free_when_it_ends(mode: str) -> None:
    model, documents = small_model(), random_documents([30, 20])
    gc.disable()  # memory of a GPU does not wait for Python to collect cycles
    try:
        with fixed_weights(model):
            session = Session(model, ttt_params(mode=mode), 2, EAGER)
            session.losses(documents, SharedProgress(None))
            kept: list[weakref.ref[Any]] = [
                weakref.ref(part) for part in (session, session._reader, session._adapters)
            ]
            if isinstance(session._reader, CachedReader):
                kept += [weakref.ref(session._reader._cache.storage)]
            del session
        assert not any(part() for part in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("position", [14, 6, 0])
def test_work_for_some_tokens_alone_equals_that_for_all(position: int) -> None:
    model = small_model()
    documents = random_documents([20, 20, 20])
    tokens = torch.tensor(np.stack(documents).astype(np.int64)).flatten()
    packed = Documents.from_rows(3, 20)
    wanted = position + torch.arange(6)
    targets = tokens.view(3, 20)[:, wanted].flatten()
    initial = initial_parameters(model.config, ttt_params())
    weights = {name: t + 0.1 * torch.randn_like(t) for name, t in initial.items()}
    each = [{n: t + 0.1 * torch.randn_like(t) for n, t in weights.items()} for _ in range(3)]
    laid_out = [concatenate_by_input(one, ttt_params().sites, 4) for one in each]
    parameters = {
        n: torch.stack([one[n] for one in laid_out]).requires_grad_() for n in laid_out[0]
    }
    parts = [adapters_by_input(parameters, ttt_params().sites, layer) for layer in range(4)]
    blocks = [BlockAdapters(part["attention"], part["mlp"]) for part in parts]
    adapters = Adapters(blocks, parts[0]["head"])
    select = torch.arange(60).view(3, 20)[:, wanted].flatten()
    whole = model.losses(tokens, targets, packed, adapters, select=select)
    with fixed_weights(model):
        alone = model.losses(tokens, targets, packed, adapters, query_positions=wanted)
        torch.testing.assert_close(alone, whole)
        gradients = [
            torch.autograd.grad(x.sum(), list(parameters.values())) for x in (alone, whole)
        ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("width", [16, 64])  # plain attention, and the kernels
def test_cuda_graphs_equal_the_eager_loop(
    mode: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_bound", {})
    device = torch.device("cuda")
    dispatch.configure("auto", device)
    model = small_model(width=4 * width, head_width=width).cuda()
    documents = random_documents([150, 140, 120, 61, 60, 59, 20] * 2)
    group = Group(0, 1, device)
    ttt = ttt_params(mode=mode, context=40, rank=16)
    expected, graphs = (
        ttt_losses(model, documents, ttt, execution_params(cuda_graphs=captured), group)
        for captured in (False, True)
    )
    for one, other in zip(graphs, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-2)


@pytest.mark.parametrize("mode", ["window", "cached"])
def test_bf16_scores_are_near_and_the_weights_come_back(mode: str) -> None:
    model = small_model()
    documents = random_documents([50, 20])
    ttt, execution = ttt_params(mode=mode, lr=1e-4), execution_params()
    expected = ttt_losses(model, documents, ttt, execution, ALONE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.compute_dtype = torch.bfloat16
    found = ttt_losses(model, documents, ttt, execution, ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.3)
        assert abs(one.mean() - other.mean()) < 0.03


def test_fixed_weights_change_nothing_but_rounding() -> None:
    model = small_model()
    tokens = torch.tensor(random_documents([30])[0].tolist())
    packed = Documents.from_lengths([30])
    with torch.no_grad():
        expected = model(tokens, packed)
        with fixed_weights(model):
            torch.testing.assert_close(model(tokens, packed), expected)
        assert torch.equal(model(tokens, packed), expected)


def test_a_repetitive_document_is_learned() -> None:
    model = small_model()
    document = np.array([1, *([7, 12, 5, 30] * 30)], np.uint16)
    (plain,) = plain_losses(model, [document], 64, ALONE)
    (adapted,) = ttt_losses(model, [document], ttt_params(lr=0.01), execution_params(), ALONE)
    assert adapted[60:-1].mean() < plain[60:-1].mean() - 0.5


def test_the_model_is_left_as_it_was() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ttt_losses(model, random_documents([20, 30]), ttt_params(), execution_params(), ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_no_documents_and_diverging_adapters_are_input_errors() -> None:
    model = small_model()
    with pytest.raises(InputError, match="no documents"):
        ttt_losses(model, [], ttt_params(), execution_params(), ALONE)
    with torch.no_grad():
        model.embedding[0, 0] = math.nan  # an entry of all logits
    with pytest.raises(InputError, match=r"target 1 of document 0 is nan"):
        ttt_losses(model, random_documents([20]), ttt_params(), execution_params(), ALONE)
