"""Workloads on the embedded sibling's disk: what is asked for, checked against the disk, run, and measured."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.driver_layout import RANDOM, SEQUENTIAL
from kernels.virtio_layout import BLK_T_IN, BLK_T_OUT, SECTOR_BYTES
from vvupipe.errors import TransportError, UserError
from vvupipe.units import human_bytes
from vvupipe.vm.latency_report import Latency
from vvupipe.vm.sibling_disk import SiblingDisk
from vvupipe.vm.vcpu import Counters

#: name: (order, share of reads; None: --rwmixread)
PATTERNS: dict[str, tuple[int, float | None]] = {
    "randread": (RANDOM, 1.0),
    "randwrite": (RANDOM, 0.0),
    "randrw": (RANDOM, None),
    "read": (SEQUENTIAL, 1.0),
    "write": (SEQUENTIAL, 0.0),
    "rw": (SEQUENTIAL, None),
}
VERIFY = "verify"
WORKLOADS = (*PATTERNS, VERIFY)

_BS_MAX = 1 << 31  # a descriptor's length has 32 bits, and a whole chain at most 2^32 bytes (virtio 1.2, 2.7.5)
_PROGRESS_S = 1.0
_STALL_S = 10.0  # nothing came back for that long: worth a line
_DRAIN_S = 30.0  # how long the last requests may take once the runtime is over
_INTERRUPT_S = 5.0  # the same after an interrupt


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to do, in fio's words. Sizes in bytes; `size_bytes` None: the whole disk; `rwmixread` in percent.

    With a runtime it runs that long; without, until as much was moved as the range is large (verify: one pass).
    """

    workload: str
    bs: int = 4096
    iodepth: int = 32
    runtime_s: float | None = None
    size_bytes: int | None = None
    numjobs: int = 1
    rwmixread: int = 50

    @property
    def writes(self) -> bool:
        """Whether it changes the disk."""
        return self.workload == VERIFY or PATTERNS[self.workload][1] != 1.0

    def check(self) -> None:
        """Raises: UserError on what no disk could do."""
        if self.workload not in WORKLOADS:
            raise UserError(f"--workload {self.workload}: use one of {', '.join(WORKLOADS)}")
        for name, value in (("bs", self.bs), ("iodepth", self.iodepth), ("numjobs", self.numjobs)):
            if value < 1:
                raise UserError(f"--{name} {value}: use a number above 0")
        if self.size_bytes is not None and self.size_bytes < 1:
            raise UserError(f"--size {self.size_bytes}: use a size above 0, or leave it out for the whole disk")
        if not 0 <= self.rwmixread <= 100:
            raise UserError(f"--rwmixread {self.rwmixread}: use a percentage from 0 to 100")
        if self.runtime_s is not None and self.runtime_s <= 0:
            raise UserError(f"--runtime {self.runtime_s:g}: use a time above 0")


@dataclass(frozen=True, slots=True)
class DirectionResult:
    """What was measured of the reads, or of the writes."""

    requests: int
    bytes: int
    iops: float
    bytes_per_s: float
    latency: Latency


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """What came out of a workload."""

    spec: WorkloadSpec
    range_bytes: int
    duration_s: float
    reads: DirectionResult
    writes: DirectionResult
    flushes: int
    errors: int
    first_error: str | None
    verified_blocks: int
    mismatches: int
    first_mismatch_bytes: int | None
    passes: int
    unfinished: int  #: requests that had not come back when it was given up
    interrupted: bool
    kicks: int
    calls: int
    sleeps: int

    @property
    def requests(self) -> int:
        """Reads and writes."""
        return self.reads.requests + self.writes.requests

    @property
    def iops(self) -> float:
        """Reads and writes in a second."""
        return self.reads.iops + self.writes.iops

    @property
    def ok(self) -> bool:
        """Whether every request succeeded and every block held what was written."""
        return not (self.errors or self.mismatches or self.unfinished)


