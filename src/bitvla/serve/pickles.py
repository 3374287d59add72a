"""Pickles, read without executing any and written without the classes they name: what LeRobot's stock client speaks.

A pickle is a program. Python's unpickler imports what it names and calls it, so a stranger's pickle can do anything.
Here `pickletools` only splits it into operations; a small machine of ours then knows a few of them, and of the names a
pickle can mention those in `_CALLS`, `_STORAGES` and the records below, each of which stands for a function of this
file that makes plain data. Nothing is imported, no attribute set, no memory reserved beyond the size of the message.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitvla.errors import BitvlaError
from bitvla.serve.arrays import MOST_DIMENSIONS, array, parse_dtype

MOST_OPERATIONS = 20_000  # an observation of two cameras and seven joints takes about 150
_MOST_IN_STORAGE = 40  # operations of each pickle in a storage, which a message may have read again and again
_MOST_BITS = 128  # of an integer
_MODULES = ("lerobot.async_inference.helpers", "lerobot.scripts.server.helpers")  # since 0.4; before
_RECORDS = ("RemotePolicyConfig", "TimedObservation", "TimedAction")

# How torch.save began before zip files, which is how a tensor's storage is still pickled.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}


class Global(NamedTuple):
    """The name of something importable. It is never imported."""

    module: str
    name: str


class Record(NamedTuple):
    """An object of one of LeRobot's message classes: its class's name and its attributes."""

    kind: Global
    fields: dict[str, Any]


class Call(NamedTuple):
    """For `dumps`: a call that the reader of the pickle makes."""

    function: Global
    arguments: tuple[Any, ...]


class Persistent(NamedTuple):
    """For `dumps`: an object that the pickle only refers to."""

    identity: tuple[Any, ...]


def loads(data: bytes) -> Any:
    """The object of a pickle: plain data, NumPy arrays (also for tensors) and `Record`s. BitvlaError for any other."""
    return _read(io.BytesIO(data), _CALLS, None)


def dumps(value: Any) -> bytes:
    """A pickle (protocol 4) of plain data, `Global`, `Record`, `Call` and `Persistent`."""
    return b"\x80\x04" + b"".join(_Writer().operations(value)) + b"."


def rows_as_tensors(chunk: NDArray[np.float32]) -> list[Call]:
    """The rows of a chunk (horizon, action_dim) as float32 torch tensors for `dumps`, as torch pickles them itself."""
    data = np.ascontiguousarray(chunk, "<f4")
    reference = ("storage", Global("torch", "FloatStorage"), "0", "cpu", data.size, None)
    parts = [_MAGIC, _PROTOCOL, {"protocol_version": _PROTOCOL, "little_endian": True}, Persistent(reference), ["0"]]
    saved = b"".join(map(dumps, parts)) + struct.pack("<q", data.size) + data.tobytes()
    storage = Call(Global("torch.storage", "_load_from_bytes"), (saved,))
    hooks = Call(Global("collections", "OrderedDict"), ())
    width = data.shape[1]
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return [Call(rebuild, (storage, row * width, (width,), (1,), False, hooks)) for row in range(len(data))]


# Reading.


class _Pending:
    """An object that a pickle makes in two steps; `build` makes it from the state of the second one."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build = build
        self.slots: list[int] = []  # of the memo, that hold it


class _Storage(NamedTuple):
    values: NDArray[Any]


_Calls = dict[Global, Callable[..., Any]]
_Find = Callable[[Any], Any]


def _read(stream: io.BytesIO, calls: _Calls, find: _Find | None, most: int = MOST_OPERATIONS) -> Any:
    machine = _Machine(calls, find)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= most:
                raise BitvlaError(f"the pickle has more than {most} operations")
            machine.step(operation.name, argument)
    except BitvlaError:
        raise
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as error:
        raise BitvlaError(f"the pickle is damaged: {type(error).__name__}: {error}"[:200]) from None
    return machine.result()


