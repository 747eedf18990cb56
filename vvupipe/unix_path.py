"""UNIX socket paths longer than sockaddr_un takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_PATH_MAX_BYTES = 107  # sun_path of Linux, without its final zero


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name for `path` that bind and connect take, however long it is; valid inside the `with`.

    Raises: OSError when the folder does not exist.
    """
    if len(os.fsencode(path)) <= _PATH_MAX_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
