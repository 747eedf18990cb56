#!/usr/bin/env python3
"""Compare block back-ends under the same front-end: vvupipe's embedded sibling, on a CPU of its own.

Rounds are interleaved (each back-end once in each round), so that a disturbance of the machine meets all of them.
Prints medians and ratios to the first back-end, and writes every single result to perf/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import backends

ROOT = Path(__file__).resolve().parent.parent

#: name: (what, block size, depth)
WORKLOADS = {
    "4k randread QD32": ("randread", "4k", 32),
    "4k randread QD1": ("randread", "4k", 1),
    "4k randwrite QD32": ("randwrite", "4k", 32),
    "128k read QD32": ("read", "128k", 32),
}


def measure(socket: str, workload: tuple[str, str, int], seconds: float, cpu: int) -> dict[str, Any]:
    """One run of the front-end; its JSON."""
    what, block_size, depth = workload
    arguments = [
        "run", "--vhost-user-blk", socket, "--cpus", str(cpu), "--workload", what, "--bs", block_size,
        "--iodepth", str(depth), "--runtime", f"{seconds}s", "--json",
    ]  # fmt: skip
    finished = subprocess.run([*backends.VVUPIPE, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {finished.stderr}")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def fill(image: Path, size_mib: int) -> None:
    """Random data, so that no page is a hole, left in the page cache."""
    with image.open("wb") as file:
        for _ in range(size_mib):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Medians of IOPS with their spread, and the ratio to the first back-end."""
    lines = [f"{'workload':<20}{'back-end':<20}{'median IOPS':>14}{'min':>12}{'max':>12}{'ratio':>9}"]
    for workload, by_backend in results.items():
        base = statistics.median(next(iter(by_backend.values())))
        for name, values in by_backend.items():
            median = statistics.median(values)
            lines.append(
                f"{workload:<20}{name:<20}{median:>14,.0f}{min(values):>12,.0f}{max(values):>12,.0f}"
                f"{median / base:>8.2f}x"
            )
    return "\n".join(lines)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--size", type=int, default=512, metavar="MiB", help="size of the image")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the image lies; default: tmpfs")
    parser.add_argument("--only", choices=list(WORKLOADS), action="append", help="these workloads only")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise SystemExit("a comparison needs two CPUs: one for the back-end, one for the front-end")
    names = options.only or list(WORKLOADS)
    compared = backends.available()
    results: dict[str, dict[str, list[float]]] = {name: {each: [] for each in compared} for name in names}
    records = []
    with tempfile.TemporaryDirectory(prefix="vvupipe-perf-", dir=options.folder) as place:
        folder = Path(place)
        image = folder / "disk.img"
        fill(image, options.size)
        for round_number in range(options.rounds):
            for each, start in compared.items():
                with start(folder, image, cpus[0]) as socket:
                    for name in names:
                        result = measure(socket, WORKLOADS[name], options.seconds, cpus[-1])
                        iops = result_iops(result)
                        results[name][each].append(iops)
                        records.append({"round": round_number, "backend": each, "workload": name, "result": result})
                        print(f"round {round_number + 1}: {name:<20}{each:<20}{iops:>14,.0f} IOPS", file=sys.stderr)
    write_records(records)
    print(table(results))
    return 0


def result_iops(result: dict[str, Any]) -> float:
    """IOPS of all requests of one run."""
    workload = result["workload"]
    return sum(float(workload[direction]["iops"]) for direction in ("read", "write") if workload.get(direction))


def write_records(records: list[dict[str, Any]]) -> None:
    """One JSON line a measurement, with what is needed to compare it later."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = {"commit": commit, "machine": platform.platform(), "cpus": os.cpu_count(), "time": time.time()}
    folder = ROOT / "perf" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    path.write_text("".join(json.dumps({**machine, **record}) + "\n" for record in records))
    print(f"every result: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
