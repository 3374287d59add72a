"""Does an instruction set compute, bit for bit, what the scalar kernels compute? Asked whenever a policy is loaded.

A few tokens go through every kind of kernel on the policy's own weights and widths: well under 100 ms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bitvla._native as native
from bitvla.quantization import BLOCK
from bitvla.runtime.network import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Linear,
    Quantized,
    Ternary,
    Workspace,
)

_log = logging.getLogger("bitvla")

TOKENS = 3
_TILES = 4  # of each matrix: the last ones, which hold its tail


Part = Encoder | Decoder | Linear


def choose_isa(parts: Sequence[Part]) -> str:
    """Check the instruction set in use and keep it, or warn and fall back to the next one that agrees with scalar."""
    available = list(native.available())
    for isa in available[available.index(native.isa()) :]:
        wrong = mismatches(parts, isa)
        if not wrong:
            native.set_isa(isa)
            return isa
        # A log record of this level reaches standard error even where nothing configures logging.
        _log.warning(
            "the %s kernels differ from the scalar ones on this machine (%s); they are not used, the policy will be "
            "slower. Please report this with the output of: bitvla doctor",
            isa,
            ", ".join(wrong),
        )
    native.set_isa("scalar")
    return "scalar"


def mismatches(parts: Sequence[Part], isa: str) -> list[str]:
    """The names of the kernels whose results under `isa` differ from the scalar ones. Leaves the set in use alone."""
    if isa == "scalar":
        return []
    before = native.isa()
    try:
        native.set_isa("scalar")
        expected = list(_results(parts))
        native.set_isa(isa)
        actual = list(_results(parts))
    finally:
        native.set_isa(before)
    wrong = [name for (name, a), (_, b) in zip(expected, actual, strict=True) if a.tobytes() != b.tobytes()]
    return list(dict.fromkeys(wrong))


def _results(parts: Sequence[Part]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Kernel name and output, always the same ones in the same order."""
    random = np.random.default_rng(0)
    for part in parts:
        if isinstance(part, Linear):
            yield "linear", _linear_result(part, random)
            continue
        for layer in _distinct_shapes(part.layers[0]):
            if isinstance(layer, Linear):
                yield "linear", _linear_result(layer, random)
            else:
                yield from _ternary_results(layer, random)
        if isinstance(part, Encoder):
            yield from _encoder_results(part, random)
        else:
            yield from _decoder_results(part, random)


def _linear_result(layer: Linear, random: np.random.Generator) -> NDArray[np.float32]:
    out = np.zeros((TOKENS, len(layer.weight)), np.float32)
    x = _floats(random, layer.weight.shape[1])
    native.linear(x, layer.weight, layer.bias, out, row_scales=layer.scales)
    return out


def _distinct_shapes(layer: EncoderLayer | DecoderLayer) -> list[Ternary | Linear]:
    matrices = [field for field in layer if isinstance(field, Ternary | Linear)]
    return list({_shape(matrix): matrix for matrix in matrices}.values())


def _shape(matrix: Ternary | Linear) -> tuple[int, ...]:
    return (matrix.rows, matrix.columns) if isinstance(matrix, Ternary) else matrix.weight.shape


def _ternary_results(layer: Ternary, random: np.random.Generator) -> Iterator[tuple[str, NDArray[Any]]]:
    packed = layer.packed[-_TILES:]
    rows = layer.rows - BLOCK * (len(layer.packed) - len(packed))
    bias = None if layer.bias is None else layer.bias[-rows:]
    x = _floats(random, layer.columns)
    quantized = Workspace().quantized(*x.shape)
    native.quantize(x, *quantized)
    yield from _named("quantize", quantized)
    accumulators = np.zeros((TOKENS, rows), np.int32)
    packing = layer.packing
    native.ternary_matmul(quantized.codes, quantized.sums, packed, rows, layer.columns, accumulators, packing=packing)
    yield f"ternary_matmul {layer.rows}x{layer.columns}", accumulators
    for tokens in (TOKENS, 1):  # a matrix product and a matrix-vector product
        out = np.zeros((tokens, rows), np.float32)
        few = quantized.rows(slice(0, tokens))
        native.ternary_linear(
            *few, packed, rows, layer.columns, layer.scale, bias, out, accumulate=True, packing=packing
        )
        yield f"ternary_linear {layer.rows}x{layer.columns}", out


def _encoder_results(encoder: Encoder, random: np.random.Generator) -> Iterator[tuple[str, NDArray[Any]]]:
    config, layer = encoder.config, encoder.layers[0]
    quantized = Workspace().quantized(TOKENS, config.hidden_size)
    x = _floats(random, config.hidden_size)
    norm = layer.layer_norm1
    native.layer_norm_quantize(x, norm.weight, norm.bias, config.layer_norm_eps, *quantized)
    yield from _named("layer_norm_quantize", quantized)
    wide = _floats(random, config.intermediate_size)
    quantized = Workspace().quantized(*wide.shape)
    native.gelu_quantize(wide, True, *quantized)
    yield from _named("gelu_quantize", quantized)
    smooth, out = np.zeros_like(x), np.zeros_like(x)
    native.gelu(x, False, smooth)
    yield "gelu", smooth
    native.attention(x, x, x, config.num_heads, config.num_heads, 1.0, False, out)
    yield "attention", out


def _decoder_results(decoder: Decoder, random: np.random.Generator) -> Iterator[tuple[str, NDArray[Any]]]:
    language, layer = decoder.language, decoder.layers[0]
    x, eps = _floats(random, language.hidden_size), language.rms_norm_eps
    quantized = Workspace().quantized(*x.shape)
    native.rms_norm_quantize(x, layer.input_layernorm, eps, *quantized)
    yield from _named("rms_norm_quantize", quantized)
    gate, up = _floats(random, language.intermediate_size), _floats(random, language.intermediate_size)
    quantized = Workspace().quantized(*gate.shape)
    native.relu2_gate_norm_quantize(gate, up, layer.ffn_sub_norm, eps, *quantized)
    yield from _named("relu2_gate_norm_quantize", quantized)
    keys = _floats(random, language.num_kv_heads * language.head_dim)
    native.rope(x, decoder.cos, decoder.sin, 1, language.num_heads)
    yield "rope", x
    out = np.zeros_like(x)
    native.attention(x, keys, keys, language.num_heads, language.num_kv_heads, language.head_dim**-0.5, True, out)
    yield "attention", out


def _floats(random: np.random.Generator, width: int) -> NDArray[np.float32]:
    return random.standard_normal((TOKENS, width), dtype=np.float32)


def _named(name: str, quantized: Quantized) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in quantized:
        yield name, part
