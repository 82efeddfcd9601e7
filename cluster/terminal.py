"""Keeps the terminal free for a person: everything that libraries print, from Python or C++, goes to a log file."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_errors: list[TextIO] = []  # the terminal's own stream, inside `quiet_terminal`


def tell(text: str) -> None:
    """Write a line to the terminal at once; works from any thread, and right before the process is ended."""
    stream = _errors[-1] if _errors else sys.stderr
    stream.write(f"{text}\n")
    stream.flush()


def log_traceback() -> None:
    """Inside `quiet_terminal`, write the current exception's traceback to the log; the person gets one line."""
    if _errors:
        os.write(2, traceback.format_exc().encode())


@contextmanager
def quiet_terminal(
    log: Path, wrap: Callable[[TextIO, TextIO], tuple[TextIO, TextIO]] = lambda out, err: (out, err)
) -> Iterator[tuple[TextIO, TextIO]]:
    """Send file descriptors 1 and 2 of this process and of its children to `log`.

    Yields the terminal's own streams. `wrap` may wrap them in streams that write lines in another format.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("ab") as file, os.fdopen(kept[0], "w") as plain_out, os.fdopen(kept[1], "w") as plain_err:
        out, err = wrap(plain_out, plain_err)
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        _errors.append(err)
        try:
            yield out, err
        finally:
            _errors.remove(err)
            sys.stdout.flush()
            sys.stderr.flush()
            out.flush()
            err.flush()
            for number in (1, 2):
                os.dup2(kept[number - 1], number)
