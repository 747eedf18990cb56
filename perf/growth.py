#!/usr/bin/env python3
"""Does a request cost more when there is more of everything? A curve for each thing that grows.

Queues (one busy), memory regions, the size of the image, requests done so far. Each point is measured several times, in
rounds that go over all points. Writes JSON lines, a plot and a table to a folder of perf/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perf import backends, cases, command_line, growth_front_end, machine, report
from perf.backends import Backend
from perf.growth_front_end import BLOCK_BYTES, Point
from vvupipe.errors import UserError

QUEUES = (1, 2, 4, 8, 16, 32, 64)
REGIONS = (1, 2, 4, 8, 32, 128, 500)
IMAGE_MIB = (64, 256, 1024, 4096, 16384, 65536)
DEPTHS = (32, 1)
#: What a point shows, by depth: (key, words). Both suffer little when other programs use the CPUs too.
VALUES = {32: ("cpu_us", "CPU time of the back-end"), 1: ("p50_us", "median latency")}
#: What is read of every image, however large it is.
RANGE_BYTES = 64 << 20

CURVES = {
    "queues": "started queues, one busy",
    "regions": "memory regions (above 8 by ADD_MEM_REG)",
    "image": "image in MiB, the first 64 MiB of it read",
    "spread": "image in MiB, as many blocks spread over all of it",
    "uptime": "requests done before, in millions",
}


class Growth:
    """One run: the options, where results go."""

    def __init__(self, options: argparse.Namespace, backend: Backend, folder: Path, output: Any) -> None:
        self._options = options
        self._backend = backend
        self._folder = folder
        self._output = output
        self._facts = machine.facts()
        available = sorted(os.sched_getaffinity(0))
        self._front_cpu, self._back_cpu = available[0], available[-1]
        self._started = 0

    @contextlib.contextmanager
    def _serve(self, image: Path, queues: int) -> Iterator[backends.Running]:
        self._started += 1
        place = self._folder / str(self._started)
        with self._backend.start(place, image, self._back_cpu, queues=queues) as running:
            yield running

    @contextlib.asynccontextmanager
    async def _front_end(
        self, running: backends.Running, **more: int
    ) -> AsyncIterator[growth_front_end.GrowthFrontEnd]:
        async with growth_front_end.connected(running, self._front_cpu, **more) as front_end:
            await front_end.sweep(range_bytes=RANGE_BYTES)
            yield front_end

    def _write(self, curve: str, x: float, round_number: int, depth: int, point: Point) -> None:
        line = {"curve": curve, "x": x, "round": round_number, "depth": depth, "backend": self._backend.name}
        self._output.write(json.dumps({**self._facts, **line, **asdict(point)}) + "\n")
        self._output.flush()
        print(
            f"{curve:<8} {x:>8g}  round {round_number + 1}  depth {depth:<3} {point.wall_us:8.3f} us a request, "
            f"{point.cpu_us:7.3f} us CPU, p50 {point.p50_us:.2f} us",
            file=sys.stderr,
            flush=True,
        )

    async def queues(self, image: Path, round_number: int) -> None:
        """Idle vrings beside the busy one."""
        with self._serve(image, max(QUEUES)) as running:
            for number in QUEUES:
                async with self._front_end(running, vrings=number) as front_end:
                    for depth in DEPTHS:
                        point = await front_end.measure(self._options.seconds, depth, range_bytes=RANGE_BYTES)
                        self._write("queues", number, round_number, depth, point)

    async def regions(self, image: Path, round_number: int) -> None:
        """Regions that the buffers of the requests are spread over."""
        with self._serve(image, 1) as running:
            for number in REGIONS:
                async with self._front_end(running, regions=number) as front_end:
                    for depth in DEPTHS:
                        point = await front_end.measure(
                            self._options.seconds, depth, range_bytes=RANGE_BYTES, over_regions=number
                        )
                        self._write("regions", number, round_number, depth, point)

    async def image_size(self, round_number: int) -> None:
        """Sparse images; the same number of blocks is read, close together and far apart."""
        for size_mib in IMAGE_MIB:
            image = self._folder / f"sparse-{size_mib}.img"
            if not image.exists():
                with image.open("wb") as file:
                    file.truncate(size_mib << 20)
            strides = {"image": BLOCK_BYTES, "spread": (size_mib << 20) * BLOCK_BYTES // RANGE_BYTES}
            with self._serve(image, 1) as running:
                async with self._front_end(running) as front_end:
                    for curve, stride in strides.items():
                        reach = {"range_bytes": stride * (RANGE_BYTES // BLOCK_BYTES), "stride_bytes": stride}
                        await front_end.sweep(**reach)
                        for depth in DEPTHS:
                            point = await front_end.measure(self._options.seconds, depth, **reach)
                            self._write(curve, size_mib, round_number, depth, point)

    async def uptime(self, image: Path, round_number: int) -> None:
        """One connection that goes on and on."""
        with self._serve(image, 1) as running:
            async with self._front_end(running) as front_end:
                done = 0
                for _ in range(self._options.uptime):
                    for depth in DEPTHS:
                        point = await front_end.measure(self._options.seconds, depth, range_bytes=RANGE_BYTES)
                        self._write("uptime", round(done / 1e6, 2), round_number, depth, point)
                        done += point.requests

    async def run(self) -> None:
        """All curves, round after round."""
        image = self._folder / "disk.img"
        cases.fill(image, RANGE_BYTES)
        for round_number in range(self._options.rounds):
            if "queues" in self._options.curve:
                await self.queues(image, round_number)
            if "regions" in self._options.curve:
                await self.regions(image, round_number)
            if "image" in self._options.curve:
                await self.image_size(round_number)
        if "uptime" in self._options.curve:
            await self.uptime(image, 0)


def medians(records: Sequence[dict[str, Any]], curve: str, depth: int) -> list[tuple[float, float]]:
    """(x, median of the rounds) of a curve in us, x ascending; VALUES says what it shows."""
    points: dict[float, list[float]] = {}
    for record in records:
        if record["curve"] == curve and record["depth"] == depth:
            points.setdefault(record["x"], []).append(record[VALUES[depth][0]])
    return [(x, statistics.median(values)) for x, values in sorted(points.items())]


def write_report(folder: Path) -> Path:
    """report.md and growth.png from results.jsonl. Raises: UserError when it is missing or another program's."""
    records = command_line.results_of(folder, key="curve")
    first = records[0]
    about = f"{first['backend']}, vvupipe {first['commit']}, {first['cpu']}, Linux {first['kernel']}, {first['time']}"
    parts = ["# What a request costs as things grow", about]
    rows = []
    for curve, text in CURVES.items():
        for depth in DEPTHS:
            points = medians(records, curve, depth)
            if len(points) > 1:
                (low, least), (high, most) = points[0], points[-1]
                cells = (f"{low:g}", f"{least:.3f}", f"{high:g}", f"{most:.3f}", f"{most / least:.2f}")
                rows.append((text, f"{VALUES[depth][1]}, depth {depth}", *cells))
    parts.append(report.table(("what grows", "shown", "from", "us", "to", "us", "ratio"), rows))
    parts.append("4 KiB random reads; medians of the rounds. CPU time is that of all processes of the back-end.")
    try:
        from perf import growth_plot
    except ImportError:
        parts.append("No plot: matplotlib is not installed (pip install '.[perf]').")
    else:
        parts.append(f"![growth]({growth_plot.draw(records, folder).name})")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def main() -> int:
    """Run it. Returns the exit status."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=command_line.whole_from(1), default=3)
    parser.add_argument("--seconds", type=command_line.above_0, default=0.5, help="for each point  [default: 0.5]")
    parser.add_argument(
        "--uptime", type=command_line.whole_from(1), default=20, metavar="N", help="points of the uptime curve"
    )
    parser.add_argument("--curve", action="append", choices=["queues", "regions", "image", "uptime"])
    parser.add_argument("--backend", default="vvupipe socket", help="as perf/compare.py --list names them")
    parser.add_argument(
        "--folder", type=command_line.folder, default=Path("/dev/shm"), help="where the images lie  [default: tmpfs]"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make the report of these results anew")
    options = parser.parse_args()
    if options.report:
        print(write_report(options.report))
        return 0
    options.curve = options.curve or ["queues", "regions", "image", "uptime"]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = [each for each in backends.known() if each.name.startswith(options.backend)]
    if not chosen:
        raise UserError(f"--backend {options.backend}: no back-end's name begins so: perf/compare.py --list prints all")
    folder = machine.new_folder("growth")
    with (
        tempfile.TemporaryDirectory(prefix="vvupipe-perf-", dir=options.folder) as place,
        (folder / "results.jsonl").open("w") as output,
    ):
        asyncio.run(Growth(options, chosen[0], Path(place), output).run())
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    command_line.run("growth", main)
