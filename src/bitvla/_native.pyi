"""The native kernels. Arrays are NumPy, in C order (rows of a matrix may lie apart); results go to the last arguments.

M tokens, K columns, N rows of a weight, Kp = `quantization.code_columns(K)`. `codes` int8 (M, Kp), `scales` float32
(M,) and `sums` int32 (M,), the sum of codes of each token, are the quantised activations; `packed` is what
`quantization.pack` makes, in the packing named.
A wrong shape, type or order is a ValueError that names the argument.
"""

from typing import Any

from numpy import float32, int8, int32, uint8
from numpy.typing import NDArray

from bitvla.quantization import Packing

_Floats = NDArray[float32]

def isa() -> str:
    """The instruction set in use: the fastest one, or the one the variable BITVLA_ISA names."""

def available() -> list[str]:
    """The instruction sets this processor can run, fastest first; "scalar" is the last."""

def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def quantize(x: _Floats, codes: NDArray[int8], scales: _Floats, sums: NDArray[int32]) -> None: ...
def rms_norm(x: _Floats, weight: _Floats, eps: float, out: _Floats) -> None: ...
def rms_norm_quantize(
    x: _Floats, weight: _Floats, eps: float, codes: NDArray[int8], scales: _Floats, sums: NDArray[int32]
) -> None: ...
def layer_norm(x: _Floats, weight: _Floats, bias: _Floats, eps: float, out: _Floats) -> None: ...
def layer_norm_quantize(
    x: _Floats, weight: _Floats, bias: _Floats, eps: float, codes: NDArray[int8], scales: _Floats, sums: NDArray[int32]
) -> None: ...
def relu2_gate_norm_quantize(
    gate: _Floats, up: _Floats, weight: _Floats, eps: float, codes: NDArray[int8], scales: _Floats, sums: NDArray[int32]
) -> None:
    """Quantise rms_norm(relu(gate)^2 * up) * weight."""

def gelu_quantize(
    x: _Floats, approximate: bool, codes: NDArray[int8], scales: _Floats, sums: NDArray[int32]
) -> None: ...
def gelu(x: _Floats, approximate: bool, out: _Floats) -> None:
    """GELU by its tanh form if `approximate`, else by erf; `out` may be `x`."""

def relu(x: _Floats, out: _Floats) -> None: ...
def ternary_matmul(
    codes: NDArray[int8],
    sums: NDArray[int32],
    packed: NDArray[uint8],
    n: int,
    k: int,
    out: NDArray[int32],
    packing: Packing = "2bit",
) -> None:
    """The exact integer product, out (M, N)."""

def ternary_linear(
    codes: NDArray[int8],
    scales: _Floats,
    sums: NDArray[int32],
    packed: NDArray[uint8],
    n: int,
    k: int,
    weight_scale: float,
    bias: _Floats | None,
    out: _Floats,
    accumulate: bool = False,
    packing: Packing = "2bit",
) -> None:
    """out = float(product) * (weight_scale * scales) + bias, or added to `out`; each step rounded to float32."""

def linear(
    x: _Floats,
    weight: NDArray[Any],
    bias: _Floats | None,
    out: _Floats,
    accumulate: bool = False,
    row_scales: _Floats | None = None,
) -> None:
    """x @ weight.T + bias; `weight` (N, K) is float32, bfloat16 as uint16, or int8 with `row_scales` (N,)."""

def attention(
    q: _Floats,
    k: _Floats,
    v: _Floats,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    out: _Floats,
    *,
    packed: int | None = None,
) -> None:
    """softmax(scale * q @ k.T) @ v for each head, by blocks; causal means query i of M sees keys 0 .. S - M + i.

    k and v are (S, kv_heads * D), or the first `packed` of those that `append` packed.
    """

def append(k: _Floats, v: _Floats, start: int, kv_heads: int, packed_k: _Floats, packed_v: _Floats) -> None:
    """Put keys and values (M, kv_heads * D) at places start .. start + M of packed ones, as attention reads them.

    `packed_k` is (kv_heads * T, 16 * D), whose rows are 16 keys side by side; `packed_v` is (kv_heads * P, D rounded up
    to 16). Both begin as zeros.
    """

def rope(x: _Floats, cos: _Floats, sin: _Floats, start: int, heads: int) -> None:
    """Rotate the halves of each head of x in place; token i takes row start + i of the tables (P, D / 2)."""

def peak_int8_gmacs(seconds: float, threads: int) -> float:
    """int8 multiply-adds on registers only, by the instruction set in use: the ceiling of `ternary_linear`."""

def peak_bandwidth_gbs(seconds: float, megabytes: int, threads: int) -> float:
    """Memory reads over a buffer of that size."""
