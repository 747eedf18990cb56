"""The back-ends that are compared: how each is started on an image, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.processes import running, wait_for_answer, wait_for_line

PCI_ADDRESS = "0000:00:10.0"
VVUPIPE = [sys.executable, "-P", "-m", "vvupipe"]
QSD = "qemu-storage-daemon"
ENGINES = ("auto", "mmap", "uring", "sync")
AIO = ("threads", "native", "io_uring")
QUEUES = 4
_START_S = 300.0  # the first start compiles kernels


@dataclass(frozen=True)
class Running:
    """A back-end at work: where front-ends connect, its processes, how long it took to answer."""

    socket: Path
    pids: tuple[int, ...]  #: of the back-end, then of the VM that it is in
    start_s: float


@dataclass(frozen=True)
class Backend:
    """One way to serve an image. family: "vvupipe" or "qsd". engine: None is vvupipe's only one, before --engine."""

    family: str
    transport: str
    engine: str | None

    @property
    def name(self) -> str:
        """For tables."""
        return " ".join(part for part in (self.family, self.transport, self.engine) if part)

    @property
    def is_ours(self) -> bool:
        """Whether it is vvupipe as a user has it who says nothing of engines."""
        return self.family == "vvupipe" and self.engine in (None, "auto")

    def command(self, image: Path, socket: Path, cpu: int, *, direct: bool, queues: int = QUEUES) -> list[str]:
        """The command line of the back-end itself."""
        if self.family == "qsd":
            cache = "cache.direct=on" if direct else "cache.direct=off"
            return [
                *("taskset", "--cpu-list", str(cpu), QSD, "--object", "iothread,id=io"),
                "--blockdev",
                f"driver=file,node-name=disk,filename={image},locking=off,aio={self.engine},{cache}",
                "--export",
                f"type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,num-queues={queues},"
                f"addr.type=unix,addr.path={socket}",
            ]
        where = ["--socket", str(socket)] if self.transport == "socket" else ["--vfio", PCI_ADDRESS]
        engine = ["--engine", self.engine] if self.engine else []
        return [
            *(*VVUPIPE, "device", "block", "--file", str(image), *where, *engine, "--no-lock", "--cpus", str(cpu)),
            *("--num-queues", str(queues), "--json", *(["--direct"] if direct else [])),
        ]

    @contextlib.contextmanager
    def start(
        self, folder: Path, image: Path, cpu: int, *, direct: bool = False, queues: int = QUEUES
    ) -> Iterator[Running]:
        """Serve `image` on `cpu` until the block ends; `folder` is the back-end's own. Raises: Unavailable."""
        folder.mkdir()
        socket = folder / "socket"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        with contextlib.ExitStack() as stack:
            vm: list[int] = []
            if self.transport == "vfio":
                log = folder / "vm.log"
                arguments = ["run", "--vvu-proxy", f"{socket},addr={PCI_ADDRESS}", "--cpus", str(cpu), "--json"]
                process = stack.enter_context(running([*VVUPIPE, *arguments], environment, log))
                wait_for_line(process, log, "\n", _START_S)
                vm.append(process.pid)
            log = folder / "back-end.log"
            began = time.monotonic()
            command = self.command(image, socket, cpu, direct=direct, queues=queues)
            process = stack.enter_context(running(command, environment, log))
            wait_for_answer(socket, process, log, _START_S)
            yield Running(socket, (process.pid, *vm), time.monotonic() - began)


@functools.cache
def has_engines() -> bool:
    """Whether this vvupipe knows `device block --engine`."""
    done = subprocess.run([*VVUPIPE, "device", "block", "--help"], capture_output=True, text=True, check=True)
    return "--engine" in done.stdout


def known(engines: Sequence[str] = ENGINES) -> list[Backend]:
    """Every back-end that can be asked for; of vvupipe those with `engines`."""
    ours: Sequence[str | None] = engines if has_engines() else (None,)
    found = [Backend("vvupipe", transport, engine) for transport in ("socket", "vfio") for engine in ours]
    if shutil.which(QSD) and shutil.which("taskset"):
        found += [Backend("qsd", "", aio) for aio in AIO]
    return found


def can_serve(backend: Backend, *, direct: bool) -> bool:
    """Whether it makes sense at all: QEMU's aio=native needs O_DIRECT, and a mapping is the page cache."""
    if backend.engine == "native":
        return direct
    return not (direct and backend.engine == "mmap")
