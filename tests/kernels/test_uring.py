"""io_uring from kernels, on real files, in every way that this kernel can set a ring up."""

import contextlib
import ctypes
import errno
import itertools
import os
import random
import select
import threading
import time

import numpy as np
import pytest

from kernels import uring
from kernels import uring_layout as layout
from tests.kernels.others import needs_io_uring
from tests.kernels.uring_jobs import (
    AS_IF_POLLED,
    EVERY_MODE,
    Memory,
    finish,
    iovec,
    open_ring,
    push_rw,
    read_blocks,
    reap,
)
from vvupipe.workers.io_uring import IoUring

pytestmark = [pytest.mark.timeout(120), needs_io_uring]

_BLOCK = 4096
_BLOCKS = 64
_RWF_UNKNOWN = 0x4000_0000
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def sleeper(ring):
    poll = select.poll()
    poll.register(int(ring.record[0]["event_fd"]), select.POLLIN)
    return poll


def drain(ring):
    with contextlib.suppress(BlockingIOError):
        os.read(int(ring.record[0]["event_fd"]), 8)


@pytest.fixture(params=EVERY_MODE)
def ring(request):
    try:
        opened = open_ring(request.param)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip(f"this kernel is too old for {request.param}")
    with opened:
        yield opened


@pytest.fixture(params=["buffered", "direct"])
def image(request, tmp_path):
    """(fd, its bytes)"""
    data = random.Random(5).randbytes(_BLOCK * _BLOCKS)
    path = tmp_path / "image"
    path.write_bytes(data)
    try:
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if request.param == "direct" else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    yield fd, data, path
    os.close(fd)


def test_reads_what_is_there(ring, image):
    fd, data, _ = image
    memory = Memory(4 * _BLOCK)
    for k, block in enumerate((7, 0, 63, 12)):
        assert push_rw(ring, False, fd, iovec((memory.address + k * _BLOCK, _BLOCK)), block * _BLOCK, block)
    assert sorted(finish(ring)) == [(0, _BLOCK), (7, _BLOCK), (12, _BLOCK), (63, _BLOCK)]
    for k, block in enumerate((7, 0, 63, 12)):
        assert memory[k * _BLOCK : (k + 1) * _BLOCK] == data[block * _BLOCK : (block + 1) * _BLOCK]


def test_writes_arrive_and_nothing_else_changes(ring, image):
    fd, data, path = image
    memory = Memory(2 * _BLOCK)
    memory[:] = b"a" * _BLOCK + b"b" * _BLOCK
    assert push_rw(ring, True, fd, iovec((memory.address, _BLOCK)), 3 * _BLOCK, 1)
    assert push_rw(ring, True, fd, iovec((memory.address + _BLOCK, _BLOCK)), 9 * _BLOCK, 2)
    assert sorted(finish(ring)) == [(1, _BLOCK), (2, _BLOCK)]
    expected = bytearray(data)
    expected[3 * _BLOCK : 4 * _BLOCK] = b"a" * _BLOCK
    expected[9 * _BLOCK : 10 * _BLOCK] = b"b" * _BLOCK
    assert path.read_bytes() == expected


def test_several_segments(ring, image):
    fd, data, path = image
    memory = Memory(8 * _BLOCK)
    order = [5, 1, 6]
    read = iovec(*((memory.address + k * _BLOCK, _BLOCK) for k in order))
    assert push_rw(ring, False, fd, read, 20 * _BLOCK, 1)
    assert finish(ring) == [(1, 3 * _BLOCK)]
    for place, k in enumerate(order):
        start = (20 + place) * _BLOCK
        assert memory[k * _BLOCK : (k + 1) * _BLOCK] == data[start : start + _BLOCK]
    write = iovec((memory.address + 6 * _BLOCK, _BLOCK), (memory.address + 5 * _BLOCK, _BLOCK))
    assert push_rw(ring, True, fd, write, 40 * _BLOCK, 2)
    assert finish(ring) == [(2, 2 * _BLOCK)]
    written = path.read_bytes()
    assert written[40 * _BLOCK : 41 * _BLOCK] == data[22 * _BLOCK : 23 * _BLOCK]
    assert written[41 * _BLOCK : 42 * _BLOCK] == data[20 * _BLOCK : 21 * _BLOCK]


def test_one_segment_moves_no_more_than_the_length(ring, image):
    fd, data, _ = image
    memory = Memory(2 * _BLOCK)
    vector = iovec((memory.address, 2 * _BLOCK))
    assert uring.push_rw(ring.record[0], False, fd, vector.ctypes.data, 1, _BLOCK, 0, 0, -1, 1)
    assert finish(ring) == [(1, _BLOCK)]
    assert memory[:] == data[:_BLOCK] + bytes(_BLOCK)


