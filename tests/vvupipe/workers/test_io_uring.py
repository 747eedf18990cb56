"""Setting rings up, and the words for why that is refused."""

import ctypes
import errno
import mmap
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from kernels import uring_layout as layout
from vvupipe.workers import io_uring, io_uring_calls
from vvupipe.workers.io_uring import IoUring, available

needs_io_uring = pytest.mark.skipif(available() is not None, reason=f"io_uring: {available()}")


def refuse(monkeypatch, code, numbers=(layout.SYS_IO_URING_SETUP,)):
    """Have io_uring_setup (or others) fail with `code`, as the kernel's own answer."""
    real = io_uring_calls.system_call

    def system_call(number, *arguments):
        if number in numbers:
            raise OSError(code, os.strerror(code))
        return real(number, *arguments)

    monkeypatch.setattr(io_uring_calls, "system_call", system_call)


def open_fds():
    return set(os.listdir("/proc/self/fd"))


@needs_io_uring
@pytest.mark.parametrize(("entries", "size"), [(1, 1), (2, 2), (5, 8), (256, 256), (32768, 32768)])
def test_ring_has_the_room_that_was_asked_for(entries, size):
    with IoUring.open(entries) as ring:
        record = ring.record[0]
        assert (record["sq_entries"], record["sq_mask"]) == (size, size - 1)
        assert (record["cq_entries"], record["cq_mask"]) == (2 * size, 2 * size - 1)
        assert record["fd"] == ring.fd >= 0
        assert record["fixed_file"] == record["queued"] == record["in_flight"] == 0
        assert ctypes.c_uint32.from_address(int(record["cq_flags"])).value == layout.CQ_EVENTFD_DISABLED


@pytest.mark.parametrize("entries", [0, -1, 32769])
def test_impossible_sizes(entries):
    with pytest.raises(ValueError, match="1 to 32768"):
        IoUring.open(entries)


@needs_io_uring
def test_closing_leaves_nothing():
    with open("/proc/self/maps") as maps:
        before = open_fds(), sum("io_uring" in line for line in maps)
    ring = IoUring.open(8)
    with open("/proc/self/maps") as maps:
        assert sum("io_uring" in line for line in maps) > before[1]
    ring.close()
    ring.close()
    assert ring.record["fd"][0] == ring.record["event_fd"][0] == -1
    with open("/proc/self/maps") as maps:
        assert (open_fds(), sum("io_uring" in line for line in maps)) == before


@needs_io_uring
@pytest.mark.parametrize(("sqpoll", "modes"), [(False, io_uring.MODES), (True, io_uring.SQPOLL_MODES)])
def test_older_kernels_get_what_they_know(monkeypatch, sqpoll, modes):
    """A kernel that answers EINVAL to flags of the first ways gets the next."""
    real = io_uring_calls.set_up
    tried = []

    def set_up(entries, parameters):
        flags = int(parameters[0]["flags"]) & ~layout.SETUP_CQSIZE
        tried.append(flags)
        if flags != modes[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(entries, parameters)

    monkeypatch.setattr(io_uring_calls, "set_up", set_up)
    with IoUring.open(8, sqpoll=sqpoll) as ring:
        assert tried == list(modes)
        assert ring.record["setup_flags"][0] & ~layout.SETUP_CQSIZE == modes[-1]


@needs_io_uring
def test_two_mappings_of_older_kernels(monkeypatch, tmp_path):
    """Without IORING_FEAT_SINGLE_MMAP (before 5.4) SQ and CQ are mapped apart; kernels still allow that."""
    from kernels import uring
    from tests.kernels.uring_jobs import Memory, finish, iovec, push_rw

    real = io_uring_calls.set_up

    def set_up(entries, parameters):
        fd = real(entries, parameters)
        parameters["features"] &= ~np.uint32(layout.FEAT_SINGLE_MMAP)
        return fd

    monkeypatch.setattr(io_uring_calls, "set_up", set_up)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    memory = Memory(mmap.PAGESIZE)
    with IoUring.open(8) as ring, open(path, "rb") as file:
        assert len(ring._mappings) == 3
        for turn in range(20):
            assert push_rw(ring, False, file.fileno(), iovec((memory.address, 10)), 0, turn)
            assert finish(ring) == [(turn, 10)]
        assert uring.ready(ring.record[0]) == 0
    assert memory[:10] == b"0123456789"


@needs_io_uring
def test_failing_half_way_leaves_nothing(monkeypatch):
    before = open_fds()
    refuse(monkeypatch, errno.ENOMEM, [layout.SYS_IO_URING_REGISTER])
    with pytest.raises(OSError, match="locked memory"):
        IoUring.open(8)
    assert open_fds() == before


@needs_io_uring
def test_large_ranges_are_cut_in_pieces(monkeypatch):
    tables = []
    monkeypatch.setattr(
        io_uring_calls,
        "register",
        lambda fd, operation, table, count: tables.append((operation, None if table is None else table.tolist())),
    )
    gib = 1 << 30
    with IoUring.open(8) as ring:
        tables.clear()
        table = ring.register_buffers([(gib, 2 * gib + 4096), (8 * gib, 4096), (9 * gib, gib)])
        pieces = [[gib, gib], [2 * gib, gib], [3 * gib, 4096], [8 * gib, 4096], [9 * gib, gib]]
        assert table.tolist() == pieces
        assert tables == [(layout.REGISTER_BUFFERS, pieces)]
        ring.unregister_buffers()
        ring.unregister_buffers()
        assert tables[1:] == [(layout.UNREGISTER_BUFFERS, None)]
        with pytest.raises(OSError, match="16384"):
            ring.register_buffers([(k * 8192, 4096) for k in range(16385)])


@needs_io_uring
def test_registering_again_replaces():
    first, second = mmap.mmap(-1, 8192), mmap.mmap(-1, 8192)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (first, second)]
    with IoUring.open(8) as ring, open("/dev/null") as one, open("/dev/zero") as other:
        for address in addresses:
            assert ring.register_buffers([(address, 8192)]).tolist() == [[address, 8192]]
        assert ring.register_buffers([]).shape == (0, 2)
        ring.register_file(one.fileno())
        ring.register_file(other.fileno())
        assert ring.record["fixed_file"][0] == 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            ring.register_file(1_000_000)
        assert ring.record["fixed_file"][0] == 0


