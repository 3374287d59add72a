"""GR00T's dialect, spoken as the `PolicyClient` of Isaac-GR00T speaks it: a REQ socket, msgpack, arrays as .npy files.

pytest tests/test_serve_gr00t.py
"""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import bitvla
from bitvla.errors import BitvlaError
from bitvla.serve.arrays import unpack_with
from bitvla.serve.gr00t import _decode
from checkpoints import pack_random, token_config
from serving import Held, Served, config, expected, observation, serving, wait_until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(protocol="gr00t", http_port=0, max_sessions=200) as server:
        yield server


def encode(value: Any) -> Any:
    file = io.BytesIO()
    np.save(file, value)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def decode(value: dict[Any, Any]) -> Any:
    return np.load(io.BytesIO(value["as_npy"])) if "__ndarray_class__" in value else value


class Client:
    def __init__(self, server: Served, token: str | None = None) -> None:
        self._token = token
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        self.socket = self._context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.connect(f"tcp://{server.address}")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()

    def send(self, endpoint: str, data: Any = None) -> None:
        request = {"endpoint": endpoint} | ({"data": data} if data is not None else {})
        request |= {"api_token": self._token} if self._token else {}
        self.socket.send(msgpack.packb(request, default=encode))

    def call(self, endpoint: str, data: Any = None) -> Any:
        self.send(endpoint, data)
        return self.receive()

    def receive(self) -> Any:
        return msgpack.unpackb(self.socket.recv(), object_hook=decode)

    def act(self, seed: int = 0, **changes: Any) -> Any:
        return self.call("get_action", {"observation": seen(seed) | changes, "options": None})


def seen(seed: int = 0) -> dict[str, Any]:
    now = observation(seed)
    return {
        "video": {name: image[None, None] for name, image in now["images"].items()},
        "state": {"state": now["state"][None, None]},
        "language": {"task": [[now["instruction"]]]},
    }


def test_a_chunk_is_that_of_the_policy_bit_for_bit(served: Served) -> None:
    with Client(served) as client:
        for seed in range(3):
            action, info = client.act(seed)
            assert action["action"].shape == (1, 16, 4)
            assert action["action"].dtype == np.float32
            assert action["action"].tobytes() == expected(seed).tobytes()
            assert info["infer_ms"] > 0
        assert client.call("reset", {"options": None}) == {}
        assert client.call("ping") == {"status": "ok", "message": "Server is running"}


def test_state_by_value_and_flat_keys(served: Served) -> None:
    now = observation()
    values = zip(config().processing.state.names, now["state"], strict=True)
    by_value = {name: np.full((1, 1, 1), value) for name, value in values}
    flat = {f"video.{name}": image[None, None] for name, image in now["images"].items()}
    flat |= {"state.state": now["state"][None, None], "annotation.human.task_description": [now["instruction"]]}
    with Client(served) as client:
        assert client.act(state=by_value)[0]["action"].tobytes() == expected().tobytes()
        assert client.call("get_action", {"observation": flat})[0]["action"].tobytes() == expected().tobytes()


def test_the_modalities_are_told(served: Served) -> None:
    with Client(served) as client:
        modalities = client.call("get_modality_config")
    assert all(modality.pop("__ModalityConfig_class__") for modality in modalities.values())
    names = {name: modality["as_json"]["modality_keys"] for name, modality in modalities.items()}
    assert names == {"video": ["corner", "wrist"], "state": ["state"], "language": ["task"], "action": ["action"]}
    assert modalities["action"]["as_json"]["delta_indices"] == list(range(16))


def test_a_policy_without_a_state_asks_for_none(tmp_path: Path) -> None:
    path = pack_random(tmp_path, token_config())
    with serving(lambda: bitvla.load(path, threads=1), protocol="gr00t") as server, Client(server) as client:
        assert client.call("get_modality_config")["state"]["as_json"]["modality_keys"] == []


