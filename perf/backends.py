"""The back-ends that are compared: how each is started on an image, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

PCI_ADDRESS = "0000:00:10.0"
VVUPIPE = [sys.executable, "-P", "-m", "vvupipe"]
_START_S = 300  # the first start compiles kernels

Backend = Callable[[Path, Path, int], AbstractContextManager[str]]


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with {process.wait()}")
    json.loads(line)


@contextlib.contextmanager
def vvupipe_socket(folder: Path, image: Path, cpu: int) -> Iterator[str]:
    """`vvupipe device block --socket`; gives the path that front-ends connect to."""
    socket = folder / "vvupipe.sock"
    arguments = ["device", "block", "--file", str(image), "--socket", str(socket), "--cpus", str(cpu), "--json"]
    with _running([*VVUPIPE, *arguments], dict(os.environ)) as backend:
        _wait_ready(backend)
        yield str(socket)


@contextlib.contextmanager
def vvupipe_vfio(folder: Path, image: Path, cpu: int) -> Iterator[str]:
    """The embedded device VM, and `vvupipe device block --vfio` on its VVU function."""
    socket = folder / "vvu.sock"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    vm_arguments = ["run", "--vvu-proxy", f"{socket},addr={PCI_ADDRESS}", "--cpus", str(cpu), "--json"]
    arguments = ["device", "block", "--file", str(image), "--vfio", PCI_ADDRESS, "--cpus", str(cpu), "--json"]
    with _running([*VVUPIPE, *vm_arguments], environment) as vm:
        _wait_ready(vm)
        with _running([*VVUPIPE, *arguments], environment) as backend:
            _wait_ready(backend)
            yield str(socket)


def storage_daemon(aio: str) -> Backend:
    """qemu-storage-daemon's vhost-user-blk export, with one of its ways of I/O."""

    @contextlib.contextmanager
    def start(folder: Path, image: Path, cpu: int) -> Iterator[str]:
        socket = folder / f"qsd-{aio}.sock"
        command = [
            "taskset", "--cpu-list", str(cpu), "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={image},aio={aio}",
            "--blockdev", "driver=raw,node-name=disk,file=file",
            "--export", f"type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={socket}",
        ]  # fmt: skip
        with _running(command, dict(os.environ)) as daemon:
            deadline = time.monotonic() + _START_S
            while not socket.exists():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("qemu-storage-daemon did not start")
                time.sleep(0.02)
            yield str(socket)

    return start


def available() -> dict[str, Backend]:
    """Every back-end that can run here, by name; the rival is the first, against which ratios are taken."""
    backends: dict[str, Backend] = {}
    if shutil.which("qemu-storage-daemon") and shutil.which("taskset"):
        backends["qsd threads"] = storage_daemon("threads")
    backends["vvupipe --socket"] = vvupipe_socket
    backends["vvupipe --vfio"] = vvupipe_vfio
    return backends
