"""Which back-ends serve an image."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_WORKER_MODULE = "vvupipe.devices.block.worker"


def block_back_ends(image: os.stat_result) -> list[int]:
    """Process ids of this user's block back-ends (coordinators, not workers) that have the image open."""
    return [process.pid for process in psutil.process_iter() if _is_back_end(process) and _has_open(process, image)]


def _is_back_end(process: psutil.Process) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False  # it ended, or is none of ours
    if _WORKER_MODULE in arguments:
        return False
    names = {Path(argument).name for argument in arguments[:3]}
    return "vvupipe-block" in names or ("vvupipe" in names and {"device", "block"} <= set(arguments))


def _has_open(process: psutil.Process, image: os.stat_result) -> bool:
    folder = Path(f"/proc/{process.pid}/fd")
    try:
        for entry in folder.iterdir():
            status = entry.stat()
            if (status.st_dev, status.st_ino) == (image.st_dev, image.st_ino):
                return True
    except OSError:
        return False  # it ended, or is another user's
    return False