def check_against_disk(spec: WorkloadSpec, disk: SiblingDisk) -> int:
    """Bytes of the disk that the workload uses. Raises: UserError when disk, queue or RAM do not allow it."""
    facts = disk.facts
    if spec.writes and facts.read_only:
        raise UserError(f"--workload {spec.workload} writes and the disk is read-only")
    if spec.bs % facts.sector_bytes:
        raise UserError(f"--bs {spec.bs}: use a multiple of the disk's sector size, {facts.sector_bytes} bytes")
    if facts.request_bytes_max and spec.bs > facts.request_bytes_max:
        raise UserError(f"--bs {spec.bs}: the disk takes at most {facts.request_bytes_max} bytes in a request")
    if spec.bs > _BS_MAX:
        raise UserError(f"--bs {spec.bs}: a request moves at most {human_bytes(_BS_MAX)}")
    if spec.iodepth > disk.depth_max:
        raise UserError(
            f"--iodepth {spec.iodepth}: a queue of {disk.layout.queue_size} entries takes {disk.depth_max} requests; "
            "use a larger --queue-size"
        )
    if spec.bs * spec.iodepth > disk.layout.vrings[0].data_bytes:
        raise UserError(
            f"--bs {human_bytes(spec.bs)} x --iodepth {spec.iodepth} x --numjobs {spec.numjobs} does not fit in "
            f"{human_bytes(disk.layout.mem_bytes)} of RAM: use a larger --mem"
        )
    wanted = facts.size_bytes if spec.size_bytes is None else spec.size_bytes
    if wanted > facts.size_bytes:
        raise UserError(f"--size {human_bytes(wanted)}: the disk has {human_bytes(facts.size_bytes)}")
    if wanted // spec.bs < (1 if _shared_range(spec) else spec.numjobs):
        raise UserError(f"{human_bytes(wanted)} of disk is less than one block of --bs {spec.bs} for each job")
    return wanted // spec.bs * spec.bs


def _shared_range(spec: WorkloadSpec) -> bool:
    """Random jobs all use the whole range; sequential ones and verify have a part of it each."""
    return spec.workload != VERIFY and PATTERNS[spec.workload][0] == RANDOM


