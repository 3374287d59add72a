"""The files of an evaluation: the result, whole or absent, and the journal from which a killed one goes on."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from bitvla.errors import BitvlaError
from bitvla.evaluate.record import Episode, Job, Protocol, Record
from bitvla.evaluate.result import FORMAT, Result
from bitvla.files import write_whole

T = TypeVar("T")


def save(result: Result, path: Path) -> None:
    """Write a result; the file appears whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(result), indent=1))


def load(path: Path) -> Result:
    """Read a result, or BitvlaError naming what is wrong with the file."""
    try:
        return _decode(Path(path).read_bytes(), Result, str(path))
    except OSError as error:
        raise BitvlaError(f"cannot read the result {path}: {error.strerror}") from None


def _decode(text: bytes, kind: type[T], origin: str) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BitvlaError(f"{origin} is not a record of this version of bitvla: {error}") from None


class Header(Record, frozen=True, kw_only=True):
    """The first line of an unfinished evaluation: what must be the same for it to go on."""

    format: int = FORMAT
    protocol: Protocol
    policy: str
    precision: str
    versions: dict[str, str]


class Journal:
    """The episodes of an unfinished evaluation, one a line, safe against being killed at any moment.

    Opening it returns to what was done before: `episodes` holds what need not be run again (an episode with an error
    is run again). With `path` None it lives in memory only. When it closes after `complete` was set, the file goes.
    Raises BitvlaError when the file belongs to another evaluation, or another evaluation is writing it now.
    """

    def __init__(self, path: Path | None, header: Header, resume: bool = True) -> None:
        self.path = path
        self.episodes: dict[Job, Episode] = {}
        self.complete = False
        self._file: io.FileIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(path, "a+")
        except OSError as error:
            raise BitvlaError(f"cannot write {path}: {error.strerror}; choose another place") from None
        try:
            self._go_on(self._file, path, header, resume)
        except BitvlaError:
            self._file.close()
            raise

    def _go_on(self, file: io.FileIO, path: Path, header: Header, resume: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BitvlaError(f"another evaluation is writing {path} now; wait for it or choose another name") from None
        if not resume:
            file.truncate(0)
        file.seek(0)
        whole, newline, _torn = file.read().rpartition(b"\n")
        file.truncate(len(whole) + len(newline))
        if not whole:
            self._append(msgspec.json.encode(header))
            return
        first, *lines = whole.split(b"\n")
        _check_same(path, header, _decode(first, Header, str(path)))
        episodes = (_decode(line, Episode, str(path)) for line in lines)
        self.episodes = {e.job: e for e in episodes if e.error is None}

    def add(self, episode: Episode) -> None:
        self.episodes[episode.job] = episode
        self._append(msgspec.json.encode(episode))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            if self._file.write(data + b"\n") != len(data) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BitvlaError(f"cannot write {self.path}: {error.strerror}; free some space and run again") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        if self.complete and self.path is not None:
            self.path.unlink(missing_ok=True)
        self._file.close()


def _check_same(path: Path, expected: Header, found: Header) -> None:
    for name in expected.__struct_fields__:
        if getattr(found, name) != getattr(expected, name):
            raise BitvlaError(
                f"{path} holds an unfinished evaluation with another {name}; finish it as it was begun, or delete it"
            )
