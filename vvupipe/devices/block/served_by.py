"""Which block back-ends of this user serve an image, found by what /proc says of them."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import psutil

_MODULE = "vvupipe"
_BLOCK_PROGRAM = "vvupipe-block"
_COMMAND = ["device", "block"]
_OPTIONS_WITH_A_VALUE = ("-X", "-W")  # of Python, which come before the program


def back_ends(status: os.stat_result) -> list[psutil.Process]:
    """The coordinators, not their workers, that have the file or block device of `status` open, by process id.

    Processes that end meanwhile, or that may not be looked at, count as none.
    """
    wanted = _identity(status)
    return [process for process in _coordinators() if wanted in _open_files(process.pid)]


def takes_signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the process handles the signal (SigCgt, proc(5)), which would end it otherwise."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)


def _coordinators() -> Iterator[psutil.Process]:
    user = os.geteuid()
    for process in psutil.process_iter():
        try:
            if process.uids().effective == user and _is_block_back_end(process.cmdline()):
                yield process
        except psutil.Error:
            continue


def _is_block_back_end(cmdline: Sequence[str]) -> bool:
    """Whether these are the words of Python that runs `vvupipe device block`, or vvupipe-block."""
    if not cmdline or not PurePath(cmdline[0]).name.startswith(("python", "pypy")):
        return False
    words = iter(cmdline[1:])
    for word in words:
        if word == "-m":
            return next(words, "") == _MODULE and _runs_block(words)
        if word == "-c":
            return False
        if word in _OPTIONS_WITH_A_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            name = PurePath(word).name
            return name == _BLOCK_PROGRAM or (name == _MODULE and _runs_block(words))
    return False


def _runs_block(words: Iterator[str]) -> bool:
    return [next(words, ""), next(words, "")] == _COMMAND


def _open_files(pid: int) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return found
    for link in links:
        try:
            found.add(_identity(link.stat()))
        except OSError:
            continue  # closed meanwhile
    return found


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Two nodes of one block device are the same disk."""
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
