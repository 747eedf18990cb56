"""How a QEMU sibling begins and ends: waiting for its back-end, signals, panics; nothing may be left behind."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from backends import BACKENDS
from guest_kit import ENTRY, ROOT, Guest, boot_guest, initramfs

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


@pytest.fixture
def private_folders(tmp_path):
    """Environment in which every temporary or run-time file of a process shows up in `folders`."""
    folders = [tmp_path / "tmp", tmp_path / "run"]
    for folder in folders:
        folder.mkdir(mode=0o700)
    yield {"TMPDIR": str(folders[0]), "XDG_RUNTIME_DIR": str(folders[1])}
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def qemu_of(guest):
    """The QEMU process of a guest."""
    (child,) = psutil.Process(guest.process.pid).children(recursive=True)
    return child


def assert_gone(process, timeout_s=5):
    """psutil knows a process by its start time, so that a reused number does not count."""
    deadline = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything(qemu, tmp_path, private_folders, number):
    with Guest(tmp_path, [], "echo sleeping; sleep 1000", env=private_folders) as guest:
        guest.wait_for("sleeping")
        process = qemu_of(guest)
        guest.process.send_signal(number)
        end = guest.wait(10)
        assert end.status == 1, end
        assert "Traceback" not in end.said, end
        assert_gone(process, 0.5)


def test_ctrl_c_reaches_both_at_once(qemu, tmp_path, private_folders):
    with Guest(tmp_path, [], "echo sleeping; sleep 1000", env=private_folders) as guest:
        guest.wait_for("sleeping")
        process = qemu_of(guest)
        os.killpg(guest.process.pid, signal.SIGINT)
        end = guest.wait(10)
        assert end.status == 1, end
        assert "Traceback" not in end.said, end
        assert_gone(process, 0.5)


def test_what_qemu_refuses_is_shown(qemu, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with BACKENDS["storage-daemon"](image, tmp_path) as backend:
        end = boot_guest(tmp_path, [{"socket_path": backend.socket, "num_queues": backend.queues + 1}])
    assert end.status == 1, end
    assert "maximum number of queues" in end.said, end
    assert "QEMU ended with status 1" in end.said


def test_kill_9_takes_qemu_along(qemu, tmp_path, private_folders):
    with Guest(tmp_path, [], "echo sleeping; sleep 1000", env=private_folders) as guest:
        guest.wait_for("sleeping")
        process = qemu_of(guest)
        guest.process.kill()
        assert_gone(process)


def test_kill_9_of_qemu_is_told(qemu, tmp_path):
    with Guest(tmp_path, [], "echo sleeping; sleep 1000") as guest:
        guest.wait_for("sleeping")
        qemu_of(guest).kill()
        end = guest.wait(10)
    assert end.status == 1
    assert "QEMU ended with signal 9" in end.said


def test_waits_for_its_backend_and_goes_on(qemu, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * (1 << 20))
    factory = BACKENDS["storage-daemon"]
    with Guest(tmp_path, [tmp_path / "qsd.sock"], "head -c 4 /dev/vda; echo", timeout_s=60) as guest:
        guest.wait_for(f"waiting for a back-end at {tmp_path}/qsd.sock", 20, "err")
        with factory(image, tmp_path):
            end = guest.wait()
    assert (end.status, end.script_status) == (0, 0), end
    assert "xxxx" in end.console
    assert end.said.count("waiting for a back-end") == 1


def test_a_dead_socket_file_is_no_backend(qemu, tmp_path):
    path = tmp_path / "left-behind.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with Guest(tmp_path, [path], timeout_s=1) as guest:
        end = guest.wait(20)
    assert end.status == 2, end
    assert end.said.splitlines()[-1].startswith(f"Error: no back-end at {path} after 1 s: start one")


def test_a_signal_ends_the_wait_for_a_backend(qemu, tmp_path, private_folders):
    with Guest(tmp_path, [tmp_path / "none.sock"], env=private_folders) as guest:
        guest.wait_for("waiting", 20, "err")
        guest.process.terminate()
        assert guest.wait(5).status == 1


@pytest.fixture
def mute(tmp_path):
    """A back-end that takes the connection and never answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "mute.sock"))
        sock.listen()
        yield tmp_path / "mute.sock"


def test_a_mute_backend_ends_in_one_line(qemu, tmp_path, mute):
    with Guest(tmp_path, [mute], timeout_s=4) as guest:
        end = guest.wait(20)
    assert end.status == 2, end
    assert f"waiting for an answer of the back-end at {mute}" in end.said
    assert "did not answer within 4 s" in end.said.splitlines()[-1]


def test_a_signal_ends_a_qemu_that_waits_for_an_answer(qemu, tmp_path, mute, private_folders):
    with Guest(tmp_path, [mute], env=private_folders) as guest:
        guest.wait_for("waiting for an answer", 20, "err")
        process = qemu_of(guest)
        guest.process.terminate()
        assert guest.wait(5).status == 1
        assert_gone(process, 0.5)


def test_a_panic_and_a_reset_are_not_a_power_off(qemu, tmp_path):
    end = boot_guest(tmp_path, [], "echo c >/proc/sysrq-trigger")
    assert end.status == 1, end
    assert "the guest's kernel panicked" in end.said
    end = boot_guest(tmp_path, [], "reboot -f")
    assert end.status == 1, end
    assert "the guest asked for a reset" in end.said


def test_without_qemu_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ENTRY), '{"vhost_user_blk": []}'],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "qemu-system-x86_64 is not installed: install the package qemu-system-x86" in line
    assert done.stdout == ""


def test_the_script_comes_by_kernel_parameter_too(qemu, tmp_path):
    script = "echo 'from the command line'; exit 3"
    end = boot_guest(tmp_path, [], params=["quiet", initramfs.script_parameter(script)])
    assert end.status == 0, end
    assert end.script_status == 3
    assert "from the command line" in end.console
