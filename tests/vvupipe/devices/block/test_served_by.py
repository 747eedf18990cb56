"""Back-ends are known by their command line and by the file that they have open."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from vvupipe.devices.block import served_by

BACK_ENDS = [
    "python3 /usr/bin/vvupipe device block --file d",
    "/opt/venv/bin/python3.11 -m vvupipe device block --file d",
    "python -P -X importtime -W error -m vvupipe device block",
    "/usr/bin/python3 /usr/local/bin/vvupipe-block --blk-file=d",
]
OTHERS = [
    "",
    "python3",
    "python3 -m",
    "python3 -m vvupipe",
    "python3 -m vvupipe run --vvu-proxy s",
    "python3 -m vvupipe device resize device block",
    "python3 -m vvupipe.devices.block.worker device block",
    "python3 -m pytest vvupipe device block",
    "python3 -c vvupipe-block device block",
    "python3 edit.py vvupipe device block",
    "vim vvupipe-block",
    "qemu-io -m vvupipe device block",
]


@pytest.mark.parametrize("line", BACK_ENDS)
def test_command_lines_of_back_ends(line):
    assert served_by._is_block_back_end(line.split())


@pytest.mark.parametrize("line", OTHERS)
def test_command_lines_of_others(line):
    assert not served_by._is_block_back_end(line.split())


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def start():
    """Start a process that opens a file and waits."""
    running = []

    def start(program, *arguments, image):
        program.write_text("import sys\nfile = open(sys.argv[-1])\nprint('open', flush=True)\nsys.stdin.read()\n")
        command = [sys.executable, program, *arguments, image]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in running:
        process.communicate(timeout=10)


def found(path):
    return [process.pid for process in served_by.back_ends(os.stat(path))]


def test_who_serves_a_file(image, start, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    first = start(tmp_path / "vvupipe", "device", "block", "--file", image=image)
    start(tmp_path / "vvupipe", "device", "list", image=image)
    start(tmp_path / "something", "device", "block", image=image)
    assert found(image) == [first.pid]
    second = start(tmp_path / "vvupipe-block", "--blk-file", image=other)
    (tmp_path / "link").hardlink_to(other)
    assert found(tmp_path / "link") == [second.pid]


def test_nobody(image):
    assert found(image) == []


def test_signal_that_would_end_the_process(image, start, tmp_path):
    process = start(tmp_path / "vvupipe-block", image=image)
    assert not served_by.takes_signal(psutil.Process(process.pid), signal.SIGUSR1)
    assert served_by.takes_signal(psutil.Process(process.pid), signal.SIGINT)


def test_same_device_behind_two_nodes(tmp_path):
    if os.getuid() or not os.path.exists("/dev/loop0"):
        pytest.skip("needs root and a block device")
    node = tmp_path / "node"
    os.mknod(node, os.stat("/dev/loop0").st_mode, os.stat("/dev/loop0").st_rdev)
    assert served_by._identity(node.stat()) == served_by._identity(os.stat("/dev/loop0"))
