"""The vhost-user-blk back-ends that the guest tests run over; BACKENDS is the one place that lists them.

qemu-storage-daemon is the control: where it fails too, the test kit or the machine is at fault.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vvupipe.vm.qemu_backend import is_listening

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60  # a first start compiles kernels
PCI_ADDRESS = "0000:00:10.0"
QUEUES = 2


class Process:
    """A process in a group of its own, its output in a file; ended (SIGTERM, then SIGKILL) at the latest by `end`."""

    def __init__(self, command, log, env=None):
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self._command = command

    @property
    def pid(self):
        return self._popen.pid

    def check_alive(self):
        if self._popen.poll() is not None:
            raise AssertionError(f"{self._command} ended with {self._popen.returncode}:\n{self.log.read_text()}")

    def kill(self):
        """SIGKILL to the process alone: what it started must see to itself."""
        self._popen.kill()
        self._popen.wait(10)

    def end(self):
        """Ask, then force; the exit status (negative: the signal)."""
        self._popen.terminate()
        try:
            return self._popen.wait(10)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait(10)


@dataclass
class Backend:
    """A back-end that is up: front-ends connect to `socket`. `serving` is the process that does the I/O."""

    socket: Path
    start: Callable[[], Process]
    others: list[Process] = field(default_factory=list)
    queues: int = QUEUES

    def __post_init__(self):
        self.serving = self.start()
        try:
            wait_until(lambda: is_listening(self.socket), [self.serving, *self.others])
        except BaseException:
            self.end()
            raise

    def kill_and_restart(self):
        """kill -9 the serving process, then start a new one in its place."""
        self.serving.kill()
        time.sleep(1)
        self.serving = self.start()

    def end(self):
        """End every process, the serving one first; their exit statuses."""
        return [process.end() for process in [self.serving, *self.others]]


def wait_until(condition, processes, timeout_s=READY_S):
    """Wait for `condition()`, as long as every process lives."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        for process in processes:
            process.check_alive()
        if time.monotonic() > deadline:
            logs = "\n".join(process.log.read_text() for process in processes)
            raise AssertionError(f"not ready after {timeout_s} s:\n{logs}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Factory:
    """How to serve an image; `program` of `package` must be installed for it (None: nothing).

    tracks_inflight: INFLIGHT_SHMFD is offered, so that QEMU gives the next back-end the region of a killed one and none
    of several requests under way is lost, in whatever order they complete; without it QEMU resumes at used.idx.
    has_workers: child processes of the serving one do the I/O.
    """

    make: Callable[[Path, Path], Backend]
    program: str | None = None
    package: str | None = None
    tracks_inflight: bool = True
    has_workers: bool = True

    @contextlib.contextmanager
    def __call__(self, image, folder):
        """Serve `image` with sockets and logs in `folder`."""
        backend = self.make(image, folder)
        try:
            yield backend
        finally:
            backend.end()


def _storage_daemon(image, folder):
    socket = folder / "qsd.sock"
    monitor = socket.with_suffix(".qmp")
    command = [
        "qemu-storage-daemon",
        "--chardev",
        f"socket,id=qmp,path={monitor},server=on,wait=off",
        "--monitor",
        "chardev=qmp",
        "--blockdev",
        f"driver=file,node-name=disk,filename={image}",
        "--export",
        f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={QUEUES},"
        f"addr.type=unix,addr.path={socket}",
    ]
    return Backend(socket, lambda: Process(command, folder / "qsd.log"))


def vvupipe_command(*arguments):
    return [sys.executable, "-m", "vvupipe", *map(str, arguments)]


def vvupipe_environment(folder):
    """Run-time files of vvupipe stay in the test's folder."""
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    return {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}


def _vvupipe_socket(image, folder):
    socket = folder / "block.sock"
    command = vvupipe_command("device", "block", "--file", image, "--socket", socket, "--num-queues", QUEUES)
    return Backend(socket, lambda: Process(command, folder / "block.log", vvupipe_environment(folder)))


def _vvupipe_vvu(image, folder):
    env = vvupipe_environment(folder)
    socket = folder / "proxy.sock"
    name = "device-vm"
    device_vm = Process(
        vvupipe_command("run", "--vvu-proxy", f"{socket},addr={PCI_ADDRESS}", "--name", name),
        folder / "device-vm.log",
        env,
    )
    try:
        wait_until(lambda: is_listening(socket), [device_vm])
        command = vvupipe_command(
            "device", "block", "--vfio", PCI_ADDRESS, "--vm", name, "--file", image, "--num-queues", QUEUES
        )
        return Backend(socket, lambda: Process(command, folder / "block.log", env), [device_vm])
    except BaseException:
        device_vm.end()
        raise


BACKENDS = {
    "storage-daemon": Factory(
        _storage_daemon, "qemu-storage-daemon", "qemu-system-common", tracks_inflight=False, has_workers=False
    ),
    "vvupipe-socket": Factory(_vvupipe_socket),
    "vvupipe-vvu": Factory(_vvupipe_vvu),
}
