"""The server behind every dialect, over openpi's: sessions, turns, readiness, reload, stop, tokens, hostile clients.

pytest tests/test_serve.py
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import bitvla
from bitvla.config import Camera, PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.serve import core
from bitvla.serve.arrays import pack, unpack
from bitvla.serve.core import Answer, Engine, SupersededError, UnavailableError
from bitvla.serve.mapping import KeyMap
from bitvla.serve.openpi import NAMING
from checkpoints import observation as tiny_observation
from checkpoints import pack_random, tiny_config, token_config
from serving import (
    NANO,
    Held,
    Served,
    config,
    expected,
    load,
    locked,
    observation,
    serving,
    stalling_network,
    wait_until,
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def websocket(server: Served, **options: Any) -> ClientConnection:
    """A connection that has had its greeting."""
    connection = connect(server.url, compression=None, proxy=None, **options).__enter__()
    assert unpack(connection.recv(10))["name"] == config().name
    return connection


# Answers.


def test_a_chunk_is_that_of_the_policy_bit_for_bit(served: Served) -> None:
    with bitvla.connect(served.url) as policy:
        for seed in range(3):
            chunk = policy.act(observation(seed))
            assert chunk.dtype == np.float32
            assert chunk.tobytes() == expected(seed).tobytes()
        policy.reset()
        assert policy.act(observation(0)).tobytes() == expected(0).tobytes()


def test_decided_actions_travel_to_the_policy(tmp_path: Path) -> None:
    action = msgspec.structs.replace(tiny_config().action, max_prefix=2)
    path = pack_random(tmp_path, tiny_config(action=action))
    local, seen = bitvla.load(path, threads=1), tiny_observation(tiny_config())
    prefix = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
    with serving(partial(bitvla.load, path, threads=1)) as tiny, bitvla.connect(tiny.url) as policy:
        assert policy.max_prefix == 2
        assert policy.act(seen, prefix=prefix).tobytes() == local.act(seen, prefix=prefix).tobytes()
        assert policy.act(seen).tobytes() == local.act(seen).tobytes()
    untrained = pack_random(tmp_path / "without", tiny_config())
    with serving(partial(bitvla.load, untrained, threads=1)) as tiny, bitvla.connect(tiny.url) as policy:
        assert policy.max_prefix == 0
        with pytest.raises(BitvlaError, match="was not trained to continue"):
            policy.act(seen, prefix=prefix)


def test_the_greeting_tells_what_a_robot_must_know(served: Served) -> None:
    with bitvla.connect(served.url) as policy:
        info, local = policy.info(), load().info()
    for name in ("name", "sha256", "cameras", "state", "action", "control_hz", "horizon", "execute_horizon"):
        assert info[name] == local[name]
    assert "path" not in info, "no file names for strangers"


def test_openpi_keys_are_understood_flat(served: Served) -> None:
    seen = observation(1)
    request = {f"observation/{camera}": image for camera, image in seen["images"].items()}
    request |= {"observation/state": seen["state"], "prompt": seen["instruction"]}
    with websocket(served) as connection:
        for count in range(2):
            connection.send(pack(request))
            reply = unpack(connection.recv(10))
            assert reply["actions"].tobytes() == expected(1).tobytes()
            assert reply["server_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in reply["server_timing"]) == (count > 0)


def test_requests_sent_ahead_are_answered_in_order(served: Served) -> None:
    with websocket(served) as connection:
        for seed in range(4):
            connection.send(pack(observation(seed)))
        for seed in range(4):
            assert unpack(connection.recv(10))["actions"].tobytes() == expected(seed).tobytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": {"corner": np.zeros((128, 128, 3), np.uint8)}}, "'wrist'"),
        ({"images": {"corner": 1, "wrist": 2, "left": 3}}, "unknown key 'images/left'"),
        ({"images": {"corner": np.zeros((64, 64, 3), np.uint8), "wrist": 0}}, "(64, 64, 3)"),
        ({"images": {"corner": "a", "wrist": "b"}}, "'corner' is a str"),
        ({"state": np.array([0.1, np.nan, 0, 0])}, "'hand_y' is nan"),
        ({"state": [1, 2]}, "hand_x, hand_y"),
        ({"state": None}, "state"),
        ({"instruction": 7}, "instruction"),
        ({"prompt": "twice"}, "more than once"),
        ({"depth": np.zeros(3)}, "--map depth="),
        ({"images/wrist": np.zeros((128, 128, 3), np.uint8)}, "'images/wrist' is there more than once"),
        ({"depth": {str(key): 0 for key in range(1000)}}, "more than 1000 keys"),
        ({1: 2}, "no text"),
    ],
)
def test_a_wrong_observation_is_refused_and_named_and_the_next_answered(
    served: Served, change: dict[Any, Any], named: str
) -> None:
    with bitvla.connect(served.url) as policy:
        with pytest.raises(BitvlaError) as refused:
            policy.act(observation() | change)
        assert named in str(refused.value)
        assert policy.act(observation()).tobytes() == expected().tobytes()


def test_sixteen_robots_at_once_each_get_their_own_answers(served: Served) -> None:
    def drive(seed: int) -> bool:
        with bitvla.connect(served.url, timeout=60) as policy:
            return all(policy.act(observation(seed)).tobytes() == expected(seed).tobytes() for _ in range(4))

    for seed in range(16):
        expected(seed)
    with ThreadPoolExecutor(16) as robots:
        assert all(robots.map(drive, range(16)))
    wait_until(lambda: served.metric("bitvla_sessions") == 0)


# Batches.


def test_what_waits_when_the_policy_is_free_is_computed_together() -> None:
    held = Held(going=True)
    with serving(lambda: held, max_batch=3) as server, contextlib.ExitStack() as stack:
        robots = [stack.enter_context(websocket(server)) for _ in range(5)]
        held.going.clear()
        robots[0].send(pack(observation(0)))
        wait_until(lambda: held.batches == [1])
        for seed, robot in enumerate(robots[1:], 1):
            robot.send(pack(observation(seed)))
        wait_until(lambda: server.server.engine._turns.qsize() == 4)
        held.going.set()
        for seed, robot in enumerate(robots):
            assert unpack(robot.recv(10))["actions"].tobytes() == expected(seed).tobytes()
        assert held.batches == [1, 3, 1]
        assert server.metric("bitvla_batch_count") == 3
        assert server.metric("bitvla_batch_sum") == 5


def test_a_bad_observation_fails_alone() -> None:
    """The others of its batch are answered; so are the next ones, together."""
    held = Held(going=True)
    bad = observation(1) | {"instruction": "open the drawer " * 99}
    with serving(lambda: held) as server, contextlib.ExitStack() as stack:
        robots = [stack.enter_context(websocket(server)) for _ in range(4)]
        for second in (bad, observation(1)):
            held.batches.clear()
            held.going.clear()
            for seed, robot in enumerate(robots):
                robot.send(pack(second if seed == 1 else observation(seed)))
                wait_until(lambda: held.batches == [1])
            wait_until(lambda: server.server.engine._turns.qsize() == 3)
            held.going.set()
            for seed, robot in enumerate(robots):
                reply = robot.recv(10)
                if second is bad and seed == 1:
                    assert isinstance(reply, str)
                    assert "shorten it" in reply
                else:
                    assert unpack(reply)["actions"].tobytes() == expected(seed).tobytes()
            assert held.batches == ([1, 3, 1, 1, 1] if second is bad else [1, 3])
        assert server.metric("bitvla_requests_total", outcome="refused") == 1


@pytest.mark.parametrize(
    ("call", "each", "most", "batch"), [(0.02, 0, 8, 8), (0, 0.02, 8, 1), (0.02, 0, 1, 1), (0.3, 0, 8, 1)]
)
def test_batches_are_computed_where_that_is_faster(
    call: float, each: float, most: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0  # a clock of its own: on a busy machine calls that take as long take not quite as long

    class Timed(Held):
        def act_batch(self, observations: Any, prefixes: Any = None) -> Any:
            nonlocal seconds
            seconds += call + each * len(observations)

    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: seconds))
    assert core._warm_up(Timed(), most) == batch


# Names.


def named(*cameras: str, rotate180: bool = False) -> PolicyConfig:
    """The shipped policy's configuration with other cameras."""
    processing = config().processing
    return msgspec.structs.replace(
        config(),
        processing=msgspec.structs.replace(
            processing,
            cameras=tuple(Camera(name=name, height=2, width=2) for name in cameras),
            image=msgspec.structs.replace(processing.image, rotate180=rotate180),
        ),
    )


