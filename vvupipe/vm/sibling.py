"""The embedded sibling VM: finds its disk on a vhost-user socket, tells what is on it, and does work on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vvupipe.ending_signals import ending_signals
from vvupipe.errors import UserError, VvupipeError
from vvupipe.memory.huge_pages import pages_text
from vvupipe.units import human_bytes
from vvupipe.vm import sibling_report
from vvupipe.vm.sibling_copy import check_copy_in, check_copy_out, copy_in, copy_out, look_at, sha256_of_disk
from vvupipe.vm.sibling_disk import SiblingDisk
from vvupipe.vm.sibling_workload import (
    WorkloadResult,
    WorkloadSpec,
    check_against_disk,
    run_workload,
)
from vvupipe.vm.vcpu import SPIN_MAX_NS

__all__ = ["SiblingOptions", "WorkloadResult", "WorkloadSpec", "open_disk", "run_sibling", "run_workload"]

_QUEUE_SIZE_MAX = 1024  # what QEMU and libvhost-user allow
_MEM_MIB_MAX = 1 << 20
_SIGNALLED = 128  # exit status of a program that a signal ended: 128 + its number
_FAILED = 1
_WORK = {"workload", "copy_in", "copy_out"}  # keys of what was found
_STUCK = -1  # requests did not come back: the disk cannot be used for more


@dataclass(frozen=True, slots=True)
class SiblingOptions:
    """What the user asked for. Sizes in bytes; `cpus` None: the allowed ones, from the last one downwards.

    spin_max_ns: longest time that the driver spins before it sleeps; 0 never spins.
    hugepages: the RAM is in huge pages.
    """

    socket_path: Path
    mem_mib: int = 128
    cpus: list[int] | None = None
    timeout_s: float | None = None
    name: str | None = None
    json: bool = False
    workload: str | None = None
    bs: int = 4096
    iodepth: int = 32
    runtime_s: float | None = None
    size: int | None = None
    numjobs: int = 1
    rwmixread: int = 50
    spin_max_ns: int = SPIN_MAX_NS
    copy_out: Path | None = None
    copy_in: Path | None = None
    sha256: bool = False
    queue_size: int = 256
    hugepages: bool = False

    @property
    def spec(self) -> WorkloadSpec | None:
        """The workload, if one is wanted."""
        if self.workload is None:
            return None
        return WorkloadSpec(
            self.workload, self.bs, self.iodepth, self.runtime_s, self.size, self.numjobs, self.rwmixread
        )

    def check(self) -> None:
        """Raises: UserError on what cannot be, whatever the disk."""
        if self.mem_mib < 1:
            raise UserError(f"--mem {self.mem_mib}: use a number of MiB above 0")
        if self.mem_mib > _MEM_MIB_MAX:
            raise UserError(f"--mem {self.mem_mib}: use at most {_MEM_MIB_MAX} MiB")
        if not 4 <= self.queue_size <= _QUEUE_SIZE_MAX or self.queue_size & (self.queue_size - 1):
            raise UserError(f"--queue-size {self.queue_size}: use a power of two from 4 to {_QUEUE_SIZE_MAX}")
        if self.spec:
            self.spec.check()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def open_disk(options: SiblingOptions, say: Callable[[str], None] = _say) -> AsyncIterator[SiblingDisk]:
    """The sibling's disk, connected, its vCPUs running. Raises: UserError, ProtocolError, WorkerError."""
    options.check()
    cpus = options.cpus or sorted(os.sched_getaffinity(0), reverse=True)
    disk = SiblingDisk(
        options.socket_path,
        mem_bytes=options.mem_mib << 20,
        cpus=cpus,
        num_vrings=options.numjobs if options.workload else 1,
        queue_size=options.queue_size,
        timeout_s=options.timeout_s,
        spin_max_ns=options.spin_max_ns,
        hugepages=options.hugepages,
        say=say,
    )
    try:
        await disk.open()
        yield disk
    finally:
        await disk.close()


async def run_sibling(options: SiblingOptions) -> int:
    """Run the embedded sibling to the end of its work. Returns the exit status: 0, 1 for errors or mismatches.

    SIGINT ends a workload early, what was measured is still printed, and the status is 130; anything else, and a second
    signal, ends at once (SIGTERM: 143). Must run in the main thread.
    Raises: UserError; TransportError, ProtocolError, WorkerError when the disk is lost.
    """
    sibling = _Sibling(options)
    work = asyncio.create_task(sibling.run())
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if number == signal.SIGINT and len(received) == 1 and sibling.measuring:
            sibling.interrupt.set()
        else:
            work.cancel()

    with _handled(on_signal):
        try:
            status = await work
        except asyncio.CancelledError:
            if not received:
                raise
            status = 0
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
    return _SIGNALLED + received[0] if received else status


