"""A file whose disk is as slow as a test wants: one file by FUSE, whose server is a thread of the test.

Protocol: <linux/fuse.h>, version 7.31. The mount's root is the file itself. Only root can mount it like this.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
import time

import pytest

GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, INIT = 3, 4, 14, 15, 16, 17, 18, 20, 26
_NO_ANSWER = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_BUFFER_BYTES = (1 << 20) + 4096
_ASYNC_READ, _BIG_WRITES = 1 << 0, 1 << 5
_MNT_DETACH = 2


class SlowFile:
    """`data` is what the file has, at `path`. `hold(operation, offset)`: whether that is answered only by `release`.

    fsync_errors: what the next fsyncs end with, one each (errno).
    """

    def __init__(self, path, data):
        self.path, self.data = path, bytearray(data)
        self.hold = lambda operation, offset: False
        self.held = []  # (operation, offset, what answers it)
        self.fsync_errors = []
        self.asked = []  # (operation, offset, bytes) of every read and write
        self._lock = threading.Lock()
        path.write_bytes(b"")
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode={stat.S_IFREG | 0o644:o},user_id=0,group_id=0,max_read={1 << 20}"
        self._libc = ctypes.CDLL(None, use_errno=True)
        if self._libc.mount(b"slow", os.fsencode(path), b"fuse", ctypes.c_ulong(0), options.encode()):
            code = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(code, os.strerror(code))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        # Linux asks for no FLUSH any more when one was refused. It comes with every close of a file, and a process
        # that is forked closes its files while its parent, which holds the interpreter's lock, waits for it.
        os.close(os.open(path, os.O_RDONLY))

    def close(self):
        self.hold = lambda operation, offset: False
        self.release()
        self._libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        self._thread.join(10)
        os.close(self._fd)

    def release(self):
        """Answer all that is held, and hold nothing any more."""
        with self._lock:
            self.hold = lambda operation, offset: False
            held, self.held = self.held, []
        for _, _, answer in held:
            answer()

    def wait_held(self, count, timeout_s=10):
        """Wait until so many are held."""
        deadline = time.monotonic() + timeout_s
        while len(self.held) < count:
            assert time.monotonic() < deadline, f"{len(self.held)} of {count} are held"
            time.sleep(0.005)

    def _serve(self):
        while True:
            try:
                message = os.read(self._fd, _BUFFER_BYTES)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # interrupted before we had it
                raise
            _, operation, unique, *_ = _IN.unpack_from(message)
            if operation not in _NO_ANSWER:
                self._take(operation, unique, message[_IN.size :])

    def _take(self, operation, unique, body):
        offset = 0
        if operation in (READ, WRITE):
            _, offset, size = struct.unpack_from("<QQI", body)
            self.asked.append((operation, offset, size))

        def answer():
            self._answer(unique, *self._do(operation, body))

        with self._lock:
            if self.hold(operation, offset):
                self.held.append((operation, offset, answer))
                return
        answer()

    def _answer(self, unique, error, body):
        with contextlib.suppress(FileNotFoundError):  # whoever asked has gone
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), -error, unique) + body)

    def _do(self, operation, body):
        """(errno or 0, payload of the answer)."""
        if operation == INIT:
            flags = _ASYNC_READ | _BIG_WRITES
            return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 4096, flags, 1024, 1024, 1 << 20, 1, 0, 0, 0)
        if operation in (GETATTR, SETATTR):
            size = len(self.data)
            times = (0,) * 6  # seconds, then nanoseconds
            attributes = _ATTR.pack(1, size, size // 512, *times, stat.S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0)
            return 0, struct.pack("<QII", 1000, 0, 0) + attributes
        if operation == OPEN:
            return 0, struct.pack("<QII", 1, 0, 0)
        if operation == STATFS:
            return 0, struct.pack("<5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 1, 1, 4096, 255, 4096, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, bytes(self.data[offset : offset + size])
        if operation == WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.data[offset : offset + size] = body[40 : 40 + size]
            return 0, struct.pack("<II", size, 0)
        if operation == FSYNC and self.fsync_errors:
            return self.fsync_errors.pop(0), b""
        if operation in (FSYNC, RELEASE):
            return 0, b""
        return errno.ENOSYS, b""


@contextlib.contextmanager
def slow_file(path, data):
    """A SlowFile; the test is skipped where there cannot be one."""
    try:
        file = SlowFile(path, data)
    except OSError as error:
        pytest.skip(f"no file by FUSE here: {error}")
    try:
        yield file
    finally:
        file.close()
