"""The one exception a user of bitvla should ever meet."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class BitvlaError(Exception):
    """What went wrong, with which value, and what to do about it, in one line."""


@contextmanager
def memory_for(what: str, needed: int) -> Iterator[None]:
    """Where memory runs out inside, a BitvlaError says what it was for and that this takes `needed` bytes."""
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise BitvlaError(
            f"no memory for {what}, which takes {needed / 1e6:.1f} MB; raise the limit of this process (ulimit -v, or "
            "its container's) or free some memory"
        ) from None