@contextlib.contextmanager
def _handled(on_signal: Callable[[int], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = ending_signals()
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Sibling:
    """One run: disk, workload, copies, in this order, each printed when it is done."""

    def __init__(self, options: SiblingOptions) -> None:
        self._options = options
        self._found: dict[str, Any] = {}
        self.interrupt = asyncio.Event()
        self.measuring = False

    async def run(self) -> int:
        options = self._options
        status = 0
        try:
            async with open_disk(options) as disk:
                self._check_work(disk)
                await self._describe(disk)
                if options.spec:
                    status = await self._measure(disk, options.spec)
                if status != _STUCK and not self.interrupt.is_set():
                    await self._copy(disk)
                self._found["reconnects"] = disk.reconnects
        except VvupipeError as error:
            # What was measured before is not lost with it.
            self._found["error"] = str(error)
            self._print_found(if_worked=True)
            raise
        self._print_found(if_worked=False)
        return _FAILED if status == _STUCK else status

    def _print_found(self, *, if_worked: bool) -> None:
        """For --json. if_worked: only when a part of the work was done."""
        if self._options.json and (not if_worked or _WORK & self._found.keys()):
            print(json.dumps(self._found), flush=True)

    def _check_work(self, disk: SiblingDisk) -> None:
        """Refuse all that cannot be done before anything is done."""
        if self._options.spec:
            check_against_disk(self._options.spec, disk)
        if self._options.copy_in:
            os.close(check_copy_in(disk, self._options.copy_in))
        if self._options.copy_out:
            check_copy_out(self._options.copy_out)

    def _tell(self, text: str) -> None:
        if not self._options.json:
            print(text, flush=True)

    async def _describe(self, disk: SiblingDisk) -> None:
        serial = await disk.get_serial()
        contents = await look_at(disk)
        if self._options.name:
            self._found["name"] = self._options.name
        self._found["ram"] = {"size_bytes": self._options.mem_mib << 20, "pages": pages_text(disk.pages)}
        self._found["disk"] = sibling_report.disk_dict(disk.facts, serial, contents)
        if disk.pages:
            self._tell(f"{self._options.mem_mib} MiB of RAM in {disk.pages}")
        self._tell(sibling_report.disk_text(disk.facts, serial, contents))

    async def _measure(self, disk: SiblingDisk, spec: WorkloadSpec) -> int:
        line = _ProgressLine() if sys.stderr.isatty() else None
        self.measuring = True
        try:
            result = await run_workload(disk, spec, stop=self.interrupt, progress=line.show if line else None, say=_say)
        finally:
            self.measuring = False
            if line:
                line.clear()
        self._found["workload"] = sibling_report.workload_dict(result)
        self._tell(sibling_report.workload_text(result))
        if result.unfinished:
            return _STUCK
        return 0 if result.ok else _FAILED

    async def _copy(self, disk: SiblingDisk) -> None:
        options = self._options
        if options.copy_in:
            with _progress_bar(f"copy-in {options.copy_in}", disk) as (progress, started):
                digest = await copy_in(disk, options.copy_in, progress)
            self._copied("copy_in", f"copied in {options.copy_in}", digest, disk, started)
        if options.copy_out:
            with _progress_bar(f"copy-out {options.copy_out}", disk) as (progress, started):
                digest = await copy_out(disk, options.copy_out, progress)
            self._copied("copy_out", f"copied out {options.copy_out}", digest, disk, started)
        if options.sha256:
            with _progress_bar("sha256", disk) as (progress, started):
                digest = await sha256_of_disk(disk, progress)
            self._found["sha256"] = digest
            self._tell(f"sha256 {digest}  /dev/vda")

    def _copied(self, key: str, what: str, digest: str, disk: SiblingDisk, started: float) -> None:
        seconds = max(time.monotonic() - started, 1e-6)
        size_bytes = disk.facts.size_bytes
        path = getattr(self._options, key)
        self._found[key] = {"file": str(path), "bytes": size_bytes, "seconds": round(seconds, 3), "sha256": digest}
        self._tell(f"{what}: {human_bytes(size_bytes)} in {seconds:.2f} s, {human_bytes(size_bytes / seconds)}/s")
        self._tell(f"sha256 {digest}  {path}")


class _ProgressLine:
    """IOPS of the last second, on one line of the terminal."""

    def __init__(self) -> None:
        self._before = (0.0, 0, 0)

    def show(self, seconds: float, requests: int, moved_bytes: int) -> None:
        before_s, before_requests, before_bytes = self._before
        self._before = (seconds, requests, moved_bytes)
        span = max(seconds - before_s, 1e-3)
        rate = (requests - before_requests) / span
        text = f"{seconds:5.0f} s  {rate:12,.0f} IOPS  {human_bytes((moved_bytes - before_bytes) // span)}/s"
        click.echo(f"\r{text:<60}", err=True, nl=False)

    def clear(self) -> None:
        click.echo(f"\r{'':<60}\r", err=True, nl=False)


@contextlib.contextmanager
def _progress_bar(label: str, disk: SiblingDisk) -> Iterator[tuple[Callable[[int], None], float]]:
    """(what to call with the bytes moved, when it began); a bar on standard error if that is a terminal."""
    started = time.monotonic()
    if not sys.stderr.isatty():
        yield (lambda moved: None), started
        return
    with click.progressbar(length=disk.facts.size_bytes, label=label, file=sys.stderr) as bar:
        yield bar.update, started