@pytest.mark.parametrize("rotate180", [False, True])
@pytest.mark.parametrize("cameras", [("agentview", "robot0_eye_in_hand"), ("image2", "image")])
def test_the_libero_preset_knows_names_and_which_way_is_up(cameras: tuple[str, str], rotate180: bool) -> None:
    keys = KeyMap(named(*cameras, rotate180=rotate180), NAMING, preset="libero")
    third, wrist = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.ones((2, 2, 3), np.uint8)
    message = {"observation/image": third, "observation/wrist_image": wrist, "state": [1, 2, 3, 4], "prompt": "go"}
    seen = keys.observation(message)
    main = "agentview" if "agentview" in cameras else "image"
    # The client sends images upright; a policy that turns them itself must get them as the simulator draws them.
    assert np.array_equal(seen["images"][main], third[::-1, ::-1] if rotate180 else third)
    assert list(seen["images"]) == list(cameras)


@pytest.mark.parametrize("cameras", [("agentview",), ("agentview", "image", "wrist"), ("left", "right")])
def test_the_libero_preset_does_not_guess(cameras: tuple[str, ...]) -> None:
    with pytest.raises(BitvlaError, match="not clear"):
        KeyMap(named(*cameras), NAMING, preset="libero")


def test_told_names_replace_the_policy_s_own() -> None:
    keys = KeyMap(named("a", "b"), NAMING, ("x=a", "arm=state", "grip=state", "depth="))
    seen = keys.observation({"x": 1, "images": {"b": 2}, "arm": [1, 2, 3], "grip": 4, "depth": 0, "prompt": "go"})
    assert seen["images"] == {"a": 1, "b": 2}
    assert seen["state"].tolist() == [1, 2, 3, 4]
    for wrong in ({"images": {"a": 1, "b": 2}}, {"x": 1, "images": {"a": 1, "b": 2}}, {"grip": 4}):
        with pytest.raises(BitvlaError):
            keys.observation({"arm": [1, 2, 3], "prompt": "go"} | wrong)
    with pytest.raises(BitvlaError, match="already taken"):
        KeyMap(named("a", "b"), NAMING, ("x=a", "y=a"))


