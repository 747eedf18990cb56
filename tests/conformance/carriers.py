"""Back-ends to run the suite on: the same `vvupipe device block`, on each transport. A new transport is one entry."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PCI_ADDRESS = "0000:00:10.0"


class Backend:
    """A running `vvupipe device block`; `socket` is where front-ends connect."""

    def __init__(self, process, path, log_path):
        self.process, self.socket, self._log_path = process, path, log_path

    def log(self):
        return self._log_path.read_text()

    def worker_pids(self):
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "block.worker" in " ".join(child.cmdline())]


def start(arguments, log_path, environment, pass_fds=(), program=("-m", "vvupipe")):
    """Start a vvupipe command, wait for its first line of JSON, and give (process, that line)."""
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            pass_fds=pass_fds,
            text=True,
        )
    line = process.stdout.readline()
    if not line:
        process.wait(10)
        raise AssertionError(f"{arguments} ended with {process.returncode}: {log_path.read_text()}")
    return process, json.loads(line)


def stop(process):
    """End a process as its user would; it must do so by itself."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()


@contextlib.contextmanager
def on_socket(folder, image, *options):
    path = folder / "blk.sock"
    process, _ = start(
        ["device", "block", "--file", image, "--socket", path, "--json", "-v", *options],
        folder / "backend.log",
        dict(os.environ),
    )
    try:
        yield Backend(process, path, folder / "backend.log")
    finally:
        stop(process)
    assert not path.exists()


@contextlib.contextmanager
def on_inherited_socket(folder, image, *options):
    path = folder / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        process, _ = start(
            ["device", "block", "--file", image, "--fd", listening.fileno(), "--json", "-v", *options],
            folder / "backend.log",
            dict(os.environ),
            [listening.fileno()],
        )
    try:
        yield Backend(process, path, folder / "backend.log")
    finally:
        stop(process)


@contextlib.contextmanager
def on_vvu(folder, image, *options):
    path = folder / "vvu.sock"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    vm, _ = start(
        ["run", "--vvu-proxy", f"{path},addr={PCI_ADDRESS}", "--name", "dev", "--json", "-v"],
        folder / "vm.log",
        environment,
    )
    try:
        process, _ = start(
            ["device", "block", "--file", image, "--vfio", PCI_ADDRESS, "--vm", "dev", "--json", "-v", *options],
            folder / "backend.log",
            environment,
        )
        try:
            yield Backend(process, path, folder / "backend.log")
        finally:
            stop(process)
    finally:
        stop(vm)
    assert not path.exists()


@contextlib.contextmanager
def on_ivshmem(folder, image, *options):
    """The carrier of real VMs, its PCI device mocked: everything but QEMU itself."""
    path, devices = folder / "vvu.sock", folder / "devices"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "tests", ROOT]))}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vm, _ = start(
            [path, devices, ours.fileno()],
            folder / "vm.log",
            environment,
            [ours.fileno()],
            [HERE / "ivshmem_vm.py"],
        )
        try:
            process, _ = start(
                [
                    theirs.fileno(),
                    devices,
                    "device",
                    "block",
                    "--file",
                    image,
                    "--vfio",
                    PCI_ADDRESS,
                    "--json",
                    "-v",
                    *options,
                ],
                folder / "backend.log",
                environment,
                [theirs.fileno()],
                [HERE / "ivshmem_backend.py"],
            )
            try:
                yield Backend(process, path, folder / "backend.log")
            finally:
                stop(process)
        finally:
            stop(vm)
    assert not path.exists()


CARRIERS = {"socket": on_socket, "fd": on_inherited_socket, "vvu": on_vvu, "ivshmem": on_ivshmem}
