"""From the names that a robot's dialect uses to the names of the policy: by name, or as told, never by guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError

_DEEPEST = 4  # levels of a message
_MOST_KEYS = 1000  # of a message: millions would keep the other robots waiting

# What LIBERO's two cameras are called in the datasets that policies are trained on.
_LIBERO_CAMERAS = {
    "observation/image": ("agentview", "image", "full_image"),
    "observation/wrist_image": ("robot0_eye_in_hand", "wrist_image", "image2", "wrist"),
}
PRESETS = ("libero",)


class Naming(NamedTuple):
    """What a dialect calls things. `{}` stands for a camera's or a state value's own name; "/" separates levels."""

    camera: tuple[str, ...]
    state: tuple[str, ...]
    state_value: str
    instruction: tuple[str, ...]


class KeyMap:
    """Turns a message into the policy's observation.

    Every part of the observation has alternatives, each a tuple of keys whose values are joined; exactly one of them
    must be complete in a message, and every key of a message must belong to one.
    """

    def __init__(
        self, config: PolicyConfig, naming: Naming, pairs: Sequence[str] = (), preset: str | None = None
    ) -> None:
        """`pairs` are KEY=PART, where PART is a camera of the policy, "state" (several keys are joined in the order
        given), "instruction", or nothing, which ignores the key. BitvlaError for a pair that names anything else."""
        self._cameras = [camera.name for camera in config.processing.cameras]
        self._turn = preset == "libero" and config.processing.image.rotate180
        self._alternatives = _by_name(config, naming)
        self._ignored: set[str] = set()
        told: dict[str, tuple[str, ...]] = {}
        mapped: set[str] = set()
        for key, part in [*_libero(self._cameras, preset), *map(_parse, pairs)]:
            if key in mapped:
                raise BitvlaError(f"--map {key}={part}: '{key}' is mapped twice; say one thing of it")
            mapped.add(key)
            if not part:
                self._ignored.add(key)
            elif part not in self._alternatives:
                raise BitvlaError(
                    f"--map {key}={part}: the policy has no '{part}'; it has {', '.join(self._alternatives)}"
                )
            elif part != "state" and part in told:
                raise BitvlaError(f"--map {key}={part}: '{part}' is already taken from '{told[part][0]}'")
            else:
                told[part] = (*told.get(part, ()), key)
        for part, alternatives in self._alternatives.items():
            # A key that stands for something else now is not the part's own any more.
            left = [keys for keys in alternatives if mapped.isdisjoint(keys)]
            if not left and part not in told:
                raise BitvlaError(f"--map takes all keys from '{part}'; say which is it with --map KEY={part}")
            self._alternatives[part] = [told[part]] if part in told else left
        self._known = {key for keys in self._alternatives.values() for alternative in keys for key in alternative}

    def check(self, keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The keys to take for each part of an observation. Raises BitvlaError unless `keys` fit exactly."""
        there = set(keys)
        chosen = {part: _choose(part, alternatives, there) for part, alternatives in self._alternatives.items()}
        unknown = sorted(there - self._known - self._ignored)
        if unknown:
            raise BitvlaError(
                f"unknown key '{unknown[0]}'; the policy's cameras are {', '.join(self._cameras)}. "
                f"Map it with --map {unknown[0]}=CAMERA, or ignore it with --map {unknown[0]}="
            )
        return chosen

    def observation(self, message: object) -> dict[str, Any]:
        """The policy's observation {"images", "state", "instruction"} from a message of nested dictionaries; no state
        where the policy takes none."""
        pairs = list(islice(_flatten(message), _MOST_KEYS + 1))
        if len(pairs) > _MOST_KEYS:
            raise BitvlaError(f"the observation has more than {_MOST_KEYS} keys")
        flat = dict(pairs)
        if len(flat) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise BitvlaError(f"'{twice}' is there more than once: flat, and nested; send one of them")
        chosen = self.check(list(flat))
        images = {camera: flat[chosen[camera][0]] for camera in self._cameras}
        if self._turn:
            # The openpi LIBERO client turns its images upright; this policy expects them as the simulator draws them.
            images = {camera: _turned(image) for camera, image in images.items()}
        instruction = flat[chosen["instruction"][0]]
        if not isinstance(instruction, str):
            raise BitvlaError(f"the instruction is a {type(instruction).__name__}, not text")
        seen: dict[str, Any] = {"images": images, "instruction": instruction}
        if "state" in chosen:
            seen["state"] = _joined([flat[key] for key in chosen["state"]])
        return seen


def _by_name(config: PolicyConfig, naming: Naming) -> dict[str, list[tuple[str, ...]]]:
    names = config.processing.state.names
    parts: dict[str, list[tuple[str, ...]]] = {
        camera.name: [(template.format(camera.name),) for template in naming.camera]
        for camera in config.processing.cameras
    }
    values = tuple(naming.state_value.format(name) for name in names)
    if names:  # some policies take no state
        parts["state"] = list(dict.fromkeys([*((key,) for key in naming.state), values]))
    parts["instruction"] = [(key,) for key in naming.instruction]
    return parts


def _libero(cameras: Sequence[str], preset: str | None) -> Iterator[tuple[str, str]]:
    if preset is None:
        return
    if preset not in PRESETS:
        raise BitvlaError(f"unknown preset '{preset}'; there is {', '.join(PRESETS)}")
    for key, names in _LIBERO_CAMERAS.items():
        found = [name for name in names if name in cameras]
        if len(found) != 1:
            raise BitvlaError(
                f"--preset libero: which camera of the policy ({', '.join(cameras)}) is '{key}' is not clear; "
                f"say it with --map {key}=CAMERA instead of the preset"
            )
        yield key, found[0]


def _parse(pair: str) -> tuple[str, str]:
    key, equals, part = pair.partition("=")
    if not key or not equals:
        raise BitvlaError(f"--map {pair}: write KEY=PART, for example observation/image=corner")
    return key, part


def _choose(part: str, alternatives: list[tuple[str, ...]], there: set[str]) -> tuple[str, ...]:
    begun = [keys for keys in alternatives if not there.isdisjoint(keys)]
    if len(begun) > 1:
        given = [key for keys in begun for key in keys if key in there]
        raise BitvlaError(f"'{part}' is there more than once: {', '.join(given)}; send one of them")
    missing = [key for key in (begun or alternatives)[0] if key not in there]
    if missing:
        got = ", ".join(sorted(there)[:20]) or "nothing"
        raise BitvlaError(f"the observation lacks '{part}': no '{missing[0]}' among {got}")
    return begun[0]


def _flatten(message: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not isinstance(message, Mapping):
        raise BitvlaError(f"the observation is a {type(message).__name__}, not a dictionary of images, state and text")
    if depth == _DEEPEST:
        raise BitvlaError(f"the observation is nested more than {_DEEPEST} levels deep at '{prefix}'")
    for name, value in message.items():
        if not isinstance(name, str):
            raise BitvlaError(f"the observation has a key that is no text: {name!r}"[:200])
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/", depth + 1)
        else:
            yield prefix + name, value


def _turned(image: object) -> object:
    return image[::-1, ::-1] if isinstance(image, np.ndarray) and image.ndim == 3 else image


def _joined(values: list[Any]) -> Any:
    """One vector of several values; a single one stays as it is. The policy checks either."""
    if len(values) == 1:
        return values[0]
    try:
        return np.concatenate([np.asarray(value).reshape(-1) for value in values])
    except (TypeError, ValueError, OverflowError):
        raise BitvlaError("the state, or a part of it, is not a vector of numbers") from None
