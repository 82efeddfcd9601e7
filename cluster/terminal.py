"""Keeps the terminal for what a person reads: whatever libraries print, from Python or from C++, goes to a log file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def quiet_terminal(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send file descriptors 1 and 2 of this process and of its children to `log`; yields the terminal's own streams."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("ab") as file, os.fdopen(kept[0], "w") as out, os.fdopen(kept[1], "w") as err:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            out.flush()
            err.flush()
            for number in (1, 2):
                os.dup2(kept[number - 1], number)