@pytest.mark.parametrize("pairs", [("x=a", "x=b"), ("x=", "x=a"), ("x=state", "x=state")])
def test_a_key_is_mapped_once(pairs: tuple[str, ...]) -> None:
    with pytest.raises(BitvlaError, match="'x' is mapped twice"):
        KeyMap(named("a", "b"), NAMING, pairs)


def test_a_mapped_key_is_no_other_part_too() -> None:
    """One picture for two cameras would look right to every check, and steer wrong."""
    keys = KeyMap(named("a", "b"), NAMING, ("images/a=b",))
    with pytest.raises(BitvlaError, match="lacks 'a'"):
        keys.observation({"images": {"a": 1}, "state": [1, 2, 3, 4], "prompt": "go"})
    alone = NAMING._replace(camera=("{}",))
    with pytest.raises(BitvlaError, match="takes all keys from 'a'"):
        KeyMap(named("a", "b"), alone, ("a=b",))
    assert KeyMap(named("a", "b"), alone, ("a=b", "b=a")).check(["a", "b", "state", "prompt"])["a"] == ("b",)


# Sessions.


def test_one_robot_too_many_is_told(served: Served) -> None:
    with serving(max_sessions=2) as server, websocket(server), websocket(server) as second:
        with pytest.raises(BitvlaError, match="all sessions are taken"):
            bitvla.connect(server.url, timeout=0.2)
        second.close()
        with bitvla.connect(server.url) as policy:
            assert policy.act(observation()).tobytes() == expected().tobytes()