def test_sixteen_robots_at_once_each_get_their_own_answers(served: Served) -> None:
    def drive(seed: int) -> bool:
        with Client(served) as client:
            return all(client.act(seed)[0]["action"].tobytes() == expected(seed).tobytes() for _ in range(3))

    for seed in range(16):
        expected(seed)
    with ThreadPoolExecutor(16) as robots:
        assert all(robots.map(drive, range(16)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"video": {}}, "'corner'"),
        ({"video": {"corner": np.zeros((2, 1, 128, 128, 3), np.uint8)}}, "batch and time"),
        ({"video": {name: np.zeros((1, 1, 8, 8, 3), np.uint8) for name in ("corner", "wrist")}}, "(8, 8, 3)"),
        ({"video": seen()["video"] | {"left": np.zeros((1, 1, 8, 8, 3), np.uint8)}}, "unknown key 'video/left'"),
        ({"state": {"state": np.full((1, 1, 4), np.nan)}}, "nan"),
        ({"state": {"hand_x": np.zeros((1, 1, 1))}}, "'state/hand_y'"),
        ({"language": {"task": [["a", "b"]]}}, "instruction"),
        ({"language": {"task": [[1]]}}, "instruction"),
    ],
)
def test_a_wrong_observation_is_refused_and_the_next_answered(
    served: Served, changes: dict[str, Any], named: str
) -> None:
    with Client(served) as client:
        assert named in client.act(**changes)["error"]
        assert client.act()[0]["action"].tobytes() == expected().tobytes()


@pytest.mark.parametrize("endpoint", ["kill", "get_actions", "", "__init__", None, 5])
def test_no_other_endpoint_is_there(served: Served, endpoint: Any) -> None:
    with Client(served) as client:
        assert "unknown endpoint" in client.call(endpoint)["error"]
        assert client.call("ping")["status"] == "ok"


def test_kill_only_where_allowed_and_with_the_token() -> None:
    with serving(protocol="gr00t", allow_kill=True, token="right") as server:
        with Client(server, "wrong") as client:
            assert "Unauthorized" in client.call("kill")["error"]
        with Client(server, "right") as client:
            assert client.call("ping")["status"] == "ok"
            assert client.call("kill") == {"status": "ok"}
    assert server.server.finished


def test_the_token_is_asked_for() -> None:
    with serving(protocol="gr00t", token="right") as server:
        for token in (None, "wrong"):
            with Client(server, token) as client:
                assert "Unauthorized" in client.act()["error"]
                assert "Unauthorized" in client.call("get_modality_config")["error"]
        with Client(server, "right") as client:
            assert client.act()[0]["action"].tobytes() == expected().tobytes()


def test_ready_only_after_the_warm_up() -> None:
    held = Held()
    with serving(lambda: held, ready=False, protocol="gr00t", http_port=0) as server, Client(server) as client:
        assert server.get("/readyz")[0] == 503
        client.send("ping")
        assert not client.socket.poll(100)
        held.going.set()
        assert client.receive()["status"] == "ok"
        assert server.get("/readyz")[0] == 200


def test_stop_answers_what_runs_and_refuses_what_waits() -> None:
    held = Held(going=True)
    with (
        serving(lambda: held, protocol="gr00t") as server,
        Client(server) as running,
        Client(server) as waiting,
    ):
        held.going.clear()
        held.began.clear()
        running.send("get_action", {"observation": seen(1)})
        assert held.began.wait(10)
        waiting.send("get_action", {"observation": seen(2)})
        wait_until(lambda: server.server.engine._in_flight == 2)
        server.stop()
        assert "stopping" in waiting.receive()["error"]
        held.going.set()
        assert running.receive()[0]["action"].tobytes() == expected(1).tobytes()
    assert server.server.finished