def test_registered_file_and_buffers(ring, image):
    fd, data, path = image
    first, second = Memory(4 * _BLOCK), Memory(4 * _BLOCK)
    table = ring.register_buffers([(first.address, 4 * _BLOCK), (second.address, 4 * _BLOCK)])
    assert table.tolist() == [[first.address, 4 * _BLOCK], [second.address, 4 * _BLOCK]]
    ring.register_file(fd)
    wrong_fd = -1  # shows that the registered one is used
    inside = second.address + 2 * _BLOCK
    assert push_rw(ring, False, wrong_fd, iovec((inside, _BLOCK)), 8 * _BLOCK, 1, buffer_index=1)
    assert finish(ring) == [(1, _BLOCK)]
    assert second[2 * _BLOCK : 3 * _BLOCK] == data[8 * _BLOCK : 9 * _BLOCK]
    assert push_rw(ring, True, wrong_fd, iovec((inside, _BLOCK)), 0, 2, buffer_index=1)
    assert uring.push_fsync(ring.record[0], wrong_fd, 3)
    both = iovec((first.address, _BLOCK), (first.address + 2 * _BLOCK, _BLOCK))
    assert push_rw(ring, False, wrong_fd, both, 4 * _BLOCK, 4)
    assert sorted(finish(ring)) == [(2, _BLOCK), (3, 0), (4, 2 * _BLOCK)]
    assert path.read_bytes()[:_BLOCK] == data[8 * _BLOCK : 9 * _BLOCK]


def test_a_request_outside_its_registered_buffer_fails(ring, image):
    fd, _, _ = image
    memory = Memory(4 * _BLOCK)
    ring.register_buffers([(memory.address, 2 * _BLOCK)])
    assert push_rw(ring, False, fd, iovec((memory.address + 2 * _BLOCK, _BLOCK)), 0, 1, buffer_index=0)
    assert finish(ring) == [(1, -errno.EFAULT)]
    ring.unregister_buffers()
    assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, 2, buffer_index=0)
    assert finish(ring) == [(2, -errno.EFAULT)]


def test_fsync(ring, image):
    fd, data, path = image
    memory = Memory(_BLOCK)
    memory[:] = b"x" * _BLOCK
    assert push_rw(ring, True, fd, iovec((memory.address, _BLOCK)), 0, 1)
    assert finish(ring) == [(1, _BLOCK)]
    assert uring.push_fsync(ring.record[0], fd, 2)
    assert finish(ring) == [(2, 0)]
    assert path.read_bytes() == b"x" * _BLOCK + data[_BLOCK:]


