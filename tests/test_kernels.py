"""The Python binding of the kernels against NumPy: integers exactly, floats within derived bounds.

That every instruction set gives the bits of the scalar reference is shown by tests/native; here each of them is run
against independent definitions.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitvla import _native as native
from bitvla.quantization import STEPS, Packing, code_columns, pack, quantize_activations, ternarize
from bitvla.quantization import ternary_linear as numpy_ternary_linear

Floats = NDArray[np.float32]
U = 2.0**-24  # half a unit in the last place of float32, relative: the error of one operation
SHAPES = [(1, 1, 1), (1, 3, 5), (7, 33, 50), (13, 100, 1152), (3, 70, 4304), (30, 130, 700), (5, 1, 6912), (64, 64, 64)]


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def buffers(tokens: int, columns: int) -> tuple[NDArray[np.int8], Floats, NDArray[np.int32]]:
    """Codes, scales and sums filled with values that must be overwritten."""
    codes = np.full((tokens, code_columns(columns)), 77, np.int8)
    return codes, np.full(tokens, np.nan, np.float32), np.full(tokens, 77, np.int32)


def quantized(x: Floats) -> tuple[NDArray[np.int8], Floats, NDArray[np.int32]]:
    result = buffers(*x.shape)
    native.quantize(x, *result)
    return result


def check_codes(result: tuple[Any, ...], exact: NDArray[np.float64]) -> None:
    """Codes of values computed in float32 may differ from those of exact ones by one step, at a tie."""
    codes, scales, sums = result
    columns = exact.shape[1]
    expected = exact / np.maximum(np.abs(exact).max(axis=1, keepdims=True), 1e-5) * 127
    assert np.all(np.abs(codes[:, :columns] - expected) <= 0.5 + 1e-3)
    assert not codes[:, columns:].any()
    np.testing.assert_array_equal(sums, codes.astype(np.int32).sum(axis=1))
    np.testing.assert_allclose(scales, np.maximum(np.abs(exact).max(axis=1), 1e-5) / 127, rtol=1e-5)


# ---- quantisation and the ternary product: equal to NumPy, bit for bit ----------------------------------------------


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4])
def test_quantize_equals_numpy(isa: str, size: float) -> None:
    for columns in (1, 3, 15, 16, 17, 1152, 4304):
        x = normal(5, columns, seed=columns) * np.float32(size)
        codes, scales, sums = quantized(x)
        expected, expected_scales = quantize_activations(x)
        np.testing.assert_array_equal(codes[:, :columns], expected)
        np.testing.assert_array_equal(scales, expected_scales)
        np.testing.assert_array_equal(sums, expected.sum(axis=1, dtype=np.int32))
        assert not codes[:, columns:].any()


def test_quantize_rounds_half_to_even(isa: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]], np.float32)
    assert quantized(x)[0][0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


@pytest.mark.parametrize("packing", STEPS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_ternary_product_equals_numpy(isa: str, m: int, n: int, k: int, packing: Packing) -> None:
    x, weight = normal(m, k), normal(n, k, seed=1)
    codes, scales, sums = quantized(x)
    ternary, alpha = ternarize(weight)
    packed = pack(ternary, packing)
    raw = np.zeros((m, n), np.int32)
    native.ternary_matmul(codes, sums, packed, n, k, raw, packing)
    np.testing.assert_array_equal(raw, codes[:, :k].astype(np.int32) @ ternary.T.astype(np.int32))

    out = np.full((m, n), np.nan, np.float32)
    native.ternary_linear(codes, scales, sums, packed, n, k, alpha, None, out, packing=packing)
    expected = numpy_ternary_linear(x, weight)
    np.testing.assert_array_equal(out, expected)

    bias, before = normal(n, seed=2), normal(m, n, seed=3)
    wide = np.zeros((m, n + 5), np.float32)
    wide[:, :n] = before
    native.ternary_linear(
        codes, scales, sums, packed, n, k, float(alpha), bias, wide[:, :n], accumulate=True, packing=packing
    )
    np.testing.assert_array_equal(wide[:, :n], before + (expected + bias))
    assert not wide[:, n:].any()


@settings(deadline=None, max_examples=150)
@given(m=st.integers(1, 40), n=st.integers(1, 90), k=st.integers(1, 300), seed=st.integers(0, 2**31), data=st.data())
def test_ternary_product_of_any_shape(m: int, n: int, k: int, seed: int, data: st.DataObject) -> None:
    native.set_isa(data.draw(st.sampled_from(native.available())))
    rng = np.random.default_rng(seed)
    weight = rng.integers(-1, 2, (n, k)).astype(np.int8)
    codes = np.zeros((m, code_columns(k)), np.int8)
    codes[:, :k] = rng.integers(-128, 128, (m, k))
    sums = codes.sum(axis=1, dtype=np.int32)
    out = np.zeros((m, n), np.int32)
    packing = data.draw(st.sampled_from(list(STEPS)))
    native.ternary_matmul(codes, sums, pack(weight, packing), n, k, out, packing)
    native.set_isa(native.available()[0])
    np.testing.assert_array_equal(out, codes[:, :k].astype(np.int32) @ weight.T.astype(np.int32))


# ---- norms and activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 16, 100, 1152, 6912])
def test_norms(isa: str, columns: int) -> None:
    x, weight, bias = normal(6, columns) * 3, normal(columns, seed=1), normal(columns, seed=2)
    wide, out = x.astype(np.float64), np.empty_like(x)
    # A sum of n squares in 16 lanes has a relative error of (n / 16 + 5) u; a root halves it; a few steps follow.
    bound = (columns / 16 + 20) * U

    rms = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    native.rms_norm(x, weight, 1e-5, out)
    np.testing.assert_allclose(out, rms, rtol=bound)
    result = buffers(6, columns)
    native.rms_norm_quantize(x, weight, 1e-5, *result)
    check_codes(result, rms)
    again = quantized(out)
    for fused, apart in zip(result, again, strict=True):
        np.testing.assert_array_equal(fused, apart)

    centred = wide - wide.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    native.layer_norm(x, weight, bias, 1e-6, out)
    # The mean is wrong by up to (n / 16 + 5) u mean|x|, which the norm divides by the deviation.
    error = bound * (np.abs(wide).mean(axis=1, keepdims=True) + np.abs(wide)) / deviation * np.abs(weight)
    assert np.all(np.abs(out - (centred / deviation * weight + bias)) <= error + 4 * U * (np.abs(bias) + np.abs(out)))
    result = buffers(6, columns)
    native.layer_norm_quantize(x, weight, bias, 1e-6, *result)
    for fused, apart in zip(result, quantized(out), strict=True):
        np.testing.assert_array_equal(fused, apart)


@pytest.mark.parametrize("columns", [1, 17, 6912])
def test_relu2_gate_norm_quantize(isa: str, columns: int) -> None:
    gate, up, weight = normal(4, columns) * 50, normal(4, columns, seed=1) * 50, normal(columns, seed=2)
    h = np.maximum(gate.astype(np.float64), 0) ** 2 * up
    exact = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    result = buffers(4, columns)
    native.relu2_gate_norm_quantize(gate, up, weight, 1e-5, *result)
    check_codes(result, exact)


@pytest.mark.parametrize("approximate", [True, False])
def test_gelu(isa: str, approximate: bool) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [0, -0.0, 100, -100, 1e-30, 1e30, -1e30]]).astype(np.float32)[None]
    wide = x.astype(np.float64)
    if approximate:
        exact = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        exact = 0.5 * wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    out = np.empty_like(x)
    native.gelu(x, approximate, out)
    np.testing.assert_allclose(out, exact, rtol=4e-7, atol=4e-7)
    result = buffers(*x.shape)
    native.gelu_quantize(x, approximate, *result)
    for fused, apart in zip(result, quantized(out), strict=True):
        np.testing.assert_array_equal(fused, apart)


def test_relu_in_place(isa: str) -> None:
    x = normal(3, 21)
    expected = np.maximum(x, 0)
    native.relu(x, x)
    np.testing.assert_array_equal(x, expected)


# ---- full-precision product, rotary embedding, attention ------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 17), (8, 7, 17920), (40, 30, 192), (65, 64, 588)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_linear(isa: str, m: int, n: int, k: int, stored: str) -> None:
    x, weight, bias = normal(m, k), normal(n, k, seed=1), normal(n, seed=2)
    given_weight: NDArray[Any] = weight
    scales: NDArray[Any] | None = None
    if stored == "int8":
        given_weight, scales = quantize_activations(weight)
        weight = given_weight.astype(np.float32) * scales[:, None]
    if stored == "bfloat16":
        given_weight = (weight.view(np.uint32) >> 16).astype(np.uint16)
        weight = (given_weight.astype(np.uint32) << 16).view(np.float32)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = (k / 16 + 8) * U * (np.abs(x).astype(np.float64) @ np.abs(weight).T)
    out = np.full((m, n), np.nan, np.float32)
    native.linear(x, given_weight, None, out, row_scales=scales)
    assert np.all(np.abs(out - exact) <= bound)
    before = out.copy()
    native.linear(x, given_weight, bias, out, accumulate=True, row_scales=scales)
    np.testing.assert_array_equal(out, before + (before + bias))


@pytest.mark.parametrize("dim", [2, 6, 32, 72, 128])
def test_rope_rotates_halves(isa: str, dim: int) -> None:
    tokens, heads, start = 5, 3, 4
    angles = normal(start + tokens, dim // 2, seed=1)
    cos, sin = np.cos(angles), np.sin(angles)
    fused = normal(tokens, 2 * heads * dim)
    x, rest = fused[:, : heads * dim], fused[:, heads * dim :].copy()
    halves = x.reshape(tokens, heads, 2, dim // 2)
    c, s = cos[start:, None], sin[start:, None]
    expected = np.stack([halves[:, :, 0] * c - halves[:, :, 1] * s, halves[:, :, 1] * c + halves[:, :, 0] * s], axis=2)
    native.rope(x, cos, sin, start, heads)
    np.testing.assert_array_equal(x, expected.reshape(tokens, heads * dim))
    np.testing.assert_array_equal(fused[:, heads * dim :], rest)


def exact_attention(
    q: Floats, k: Floats, v: Floats, heads: int, kv_heads: int, scale: float, causal: bool
) -> NDArray[np.float64]:
    tokens, keys, dim = len(q), len(k), q.shape[1] // heads
    qh = q.reshape(tokens, heads, dim).astype(np.float64)
    kh = np.repeat(k.reshape(keys, kv_heads, dim), heads // kv_heads, axis=1)
    vh = np.repeat(v.reshape(keys, kv_heads, dim), heads // kv_heads, axis=1)
    scores = np.einsum("mhd,shd->hms", qh, kh) * scale
    if causal:
        scores = np.where(np.arange(keys) <= keys - tokens + np.arange(tokens)[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("hms,shd->mhd", p / p.sum(axis=2, keepdims=True), vh).reshape(tokens, heads * dim)


ATTENTION = [(1, 1, 1, 1, 1), (120, 120, 4, 2, 32), (57, 300, 2, 1, 72), (1, 630, 4, 2, 128), (25, 129, 3, 3, 30)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "dim"), ATTENTION)
def test_attention(isa: str, tokens: int, keys: int, heads: int, kv_heads: int, dim: int, causal: bool) -> None:
    q = normal(tokens, heads * dim) * 3
    fused = normal(keys, 2 * kv_heads * dim, seed=1)  # k and v as slices, their rows apart
    k, v = fused[:, : kv_heads * dim], fused[:, kv_heads * dim :]
    out = np.full((tokens, heads * dim + 3), 7, np.float32)
    scale = dim**-0.5
    native.attention(q, k, v, heads, kv_heads, scale, causal, out[:, : heads * dim])
    # An error e of a score changes its weight by a factor of 1 + e; sums of weights and values add their own.
    largest_score = scale * np.sqrt((q**2).sum(axis=1).max() * (k**2).sum(axis=1).max())
    bound = np.abs(v).max() * (2 * dim * largest_score + keys / 16 + keys / 128 + 200) * U
    exact = exact_attention(q, k, v, heads, kv_heads, scale, causal)
    assert np.abs(out[:, : heads * dim] - exact).max() <= bound
    assert np.all(out[:, heads * dim :] == 7)
    packed_k = np.zeros((kv_heads * (keys // 16 + 2), dim * 16), np.float32)
    packed_v = np.zeros((kv_heads * (keys + 3), -(-dim // 16) * 16), np.float32)
    for part in (slice(0, keys // 3), slice(keys // 3, keys)):
        native.append(k[part], v[part], part.start, kv_heads, packed_k, packed_v)
    again = np.empty_like(q)
    native.attention(q, packed_k, packed_v, heads, kv_heads, scale, causal, again, packed=keys)
    np.testing.assert_array_equal(again, out[:, : heads * dim])
    native.attention(q, k, v, heads, kv_heads, scale, causal, q)  # in place
    np.testing.assert_array_equal(q, out[:, : heads * dim])


def test_attention_with_huge_scores_is_finite(isa: str) -> None:
    q, k, v = normal(30, 16) * 1e4, normal(200, 16, seed=1) * 1e4, normal(200, 16, seed=2)
    out = np.empty_like(q)
    native.attention(q, k, v, 1, 1, 0.25, True, out)
    np.testing.assert_allclose(out, exact_attention(q, k, v, 1, 1, 0.25, True), atol=1e-4)


# ---- threads, instruction sets, processes ---------------------------------------------------------------------------


def everything(threads: int) -> list[NDArray[Any]]:
    native.set_num_threads(threads)
    x, weight = normal(131, 500), normal(600, 500, seed=1)
    q = quantized(x)
    ternary, alpha = ternarize(weight)
    product = np.zeros((131, 600), np.float32)
    native.ternary_linear(*q, pack(ternary), 600, 500, alpha, None, product)
    dense = np.zeros((131, 600), np.float32)
    native.linear(x, weight, None, dense)
    attended = np.zeros((131, 480), np.float32)
    native.attention(x[:, :480], x[:, :240].copy(), x[:, 240:480].copy(), 8, 4, 0.1, True, attended)
    return [*q, product, dense, attended]


def test_threads_do_not_change_results() -> None:
    before = native.num_threads()
    try:
        one = everything(1)
        for threads in (2, 3, 7):
            for a, b in zip(one, everything(threads), strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        native.set_num_threads(before)


def _child(queue: Any) -> None:
    queue.put([a.tobytes() for a in everything(2)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kernels_work_after_a_fork() -> None:
    before = native.num_threads()
    expected = [a.tobytes() for a in everything(2)]
    context = get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == expected
        process.join(60)
    finally:
        process.kill()
        native.set_num_threads(before)


NO_ROOM_FOR_THREADS = """
import resource
from pathlib import Path
import numpy as np
from bitvla import _native as native
x = np.linspace(-5, 5, 600 * 2000, dtype=np.float32).reshape(600, 2000)
one, several = np.empty_like(x), np.empty_like(x)
native.set_num_threads(1)
native.gelu(x, True, one)
native.set_num_threads(4)
pages = int(Path("/proc/self/statm").read_text().split()[0])
free = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), free[1]))
native.gelu(x, True, several)
resource.setrlimit(resource.RLIMIT_AS, free)
print(len(list(Path("/proc/self/task").iterdir())), np.array_equal(one, several))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this limit is Linux's")
def test_a_limit_of_memory_leaves_one_thread_at_work() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", NO_ROOM_FOR_THREADS], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_default_threads_are_within_the_affinity() -> None:
    assert 1 <= native.num_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", native.available())
