"""The order of documents by hash: a function of the documents and the seed alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.encoding import Encoded
from model.data.shuffle import Shuffled, shuffle_keys
from model.runtime.errors import InputError


def documents(hashes: list[int]) -> Encoded:
    """A document per hash, which is as long as its hash says and holds it."""
    lengths = np.array([value % 7 + 1 for value in hashes], np.int64)
    pieces = np.repeat(np.array([value % 60_000 for value in hashes], np.uint16), lengths)
    return Encoded(np.stack((pieces, pieces // 2), 1), lengths, np.array(hashes, np.uint64))


def shuffled(folder: Path, parts: list[list[int]], seed: int) -> np.ndarray:
    with Shuffled(folder, seed) as taken:
        for part in parts:
            taken.add(documents(part))
        pieces = list(taken.in_order())
    assert not folder.exists()
    return np.concatenate([np.empty((0, 2), np.uint16), *pieces])


@settings(max_examples=10)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    seed=st.integers(0, 2**32 - 1),
    random=st.randoms(),
)
def test_the_order_depends_on_documents_and_seed_alone(
    tmp_path_factory: pytest.TempPathFactory, hashes, cuts, seed, random
) -> None:
    keys = shuffle_keys(np.array(hashes, np.uint64), seed)
    order = np.argsort(keys, kind="stable").tolist()
    expected = documents([hashes[i] for i in order]).pieces
    mixed = random.sample(hashes, len(hashes))
    edges = sorted({0, len(mixed), *(min(cut, len(mixed)) for cut in cuts)})
    parts = [mixed[begin:end] for begin, end in pairwise(edges)]
    folder = tmp_path_factory.mktemp("shuffle") / "buckets"
    assert np.array_equal(shuffled(folder, parts, seed), expected)


def test_seeds_give_unrelated_orders() -> None:
    hashes = np.arange(1000, dtype=np.uint64)
    ranks = [np.argsort(np.argsort(shuffle_keys(hashes, seed))) for seed in (0, 1, 2)]
    correlations = np.corrcoef([hashes.astype(float), *ranks])
    assert np.abs(correlations - np.eye(4)).max() < 0.15


def test_a_full_disk_is_said_and_nothing_stays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Shuffled, "_paths", lambda *_: (Path("/dev/full"), Path("/dev/full")))
    with pytest.raises(InputError, match="buckets: the disk is full"):
        shuffled(tmp_path / "buckets", [list(range(200))], 0)
    assert not (tmp_path / "buckets").exists()
