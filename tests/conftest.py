"""Kernels in this process use the cache that vvupipe's own processes use, compiled for the same baseline.

Property tests draw new examples in every run by hand, and the same in every run of CI, which must not fail by chance.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from vvupipe.workers import kernel_cache

for _name, _value in kernel_cache.environment().items():
    os.environ.setdefault(_name, _value)

# The first example may have to compile a kernel, and machines are shared: no example has a deadline.
settings.register_profile("by hand", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "by hand")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its processes
def pytest_sessionstart(session):
    """Have the kernels compiled, which two processes would do at once, each within the time limit of its first test."""
    if not hasattr(session.config, "workerinput"):
        with tempfile.TemporaryDirectory() as folder:
            code = f"import pathlib, real_demo; real_demo.compile_kernels(pathlib.Path({folder!r}))"
            scripts = Path(__file__).resolve().parents[1] / "scripts"
            subprocess.run([sys.executable, "-c", code], cwd=scripts, timeout=600, check=True)
