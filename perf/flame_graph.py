#!/usr/bin/env python3
"""Flame graph of a running worker, its JIT-compiled kernels included.

Give it the process id of a worker (`"workers"` in the ready event of --json, or perf/live_view.py), or of a back-end:
its first worker is taken. Samples with Linux perf; without perf, or without the right to it, with gdb, which is slow
and stops the worker for each sample. Writes stacks.txt (collapsed, for other tools) and flame.svg.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perf import command_line, flame_svg, jit_symbols, machine
from perf.live_view import back_end_of
from vvupipe.errors import UserError

Stacks = collections.Counter[tuple[str, ...]]
_STACK_BYTES = 8192
#: What a worker's interpreter has below its kernel; of no interest in a picture of the kernel.
_ROOT = re.compile(r"kernels\.\w+\.serve$")


class CannotSample(Exception):
    """This way of sampling does not work here. The message is one line."""


def worker_of(pid: int) -> int:
    """`pid` itself if it is a worker, else the first worker of the back-end that it is. Raises: UserError."""
    try:
        if back_end_of(pid) is None:
            raise UserError(f"process {pid} is no back-end and no worker of one, or it belongs to another user")
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            if any(".worker" in word for word in each.cmdline()):
                return int(each.pid)
    except psutil.Error as error:
        raise UserError(f"process {pid} has ended, or it belongs to another user") from error
    raise UserError(f"process {pid} has no worker")


def write_map(pid: int) -> Path:
    """Tell perf of the kernels: /tmp/perf-PID.map (Linux tools/perf/Documentation/jit-interface.txt)."""
    path = Path(f"/tmp/perf-{pid}.map")
    lines = [f"{each.start:x} {each.size:x} {each.name}\n" for each in jit_symbols.symbols_of(pid)]
    path.unlink(missing_ok=True)
    path.write_text("".join(lines))
    return path


def record(pid: int, seconds: float, hertz: int, folder: Path, call_graph: str) -> Stacks:
    """Sample with perf. Raises: CannotSample when it is not there or not permitted."""
    if not shutil.which("perf"):
        raise CannotSample("perf is not installed (Debian: linux-perf)")
    data = folder / "perf.data"
    # Virtual machines often have no hardware counters: the clock is there always.
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(hertz), "-o", str(data), "-p", str(pid)]
    graph = f"dwarf,{_STACK_BYTES}" if call_graph == "dwarf" else "fp"
    done = subprocess.run(
        [*command, "--call-graph", graph, "--", "sleep", str(seconds)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotSample(f"perf: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    script = subprocess.run(
        ["perf", "script", "-i", str(data), "-F", "ip,sym"],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    )
    return collapse(script.stdout)


def collapse(script: str) -> Stacks:
    """Stacks of `perf script -F ip,sym`, outermost function first, each with its number of samples."""
    stacks: Stacks = collections.Counter()
    frames: list[str] = []
    for line in [*script.splitlines(), ""]:
        words = line.split(None, 1)
        if len(words) == 2 and re.fullmatch(r"[0-9a-f]+", words[0]):
            name = re.sub(r"( \(inlined\)|\+0x[0-9a-f]+.*)$", "", words[1]).strip()
            if name != "[unknown]" and (not frames or frames[-1] != name):
                frames.append(name)
        elif not line.strip() and frames:
            stacks[tuple(reversed(frames))] += 1
            frames = []
    return stacks


def sample_with_gdb(pid: int, seconds: float, hertz: int) -> Stacks:
    """Stop the process again and again and ask gdb for its stack. Raises: CannotSample."""
    if not shutil.which("gdb"):
        raise CannotSample("gdb is not installed")
    stacks: Stacks = collections.Counter()
    deadline = time.monotonic() + seconds
    symbols = jit_symbols.symbols_of(pid)
    while time.monotonic() < deadline:
        began = time.monotonic()
        done = subprocess.run(
            ["gdb", "-p", str(pid), "-batch", "-nx", "-ex", "set auto-load off", "-ex", "backtrace 24"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        frames = re.findall(r"^#\d+ +(?:0x([0-9a-f]+) in )?(\S+)", done.stdout, re.MULTILINE)
        if not frames:
            raise CannotSample(f"gdb: {(done.stderr.strip().splitlines() or ['no stack'])[-1]}")
        names = [_name(symbols, int(address, 16) if address else 0, name) for address, name in frames]
        stacks[tuple(reversed(names))] += 1
        time.sleep(max(0.0, 1 / hertz - (time.monotonic() - began)))
    return stacks


def _name(symbols: list[jit_symbols.Symbol], address: int, name: str) -> str:
    for symbol in symbols:
        if symbol.start <= address < symbol.start + symbol.size:
            return symbol.name
    return jit_symbols.readable_name(name)


def trimmed(stacks: Stacks) -> Stacks:
    """Without the interpreter's frames below the worker's kernel, where the unwinder saw them."""
    found: Stacks = collections.Counter()
    for frames, count in stacks.items():
        starts = [k for k, name in enumerate(frames) if _ROOT.search(name)]
        found[frames[starts[0] :] if starts else frames] += count
    return found


def main() -> int:
    """Sample and write. Returns the exit status."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pid", type=int, help="a worker, or a back-end")
    parser.add_argument("--seconds", type=command_line.above_0, default=5.0)
    parser.add_argument(
        "--hertz",
        type=command_line.whole_from(1),
        default=999,
        help="samples a second  [default: 999; gdb manages about 1]",
    )
    parser.add_argument("--with", dest="way", choices=["auto", "perf", "gdb"], default="auto")
    parser.add_argument(
        "--call-graph", choices=["fp", "dwarf"], default="dwarf",
        help="how perf walks the stack: dwarf finds who called libc and Linux, fp costs less  [default: dwarf]",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="[default: a new one in perf/results/]")
    options = parser.parse_args()
    pid = worker_of(options.pid)
    folder = _output_folder(options.output)
    perf_map = None
    try:
        perf_map = write_map(pid)
        stacks = _sample(pid, options, folder)
    except (CannotSample, jit_symbols.NoJit, PermissionError) as error:
        hint = " (try as root)" if isinstance(error, PermissionError) and os.getuid() else ""
        raise UserError(f"{error}{hint}") from error
    finally:
        if perf_map:
            perf_map.unlink(missing_ok=True)
    stacks = trimmed(stacks)
    total = sum(stacks.values())
    if not total:
        print(f"flame_graph: process {pid} did not run in those {options.seconds:g} s: give it work", file=sys.stderr)
        return 1
    lines = [f"{';'.join(frames)} {count}\n" for frames, count in sorted(stacks.items())]
    (folder / "stacks.txt").write_text("".join(lines))
    title = f"worker {pid}: {total} samples"
    (folder / "flame.svg").write_text(flame_svg.draw(stacks, title))
    own: collections.Counter[str] = collections.Counter()
    for frames, count in stacks.items():
        own[frames[-1]] += count
    for name, count in own.most_common(15):
        print(f"{100 * count / total:5.1f} %  {name}")
    print(folder / "flame.svg")
    return 0


def _output_folder(wanted: Path | None) -> Path:
    """`wanted`, made if need be, or a new one. Raises: UserError."""
    if wanted is None:
        return machine.new_folder("flame")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {wanted}: {error.strerror}") from error
    if not os.access(wanted, os.W_OK | os.X_OK):
        raise UserError(f"--output {wanted}: this folder cannot be written to")
    return wanted


def _sample(pid: int, options: argparse.Namespace, folder: Path) -> Stacks:
    if options.way != "gdb":
        try:
            return record(pid, options.seconds, options.hertz, folder, options.call_graph)
        except CannotSample as error:
            if options.way == "perf":
                raise
            print(f"flame_graph: {error}; gdb is used instead, about one sample a second", file=sys.stderr)
    return sample_with_gdb(pid, options.seconds, options.hertz)


if __name__ == "__main__":
    command_line.run("flame_graph", main)
