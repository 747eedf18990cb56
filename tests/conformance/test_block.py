"""virtio-blk requests on every transport: data, errors, and drivers that break the rules."""

import os
import random
import signal
import struct
import time

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import GET_ID, IN, IOERR, OK, OUT, UNSUPP, BlkDriver, started_disk
from tests.mock.driver_ring import F_INDIRECT, F_NEXT, F_WRITE, DriverRing
from tests.mock.guest_memory import GuestMemory

pytestmark = pytest.mark.timeout(60)

PLAIN = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_BLK_FLUSH
VARIANTS = {
    "everything": (None, False),
    "indirect": (None, True),
    "no event_idx": (PLAIN | fe.F_INDIRECT, True),
    "plain": (PLAIN, False),
    "packed": (PLAIN | fe.F_INDIRECT | fe.F_EVENT_IDX | fe.F_PACKED, False),
    "packed indirect": (PLAIN | fe.F_INDIRECT | fe.F_PACKED | fe.F_IN_ORDER, True),
    "write-through": (fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES, False),
}


@pytest.fixture(params=list(VARIANTS))
def disk(request, backend):
    features, indirect = VARIANTS[request.param]
    with started_disk(backend.socket, features, indirect=indirect) as (_, driver):
        yield driver


@pytest.fixture
def plain(backend):
    with started_disk(backend.socket) as (_, driver):
        yield driver


