"""Makes the guest kit importable, and gives every test here each back-end that it asks for."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guest"))

import guest_kit
from backends import BACKENDS
from embedded import Scene
from front_end_life import Served

from vvupipe.memory import shared


@pytest.fixture
def image(tmp_path):
    """16 MiB that nobody has written before."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(16 << 20))
    return path


@pytest.fixture
def scene(tmp_path):
    """Embedded VMs and back-ends with a run folder of their own, all of which end with the test."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    playing = Scene(folder)
    yield playing
    playing.close()
    shared.remove_stale()


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


@pytest.fixture(scope="session")
def new_qemu():
    """Path of a QEMU >= 10.1, which has a vfio-user client, and whose TCG migrates without losing pages (since 9.0)."""
    return os.environ.get("VVUPIPE_NEW_QEMU") or guest_kit.missing(
        "VVUPIPE_NEW_QEMU names no QEMU >= 10.1: scripts/newer_qemu.sh fetches one"
    )


@pytest.fixture(params=list(BACKENDS))
def backend_factory(request, qemu):
    """`backend_factory(image, folder)` is a context manager that serves `image` and gives a Backend."""
    return _installed(BACKENDS[request.param])


@pytest.fixture(params=[name for name, factory in BACKENDS.items() if factory.has_workers])
def worker_backend_factory(request, qemu):
    """As `backend_factory`, of the back-ends whose I/O is done by worker processes."""
    return _installed(BACKENDS[request.param])


@pytest.fixture(scope="module", params=list(BACKENDS))
def served(request, tmp_path_factory):
    """A back-end that serves a whole module, whose every test connects anew."""
    factory = _installed(BACKENDS[request.param])
    folder = tmp_path_factory.mktemp("library")
    image = folder / "disk.img"
    image.write_bytes(random.Random(4).randbytes(8 << 20))
    with factory(image, folder) as backend:
        served = Served(request.param, backend, image)
        yield served
        backend.serving.check_alive()
        assert image.read_bytes() == served.content, "after all of this the image holds what was written, and no more"


def _installed(factory):
    if factory.program and not shutil.which(factory.program):
        guest_kit.missing(f"{factory.program} is not installed (package {factory.package})")
    return factory