def test_the_latest_observation_wins() -> None:
    held = Held(going=True)

    async def drive() -> None:
        engine = Engine(lambda: held)
        await engine.load()
        await engine.warm_up()
        robot, other = engine.open("robot"), engine.open("other")
        held.going.clear()
        running = asyncio.create_task(other.act(observation(0)))
        while not held.batches:
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(robot.act(observation(seed))) for seed in (1, 2, 3)]
        await asyncio.sleep(0.01)
        held.going.set()
        results = await asyncio.gather(*waiting, running, return_exceptions=True)
        assert [type(result) for result in results] == [SupersededError, SupersededError, Answer, Answer]
        assert results[2].chunk.tobytes() == expected(3).tobytes()
        assert held.batches == [1, 1], "what nobody waits for is not computed"
        held.going.clear()
        running = asyncio.create_task(other.act(observation(0)))
        await asyncio.sleep(0.01)
        last = asyncio.create_task(robot.act(observation(1)))
        await asyncio.sleep(0.01)
        robot.reset()
        with pytest.raises(SupersededError, match="reset"):
            await last
        held.going.set()
        await running
        robot.close()
        with pytest.raises(UnavailableError):
            await robot.act(observation())
        assert await engine.stop(1)

    asyncio.run(drive())


def test_a_stop_does_not_wait_for_a_policy_that_hangs() -> None:
    held = Held(going=True)

    async def drive() -> None:
        engine = Engine(lambda: held)
        await engine.load()
        await engine.warm_up()
        session = engine.open("robot")
        held.going.clear()
        with engine.request(session):
            task = asyncio.create_task(session.act(observation()))
            await asyncio.sleep(0.01)
            assert not await engine.stop(0.05)
            held.going.set()
        task.cancel()

    asyncio.run(drive())


def test_a_reset_is_of_one_session_alone() -> None:
    """One robot waits for an answer, another one resets: the answer still comes."""
    held = Held(going=True)
    with serving(lambda: held) as server, websocket(server) as waiting, websocket(server) as other:
        held.going.clear()
        waiting.send(pack(observation(1)))
        wait_until(lambda: held.batches == [1])
        other.send(pack({"bitvla": "reset"}))
        assert unpack(other.recv(10)) == {"bitvla": "reset"}
        held.going.set()
        assert unpack(waiting.recv(10))["actions"].tobytes() == expected(1).tobytes()


def test_a_robot_that_dies_in_the_middle_leaves_the_others_alone() -> None:
    held = Held(going=True)
    with serving(lambda: held) as server, websocket(server) as other:
        held.going.clear()
        held.began.clear()
        dying = websocket(server)
        dying.send(pack(observation()))
        assert held.began.wait(10)
        dying.socket.shutdown(socket.SHUT_RDWR)
        dying.close()
        other.send(pack(observation(2)))
        held.going.set()
        assert unpack(other.recv(10))["actions"].tobytes() == expected(2).tobytes()
        wait_until(lambda: server.metric("bitvla_sessions") == 1)


def test_a_half_open_connection_ends(served: Served) -> None:
    """A robot whose cable is cut says nothing more, not even goodbye."""
    with serving(keepalive=0.2) as server:
        quiet = socket.create_connection(("127.0.0.1", server.port))
        quiet.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        wait_until(lambda: server.metric("bitvla_sessions") == 1)
        wait_until(lambda: server.metric("bitvla_sessions") == 0)
        quiet.close()


