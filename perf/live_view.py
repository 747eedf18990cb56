#!/usr/bin/env python3
"""What the vrings of running back-ends do, second by second, from the counters in their shared memory.

Without a process id it shows every back-end that this user may look at. Looking costs the back-end nothing.
docs/profiling.md says how to read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import control_block as layout
from perf import command_line
from perf.plain import count, table
from vvupipe.errors import UserError
from vvupipe.workers.control_block import ControlBlock

_STATES = {
    layout.VRING_STOPPED: "stopped",
    layout.VRING_RUNNING: "running",
    layout.VRING_WAITING: "waiting",
    layout.VRING_BROKEN: "BROKEN",
}
_BLOCK = re.compile(r"^/dev/shm/vvupipe-\d+-[0-9a-f]+ \(deleted\)$")
_COUNTERS = ("requests", "errors", "read_bytes", "written_bytes", "flushes", "kicks", "calls", "turns", "waiting_sum")
#: What is told as it is, not as a rate.
_AS_IS = ("state", "under_way")


#: Quotients of counters: what waited when the worker looked, what it then did at one go, who had to be woken.
_RATIOS = (
    ("depth", "waiting_sum", "turns"),
    ("batch", "requests", "turns"),
    ("kicks_per_request", "kicks", "requests"),
    ("calls_per_request", "calls", "requests"),
)
#: Columns of the view: heading, key, unit.
_COLUMNS = (
    ("IOPS", "requests_per_s", 1),
    ("read MB/s", "read_bytes_per_s", 1e6),
    ("write MB/s", "written_bytes_per_s", 1e6),
    ("depth", "depth", 1),
    ("batch", "batch", 1),
    ("under way", "under_way", 1),
    ("kicks/req", "kicks_per_request", 1),
    ("calls/req", "calls_per_request", 1),
    ("errors/s", "errors_per_s", 1),
)


def _block_fds(pid: int) -> dict[Path, str]:
    """What may be fds of a control block, each with the name of its memory. Raises: OSError."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by now
            name = os.readlink(path)
            if _BLOCK.match(name):
                found[path] = name
    return found