async def run_workload(
    disk: SiblingDisk,
    spec: WorkloadSpec,
    *,
    stop: asyncio.Event | None = None,
    progress: Callable[[float, int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> WorkloadResult:
    """Run `spec` on an open disk.

    stop: ends the workload early when set. progress: called each second with seconds, requests and bytes so far.
    Raises: UserError; TransportError, ProtocolError, WorkerError as SiblingDisk.run_jobs.
    """
    spec.check()
    range_bytes = check_against_disk(spec, disk)
    vcpus = disk.vcpus[: spec.numjobs]
    seed = secrets.randbits(64)
    running = asyncio.create_task(
        disk.run_jobs([(vcpu, _job(disk, spec, range_bytes, vcpu.index, seed), []) for vcpu in vcpus])
    )
    watching = asyncio.create_task(_watch(disk, spec, progress, say))
    stopping = asyncio.create_task(stop.wait()) if stop else None
    unfinished = 0
    try:
        waited: set[asyncio.Task[Any]] = {running, *((stopping,) if stopping else ())}
        limit_s = None if spec.runtime_s is None or spec.workload == VERIFY else spec.runtime_s + _DRAIN_S
        await asyncio.wait(waited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await disk.stop_jobs()
            await asyncio.wait({running}, timeout=_INTERRUPT_S if stopping and stopping.done() else 0)
        if running.done():
            running.result()
        else:
            unfinished = sum(vcpu.counters().record["in_flight"] for vcpu in vcpus)
    finally:
        for task in (running, watching, stopping):
            if task and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    return _result(
        spec,
        range_bytes,
        [vcpu.counters() for vcpu in vcpus],
        unfinished=unfinished,
        interrupted=bool(stop and stop.is_set()),
    )


def _job(disk: SiblingDisk, spec: WorkloadSpec, range_bytes: int, index: int, seed: int) -> dict[str, Any]:
    """Fields of the `job` command of one vCPU."""
    place = disk.layout.vrings[index]
    blocks = range_bytes // spec.bs
    first = 0
    if not _shared_range(spec):
        first = blocks * index // spec.numjobs
        blocks = blocks * (index + 1) // spec.numjobs - first
    job: dict[str, Any] = {
        "runtime_ns": max(1, int(spec.runtime_s * 1e9)) if spec.runtime_s else 0,
        "first_sector": first * spec.bs // SECTOR_BYTES,
        "blocks": blocks,
        "block_bytes": spec.bs,
        "block_sectors": spec.bs // SECTOR_BYTES,
    }
    if spec.workload == VERIFY:
        job |= {"seed": seed, "can_flush": int(disk.facts.can_flush)}
    else:
        order, share = PATTERNS[spec.workload]
        share = spec.rwmixread / 100 if share is None else share
        only = BLK_T_IN if share == 1.0 else BLK_T_OUT if share == 0.0 else -1
        job |= {
            "order": order,
            "only": only,
            "read_share": min(int(share * 2**64), 2**64 - 1),
            "random": (seed + index * 0x9E3779B97F4A7C15) % 2**64,
            "limit": 0 if spec.runtime_s else max(1, blocks // (spec.numjobs if _shared_range(spec) else 1)),
        }
    return {
        "kernel": VERIFY if spec.workload == VERIFY else "workload",
        "depth": spec.iodepth,
        "tags_gpa": place.tags_gpa,
        "data_gpa": place.data_gpa,
        "stride_bytes": spec.bs,
        "length_bytes": spec.bs,
        "job": job,
    }


async def _watch(
    disk: SiblingDisk,
    spec: WorkloadSpec,
    progress: Callable[[float, int, int], None] | None,
    say: Callable[[str], None],
) -> None:
    """Report progress, and say once when nothing comes back any more."""
    loop = asyncio.get_running_loop()
    began = moved = loop.time()
    before = -1
    told = False
    while True:
        await asyncio.sleep(_PROGRESS_S)
        each = [vcpu.counters() for vcpu in disk.vcpus[: spec.numjobs]]
        requests = sum(counters.requests for counters in each)
        if requests != before:
            before, moved, told = requests, loop.time(), False
        elif loop.time() - moved > _STALL_S and not told:
            told = True
            say(f"no request came back for {_STALL_S:.0f} s")
        if progress:
            progress(
                loop.time() - began, requests, sum(part["bytes"] for counters in each for part in counters.directions)
            )


def _result(
    spec: WorkloadSpec, range_bytes: int, each: list[Counters], *, unfinished: int, interrupted: bool
) -> WorkloadResult:
    def total(name: str) -> int:
        return sum(counters.record[name] for counters in each)

    started = [counters.record["started_ns"] for counters in each if counters.record["started_ns"]]
    ended = [counters.record["ended_ns"] for counters in each if counters.record["ended_ns"]]
    duration_s = max(max(ended, default=0) - min(started, default=0), 1) / 1e9 if ended else 0.0
    first_error = next((_error_text(counters) for counters in each if counters.record["errors"]), None)
    first_mismatch = min(
        (counters.record["first_mismatch_bytes"] for counters in each if counters.record["mismatches"]), default=None
    )
    return WorkloadResult(
        spec=spec,
        range_bytes=range_bytes,
        duration_s=duration_s,
        reads=_direction(each, 0, duration_s),
        writes=_direction(each, 1, duration_s),
        flushes=total("flushes"),
        errors=total("errors"),
        first_error=first_error,
        verified_blocks=total("verified_blocks"),
        mismatches=total("mismatches"),
        first_mismatch_bytes=first_mismatch,
        passes=min((counters.record["passes"] for counters in each), default=0),
        unfinished=unfinished,
        interrupted=interrupted,
        kicks=total("kicks"),
        calls=total("calls"),
        sleeps=total("sleeps"),
    )


_KINDS = {BLK_T_IN: "read", BLK_T_OUT: "write", 4: "flush"}
_STATUSES = {1: "I/O error", 2: "unsupported"}


def _error_text(counters: Counters) -> str:
    """ "read of sector 8: I/O error"."""
    record = counters.record
    status = record["first_error_status"]
    kind = _KINDS.get(record["first_error_kind"], "request")
    return f"{kind} of sector {record['first_error_sector']}: {_STATUSES.get(status, f'status {status}')}"


def _direction(each: list[Counters], index: int, duration_s: float) -> DirectionResult:
    parts = [counters.directions[index] for counters in each]
    requests = sum(part["requests"] for part in parts)
    moved = sum(part["bytes"] for part in parts)
    busy = [part for part in parts if part["requests"]]
    counts = np.sum([counters.histograms[index] for counters in each], axis=0)
    latency = Latency(
        [int(count) for count in counts],
        sum(part["latency_sum_ns"] for part in parts),
        min((part["latency_min_ns"] for part in busy), default=0),
        max((part["latency_max_ns"] for part in busy), default=0),
    )
    per_s = 1 / duration_s if duration_s else 0.0
    return DirectionResult(requests, moved, requests * per_s, moved * per_s, latency)


def require_ok(counters: Counters, what: str) -> None:
    """Raises: TransportError when a transfer had an error."""
    if counters.record["errors"]:
        raise TransportError(f"{what} failed: {_error_text(counters)}")