def test_a_slow_reader_slows_only_itself(served: Served) -> None:
    with websocket(served) as lazy:
        for seed in range(8):
            lazy.send(pack(observation(seed)))  # and never reads
        with bitvla.connect(served.url, timeout=10) as policy:
            assert policy.act(observation()).tobytes() == expected().tobytes()


# Start, stop, reload.


def test_ready_only_after_the_warm_up() -> None:
    held = Held()
    with serving(lambda: held, ready=False) as server:
        assert held.began.wait(10)
        assert server.get("/healthz") == (200, "OK\n")
        assert server.get("/readyz")[0] == 503
        assert server.metric("bitvla_ready") == 0
        early = connect(server.url, compression=None, proxy=None).__enter__()
        with pytest.raises(TimeoutError):
            early.recv(0.1)
        held.going.set()
        assert unpack(early.recv(10))["name"] == config().name  # who came early is served, once it is warm
        assert server.get("/readyz") == (200, "ready\n")
        early.close()


def test_a_warm_up_that_fails_ends_the_server() -> None:
    class Broken(Held):
        def act_batch(self, observations: Any, prefixes: Any = None) -> Any:
            raise BitvlaError("the kernels are on strike")

    with pytest.raises(BitvlaError, match="on strike"), serving(Broken, ready=False) as server:
        wait_until(lambda: server.server._stopped.is_set())


def test_stop_finishes_what_runs_and_refuses_what_waits() -> None:
    held = Held(going=True)
    with serving(lambda: held) as server, websocket(server) as running, websocket(server) as waiting:
        held.going.clear()
        running.send(pack(observation(1)))
        wait_until(lambda: held.batches == [1])
        waiting.send(pack(observation(2)))
        wait_until(lambda: server.server.engine._in_flight == 2)
        server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            waiting.recv(10)
        assert "stopping" in str(closed.value)
        held.going.set()
        assert unpack(running.recv(10))["actions"].tobytes() == expected(1).tobytes()
    assert server.server.finished


def test_a_policy_that_fails_is_no_end() -> None:
    class Moody(Held):
        def act_batch(self, observations: Any, prefixes: Any = None) -> Any:
            if observations[0]["instruction"] == "fail":
                raise ZeroDivisionError("secret detail")
            return super().act_batch(observations, prefixes)

    with serving(lambda: Moody(going=True)) as server, bitvla.connect(server.url) as policy:
        with pytest.raises(BitvlaError, match="its log has the reason") as told:
            policy.act(observation() | {"instruction": "fail"})
        assert "secret" not in str(told.value)
        assert policy.act(observation()).tobytes() == expected().tobytes()
        assert server.metric("bitvla_requests_total", outcome="failed") == 1


def test_reload_takes_a_policy_of_the_same_robot_and_refuses_any_other(tmp_path: Path) -> None:
    config = tiny_config()
    seen = tiny_observation(config)
    first, second = (pack_random(tmp_path / str(seed), config, seed=seed) for seed in (0, 1))
    path = shutil.copy(first, tmp_path)
    with serving(lambda: bitvla.load(path, threads=1)) as server, bitvla.connect(server.url) as policy:
        before = policy.act(seen)
        for wrong in (first.read_bytes()[:1000], NANO.read_bytes()):  # half copied; of another robot
            # Always by renaming: a file that is in use is mapped, and must not change under it.
            (tmp_path / "new").write_bytes(wrong)
            os.replace(tmp_path / "new", path)
            server.reload()
            assert policy.act(seen).tobytes() == before.tobytes()
        assert server.metric("bitvla_reloads_total", outcome="refused") == 2
        os.replace(second, path)
        server.reload()
        after = policy.act(seen)
    assert after.tobytes() != before.tobytes()
    assert after.tobytes() == bitvla.load(path, threads=1).act(seen).tobytes()


