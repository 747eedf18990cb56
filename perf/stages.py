#!/usr/bin/env python3
"""Where a request's time goes: the cycles of each stage of the workers of a running back-end.

The back-end must have been started with VVUPIPE_STAGES=1 in its environment: its kernels then count (and are compiled
anew the first time, for they have code that others lack). docs/profiling.md says what each stage is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.stage_layout import SLEEP, STAGES, STAGES_ENV, TAKE
from perf import command_line
from perf.live_view import Watched
from perf.plain import count
from vvupipe.errors import UserError

_BAR = 30


def read(watched: Watched) -> list[dict[str, Any]]:
    """The records as they are now, one for each worker."""
    now_ns = time.monotonic_ns()
    return [
        {
            "time_ns": now_ns,
            "hertz": int(record["hertz"]),
            "cycles": record["cycles"].tolist(),
            "laps": record["laps"].tolist(),
        }
        for record in watched.block.stages
    ]


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What a worker did between two of its records; per request None when there was none. share: of the time awake, of
    `sleep` that of all."""
    span_s = (new["time_ns"] - old["time_ns"]) / 1e9
    cycles = [b - a for a, b in zip(old["cycles"], new["cycles"], strict=True)]
    laps = [b - a for a, b in zip(old["laps"], new["laps"], strict=True)]
    total = span_s * new["hertz"]
    # A sleep counts when it ends: the first one began before the interval, the last one goes on behind it.
    cycles[SLEEP] = max(0, round(total - sum(cycles[:SLEEP])))
    requests = laps[TAKE]
    awake = sum(cycles[:SLEEP])
    stages = {
        name: {
            "laps": laps[k],
            "cycles": cycles[k],
            "share": cycles[k] / max(1, awake if k != SLEEP else awake + cycles[k]),
            "cycles_per_request": cycles[k] / requests if requests else None,
            "ns_per_request": 1e9 * cycles[k] / new["hertz"] / requests if requests else None,
        }
        for k, name in enumerate(STAGES)
    }
    return {
        "seconds": span_s,
        "hertz": new["hertz"],
        "requests": requests,
        "requests_per_s": requests / span_s,
        "stages": stages,
    }


def text(worker: int, found: dict[str, Any]) -> str:
    """A table for people."""
    sleep = found["stages"]["sleep"]
    awake = {name: stage for name, stage in found["stages"].items() if name != "sleep" and stage["laps"]}
    lines = [
        f"worker {worker}: {count(found['requests_per_s'])} requests/s, asleep for {100 * sleep['share']:.1f} % of "
        f"{found['seconds']:.1f} s, {found['hertz'] / 1e9:.3f} cycles/ns"
    ]
    if awake:
        lines.append(_line("stage", "cycles/req", "ns/req", "share", "laps/req", ""))
    for name, stage in awake.items():
        laps = stage["laps"] / found["requests"] if found["requests"] else None
        bar = "#" * round(_BAR * stage["share"])
        share = f"{100 * stage['share']:.1f} %"
        cells = (count(stage[key]) for key in ("cycles_per_request", "ns_per_request"))
        lines.append(_line(name, *cells, share, count(laps), bar))
    if found["requests"]:
        sums = (sum(stage[key] for stage in awake.values()) for key in ("cycles_per_request", "ns_per_request"))
        lines.append(_line("awake", *(count(value) for value in sums), "100 %", "", ""))
    return "\n".join(lines)


def _line(stage: str, cycles: str, ns: str, share: str, laps: str, bar: str) -> str:
    return f"  {stage:<12}{cycles:>10}{ns:>9}{share:>9}{laps:>10}  {bar}".rstrip()


def main() -> int:
    """Watch for an interval and print. Returns the exit status."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pid", type=int, help="of `vvupipe device block`, or of one of its workers")
    parser.add_argument("--interval", type=command_line.above_0, default=1.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="a JSON line instead of tables")
    options = parser.parse_args()
    watched = Watched.of(options.pid)
    if watched is None:
        raise UserError(f"process {options.pid} is no back-end, or it belongs to another user")
    if not len(watched.block.stages):
        raise UserError(f"process {options.pid} does not count stages: start it with {STAGES_ENV}=1 in its environment")
    try:
        before = read(watched)
        time.sleep(options.interval)
        after = read(watched)
    except KeyboardInterrupt:
        return 130
    if not psutil.pid_exists(options.pid):
        print(f"stages: process {options.pid} has ended", file=sys.stderr)
        return 1
    # A worker that was never started has no clock yet.
    workers = {
        index: difference(old, new) for index, (old, new) in enumerate(zip(before, after, strict=True)) if old["hertz"]
    }
    if options.json:
        print(json.dumps({"pid": options.pid, "workers": [{"worker": k, **each} for k, each in workers.items()]}))
    else:
        print("\n\n".join(text(index, each) for index, each in workers.items()) or "no worker was started yet")
    return 0


if __name__ == "__main__":
    command_line.run("stages", main)
