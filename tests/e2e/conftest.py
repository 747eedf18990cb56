"""Makes the guest kit importable, and gives every test here each back-end that it asks for."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guest"))

import guest_kit
from backends import BACKENDS


@pytest.fixture
def qemu():
    """Asks for QEMU and what makes and checks disk images."""
    for program, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("mkfs.ext4", "e2fsprogs"),
        ("debugfs", "e2fsprogs"),
    ):
        if not shutil.which(program, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"):
            guest_kit.missing(f"{program} is not installed (package {package})")


@pytest.fixture(params=list(BACKENDS))
def backend_factory(request, qemu):
    """`backend_factory(image, folder)` is a context manager that serves `image` and gives a Backend."""
    return _installed(BACKENDS[request.param])


@pytest.fixture(params=[name for name, factory in BACKENDS.items() if factory.has_workers])
def worker_backend_factory(request, qemu):
    """As `backend_factory`, of the back-ends whose I/O is done by worker processes."""
    return _installed(BACKENDS[request.param])


def _installed(factory):
    if factory.program and not shutil.which(factory.program):
        guest_kit.missing(f"{factory.program} is not installed (package {factory.package})")
    return factory
