"""The arithmetic against its formulas, one value at a time; packing is its own inverse.

pytest tests/test_quantization.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import bitvla._native as native
from bitvla.quantization import (
    EPSILON,
    STEPS,
    Packing,
    code_columns,
    pack,
    quantize_activations,
    ternarize,
    ternary_linear,
    unpack,
)

floats = st.floats(-(2.0**60), 2.0**60, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=floats)
codes = arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.integers(-1, 1))


@given(matrices)
def test_ternary_codes_follow_the_formula(weight: np.ndarray) -> None:
    result, scale = ternarize(weight)
    mean = math.fsum(abs(float(w)) for w in weight.flat) / weight.size
    assert scale == pytest.approx(max(mean, 1e-5), rel=1e-6)
    assert scale.dtype == np.float32
    assert result.dtype == np.int8
    for w, code in zip(weight.flat, result.flat, strict=True):
        ratio = np.float32(w) * (np.float32(1) / scale)
        assert code == max(-1, min(1, round(float(ratio))))  # Python rounds half to even, too


def test_ternary_ties_go_to_even() -> None:
    codes, scale = ternarize(np.array([[0.5, -0.5, 1.0, -2.0]], np.float32))
    assert scale == 1
    assert codes.tolist() == [[0, 0, 1, -1]]


@pytest.mark.parametrize("weight", [np.zeros((0, 3)), np.array([[1.0, np.nan]]), np.array([[np.inf]])])
def test_weights_without_a_scale_are_refused(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot ternarise"):
        ternarize(weight)


def test_zeros_stay_zeros() -> None:
    assert ternarize(np.zeros((2, 2), np.float32)) == (pytest.approx(np.zeros((2, 2))), EPSILON)
    codes, scale = quantize_activations(np.zeros((1, 4), np.float32))
    assert not codes.any()
    assert scale == EPSILON / np.float32(127)


@given(matrices)
def test_activation_codes_follow_the_formula(x: np.ndarray) -> None:
    codes, scale = quantize_activations(x)
    assert codes.dtype == np.int8
    for row, row_codes, row_scale in zip(x, codes, scale, strict=True):
        beta = np.maximum(np.max(np.abs(row)), np.float32(1e-5))
        assert row_scale == beta / np.float32(127)
        expected = [round(float(np.float32(value) * (np.float32(127) / beta))) for value in row]
        assert row_codes.tolist() == [max(-128, min(127, code)) for code in expected]


@given(matrices, st.integers(1, 20), st.randoms(use_true_random=False))
def test_products_accumulate_exactly(x: np.ndarray, rows: int, random: object) -> None:
    weight = np.random.default_rng(rows).standard_normal((rows, x.shape[1]), dtype=np.float32)
    x_codes, x_scale = quantize_activations(x)
    w_codes, w_scale = ternarize(weight)
    exact = [[sum(int(a) * int(w) for a, w in zip(xs, ws, strict=True)) for ws in w_codes] for xs in x_codes]
    expected = np.array(exact, dtype=np.float32) * (w_scale * x_scale)[:, None]
    np.testing.assert_array_equal(ternary_linear(x, weight), expected)


packings = st.sampled_from(list(STEPS))


@given(codes, packings)
def test_unpack_inverts_pack(values: np.ndarray, packing: Packing) -> None:
    packed = pack(values, packing)
    rows, columns = values.shape
    assert packed.shape == (math.ceil(rows / 16), math.ceil(columns / (16 if packing == "2bit" else 20)), 64)
    np.testing.assert_array_equal(unpack(packed, rows, columns, packing=packing), values)


@pytest.mark.parametrize("size", [1, 3, 1152, 4304, 6912])
@pytest.mark.parametrize("packing", STEPS)
def test_awkward_shapes_are_packed(size: int, packing: Packing) -> None:
    for shape in ((size, 3), (3, size)):
        values = np.random.default_rng(size).integers(-1, 2, shape).astype(np.int8)
        np.testing.assert_array_equal(unpack(pack(values, packing), *shape, packing=packing), values)


def test_the_layout_is_as_documented() -> None:
    """Byte r*4 + j of a block, bits 2p and 2p+1: row r, column 4p + j, as weight + 1."""
    values = np.random.default_rng(0).integers(-1, 2, (37, 21)).astype(np.int8)
    packed = pack(values)
    for row in range(48):
        for column in range(32):
            byte = packed[row // 16, column // 16, (row % 16) * 4 + column % 4]
            weight = values[row, column] if row < 37 and column < 21 else 0
            assert byte >> (2 * (column % 16 // 4)) & 3 == weight + 1


def test_the_layout_in_base_3_is_as_documented() -> None:
    """Byte r*4 + j of a block: row r, columns 4p + j; digit p comes out by multiplying by 3 again and again."""
    values = np.random.default_rng(0).integers(-1, 2, (37, 21)).astype(np.int8)
    packed = pack(values, "base3")
    for row in range(48):
        for column in range(40):
            byte = int(packed[row // 16, column // 20, (row % 16) * 4 + column % 4])
            weight = values[row, column] if row < 37 and column < 21 else 0
            assert byte * 3 ** (column % 20 // 4) % 256 * 3 // 256 == weight + 1


@settings(max_examples=100)
@given(codes, packings, st.data())
def test_damaged_packing_is_found(values: np.ndarray, packing: Packing, data: st.DataObject) -> None:
    """An unused code, or a weight in the padding, is an error; any other change gives other weights."""
    packed = pack(values, packing)
    flat = packed.reshape(-1)
    position, new = data.draw(st.integers(0, flat.size - 1)), data.draw(st.integers(0, 255))
    old, flat[position] = flat[position], new
    try:
        assert np.array_equal(unpack(packed, *values.shape, packing=packing), values) == (old == new)
    except ValueError:
        assert new != old


def test_the_unused_bytes_of_base_3_are_found() -> None:
    used = {-(-256 * value // 243) for value in range(243)}
    for byte in set(range(256)) - used:
        with pytest.raises(ValueError, match="unused code"):
            unpack(np.full((1, 1, 64), byte, np.uint8), 16, 20, packing="base3")


@pytest.mark.parametrize("values", [np.full((2, 2), 2, np.int8), np.zeros(4, np.int8), np.full((1, 1), -2, np.int8)])
def test_only_matrices_of_ternary_codes_are_packed(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a matrix"):
        pack(values)


def test_a_packed_matrix_of_another_shape_is_refused() -> None:
    packed = pack(np.ones((16, 17), np.int8))
    with pytest.raises(ValueError, match="is not"):
        unpack(packed, 16, 16)


@settings(max_examples=100)
@given(matrices)
def test_native_codes_are_the_same(x: np.ndarray) -> None:
    """The native quantiser on arbitrary values, under every instruction set: codes, scales, sums, padding."""
    expected, scale = quantize_activations(x)
    for isa in native.available():
        native.set_isa(isa)
        codes = np.full((len(x), code_columns(x.shape[1])), 77, np.int8)
        scales, sums = np.zeros(len(x), np.float32), np.zeros(len(x), np.int32)
        native.quantize(x, codes, scales, sums)
        np.testing.assert_array_equal(codes[:, : x.shape[1]], expected)
        assert not codes[:, x.shape[1] :].any()
        np.testing.assert_array_equal(scales, scale)
        np.testing.assert_array_equal(sums, expected.sum(1, dtype=np.int32))