def test_health_and_metrics(served: Served) -> None:
    with bitvla.connect(served.url) as policy:
        policy.act(observation())
    assert served.get("/healthz") == (200, "OK\n")
    status, body = served.get("/metrics")
    assert status == 200
    assert 'bitvla_requests_total{outcome="answered"}' in body
    assert "bitvla_inference_seconds_bucket" in body
    assert served.get("/policy")[0] == 404


# Who may come in.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "robot.local", ""])
def test_no_wider_than_loopback_without_a_token(host: str) -> None:
    with pytest.raises(BitvlaError, match="--token"), serving(host=host):
        pass


def test_wider_with_a_token_or_when_told() -> None:
    for options in ({"token": "secret"}, {"insecure": True}):
        with serving(host="0.0.0.0", **options) as server:
            assert server.get("/healthz")[0] == 200


@pytest.mark.parametrize("changes", [{"port": 70_000}, {"http_port": 70_000}, {"port": -1}])
@pytest.mark.parametrize("protocol", ["openpi", "lerobot", "gr00t"])
def test_a_port_that_there_is_not_is_refused(protocol: str, changes: dict[str, int]) -> None:
    """The libraries of two dialects would listen on the remainder by 65536."""
    with (
        pytest.raises(BitvlaError, match=f"no port {next(iter(changes.values()))}"),
        serving(**{"protocol": protocol} | changes),
    ):
        pass


@pytest.mark.parametrize("token", ["", " ", "a b", "caf\u00e9", "a\n"])
def test_a_token_is_letters_and_digits(token: str) -> None:
    with pytest.raises(BitvlaError, match="letters and digits"), serving(token=token):
        pass


def test_the_token_is_asked_for() -> None:
    with serving(token="right") as server:
        for token in (None, "wrong", "righ", "right0", "Right"):
            with pytest.raises(BitvlaError, match="token"):
                bitvla.connect(server.url, token=token)
        with bitvla.connect(server.url, token="right") as policy:
            assert policy.act(observation()).tobytes() == expected().tobytes()
        assert server.get("/metrics")[0] == 401
        assert server.get("/metrics", "right")[0] == 200
        assert server.get("/healthz")[0] == 200


def test_a_page_in_a_browser_is_no_robot(served: Served) -> None:
    with pytest.raises(InvalidStatus) as rejected:
        connect(served.url, origin="https://example.org", proxy=None)  # type: ignore[arg-type]
    assert rejected.value.response.status_code == 403


# Nonsense.

GARBAGE = [
    b"",
    b"\x00" * 64,
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",  # gRPC begins so
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL",  # ZeroMQ begins so
    b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_other_protocols_are_turned_away(served: Served, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while stranger.recv(4096):
                pass
    with bitvla.connect(served.url) as policy:
        assert policy.act(observation()).tobytes() == expected().tobytes()


def test_an_oversized_message_ends_the_connection_alone() -> None:
    with serving(max_message_mb=1) as server:
        big = websocket(server)
        big.send(b"\x00" * 1_500_000)
        with pytest.raises(ConnectionClosed) as closed:
            big.recv(10)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1009
        with bitvla.connect(server.url) as policy:
            assert policy.act(observation()).tobytes() == expected().tobytes()


def test_a_frame_cut_off_in_the_middle(served: Served) -> None:
    cut = websocket(served)
    cut.socket.sendall(b"\x82\xfe\xff\xff\x00\x00\x00\x00" + b"x" * 1000)  # 65,535 bytes announced, 1000 sent
    cut.socket.shutdown(socket.SHUT_RDWR)
    cut.close()
    with bitvla.connect(served.url) as policy:
        assert policy.act(observation()).tobytes() == expected().tobytes()


HOSTILE = [
    "text",
    b"",
    b"\xc1",
    b"\x93\x01",
    b"\xdd\xff\xff\xff\xff",  # four billion elements
    b"\xdd\x00\x0f\xff\xff" * 1000,  # a million, in each of a thousand
    b"\x91" * 100_000,
    b"\xdf\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x81\x90\x01",  # a list as a key
    pack([1, 2]),
    pack({"images": 1}),
    pack({"images": {"corner": {"a": {"b": {"c": {"d": 1}}}}}}),
    pack({"state": {b"__ndarray__": True}}),
    pack({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": []}}),
    pack({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "V8", b"shape": [0]}}),
    pack({"state": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [1 << 40]}}),
    pack({"state": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [-1]}}),
    pack({"state": {b"__ndarray__": True, b"data": b"1234", b"dtype": "f4,f4", b"shape": [1]}}),
    pack({"state": {b"__ndarray__": True, b"data": b"1234", b"dtype": "(2,)f2", b"shape": [1]}}),
    pack({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0] * 100}}),
    pack({"state": {b"__npgeneric__": True, b"data": "x", b"dtype": "<U1"}}),
    pack({"state": {b"__npgeneric__": True, b"data": 1e400, b"dtype": "|u1"}}),
]


