"""The files of an evaluation: the result, whole or absent, and the journal from which a killed one goes on."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from bitvla.errors import BitvlaError
from bitvla.files import check_no_folder, write_whole

T = TypeVar("T")


class Entry(Protocol):
    """What is done of an evaluation: which job it was, and what went wrong, if anything."""

    @property
    def job(self) -> Hashable: ...

    @property
    def error(self) -> str | None: ...


E = TypeVar("E", bound=Entry)


def save(result: msgspec.Struct, path: Path) -> None:
    """Write a result; the file appears whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(result), indent=1))


def load(path: Path, kind: type[T]) -> T:
    """Read a result of a kind, or BitvlaError naming what is wrong with the file."""
    try:
        return _decode(Path(path).read_bytes(), kind, str(path))
    except OSError as error:
        raise BitvlaError(f"cannot read the result {path}: {error.strerror}") from None


def _decode(text: bytes, kind: type[T], origin: str) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BitvlaError(f"{origin} is not a record of this version of bitvla: {error}") from None


class Journal(Generic[E]):
    """The entries of an unfinished evaluation, one a line, safe against being killed at any moment.

    They lie in OUT.partial.jsonl beside the result `out`; with None in memory only. The first line is `header`: what
    must be the same for the evaluation to go on. Opening it returns to what was done before: `entries`, of type `kind`,
    holds by its job what need not be done again (an entry with an error is). When it closes after `complete` was set,
    the file goes. Raises BitvlaError when the file belongs to another evaluation, when another evaluation is writing it
    now, and where `out` cannot be a file.
    """

    def __init__(self, out: Path | None, header: msgspec.Struct, kind: type[E], resume: bool = True) -> None:
        self.entries: dict[Any, E] = {}
        self._kind = kind
        self.complete = False
        self.path: Path | None = None
        self._file: io.FileIO | None = None
        if out is None:
            return
        check_no_folder(out)
        self.path = path = out.with_name(f"{out.name}.partial.jsonl")
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

    def _go_on(self, file: io.FileIO, path: Path, header: msgspec.Struct, resume: bool) -> None:
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
        _check_same(path, header, _decode(first, type(header), str(path)))
        entries = (_decode(line, self._kind, str(path)) for line in lines)
        self.entries = {entry.job: entry for entry in entries if entry.error is None}

    def add(self, entry: E) -> None:
        self.entries[entry.job] = entry
        self._append(msgspec.json.encode(entry))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            if self._file.write(data + b"\n") != len(data) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BitvlaError(f"cannot write {self.path}: {error.strerror}; free some space and run again") from None

    def __enter__(self) -> Journal[E]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        if self.complete and self.path is not None:
            self.path.unlink(missing_ok=True)
        self._file.close()


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The first field of `a` that is another in `b`, as JSON: the order of files counts, for it numbers questions."""
    return next((name for name, value in a.items() if msgspec.json.encode(value) != msgspec.json.encode(b[name])), None)


def _check_same(path: Path, expected: msgspec.Struct, found: msgspec.Struct) -> None:
    if name := difference(msgspec.structs.asdict(expected), msgspec.structs.asdict(found)):
        raise BitvlaError(
            f"{path} holds an unfinished evaluation with another {name}; finish it as it was begun, or delete it"
        )
