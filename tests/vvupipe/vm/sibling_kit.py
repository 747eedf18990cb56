"""Real back-ends for the embedded sibling, and ways to run it: in this process, or as one that can be signalled."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vvupipe.vm.sibling import SiblingOptions, run_sibling

ROOT = Path(__file__).resolve().parents[3]
NUM_QUEUES = 2


class StorageDaemon:
    """qemu-storage-daemon with a vhost-user-blk export, which can be killed and started again."""

    def __init__(self, image, socket, log_path, *, writable=True, throttle=""):
        self.image, self.socket, self.log_path = image, socket, log_path
        self.writable, self.process = writable, None

    def start(self):
        self.socket.unlink(missing_ok=True)
        access = "on" if self.writable else "off"
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    *("--blockdev", f"driver=file,node-name=f,filename={self.image},read-only={_not(access)}"),
                    *("--blockdev", f"driver=raw,node-name=r,file=f,read-only={_not(access)}"),
                    "--export",
                    f"type=vhost-user-blk,id=e,node-name=r,addr.type=unix,addr.path={self.socket},"
                    f"writable={access},num-queues={NUM_QUEUES}",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 10
        while not self.socket.exists():
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def _not(access):
    return "off" if access == "on" else "on"


@contextlib.contextmanager
def storage_daemon(folder, image, **options):
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("qemu-storage-daemon is not installed (package qemu-system-common or qemu-utils)")
    daemon = StorageDaemon(image, folder / "qsd.sock", folder / "qsd.log", **options)
    try:
        yield daemon.start()
    finally:
        daemon.kill()


def run(socket, **options):
    """Exit status of the sibling, in this process."""
    options.setdefault("timeout_s", 20.0)
    return asyncio.run(run_sibling(SiblingOptions(socket, **options)))


def run_json(capsys, socket, **options):
    """(exit status, its JSON)."""
    capsys.readouterr()
    status = run(socket, json=True, **options)
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one JSON object and nothing else"
    return status, json.loads(out)


_ENTRY = """
import asyncio, json, pathlib, sys
from vvupipe.vm.sibling import SiblingOptions, run_sibling
from vvupipe.errors import VvupipeError
options = json.loads(sys.argv[1])
for name in ("socket_path", "copy_out", "copy_in"):
    if options.get(name):
        options[name] = pathlib.Path(options[name])
try:
    sys.exit(asyncio.run(run_sibling(SiblingOptions(**options))))
except VvupipeError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(99)
"""


def spawn(socket, **options):
    """The sibling as a process of its own."""
    fields = {"socket_path": str(socket), "timeout_s": 20.0, **options}
    return subprocess.Popen(
        [sys.executable, "-c", _ENTRY, json.dumps(fields)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def children(pid):
    """Process ids of the vCPUs of a sibling."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if "vcpu_process" in line]


def wait_for(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def gone(pid):
    """Whether a process has ended (a zombie that nobody reaped counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
