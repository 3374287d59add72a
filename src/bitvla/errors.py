"""The one exception a user of bitvla should ever meet."""


class BitvlaError(Exception):
    """What went wrong, with which value, and what to do about it, in one line."""