def _made_blocks(pid: int) -> set[str]:
    """The control blocks that `pid` made itself, as a back-end does; others only look at them. Raises: OSError."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = re.search(r"^NSpid:(.*)$", status, re.MULTILINE)
    own = numbers[1].split()[-1] if numbers else str(pid)  # its number where it runs, which may be a container
    return {name for name in _block_fds(pid).values() if name.startswith(f"/dev/shm/vvupipe-{own}-")}


def back_end_of(pid: int) -> int | None:
    """`pid` if it is a back-end, the back-end that it is a worker of, or None."""
    try:
        if _made_blocks(pid):
            return pid
        parent = psutil.Process(pid).ppid()
        return parent if _made_blocks(parent) & set(_block_fds(pid).values()) else None
    except (OSError, psutil.Error):
        return None


@dataclass
class Watched:
    """One back-end: its control block and what was read of it last."""

    pid: int
    block: ControlBlock
    before: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pid: int) -> Watched | None:
        """None when process `pid` is no back-end and no worker of one, or not for us to look at."""
        try:
            for path in _block_fds(pid):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    return cls(pid, ControlBlock.attach(fd))
                except ValueError:
                    os.close(fd)
        except OSError:
            return None
        return None

    def read(self) -> dict[str, Any]:
        """The counters as they are now."""
        vrings = {
            index: {name: int(record[name]) for name in (*_AS_IS, *_COUNTERS)}
            for index, record in enumerate(self.block.vrings)
            if record["state"] != layout.VRING_STOPPED or record["requests"]
        }
        sleeps = [int(record["sleeps"]) for record in self.block.workers]
        return {"time": time.monotonic(), "vrings": vrings, "sleeps": sleeps, "cpu_s": self._cpu_seconds()}

    def _cpu_seconds(self) -> float:
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        return float(sum(sum(process.cpu_times()[:2]) for process in processes))

    def step(self) -> dict[str, Any]:
        """Rates since the last step; those since the start of the back-end are not told. Raises: psutil.Error."""
        now, before = self.read(), self.before
        self.before = now
        if not before:
            return {}
        span = now["time"] - before["time"]
        rows = []
        for index, vring in now["vrings"].items():
            old = before["vrings"].get(index, dict.fromkeys(vring, 0))
            rows.append({"vring": index, **rates(old, vring, span)})
        workers = [
            {"worker": index, "sleeps_per_s": (new - old) / span}
            for index, (old, new) in enumerate(zip(before["sleeps"], now["sleeps"], strict=True))
        ]
        return {
            "pid": self.pid,
            "cpu_percent": 100 * (now["cpu_s"] - before["cpu_s"]) / span,
            "sleeps_per_s": sum(worker["sleeps_per_s"] for worker in workers),
            "workers": workers,
            "vrings": rows,
        }


def rates(old: dict[str, int], new: dict[str, int], span: float) -> dict[str, Any]:
    """What a vring did in `span` seconds. None: cannot be said (there was no request)."""
    step = {name: new[name] - old[name] for name in _COUNTERS}
    found: dict[str, Any] = {"state": _STATES.get(new["state"], str(new["state"])), "under_way": new["under_way"]}
    found |= {f"{name}_per_s": step[name] / span for name in _COUNTERS if name != "waiting_sum"}
    for key, upper, lower in _RATIOS:
        found[key] = step[upper] / step[lower] if step[lower] else None
    return found


def text(view: dict[str, Any]) -> str:
    """A view for people."""
    rows = []
    for row in view["vrings"]:
        numbers = ((row[key], unit) for _, key, unit in _COLUMNS)
        cells = (count(None if number is None else number / unit) for number, unit in numbers)
        rows.append([str(row["vring"]), row["state"], *cells])
    sleeps = ", ".join(f"{count(each['sleeps_per_s'])} of worker {each['worker']}" for each in view["workers"])
    first = f"back-end {view['pid']}: {view['cpu_percent']:.0f} % CPU, sleeps/s: {sleeps}"
    head = ["vring", "state", *(heading for heading, _, _ in _COLUMNS)]
    return "\n".join([first, table(head, rows) if rows else "  no vring was started yet"])


def back_ends(pid: int | None) -> Iterator[Watched]:
    """Process `pid`, or the back-end that it is a worker of; None: all there are."""
    for each in psutil.pids() if pid is None else [back_end_of(pid)]:
        if each is not None and back_end_of(each) == each and (watched := Watched.of(each)):
            yield watched


def main() -> int:
    """Show until interrupted. Returns the exit status."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pid", type=int, nargs="?", help="of `vvupipe device block`, or of one of its workers  [default: all]"
    )
    parser.add_argument("--interval", type=command_line.above_0, default=1.0, metavar="SECONDS")
    parser.add_argument(
        "--count", type=command_line.whole_from(0), default=0, metavar="N", help="views, 0: until interrupted"
    )
    parser.add_argument("--json", action="store_true", help="a JSON line for each view of a back-end")
    options = parser.parse_args()
    watched = list(back_ends(options.pid))
    if not watched:
        whom = "no back-end runs" if options.pid is None else f"process {options.pid} is no back-end"
        raise UserError(f"{whom}, or it belongs to another user")
    shown = 0
    try:
        while watched and (not options.count or shown <= options.count):
            views = []
            for each in list(watched):
                try:
                    views.append(each.step())
                except psutil.Error:
                    watched.remove(each)
            views = [view for view in views if view]
            if views and options.json:
                print("\n".join(json.dumps(view) for view in views), flush=True)
            elif views:
                clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
                print(clear + "\n\n".join(text(view) for view in views), flush=True)
            shown += 1
            if not options.count or shown <= options.count:
                time.sleep(options.interval)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    command_line.run("live_view", main)
