"""Messages of openpi: msgpack, in which NumPy arrays and scalars are dictionaries with byte-string keys.

{b"__ndarray__": True, b"data": bytes, b"dtype": text, b"shape": sequence}, C order
{b"__npgeneric__": True, b"data": value, b"dtype": text}
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from bitvla.errors import BitvlaError

# msgpack makes room for as many elements as a header announces, at every level: keep that small.
MOST_ELEMENTS = 4096
MOST_DIMENSIONS = 8
_KINDS = "biuf"
_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


def pack(message: Any) -> bytes:
    """Encode a message; BitvlaError for what msgpack and openpi do not know."""
    try:
        return msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise BitvlaError(f"the message cannot be encoded: {error}") from None


def unpack(data: bytes) -> Any:
    """Decode a message of a stranger; BitvlaError for anything that is not one. Arrays are read-only views."""
    return unpack_with(data, _decode)


def unpack_with(data: bytes, object_hook: Any) -> Any:
    """`msgpack.unpackb` within narrow limits, its many errors as BitvlaError."""
    try:
        return msgpack.unpackb(
            data,
            object_hook=object_hook,
            strict_map_key=False,
            max_array_len=MOST_ELEMENTS,
            max_map_len=MOST_ELEMENTS,
            max_ext_len=0,
        )
    except BitvlaError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BitvlaError(f"the message is not valid msgpack: {error or type(error).__name__}") from None


def array(data: object, dtype: np.dtype[Any], shape: object) -> np.ndarray[Any, Any]:
    """A view of `data` as an array, when size and type are right; BitvlaError otherwise."""
    if dtype.kind not in _KINDS:
        raise BitvlaError(f"an array has dtype {dtype}; only bool, int and float are taken")
    sizes = shape if isinstance(shape, list | tuple) else ()
    if len(sizes) > MOST_DIMENSIONS or any(type(size) is not int or size < 0 for size in sizes):
        raise BitvlaError(f"an array has the impossible shape {shape!r}"[:200])
    if not isinstance(data, bytes) or math.prod(sizes) * dtype.itemsize != len(data):
        length = len(data) if isinstance(data, bytes) else "no"
        raise BitvlaError(f"an array of shape {tuple(sizes)} and dtype {dtype} comes with {length} bytes"[:200])
    return np.frombuffer(data, dtype).reshape(sizes)


def parse_dtype(text: object) -> np.dtype[Any]:
    """The dtype of a plain number from its short name, such as "<f4"; BitvlaError for anything else."""
    if not isinstance(text, str) or not _NUMBER.fullmatch(text):
        raise BitvlaError(f"unknown dtype {text!r}"[:200])
    return np.dtype(text)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in _KINDS:
        raise TypeError(f"an array of dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__}")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return array(value.get(b"data"), parse_dtype(value.get(b"dtype")), value.get(b"shape"))
    if b"__npgeneric__" in value:
        dtype = parse_dtype(value.get(b"dtype"))
        if not isinstance(value.get(b"data"), bool | int | float):
            raise BitvlaError("a NumPy scalar is not a number")
        return dtype.type(value[b"data"])
    return value
