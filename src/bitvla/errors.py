"""The one exception a user of bitvla should ever meet."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
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


def meant(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: which of the known names was probably meant, if any is near."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
