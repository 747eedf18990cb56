"""Locks on images, against QEMU's own tools."""

import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from vvupipe.devices.block import image_lock
from vvupipe.devices.block.image_lock import lock
from vvupipe.errors import UserError

needs_qemu_io = pytest.mark.skipif(
    not (shutil.which("qemu-io") or os.environ.get("VVUPIPE_FULL_TESTS")), reason="qemu-utils is not installed"
)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@contextmanager
def opened(path, *, read_only=False):
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(path, *, read_only=False):
    with opened(path, read_only=read_only) as fd:
        lock(fd, path, read_only=read_only, patience_s=0)
        yield fd


@pytest.fixture
def qcow2(tmp_path):
    """A reader of raw images, as QEMU has it, lets others write; a reader of a format with metadata does not."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True, timeout=20)
    return path


def qemu_io(path, *options, command="write 0 512", kind="raw"):
    arguments = ["qemu-io", "-f", kind, *options, "-c", command, path]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)


@contextmanager
def qemu_io_open(path, *options, kind="raw"):
    """qemu-io with the image open, which waits for commands."""
    process = subprocess.Popen(
        ["qemu-io", "-f", kind, *options, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield process
    finally:
        process.communicate("quit\n", timeout=20)


def assert_in_use(path, words, *, read_only=False):
    with opened(path, read_only=read_only) as fd, pytest.raises(UserError, match=words) as caught:
        lock(fd, path, read_only=read_only, patience_s=0)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@needs_qemu_io
def test_qemu_may_not_touch_what_we_write(image):
    with locked(image):
        assert 'Failed to get "write" lock' in qemu_io(image).stderr
        resize = ["qemu-img", "resize", "-q", "-f", "raw", image, "2M"]
        assert "lock" in subprocess.run(resize, capture_output=True, text=True, timeout=20, check=False).stderr
        assert image.read_bytes() == bytes(1 << 20)
    assert qemu_io(image).returncode == 0


@needs_qemu_io
def test_qemu_may_not_trust_metadata_that_we_could_change(qcow2):
    with locked(qcow2):
        assert 'Failed to get shared "write" lock' in qemu_io(qcow2, "-r", command="read 0 512", kind="qcow2").stderr


@needs_qemu_io
def test_qemu_may_read_what_we_read(image):
    with locked(image, read_only=True):
        assert "lock" in qemu_io(image).stderr
        assert qemu_io(image, "-r", command="read 0 512").returncode == 0


@needs_qemu_io
def test_we_may_not_touch_what_qemu_writes(image):
    with qemu_io_open(image):
        assert_in_use(image, r"for writing.*--no-lock")
        assert_in_use(image, r"for writing", read_only=True)
    with locked(image):
        pass


@needs_qemu_io
def test_we_may_only_read_what_qemu_reads(qcow2):
    with qemu_io_open(qcow2, "-r", kind="qcow2"):
        assert_in_use(qcow2, "for reading")
        with locked(qcow2, read_only=True):
            pass


@pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed")
def test_storage_daemon_has_it(image, tmp_path):
    pid_file = tmp_path / "pid"
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", f"file,node-name=disk,filename={image}",
         "--export", f"vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={tmp_path}/s",
         "--pidfile", pid_file]
    )  # fmt: skip
    try:
        while not pid_file.exists() and daemon.poll() is None:
            time.sleep(0.02)
        assert_in_use(image, "for writing")
    finally:
        daemon.terminate()
        daemon.wait(20)
    with locked(image):
        pass


def test_readers_coexist_and_keep_writers_out(image):
    with locked(image, read_only=True), locked(image, read_only=True):
        assert_in_use(image, "for reading")


def test_writers_exclude_each_other(image):
    with locked(image):
        assert_in_use(image, "for writing")


def test_who_was_refused_holds_nothing(image):
    with opened(image) as refused:
        with locked(image, read_only=True), pytest.raises(UserError):
            lock(refused, image, read_only=False, patience_s=0)
        with locked(image):
            pass


def test_lock_lives_as_long_as_the_last_copy(image):
    with locked(image) as fd:
        copy = os.dup(fd)
    assert_in_use(image, "for writing")
    os.close(copy)
    with locked(image):
        pass


def test_lock_outlives_other_openings_of_the_file(image):
    with locked(image):
        image.read_bytes()
        assert_in_use(image, "for writing")


def test_patience(image):
    holder = os.open(image, os.O_RDWR)
    lock(holder, image, read_only=False)
    threading.Timer(0.3, os.close, [holder]).start()
    with opened(image) as fd:
        started = time.monotonic()
        lock(fd, image, read_only=False, patience_s=10)
        assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_without_locks(image, monkeypatch, caplog, number):
    def refuse(*_arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with opened(image) as fd:
        lock(fd, image, read_only=False)
    assert "cannot be locked" in caplog.text


def test_other_errors_are_not_hidden(image):
    with opened(image) as fd:
        copy = os.dup(fd)
    os.close(copy)
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock(copy, image, read_only=False)


def test_bytes_are_those_of_qemu():
    assert sorted(image_lock._WRITER.own_bytes()) == [100, 101, 103, 201, 203]
    assert sorted(image_lock._WRITER.opposite_bytes()) == [101, 103, 200, 201, 203]
    assert sorted(image_lock._READER.own_bytes()) == [100, 201, 203]
    assert sorted(image_lock._READER.opposite_bytes()) == [101, 103, 200]
