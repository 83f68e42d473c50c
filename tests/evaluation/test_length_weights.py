"""Bits per byte by length of document and weighted to FineWeb's lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation.length_weights import (
    BYTES_PER_TOKEN,
    FINEWEB_TOKENS,
    MOST,
    by_length,
    class_of,
    covered,
    weighted,
)

DOCUMENT = st.tuples(st.integers(1, 20_000), st.integers(1, 60_000), st.floats(0, 1e5))


@given(st.lists(DOCUMENT, min_size=1, max_size=30))
def test_the_weighted_mean_is_that_of_its_definition(documents) -> None:
    """Document by document; and it is the plain mean where every class is alike."""
    lengths, sizes, nats = map(np.array, zip(*documents, strict=True))
    rows = by_length(lengths, sizes, {"a": nats, "same": sizes * np.log(2.0)})
    total = share_seen = 0.0
    least = 0
    for most, share in zip(MOST, FINEWEB_TOKENS, strict=True):
        inside = [one for one in documents if least < one[1] / BYTES_PER_TOKEN <= (most or 10**9)]
        if inside:
            bits = sum(one[2] for one in inside) / np.log(2) / sum(one[1] for one in inside)
            total, share_seen = total + share * bits, share_seen + share
        least = most or least
    assert weighted(rows, "a") == pytest.approx(total / share_seen)
    assert weighted(rows, "same") == pytest.approx(1)
    assert covered(rows) == pytest.approx(share_seen)
    assert sum(row["documents"] for row in rows) == len(documents)
    assert [sum(row[key] for row in rows) for key in ("tokens", "bytes")] == [
        lengths.sum(),
        sizes.sum(),
    ]


def test_a_document_is_of_the_class_of_its_bytes_whatever_the_tokenizer() -> None:
    edges = np.array(MOST[:-1]) * 3.735
    assert class_of(edges * 0.999).tolist() == list(range(7))
    assert class_of(edges * 1.001).tolist() == list(range(1, 8))


def test_shares_are_shares() -> None:
    assert sum(FINEWEB_TOKENS) == pytest.approx(1, abs=0.002)  # as published, rounded
    assert len(MOST) == len(FINEWEB_TOKENS)
