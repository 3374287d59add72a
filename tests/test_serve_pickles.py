"""The reader of pickles: what LeRobot's client sends is understood, what a stranger sends never runs.

pytest tests/test_serve_pickles.py
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitvla.errors import BitvlaError
from bitvla.serve.pickles import Global, Record, dumps, loads, rows_as_tensors
from serving import HELPERS, lerobot_messages


@pytest.fixture(autouse=True)
def lerobot(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return lerobot_messages(monkeypatch)


# What the stock client sends.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_observation_is_read(lerobot: Any, protocol: int) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (48, 64, 3), np.uint8)
    raw = {
        "front": image,
        "turned": np.asfortranarray(image),
        "view": image[::-1, :, ::-1],
        "shoulder.pos": 1.25,
        "elbow.pos": np.float32(0.1),
        "grip": np.int64(3),
        "tensor": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
        "part": torch.arange(10)[3:6],
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "task": "pick the \u00e9toile \U0001f680",
    }
    if protocol == 2:  # writes bytes as text, which needs codecs.encode
        raw = {name: value for name, value in raw.items() if isinstance(value, str | float) and name != "elbow.pos"}
    seen = loads(pickle.dumps(lerobot.TimedObservation(12.5, 7, raw, must_go=True), protocol))
    assert seen.kind == Global(HELPERS, "TimedObservation")
    assert (seen.fields["timestamp"], seen.fields["timestep"], seen.fields["must_go"]) == (12.5, 7, True)
    assert list(seen.fields["observation"]) == list(raw)
    for name, value in raw.items():
        got = seen.fields["observation"][name]
        if isinstance(value, str | float):
            assert got == value
        else:
            wanted = np.asarray(value)
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)


def test_instructions_are_read(lerobot: Any) -> None:
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a.pos", "b.pos"]},
        "observation.images.front": {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
    }
    setup = lerobot.RemotePolicyConfig("bitvla", "nano", features, 16)
    read = loads(pickle.dumps(setup))
    assert read.fields == setup.__dict__


def test_a_chunk_is_written_as_the_stock_client_reads_it(lerobot: Any) -> None:
    chunk = np.random.default_rng(0).standard_normal((16, 7)).astype(np.float32)
    actions = [
        Record(Global(HELPERS, "TimedAction"), {"timestamp": 1.5, "timestep": step, "action": action})
        for step, action in enumerate(rows_as_tensors(chunk))
    ]
    data = dumps(actions)
    read = pickle.loads(data)  # noqa: S301
    assert [action.timestep for action in read] == list(range(16))
    assert all(isinstance(action, lerobot.TimedAction) for action in read)
    for action, row in zip(read, chunk, strict=True):
        assert action.action.dtype == torch.float32
        assert action.action.device.type == "cpu"
        assert action.action.numpy().tobytes() == row.tobytes()
    read[0].action += 1  # the client may compute in place
    theirs = pickle.dumps([lerobot.TimedAction(1.5, 0, torch.zeros(7))])
    assert globals_of(data) == globals_of(theirs), "a client that allows only what a stock server sends allows this"
    ours = loads(data)
    assert all(np.array_equal(a.fields["action"], row) for a, row in zip(ours, chunk, strict=True))


def globals_of(data: bytes) -> set[str]:
    """The names that a pickle imports, those of pickles inside of it too."""
    names, texts = set(), []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("SHORT_BINUNICODE", "BINUNICODE"):
            texts.append(argument)
        elif operation.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
    return names


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=100)
def test_plain_data_goes_both_ways(value: Any) -> None:
    assert loads(pickle.dumps(value)) == value
    assert loads(dumps(value)) == value
    assert pickle.loads(dumps(value)) == value  # noqa: S301


# What a stranger sends.

TOUCHED: list[str] = []


class Reduce:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(name: str = "called") -> None:
    TOUCHED.append(name)


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def storage(kind: bytes = b"ctorch\nFloatStorage\n", count: int = 1, data: bytes = b"\x00" * 4) -> bytes:
    """What torch.save writes of a storage, with parts that can be wrong."""
    identity = b"(" + text("storage") + kind + text("0") + text("cpu") + b"K" + bytes([count]) + b"Nt"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
    return magic + system + raw(identity, b"Q") + pickle.dumps(["0"], 2) + struct.pack("<q", count) + data


def load_storage(data: bytes) -> bytes:
    return named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"


def tensor(source: bytes, offset: bytes = b"K\x00", size: bytes = b"K\x01\x85", stride: bytes = b"K\x01\x85") -> bytes:
    return raw(named("torch._utils", "_rebuild_tensor_v2"), b"(", source, offset, size, stride, b"\x89}tR")


def numpy_array(dtype: bytes, shape: bytes, data: bytes) -> bytes:
    body = b"B" + struct.pack("<I", len(data)) + data
    frombuffer = named("numpy._core.numeric", "_frombuffer")
    return raw(frombuffer, b"(", body, dtype, shape, text("C"), b"tR")


def dtype(code: str, order: str = "<") -> bytes:
    state = b"(K\x03" + text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    return named("numpy", "dtype") + text(code) + b"\x89\x88\x87R" + state + b"b"


RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")


def nested(levels: int) -> bytes:
    return raw(b"]" * levels, b"a" * (levels - 1))


HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps(Reduce(os.system, "touch executed")),
    "os.system, protocol 0": pickle.dumps(Reduce(os.system, "touch executed"), 0),
    "os.system, protocol 2": pickle.dumps(Reduce(os.system, "touch executed"), 2),
    "eval": pickle.dumps(Reduce(eval, "open('executed', 'w')")),
    "exec": pickle.dumps(Reduce(exec, "open('executed', 'w')")),
    "a function of ours": pickle.dumps(Reduce(touch)),
    "getattr": pickle.dumps(Reduce(getattr, "x", "__class__")),
    "getattr of a module": raw(named("builtins", "getattr"), named("os", "path"), text("join"), b"\x86R"),
    "__import__": pickle.dumps(Reduce(__import__, "os")),
    "open": pickle.dumps(Reduce(open, "executed", "w")),
    "a dotted name": raw(named("collections", "OrderedDict.__init__.__globals__"), b")R"),
    "a dotted module": raw(named("numpy", "dtype.__class__"), b")R"),
    "inst": b"(S'touch executed'\nios\nsystem\n.",
    "obj": raw(b"(", named("os", "system"), text("touch executed"), b"o"),
    "newobj": raw(named("subprocess", "Popen"), text("touch executed"), b"\x85\x81"),
    "newobj_ex": raw(named("subprocess", "Popen"), text("touch executed"), b"\x85}\x92"),
    "newobj with arguments": raw(named(HELPERS, "TimedAction"), b"K\x01\x85\x81"),
    "a class of the module that is no message": raw(named(HELPERS, "FPSTracker"), b")\x81}b"),
    "the module's own names": raw(named(HELPERS, "os"), b")\x81}b"),
    "calling a message class": raw(named(HELPERS, "TimedAction"), b")R"),
    "extension registry": raw(b"\x82\x01"),
    "persistent id": raw(text("x"), b"Q"),
    "persistent id, text": b"Pfile\n.",
    "next buffer": raw(b"\x97"),
    "build on a list": raw(b"]}b"),
    "build on a dictionary": raw(b"}", b"}", text("__class__"), b"K\x01s", b"b"),
    "build on a name": raw(named("collections", "OrderedDict"), b"}", text("x"), b"K\x01s", b"b"),
    "build with slots": raw(named(HELPERS, "TimedAction"), b")\x81N}\x86b"),
    "torch.load": raw(named("torch", "load"), text("x"), b"\x85R"),
    "numpy.load": raw(named("numpy", "load"), text("x"), b"\x85R"),
    "inside a storage": tensor(load_storage(pickle.dumps(Reduce(os.system, "touch executed")))),
    "inside a storage, later": tensor(load_storage(storage(kind=pickle.dumps(Reduce(touch), 2)[2:-1]))),
    "a storage inside a storage": tensor(load_storage(raw(load_storage(storage())))),
    "a zip file as storage": tensor(load_storage(b"PK\x03\x04" + b"\x00" * 100)),
    "a storage of another kind": tensor(load_storage(storage(kind=b"cos\nsystem\n"))),
    "a storage of objects": tensor(load_storage(storage(kind=b"ctorch\nUntypedStorage\n"))),
    "a storage that is short": tensor(load_storage(storage(count=9))),
    "a tensor beyond its storage": tensor(load_storage(storage()), size=b"K\x02\x85"),
    "a tensor after its storage": tensor(load_storage(storage()), offset=b"K\x01"),
    "a tensor before its storage": tensor(load_storage(storage()), offset=b"J\xff\xff\xff\xff"),
    "a huge tensor of one element": tensor(load_storage(storage()), size=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"),
    "a tensor with a bad stride": tensor(load_storage(storage()), stride=b"J\xff\xff\xff\xff\x85"),
    "a tensor without storage": tensor(b"N"),
    "an array of objects": numpy_array(dtype("O8", "|"), b"K\x01\x85", b"\x00" * 8),
    "an array of records": numpy_array(dtype("V8", "|"), b"K\x01\x85", b"\x00" * 8),
    "a dtype that is a program": numpy_array(dtype("f4,O", "<"), b"K\x01\x85", b"\x00" * 8),
    "a huge array": numpy_array(dtype("f4"), b"J\xff\xff\xff\x7f\x85", b""),
    "a negative shape": numpy_array(dtype("f4"), b"J\xff\xff\xff\xff\x85", b""),
    "a subclass of an array": raw(RECONSTRUCT, named("numpy", "matrix"), b")N\x87R"),
    "an unfinished array": raw(RECONSTRUCT, named("numpy", "ndarray"), b")N\x87R"),
    "a set": pickle.dumps({1, 2}),
    "bytes as text": pickle.dumps(b"x", 2),
    "a number as a key": pickle.dumps({1: 2}),
    "a list as a key": raw(b"}", b"]K\x01s"),
    "a huge integer": raw(b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000),
    "no operations": b"",
    "only a stop": b".",
    "no stop": b"\x80\x04]",
    "two objects": raw(b"NN"),
    "an unknown operation": raw(b"\xff"),
    "a pop from nothing": raw(b"0N"),
    "a tuple of nothing": raw(b"\x87"),
    "items without a mark": raw(b"]e"),
    "an odd number of items": raw(b"}(", text("a"), b"u"),
    "a value that was never put": raw(b"h\x05"),
    "a text that is cut off": raw(b"X\xff\xff\xff\xff"),
    "bytes of an exabyte": raw(b"\x8e" + struct.pack("<Q", 1 << 60)),
    "too many operations": raw(b"N0" * 50_000, b"N"),
    "too many lists in lists": nested(50_000),
    "a call with itself": raw(named("numpy", "dtype"), b"\x94h\x00\x85R"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    TOUCHED.clear()
    before = set(sys.modules)
    with pytest.raises(BitvlaError):
        loads(HOSTILE[name])
    assert not TOUCHED
    assert not list(tmp_path.iterdir())
    assert set(sys.modules) == before


def test_the_hostile_pickles_would_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: Python's own reader does run them."""
    monkeypatch.chdir(tmp_path)
    TOUCHED.clear()
    pickle.loads(HOSTILE["a function of ours"])  # noqa: S301
    assert TOUCHED
    pickle.loads(HOSTILE["exec"])  # noqa: S301
    assert (tmp_path / "executed").exists()