class _Machine:
    """The stack machine of pickles, as far as plain data needs it."""

    def __init__(self, calls: _Calls, find: _Find | None) -> None:
        self._calls, self._find = calls, find
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._unfinished = 0

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._stack.append(_checked(argument))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise BitvlaError(f"the pickle uses {name}, which plain data does not need")

    def result(self) -> Any:
        if len(self._stack) != 1 or self._marks or self._unfinished:
            raise BitvlaError("the pickle is damaged: it does not end with one finished object")
        return self._stack[0]

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def tuple_since_mark(self, _: Any) -> None:
        self._stack.append(tuple(self.since_mark()))

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("stack")
        self._stack[-count:] = [items]

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("only a list is appended to")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise TypeError("only a dictionary with text as keys is filled")
        target.update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is text")
        self._stack.append(Global(module, name))

    def call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or function not in self._calls:
            raise BitvlaError(f"the pickle calls {_named(function)}; refused")
        if type(arguments) is not tuple:
            raise TypeError("arguments are a tuple")
        value = self._calls[function](*arguments)
        self._unfinished += type(value) is _Pending
        self._stack.append(value)

    def new(self, _: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is not Global or kind.module not in _MODULES or kind.name not in _RECORDS or arguments != ():
            raise BitvlaError(f"the pickle makes a {_named(kind)}; refused")
        self._unfinished += 1
        self._stack.append(_Pending(lambda fields: _record(kind, fields)))

    def build(self, _: Any) -> None:
        state, pending = self._stack.pop(), self._stack[-1]
        if type(pending) is not _Pending:
            raise BitvlaError(f"the pickle sets the state of a {_named(pending)}; refused")
        self._stack[-1] = value = pending.build(state)
        self._unfinished -= 1
        for slot in pending.slots:
            self._memo[slot] = value

    def put(self, slot: int | None) -> None:
        slot = len(self._memo) if slot is None else slot
        value = self._memo[slot] = self._stack[-1]
        if type(value) is _Pending:
            value.slots.append(slot)

    def get(self, slot: int) -> None:
        self._stack.append(self._memo[slot])

    def find(self, _: Any) -> None:
        if self._find is None:
            raise BitvlaError("the pickle refers to something outside of it; refused")
        self._stack.append(self._find(self._stack.pop()))

    def pop(self) -> Any:
        return self._stack.pop()

    def since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items, self._stack[start:] = self._stack[start:], []
        return items


def _checked(value: Any) -> Any:
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise BitvlaError("the pickle has an integer that is too large")
    return value


def _named(value: Any) -> str:
    return f"'{value.module}.{value.name}'"[:100] if type(value) is Global else type(value).__name__


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (),
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ")),
    "STACK_GLOBAL": lambda machine, _: machine.name(*[machine.pop(), machine.pop()][::-1]),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "MEMOIZE": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPERSID": _Machine.find,
}


# What a pickle may call, and what that is here.


def _record(kind: Global, fields: Any) -> Record:
    if type(fields) is not dict:
        raise TypeError(f"the attributes of {kind.name} are not a dictionary")
    return Record(kind, fields)


def _pending_dtype(code: Any, *_: Any) -> _Pending:
    """numpy.dtype("f4", False, True), then the state (3, "<", None, None, None, -1, -1, 0)."""

    def build(state: Any) -> np.dtype[Any]:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", ">", "|", "=") or type(code) is not str:
            raise TypeError("a dtype without byte order")
        return parse_dtype(order + code)

    return _Pending(build)


def _pending_array(kind: Any, *_: Any) -> _Pending:
    """_reconstruct(numpy.ndarray, (0,), b"b"), then the state (1, shape, dtype, Fortran order, data)."""
    if kind != Global("numpy", "ndarray"):
        raise BitvlaError(f"the pickle makes a {_named(kind)}; refused")

    def build(state: Any) -> NDArray[Any]:
        _, shape, dtype, fortran, data = state
        return _array(data, dtype, shape, "F" if fortran else "C")

    return _Pending(build)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, np.dtype) or type(shape) is not tuple:
        raise TypeError("an array without dtype or shape")
    return array(data, dtype, shape[::-1]).T if order == "F" else array(data, dtype, shape)


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _empty(*arguments: Any) -> dict[str, Any]:
    if arguments:
        raise TypeError("OrderedDict with contents")
    return {}