def test_isa_can_be_forced_by_the_environment(name: str) -> None:
    code = "from bitvla import _native; print(_native.isa())"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "BITVLA_ISA": name}, capture_output=True)
    assert run.stdout.decode().strip() == name


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sse9'.*expected one of .*scalar"):
        native.set_isa("sse9")
    run = subprocess.run(
        [sys.executable, "-c", "from bitvla import _native"],
        env={**os.environ, "BITVLA_ISA": "sse9"},
        capture_output=True,
    )
    assert run.returncode != 0
    assert b"BITVLA_ISA=sse9" in run.stderr


def test_ceilings_are_positive() -> None:
    assert native.peak_int8_gmacs(0.01, 1) > 0.1
    assert native.peak_bandwidth_gbs(0.01, 16, 1) > 0.1


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_no_tokens_is_no_work() -> None:
    codes, scales, sums = buffers(0, 20)
    empty = np.zeros((0, 20), np.float32)
    native.quantize(empty, codes, scales, sums)
    native.rms_norm(empty, np.ones(20, np.float32), 1e-5, empty)
    packed = pack(np.zeros((8, 20), np.int8))
    native.ternary_linear(codes, scales, sums, packed, 8, 20, 1.0, None, np.zeros((0, 8), np.float32))
    native.linear(empty, np.zeros((8, 20), np.float32), None, np.zeros((0, 8), np.float32))
    native.attention(empty, normal(5, 20), normal(5, 20), 2, 2, 1.0, False, empty)
    native.rope(empty, np.zeros((3, 5), np.float32), np.zeros((3, 5), np.float32), 0, 2)


