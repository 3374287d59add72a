"""Matrix products of general libraries on the shapes of `kernels.py`, those that are installed.

Each runs in a process of its own: the threads of some spin for a while when they have nothing to do, which takes the
cores from whoever is measured next. Every peer gets its weights ready-made outside the measured call, int8 peers their
int8 activations too; the ternary kernel is measured on the same terms. None of them has a 2-bit weight, so their
weights take 4 to 16 times the memory.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import numpy as np

Call = Callable[[], Any]


def available() -> list[str]:
    """Names of the peers whose packages are installed."""
    return [
        peer for peer, (packages, _) in PEERS.items() if all(importlib.util.find_spec(package) for package in packages)
    ]


def seconds_of(call: Call, least: float = 0.02) -> float:
    """Seconds of one call, the mean over as many as take `least` seconds."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= least:
            return elapsed / calls


class PeerProcess:
    """A peer's product of M tokens, N rows, K columns, in its own process."""

    def __init__(self, peer: str, m: int, n: int, k: int, threads: int) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_prepare, initargs=(peer, m, n, k, threads)
        )

    def seconds(self) -> float:
        """Seconds of one product."""
        return self._pool.submit(_measure).result()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pool.shutdown()


_call: Call | None = None


def _prepare(peer: str, m: int, n: int, k: int, threads: int) -> None:
    global _call
    _call = PEERS[peer][1](m, n, k, threads)


def _measure() -> float:
    assert _call is not None
    return seconds_of(_call)


def _torch_float32(m: int, n: int, k: int, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    x, weight, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
    return lambda: torch.mm(x, weight.T, out=out)


def _torch_bfloat16(m: int, n: int, k: int, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    x, weight = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    return lambda: torch.mm(x, weight.T, out=out)


def _torch_int8(m: int, n: int, k: int, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-1, 2, (n, k), dtype=torch.int8).T
    return lambda: torch._int_mm(x, weight)


def _onnxruntime_int8(m: int, n: int, k: int, threads: int) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.integers(-1, 2, (k, n)).astype(np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])],  # its fast path has unsigned activations
        [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = rng.integers(0, 256, (m, k)).astype(np.uint8)
    return lambda: session.run(None, {"x": x})


def _openvino_int8(m: int, n: int, k: int, threads: int) -> Call:
    """uint8 activations and int8 weights; only behind fake quantisation does it compute in int8, so that is there."""
    import openvino as ov
    from openvino import opset13 as ops

    def scalar(value: float) -> Any:
        return ops.constant(np.float32(value))

    rng = np.random.default_rng(0)
    x = ops.parameter([m, k], np.uint8, name="x")
    activations = ops.fake_quantize(
        ops.convert(x, np.float32), scalar(0), scalar(255), scalar(0), scalar(2.55), levels=256
    )
    stored = ops.convert(ops.constant(rng.integers(-1, 2, (n, k)).astype(np.int8)), np.float32)
    weights = ops.fake_quantize(stored, scalar(-127), scalar(127), scalar(-1.27), scalar(1.27), levels=255)
    model = ov.Model([ops.matmul(activations, weights, False, True)], [x], "product")
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kernels = [row["primitiveType"].astype(str) for row in facts if row["layerType"].astype(str) == "FullyConnected"]
    if len(kernels) != 1 or not kernels[0].endswith("I8"):
        raise RuntimeError(f"OpenVINO computes the product by {kernels}, not in int8")
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(rng.integers(0, 256, (m, k)).astype(np.uint8)))
    return request.infer


# The packages that each needs, and what prepares its call for M tokens, N rows, K columns and a number of threads.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[int, int, int, int], Call]]] = {
    "torch float32": (("torch",), _torch_float32),
    "torch bfloat16": (("torch",), _torch_bfloat16),
    "torch int8": (("torch",), _torch_int8),
    "onnxruntime int8": (("onnx", "onnxruntime"), _onnxruntime_int8),
    "openvino int8": (("openvino",), _openvino_int8),
}