@needs_io_uring
def test_memory_that_is_not_there_cannot_be_registered():
    with IoUring.open(8) as ring:
        with pytest.raises(OSError, match="cannot be registered with io_uring") as caught:
            ring.register_buffers([(mmap.PAGESIZE, mmap.PAGESIZE)])
        assert caught.value.errno == errno.EFAULT
        ring.unregister_buffers()


def test_this_machine_has_it_or_says_why():
    words = available()
    assert words is None or words.strip()


@pytest.mark.parametrize(
    ("code", "switch", "seccomp", "words"),
    [
        (errno.ENOSYS, None, False, "this kernel has none"),
        (errno.ENOSYS, None, True, "this kernel has none, or seccomp hides it"),
        (errno.EPERM, "2\n", True, "io_uring is switched off (kernel.io_uring_disabled)"),
        (errno.EPERM, "1\n", False, "io_uring is switched off (kernel.io_uring_disabled)"),
        (errno.EPERM, "0\n", True, "blocked by seccomp (as in Docker)"),
        (errno.EPERM, None, True, "blocked by seccomp (as in Docker)"),
        (errno.EPERM, "0\n", False, "this kernel forbids it (a security module?)"),
        (errno.EACCES, "0\n", False, "this kernel forbids it (a security module?)"),
        (errno.ENOMEM, "0\n", False, "no memory for it (raise the limit of locked memory, ulimit -l)"),
        (errno.EMFILE, "0\n", False, "Too many open files"),
    ],
)
def test_words_for_a_refusal(monkeypatch, tmp_path, code, switch, seccomp, words):
    if switch is not None:
        (tmp_path / "switch").write_text(switch)
    monkeypatch.setattr(io_uring_calls, "_DISABLED", tmp_path / "switch")
    monkeypatch.setattr(io_uring_calls, "_seccomp_filters", lambda: seccomp)
    refuse(monkeypatch, code)
    assert available() == words
    with pytest.raises(OSError, match="io_uring cannot be used: ") as caught:
        IoUring.open(8)
    assert caught.value.errno == code
    assert words in str(caught.value)


@needs_io_uring
def test_a_kernel_that_lacks_operations(monkeypatch):
    real = io_uring_calls.register

    def register(fd, operation, table, count):
        result = real(fd, operation, table, count)
        if operation == layout.REGISTER_PROBE:
            for opcode in (layout.OP_READ, layout.OP_FSYNC):
                table[0]["ops"]["flags"][opcode] = 0
        return result

    monkeypatch.setattr(io_uring_calls, "register", register)
    assert available() == "this kernel is too old (it has no READ, FSYNC)"


_SECCOMP_CHILD = """
    import ctypes, struct, sys
    libc = ctypes.CDLL(None, use_errno=True)
    program = bytes.fromhex(sys.argv[1])
    code = ctypes.create_string_buffer(program, len(program))
    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    fprog = Program(len(program) // 8, ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, 2, ctypes.byref(fprog), 0, 0) == 0, "PR_SET_SECCOMP"
    from vvupipe.workers.io_uring import available
    print(available())
"""


@needs_io_uring
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EPERM, "blocked by seccomp (as in Docker)"),
        (errno.ENOSYS, "this kernel has none, or seccomp hides it"),
    ],
)
def test_a_process_under_a_seccomp_filter(code, words):
    """A filter as container engines have it: the three system calls fail with `code` (seccomp(2))."""
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    numbers = (layout.SYS_IO_URING_SETUP, layout.SYS_IO_URING_ENTER, layout.SYS_IO_URING_REGISTER)
    lines = [(load, 0, 0, 0)]  # seccomp_data.nr
    lines += [(jump_if_equal, len(numbers) - k, 0, number) for k, number in enumerate(numbers)]
    lines += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | code)]  # ALLOW, ERRNO
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SECCOMP_CHILD), program.hex()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (words, "")


@needs_io_uring
def test_limit_of_locked_memory():
    """As an ordinary user; root may lock what it likes."""
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    child = """
        import ctypes, mmap, os, resource
        from vvupipe.workers.io_uring import IoUring
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
        os.setuid(54321)
        area = mmap.mmap(-1, 1 << 20)
        ring = IoUring.open(8)
        try:
            ring.register_buffers([(ctypes.addressof(ctypes.c_char.from_buffer(area)), 1 << 20)])
        except OSError as error:
            print(error.errno, error.strerror)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(child)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"{errno.ENOMEM} memory cannot be registered with io_uring: ")


def test_loads_without_numba():
    """The coordinator asks whether io_uring is there; it compiles nothing."""
    code = "import sys, vvupipe.workers.io_uring; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