@pytest.mark.parametrize("message", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_messages_are_refused_and_the_connection_lives(served: Served, message: str | bytes) -> None:
    with websocket(served) as connection:
        connection.send(message)
        assert isinstance(connection.recv(10), str)
        connection.send(pack(observation()))
        assert unpack(connection.recv(10))["actions"].tobytes() == expected().tobytes()


TEXT, BYTES = st.text(max_size=4), st.binary(max_size=9)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | BYTES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | BYTES, inner, max_size=4),
    max_leaves=8,
)
ARRAYS = st.fixed_dictionaries(
    {},
    optional={
        b"__ndarray__": PLAIN,
        b"__npgeneric__": PLAIN,
        b"data": PLAIN,
        b"dtype": st.sampled_from(["<f4", "O", "|u1", "<M8[s]", "V", ">i2", "?", "c8", "f4,f4"]) | st.text(max_size=6),
        b"shape": st.lists(st.integers(-2, 1 << 34), max_size=4) | PLAIN,
    },
)


@given(st.binary(max_size=200) | (PLAIN | ARRAYS | st.dictionaries(st.text(max_size=4), ARRAYS, max_size=3)).map(pack))
@settings(max_examples=300)
def test_whatever_comes_the_decoder_answers_or_refuses(data: bytes) -> None:
    with contextlib.suppress(BitvlaError):
        KEYS.observation(unpack(data))


def test_a_policy_without_a_state_is_served(tmp_path: Path) -> None:
    """It takes none, and a robot that sends one must say that it is not needed."""
    path = pack_random(tmp_path, token_config())
    seen = tiny_observation(token_config())
    with serving(lambda: bitvla.load(path)) as server, bitvla.connect(server.url) as policy:
        np.testing.assert_array_equal(policy.act(seen), bitvla.load(path).act(seen))
    message = {"images": seen["images"], "prompt": "open", "state": np.zeros(8)}
    with pytest.raises(BitvlaError, match="unknown key 'state'"):
        KeyMap(token_config(), NAMING).observation(message)
    assert KeyMap(token_config(), NAMING, ["state="]).observation(message).keys() == {"images", "instruction"}


KEYS = KeyMap(config(), NAMING)


@given(PLAIN)
@settings(max_examples=100)
def test_plain_data_and_arrays_survive_the_way(value: Any) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1]
    way = unpack(pack({"value": value, "array": array, "number": np.float32(0.1)}))
    assert repr(way["value"]) == repr(value)
    assert np.array_equal(way["array"], array)
    assert way["number"] == np.float32(0.1)
    assert isinstance(way["number"], np.float32)


# The client, when the server is not what it should be.


def test_nobody_there_is_told_in_time() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(BitvlaError, match=r"did not answer within 0\.3 s"):
            bitvla.connect(f"ws://127.0.0.1:{unused.getsockname()[1]}", timeout=0.3)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["robot", "http://127.0.0.1:1", "ws://", ""])
