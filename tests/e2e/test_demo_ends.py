"""scripts/demo.py on its way out: whatever ends it, nothing that it started or made is left."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(120)

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


def started_in(folder):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.fixture
def folder():
    """One with a short name, as sockets in it must have."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_of_it(folder, number, status):
    process = subprocess.Popen(
        [sys.executable, DEMO, "--size", "16", "--seconds", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    try:
        while "features" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert started_in(folder) == []
    finally:
        process.kill()
        for pid in started_in(folder):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "-5", "x"])
def test_a_size_that_is_none_is_refused(size):
    done = subprocess.run(
        [sys.executable, DEMO, "--size", size], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
