#!/usr/bin/env python3
"""Compare block back-ends under the same front-end: vvupipe's embedded sibling, on a CPU of its own.

Every back-end of a place (page cache, tmpfs, O_DIRECT) is started, idle until its turn. Then each case is measured with
all of them, one after the other, in an order that changes, and that several times: a disturbance of the machine meets
all of them. Writes every single result as a JSON line, and a report with plots, to a folder of perf/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perf import backends, cases, command_line, front_end, idle, machine, memcpy_limit, report
from perf.backends import Backend, Running
from perf.cases import Case, Place
from perf.processes import Unavailable
from perf.summary import MEMCPY, MEMCPY_AHEAD, READING
from vvupipe.errors import UserError

_MEMCPY_WORKLOADS = ("randread", "randwrite", "read", "write")
_MEMCPY_DEPTH = 32


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


class Comparison:
    """One run of the whole: what was asked for, and where results go."""

    def __init__(self, options: argparse.Namespace, output: TextIO) -> None:
        self.options = options
        self._output = output
        available = sorted(os.sched_getaffinity(0))
        self.front_cpu, self.back_cpu = available[0], available[-1]
        pinning = {"front_end_cpu": self.front_cpu, "back_end_cpu": self.back_cpu}
        self._facts = {**machine.facts(), **pinning, "seconds": options.seconds, "image_mib": options.size}
        self._done, self._total, self._began = 0, 0, time.monotonic()

    def write(self, kind: str, **fields: Any) -> None:
        """A line of results, at once: what was measured is kept however this ends."""
        load = {"load_1min": round(os.getloadavg()[0], 2)}
        self._output.write(json.dumps({"kind": kind, **self._facts, **load, **fields}) + "\n")
        self._output.flush()

    def run(self, chosen: Sequence[Backend]) -> None:
        """All places, and first what a back-end does when it has nothing to do."""
        everything = {place.name: self._cases(place) for place in self._places()}
        measurable = {
            place.name: [each for each in chosen if backends.can_serve(each, direct=place.direct)]
            for place in self._places()
        }
        self._total = self.options.rounds * sum(len(everything[name]) * len(measurable[name]) for name in everything)
        for place in self._places():
            if everything[place.name]:
                with self._image(place) as (folder, image):
                    if self.options.idle and place == self._places()[0]:
                        self._warm_up(folder, image, measurable[place.name])
                        self._idle(folder, image, measurable[place.name])
                    self._place(place, folder, image, everything[place.name], measurable[place.name])

    def _places(self) -> list[Place]:
        return [place for place in cases.places(self.options.folder) if place.name in self.options.place]

    def _cases(self, place: Place) -> list[Case]:
        return cases.chosen(place.name, self.options.only, quickly=self.options.quick)

    @contextlib.contextmanager
    def _image(self, place: Place) -> Iterator[tuple[Path, Path]]:
        with tempfile.TemporaryDirectory(prefix="vvupipe-perf-", dir=place.folder) as name:
            folder = Path(name)
            say(f"{place.title}: writing an image of {self.options.size} MiB to {folder}")
            cases.fill(folder / "disk.img", self.options.size << 20)
            yield folder, folder / "disk.img"

    def _warm_up(self, folder: Path, image: Path, chosen: Sequence[Backend]) -> None:
        """Compile every kernel, so that no start below has to."""
        case = Case("page-cache", "randread", 4096, 32)
        for number, backend in enumerate(chosen):
            if backend.family == "vvupipe":
                # One that cannot start is told of where it is left out.
                with (
                    contextlib.suppress(Unavailable),
                    backend.start(folder / f"warm-{number}", image, self.back_cpu) as running,
                ):
                    front_end.measure(case, running.socket, running.pids, 0.1, self.front_cpu)

    def _idle(self, folder: Path, image: Path, chosen: Sequence[Backend]) -> None:
        for round_number in range(self.options.rounds):
            for number, backend in enumerate(cases.rotated(chosen, round_number)):
                try:
                    with backend.start(folder / f"idle-{round_number}-{number}", image, self.back_cpu) as running:
                        found = idle.measure(running, self.options.idle, self.front_cpu)
                except Unavailable as error:
                    say(f"{backend.name}: left out: {error}")
                    continue
                self.write("idle", backend=backend.name, round=round_number, **found)
                say(
                    f"idle     {backend.name:<24} {found['idle_percent']:7.3f} % CPU, "
                    f"start {found['start_s']:.2f} s, {sum(row['pss'] for row in found['memory']) >> 20} MiB PSS"
                )

    def _place(
        self, place: Place, folder: Path, image: Path, wanted: Sequence[Case], chosen: Sequence[Backend]
    ) -> None:
        with contextlib.ExitStack() as stack:
            started: list[tuple[Backend, Running]] = []
            for number, backend in enumerate(chosen):
                starting = backend.start(folder / str(number), image, self.back_cpu, direct=place.direct)
                try:
                    started.append((backend, stack.enter_context(starting)))
                except Unavailable as error:
                    say(f"{place.name}: {backend.name} is left out: {error}")
                    self.write("skipped", place=place.name, backend=backend.name, why=str(error))
            if not started:
                return  # the limit of the machine alone is no comparison
            for round_number in range(self.options.rounds):
                for case_number, case in enumerate(wanted):
                    self._limit(place, image, case, round_number)
                    for backend, running in cases.rotated(started, round_number + case_number):
                        self._measure(backend, running, case, round_number)

    def _measure(self, backend: Backend, running: Running, case: Case, round_number: int) -> None:
        found = front_end.measure(case, running.socket, running.pids, self.options.seconds, self.front_cpu)
        self.write("measurement", backend=backend.name, case=case.name, round=round_number, **found)
        self._done += 1
        each_s = (time.monotonic() - self._began) / self._done
        left_min = each_s * (self._total - self._done) / 60
        say(
            f"round {round_number + 1}  {case.name:<36} {backend.name:<22} {found['iops']:>12,.0f} IOPS "
            f"{found['cpu_us_per_request']:8.2f} us CPU   ({left_min:.0f} min left)"
        )

    def _limit(self, place: Place, image: Path, case: Case, round_number: int) -> None:
        """The machine's own limit, for the cases that only copy."""
        plain = case.depth == _MEMCPY_DEPTH and case.queues == 1 and case.workload in _MEMCPY_WORKLOADS
        if place.direct or not plain:
            return
        for name, way in (
            (MEMCPY, memcpy_limit.ONE),
            (MEMCPY_AHEAD, memcpy_limit.AHEAD),
            (READING, memcpy_limit.READING),
        ):
            if way == memcpy_limit.READING and case.workload.endswith("write"):
                continue
            found = memcpy_limit.measure(
                image, case.workload, case.block_bytes, case.depth, self.options.seconds, self.back_cpu, way
            )
            self.write("measurement", backend=name, case=case.name, round=round_number, **found)
            say(f"round {round_number + 1}  {case.name:<36} {name:<22} {found['iops']:>12,.0f} blocks/s")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. --quick fills in what was not said."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=command_line.whole_from(1), help="[default: 5; quick: 1]")
    parser.add_argument("--seconds", type=command_line.above_0, help="for each measurement  [default: 1; quick: 0.5]")
    parser.add_argument("--quick", action="store_true", help="only the cases that have targets, in the page cache")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cases, as 4k-randread-d* or tmpfs/*"
    )
    parser.add_argument(
        "--place", action="append", choices=["page-cache", "tmpfs", "direct"], help="where the image lies (repeat)"
    )
    parser.add_argument(
        "--backend", action="append", default=[], metavar="TEXT", help="back-ends whose name begins so (repeat)"
    )
    parser.add_argument(
        "--engines", default=",".join(backends.ENGINES), help="vvupipe's engines  [default: %(default)s]"
    )
    parser.add_argument(
        "--size", type=command_line.whole_from(16), default=512, metavar="MiB", help="of the image  [default: 512]"
    )
    parser.add_argument(
        "--folder",
        type=command_line.folder,
        default=machine.RESULTS.parent,
        help="where images of page-cache and direct lie",
    )
    parser.add_argument(
        "--idle", type=command_line.not_below_0, help="seconds to watch idle back-ends, 0: not  [default: 5; quick: 2]"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and back-ends, and end")
    options = parser.parse_args(arguments)
    quick = options.quick
    defaults = {
        "rounds": 1 if quick else 5,
        "seconds": 0.5 if quick else 1.0,
        "idle": 2.0 if quick else 5.0,
        "place": ["page-cache"] if quick else ["page-cache", "tmpfs", "direct"],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def choose(options: argparse.Namespace) -> list[Backend]:
    """The back-ends that were asked for. Raises: UserError when they, or the cases, are none or cannot be."""
    engines = options.engines.split(",")
    for engine in engines:
        if engine not in backends.ENGINES:
            raise UserError(f"--engines {options.engines}: '{engine}' is not one of {', '.join(backends.ENGINES)}")
    for pattern in options.only:
        if not any(cases.chosen(place, [pattern], quickly=options.quick) for place in options.place):
            raise UserError(f"--only {pattern}: no case has such a name: --list prints all")
    chosen = backends.known(engines)
    for text in options.backend:
        if not any(each.name.startswith(text) for each in chosen):
            raise UserError(f"--backend {text}: no back-end's name begins so: --list prints all")
    if options.backend:
        chosen = [each for each in chosen if any(each.name.startswith(text) for text in options.backend)]
    directs = {place.direct for place in cases.places(options.folder) if place.name in options.place}
    if not any(backends.can_serve(each, direct=direct) for each in chosen for direct in directs):
        names = " and ".join(each.name for each in chosen)
        raise UserError(f"{names} cannot serve with --place {' or '.join(options.place)}: choose others")
    return chosen


def main() -> int:
    """Run the comparison. Returns the exit status."""
    options = parse()
    chosen = choose(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if len(os.sched_getaffinity(0)) < 2:
        raise UserError("a comparison needs two CPUs: one for the back-end, one for the front-end")
    if options.list:
        for place in options.place:
            print("\n".join(case.name for case in cases.chosen(place, options.only, quickly=options.quick)))
        print("\n".join(each.name for each in chosen))
        return 0
    if not backends.has_engines():
        say("this vvupipe has no `device block --engine`: engines are left out, its only one is measured")
    folder = machine.new_folder("compare")
    say(f"results: {folder}")
    with (folder / "results.jsonl").open("w") as output:
        comparison = Comparison(options, output)
        try:
            comparison.run(chosen)
        except KeyboardInterrupt:
            say("interrupted: the report shows what was measured so far")
    print(report.write(folder))
    return 0


if __name__ == "__main__":
    command_line.run("compare", main)