HOSTILE = [
    b"",
    b"\xc1",
    b"\xdd\x00\x0f\xff\xff" * 1000,
    msgpack.packb([1]),
    msgpack.packb({"endpoint": "get_action", "data": 5}),
    msgpack.packb({"endpoint": ["ping"]}),
    msgpack.packb({"data": {"observation": {"video": {"corner": {"__ndarray_class__": True}}}}}),
    msgpack.packb({"x": {"__ndarray_class__": True, "as_npy": b"\x93NUMPY\x01\x00\xff\xff{"}}),
    msgpack.packb({"x": {"__ndarray_class__": True, "as_npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"}}),
    msgpack.packb({"x": {"__ndarray_class__": True, "as_npy": b"\x93NUMPY\x01\x00\x80\x00" + b"(" * 128}}),
]  # fmt: skip


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HOSTILE += [
    msgpack.packb({"x": {"__ndarray_class__": True, "as_npy": file}})
    for file in (
        npy("'|O'", "(1,)", b"cos\nsystem\n(S'touch executed'\ntR."),
        npy("'<f4'", "(1099511627776,)"),
        npy("'<f4'", "(-1,)"),
        npy("[('a', '<f4')]", "(1,)", b"1234"),
        npy("__import__('os').system('touch executed')", "(1,)"),
    )
]


@pytest.mark.parametrize("message", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_messages_are_refused_and_the_connection_lives(
    served: Served, message: bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Client(served) as client:
        client.socket.send(message)
        assert "error" in client.receive()
        assert client.act()[0]["action"].tobytes() == expected().tobytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("endpoint", "data", "named"),
    [("get_action", np.zeros(2), "'data' is not a dictionary"), (np.zeros(2), {}, "unknown endpoint")],
)
def test_an_array_where_none_belongs_is_named(served: Served, endpoint: Any, data: Any, named: str) -> None:
    with Client(served) as client:
        assert named in client.call(endpoint, data)["error"]


def test_frames_that_no_req_socket_sends_are_dropped(served: Served) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(f"tcp://{served.address}")
    for frames in ([b"x"], [b"", b"a", b"b"], [b"a", b"b"], [b""] * 50):
        stranger.send_multipart(frames)
    with Client(served) as client:
        assert client.act()[0]["action"].tobytes() == expected().tobytes()
    stranger.close(0)
    context.term()


def test_an_oversized_message_ends_the_connection_alone() -> None:
    with serving(protocol="gr00t", max_message_mb=1) as server:
        with Client(server) as big:
            big.socket.setsockopt(zmq.RCVTIMEO, 200)
            big.socket.send(b"\x00" * 1_500_000)
            with pytest.raises(zmq.Again):
                big.socket.recv()
        with Client(server) as client:
            assert client.act()[0]["action"].tobytes() == expected().tobytes()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, bytes(range(200)), b"\xff" + b"\x00" * 63])
def test_other_protocols_are_turned_away(served: Served, data: bytes) -> None:
    stranger = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    with stranger, contextlib.suppress(OSError):  # the server may hang up at the first byte
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass
    with Client(served) as client:
        assert client.call("ping")["status"] == "ok"


def test_a_port_that_is_taken_is_told(served: Served) -> None:
    with pytest.raises(BitvlaError, match="cannot listen"), serving(protocol="gr00t", port=served.port):
        pass


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(3), np.zeros((0, 2), bool)],
)
def test_arrays_are_read_as_numpy_reads_them(array: Any) -> None:
    read = unpack_with(msgpack.packb(array, default=encode), _decode)
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert np.array_equal(read, array)


NPY = st.binary(max_size=40).map(lambda rest: npy("'<f4'", "(3,)", rest)) | st.binary(max_size=80).map(
    lambda rest: b"\x93NUMPY\x01\x00\x20\x00" + rest
)


@given(NPY | st.binary(max_size=50))
@settings(max_examples=200)
def test_any_array_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(BitvlaError):
        unpack_with(msgpack.packb({"__ndarray_class__": 1, "as_npy": data}), _decode)
