"""The guest's console on a terminal: typing, Ctrl-A X, and the terminal as it was afterwards."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
from guest_kit import ENTRY, ROOT, base_initramfs, kernel

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]


class Terminal:
    """A sibling with an interactive shell on a pseudo-terminal."""

    def __init__(self, folder):
        (folder / "initramfs").write_bytes(base_initramfs())
        options = {
            "vhost_user_blk": [],
            "kernel": str(kernel().image),
            "initrd": str(folder / "initramfs"),
            "params": ["quiet"],
            "accel": "tcg",
            "mem_mib": 256,
        }
        self.fd, self.inner = pty.openpty()
        self.modes = termios.tcgetattr(self.inner)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, str(ENTRY), json.dumps(options)],
            stdin=self.inner,
            stdout=self.inner,
            stderr=self.inner,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def type(self, keys):
        os.write(self.fd, keys)

    def comes(self, text, timeout_s):
        """Whether `text` comes after what was waited for before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                return False
            self.text += os.read(self.fd, 4096).decode(errors="replace")
        self.text = self.text.partition(text)[2]
        return True

    def wait_for(self, text, timeout_s=30):
        """Wait for `text` after what was waited for before."""
        if not self.comes(text, timeout_s):
            pytest.fail(f"{text!r} did not come:\n{self.text}")

    def end(self):
        """The exit status, once the terminal was found as it had been."""
        status = self.process.wait(15)
        assert termios.tcgetattr(self.inner) == self.modes
        assert os.get_blocking(self.inner)
        return status

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.fd)
        os.close(self.inner)


@pytest.fixture
def terminal(qemu, tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_a_shell_on_the_terminal(terminal):
    terminal.wait_for("Ctrl-A X ends the VM")
    terminal.wait_for("A shell;")
    terminal.wait_for("#")
    assert termios.tcgetattr(terminal.inner) != terminal.modes
    terminal.type(b"echo $((6 * 7))\n")
    terminal.wait_for("\n42")
    terminal.type(b"echo begun; sleep 1000\n")
    terminal.wait_for("\nbegun")
    # Ctrl-C is the guest's. Its shell overhears one that comes just as it starts the command.
    for _ in range(6):
        terminal.type(b"\x03")
        if terminal.comes("#", 5):
            break
    else:
        pytest.fail(f"Ctrl-C does nothing:\n{terminal.text}")
    terminal.type(b"exit 0\n")
    terminal.wait_for("vvupipe-guest: exit 0")
    assert terminal.end() == 0


def test_ctrl_a_x_ends_the_vm(terminal):
    terminal.wait_for("A shell;")
    terminal.type(b"\x01x")
    assert terminal.end() == 1


def test_kill_9_of_qemu_leaves_a_usable_terminal(terminal):
    terminal.wait_for("A shell;")
    (qemu,) = psutil.Process(terminal.process.pid).children()
    qemu.kill()
    assert terminal.end() == 1
