"""Matrix products of general libraries on the shapes of `kernels.py`, those that are installed.

Every peer gets its weights ready-made outside the measured call, int8 peers their int8 activations too; the ternary
kernel is measured on the same terms. None of them has a 2-bit weight, so their weights take 4 to 16 times the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[], Any]
Peer = Callable[[int, int, int, int], Call]  # M tokens, N rows, K columns, threads


def available() -> dict[str, Peer]:
    peers: dict[str, Peer] = {}
    try:
        import torch  # noqa: F401
    except ImportError:
        pass
    else:
        peers |= {"torch float32": _torch_float32, "torch bfloat16": _torch_bfloat16, "torch int8": _torch_int8}
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        pass
    else:
        peers["onnxruntime int8"] = _onnxruntime_int8
    return peers


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
