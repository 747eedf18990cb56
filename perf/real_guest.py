#!/usr/bin/env python3
"""Throughput of a real sibling's disk: served by a back-end in a real device VM, beside QEMU's own virtio-blk.

One sibling guest has both disks, of the same size and on the same file system: /dev/vda through the VVU function,
/dev/vdb by QEMU itself. It reads and writes each in turn, with direct I/O, several rounds. Without hardware
virtualization all guest code is emulated, which dominates both; the ratio is what counts.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import build_initramfs  # noqa: E402
import real_demo  # noqa: E402

from perf import command_line  # noqa: E402

#: name: (dd's arguments for a disk, bytes)
WORKLOADS = {
    "1M read": ("if={disk} of=/dev/null bs=1M iflag=direct", 64 << 20),
    "1M write": ("if=/dev/zero of={disk} bs=1M oflag=direct conv=notrunc", 64 << 20),
    "4k read": ("if={disk} of=/dev/null bs=4k count=4096 iflag=direct", 16 << 20),
    "4k write": ("if=/dev/zero of={disk} bs=4k count=4096 oflag=direct conv=notrunc", 16 << 20),
}


def guest_script(rounds: int) -> str:
    """Prints "result DISK NUMBER SECONDS" for each run."""
    lines = ["now() { read -r up rest </proc/uptime; echo $up; }"]
    for _ in range(rounds):
        for number, (arguments, _) in enumerate(WORKLOADS.values()):
            for disk in ("vda", "vdb"):
                count = "" if "count=" in arguments else " count=64"
                lines.append("echo 3 >/proc/sys/vm/drop_caches; t=$(now)")
                lines.append(f"dd {arguments.format(disk=f'/dev/{disk}')}{count} 2>/dev/null || exit 1")
                lines.append(f"echo result {disk} {number} $t $(now)")
    return "\n".join(lines)


def run(folder: Path, rounds: int, image_mib: int, qemu: str | None) -> dict[str, dict[str, list[float]]]:
    """MB/s of every run: workload -> disk -> figures."""
    from vvupipe.workers import kernel_cache

    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    real_demo.compile_kernels(folder)
    kernel = build_initramfs.newest_kernel()
    for name in ("vvu.img", "own.img"):
        (folder / name).write_bytes(os.urandom(1 << 20) * image_mib)
    # The back-end's image is a disk of the device VM: a raw file of the host behind QEMU's virtio-blk, as /dev/vdb is.
    serve = f"{' '.join(real_demo.VVUPIPE)} device block --vfio {real_demo.ADDRESS} --bind --file /dev/vda"
    inside, sibling = folder / "device-vm.initramfs", folder / "sibling.initramfs"
    inside.write_bytes(build_initramfs.build(kernel, script=serve, host_root=True))
    sibling.write_bytes(build_initramfs.build(kernel, script=guest_script(rounds)))
    socket = f"{folder}/vhost-user.socket"
    parameters = f"quiet vvupipe.cwd={ROOT} vvupipe.env=PYTHONPATH={ROOT}"
    parameters += f" vvupipe.env=VVUPIPE_CACHE_DIR={kernel_cache.folder().parent}"
    device = [
        "run", "--vvu-proxy", f"{socket},addr={real_demo.ADDRESS}", "--mem", "512", "--shared-dir", "/:host:ro=true",
        "--block", str(folder / "vvu.img"), "--initrd", str(inside), "-p", parameters,
        *(["--qemu", qemu] if qemu else []), str(kernel.image),
    ]  # fmt: skip
    with real_demo.device_vm(device, folder / "device-vm.log"):
        command = [
            "run", "--vhost-user-blk", socket, "--block", str(folder / "own.img"), "--initrd", str(sibling),
            "-p", "quiet", str(kernel.image),
        ]  # fmt: skip
        done = subprocess.run(
            [*real_demo.VVUPIPE, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
        )
    figures: dict[str, dict[str, list[float]]] = {name: {"vda": [], "vdb": []} for name in WORKLOADS}
    for disk, number, start, end in re.findall(r"^result (\w+) (\d+) ([\d.]+) ([\d.]+)", done.stdout, re.MULTILINE):
        name = list(WORKLOADS)[int(number)]
        figures[name][disk].append(WORKLOADS[name][1] / 1e6 / max(0.01, float(end) - float(start)))
    if done.returncode or not all(len(runs) == rounds for disks in figures.values() for runs in disks.values()):
        sys.exit(f"the sibling did not end its work:\n{done.stdout}")
    return figures


def main() -> int:
    """Run it and print a table."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=command_line.whole_from(1), default=5)
    parser.add_argument("--qemu", help="QEMU for the device VM  [default: qemu-system-x86_64]")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vvupipe-perf-") as folder:
        figures = run(Path(folder), options.rounds, 64, options.qemu)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nMB/s, medians of {options.rounds} interleaved rounds (lowest - highest)")
    print(f"{'':10} {'VVU, two real VMs':>28} {'QEMU virtio-blk':>28} {'ratio':>7}")
    for name, disks in figures.items():
        cells = [
            f"{statistics.median(runs):.1f} ({min(runs):.1f} - {max(runs):.1f})"
            for runs in (disks["vda"], disks["vdb"])
        ]
        ratio = statistics.median(disks["vda"]) / statistics.median(disks["vdb"])
        print(f"{name:10} {cells[0]:>28} {cells[1]:>28} {ratio:7.2f}")
    return 0


if __name__ == "__main__":
    command_line.run("real_guest", main)
