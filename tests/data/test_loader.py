import itertools
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.loader import TokenStream, TrainingBatches, pack_span, validation_documents
from model.data.shards import BOS, Manifest, ShardWriter
from model.evaluation.losses import targets_of
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.presets import preset

TRAIN = preset("record").train
CPU = torch.device("cpu")


def write_stream(directory, tokens, shard_tokens, split="train"):
    with ShardWriter(directory, split, shard_tokens) as writer:
        writer.write(np.asarray(tokens, np.uint16), np.zeros(len(tokens)))
    return [directory / shard.file for shard in writer.shards]


def random_stream(length, seed=0):
    """Tokens that begin with BOS, a tenth of them BOS."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, 1000, length)
    tokens[random.random(length) < 0.1] = BOS
    tokens[0] = BOS
    return tokens


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 60),
    shard_tokens=st.integers(1, 25),
    index=st.integers(0, 40),
    length=st.integers(1, 100),
)
def test_spans_are_slices_of_the_endless_stream(
    tmp_path_factory, total, shard_tokens, index, length
):
    tokens = np.arange(total) + 7
    paths = write_stream(tmp_path_factory.mktemp("stream"), tokens, shard_tokens)
    span = TokenStream(paths).span(index, length)
    positions = range(index * length, index * length + length + 1)
    expected = [7 + position % total for position in positions]
    assert span.tolist() == expected
    assert span.dtype == np.uint16


def test_a_stream_needs_shards():
    with pytest.raises(InputError, match="no training shards"):
        TokenStream([])


def test_the_worked_example_of_packing():
    a, b, c, d, e, f, g = range(10, 17)
    span = np.array([a, b, BOS, c, d, e, f, BOS, BOS, g])
    assert pack_span(span, 3) == [2, 3, 2, 1, 2]
    assert pack_span(span[:0], 3) == []
    assert pack_span(np.full(6, 9), 3) == [3, 3]


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=1, max_size=50),
    sequence_length=st.integers(1, 9),
)
def test_packing_cuts_where_a_token_by_token_walk_does(tokens, sequence_length):
    lengths: list[int] = []
    for position, token in enumerate(tokens):
        if position == 0 or token == BOS or lengths[-1] == sequence_length:
            lengths.append(0)
        lengths[-1] += 1
    assert pack_span(np.array(tokens), sequence_length) == lengths


def batches_of(
    stream, rank=0, size=1, step=0, length=32, per_step=128, sequence_length=16, order=None
):
    group = Group(rank, size, CPU)
    batches = TrainingBatches(stream, length, sequence_length, group, CPU, order)
    return batches.from_span(step * per_step // length)


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return TokenStream(write_stream(tmp_path_factory.mktemp("stream"), random_stream(1000), 300))


def test_batches_are_the_spans_with_their_targets(stream):
    for index, (tokens, targets, documents) in enumerate(take(batches_of(stream), 40)):
        span = stream.span(index, 32).astype(int).tolist()
        assert tokens.tolist() == span[:-1]
        assert targets.tolist() == span[1:]
        assert tokens.dtype == targets.dtype == torch.int64
        lengths = documents.cu_seqlens.diff()
        packed = pack_span(np.array(span[:-1]), 16)
        assert lengths[lengths > 0].tolist() == packed
        assert documents.cu_seqlens.dtype == torch.int32
        assert documents.cu_seqlens.numel() % 64 == 0
        assert documents.cu_seqlens[-1] == documents.total == 32
        assert (documents.max_seqlen, documents.uniform) == (16, None)


def test_boundaries_grow_by_whole_buckets(tmp_path):
    stream = TokenStream(write_stream(tmp_path, np.full(500, BOS), 500))
    for length, entries in ((63, 64), (64, 128), (127, 128), (128, 192)):
        params = {"length": length, "per_step": length}
        (_, _, documents), *_ = take(batches_of(stream, **params), 1)
        assert documents.cu_seqlens.numel() == entries


def test_a_seed_reads_all_spans_in_an_order_of_its_own(stream):
    spans = stream.total // 32
    plain = sorted(stream.span(index, 32)[:-1].tolist() for index in range(spans))
    read = {
        order: [
            tokens.tolist() for tokens, _, _ in take(batches_of(stream, order=order), 3 * spans)
        ]
        for order in (0, 1)
    }
    passes = [order[i : i + spans] for order in read.values() for i in range(0, 3 * spans, spans)]
    assert all(sorted(one) == plain for one in passes)
    assert len({str(one) for one in passes}) == 6
    later = [tokens.tolist() for tokens, _, _ in take(batches_of(stream, step=9, order=1), 4)]
    assert later == read[1][36:40]


@pytest.mark.parametrize("order", [None, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_take_what_one_takes(stream, size, order):
    alone = [tokens.tolist() for tokens, _, _ in take(batches_of(stream, order=order), 12)]
    shares = [
        [
            tokens.tolist()
            for tokens, _, _ in take(batches_of(stream, rank, size, order=order), 12 // size)
        ]
        for rank in range(size)
    ]
    assert [tokens for round_ in zip(*shares, strict=True) for tokens in round_] == alone


def test_nothing_is_dropped_or_repeated_at_shard_ends(stream):
    taken = take(batches_of(stream), 1000)  # 32 times the stream of 1000 tokens
    flat = torch.cat([tokens for tokens, _, _ in taken]).tolist()
    assert flat == 32 * random_stream(1000).tolist()


def test_resuming_needs_only_the_step(stream):
    whole = take(batches_of(stream), 40)
    resumed = take(batches_of(stream, step=7), 12)
    for (tokens, targets, documents), expected in zip(resumed, whole[28:], strict=True):
        assert torch.equal(tokens, expected[0])
        assert torch.equal(targets, expected[1])
        assert torch.equal(documents.cu_seqlens, expected[2].cu_seqlens)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([2, 5, 16])), max_size=5))
def test_another_context_holds_from_the_next_batch_on_and_loses_none(stream, phases):
    group = Group(1, 2, CPU)
    data = TrainingBatches(stream, 32, 16, group, CPU)
    indices = itertools.count(1, 2)
    with closing(data.from_span(0)) as batches:
        for count, context in phases:
            data.context = context
            for index, (tokens, _, documents) in zip(
                itertools.islice(indices, count), batches, strict=False
            ):
                expected, cut = data.host_batch(index, context)
                assert torch.equal(tokens, expected[0])
                assert torch.equal(documents.cu_seqlens, cut.cu_seqlens)
                assert documents.max_seqlen == 16
                assert documents.cu_seqlens.diff().max() <= context
    assert threads() == []


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_thread_ends_with_the_iterator(stream):
    for count in (0, 1, 5):
        batches = batches_of(stream)
        list(itertools.islice(batches, count))
        assert len(threads()) == (count > 0)
        batches.close()
        assert threads() == []


def test_errors_of_the_thread_reach_the_caller():
    class Broken:
        def span(self, index, length):
            if index == 3:
                raise OSError("the disk is gone")
            return np.full(length + 1, 9, np.uint16)

    batches = batches_of(Broken())
    assert len(list(itertools.islice(batches, 3))) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu(stream):
    device = torch.device("cuda", 0)
    on_gpu = TrainingBatches(stream, 32, 16, Group(0, 1, device), device).from_span(0)
    for (tokens, targets, documents), expected in zip(
        take(on_gpu, 40), take(batches_of(stream), 40), strict=True
    ):
        assert tokens.device == documents.cu_seqlens.device == device
        assert torch.equal(tokens.cpu(), expected[0])
        assert torch.equal(targets.cpu(), expected[1])
        assert torch.equal(documents.cu_seqlens.cpu(), expected[2].cu_seqlens)


def manifest_of(directory, tokens, shard_tokens=50):
    with ShardWriter(directory, "validation", shard_tokens) as writer:
        writer.write(np.asarray(tokens, np.uint16), np.zeros(len(tokens)))
    return Manifest(
        directory, {}, 1000, "tokenizer.model", "", {"train": [], "validation": writer.shards}
    )


@pytest.mark.parametrize("shard_tokens", [7, 1000])
def test_validation_documents_are_the_whole_split(tmp_path, shard_tokens):
    tokens = random_stream(300, seed=1)
    documents = validation_documents(manifest_of(tmp_path, tokens, shard_tokens))
    assert np.concatenate(documents).tolist() == tokens.tolist()
    assert len(documents) == (tokens == BOS).sum()
    for document in documents:
        assert document[0] == BOS
        assert (document[1:] != BOS).all()
        assert document.dtype == np.uint16


def test_a_limit_takes_evenly_spaced_documents(tmp_path):
    tokens = [token for number in range(10) for token in (BOS, 100 + number)]
    manifest = manifest_of(tmp_path, tokens)

    def numbers(limit, offset=0):
        documents = validation_documents(manifest, limit, offset)
        return [int(document[1]) - 100 for document in documents]

    assert numbers(5) == [0, 2, 4, 6, 8]
    assert numbers(3) == [0, 3, 6]
    assert numbers(1) == [0]
    assert numbers(99) == numbers(None) == list(range(10))
    assert numbers(3, offset=1) == [1, 4, 7]
    assert numbers(3, offset=2) == [2, 5, 8]
    for limit, offset in ((3, 3), (5, 2), (10, 1), (None, 1)):
        with pytest.raises(InputError, match=f"evaluate.offset: {offset} leads to"):
            numbers(limit, offset)


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(InputError, match="no validation documents"):
        validation_documents(manifest_of(tmp_path, []))
    with pytest.raises(InputError, match="does not begin with BOS"):
        validation_documents(manifest_of(tmp_path, [5, 6]))


def test_bytes_of_a_documents_targets_are_its_normalized_length(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer.model")
    for text in (*sentences(20, seed=5), "漢字  \u2581 x", " ", "👍"):
        document = np.array([BOS, *tokenizer.encode([text])[0]], np.uint16)
        counted = tokenizer.sizes(targets_of(document))
        assert counted.sum() == len(tokenizer.normalize(text).encode())
        assert counted[:-1].tolist() == tokenizer.sizes(document)[1:].tolist()