def test_a_wrong_address_is_told_at_once(url: str) -> None:
    with pytest.raises(BitvlaError, match="ws://host:8000"):
        bitvla.connect(url)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_cannot_be_waited_for_is_refused(timeout: float) -> None:
    with pytest.raises(BitvlaError, match="timeout is"):
        bitvla.connect("ws://127.0.0.1:1", timeout=timeout)


def listener(answer: bytes) -> tuple[socket.socket, threading.Thread]:
    """Someone else on a port, who says `answer` to the first that comes and is then silent."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.sendall(answer)
            connection.recv(1 << 16)
            connection.recv(1 << 16)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    return server, thread


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\x00\x00\x12\x04\x00", b"HTTP/1.1 404 x\r\n\r\n"]
)
def test_another_server_is_told(answer: bytes) -> None:
    server, _ = listener(answer)
    with server, pytest.raises(BitvlaError):
        bitvla.connect(f"ws://127.0.0.1:{server.getsockname()[1]}", timeout=0.3)


def test_a_late_answer_is_never_taken_for_another_one() -> None:
    held = Held(going=True)
    with serving(lambda: held) as server, bitvla.connect(server.url, timeout=0.3) as policy:
        held.going.clear()
        with pytest.raises(BitvlaError, match="did not answer"):
            policy.act(observation(1))
        held.going.set()
        for seed in (2, 3):
            assert policy.act(observation(seed)).tobytes() == expected(seed).tobytes()


def test_an_interrupted_greeting_is_not_taken_for_a_reply(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    interruptions = [KeyboardInterrupt()]
    receive = ClientConnection.recv

    def recv(connection: ClientConnection, timeout: float) -> Any:
        if interruptions:
            raise interruptions.pop()
        return receive(connection, timeout)

    with bitvla.connect(served.url) as policy:
        policy.close()
        monkeypatch.setattr(ClientConnection, "recv", recv)
        with pytest.raises(KeyboardInterrupt):
            policy.reset()
        assert policy.act(observation(1)).tobytes() == expected(1).tobytes()


def test_a_server_that_comes_back_is_found_again() -> None:
    with serving() as first:
        policy = bitvla.connect(first.url, timeout=20)
        policy.act(observation())
        port = first.port
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(policy.act(observation(1))))
    thread.start()
    with serving(port=port):
        thread.join(30)
        assert answers
        assert answers[0].tobytes() == expected(1).tobytes()
        policy.close()


def test_a_server_that_comes_back_for_another_robot_is_refused(tmp_path: Path) -> None:
    stranger = pack_random(tmp_path, tiny_config())
    with serving() as first:
        policy = bitvla.connect(first.url)
    with serving(lambda: bitvla.load(stranger, threads=1), port=first.port), pytest.raises(BitvlaError, match="other"):
        policy.act(observation())
    policy.close()


def test_a_server_that_stays_away_is_told_in_time() -> None:
    with serving() as server:
        policy = bitvla.connect(server.url, timeout=0.3)
    with pytest.raises(BitvlaError, match="did not answer"):
        policy.act(observation())


def test_a_stalling_network_delays_or_fails_but_never_mixes_answers(served: Served) -> None:
    random = np.random.default_rng(0)
    stalls = (0.6 if random.random() < 0.05 else random.uniform(0, 0.01) for _ in itertools.count())
    smooth = itertools.repeat(0.0, 4)  # until the greeting
    outcomes = []
    with (
        stalling_network(served.port, locked(itertools.chain(smooth, stalls))) as url,
        bitvla.connect(url, timeout=0.4) as policy,
    ):
        for count in range(20):
            with contextlib.suppress(BitvlaError):
                assert policy.act(observation(count % 3)).tobytes() == expected(count % 3).tobytes()
                outcomes.append(count)
    assert outcomes
