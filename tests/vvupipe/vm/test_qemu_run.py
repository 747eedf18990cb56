"""How a QEMU is ended, and watched, with a program in its place that does as a test wants."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)

BEGIN = f"""#!{sys.executable}
import json, re, signal, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 7.2.0")
    sys.exit()
"""

CONSOLE = """
path = next(found[1] for each in sys.argv if (found := re.match("socket,id=console.*path=(.*)", each)))
console = socket.socket(socket.AF_UNIX)
console.bind(path)
console.listen()
print("listening", flush=True)
time.sleep(60)
"""


#: Answers everything but `quit`; has a character device that is never connected.
MONITOR = """
fd = next(int(found[1]) for each in sys.argv if (found := re.match("socket,id=qmp,fd=([0-9]+)", each)))
monitor = socket.socket(fileno=fd)
say = lambda **fields: monitor.sendall(json.dumps(fields).encode() + b"\\r\\n")
say(QMP={"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []})
while data := monitor.recv(4096):
    request = json.loads(data)
    apart = [{"label": "disk0", "filename": "disconnected:unix:b", "frontend-open": False}]
    if request["execute"] == "cont":
        print("running", flush=True)
    if request["execute"] != "quit":
        request["return"] = apart if request.pop("execute") == "query-chardev" else {}
        say(**request)
"""


@contextlib.contextmanager
def sibling(folder, qemu, *options):
    """A QEMU sibling as a process; its back-end listens and never answers."""
    (folder / "qemu").write_text(BEGIN + qemu)
    (folder / "qemu").chmod(0o755)
    (folder / "kernel").write_bytes(b"k")
    with socket.socket(socket.AF_UNIX) as back_end:
        back_end.bind(str(folder / "b"))
        back_end.listen()
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "vvupipe", "run", "--vhost-user-blk", "b", "kernel", "--qemu", "./qemu",
                *options,
            ],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def test_a_second_signal_ends_a_qemu_that_does_not_quit(tmp_path):
    with sibling(tmp_path, MONITOR, "--serial", "type=sink") as process:
        assert process.stdout.readline() == "running\n"
        began = time.monotonic()
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in {1, -signal.SIGTERM}
    assert errors == ""
    assert time.monotonic() - began < 4, "the first one waits for 5 s"


def test_a_back_end_that_hangs_up_again_and_again_is_one_line(tmp_path):
    with sibling(tmp_path, MONITOR, "--serial", "type=sink", "--queue-size", "512") as process:
        assert "the back-end at b hangs up on this VM again and again" in (line := process.stderr.readline())
        assert "smaller than 512 entries, use --queue-size" in line
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert errors == ""


@pytest.mark.parametrize("signals", [1, 3])
def test_a_vm_that_is_ended_leaves_no_console(tmp_path, signals):
    """QEMU removes its socket when it quits; one that waits for its back-end hears nothing and is killed."""
    with sibling(tmp_path, CONSOLE, "--serial", "type=unix,path=console") as process:
        assert process.stdout.readline() == "listening\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in {1, -signal.SIGTERM}
    assert "Traceback" not in errors
    assert not (tmp_path / "console").exists()