def test_errors_are_results(ring, image, tmp_path):
    fd, _, path = image
    memory = Memory(_BLOCK)
    vector = iovec((memory.address, _BLOCK))
    read_only = os.open(path, os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        assert push_rw(ring, False, 1_000_000, vector, 0, 1)
        assert push_rw(ring, True, read_only, vector, 0, 2)
        assert push_rw(ring, False, fd, iovec((8 * _BLOCK, _BLOCK)), 0, 3)
        assert push_rw(ring, False, fd, vector, 0, 4, rw_flags=_RWF_UNKNOWN)
        assert uring.push_fsync(ring.record[0], read_end, 5)
        assert push_rw(ring, False, fd, vector, _BLOCKS * _BLOCK, 7)
        assert push_rw(ring, False, fd, iovec(*[(memory.address, 1)] * 1025), 0, 8)
        codes = dict(finish(ring))
    finally:
        os.close(read_only)
        os.close(read_end)
        os.close(write_end)
    assert codes == {
        1: -errno.EBADF,
        2: -errno.EBADF,
        3: -errno.EFAULT,
        4: -errno.EOPNOTSUPP,
        5: -errno.EINVAL,
        7: 0,  # end of file
        8: -errno.EINVAL,
    }


def test_results_may_be_int32(ring):
    memory = Memory(_BLOCK)
    assert push_rw(ring, False, 1_000_000, iovec((memory.address, _BLOCK)), 0, 2**64 - 1)
    assert uring.submit(ring.record[0], 1) == 1
    user_datas, results = np.zeros(4, np.uint64), np.zeros(4, np.int32)
    assert uring.reap(ring.record[0], user_datas, results) == 1
    assert (int(user_datas[0]), int(results[0])) == (2**64 - 1, -errno.EBADF)


def test_a_full_submission_queue_refuses_and_recovers(ring, image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    vector = iovec((memory.address, _BLOCK))
    for k in range(8):
        assert push_rw(ring, False, fd, vector, 0, k)
    record = ring.record[0]
    assert not push_rw(ring, False, fd, vector, 0, 99)
    assert not uring.push_fsync(record, fd, 99)
    assert record["queued"] == 8
    assert sorted(finish(ring)) == [(k, _BLOCK) for k in range(8)]
    assert push_rw(ring, False, fd, vector, 0, 8)
    assert finish(ring) == [(8, _BLOCK)]


def test_completions_never_outnumber_the_completion_queue(ring, image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    vector = iovec((memory.address, _BLOCK))
    record = ring.record[0]
    pushed = 0
    deadline = time.monotonic() + 30
    while record["queued"] + record["in_flight"] < 16 and time.monotonic() < deadline:
        while push_rw(ring, False, fd, vector, 0, pushed):
            pushed += 1
        assert uring.submit(record, record["in_flight"]) >= 0
    assert pushed == 16
    assert not push_rw(ring, False, fd, vector, 0, 99)
    assert sorted(finish(ring)) == [(k, _BLOCK) for k in range(16)]
    assert ctypes.c_uint32.from_address(int(record["cq_overflow"])).value == 0
    assert ctypes.c_uint32.from_address(int(record["sq_dropped"])).value == 0


def test_reaping_takes_no_more_than_fits(ring, image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    for k in range(5):
        assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, k)
    assert uring.submit(ring.record[0], 5) == 5
    assert uring.ready(ring.record[0]) == 5
    found = [reap(ring, 2), reap(ring, 2), reap(ring, 2), reap(ring, 2)]
    assert [len(part) for part in found] == [2, 2, 1, 0]
    assert sorted(itertools.chain(*found)) == [(k, _BLOCK) for k in range(5)]


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
def test_thousands_of_requests_go_round_the_rings(ring, tmp_path, batch):
    blocks, block_bytes = 5000, 512
    data = random.Random(6).randbytes(blocks * block_bytes - 100)
    path = tmp_path / "image"
    path.write_bytes(data)
    memory = Memory(block_bytes * batch)
    vectors = iovec(*((memory.address + k * block_bytes, block_bytes) for k in range(batch)))
    sums = np.zeros(blocks, np.int64)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_blocks(
            ring.record[0], fd, vectors, blocks, block_bytes, batch, np.zeros(4, np.uint64), np.zeros(4, np.int64), sums
        )
    finally:
        os.close(fd)
    assert sums.tolist() == [block_bytes] * (blocks - 1) + [block_bytes - 100]
    assert ring.record[0]["submitted"] == blocks


def test_nothing_to_do_makes_no_system_call(ring, image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    record = ring.record[0]
    assert uring.submit(record, 0) == 0
    assert uring.submit(record, 5) == 0  # there is nothing to wait for
    assert record["enters"] == 0
    assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, 1)
    assert finish(ring) == [(1, _BLOCK)]
    enters = int(record["enters"])
    assert enters == 1 or record["setup_flags"] & layout.SETUP_SQPOLL
    assert uring.submit(record, 0) == 0
    assert record["enters"] == enters


def test_a_flag_that_asks_for_it_makes_it_enter(ring):
    record = ring.record[0]
    flags = ctypes.c_uint32.from_address(int(record["sq_flags"]))
    flags.value |= layout.SQ_CQ_OVERFLOW
    assert uring.submit(record, 0) == 0
    flags.value &= ~layout.SQ_CQ_OVERFLOW
    assert record["enters"] == 1


def test_a_batch_is_one_system_call(ring, image):
    fd, _, _ = image
    if ring.record[0]["setup_flags"] & layout.SETUP_SQPOLL:
        pytest.skip("its thread takes them")
    memory = Memory(_BLOCK)
    for k in range(8):
        assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, k)
    assert uring.submit(ring.record[0], 0) == 8
    assert ring.record[0]["enters"] == 1


def test_waiting_is_for_as_many_as_were_asked_for(ring):
    """Reads of pipes, of which only some can complete."""
    pipes = [os.pipe() for _ in range(3)]
    memory = Memory(_BLOCK)
    try:
        for k, (read_end, _) in enumerate(pipes):
            assert push_rw(ring, False, read_end, iovec((memory.address + 8 * k, 8)), 0, k)
        os.write(pipes[1][1], b"second")
        assert uring.submit(ring.record[0], 1) == 3
        assert reap(ring) == [(1, 6)]
        assert memory[8:14] == b"second"
        assert ring.record[0]["in_flight"] == 2
        os.write(pipes[2][1], b"third")
        os.write(pipes[0][1], b"first")
        uring.submit(ring.record[0], 7)
        assert sorted(reap(ring)) == [(0, 5), (2, 5)]
    finally:
        for end in itertools.chain(*pipes):
            os.close(end)


@pytest.mark.parametrize("operation", ["fsync", "read"])
def test_event_fd_wakes_a_sleeper_when_a_completion_is_due(ring, image, operation):
    """Also where the completion waits until its thread enters the kernel."""
    fd, _, _ = image
    record = ring.record[0]
    memory = Memory(_BLOCK)
    poll = sleeper(ring)
    assert not uring.want_wakes(record)
    for turn in range(50):
        assert poll.poll(0) == []
        if operation == "fsync":
            assert uring.push_fsync(record, fd, turn)
        else:
            assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), turn * _BLOCK, turn)
        assert uring.submit(record, 0) == 1
        assert uring.want_wakes(record) or poll.poll(10_000)
        uring.refuse_wakes(record)
        uring.submit(record, 0)
        assert reap(ring) == [(turn, 0 if operation == "fsync" else _BLOCK)]
        drain(ring)


