"""LeRobot's dialect, spoken as its stock robot client speaks it. `tests/manual/check_lerobot_client.py` uses that one.

pytest tests/test_serve_lerobot.py
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bitvla.serve.lerobot import MESSAGES, SERVICE, Robot
from serving import NANO, Held, Served, config, expected, get, lerobot_messages, observation, serving
from test_serve_pickles import HOSTILE

STATUS = grpc.StatusCode


@pytest.fixture(autouse=True)
def lerobot(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lerobot_messages(monkeypatch)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(protocol="lerobot", http_port=0, max_sessions=200) as server:
        yield server


class Client:
    """The calls of the stock client, in its order and with its messages."""

    def __init__(self, server: Served, token: str | None = None) -> None:
        # Within one process gRPC would lead all robots over one connection.
        self.channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, method: str, message: bytes) -> bytes:
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=20, metadata=self._metadata)

    def instruct(self, setup: bytes) -> None:
        self.call("Ready", b"")
        self.call("SendPolicyInstructions", MESSAGES["PolicySetup"](data=setup).SerializeToString())

    def observe(self, data: bytes, piece: int = 1 << 21) -> None:
        pieces = [data[at : at + piece] for at in range(0, len(data), piece)] or [b""]
        states = [1, *[2] * (len(pieces) - 2), 3][-len(pieces) :]
        self.stream(zip(states, pieces, strict=True))

    def stream(self, parts: Any) -> None:
        messages = (
            MESSAGES["Observation"](transfer_state=state, data=data).SerializeToString() for state, data in parts
        )
        self.channel.stream_unary(f"/{SERVICE}/SendObservations")(messages, timeout=20, metadata=self._metadata)

    def actions(self) -> list[Any]:
        data = MESSAGES["Actions"].FromString(self.call("GetActions", b"")).data
        return pickle.loads(data) if data else []  # noqa: S301 -- as the stock client does


def instructions(lerobot: Any, **changes: Any) -> bytes:
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list(config().processing.state.names)}
    } | {
        f"observation.images.{camera.name}": {"dtype": "image", "shape": (128, 128, 3), "names": ["h", "w", "c"]}
        for camera in config().processing.cameras
    }
    setup = lerobot.RemotePolicyConfig("bitvla", config().name, features, 16)
    for name, value in changes.items():
        setattr(setup, name, value)
    return pickle.dumps(setup)


def seen(lerobot: Any, seed: int = 0, timestep: int = 0, **changes: Any) -> bytes:
    now = observation(seed)
    values = dict(zip(config().processing.state.names, map(float, now["state"]), strict=True))
    raw = values | now["images"] | {"task": now["instruction"]} | changes
    return pickle.dumps(lerobot.TimedObservation(1000.0, timestep, raw, True))


def chunk(actions: list[Any]) -> bytes:
    return np.stack([action.action.numpy() for action in actions]).tobytes()


def test_a_chunk_is_that_of_the_policy_bit_for_bit(served: Served, lerobot: Any) -> None:
    with Client(served) as client:
        client.instruct(instructions(lerobot))
        for seed in range(3):
            client.observe(seen(lerobot, seed, timestep=40 * seed))
            actions = client.actions()
            assert chunk(actions) == expected(seed).tobytes()
            assert [action.timestep for action in actions] == list(range(40 * seed, 40 * seed + 16))
            times = [action.timestamp for action in actions]
            assert times == pytest.approx([1000 + step / 80 for step in range(16)])
            assert isinstance(actions[0], lerobot.TimedAction)


def test_an_observation_may_come_in_pieces_and_fewer_actions_be_wanted(served: Served, lerobot: Any) -> None:
    with Client(served) as client:
        client.instruct(instructions(lerobot, actions_per_chunk=5))
        client.observe(seen(lerobot, 1), piece=10_000)
        assert chunk(client.actions()) == expected(1)[:5].tobytes()


def test_the_latest_observation_wins_and_nothing_new_is_nothing(lerobot: Any) -> None:
    held = Held(going=True)
    with serving(lambda: held, protocol="lerobot") as server, Client(server) as client:
        client.instruct(instructions(lerobot))
        held.going.clear()
        for seed in range(4):
            client.observe(seen(lerobot, seed, timestep=seed))
        held.going.set()
        answers = [client.actions() for _ in range(2)]
        assert chunk(answers[-1] or answers[0]) in (expected(0).tobytes(), expected(3).tobytes())
        assert {step for actions in answers for step in [action.timestep for action in actions[:1]]} <= {0, 3}
        assert held.batches == [1, 1], "the one that ran, the newest"


def test_the_answer_of_a_robot_is_its_own(served: Served, lerobot: Any) -> None:
    def drive(seed: int) -> bool:
        with Client(served) as client:
            client.instruct(instructions(lerobot))
            for step in range(3):
                client.observe(seen(lerobot, seed, timestep=step))
                if chunk(client.actions()) != expected(seed).tobytes():
                    return False
        return True

    for seed in range(12):
        expected(seed)
    with ThreadPoolExecutor(12) as robots:
        assert all(robots.map(drive, range(12)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pretrained_name_or_path": "user/act"}, f"--pretrained_name_or_path={NANO.stem}"),
        ({"pretrained_name_or_path": None}, "NoneType"),
        ({"rename_map": {"a": "b"}}, "--map"),
        ({"actions_per_chunk": 0}, "actions_per_chunk"),
        ({"lerobot_features": None}, "lerobot_features"),
        ({"lerobot_features": {"observation.state": {}}}, "names"),
        ({"lerobot_features": {"observation.images.front": {}}}, "'corner'"),
    ],
)
def test_a_robot_that_does_not_fit_is_told_before_it_moves(
    served: Served, lerobot: Any, changes: dict[str, Any], named: str
) -> None:
    with Client(served) as client, pytest.raises(grpc.RpcError) as refused:
        client.instruct(instructions(lerobot, **changes))
    assert refused.value.code() == STATUS.INVALID_ARGUMENT
    assert named in refused.value.details()


def test_a_camera_too_many_is_told(served: Served, lerobot: Any) -> None:
    setup = pickle.loads(instructions(lerobot))  # noqa: S301
    features = copy.deepcopy(setup.lerobot_features) | {"observation.images.left": {}}
    with Client(served) as client, pytest.raises(grpc.RpcError, match="unknown key 'left'"):
        client.instruct(instructions(lerobot, lerobot_features=features))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hand_y": float("nan")}, "'hand_y' is nan"),
        ({"hand_y": "up"}, "not a vector"),
        ({"hand_y": [[1]]}, "a list"),
        ({"corner": np.zeros((480, 640, 3), np.uint8)}, "(480, 640, 3)"),
        ({"left": np.zeros((8, 8, 3), np.uint8)}, "unknown key 'left'"),
        ({"task": 5}, "instruction"),
        ({"more": {"deeper": 1}}, "a dict"),
    ],
)
def test_a_wrong_observation_is_refused_and_the_next_answered(
    served: Served, lerobot: Any, changes: dict[str, Any], named: str
) -> None:
    with Client(served) as client:
        client.instruct(instructions(lerobot))
        client.observe(seen(lerobot, **changes))
        with pytest.raises(grpc.RpcError) as refused:
            client.actions()
        assert refused.value.code() == STATUS.INVALID_ARGUMENT
        assert named in refused.value.details()
        client.observe(seen(lerobot))
        assert chunk(client.actions()) == expected().tobytes()


def test_keys_are_mapped_as_told(lerobot: Any) -> None:
    pairs = ("front=corner", "hand.x=state", "hand.y=state", "hand.z=state", "grip=state")
    with serving(protocol="lerobot", map=pairs) as server, Client(server) as client:
        now = observation()
        raw = dict(zip(("grip", "hand.z", "hand.y", "hand.x"), map(float, now["state"][::-1]), strict=True))
        raw |= {"front": now["images"]["corner"], "wrist": now["images"]["wrist"], "task": now["instruction"]}
        features = {"observation.state": {"names": ["hand.x", "hand.y", "hand.z", "grip"]}}
        features |= {f"observation.images.{name}": {} for name in ("front", "wrist")}
        client.instruct(instructions(lerobot, lerobot_features=features))
        client.observe(pickle.dumps(lerobot.TimedObservation(1.0, 0, raw)))
        assert chunk(client.actions()) == expected().tobytes()


def test_without_instructions_there_is_no_session(served: Served, lerobot: Any) -> None:
    with Client(served) as client:
        for call in (client.actions, lambda: client.observe(seen(lerobot))):
            with pytest.raises(grpc.RpcError, match="start the robot client again"):
                call()


def test_the_token_is_asked_for(lerobot: Any) -> None:
    with serving(protocol="lerobot", token="right") as server:
        for token in (None, "wrong"):
            with Client(server, token) as client, pytest.raises(grpc.RpcError) as refused:
                client.instruct(instructions(lerobot))
            assert refused.value.code() == STATUS.UNAUTHENTICATED
        with Client(server, "right") as client:
            client.instruct(instructions(lerobot))
            client.observe(seen(lerobot))
            assert chunk(client.actions()) == expected().tobytes()


def robots_kept() -> int:
    gc.collect()
    return sum(type(one) is Robot for one in gc.get_objects())


def test_a_robot_that_has_long_been_idle_makes_room(lerobot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = robots_kept()
    with serving(protocol="lerobot", max_sessions=1) as server, Client(server) as first, Client(server) as second:
        first.instruct(instructions(lerobot))
        with pytest.raises(grpc.RpcError) as refused:
            second.instruct(instructions(lerobot))
        assert refused.value.code() == STATUS.UNAVAILABLE
        monkeypatch.setattr("bitvla.serve.core._IDLE_SECONDS", 0.0)
        second.instruct(instructions(lerobot))
        with pytest.raises(grpc.RpcError, match="no session"):
            first.actions()
        assert robots_kept() == before + 1


def test_a_new_episode_is_not_given_the_last_one_s_answer(lerobot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitvla.serve.lerobot._PATIENCE_SECONDS", 0.2)
    held = Held(going=True)
    with serving(lambda: held, protocol="lerobot") as server, Client(server) as client:
        client.instruct(instructions(lerobot))
        held.going.clear()
        held.began.clear()
        client.observe(seen(lerobot, 1))
        assert held.began.wait(10)
        client.call("Ready", b"")
        held.going.set()
        assert client.actions() == []
        client.observe(seen(lerobot, 2))
        monkeypatch.setattr("bitvla.serve.lerobot._PATIENCE_SECONDS", 10)
        assert chunk(client.actions()) == expected(2).tobytes()


def test_ready_only_after_the_warm_up() -> None:
    held = Held()
    with serving(lambda: held, ready=False, protocol="lerobot", http_port=0) as server, Client(server) as client:
        assert server.get("/readyz")[0] == 503
        ready = client.channel.unary_unary(f"/{SERVICE}/Ready")
        with pytest.raises(grpc.RpcError):
            ready(b"", timeout=0.1)
        held.going.set()
        assert ready(b"", timeout=20) == b""
        assert server.get("/readyz")[0] == 200
        assert get(server.server.http_port or 0, "/")[0] == 404


def test_stop_ends_a_robot_that_waits(lerobot: Any) -> None:
    held = Held(going=True)
    with serving(lambda: held, protocol="lerobot") as server, Client(server) as client:
        client.instruct(instructions(lerobot))
        waiting = client.channel.unary_unary(f"/{SERVICE}/GetActions").future(b"", timeout=20)
        time.sleep(0.05)
        server.stop()
        with contextlib.suppress(grpc.RpcError):
            assert waiting.result(20) == b"", "there was nothing to answer"
    assert server.server.finished


def test_hostile_pickles_do_nothing(
    served: Served, lerobot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Client(served) as client:
        for hostile in HOSTILE.values():
            with pytest.raises(grpc.RpcError) as refused:
                client.instruct(hostile)
            assert refused.value.code() == STATUS.INVALID_ARGUMENT
        client.instruct(instructions(lerobot))
        for hostile in HOSTILE.values():
            client.observe(hostile)
            with pytest.raises(grpc.RpcError) as refused:
                client.actions()
            assert refused.value.code() == STATUS.INVALID_ARGUMENT
        client.observe(seen(lerobot))
        assert chunk(client.actions()) == expected().tobytes()
    assert not list(tmp_path.iterdir())


def test_broken_streams_are_refused(served: Served, lerobot: Any) -> None:
    data = seen(lerobot)
    with Client(served) as client:
        client.instruct(instructions(lerobot))
        for parts in ([], [(1, data)], [(2, data[:50])], [(0, data)]):
            with pytest.raises(grpc.RpcError, match="before its end"):
                client.stream(parts)
        for message in (b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", os.urandom(100)):
            with pytest.raises(grpc.RpcError) as refused:
                client.call("SendPolicyInstructions", message)
            assert refused.value.code() == STATUS.INVALID_ARGUMENT
        client.stream([(1, b"left over"), (1, data[:100]), (2, data[100:200]), (3, data[200:])])
        assert chunk(client.actions()) == expected().tobytes()


def test_an_oversized_observation_is_refused(lerobot: Any) -> None:
    with serving(protocol="lerobot", max_message_mb=1) as server, Client(server) as client:
        client.instruct(instructions(lerobot))
        with pytest.raises(grpc.RpcError):
            client.stream([(1, b"\x00" * 1_200_000)])
        with pytest.raises(grpc.RpcError, match="larger than 1 MB"):
            client.stream([(1, b""), *[(2, b"\x00" * 300_000)] * 5])
        client.observe(seen(lerobot))
        assert chunk(client.actions()) == expected().tobytes()


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff"]
)
def test_other_protocols_are_turned_away(served: Served, lerobot: Any, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass
    with Client(served) as client:
        client.instruct(instructions(lerobot))


def test_an_ipv6_address_is_listened_on(lerobot: Any) -> None:
    with serving(protocol="lerobot", host="::1") as server:
        server.address = f"[::1]:{server.port}"
        with Client(server) as client:
            client.instruct(instructions(lerobot))


def test_a_port_that_is_taken_is_told(served: Served) -> None:
    with pytest.raises(Exception, match="cannot listen"), serving(protocol="lerobot", port=served.port):
        pass
