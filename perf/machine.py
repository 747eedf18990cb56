"""What a figure must carry to be compared later: commit, CPU, kernel, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"


def _first_line(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] or None


def cpu_model() -> str:
    """The name of the CPU as Linux tells it."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def facts() -> dict[str, Any]:
    """The machine and the versions, for every line of results."""
    return {
        "commit": _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "cpu": cpu_model(),
        "cpus": len(_online_cpus()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numba": importlib.metadata.version("numba"),
        "qemu": _first_line("qemu-storage-daemon", "--version"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _online_cpus() -> list[int]:
    cpus: list[int] = []
    for part in Path("/sys/devices/system/cpu/online").read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def new_folder(what: str) -> Path:
    """A new folder of results: perf/results/WHAT-TIME."""
    folder = RESULTS / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    return folder
