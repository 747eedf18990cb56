"""What the embedded sibling tells about its disk and its work: text for people, dictionaries for --json."""

from __future__ import annotations

from typing import Any

from vvupipe.units import human_bytes, human_ns
from vvupipe.vm.disk_facts import DiskFacts
from vvupipe.vm.disk_probe import DiskContents
from vvupipe.vm.latency_report import Latency
from vvupipe.vm.sibling_workload import VERIFY, DirectionResult, WorkloadResult

_LABEL_WIDTH = 12


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def disk_text(facts: DiskFacts, serial: str, contents: DiskContents) -> str:
    """What was found on /dev/vda."""
    blocks = f"{facts.sector_bytes} bytes"
    if facts.physical_block_bytes != facts.sector_bytes:
        blocks += f" (physical block {facts.physical_block_bytes} bytes)"
    names = facts.feature_names
    half = -(-len(names) // 2) if len(names) > 8 else len(names)
    return "\n".join(
        [
            "/dev/vda",
            _line("size", f"{human_bytes(facts.size_bytes)} ({facts.size_bytes} bytes)"),
            _line("sector", blocks),
            _line("access", "read-only" if facts.read_only else "read and write"),
            _line("serial", serial or "none"),
            _line("contents", contents.text),
            _line("queues", str(facts.num_queues)),
            _line("features", " ".join(names[:half])),
            *([_line("", " ".join(names[half:]))] if names[half:] else []),
            _line("vhost-user", " ".join(facts.protocol_feature_names)),
        ]
    )


def disk_dict(facts: DiskFacts, serial: str, contents: DiskContents) -> dict[str, Any]:
    """The same for programs."""
    return {
        "size_bytes": facts.size_bytes,
        "sector_bytes": facts.sector_bytes,
        "physical_block_bytes": facts.physical_block_bytes,
        "read_only": facts.read_only,
        "serial": serial,
        "queues": facts.num_queues,
        "features": facts.feature_names,
        "protocol_features": facts.protocol_feature_names,
        "file_system": contents.file_system,
        "label": contents.label,
        "uuid": contents.uuid,
        "partition_table": contents.partition_table,
        "partitions": contents.partitions,
        "contents": contents.text,
    }


def _count_per_s(rate: float) -> str:
    """ "152.3 k", "2.41 M", "87"."""
    if rate >= 1e6:
        return f"{rate / 1e6:.2f} M"
    return f"{rate / 1e3:.1f} k" if rate >= 10_000 else f"{rate:.0f}"


def _latency_line(latency: Latency) -> str:
    parts = [f"p{percent:g} {human_ns(latency.percentile_ns(percent))}" for percent in (50.0, 99.0, 99.9)]
    return ", ".join([*parts, f"max {human_ns(latency.max_ns)}", f"mean {human_ns(latency.mean_ns)}"])


def _direction_lines(name: str, part: DirectionResult) -> list[str]:
    if not part.requests:
        return []
    rate = f"{_count_per_s(part.iops)} IOPS, {part.bytes_per_s / (1 << 20):.1f} MiB/s"
    return [
        _line(name, f"{rate}  ({part.requests} requests, {human_bytes(part.bytes)})"),
        _line("  latency", _latency_line(part.latency)),
        *(f"    {row}" for row in part.latency.picture()),
    ]


def workload_text(result: WorkloadResult) -> str:
    """The summary of a workload."""
    spec = result.spec
    mix = f", {spec.rwmixread} % reads" if spec.workload in ("randrw", "rw") else ""
    jobs = f", {spec.numjobs} jobs" if spec.numjobs > 1 else ""
    lines = [
        f"{spec.workload}: {human_bytes(spec.bs)} blocks, depth {spec.iodepth}{jobs}{mix}, "
        f"{human_bytes(result.range_bytes)} of disk, {result.duration_s:.2f} s"
        + (" (interrupted)" if result.interrupted else ""),
        *_direction_lines("read", result.reads),
        *_direction_lines("write", result.writes),
    ]
    if spec.workload == VERIFY:
        verdict = "all as written" if result.mismatches == 0 else f"{_count(result.mismatches, 'MISMATCH')}"
        if result.first_mismatch_bytes is not None:
            verdict = f"{result.mismatches} DIFFERENT, the first at byte {result.first_mismatch_bytes}"
        passes = f"{result.passes} whole pass{'' if result.passes == 1 else 'es'}"
        lines.append(_line("verify", f"{_count(result.verified_blocks, 'block')} compared ({passes}): {verdict}"))
    if result.unfinished:
        lines.append(_line("unfinished", f"{_count(result.unfinished, 'request')} did not come back"))
    first = f", the first: {result.first_error}" if result.first_error else ""
    lines.append(_line("errors", f"{result.errors}{first}"))
    lines.append(_line("wake-ups", f"{result.kicks} kicks, {result.calls} calls, {result.sleeps} sleeps"))
    return "\n".join(lines)


def _direction_dict(part: DirectionResult) -> dict[str, Any]:
    return {
        "requests": part.requests,
        "bytes": part.bytes,
        "iops": round(part.iops, 1),
        "bytes_per_s": round(part.bytes_per_s),
        "latency_ns": part.latency.as_dict(),
    }


def workload_dict(result: WorkloadResult) -> dict[str, Any]:
    """The same for programs."""
    spec = result.spec
    return {
        "workload": spec.workload,
        "bs": spec.bs,
        "iodepth": spec.iodepth,
        "numjobs": spec.numjobs,
        "rwmixread": spec.rwmixread,
        "range_bytes": result.range_bytes,
        "duration_s": round(result.duration_s, 6),
        "interrupted": result.interrupted,
        "ok": result.ok,
        "read": _direction_dict(result.reads),
        "write": _direction_dict(result.writes),
        "flushes": result.flushes,
        "errors": result.errors,
        "first_error": result.first_error,
        "unfinished": result.unfinished,
        "verified_blocks": result.verified_blocks,
        "mismatches": result.mismatches,
        "first_mismatch_bytes": result.first_mismatch_bytes,
        "passes": result.passes,
        "kicks": result.kicks,
        "calls": result.calls,
        "sleeps": result.sleeps,
    }