@pytest.mark.parametrize("size", [512, 4096, 65536, 1 << 20])
def test_reads_what_the_image_has(disk, image, size):
    content = image.read_bytes()
    for sector in (0, 1, 77, (len(content) - size) // 512):
        assert disk.read(sector, size) == content[sector * 512 : sector * 512 + size]


@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_write_and_flush_are_in_the_image(disk, image, size):
    data = random.randbytes(size)
    disk.write(4096, data)
    disk.flush()
    with open(image, "rb") as file:
        file.seek(4096 * 512)
        assert file.read(size) == data
    assert disk.read(4096, size) == data


def test_get_id(disk):
    status, data, length = disk.request(GET_ID, size=20)
    assert (status, data, length) == (OK, b"conformance-1".ljust(20, b"\0"), 21)


def test_many_requests_round_the_ring(disk, image):
    content = image.read_bytes()
    for _ in range(100):
        sector = random.randrange(8192)
        assert disk.read(sector, 512) == content[sector * 512 : sector * 512 + 512]


def test_index_wraps_at_65536(backend, image):
    with started_disk(backend.socket) as (frontend, disk):
        frontend.stop_vring(0)
        disk.ring.set_index(65530)
        frontend.start_vring(0, disk.ring, base=65530)
        disk.ring.set_used_event(65530)
        for _ in range(12):
            disk.read(0, 512)
        assert disk.ring.used_idx() == 6
        assert frontend.stop_vring(0) == 6


def test_batch_of_requests(plain, image):
    content = image.read_bytes()
    ring, memory = plain.ring, plain.memory
    heads, expected = [], {}
    for number in range(5):
        header, status, buffer = memory.allocate(16), memory.allocate(1), memory.allocate(512)
        memory.pack("<IIQ", header, IN, 0, number * 3)
        head = ring.put_chain([(header, 16, False), (buffer, 512, True), (status, 1, True)])
        heads.append(head)
        expected[head] = (buffer, content[number * 3 * 512 : number * 3 * 512 + 512])
    ring.make_available(*heads)
    ring.kick()
    for _ in heads:
        head, length = ring.wait_used()
        buffer, data = expected.pop(head)
        assert (length, memory.read(buffer, 512)) == (513, data)
    assert not expected


def test_header_data_and_status_wherever_the_driver_puts_them(plain, image):
    content = image.read_bytes()
    memory = plain.memory
    memory.pack("<IIQ", plain.header, IN, 0, 9)
    cut = [(plain.header, 5, False), (plain.header + 5, 11, False)]
    # The status is the last byte of the same descriptor as the data (virtio 1.2, 2.7.4.3 and 5.2.6).
    plain.submit([*cut, (plain.buffer, 100, True), (plain.buffer + 100, 413, True)])
    _, length = plain.ring.wait_used()
    assert length == 513
    assert memory.read(plain.buffer, 513) == content[9 * 512 : 10 * 512] + b"\0"


def test_written_data_in_the_descriptor_of_the_header(plain, image):
    memory = plain.memory
    joined = memory.allocate(16 + 512)
    data = random.randbytes(512)
    memory.pack("<IIQ", joined, OUT, 0, 33)
    memory.write(joined + 16, data)
    plain.submit([(joined, 16 + 512, False), (plain.status, 1, True)])
    assert plain.finish() == (OK, 1)
    assert plain.read(33, 512) == data


def test_direct_descriptors_before_an_indirect_table(plain, image):
    memory, ring = plain.memory, plain.ring
    table = memory.allocate(32)
    memory.pack("<IIQ", plain.header, IN, 0, 2)
    ring.put_desc(0, plain.buffer, 512, F_WRITE | F_NEXT, 1, table)
    ring.put_desc(1, plain.status, 1, F_WRITE, 0, table)
    ring.put_desc(0, plain.header, 16, F_NEXT, 1)
    ring.put_desc(1, table, 32, F_INDIRECT)
    ring.make_available(0)
    ring.kick()
    assert plain.finish() == (OK, 513)
    assert memory.read(plain.buffer, 512) == image.read_bytes()[1024:1536]


def test_buffer_across_two_memory_regions(backend, image):
    memory = GuestMemory(((0, 4 << 20), (4 << 20, 4 << 20)), fd_offset=4096)
    with started_disk(backend.socket, memory=memory) as (_, disk):
        disk.buffer = (4 << 20) - 1024
        assert disk.read(0, 4096) == image.read_bytes()[:4096]
        data = random.randbytes(4096)
        disk.write(200, data)
        assert disk.read(200, 4096) == data


ANSWERED_WITH_IOERR = {
    "beyond the end": (IN, (8 << 20) // 512, 512),
    "across the end": (IN, (8 << 20) // 512 - 1, 1024),
    "sector that overflows": (IN, (1 << 64) - 1, 512),
    "sector that overflows as bytes": (IN, 1 << 55, 512),
    "not whole sectors": (IN, 0, 511),
}


@pytest.mark.parametrize("case", list(ANSWERED_WITH_IOERR))
def test_request_that_cannot_be_done(disk, case):
    kind, sector, size = ANSWERED_WITH_IOERR[case]
    assert disk.request(kind, sector, size=size)[0] == IOERR
    assert disk.read(0, 512)


def test_write_beyond_the_end(disk):
    assert disk.request(OUT, (8 << 20) // 512, bytes(512))[0] == IOERR
    assert disk.read(0, 512)


@pytest.mark.parametrize("kind", [2, 10, 14, 0xFFFFFFFF])
def test_unknown_request_type(disk, kind):
    assert disk.request(kind)[0] == UNSUPP
    assert disk.read(0, 512)


def _chain(plain, chain):
    plain.memory.pack("<IIQ", plain.header, IN, 0, 0)
    plain.submit(chain)


ONE_REQUEST_AT_FAULT = {
    "buffer outside of memory": lambda d: [(d.header, 16, False), (1 << 40, 512, True), (d.status, 1, True)],
    "buffer that runs out of memory": lambda d: [
        (d.header, 16, False),
        ((8 << 20) - 256, 512, True),
        (d.status, 1, True),
    ],
    "address that wraps": lambda d: [(d.header, 16, False), ((1 << 64) - 256, 512, True), (d.status, 1, True)],
    "header outside of memory": lambda d: [(1 << 40, 16, False), (d.buffer, 512, True), (d.status, 1, True)],
    "header too short": lambda d: [(d.header, 8, False), (d.buffer, 512, True), (d.status, 1, True)],
    "empty descriptor": lambda d: [(d.header, 16, False), (d.buffer, 0, True), (d.status, 1, True)],
}


@pytest.mark.parametrize("case", list(ONE_REQUEST_AT_FAULT))
def test_request_with_bad_buffers_gets_an_error_and_the_ring_goes_on(plain, case):
    _chain(plain, ONE_REQUEST_AT_FAULT[case](plain))
    assert plain.finish()[0] == IOERR
    assert plain.read(0, 512)


def _loop(disk):
    disk.ring.put_desc(0, disk.header, 16, F_NEXT, 1)
    disk.ring.put_desc(1, disk.header, 16, F_NEXT, 0)
    disk.ring.make_available(0)


def _next_out_of_range(disk):
    disk.ring.put_desc(0, disk.header, 16, F_NEXT, disk.ring.size)
    disk.ring.make_available(0)


def _head_out_of_range(disk):
    disk.ring.make_available(disk.ring.size)


def _avail_idx_jumps(disk):
    disk.ring.avail_idx = (disk.ring.avail_idx + disk.ring.size + 1) & 0xFFFF
    disk.ring.make_available()


def _no_status(disk):
    disk.ring.make_available(disk.ring.put_chain([(disk.header, 16, False)]))


def _status_outside(disk):
    disk.ring.make_available(disk.ring.put_chain([(disk.header, 16, False), (1 << 40, 1, True)]))


def _readable_after_writable(disk):
    disk.ring.make_available(
        disk.ring.put_chain([(disk.header, 16, False), (disk.buffer, 512, True), (disk.header, 16, False)])
    )


def _indirect(length, flags=F_INDIRECT, gpa=None, inner=0):
    def make(disk):
        table = disk.memory.allocate(64)
        disk.ring.put_desc(0, disk.header, 16, inner or F_NEXT, 1, table)
        disk.ring.put_desc(1, disk.status, 1, F_WRITE, 0, table)
        disk.ring.put_desc(0, table if gpa is None else gpa, length, flags, 1)
        disk.ring.make_available(0)

    return make


RING_BROKEN = {
    "loop": _loop,
    "next outside of the table": _next_out_of_range,
    "head outside of the table": _head_out_of_range,
    "more available than the ring holds": _avail_idx_jumps,
    "no place for the status": _no_status,
    "status outside of memory": _status_outside,
    "readable after writable": _readable_after_writable,
    "indirect table of a length that is no multiple of 16": _indirect(20),
    "empty indirect table": _indirect(0),
    "indirect table outside of memory": _indirect(32, gpa=1 << 40),
    "indirect table with a next": _indirect(32, F_INDIRECT | F_NEXT),
    "indirect table in an indirect table": _indirect(32, inner=F_INDIRECT),
    "indirect table too long": _indirect(16 * 1025),
}


@pytest.mark.parametrize("case", list(RING_BROKEN))
def test_driver_that_breaks_the_ring_is_told_and_can_start_again(backend, case):
    with started_disk(backend.socket) as (frontend, disk):
        first = disk.read(0, 512)
        disk.ring.next_desc = 0
        RING_BROKEN[case](disk)
        disk.ring.kick()
        assert disk.ring.broken()
        assert frontend.stop_vring(0) == 1
        assert "vring 0 is stopped until the front-end starts it again" in backend.log()
        fresh = BlkDriver(DriverRing(disk.memory))
        frontend.start_vring(0, fresh.ring)
        assert fresh.read(0, 512) == first
        fresh.ring.close()


def test_indirect_table_without_the_feature_breaks_the_ring(backend):
    with started_disk(backend.socket, PLAIN) as (_, disk):
        _indirect(32)(disk)
        disk.ring.kick()
        assert disk.ring.broken()


def test_no_interrupt_flag_is_honoured(backend):
    with started_disk(backend.socket, PLAIN) as (_, disk):
        disk.read(0, 512)
        while disk.ring.wait_call(0.2):
            pass  # the one of the start, and that of the first request
        disk.memory.pack("<H", disk.ring.avail, 1)
        disk.memory.pack("<IIQ", disk.header, IN, 0, 0)
        disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        deadline = time.monotonic() + 10
        while disk.ring.used_idx() == 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert disk.ring.used_idx() == 2
        assert not disk.ring.wait_call(0.2)


def test_kicks_are_wanted_when_the_back_end_sleeps(plain):
    plain.read(0, 512)
    deadline = time.monotonic() + 10
    while plain.ring.avail_event() != 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert plain.ring.avail_event() == 1


def test_killed_worker_is_replaced_and_its_ring_goes_on(backend, image):
    content = image.read_bytes()
    with started_disk(backend.socket) as (_, disk):
        assert disk.read(0, 512) == content[:512]
        for pid in backend.worker_pids():
            os.kill(pid, signal.SIGKILL)
        for sector in range(20):
            assert disk.read(sector, 512) == content[sector * 512 : sector * 512 + 512]


def test_front_end_that_truncates_its_memory_gets_its_ring_broken(backend):
    with started_disk(backend.socket) as (_, disk):
        disk.read(0, 512)
        os.ftruncate(disk.memory.regions[0][3], 0)
        disk.ring.kick()
        assert disk.ring.broken()
    with started_disk(backend.socket) as (_, disk):
        assert disk.read(0, 512)
    assert "died" not in backend.log()


def test_front_end_that_closes_without_stopping_its_rings(backend):
    frontend = fe.Frontend(backend.socket)
    frontend.negotiate()
    memory = GuestMemory()
    frontend.set_memory(memory)
    disk = BlkDriver(DriverRing(memory))
    frontend.start_vring(0, disk.ring)
    disk.read(0, 512)
    frontend.close()
    memory.close()
    with started_disk(backend.socket) as (_, again):
        assert again.read(0, 512)
    disk.ring.close()


def test_random_nonsense_in_descriptors_never_ends_the_back_end(backend):
    generator = random.Random(7)
    with started_disk(backend.socket) as (frontend, disk):
        for _ in range(200):
            for index in range(disk.ring.size):
                words = generator.choice(
                    [
                        (generator.getrandbits(64), generator.getrandbits(32)),
                        (generator.randrange(8 << 20), generator.choice([0, 1, 16, 512, 4096])),
                    ]
                )
                disk.ring.put_desc(index, *words, generator.randrange(8), generator.randrange(disk.ring.size + 1))
            disk.memory.write(disk.ring.avail + 4, struct.pack("<16H", *[generator.randrange(17) for _ in range(16)]))
            disk.memory.pack("<H", disk.ring.avail + 2, generator.getrandbits(16))
            disk.ring.kick()
            frontend.stop_vring(0)
            disk.memory.pack("<H", disk.ring.avail + 2, disk.ring.used_idx())
            frontend.start_vring(0, disk.ring, base=disk.ring.used_idx())
    with started_disk(backend.socket) as (_, disk):
        assert disk.read(0, 512)
    assert backend.process.poll() is None
