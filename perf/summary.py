"""From single results to medians, spreads and the ratios that issue 5 asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MEMCPY = "memcpy"
MEMCPY_AHEAD = "memcpy, fetched ahead"
READING = "reading alone"
LIMITS = (MEMCPY, MEMCPY_AHEAD, READING)
Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles and its extremes."""

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), quartiles[0], quartiles[2], min(values), max(values), len(values))


class Results:
    """Records of a comparison, found by case and back-end."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.measured = [record for record in self.records if record["kind"] == "measurement"]
        self.idle = [record for record in self.records if record["kind"] == "idle"]
        self.skipped = [record for record in self.records if record["kind"] == "skipped"]
        self.cases = list(dict.fromkeys(record["case"] for record in self.measured))
        self.backends = list(dict.fromkeys(record["backend"] for record in self.measured))
        self._by_key: dict[tuple[str, str], list[Record]] = {}
        for record in self.measured:
            self._by_key.setdefault((record["case"], record["backend"]), []).append(record)

    def of(self, case: str, backend: str) -> list[Record]:
        """Records of every round; empty when it was not measured."""
        return self._by_key.get((case, backend), [])

    def spread(self, case: str, backend: str, value: Callable[[Record], float]) -> Spread | None:
        """Spread of a figure; None when it was not measured."""
        records = self.of(case, backend)
        return Spread.of([value(record) for record in records]) if records else None

    def iops(self, case: str, backend: str) -> Spread | None:
        """Requests (memcpy: copies) a second."""
        return self.spread(case, backend, lambda record: record["iops"])

    def ours(self, transport: str) -> str | None:
        """The back-end that is vvupipe as a user has it, over `transport`."""
        for engine in ("", " auto"):
            if f"vvupipe {transport}{engine}" in self.backends:
                return f"vvupipe {transport}{engine}"
        others = [name for name in self.backends if name.startswith(f"vvupipe {transport}")]
        return others[0] if others else None

    def best_rival(self, case: str) -> str | None:
        """qemu-storage-daemon in the way that is fastest in this case."""
        found = {name: spread for name in self.backends if name.startswith("qsd") and (spread := self.iops(case, name))}
        return max(found, key=lambda name: found[name].median) if found else None

    def ratio(self, case: str, ours: str | None, other: str | None) -> Spread | None:
        """IOPS of one divided by those of the other: of the medians; the spread is that of the rounds' own ratios."""
        if ours is None or other is None:
            return None
        theirs = {record["round"]: record["iops"] for record in self.of(case, other)}
        rounds = [
            record["iops"] / theirs[record["round"]] for record in self.of(case, ours) if theirs.get(record["round"])
        ]
        mine, base = self.iops(case, ours), self.iops(case, other)
        if not rounds or mine is None or base is None:
            return None
        spread = Spread.of(rounds)
        return Spread(mine.median / base.median, spread.low, spread.high, spread.least, spread.most, spread.count)

    def limit(self, case: str, other: str | None, *ways: str) -> str:
        """What the fastest of some limits would be of another back-end; `-` where none was measured."""
        found = [ratio.median for name in ways if (ratio := self.ratio(case, name, other))]
        return f"{max(found):.2f}" if found else "-"


@dataclass(frozen=True)
class Goal:
    """A row of the table of targets. met: None when it was not measured.

    copies, reading: the ratio of a program that only copies, and of one that only looks at the blocks.
    """

    what: str
    target: str
    measured: str
    met: bool | None
    copies: str = "-"
    reading: str = "-"


def _ratio_goal(results: Results, what: str, case: str, other: str | None, least: float) -> Goal:
    ratio = results.ratio(case, results.ours("socket"), other)
    text = "not measured" if ratio is None else f"{ratio.median:.2f} ({ratio.least:.2f} - {ratio.most:.2f})"
    met = None if ratio is None else ratio.median >= least
    copies = "-" if other in LIMITS else results.limit(case, other, MEMCPY, MEMCPY_AHEAD)
    return Goal(what, f">= {least:g}", text, met, copies, results.limit(case, other, READING))


