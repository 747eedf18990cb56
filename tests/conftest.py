"""Kernels in this process use the cache that vvupipe's own processes use, compiled for the same baseline.

Property tests draw new examples in every run by hand, and the same in every run of CI, which must not fail by chance.
"""

import os

import pytest
from hypothesis import settings

from tests.compile_kernels import compile_kernels
from vvupipe.workers import kernel_cache

for _name, _value in kernel_cache.environment().items():
    os.environ.setdefault(_name, _value)
# numba's cache is not made for two processes that compile the same kernel: each of pytest-xdist's has one of its own.
if _worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache.folder() / _worker)

# The first example may have to compile a kernel, and machines are shared: no example has a deadline.
settings.register_profile("by hand", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "by hand")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its processes
def pytest_sessionstart(session):
    """Have the kernels compiled, which two processes would do at once, each within the time limit of its first test."""
    if not hasattr(session.config, "workerinput"):
        compile_kernels()
