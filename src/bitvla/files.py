"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from bitvla.errors import BitvlaError


def check_no_folder(path: Path) -> None:
    """BitvlaError where `path` is a folder, in which a file can be made but which cannot become one."""
    if path.is_dir():
        raise BitvlaError(f"{path} is a folder: name a file in it")


def put(temporary: Path, path: Path) -> None:
    """Rename a file that is written to `path`, once it is on the disk: a machine that goes down leaves it whole too."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_whole(path: Path, *parts: Any) -> None:
    """Write `parts` (bytes or buffers), one after the other, to a temporary name, then rename.

    BitvlaError when the disk refuses; an older file at `path` is then still there.
    """
    check_no_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        put(temporary, path)
    except OSError as error:
        raise BitvlaError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