def test_wrong_arguments_are_named() -> None:
    x = normal(4, 20)
    codes, scales, sums = buffers(4, 20)
    packed = pack(np.zeros((8, 20), np.int8))
    out = np.zeros((4, 8), np.float32)
    ones = np.ones(20, np.float32)

    def refused(message: str, function: Any, *arguments: Any) -> None:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            function(*arguments)

    refused("codes: shape (4, 20), expected (4, 80)", native.quantize, x, codes[:, :20].copy(), scales, sums)
    refused("scales: shape (3,), expected (4,)", native.quantize, x, codes, scales[:3], sums)
    refused("sums: another type, expected int32", native.quantize, x, codes, scales, sums.astype(np.int64))
    refused("x: another type, expected float32", native.quantize, x.astype(np.float64), codes, scales, sums)
    refused("x: 1 dimensions, expected 2", native.quantize, x[0], codes, scales, sums)
    refused("x: not in C order", native.quantize, normal(20, 4).T, codes, scales, sums)
    refused("weight: shape (19,), expected (20,)", native.rms_norm, x, ones[:19], 1e-5, x)
    refused("bias: shape (21,), expected (20,)", native.layer_norm, x, ones, np.ones(21, np.float32), 1e-5, x)
    refused("up: shape (3, 20)", native.relu2_gate_norm_quantize, x, x[:3], ones, 1e-5, codes, scales, sums)
    refused("out: shape (4, 19)", native.relu, x, x[:, :19])
    linear = native.ternary_linear
    refused("codes: shape (4, 80), expected (4, 160)", linear, codes, scales, sums, packed, 8, 100, 1.0, None, out)
    refused(
        "packed: shape (1, 2, 64), expected (2, 2, 64)", linear, codes, scales, sums, packed, 17, 20, 1.0, None, out
    )
    base3 = partial(linear, packing="base3")
    refused("packed: shape (1, 2, 64), expected (1, 1, 64)", base3, codes, scales, sums, packed, 8, 20, 1.0, None, out)
    refused("packing: 'base4', expected 2bit or base3", native.ternary_matmul, codes, sums, packed, 8, 20, out, "base4")
    refused("k: 0, expected 1 to 262144", linear, codes, scales, sums, packed, 8, 0, 1.0, None, out)
    refused("packed: int8", linear, codes, scales, sums, packed.view(np.int8), 8, 20, 1.0, None, out)
    refused("out: shape (4, 8), expected (4, 7)", linear, codes, scales, sums, packed, 7, 20, 1.0, None, out)
    refused("bias: shape (20,), expected (8,)", linear, codes, scales, sums, packed, 8, 20, 1.0, ones, out)
    refused("out: float32, expected int32", native.ternary_matmul, codes, sums, packed, 8, 20, out)
    refused("weight: shape (8, 19), expected (any, 20)", native.linear, x, normal(8, 19), None, out)
    refused("heads: 3, expected a multiple of kv_heads = 2", native.attention, x, x, x, 3, 2, 1.0, False, x)
    refused("q: shape (4, 20), expected heads = 3", native.attention, x, x, x, 3, 3, 1.0, False, x)
    refused("k: shape (4, 20), expected (any, 10)", native.attention, x, x, x, 2, 1, 1.0, False, x)
    refused("v: shape (3, 20), expected (4, 20)", native.attention, x, x, x[:3], 2, 2, 1.0, False, x)
    refused("k: 3 keys, expected at least the 4 queries", native.attention, x, x[:3], x[:3], 2, 2, 1.0, True, x)
    packed_k, packed_v = np.zeros((4, 160), np.float32), np.zeros((36, 16), np.float32)  # of 2 heads, for 18 keys
    refused(
        "packed_k, packed_v: room for 18 packed keys, expected at least 19",
        native.append,
        x,
        x,
        15,
        2,
        packed_k,
        packed_v,
    )
    refused("packed_k: shape (4, 160), expected (4, 320)", native.append, x, x, 0, 1, packed_k, packed_v)
    refused("kv_heads: 3, expected a divisor of 20", native.append, x, x, 0, 3, packed_k, packed_v)
    packed = partial(native.attention, packed=19)
    refused("k, v: room for 18 packed keys, expected at least 19", packed, x, packed_k, packed_v, 2, 2, 1.0, True, x)
    table = np.zeros((5, 5), np.float32)
    refused("x: shape (4, 20), expected (4, 30)", native.rope, x, table, table, 0, 3)
    refused("cos: 5 positions, expected at least 6", native.rope, x, table, table, 2, 2)
    # Sums and products that would wrap around.
    refused("cos: 5 positions, expected at least 18446744073709551615", native.rope, x, table, table, 2**64 - 1, 2)
    refused("heads: 4611686018427387904, expected at most", native.rope, x[:, :0], table[:, :2], table[:, :2], 0, 2**62)
    refused("packed_k, packed_v: room for 18", native.append, x, x, 2**64 - 1, 2, packed_k, packed_v)
    refused("threads: 0", native.set_num_threads, 0)
    with pytest.raises(TypeError):
        native.relu(x, memoryview(x.tobytes()))  # an output must be writable


# ---- the objects of the build ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("nm") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles the x86-64 files")
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("avx2", ["-mavx2", "-mfma"]),
        ("avx512vnni", ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]),
        ("scalar", []),
    ],
)
def test_instruction_set_objects_share_no_code(tmp_path: Path, name: str, flags: list[str]) -> None:
    """A weak symbol compiled for one instruction set could be the copy the linker keeps for every processor."""
    source = Path(__file__).parents[1] / "csrc" / "kernels" / f"{name}.cpp"
    target = tmp_path / "kernels.o"
    # At -O0, where nothing is inlined away.
    subprocess.run(
        ["c++", "-std=c++20", "-O0", "-w", "-fno-exceptions", *flags, "-c", source, "-o", target], check=True
    )
    symbols = subprocess.run(["nm", "-C", target], check=True, capture_output=True, text=True).stdout
    assert [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)] == []
