#!/usr/bin/env python3
"""The report of a comparison: targets, plots, all medians. Makes it anew from a folder's results.jsonl."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perf import command_line
from perf.summary import Results, goals
from vvupipe.errors import UserError


def load(folder: Path) -> Results:
    """The results in a folder. Raises: UserError when there are none, or another program's."""
    return Results(command_line.results_of(folder, key="kind"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _about(results: Results) -> str:
    first = results.records[0]
    rounds = 1 + max((record["round"] for record in results.measured), default=-1)
    loads = [record["load_1min"] for record in results.records]
    return "\n".join(
        [
            f"- {first['cpu']}, {first['cpus']} CPUs, Linux {first['kernel']}",
            f"- vvupipe {first['commit']}, Python {first['python']}, numba {first['numba']}",
            f"- {first['qemu'] or 'no qemu-storage-daemon'}",
            f"- the front-end on CPU {first['front_end_cpu']}, back-ends on CPU {first['back_end_cpu']}",
            f"- interleaved rounds: {rounds}, of {first['seconds']:g} s; image of {first['image_mib']} MiB",
            f"- {first['time']}",
            f"- load average during the run: {min(loads):g} to {max(loads):g} (about 2 comes from the run itself)",
        ]
    )


def _goals(results: Results) -> str:
    marks = {True: "yes", False: "**no**", None: "-"}
    rows = [
        (goal.what, goal.target, goal.measured, goal.copies, goal.reading, marks[goal.met]) for goal in goals(results)
    ]
    return table(("what", "target", "measured (lowest - highest)", "copies alone", "reading alone", "met"), rows)


def _idle(results: Results) -> str:
    rows = []
    for name in dict.fromkeys(record["backend"] for record in results.idle):
        records = [record for record in results.idle if record["backend"] == name]

        def median(values: Iterable[float]) -> float:
            return statistics.median(values)

        workers = [row for record in records for row in record["memory"] if ".worker" in row["command"]]
        worker = f"{median(row['uss'] for row in workers) / 2**20:.0f} MiB" if workers else "-"
        rows.append(
            (
                name,
                f"{median(record['idle_percent'] for record in records):.3f} %",
                f"{median(record['start_s'] for record in records):.2f} s",
                f"{median(sum(row['pss'] for row in record['memory']) for record in records) / 2**20:.0f} MiB",
                worker,
            )
        )
    return table(
        ("back-end", "CPU when idle", "start to first answer", "PSS of all processes", "USS of a worker"), rows
    )


def _medians(results: Results, place: str) -> str:
    rows = []
    for case in (case for case in results.cases if case.startswith(f"{place}/")):
        for name in results.backends:
            spread = results.iops(case, name)
            if spread is None:
                continue
            records = results.of(case, name)
            cells = ["", "", ""]
            if "result" in records[0]:
                cells[0] = f"{statistics.median(record['cpu_us_per_request'] for record in records):.2f}"
                for cell, key in ((1, "p50"), (2, "p99")):
                    both = [_latency(record, key) for record in records]
                    cells[cell] = f"{statistics.median(both):.1f}"
            spreads = (spread.median, spread.low, spread.high)
            rows.append((case.partition("/")[2], name, *(f"{value:,.0f}" for value in spreads), *cells))
    head = ("case", "back-end", "requests/s", "1st quartile", "3rd quartile", "CPU us/request", "p50 us", "p99 us")
    return table(head, rows)


def _latency(record: dict, key: str) -> float:  # type: ignore[type-arg]
    """A percentile in microseconds, of reads if there are any."""
    result = record["result"]
    direction = "read" if result["read"]["requests"] else "write"
    return float(result[direction]["latency_ns"][key]) / 1e3


def write(folder: Path) -> Path:
    """Write report.md and its plots beside results.jsonl; returns its path."""
    results = load(folder)
    parts = ["# Block back-ends compared", _about(results)]
    parts += [
        "## Targets",
        _goals(results),
        "Ratios are of medians; in brackets the lowest and highest ratio of a single round. `qsd` is "
        "qemu-storage-daemon with an iothread, the fastest of its ways where no other is named. *Copies alone* is the "
        "ratio for a program that does nothing but the copies, in the faster of two ways; *reading alone* for one that "
        "only looks at every line of the image's blocks: one CPU has no more, whatever a back-end does.",
    ]
    if results.idle:
        parts += ["## Idle", _idle(results)]
    if results.skipped:
        parts += [
            "## Left out",
            "\n".join(f"- {each['place']}: {each['backend']}: {each['why']}" for each in results.skipped),
        ]
    parts += _plots(results, folder)
    for place in dict.fromkeys(case.partition("/")[0] for case in results.cases):
        parts += [f"## All medians: {place}", _medians(results, place)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _plots(results: Results, folder: Path) -> list[str]:
    try:
        from perf import plots
    except ImportError:
        return ["No plots: matplotlib is not installed (pip install '.[perf]', then perf/report.py on this folder)."]
    return ["## Plots", *(f"![{path.stem}]({path.name})" for path in plots.all_of(results, folder))]


def main() -> int:
    """Write a report anew. Returns the exit status."""
    parser = command_line.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="one of perf/results/compare-*")
    folder = parser.parse_args().folder
    try:
        print(write(folder))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    command_line.run("report", main)
