"""Program: have all kernels compiled that tests want of vvupipe's processes, all at once. Nothing if they are.

Also those that count their stages, which one test asks for: a second compiler costs least while others wait.
"""

import os
import subprocess
import sys
from pathlib import Path

from kernels.stage_layout import STAGES_ENV

_LOAD = """
import sys
from vvupipe.workers.executor import die_with_parent
from vvupipe.workers.kernel_library import KernelLibrary
die_with_parent(int(sys.argv[2]))
KernelLibrary(sys.argv[1])
"""
_WANTED = (("blk", "0"), ("blk", "1"), ("driver", "0"), ("relay", "0"))  # name, whether stages are counted


def compile_kernels() -> None:
    """Raises CalledProcessError."""
    root = Path(__file__).resolve().parents[1]
    compiling = [
        subprocess.Popen(
            [sys.executable, "-c", _LOAD, name, str(os.getpid())], cwd=root, env={**os.environ, STAGES_ENV: counts}
        )
        for name, counts in _WANTED
    ]
    for process in compiling:
        if process.wait(600):
            raise subprocess.CalledProcessError(process.returncode, process.args)


if __name__ == "__main__":
    compile_kernels()
