#!/usr/bin/env python3
"""fio inside a Linux guest in QEMU, on disks of several back-ends: vvupipe over a socket and through a VVU function,
qemu-storage-daemon. One guest has them all, so that rounds are interleaved.

Needs fio on this machine (Debian: fio): it is copied into the guest's initramfs with its libraries. Without hardware
virtualization the guest is emulated, which dominates what is measured: only the ratios say something then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import build_initramfs

from perf import backends, cases, command_line, machine
from perf.backends import Backend
from perf.plain import count, table
from perf.processes import Unavailable

#: name: (rw, block size, depth)
JOBS = {
    "4k-randread-d1": ("randread", "4k", 1),
    "4k-randread-d32": ("randread", "4k", 32),
    "4k-randwrite-d32": ("randwrite", "4k", 32),
    "128k-read-d32": ("read", "128k", 32),
}
_MEM_MIB = 768
_GUEST_S = 120  # for the guest to boot and end, besides its work
_START = "vvupipe-fio"


def guest_script(fio: Path, disks: int, jobs: Sequence[str], rounds: int, seconds: float) -> str:
    """Runs every job on every disk, round after round; prints "vvupipe-fio DISK JOB ROUND", then fio's JSON."""
    lines = ["mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm"]
    for round_number in range(rounds):
        for job in jobs:
            how, block, depth = JOBS[job]
            for disk in cases.rotated(range(disks), round_number):
                device = f"/dev/vd{chr(ord('a') + disk)}"
                lines.append(
                    f"{fio} --name={job} --filename={device} --direct=1 --ioengine=libaio --rw={how} --bs={block} "
                    f"--iodepth={depth} --runtime={seconds:g} --time_based --thread --output-format=json "
                    "--output=/tmp/out || exit 1"
                )
                lines += [f"echo; echo {_START} {disk} {job} {round_number}", "cat /tmp/out", f"echo {_START} end"]
    return "\n".join(lines)


