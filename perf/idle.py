"""A back-end with nothing to do: CPU time, memory, and how long it takes to start."""

from __future__ import annotations

import asyncio
from typing import Any

from perf.backends import Running
from perf.processes import memory, scheduled_seconds, tree
from vvupipe.vm.sibling import SiblingOptions, open_disk
from vvupipe.vm.sibling_workload import WorkloadSpec, run_workload

_SETTLE_S = 0.5


def measure(running: Running, seconds: float, cpu: int) -> dict[str, Any]:
    """One vring started, nothing in it. Keys: start_s, memory (a row for each process), idle_percent (of one CPU)."""
    return asyncio.run(_measure(running, seconds, cpu))


async def _measure(running: Running, seconds: float, cpu: int) -> dict[str, Any]:
    options = SiblingOptions(running.socket, cpus=[cpu], timeout_s=30, workload="randread")
    async with open_disk(options, say=lambda line: None) as disk:
        rows = memory(tree(running.pids))
        await run_workload(disk, WorkloadSpec("randread", runtime_s=0.2))
        await asyncio.sleep(_SETTLE_S)  # whoever spins for a while after work has ended that
        processes = tree(running.pids)
        before = scheduled_seconds(processes)
        await asyncio.sleep(seconds)
        used = scheduled_seconds(processes) - before
    return {"start_s": running.start_s, "memory": rows, "idle_percent": 100 * used / seconds}
