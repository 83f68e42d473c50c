import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from model.artifact.entropy_coder import (
    BUCKETS,
    FREE_WEIGHT,
    HEADER,
    LARGEST,
    _borders,
    _Context,
    _gaussians,
    decode_codes,
    encode_codes,
)


def entropy_bytes(codes):
    """Zero-order entropy of all codes together."""
    counts = np.unique(codes, return_counts=True)[1]
    return -(counts * np.log2(counts / codes.size)).sum() / 8


def gaussian(shape, rows=0.0, columns=0.0, width=6.0, seed=0):
    """Codes whose width varies log-normally by row and by column."""
    source = np.random.default_rng(seed)
    widths = np.exp(rows * source.standard_normal((shape[0], shape[1], 1)))
    widths = widths * np.exp(columns * source.standard_normal((shape[0], 1, shape[2])))
    return (
        (width * widths * source.standard_normal(shape)).round().clip(-1023, 1023).astype(np.int16)
    )


@settings(max_examples=60)
@given(
    arrays(
        np.int16,
        array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=20),
        elements=st.integers(-LARGEST, LARGEST),
    )
)
def test_any_codes_come_back(codes):
    assert np.array_equal(decode_codes(encode_codes(codes), codes.shape), codes)


@pytest.mark.parametrize("shape", [(1, 1, 300), (3, 130, 257), (2, 128, 128), (1, 300, 1)])
@pytest.mark.parametrize("width", [0.01, 1.0, 60.0, 900.0])
def test_several_tiles_come_back(shape, width):
    codes = gaussian(shape, 0.5, 0.5, width)
    assert np.array_equal(decode_codes(encode_codes(codes), codes.shape), codes)


def test_equal_widths_cost_their_entropy():
    codes = gaussian((4, 384, 384))
    assert len(encode_codes(codes)) < 1.002 * entropy_bytes(codes)


def test_widths_of_rows_and_columns_are_learned():
    codes = gaussian((2, 512, 512), rows=0.4, columns=0.4)
    # Were all widths known, the codes would cost what those of equal width cost.
    known = (
        sum(
            entropy_bytes(gaussian((1, 4, 4096), width=width, seed=1)) / 4096 / 4
            for width in 6 * np.exp(np.sqrt(0.32) * np.linspace(-2.5, 2.5, 21))
        )
        / 21
        * codes.size
    )
    assert known * 0.98 < len(encode_codes(codes)) < 0.975 * entropy_bytes(codes)


def test_zeros_cost_next_to_nothing():
    assert len(encode_codes(np.zeros((4, 512, 512), np.int8))) < 300


def test_the_fixed_point_is_that_of_the_coder():
    """Frequencies are probabilities of (f + 1)/2^24 exactly: what the coder needs says so."""
    import constriction

    frequencies = np.array([2**23 - 1, 2**23 - 3 - 2**10, 2**10 - 1, 1], np.int64)
    assert frequencies.sum() == FREE_WEIGHT - 4
    for symbol, f in enumerate(frequencies):
        encoder = constriction.stream.queue.RangeEncoder()
        model = constriction.stream.model.Categorical(frequencies.astype(float), perfect=False)
        symbols = np.full(20_000, symbol, np.int32)
        encoder.encode(symbols, model)
        expected = symbols.size * np.log2(FREE_WEIGHT / (f + 1))
        assert encoder.num_bits() == pytest.approx(expected, abs=64, rel=1e-5)


def test_frequencies_fill_the_fixed_point_and_all_is_integer():
    context = _Context((1, 4, 4), np.array([300]), 127)
    assert _gaussians(127).dtype == _borders().dtype == np.int64
    assert (np.diff(_borders()) > 0).all()
    for bucket in range(BUCKETS):
        context.learn(bucket, np.full(10**6, bucket))
        frequencies = context.frequencies(bucket)
        assert frequencies.dtype == np.int64
        assert frequencies.sum() == FREE_WEIGHT - 255
        assert (frequencies >= 0).all()


def test_the_initial_distributions_are_nearly_gaussian():
    counts = _gaussians(127)
    for bucket in range(12, 40):
        share = counts[bucket] / counts[bucket].sum()
        mean = (share * np.abs(np.arange(-127, 128))).sum()
        border = _borders()[bucket - 1] / 256
        if 1 < border < 20:
            assert 0.95 * border < mean < 1.35 * border


SHAPE = (2, 40, 50)


@pytest.mark.parametrize("position", [0, 4, 5, 6, 11, 15, 19, 30, 1000, -1])
def test_damage_is_refused(position):
    data = bytearray(encode_codes(gaussian(SHAPE)))
    data[position] ^= 8
    with pytest.raises((ValueError, AssertionError)):
        decode_codes(bytes(data), SHAPE)


@pytest.mark.parametrize("length", [0, 5, HEADER.size, HEADER.size + 3, 1000])
def test_truncation_is_refused(length):
    with pytest.raises((ValueError, AssertionError)):
        decode_codes(encode_codes(gaussian(SHAPE))[:length], SHAPE)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 20)),
    st.floats(0.01, 300),
    st.integers(0, 2**16),
    st.integers(1, 3),
    st.binary(min_size=12, max_size=12),
)
def test_surplus_words_are_refused(shape, width, seed, words, surplus):
    codes = gaussian(shape, width=width, seed=seed)
    data = encode_codes(codes)
    assert np.array_equal(decode_codes(data, shape), codes)
    with pytest.raises(ValueError, match="surplus"):
        decode_codes(data + surplus[: 4 * words], shape)


def test_another_shape_is_refused_before_anything_is_allocated():
    data = encode_codes(gaussian(SHAPE))
    largest = HEADER.pack(0, 5, 2, 2**32 - 1, 2**32 - 1)
    with pytest.raises(ValueError, match="instead of"):
        decode_codes(largest + data[HEADER.size :], SHAPE)


def test_the_bytes_never_change():
    """What one machine and version wrote, every other must read."""
    codes = (np.arange(2 * 9 * 7) ** 2 % 11 - 5).astype(np.int8).reshape(2, 9, 7)
    assert encode_codes(codes).hex() == RECORDED


RECORDED = (
    "8b6a984705000200000009000000070000006d0200008202000099e8f500e1ae458e99c584636981fc04f1fcade5"
    "a21d7d5e2e4b7111886a09d1b76ef5621529e3985be123073dcab522c5d2d5654db34674"
)
