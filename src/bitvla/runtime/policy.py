"""A policy on the robot: an observation in, a chunk of actions out. NumPy and native kernels only."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import bitvla._native as native
from bitvla.bundle import Bundle, read
from bitvla.config import PolicyConfig, to_dict
from bitvla.errors import BitvlaError
from bitvla.processing.images import image_patches
from bitvla.processing.observation import check_observation
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import action_range, check_prefix, network_actions, normalize, robot_actions
from bitvla.runtime.inspect import bytes_by_part
from bitvla.runtime.machine import give_back_memory
from bitvla.runtime.network import Network, Plan
from bitvla.runtime.selftest import choose_isa

PARTS = ("preprocess", "vision", "decoder", "head")

# Characters of a tokenizer that stays in memory. A larger one is read again for every new instruction: that of Llama 3
# takes half a second, and 100 MB if it stayed.
TOKENIZER_KEPT = 1 << 20
_MAX_PLANS = 256  # instructions whose token ids are remembered


class Policy:
    """A loaded policy. Threads that call it wait for each other, since its buffers are used again by every call.

    `timings` holds the milliseconds that each part of the last call took, by the names in `PARTS`.
    """

    def __init__(self, bundle: Bundle[PolicyConfig], prune: float = 0.0) -> None:
        self.bundle, self.prune = bundle, prune
        self.config = bundle.config
        bundle.check_finite()
        self._prompt: Prompt | None = None
        self._read_prompt()  # now, so that a wrong tokenizer is refused at load
        give_back_memory()
        self.network = Network(bundle, prune)
        self.isa = choose_isa(self.network.parts)
        self.timings = dict.fromkeys(PARTS, 0.0)
        self._plans: dict[str, Plan] = {}
        self._calling = threading.Lock()

    @classmethod
    def load(cls, path: Path, threads: int | None = None, prune: float = 0.0) -> Policy:
        """Load a policy file; see `bitvla.load`."""
        use_threads(threads)
        return cls(read(path), prune)

    @property
    def max_prefix(self) -> int:
        """The most actions that `prefix` of `act` may hold; 0 if the policy was not trained for any."""
        return self.config.action.max_prefix

    def act(self, observation: object, prefix: object = None) -> NDArray[np.float32]:
        """The chunk for an observation: float32 (horizon, action_dim), in the robot's own units.

        `observation` is {"images": {camera: uint8 (height, width, 3) RGB}, "state": float (state_dim,) in the robot's
        units, "instruction": str}, without "state" where the policy takes none. `prefix`, float (n, action_dim) with
        n <= max_prefix, are the first actions of the chunk where those are decided already, in the robot's units; the
        rest continues them (real-time chunking). Raises BitvlaError, and never acts, on anything missing, unknown or
        unusable.
        """
        return self.act_batch([observation], [prefix])[0]

    def act_batch(
        self, observations: Sequence[object], prefixes: Sequence[object] | None = None
    ) -> NDArray[np.float32]:
        """The chunks for several observations, computed together: float32 (observations, horizon, action_dim).

        Each is what `act` answers, bit for bit, whatever else is in the batch. Instructions may differ, and so may
        `prefixes`: one, or None, for each observation. Raises BitvlaError where there is none, or where
        any of it is unusable.
        """
        with self._calling:
            return self._act_batch(observations, prefixes)

    def _act_batch(self, observations: Sequence[object], prefixes: Sequence[object] | None) -> NDArray[np.float32]:
        times = [time.perf_counter()]
        prefixes = [None] * len(observations) if prefixes is None else prefixes
        patches, plans, states, given = self._preprocess(observations, prefixes)
        times.append(time.perf_counter())
        features = self.network.see(patches, plans)
        times.append(time.perf_counter())
        decided = [network_actions(actions, self.config.processing) for actions in given]
        answers = self.network.think(plans, features, states, decided)
        times.append(time.perf_counter())
        actions = self.network.act(answers, decided)
        if not np.isfinite(actions).all():
            raise BitvlaError("the network answered with a value that is not finite; check the file: bitvla verify")
        chunks = robot_actions(actions, self.config.processing)
        for chunk, prefix in zip(chunks, given, strict=True):
            chunk[: len(prefix)] = prefix
        times.append(time.perf_counter())
        self.timings = {part: 1e3 * (times[i + 1] - times[i]) for i, part in enumerate(PARTS)}
        return chunks

    def reset(self) -> None:
        """Begin a new episode. Every call of `act` stands alone, so there is nothing to forget yet."""

    def info(self) -> dict[str, Any]:
        """What the policy expects and does: cameras, units, rates, memory in bytes, instruction set, provenance."""
        processing, action = self.config.processing, self.config.action
        return {
            "name": self.config.name,
            "path": str(self.bundle.path) if self.bundle.path else None,
            "sha256": self.bundle.sha256,
            "cameras": [to_dict(camera) for camera in processing.cameras],
            "state": {"names": list(processing.state.names), "units": list(processing.state.units)},
            "action": {"names": list(processing.action.names), "units": list(processing.action.units)},
            "action_range": action_range(processing),
            "control_hz": processing.control_hz,
            "horizon": action.horizon,
            "max_prefix": action.max_prefix,
            "execute_horizon": processing.execute_horizon,
            "precision": self.config.precision,
            "prune": self.prune,
            "instruction_set": native.isa(),
            "threads": native.num_threads(),
            "memory": bytes_by_part(self.bundle.document) | {"buffers": self.network.workspace.nbytes},
            "provenance": self.bundle.document.provenance,
        }

    def _preprocess(
        self, observations: Sequence[object], prefixes: Sequence[object]
    ) -> tuple[NDArray[np.float32], list[Plan], NDArray[np.float32], list[NDArray[np.float32]]]:
        """Patches of all images, plans, normalised states, and prefixes in the robot's units."""
        if not observations or len(prefixes) != len(observations):
            raise BitvlaError(
                f"a batch of {len(observations)} observations and {len(prefixes)} prefixes; "
                "give at least one observation, and a prefix or None for each"
            )
        vision, processing = self.config.vision, self.config.processing
        patches, plans, states, given = [], [], [], []
        for index, (observation, prefix) in enumerate(zip(observations, prefixes, strict=True)):
            try:
                given.append(check_prefix(prefix, self.config))
                seen = check_observation(observation, self.config)
                plans.append(self.plan(seen.instruction))
            except BitvlaError as error:
                if len(observations) == 1:
                    raise
                raise BitvlaError(f"observation {index} of the batch: {error}") from None
            patches += [image_patches(image, processing.image, vision) for image in seen.images]
            states.append(normalize(seen.state, processing.state))
        return np.concatenate(patches), plans, np.stack(states), given

    def plan(self, instruction: str) -> Plan:
        """Where everything stands in the sequence for `instruction`, remembered from call to call."""
        known = self._plans.get(instruction) if isinstance(instruction, str) else None
        if known is None:
            known = self.network.plan(self._prompt or self._read_prompt(), instruction)
            if self._prompt is None:
                give_back_memory()
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[instruction] = known
        return known

    def _read_prompt(self) -> Prompt:
        text = self.bundle.tokenizer()
        prompt = Prompt(self.config, parse_tokenizer(text))
        if len(text) <= TOKENIZER_KEPT:
            self._prompt = prompt
        return prompt


def use_threads(threads: int | None) -> None:
    """Have the kernels of this process use so many threads; None leaves their number. BitvlaError for an impossible
    one."""
    if threads is None:
        return
    try:
        native.set_num_threads(threads)
    except (TypeError, ValueError):
        raise BitvlaError(f"threads is {threads!r}; give a whole number from 1 to 1024") from None


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer from the text of its tokenizer.json; BitvlaError when it is not one.

    It neither shortens nor fills texts, whatever it did in training: the file keeps that.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise BitvlaError(f"the policy's tokenizer is damaged: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
