"""A block device for a test: a loop device on a file. Skips the test where there is none."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def attached(path, block_bytes):
    """The path of a block device on the file `path`, with logical blocks of block_bytes."""
    if os.getuid() or not shutil.which("losetup"):
        pytest.skip("needs root and losetup")
    made = subprocess.run(
        ["losetup", "-f", "--show", "-b", str(block_bytes), path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