def _load_storage(data: Any) -> _Storage:
    """What torch.save wrote of a storage: five pickles, the number of elements as int64, the elements."""
    if type(data) is not bytes:
        raise TypeError("a storage without bytes")
    stream = io.BytesIO(data)

    def refer(identity: Any) -> Any:
        return identity

    magic, protocol, system, reference, keys = (_read(stream, {}, refer, _MOST_IN_STORAGE) for _ in range(5))
    if magic != _MAGIC or protocol != _PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise BitvlaError("the pickle has a tensor that was not written by torch.save on a little-endian machine")
    what, kind, key, place, count, view = reference
    if (what, place, view) != ("storage", "cpu", None) or keys != [key] or type(kind) is not Global:
        raise BitvlaError("the pickle has a tensor that is not a plain one on the CPU")
    if kind.module != "torch" or kind.name not in _STORAGES:
        raise BitvlaError(f"the pickle has a tensor of {_named(kind)}; refused")
    (length,) = struct.unpack("<q", stream.read(8))
    if type(count) is not int or length != count:
        raise BitvlaError("the pickle has a tensor whose sizes contradict each other")
    # A view: a message may have the same storage read a thousand times.
    dtype, elements = parse_dtype(_STORAGES[kind.name]), np.frombuffer(data, np.uint8)[stream.tell() :]
    if len(elements) != count * dtype.itemsize:
        raise BitvlaError("the pickle has a tensor whose storage is cut off")
    return _Storage(elements.view(dtype))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """A tensor as a view of its storage. Nothing outside of it is seen, and no element twice."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("a tensor without storage, size or stride")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor of impossible shape")
    values, count = storage.values, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(values) or (count and last >= len(values)):
        raise ValueError("a tensor larger than its storage")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps) if count else np.zeros(size, values.dtype)


_CALLS: _Calls = {
    Global("collections", "OrderedDict"): _empty,
    Global("numpy", "dtype"): _pending_dtype,
    Global("torch.storage", "_load_from_bytes"): _load_storage,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
for _core in ("numpy._core", "numpy.core"):  # since NumPy 2; before
    _CALLS |= {
        Global(f"{_core}.multiarray", "_reconstruct"): _pending_array,
        Global(f"{_core}.multiarray", "scalar"): _scalar,
        Global(f"{_core}.numeric", "_frombuffer"): _array,
    }


# Writing.


class _Writer:
    """Turns a value into operations; what is a `Call` and appears again is remembered, as in Python's own pickles."""

    def __init__(self) -> None:
        self._memo: dict[int, int] = {}

    def operations(self, value: Any) -> Iterable[bytes]:
        if id(value) in self._memo:
            yield b"j" + struct.pack("<I", self._memo[id(value)])
            return
        yield from self._operations(value)
        if type(value) is Call:
            self._memo[id(value)] = len(self._memo)
            yield b"r" + struct.pack("<I", self._memo[id(value)])

    def _operations(self, value: Any) -> Iterable[bytes]:
        write = _WRITERS.get(type(value))
        if write is None:
            raise TypeError(f"cannot pickle a {type(value).__name__}")
        return write(self, value)

    def all(self, values: Iterable[Any]) -> Iterable[bytes]:
        for value in values:
            yield from self.operations(value)


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _name(value: Global) -> bytes:
    return _text(value.module) + _text(value.name) + b"\x93"


_WRITERS: dict[type, Callable[[_Writer, Any], Iterable[bytes]]] = {
    type(None): lambda _, value: [b"N"],
    bool: lambda _, value: [b"\x88" if value else b"\x89"],
    int: lambda _, value: [_integer(value)],
    float: lambda _, value: [b"G", struct.pack(">d", value)],
    str: lambda _, value: [_text(value)],
    bytes: lambda _, value: [b"B", struct.pack("<I", len(value)), value],
    tuple: lambda writer, value: [b"(", *writer.all(value), b"t"],
    list: lambda writer, value: [b"](", *writer.all(value), b"e"],
    dict: lambda writer, value: [b"}(", *writer.all(part for item in value.items() for part in item), b"u"],
    Global: lambda _, value: [_name(value)],
    Call: lambda writer, value: [_name(value.function), *writer.operations(value.arguments), b"R"],
    Record: lambda writer, value: [_name(value.kind), b")\x81", *writer.operations(value.fields), b"b"],
    Persistent: lambda writer, value: [*writer.operations(value.identity), b"Q"],
}