def test_a_memo_bomb_takes_no_memory() -> None:
    """Python's own reader makes room for two billion entries here."""
    tracemalloc.start()
    try:
        assert loads(raw(b"Nr\xff\xff\xff\x7f")) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def remembered(slot: int, value: bytes) -> bytes:
    return value + b"q" + bytes([slot])


def test_a_storage_that_is_read_again_and_again_takes_no_memory() -> None:
    """A megabyte, made into 200 storages and 200 tensors."""
    count = 250_000
    reference = storage(count=1, data=b"").replace(b"K\x01N", b"J" + struct.pack("<i", count) + b"N")[:-8]
    blob = reference + struct.pack("<q", count) + bytes(4 * count)
    load = remembered(1, named("torch.storage", "_load_from_bytes"))
    data = remembered(0, b"B" + struct.pack("<I", len(blob)) + blob)
    again = remembered(2, b"h\x01h\x00\x85R")
    size = b"J" + struct.pack("<i", count) + b"\x85"
    view = named("torch._utils", "_rebuild_tensor_v2") + b"(h\x02K\x00" + size + b"K\x01\x85tR"
    message = raw(b"](", data, load, again * 200, view * 200, b"e")
    tracemalloc.start()
    try:
        value = loads(message)
        assert value[-1].shape == (count,)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(message)
    finally:
        tracemalloc.stop()


