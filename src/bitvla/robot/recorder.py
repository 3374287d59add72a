"""A run of the executor as episodes of a LeRobotDataset v3, one frame a command.

    observation.images.*, observation.state     the last observation before the command
    action                                      what the robot was told
    executor.planned                            what was planned, before the guard
    executor.decision                           why, see `DECISION`
    executor.chunk                              the policy's answer to this observation, row by row, where it was asked

With that a recording trains another policy like any demonstration, and `bitvla.robot.replay` asks another policy the
same questions. Videos are lossless, so that the same policy gives the same answers.

Images go to `.running/` on the disk as they come, and join the dataset when the episode has ended: memory does not
grow, and a run that is killed loses that episode alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.config import Camera
from bitvla.data.lerobot import Episode, LeRobotWriter
from bitvla.errors import BitvlaError
from bitvla.processing.images import check_image
from bitvla.serve.executor import Request, Step, Summary
from bitvla.serve.joining import Chunk

PLANNED, DECISION_KEY, CHUNK = "executor.planned", "executor.decision", "executor.chunk"
DECISION = (
    "held",  # 1: stood still for want of an action, which was not a planned one then; 0: played
    "source_frame",  # frame of the episode whose chunk the action is from (the newest, where several are joined), or -1
    "source_row",  # its row there, or -1
    "queue",  # actions left after this one
    "time_ms",  # since the start of the run
    "age_ms",  # of the observation behind the action
    "slack_ms",  # what was left of the control period; negative: it was overrun
    "latency_ms",  # from this observation to its chunk; 0 where the policy was not asked, or its answer not used
    "frozen",  # actions that the policy was given as decided when it was asked
)


class Recorder:
    """Records runs into the dataset `root`, which may hold earlier ones of the same robot, policy size and rate.

    One recorder has a folder at a time: see `bitvla.data.lerobot.alone`.

    Args:
        info: of the policy (`policy.info()`): it names cameras, state, action and the horizon.
        fps: commands a second.
        robot_type: as LeRobot calls it.

    Raises:
        BitvlaError: the folder holds another dataset. OSError: it cannot be written to.
    """

    def __init__(self, root: Path, info: Mapping[str, Any], fps: float, robot_type: str) -> None:
        names = info["action"]["names"]
        rows = [f"{name}.{row}" for row in range(info["horizon"]) for name in names]
        self._writer = LeRobotWriter(
            root,
            robot_type=robot_type,
            fps=fps,
            cameras={camera["name"]: (camera["height"], camera["width"]) for camera in info["cameras"]},
            vectors={
                "observation.state": info["state"]["names"],
                "action": names,
                PLANNED: names,
                DECISION_KEY: DECISION,
                CHUNK: rows,
            },
            lossless=True,
        )
        self._cameras = [Camera(**camera) for camera in info["cameras"]]
        self._facts = {"policy": info["name"], "policy_sha256": info.get("sha256") or ""}
        self._state_shape, self._chunk_size = (len(info["state"]["names"]),), len(rows)
        self._folder = Path(root) / ".running"
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        self._folder.mkdir(parents=True)  # now, before anything moves
        self._begin()

    def _begin(self) -> None:
        self._files: dict[str, IO[bytes]] = {}
        self._instruction, self._summary = "", ""
        self._rows: list[dict[str, NDArray[np.float32]]] = []
        self._asked_at: dict[int, int] = {}  # frame of each question
        self._frozen: dict[int, int] = {}
        self._chunks: dict[int, tuple[NDArray[np.float32], float]] = {}  # answer and latency by frame

    @property
    def num_episodes(self) -> int:
        return self._writer.num_episodes

    def asked(self, request: Request) -> None:
        self._asked_at[request.id] = len(self._rows)
        self._frozen[len(self._rows)] = 0 if request.prefix is None else len(request.prefix)

    def answered(self, chunk: Chunk, latency: int) -> None:
        self._chunks[self._asked_at[chunk.id]] = chunk.actions.ravel(), latency / 1e6

    def commanded(self, observation: dict[str, Any], planned: NDArray[np.float32], step: Step) -> None:
        state = self._checked(observation)
        self._instruction = observation["instruction"]
        for camera in self._cameras:
            self._write(camera.name, observation["images"][camera.name])
        source = step.sources[-1] if step.sources else None
        decision = {
            "held": step.kind != "play",
            "source_frame": self._asked_at[source.chunk] if source else -1,
            "source_row": source.row if source else -1,
            "queue": step.queue,
            "time_ms": step.time_ms,
            "age_ms": step.age_ms,
            "slack_ms": step.slack_ms,
            "latency_ms": 0,  # the answer is still to come
            "frozen": 0,
        }
        self._rows.append({
            "observation.state": state,
            "action": np.array(step.action, np.float32),
            PLANNED: planned.copy(),
            DECISION_KEY: np.array([decision[name] for name in DECISION], np.float32),
            CHUNK: np.zeros(self._chunk_size, np.float32),
        })  # fmt: skip

    def ended(self, summary: Summary) -> None:
        self._summary = msgspec.json.encode(summary).decode()

    def save(self) -> None:
        """Let the episode join the dataset. One without a command, as of a run that was refused, is left out."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a full disk, which is told already; what is whole on it is kept
                file.close()
        try:
            sizes = {camera.name: 3 * camera.height * camera.width for camera in self._cameras}
            whole = [Path(file.name).stat().st_size // sizes[camera] for camera, file in self._files.items()]
            self._rows = self._rows[: min(whole, default=0)]
            if self._rows:
                self._writer.append([self._episode()])
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._begin()

    def _episode(self) -> Episode:
        for frame, (chunk, latency) in self._chunks.items():
            if frame < len(self._rows):  # the robot may have stopped before the next command
                row = self._rows[frame]
                row[CHUNK] = chunk
                row[DECISION_KEY][DECISION.index("latency_ms")] = latency
                row[DECISION_KEY][DECISION.index("frozen")] = self._frozen[frame]
        images = {
            camera.name: np.memmap(
                self._files[camera.name].name, np.uint8, "r", shape=(len(self._rows), camera.height, camera.width, 3)
            )
            for camera in self._cameras
        }
        vectors = {key: np.stack([row[key] for row in self._rows]) for key in self._rows[0]}
        ended = json.loads(self._summary)["ended"] if self._summary else "unknown"
        facts = {**self._facts, "ended": ended, "summary": self._summary}
        return Episode(images, vectors, self._instruction, facts)

    def _write(self, camera: str, image: NDArray[np.uint8]) -> None:
        try:
            if camera not in self._files:
                self._folder.mkdir(exist_ok=True)
                self._files[camera] = (self._folder / f"{len(self._files)}.raw").open("wb")
            self._files[camera].write(np.ascontiguousarray(image).data)
        except OSError as error:
            raise BitvlaError(f"cannot record to {self._folder}: {error.strerror}; free some space") from None

    def _checked(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        """The state of an observation that fits the dataset; one frame that does not would spoil all of it."""
        for camera in self._cameras:
            check_image(observation["images"].get(camera.name), camera)
        state = np.array(observation["state"], np.float32)
        if state.shape != self._state_shape or not np.isfinite(state).all():
            raise BitvlaError(f"cannot record the state {state}: {self._state_shape[0]} finite numbers are needed")
        return state