def goals(results: Results) -> list[Goal]:
    """Issue 5's "Shows", each with what was measured: vvupipe without options, over a socket, unless it says more."""
    random32 = "page-cache/4k-randread-d32"
    rows = [
        _ratio_goal(results, "4 KiB randread, depth 32, page cache: of the memcpy limit", random32, MEMCPY, 0.9),
        _ratio_goal(results, "the same: of memcpy that fetches ahead (no target)", random32, MEMCPY_AHEAD, 0),
        _ratio_goal(results, "the same: of qsd aio=threads", random32, "qsd threads", 15),
        _ratio_goal(results, "the same: of qsd aio=io_uring", random32, "qsd io_uring", 6),
    ]
    rows[1] = Goal(rows[1].what, "-", rows[1].measured, None)
    rows.insert(2, _cpu_goal(results, random32))
    sleeping = "page-cache/4k-randread-d1-sleeping"
    rival = results.best_rival(sleeping)
    rows.append(_ratio_goal(results, f"depth 1, sleeping front-end: of {rival or 'qsd'}", sleeping, rival, 1.0))
    rows.append(_polling_goal(results))
    for workload in ("read", "write"):
        case = f"page-cache/128k-{workload}-d32"
        rival = results.best_rival(case)
        rows.append(_ratio_goal(results, f"128 KiB sequential {workload}: of {rival or 'qsd'}", case, rival, 2.0))
    for work in ("4k-randread-d32", "4k-randwrite-d32", "128k-read-d32", "128k-write-d32"):
        case = f"direct/{work}"
        rival = results.best_rival(case)
        rows.append(_ratio_goal(results, f"O_DIRECT {work}: of {rival or 'qsd'}", case, rival, 1.0))
    rows.append(_transport_goal(results, random32))
    rows += _idle_goals(results)
    return rows


def _cpu_goal(results: Results, case: str) -> Goal:
    """The same limit in CPU time, which other programs on the machine disturb less than throughput."""
    ours = results.ours("socket")
    mine = ours and results.spread(case, ours, lambda record: record["cpu_us_per_request"])
    copy = results.spread(case, MEMCPY, lambda record: record["cpu_us_per_request"])
    text = f"{copy.median / mine.median:.2f}" if mine and copy and mine.median else "not measured"
    return Goal("the same: memcpy's CPU time of the back-end's for a request (no target)", "-", text, None)


def _polling_goal(results: Results) -> Goal:
    what, target = "depth 1, polling front-end: mean latency", "< 1.5 us"
    ours = results.ours("socket")
    spread = ours and results.spread(
        "page-cache/4k-randread-d1", ours, lambda record: record["result"]["read"]["latency_ns"]["mean"] / 1e3
    )
    if not spread:
        return Goal(what, target, "not measured", None)
    return Goal(what, target, f"{spread.median:.2f} us ({spread.least:.2f} - {spread.most:.2f})", spread.median < 1.5)


def _transport_goal(results: Results, case: str) -> Goal:
    ratio = results.ratio(case, results.ours("vfio"), results.ours("socket"))
    text = "not measured" if ratio is None else f"{ratio.median:.3f} ({ratio.least:.3f} - {ratio.most:.3f})"
    what = "--vfio of --socket, 4 KiB randread, depth 32"
    return Goal(what, ">= 0.95", text, None if ratio is None else ratio.median >= 0.95)


def _idle_goals(results: Results) -> list[Goal]:
    rows = []
    for transport in ("socket", "vfio"):
        ours = results.ours(transport)
        idle = [record for record in results.idle if record["backend"] == ours]
        for what, target, key, limit, unit in (
            ("idle CPU", "< 0.5 %", "idle_percent", 0.5, "%"),
            ("start to first answer, kernels in the cache", "< 1 s", "start_s", 1.0, "s"),
        ):
            if not idle:
                rows.append(Goal(f"{what}, --{transport}", target, "not measured", None))
                continue
            spread = Spread.of([record[key] for record in idle])
            text = f"{spread.median:.2f} {unit} ({spread.least:.2f} - {spread.most:.2f})"
            rows.append(Goal(f"{what}, --{transport}", target, text, spread.median < limit))
    return rows
