"""Decoded pictures on disk: an episode of a camera a file, uncompressed, in a folder whose size may be bounded.

Training looks at frames in random order, and videos are made to be read in theirs: an episode is decoded as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from threading import get_ident

import numpy as np
from numpy.typing import NDArray

from bitvla.errors import BitvlaError
from bitvla.progress import bar

Frame = NDArray[np.uint8]
ABANDONED_SECONDS = 3600  # nobody writes to a temporary file that was not touched for so long


class Pictures:
    """The frames that `decode(camera, episode)` yields, uint8 of the camera's shape (H, W, 3), kept in `folder`.

    `lengths` are the frames of each episode. Beyond `limit` bytes, what was loaded longest ago makes room. Processes
    may share a folder: files appear whole, and one that is gone is decoded again.
    """

    def __init__(
        self,
        decode: Callable[[str, int], Iterator[Frame]],
        *,
        folder: Path,
        shapes: Mapping[str, tuple[int, int, int]],
        lengths: Sequence[int],
        limit: int | None = None,
    ) -> None:
        self.limit, self.lengths = limit, np.asarray(lengths, dtype=np.int64)
        self._decode, self.folder, self._shapes = decode, folder, shapes

    def bytes_of(self, cameras: Iterable[str]) -> NDArray[np.int64]:
        """What each episode takes on disk, seen by `cameras`."""
        return self.lengths * sum(math.prod(self._shapes[camera]) for camera in cameras)

    def frame(self, camera: str, episode: int, index: int) -> Frame:
        """The `index`-th frame of an episode, which is decoded where it is not on disk."""
        shape, path = self._shapes[camera], self._path(camera, episode)
        size = math.prod(shape)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)  # a third of the time that Python's files take
            except FileNotFoundError:
                self._write(camera, episode)
                continue
            try:
                content = os.pread(descriptor, size, index * size)
            finally:
                os.close(descriptor)
            if len(content) == size:
                return np.frombuffer(content, np.uint8).reshape(shape)
            self._write(camera, episode)  # the machine went down before the file was on the disk

    def load(self, cameras: Sequence[str], episodes: Iterable[int], description: str = "") -> None:
        """Decode what is not on disk of these episodes; a `description` shows how far it is."""
        wanted = [(camera, int(episode)) for episode, camera in product(episodes, cameras)]
        missing = []
        for camera, episode in wanted:
            try:
                os.utime(self._path(camera, episode))
            except FileNotFoundError:
                missing.append((camera, episode))
        with bar(description) if description and missing else contextlib.nullcontext() as show:
            for done, (camera, episode) in enumerate(missing, 1):
                self._write(camera, episode)
                if show:
                    show(done, len(missing), "")

    def kept(self) -> Iterator[tuple[str, int, float]]:
        """The camera and the episode of each file on disk, and when it was written or last loaded (Unix time)."""
        for path in self.folder.glob("*.rgb"):
            camera, _, episode = path.stem.rpartition("-")
            with contextlib.suppress(FileNotFoundError):  # another process made room
                yield camera, int(episode), path.stat().st_mtime

    def drop(self, camera: str, episode: int) -> None:
        """Decode an episode again when it is needed."""
        Path(self._path(camera, episode)).unlink(missing_ok=True)

    def _path(self, camera: str, episode: int) -> str:
        return f"{self.folder}/{camera}-{episode:06d}.rgb"

    def _write(self, camera: str, episode: int) -> None:
        path, shape = Path(self._path(camera, episode)), self._shapes[camera]
        temporary = path.with_suffix(f".{os.getpid()}-{get_ident()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(math.prod(shape) * int(self.lengths[episode]))
            with temporary.open("wb") as file:
                for frame in self._decode(camera, episode):
                    file.write(np.ascontiguousarray(frame).data)
            os.replace(temporary, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise BitvlaError(f"decoded pictures cannot be kept in {self.folder}: {error.strerror}") from None
            raise BitvlaError(
                f"the disk is full ({self.folder}, decoded pictures): free some space, or bound them with --cache-size"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if self.limit is None:
            return
        # Another thread may be writing one, too.
        longest = int(self.lengths.max()) * max(math.prod(shape) for shape in self._shapes.values())
        make_room(self.folder.glob("*"), self.limit - needed - longest)


def make_room(files: Iterable[Path], most: int) -> None:
    """Delete those of `files` that were touched longest ago, until the others take at most `most` bytes.

    Temporary ones count once they are old: who wrote them was killed.
    """
    kept = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # another process made room
            status = path.stat()
            if path.suffix != ".tmp" or time.time() - status.st_mtime > ABANDONED_SECONDS:
                kept.append((status.st_mtime_ns, status.st_size, path))
    excess = sum(size for _, size, _ in kept) - most
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def user_cache() -> Path:
    """Where what was fetched for this user is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitvla"


class Images(Sequence[Frame]):
    """All frames of one camera, in the order of the dataset."""

    def __init__(self, pictures: Pictures, camera: str) -> None:
        self._pictures, self._camera = pictures, camera
        self._ends = np.cumsum(pictures.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, frame: int) -> Frame:  # type: ignore[override]  # one at a time
        if not 0 <= frame < len(self):
            raise IndexError(frame)
        episode = int(np.searchsorted(self._ends, frame, side="right"))
        begin = int(self._ends[episode] - self._pictures.lengths[episode])
        return self._pictures.frame(self._camera, episode, int(frame) - begin)
