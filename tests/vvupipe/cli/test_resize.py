"""`vvupipe device resize`, with a process in place of a back-end."""

import os
import subprocess
import sys

import pytest

BACK_END = """
import signal, sys

signal.signal(signal.SIGUSR1, lambda *_: print("resize", flush=True))
file = open(sys.argv[-1])
print("open", flush=True)
sys.stdin.read()
"""
MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def start(tmp_path, image):
    """Start what looks like a back-end that has the image open."""
    running = []

    def start(text=BACK_END):
        program = tmp_path / "vvupipe"
        program.write_text(text)
        command = [sys.executable, program, "device", "block", "--file", image]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in running:
        process.communicate(timeout=10)


def resize(*arguments):
    command = [sys.executable, "-m", "vvupipe", "device", "resize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)


def assert_refused(finished, *words):
    assert finished.returncode == 2, finished
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    for word in words:
        assert word in line


def test_larger(start, image):
    back_end = start()
    finished = resize(image, "2M")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"back-end {back_end.pid}: told that {image} has 2 MiB (2097152 bytes)\n"
    assert back_end.stdout.readline() == "resize\n"
    assert image.stat().st_size == 2 * MIB


def test_every_back_end_is_told(start, image):
    back_ends = [start(), start()]
    finished = resize(image, "2M")
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[1] for line in finished.stdout.splitlines()] == [f"{each.pid}:" for each in back_ends]
    assert [each.stdout.readline() for each in back_ends] == ["resize\n"] * 2


def test_resized_already(start, image):
    back_end = start()
    os.truncate(image, 3 * MIB)
    finished = resize(image)
    assert finished.returncode == 0, finished.stderr
    assert "3 MiB" in finished.stdout
    assert back_end.stdout.readline() == "resize\n"


def test_smaller_only_when_asked_for(start, image):
    back_end = start()
    assert_refused(resize(image, "512k"), "--shrink", "1 MiB")
    assert image.stat().st_size == MIB
    assert resize("--shrink", image, "512k").returncode == 0
    assert image.stat().st_size == MIB // 2
    assert back_end.stdout.readline() == "resize\n"


def test_nobody_serves_it(image):
    assert_refused(resize(image, "2M"), "no back-end", "vvupipe device block")
    assert_refused(resize(image), "no back-end")
    assert image.stat().st_size == MIB


def test_back_end_that_the_signal_would_end(start, image):
    back_end = start(BACK_END.replace("signal.signal", "(lambda *_: None)"))
    assert_refused(resize(image, "2M"), str(back_end.pid), "start it again")
    assert image.stat().st_size == MIB
    assert back_end.poll() is None


@pytest.mark.parametrize(("size", "word"), [("1000001", "multiple of 512"), ("0", "not 0"), ("big", "not a size")])
def test_sizes_that_are_none(start, image, size, word):
    start()
    assert_refused(resize(image, size), word)
    assert image.stat().st_size == MIB


def test_what_has_no_size(tmp_path, image):
    assert_refused(resize(tmp_path / "no.img", "2M"), "no such image")
    assert_refused(resize(tmp_path, "2M"), "cannot be opened")
    assert_refused(resize("/dev/null", "2M"), "not a regular file")
    os.mkfifo(tmp_path / "fifo")
    assert_refused(resize(tmp_path / "fifo", "2M"), "not a regular file")


def test_block_device_has_its_own_tools():
    if os.getuid() or not os.path.exists("/dev/loop0"):
        pytest.skip("needs root and a block device")
    assert_refused(resize("/dev/loop0", "2M"), "block device", "leave SIZE out")


def test_size_that_the_file_system_refuses(start, image):
    start()
    assert_refused(resize(image, str((1 << 63) - 512)), "cannot be given")
    assert image.stat().st_size == MIB
