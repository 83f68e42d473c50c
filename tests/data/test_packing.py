import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data.packing import Documents, previous


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_index_and_positions_follow_the_lengths(lengths):
    documents = Documents.from_lengths(lengths)
    assert documents.total == sum(lengths)
    assert documents.index.tolist() == [j for j, n in enumerate(lengths) for _ in range(n)]
    assert documents.positions.tolist() == [p for n in lengths for p in range(n)]


def test_rows_are_documents_of_one_length():
    rows, packed = Documents.from_rows(3, 4), Documents.from_lengths([4, 4, 4])
    assert torch.equal(rows.cu_seqlens, packed.cu_seqlens)
    assert rows.uniform == packed.uniform == 4


@pytest.mark.parametrize(
    ("before", "expected"), [(-1, [-1, 1, 2, -1, 4]), (torch.tensor([8, 9]), [8, 1, 2, 9, 4])]
)
def test_previous_stays_inside_the_document(before, expected):
    tokens = torch.tensor([1, 2, 3, 4, 5])
    assert previous(tokens, Documents.from_lengths([3, 2]), before).tolist() == expected