def parse_console(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The results among what the guest wrote to its console: a record for each run of fio."""
    records = []
    pattern = rf"^{_START} (\d+) (\S+) (\d+)\r?\n(.*?)^{_START} end"
    for disk, job, round_number, output in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        found = json.loads(output[output.index("{") :])["jobs"][0]
        side = found["read"] if found["read"]["total_ios"] else found["write"]
        records.append(
            {
                "backend": names[int(disk)],
                "job": job,
                "round": int(round_number),
                "iops": side["iops"],
                "bytes_per_s": side["bw_bytes"],
                "latency_us": {
                    "mean": side["clat_ns"]["mean"] / 1e3,
                    **{key: side["clat_ns"]["percentile"][f"{key}.000000"] / 1e3 for key in ("50", "99")},
                },
                "guest_cpu_percent": found["usr_cpu"] + found["sys_cpu"],
            }
        )
    return records


def boot(sockets: Sequence[Path], initramfs: Path, kernel: Path, cpu: int, timeout_s: float) -> str:
    """Run the guest to its end, on one CPU; its console. Raises: Unavailable."""
    disks = [word for socket in sockets for word in ("--vhost-user-blk", str(socket))]
    pin = ["taskset", "--cpu-list", str(cpu)] if shutil.which("taskset") else []
    command = [
        *(*pin, *backends.VVUPIPE, "run", *disks, "--mem", str(_MEM_MIB), "--initrd", str(initramfs), "-p", "quiet"),
        str(kernel),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace") as vm:
        try:
            console, _ = vm.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            vm.terminate()
            console, _ = vm.communicate()
            raise Unavailable(f"the guest did not end within {timeout_s:.0f} s:\n{console[-2000:]}") from None
        except BaseException:
            vm.terminate()
            raise
    if f"{build_initramfs.MARKER} exit 0" not in console:
        raise Unavailable(f"the guest failed:\n{console[-2000:]}")
    return console


def run(options: argparse.Namespace, chosen: Sequence[Backend], fio: Path) -> list[dict[str, Any]]:
    """Start the back-ends, boot the guest, collect. Raises: Unavailable; build_initramfs.MissingPart."""
    available = sorted(os.sched_getaffinity(0))
    kernel = build_initramfs.newest_kernel()
    script = guest_script(fio, len(chosen), options.job, options.rounds, options.seconds)
    with (
        tempfile.TemporaryDirectory(prefix="vvupipe-perf-", dir=options.folder) as place,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(place)
        initramfs = folder / "initramfs"
        print("building the guest's initramfs", file=sys.stderr)
        initramfs.write_bytes(build_initramfs.build(kernel, script=script) + build_initramfs.program_overlay(fio))
        image = folder / "disk.img"
        cases.fill(image, options.size << 20)
        sockets = []
        for number, backend in enumerate(chosen):
            running = stack.enter_context(backend.start(folder / str(number), image, available[-1]))
            sockets.append(running.socket)
        runs = options.rounds * len(options.job) * len(chosen)
        print(f"{runs} runs of fio in the guest, {options.seconds:g} s each", file=sys.stderr)
        limit_s = _GUEST_S + runs * (options.seconds + 5)
        console = boot(sockets, initramfs, kernel.image, available[0], limit_s)
    records = parse_console(console, [each.name for each in chosen])
    if len(records) != runs:
        raise Unavailable(f"{len(records)} of {runs} results came")
    return [{**machine.facts(), "accelerator": _accelerator(), **record} for record in records]


def _accelerator() -> str:
    return "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Medians, and each back-end's ratio to the last one, qemu-storage-daemon where there is one."""
    names = list(dict.fromkeys(record["backend"] for record in records))
    rows = []
    for job in dict.fromkeys(record["job"] for record in records):
        values = {
            name: [record for record in records if (record["job"], record["backend"]) == (job, name)] for name in names
        }
        medians = {name: statistics.median(each["iops"] for each in found) for name, found in values.items()}
        for name, found in values.items():
            iops = [each["iops"] for each in found]
            p50 = statistics.median(each["latency_us"]["50"] for each in found)
            ratio = medians[name] / medians[names[-1]]
            rows.append(
                [
                    job,
                    name,
                    count(medians[name]),
                    f"{count(min(iops))} - {count(max(iops))}",
                    f"{p50:.0f}",
                    f"{ratio:.2f}",
                ]
            )
    return table(["job", "back-end", "IOPS", "lowest - highest", "p50 us", f"of {names[-1]}"], rows)


def main() -> int:
    """Run it and print a table. Returns the exit status."""
    parser = command_line.Parser(description="fio in a QEMU guest, on disks of several back-ends.")
    parser.add_argument("--rounds", type=command_line.whole_from(1), default=3)
    parser.add_argument("--seconds", type=command_line.above_0, default=2.0, help="for each run of fio  [default: 2]")
    parser.add_argument("--job", action="append", choices=list(JOBS), help="(repeat)  [default: all]")
    parser.add_argument(
        "--size", type=command_line.whole_from(16), default=256, metavar="MiB", help="of the image  [default: 256]"
    )
    parser.add_argument(
        "--folder", type=command_line.folder, default=Path("/dev/shm"), help="where the image lies  [default: tmpfs]"
    )
    parser.add_argument(
        "--backend", action="append", help="as perf/compare.py --list names them  [default: vvupipe's, qsd io_uring]"
    )
    options = parser.parse_args()
    options.job = options.job or list(JOBS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    fio = shutil.which("fio")
    if not fio:
        print("guest_fio: fio is not installed: install the package fio", file=sys.stderr)
        return 2
    known = backends.known()
    wanted = options.backend or [each.name for each in known if each.is_ours] + ["qsd io_uring"]
    chosen = [each for name in wanted for each in known if each.name == name]
    if not chosen:
        print(f"guest_fio: there is no back-end {' or '.join(wanted)}", file=sys.stderr)
        return 2
    try:
        records = run(options, chosen, Path(fio))
    except (Unavailable, build_initramfs.MissingPart) as error:
        print(f"guest_fio: {error}", file=sys.stderr)
        return 1
    folder = machine.new_folder("guest-fio")
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(summary(records))
    print(folder / "results.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
