"""The one exception a user is meant to read: what was got, what was expected, how to mend it."""

from __future__ import annotations


class BkdattrError(ValueError):
    """Bad input. The CLI prints it as one line and exits with code 2."""
