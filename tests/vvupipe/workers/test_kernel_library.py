"""An object file of kernels: compiled once, whoever asks first, and loaded without numba."""

import os
import select
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from kernels import relay_record as layout
from vvupipe.errors import WorkerError
from vvupipe.workers import kernel_cache
from vvupipe.workers.kernel_library import KernelLibrary

pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """A cache with nothing in it."""
    monkeypatch.setenv("VVUPIPE_CACHE_DIR", str(tmp_path))
    return kernel_cache.folder()


def relayed(library):
    """What a relay that is stopped at once has to say."""
    state = np.zeros(1, layout.STATE)
    state["stop"] = state["asked"] = 1
    with select.epoll() as epoll:
        assert library.call("relay", epoll.fileno(), state.ctypes.data, 0) == 0
    return int(state["seen"][0])


def test_it_is_compiled_once(cold):
    assert not kernel_cache.is_warm()
    assert relayed(KernelLibrary("relay")) == 1
    path = kernel_cache.object_file("relay")
    assert path.parent == cold
    first = path.stat()
    assert relayed(KernelLibrary("relay")) == 1
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    assert not list(cold.glob("*.partial"))


def test_several_at_once_compile_it_once(cold, tmp_path):
    code = (
        "import sys; from vvupipe.workers.kernel_library import KernelLibrary as L; L('relay');"
        "print('numba' in sys.modules)"
    )
    log = tmp_path / "compilers"
    # Whoever compiles is a process that says so.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif 'vvupipe.workers.kernel_build' in sys.orig_argv: open({str(log)!r}, 'a').write('x')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    several = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [each.communicate(timeout=90)[0].strip() for each in several] == ["False"] * 3
    assert log.read_text() == "x"


def test_what_a_killed_compiler_left_is_overwritten(cold):
    (cold / "relay.partial").write_bytes(b"half")
    (cold / "relay.lock").touch()
    assert relayed(KernelLibrary("relay")) == 1
    assert not (cold / "relay.partial").exists()


def test_the_compiler_ends_with_who_waits_for_it(cold):
    code = "from vvupipe.workers.kernel_library import KernelLibrary; KernelLibrary('blk')"
    with subprocess.Popen([sys.executable, "-c", code]) as waiting:
        deadline = time.monotonic() + 20
        while not (compilers := psutil.Process(waiting.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        waiting.kill()
    assert not psutil.wait_procs(compilers, timeout=10)[1]
    assert not list(cold.glob("*.o"))


def test_wrong_number_of_words_is_noticed(cold):
    library = KernelLibrary("relay")
    with pytest.raises(KeyError, match="2 words"):
        library.call("relay", 1, 2)
    with pytest.raises(KeyError, match="nothing"):
        library.address("nothing", 0)


def test_kernels_that_cannot_be_compiled_are_one_line(cold):
    with pytest.raises(WorkerError, match=r"cannot compile the kernels: .*no_such_entries") as caught:
        KernelLibrary("no_such")
    assert "\n" not in str(caught.value)
    assert not list(cold.glob("*.o"))
