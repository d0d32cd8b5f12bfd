"""What every command shares: messages, errors in one line, and options that hold several values."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from bkdattr.errors import BkdattrError


def say(text: str) -> None:
    typer.echo(text, err=True)


def printable(text: str) -> str:
    """Model output as the terminal's encoding can show it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def errors(*, every: bool = False) -> Iterator[None]:
    """One line and exit code 2 for bad input, no traceback. `every`: 2 for whatever else goes wrong as well, an interruption too, for commands
    whose exit code 1 is an answer; what nobody foresaw keeps its traceback."""
    try:
        yield
    except BkdattrError as error:
        say("error: " + " ".join(str(error).split()))
        raise typer.Exit(2) from None
    except OSError as error:
        say(f"error: {error.strerror or error}: {error.filename or ''}; check the path and its permissions")
        raise typer.Exit(2) from None
    except (Exception, KeyboardInterrupt) as error:
        if not every or isinstance(error, typer.Exit):
            raise
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        say(f"error: {type(error).__name__}: {' '.join(str(error).split()) or 'stopped'}")
        raise typer.Exit(2) from None


def quiet_libraries() -> None:
    """Our own bars and messages only."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def numbers(option: str, text: str, example: str, *, whole: bool = False) -> list[Any]:
    try:
        return [int(x) if whole else float(x) for x in text.split(",")]
    except ValueError:
        raise BkdattrError(f"{option} {text!r}: expected {'whole ' if whole else ''}numbers, e.g. {example}") from None