def test_who_sleeps_already_is_woken(ring):
    record = ring.record[0]
    memory = Memory(_BLOCK)
    poll = sleeper(ring)
    read_end, write_end = os.pipe()
    try:
        for turn in range(3):
            assert push_rw(ring, False, read_end, iovec((memory.address, 8)), 0, turn)
            assert uring.submit(record, 0) == 1
            assert not uring.want_wakes(record)
            later = threading.Timer(0.05, os.write, (write_end, b"now"))
            later.start()
            try:
                assert poll.poll(10_000)
            finally:
                later.join()
            uring.refuse_wakes(record)
            drain(ring)
            assert uring.submit(record, 0) == 0
            assert reap(ring) == [(turn, 3)]
    finally:
        os.close(read_end)
        os.close(write_end)


def test_completion_before_the_wish_to_be_woken_forbids_sleep(ring, image):
    fd, _, _ = image
    record = ring.record[0]
    memory = Memory(_BLOCK)
    poll = sleeper(ring)
    for turn in range(20):
        assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, turn)
        assert uring.submit(record, 0) == 1
        deadline = time.monotonic() + 30
        while not uring.want_wakes(record):
            assert time.monotonic() < deadline
            uring.refuse_wakes(record)
        uring.refuse_wakes(record)
        drain(ring)
        assert poll.poll(0) == []
        uring.submit(record, 0)  # it may be a work item that has to be run first
        assert reap(ring) == [(turn, _BLOCK)]
    assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, 99)
    assert uring.want_wakes(record), "what is queued must be submitted before a sleep"
    uring.refuse_wakes(record)
    assert finish(ring) == [(99, _BLOCK)]
    assert poll.poll(0) == [], "nothing is written while nobody sleeps"


def test_a_ring_that_is_polled_forbids_sleep_while_anything_is_under_way(image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    with open_ring(AS_IF_POLLED) as ring:
        record = ring.record[0]
        for turn in range(3):
            assert not uring.want_wakes(record)
            assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, turn)
            assert uring.submit(record, 0) == 1
            assert uring.want_wakes(record)
            enters = int(record["enters"])
            assert uring.submit(record, 0) == 0
            assert int(record["enters"]) == enters + 1, "it looks"
            uring.submit(record, 1)
            assert reap(ring) == [(turn, _BLOCK)]
            enters = int(record["enters"])
            assert uring.submit(record, 0) == 0
            assert int(record["enters"]) == enters


def test_what_cannot_be_polled_says_so(image):
    """Which is every file here; requests are then done in another way (kernels/blk_later.py, do_again)."""
    fd, _, _ = image
    memory = Memory(_BLOCK)
    with IoUring.open(8, iopoll=True) as ring:
        assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, 1)
        assert uring.push_fsync(ring.record[0], fd, 2)
        found = []
        while len(found) < 2:
            found += finish(ring)
        ((read, result), (sync, failed)) = sorted(found)
        assert (read, sync, failed) == (1, 2, -errno.EINVAL)
        assert result in (-errno.EOPNOTSUPP, _BLOCK), "a device with polled queues reads it"


def test_a_submission_thread_that_slept_is_woken(image):
    fd, data, _ = image
    memory = Memory(_BLOCK)
    with open_ring("sqpoll") as ring:
        record = ring.record[0]
        flags = ctypes.c_uint32.from_address(int(record["sq_flags"]))
        for turn in range(3):
            deadline = time.monotonic() + 30
            while not flags.value & layout.SQ_NEED_WAKEUP:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), turn * _BLOCK, turn)
            before = int(record["enters"])
            assert uring.submit(record, 0) == 1
            assert record["enters"] == before + 1
            while not uring.ready(record):
                assert time.monotonic() < deadline
            assert reap(ring) == [(turn, _BLOCK)]
            assert memory[:] == data[turn * _BLOCK : (turn + 1) * _BLOCK]


def test_a_ring_that_is_gone_is_an_error(image):
    fd, _, _ = image
    memory = Memory(_BLOCK)
    with open_ring("plain") as ring:
        record = ring.record[0]
        assert push_rw(ring, False, fd, iovec((memory.address, _BLOCK)), 0, 1)
        record["fd"] = -1
        assert uring.submit(record, 0) == -errno.EBADF
        assert record["queued"] == 1
        record["fd"] = ring.fd
        assert finish(ring) == [(1, _BLOCK)]
