"""A dataset on disk, read without the refusals of training."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bitvla.data.lerobot import CONSTANT, Place, cameras_of, names_of, read_episodes, read_info, read_table
from bitvla.errors import BitvlaError

Floats = NDArray[np.float64]


class Source:
    """Where things are. Unlike `LeRobotDataset` it opens what is broken, and never holds more than two tables.

    `broken`: the tables of frames that could not be read so far, and why.
    """

    def __init__(self, root: Place) -> None:
        self.root, self.info = root, read_info(root)
        self.fps = float(self.info["fps"])
        self.features: dict[str, Any] = self.info["features"]
        self.episodes = read_episodes(root, self.info)
        self.cameras = cameras_of(self.features)
        self._pictures = {key for key, feature in self.features.items() if feature["dtype"] == "image"}
        wanted = ("observation.state", "action", "observation.environment_state")
        self.vectors = [key for key in wanted if key in self.features]
        self.sentences = [" ".join(tasks) for tasks in self.episodes["tasks"]]
        try:
            stored = json.loads((root / "meta" / "stats.json").read_text())
            self.stats = msgspec.convert(stored, dict[str, dict[str, Any]])
        except (OSError, ValueError):
            self.stats = {}
        self.broken: dict[Place, str] = {}
        self._table = lru_cache(maxsize=2)(self._read)

    def _read(self, path: Place) -> dict[int, pd.DataFrame]:
        try:
            table = read_table(path, without=self._pictures, needed=["episode_index"])
        except BitvlaError as error:
            self.broken[path] = str(error)
            return {}
        return {int(episode): rows for episode, rows in table.groupby("episode_index", sort=False)}

    def tasks(self) -> list[str]:
        """The task of each episode; its sentence where no task is named."""
        column = self.episodes.get("env_task")
        return self.sentences if column is None else [str(task) for task in column]

    def rows(self, episode: int) -> pd.DataFrame | None:
        """The frames of an episode, or None when its table does not hold them."""
        return self._table(self.table_of(episode)).get(episode)

    def table_of(self, episode: int) -> Place:
        """The file that lists the frames of an episode."""
        chunk, file = (int(self.episodes[f"data/{part}"].iloc[episode]) for part in ("chunk_index", "file_index"))
        return self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file)

    def recoveries(self) -> NDArray[np.bool_] | None:
        """Which episodes (E,) begin in a failed state; None where none is marked."""
        column = self.episodes.get("recovery")
        if column is None or column.isna().all():
            return None
        return column.eq(True).fillna(False).to_numpy(bool)

    def names(self, key: str) -> list[str]:
        return names_of(self.features[key])

    def vector(self, rows: pd.DataFrame, key: str) -> Floats | None:
        """(T, n), or None when a row is missing or has another size."""
        if key not in self.vectors or key not in rows:
            return None
        size = len(self.names(key))
        if any(np.size(value) != size for value in rows[key]):
            return None
        return np.stack(list(rows[key])).reshape(-1, size).astype(np.float64)

    def quantiles(self, key: str) -> tuple[Floats | None, Floats | None]:
        """The stored q01 and q99 (n,); None for what training cannot read."""
        return self._bound(key, "q01"), self._bound(key, "q99")

    def _bound(self, key: str, name: str) -> Floats | None:
        try:
            return np.asarray(self.stats[key][name], np.float64).reshape(len(self.names(key)))
        except (KeyError, TypeError, ValueError):
            return None

    def scale(self, key: str) -> Floats:
        """The range of each dimension by the stored quantiles, 1 where these say nothing."""
        low, high = self.quantiles(key)
        if low is None or high is None:
            return np.ones(len(self.names(key)))
        width = high - low
        return np.where(np.isfinite(width) & (width > CONSTANT), width, 1.0)
