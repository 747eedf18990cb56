"""Standard streams that are closed, full, or of an encoding that lacks characters: no traceback, no mixed-up output."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)


def shell(folder, line, **environment):
    """The finished `line` of a shell, in which $V is vvupipe."""
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=40, check=False,
        stdin=subprocess.DEVNULL, cwd=folder,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder), "V": f"{sys.executable} -P -m vvupipe", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", ["run --vvu-proxy s", "trace s", "run --vhost-user-blk s"])
@pytest.mark.parametrize(("nohup", "ends"), [("", True), ("nohup", False)])
def test_nohup_keeps_it_when_its_terminal_goes(tmp_path, command, nohup, ends):
    process = subprocess.Popen(
        [*nohup.split(), sys.executable, "-P", "-m", "vvupipe", *command.split()], cwd=tmp_path,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert process.stdout.readline()
        time.sleep(0.5 if command.startswith("run --vhost") else 0)  # it says that it waits, not that it is ready
        process.send_signal(signal.SIGHUP)
        if ends:
            assert process.wait(20) >= 0
            assert not (tmp_path / "s.trace").exists()
        else:
            time.sleep(0.5)
            assert process.poll() is None
            process.terminate()
            assert process.wait(20) >= 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("arguments", ["--help", "device list", "run --help"])
def test_output_that_finds_no_room_is_one_line(tmp_path, arguments):
    finished = shell(tmp_path, f"$V {arguments} >/dev/full")
    assert (finished.returncode, finished.stderr) == (1, "vvupipe: No space left on device\n")


def test_nobody_reads_any_more(tmp_path):
    finished = shell(tmp_path, "{ $V --help; echo $? >status; } | true")
    assert (finished.stderr, (tmp_path / "status").read_text()) == ("", "1\n")


@pytest.mark.parametrize("streams", ["2>&-", "2>&- <&-"])
def test_lines_for_people_never_get_into_the_output(tmp_path, streams):
    finished = shell(tmp_path, f"$V run --vhost-user-blk none.sock --timeout 0.2 --json {streams}")
    assert (finished.returncode, finished.stdout) == (2, "")


def test_a_trace_that_goes_nowhere(tmp_path):
    finished = shell(tmp_path, "timeout 3 $V trace b.sock >&-")
    assert "Traceback" not in finished.stderr
    assert finished.stderr.startswith("vvupipe trace: tracing b.sock")


@pytest.mark.parametrize(
    ("sink", "environment"),
    [("/dev/full", {}), ("log", {"PYTHONIOENCODING": "ascii"}), ("log", {"PYTHONIOENCODING": "utf-8"})],
)
def test_a_service_goes_on_whatever_its_output_is(tmp_path, sink, environment):
    name = os.fsdecode(b"s\xc3\xb6ck-\xff")
    with open(sink if sink.startswith("/") else tmp_path / sink, "wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vvupipe", "run", "--vvu-proxy", name],
            cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), **environment},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 20
            while not (tmp_path / name).exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    if sink == "log":
        written = (tmp_path / "log").read_bytes()
        assert (b"s\xc3\xb6ck-\xff" if environment["PYTHONIOENCODING"] == "utf-8" else b"s\\xf6ck-") in written
