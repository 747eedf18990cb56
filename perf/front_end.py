"""The front-end of every measurement: vvupipe's embedded sibling, as `vvupipe run --workload` has it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from perf.cases import Case
from perf.processes import cpu_seconds, tree
from vvupipe.vm.sibling import SiblingOptions, open_disk
from vvupipe.vm.sibling_report import workload_dict
from vvupipe.vm.sibling_workload import WorkloadSpec, run_workload

WARM_UP_S = 0.1
_CONNECT_S = 30.0


def options_of(case: Case, socket: Path, cpu: int) -> SiblingOptions:
    """The sibling's options."""
    return SiblingOptions(
        socket,
        cpus=[cpu],
        timeout_s=_CONNECT_S,
        workload=case.workload,
        numjobs=case.queues,
        spin_max_ns=case.spin_us * 1000,
    )


def measure(case: Case, socket: Path, pids: tuple[int, ...], seconds: float, cpu: int) -> dict[str, Any]:
    """One measurement: what the front-end saw, and the CPU time that the processes of `pids` used for it.

    Keys: iops, bytes_per_s, cpu_s (of the back-end), cpu_us_per_request, result (as --json of `vvupipe run`).
    """
    return asyncio.run(_measure(case, socket, pids, seconds, cpu))


async def _measure(case: Case, socket: Path, pids: tuple[int, ...], seconds: float, cpu: int) -> dict[str, Any]:
    spec = WorkloadSpec(
        case.workload, case.block_bytes, case.depth, WARM_UP_S, None, case.queues, rwmixread=_READ_PERCENT
    )
    async with open_disk(options_of(case, socket, cpu), say=lambda line: None) as disk:
        await run_workload(disk, spec)
        processes = tree(pids)
        before = cpu_seconds(processes)
        result = await run_workload(disk, replace(spec, runtime_s=seconds))
        used = cpu_seconds(processes) - before
    if not result.ok:
        raise SystemExit(f"{case.name}: {result.errors} requests failed, the first: {result.first_error}")
    return {
        "iops": result.iops,
        "bytes_per_s": result.reads.bytes_per_s + result.writes.bytes_per_s,
        "cpu_s": used,
        "cpu_us_per_request": used * 1e6 / max(1, result.requests),
        "result": workload_dict(result),
    }


_READ_PERCENT = 70