def test_a_storage_has_few_operations() -> None:
    """It may be read a thousand times, so a long program in it would stop the server for minutes."""
    data = storage(kind=b"]" * 100 + b"a" * 99)
    with pytest.raises(BitvlaError, match="more than 40 operations"):
        loads(tensor(load_storage(data)))


def test_oddities_that_do_no_harm() -> None:
    assert loads(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.") is None  # a frame of an exabyte
    assert loads(pickle.dumps(collections.OrderedDict(a=1))) == {"a": 1}


def test_a_list_that_holds_itself_is_read_and_harmless() -> None:
    value = loads(raw(b"]\x94h\x00a"))
    assert value[0] is value
    with pytest.raises(BitvlaError):
        loads(tensor(load_storage(storage(kind=b"]\x94h\x00a"))))


def test_what_is_built_in_two_steps_is_the_same_object_everywhere() -> None:
    array = np.arange(3)
    first, second = loads(pickle.dumps([array, array]))
    assert first is second
    assert isinstance(first, np.ndarray)


def damaged() -> Iterator[bytes]:
    for value in ({"a": [1, 2.5, "x", b"y", None, True, (1,)]}, np.arange(4.0), torch.arange(3.0), np.float32(1)):
        yield pickle.dumps(value)


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_pickle_is_read_or_refused(data: st.DataObject) -> None:
    """Bytes of real pickles changed, left out, put in: nothing but a value or a BitvlaError comes of it."""
    pickled = bytearray(data.draw(st.sampled_from(list(damaged()))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickled)))
        pickled[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(BitvlaError):
        loads(bytes(pickled))


@given(st.lists(st.sampled_from([*(code.code.encode("latin-1") for code in pickletools.opcodes), b"\x00", text("a")])))
@settings(max_examples=300)
def test_any_program_is_read_or_refused(program: list[bytes]) -> None:
    with contextlib.suppress(BitvlaError):
        loads(raw(*program))


def test_streams_are_not_read_beyond_their_end() -> None:
    assert io.BytesIO(dumps(1) + b"rest").read() == dumps(1) + b"rest"
    assert loads(dumps(1) + b"rest") == 1
