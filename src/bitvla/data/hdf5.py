"""LIBERO's demonstrations as its benchmark gives them out: an HDF5 file a task, in robomimic's layout.

The pictures are upside down, as the simulator renders them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bitvla.data.lerobot import Episode
from bitvla.errors import BitvlaError
from bitvla.sim.libero import Libero

PATTERN = "*.hdf5"
ROBOT = Libero.robot
CAMERAS = {"full": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
NAMES = {"observation.state": Libero.state_names, "action": Libero.action_names}


def demonstrations(path: Path, cameras: Mapping[str, str]) -> list[tuple[str, Callable[[], Episode]]]:
    """The name of each demonstration in a file, in the order they were recorded, and what reads it."""
    with _open(path) as file:
        names = sorted(file["data"], key=lambda name: int(name.rpartition("_")[2]))
    return [(f"{path.name}:{name}", partial(_read, path, name, cameras)) for name in names]


def _read(path: Path, name: str, cameras: Mapping[str, str]) -> Episode:
    with _open(path) as file:
        demonstration = file["data"][name]
        seen = demonstration["obs"]
        for camera in cameras.values():
            if camera not in seen:
                pictures = [key for key, values in seen.items() if values.ndim == 4]
                raise BitvlaError(f"{path}: {name} has no camera '{camera}', it has {', '.join(pictures)}")
        state = np.concatenate([seen["ee_states"][:], seen["gripper_states"][:]], axis=1)
        sentence = "".join(json.loads(file["data"].attrs["problem_info"])["language_instruction"])
        return Episode(
            images={ours: seen[theirs][:] for ours, theirs in cameras.items()},
            vectors={
                "observation.state": state.astype(np.float32),
                "action": demonstration["actions"][:].astype(np.float32),
            },
            task=sentence.strip('"'),
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:  # a part is missing, cut off, another
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise BitvlaError(f"{path} is truncated or no file of LIBERO ({reason}); copy it again") from None
