import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.artifact.quantizer import (
    SEGMENT,
    Quantized,
    column_codes,
    column_factors,
    trellis_grids,
)


def walked(codes):
    """Grids of one column of trellis codes by the definition, row by row."""
    grids: list[int] = []
    for row in range(len(codes)):
        start, before = row // SEGMENT * SEGMENT, row - 2
        grid = grids[before] if before >= start else 0
        parity = int(codes[row - 1]) % 2 if row - 1 >= start else 0
        grids.append(grid ^ parity)
    return grids


@given(st.integers(1, 3 * SEGMENT), st.integers(1, 3), st.integers(0, 2**16))
def test_grids_follow_the_parities(rows, columns, seed):
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(-5, 6, (rows, columns), generator=source, dtype=torch.int16)
    found = trellis_grids(codes)
    for column in range(columns):
        assert found[:, column].tolist() == walked(codes[:, column])
    assert torch.equal(trellis_grids(codes.to(torch.int8)), found)


def test_factors_of_columns_are_told_apart_and_nearest():
    every = torch.arange(-128, 128).to(torch.int8)
    factors = column_factors(every)
    assert torch.equal(column_codes(factors), every)
    assert (factors.diff() > 0).all()
    assert factors.tolist() == [2.0 ** (c // 4) * (1 + c % 4 / 4) for c in range(-128, 128)]
    for share in (0.01, 0.49, 0.51, 0.99):  # of the way to the next
        between = factors[:-1] + share * factors.diff()
        assert torch.equal(column_codes(between), every[:-1] + int(share > 0.5))
    assert column_codes(torch.tensor([1e-30, 1e30])).tolist() == [-128, 127]


@given(
    st.integers(1, 2**11 - 1),
    st.integers(-24, 4),
    st.integers(-511, 511),
    st.integers(-128, 127),
    st.booleans(),
)
def test_weights_are_exact(mantissa, exponent, code, column, trellis):
    """A product of any step size, code and factor needs no rounding."""
    scale = torch.tensor([mantissa * 2.0**exponent]).half().clamp(min=2.0**-24)
    codes = torch.tensor([[code], [code]], dtype=torch.int16)
    columns = torch.tensor([column], dtype=torch.int8)
    found = Quantized(codes, scale.repeat(2), 10, columns, trellis).dequantize()
    steps = [code - (code % 2) * 0.5 * (row if trellis else 0) for row in range(2)]
    factor = float(column_factors(columns).double())
    expected = np.array(steps) * float(scale) * factor
    if scale.isfinite():
        assert np.array_equal(found.double()[:, 0].numpy(), expected)
