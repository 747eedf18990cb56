"""Program that compiles kernels into an object file: `NAME FILE --parent PID`, for kernels/NAME_entries.py.

A process of its own, as numba and its compiler take some 200 MiB that a worker need not have.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from pathlib import Path

from vvupipe.workers.executor import die_with_parent


def main(arguments: list[str]) -> None:
    """Compile, and put the whole file in its place at once."""
    name, path, parent = arguments[0], Path(arguments[1]), int(arguments[3])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for us decides
    from kernels import jit

    jit.for_object_file_only()
    from kernels import object_file

    logging.getLogger("numba").setLevel(logging.WARNING)
    partial = path.with_suffix(".partial")
    code = object_file.build(importlib.import_module(f"kernels.{name}_entries"))
    with partial.open("wb") as file:
        file.write(code)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


if __name__ == "__main__":
    main(sys.argv[1:])
