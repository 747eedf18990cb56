"""The terminal that a VM in QEMU has for its console."""

import os
import pty
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(30)

KEEPER = """
import contextlib, os
from vvupipe.vm.qemu_process import terminal_kept
with terminal_kept():
    print("inside", flush=True)
    with contextlib.suppress(OSError):
        os.read(0, 1)
print("outside", flush=True)
"""


def test_a_terminal_that_is_hung_up_is_not_given_back():
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER], stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(inner)
    assert process.stdout.readline() == "inside\n"
    os.close(outer)
    assert process.communicate(timeout=20) == ("outside\n", "")
