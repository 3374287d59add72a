"""The arithmetic of a 1-bit policy: ternary weights, int8 activations, and how they are packed.

This is the one definition. Training-time fake quantisation (`bitvla.model.ternary`) and every native kernel
(`csrc/`) are tested against it, bit for bit.

    weights       alpha = mean(|W|) over the tensor;  codes = clip(round(W / alpha), -1, 1)      (paper eq. 1)
    activations   beta = max(|x|) a token;            codes = clip(round(127 x / beta), -128, 127)  (eq. 2)
    product       y = (alpha * beta / 127) * codes_x @ codes_w.T                                  (eq. 4)

Source: BitVLA, arXiv 2506.07530, section III. Rounding is half to even; alpha and beta are at least 1e-5.
The mean is taken in float64 and rounded to float32 once, so that its value does not depend on the order of
summation, hence not on the machine or the library.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

EPSILON = np.float32(1e-5)

Packing = Literal["2bit", "base3"]  # 4 weights a byte, or 5: 2 bits or 1.6 bits a weight
STEPS: dict[Packing, int] = {"2bit": 4, "base3": 5}  # of four columns in a packed block
BLOCK = 16  # rows of a packed block

Int8Array = NDArray[np.int8]
FloatArray = NDArray[np.float32]


def ternarize(weight: NDArray[np.floating]) -> tuple[Int8Array, np.float32]:
    """Ternary codes {-1, 0, 1} (int8, the shape of `weight`) and the scale alpha (float32) of a tensor.

    Raises ValueError for an empty tensor or one with a non-finite value: neither has a scale.
    """
    weight = np.asarray(weight, dtype=np.float32)
    if weight.size == 0 or not np.isfinite(weight).all():
        raise ValueError(f"cannot ternarise a weight of shape {weight.shape} that is empty or not finite")
    alpha = max(np.float32(np.mean(np.abs(weight), dtype=np.float64)), EPSILON)
    codes = np.clip(np.rint(weight * (np.float32(1) / alpha)), -1, 1)
    return codes.astype(np.int8), np.float32(alpha)


def quantize_activations(x: NDArray[np.floating]) -> tuple[Int8Array, FloatArray]:
    """Int8 codes (the shape of `x`) and the dequantisation scale of each token (float32, shape x.shape[:-1])."""
    x = np.asarray(x, dtype=np.float32)
    beta = np.maximum(np.max(np.abs(x), axis=-1), EPSILON)
    codes = np.clip(np.rint(x * (np.float32(127) / beta)[..., None]), -128, 127)
    return codes.astype(np.int8), beta / np.float32(127)


def ternary_linear(x: NDArray[np.floating], weight: NDArray[np.floating]) -> FloatArray:
    """The quantised product x (..., K) by weight (N, K) -> (..., N), with exact int32 accumulation."""
    x_codes, x_scale = quantize_activations(x)
    w_codes, w_scale = ternarize(weight)
    accumulators = x_codes.astype(np.int32) @ w_codes.T.astype(np.int32)
    return accumulators.astype(np.float32) * (w_scale * x_scale)[..., None]


def padded(size: int) -> int:
    """`size` rounded up to whole blocks of rows."""
    return -(-size // BLOCK) * BLOCK


def code_columns(columns: int) -> int:
    """Codes that a token of `columns` activations is padded to, with 0: whole blocks of both packings."""
    return -(-columns // 80) * 80


def packed_shape(rows: int, columns: int, packing: Packing) -> tuple[int, int, int]:
    """The shape of the uint8 array that `pack` makes of a (rows, columns) matrix."""
    return padded(rows) // BLOCK, -(-columns // (4 * STEPS[packing])), 64


def pack(codes: Int8Array, packing: Packing = "2bit") -> NDArray[np.uint8]:
    """Pack ternary codes (N, K) into blocks of 64 bytes: uint8 (ceil(N/16), ceil(K/16), 64), or of K/20 in base 3.

    Byte r*4 + j of a block holds row r and, for p = 0..3, column 4p + j, each as u = weight + 1 in bits 2p and 2p+1.
    In base 3 it holds five columns, p = 0..4, as ceil(v * 256 / 243), where v has the digits u of p = 0, 1, .. 4.
    One 64-byte load and a few steps of arithmetic give the operands of 4-way int8 dot products for 16 rows. Rows and
    columns are padded with weight 0.
    """
    if codes.ndim != 2 or np.any((codes < -1) | (codes > 1)):
        raise ValueError(f"expected a matrix of -1, 0 and 1, got shape {codes.shape}")
    steps, (rows, columns) = STEPS[packing], codes.shape
    tiles, blocks, _ = packed_shape(rows, columns, packing)
    unsigned = np.ones((tiles * BLOCK, blocks * 4 * steps), dtype=np.uint8)
    unsigned[:rows, :columns] = (codes + 1).astype(np.uint8)
    fields = unsigned.reshape(tiles, BLOCK, blocks, steps, 4).transpose(0, 2, 1, 4, 3)  # tile, block, row, j, p
    packed: NDArray[Any]
    if packing == "2bit":
        packed = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    else:
        value = fields[..., 0]
        for step in range(1, steps):
            value = 3 * value + fields[..., step]
        packed = _BYTES[value]
    return np.ascontiguousarray(packed.reshape(tiles, blocks, 64))


def unpack(packed: NDArray[np.uint8], rows: int, columns: int, *, packing: Packing = "2bit") -> Int8Array:
    """The ternary codes (rows, columns) of a packed matrix; the inverse of `pack`.

    Raises ValueError when the shape does not fit, a byte is one that `pack` never writes, or the padding is not 0.
    """
    expected = packed_shape(rows, columns, packing)
    if packed.shape != expected:
        raise ValueError(f"packed shape {packed.shape} is not {expected}, the one of a {rows} x {columns} matrix")
    (tiles, blocks, _), steps = expected, STEPS[packing]
    fields = _FIELDS[packing][packed]  # tile, block, byte, p
    if np.any(fields == UNUSED):
        raise ValueError("packed weights hold an unused code: the data is damaged")
    codes = fields.reshape(tiles, blocks, BLOCK, 4, steps).transpose(0, 2, 1, 4, 3)  # tile, row, block, p, j
    signed = codes.reshape(tiles * BLOCK, blocks * 4 * steps).astype(np.int8) - np.int8(1)
    if np.any(signed[rows:]) or np.any(signed[:, columns:]):
        raise ValueError("the padding of packed weights is not zero: the data is damaged")
    return np.ascontiguousarray(signed[:rows, :columns])


def _fields(packing: Packing) -> NDArray[np.uint8]:
    """For each of the 256 bytes the codes u of its columns, uint8 (256, steps); all UNUSED where `pack` has no use."""
    if packing == "2bit":
        return (np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3).astype(np.uint8)
    fields = np.full((256, 5), UNUSED, np.uint8)
    fields[_BYTES] = np.arange(243)[:, None] // [81, 27, 9, 3, 1] % 3
    return fields


UNUSED = 3
_BYTES = (-(-256 * np.arange(243) // 243)).astype(np.uint8)  # base 3: the byte of each number
_FIELDS = {packing: _fields(packing) for packing in STEPS}
