"""How a QEMU is ended, with a program in its place that only listens where the console is to be."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)

QEMU = f"""#!{sys.executable}
import re, signal, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 7.2.0")
    sys.exit()
path = next(found[1] for each in sys.argv if (found := re.match("socket,id=console.*path=(.*)", each)))
console = socket.socket(socket.AF_UNIX)
console.bind(path)
console.listen()
print("listening", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signals", [1, 3])
def test_a_vm_that_is_ended_leaves_no_console(tmp_path, signals):
    """QEMU removes its socket when it quits; one that waits for its back-end hears nothing and is killed."""
    (tmp_path / "qemu").write_text(QEMU)
    (tmp_path / "qemu").chmod(0o755)
    (tmp_path / "kernel").write_bytes(b"k")
    with socket.socket(socket.AF_UNIX) as back_end:
        back_end.bind(str(tmp_path / "b"))
        back_end.listen()
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "vvupipe", "run", "--vhost-user-blk", "b", "kernel", "--qemu", "./qemu",
                "--serial", "type=unix,path=console",
            ],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )  # fmt: skip
        try:
            assert process.stdout.readline() == "listening\n"
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.002)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode in {1, -signal.SIGTERM}
    assert "Traceback" not in errors
    assert not (tmp_path / "console").exists()
