"""Everything beyond the plain path, on every transport: each test names the part of the specification that it holds."""

import os
import select
import struct

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import IN, IOERR, OK, OUT, UNSUPP, BlkDriver, started_disk
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing

pytestmark = pytest.mark.timeout(60)

PLAIN = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_BLK_FLUSH | fe.F_INDIRECT
ALL_PROTOCOL = (1 << 20) - 1
DISCARD, WRITE_ZEROES = 11, 13
MIB = 1 << 20


_OPEN = []


@pytest.fixture(autouse=True)
def front_ends_of_failed_tests():
    """A back-end serves one front-end at a time: what a failed test leaves open would fail every other."""
    yield
    while _OPEN:
        _OPEN.pop().close()


def negotiated(backend, features=PLAIN, protocol=ALL_PROTOCOL & ~fe.INBAND):
    frontend = fe.Frontend(backend.socket)
    _OPEN.append(frontend)
    frontend.negotiate(features, protocol)
    return frontend


def disk_on(frontend, memory, features=PLAIN, size=16, index=0):
    """A BlkDriver on a vring that runs; the memory table was told already."""
    packed = features & fe.F_PACKED
    ring = (PackedRing if packed else DriverRing)(memory, size)
    frontend.start_vring(index, ring, PackedRing.START if packed else 0)
    return BlkDriver(ring)


def ranges(disk, kind, *entries, flags=0):
    data = b"".join(struct.pack("<QII", sector, count, flags) for sector, count in entries)
    return disk.request(kind, data=data)[0]


# virtio-blk


def test_write_zeroes(backend):
    with started_disk(backend.socket) as (_, disk):
        disk.write(64, b"x" * 4096)
        assert ranges(disk, WRITE_ZEROES, (65, 2), (70, 1)) == OK
        assert disk.read(64, 4096) == b"x" * 512 + bytes(1024) + b"x" * 1536 + bytes(512) + b"x" * 512
        assert ranges(disk, WRITE_ZEROES, (64, 8), flags=1) == OK
        assert disk.read(64, 4096) == bytes(4096)


def test_discard_gives_blocks_back(backend, image):
    with started_disk(backend.socket) as (_, disk):
        disk.write(2048, b"d" * MIB)
        disk.flush()
        before = image.stat().st_blocks
        assert ranges(disk, DISCARD, (2048, 2048)) == OK
        assert image.stat().st_blocks <= before - 2048
        assert disk.read(2048, 4096) == bytes(4096)


@pytest.mark.parametrize(
    ("kind", "entries", "flags", "status"),
    [
        (DISCARD, [(0, 8)], 1, UNSUPP),
        (DISCARD, [(0, 8)], 2, UNSUPP),
        (WRITE_ZEROES, [(0, 8)], 2, UNSUPP),
        (WRITE_ZEROES, [(1 << 40, 8)], 0, IOERR),
        (WRITE_ZEROES, [((1 << 64) - 1, 8)], 0, IOERR),
        (DISCARD, [(0, 0xFFFFFFFF)], 0, IOERR),
        (DISCARD, [], 0, IOERR),
        (WRITE_ZEROES, [(0, 0)], 0, OK),
    ],
)
def test_bad_ranges(backend, kind, entries, flags, status):
    with started_disk(backend.socket) as (_, disk):
        first = disk.read(0, 512)
        if entries:
            assert ranges(disk, kind, *entries, flags=flags) == status
        else:
            assert disk.request(kind, data=b"short")[0] == status
        assert disk.read(0, 512) == first


def test_write_cache_is_switched_by_the_driver(backend):
    with started_disk(backend.socket) as (frontend, disk):
        assert frontend.get_config(32, 1) == b"\1"
        write = struct.pack("=III", 32, 1, 0)
        frontend.tell(fe.SET_CONFIG, write + b"\0")
        assert frontend.get_config(32, 1) == b"\0"
        disk.write(0, disk.read(0, 512))
        frontend.tell(fe.SET_CONFIG, write + b"\1")
        with pytest.raises(fe.Refused):
            frontend.tell(fe.SET_CONFIG, write + b"\7")
        with pytest.raises(fe.Refused):
            frontend.tell(fe.SET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8))
        frontend.tell(fe.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0")
    with started_disk(backend.socket) as (frontend, _):
        assert frontend.get_config(32, 1) == b"\1", "a new front-end finds the initial state"


def test_write_cache_of_a_driver_that_did_not_negotiate_it(backend):
    with started_disk(backend.socket, PLAIN) as (frontend, _), pytest.raises(fe.Refused):
        frontend.tell(fe.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0")


def test_migration_may_bring_the_whole_space(backend):
    with started_disk(backend.socket) as (frontend, _):
        space = bytearray(frontend.get_config(0, 60))
        space[32] = 0
        frontend.tell(fe.SET_CONFIG, struct.pack("=III", 0, 60, 1) + bytes(space))
        assert frontend.get_config(32, 1) == b"\0"


# Memory slots


def region_payload(memory, number):
    gpa, size_bytes, uva, fd, fd_offset = memory.regions[number]
    return struct.pack("=QQQQQ", 0, gpa, size_bytes, uva, fd_offset), fd


def test_memory_slots_come_and_go_while_a_ring_runs(backend):
    layout = tuple((k << 30, 2 * MIB) for k in range(4))
    memory = GuestMemory(layout=layout)
    frontend = negotiated(backend)
    assert frontend.ask_u64(fe.GET_MAX_MEM_SLOTS) >= 8
    body, fd = region_payload(memory, 0)
    frontend.tell(fe.ADD_MEM_REG, body, [fd])
    disk = disk_on(frontend, memory)
    content = disk.read(0, 512)
    far = memory.regions[2][0] + 4096
    disk.buffer = far
    assert disk.request(IN, size=512)[0] == IOERR, "not there yet"
    body, fd = region_payload(memory, 2)
    frontend.tell(fe.ADD_MEM_REG, body, [fd])
    assert disk.read(0, 512) == content
    with pytest.raises(fe.Refused):
        frontend.tell(fe.ADD_MEM_REG, body, [fd])
    frontend.tell(fe.REM_MEM_REG, body)
    assert disk.request(IN, size=512)[0] == IOERR, "gone again"
    with pytest.raises(fe.Refused):
        frontend.tell(fe.REM_MEM_REG, body)
    frontend.tell(fe.ADD_MEM_REG, body, [fd])
    frontend.tell(fe.REM_MEM_REG, body, [fd])  # an fd is tolerated
    disk.buffer = memory.allocate(512)
    assert disk.read(0, 512) == content
    frontend.close()
    memory.close()


def test_ring_breaks_when_its_slot_goes(backend):
    memory = GuestMemory(layout=((0, 2 * MIB), (1 << 30, 2 * MIB)))
    frontend = negotiated(backend)
    for number in (0, 1):
        body, fd = region_payload(memory, number)
        frontend.tell(fe.ADD_MEM_REG, body, [fd])
    disk = disk_on(frontend, memory)
    disk.read(0, 512)
    frontend.tell(fe.REM_MEM_REG, region_payload(memory, 0)[0])
    assert disk.ring.broken()
    frontend.close()
    memory.close()


# IOMMU


def translation(kind, iova, size=0, uva=0, access=0):
    return struct.pack("=QQQBB6x", iova, size, uva, access, kind)


MISS, UPDATE, INVALIDATE = 1, 2, 3
SHIFT = 1 << 44  # driver addresses are that much above guest-physical ones


class TranslatedMemory:
    """A view of guest memory in which the driver's addresses are shifted."""

    def __init__(self, memory):
        self.plain, self.regions = memory, memory.regions

    def allocate(self, size_bytes, align=16):
        return self.plain.allocate(size_bytes, align) + SHIFT

    def write(self, iova, data):
        self.plain.write(iova - SHIFT, data)

    def read(self, iova, size_bytes):
        return self.plain.read(iova - SHIFT, size_bytes)

    def pack(self, layout, iova, *values):
        self.plain.pack(layout, iova - SHIFT, *values)

    def unpack(self, layout, iova):
        return self.plain.unpack(layout, iova - SHIFT)

    def to_uva(self, iova):
        return iova  # with an IOMMU ring addresses are the driver's own


def answer_misses(frontend, channel, memory, wanted=1, known=lambda iova: True, page=4096):
    """Answer misses as QEMU does, page by page; returns what was asked for."""
    asked = []
    while len(asked) < wanted or select.select([channel.sock], [], [], 0.3)[0]:
        request, flags, body = channel.receive()
        assert (request, flags) == (fe.CHANNEL_IOTLB, 1 | fe.NEED_REPLY)
        iova, _, _, access, kind = struct.unpack("=QQQBB6x", body)
        assert kind == MISS
        asked.append((iova, access))
        start = iova & ~(page - 1)
        code = 1
        if known(iova):
            uva = memory.to_uva(start - SHIFT)
            assert frontend.ask_u64(fe.IOTLB_MSG, translation(UPDATE, start, page, uva, 3)) == 0
            code = 0
        channel.acknowledge(request, code)
    return asked


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_iommu(backend, layout):
    features = PLAIN | fe.F_ACCESS_PLATFORM | layout
    memory = GuestMemory()
    driver_memory = TranslatedMemory(memory)
    frontend = negotiated(backend, features)
    channel = frontend.open_channel()
    frontend.set_memory(memory)
    disk = disk_on(frontend, driver_memory, features)
    asked = answer_misses(frontend, channel, memory)
    assert asked, "the ring itself has to be translated"
    disk.memory.pack("<IIQ", disk.header, OUT, 0, 8)
    disk.memory.write(disk.buffer, b"t" * 8192)
    disk.submit([(disk.header, 16, False), (disk.buffer, 8192, False), (disk.status, 1, True)])
    assert {iova for iova, _ in answer_misses(frontend, channel, memory)} >= {disk.buffer, disk.buffer + 4096}
    assert disk.finish() == (OK, 1)
    assert disk.read(8, 8192) == b"t" * 8192, "no miss this time"
    # What was invalidated is asked for again.
    assert frontend.ask_u64(fe.IOTLB_MSG, translation(INVALIDATE, disk.buffer, 4096)) == 0
    disk.memory.pack("<IIQ", disk.header, IN, 0, 8)
    disk.submit([(disk.header, 16, False), (disk.buffer, 4096, True), (disk.status, 1, True)])
    assert answer_misses(frontend, channel, memory) == [(disk.buffer, 2)]
    assert disk.finish() == (OK, 4097)
    # What the front-end does not know is an error of the request, not of the ring.
    nowhere = SHIFT * 4
    disk.submit([(disk.header, 16, False), (nowhere, 512, True), (disk.status, 1, True)])
    answer_misses(frontend, channel, memory, known=lambda iova: iova < nowhere)
    assert disk.finish()[0] == IOERR
    assert disk.read(8, 4096) == b"t" * 4096
    frontend.close()
    channel.close()
    memory.close()


@pytest.mark.parametrize(
    "body",
    [
        translation(UPDATE, 0, 0, 0, 3),
        translation(UPDATE, 0, 4096, 12345, 3),
        translation(UPDATE, (1 << 64) - 1, 4096, 0, 3),
        translation(UPDATE, 0, 4096, 0, 0),
        translation(9, 0, 4096, 0, 3),
        b"short",
    ],
)
def test_bad_translations(backend, body):
    frontend = negotiated(backend, PLAIN | fe.F_ACCESS_PLATFORM)
    memory = GuestMemory()
    frontend.set_memory(memory)
    assert frontend.ask_u64(fe.IOTLB_MSG, body) != 0
    frontend.close()
    memory.close()


# Dirty-page log


class Log:
    """A dirty-page log, as a front-end has it."""

    def __init__(self, memory, offset=4096):
        self.size = (max(gpa + size for gpa, size, *_ in memory.regions) >> 12) // 8 + 8
        self.offset = offset
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, self.offset + self.size)

    def tell(self, frontend):
        body = struct.pack("=QQ", self.size, self.offset)
        frontend.send(fe.SET_LOG_BASE, body, [self.fd])
        assert frontend.receive() == (fe.SET_LOG_BASE, 1 | fe.REPLY, bytes(8))

    def take(self):
        """The pages marked since the last time."""
        data = os.pread(self.fd, self.size, self.offset)
        os.pwrite(self.fd, bytes(self.size), self.offset)
        return {8 * index + bit for index, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_dirty_log(backend, layout):
    features = PLAIN | layout
    memory = GuestMemory()
    log = Log(memory)
    frontend = negotiated(backend, features)
    frontend.set_memory(memory)
    disk = disk_on(frontend, memory, features)
    disk.read(0, 512)
    log.tell(frontend)
    disk.read(0, 512)
    assert log.take() == set(), "nothing is logged before LOG_ALL"
    event = os.eventfd(0, os.EFD_NONBLOCK)
    frontend.tell(fe.SET_LOG_FD, b"", [event])
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", features | fe.F_LOG_ALL))
    ring = disk.ring
    parts = [memory.to_uva(part) for part in (ring.desc, ring.used, ring.avail)]
    frontend.tell(fe.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 1, *parts, ring.used))
    disk.request(IN, size=10000 // 512 * 512)
    pages = log.take()
    buffer = set(range(disk.buffer >> 12, (disk.buffer + 9728 - 1 >> 12) + 1))
    used = (ring.desc if layout else ring.used) >> 12
    assert buffer | {disk.status >> 12, used} <= pages
    assert pages <= buffer | {disk.status >> 12, used, ring.used >> 12}
    assert select.select([event], [], [], 5)[0]
    disk.write(0, disk.read(0, 4096))
    log.take()
    disk.write(0, disk.read(0, 512))
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", features))
    log.take()
    disk.read(0, 4096)
    assert log.take() == set()
    frontend.close()
    memory.close()
    os.close(event)
    os.close(log.fd)


# Inflight tracking


def inflight_region(frontend, queues=2, size=16):
    body, fd = frontend.ask_for_fd(fe.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, queues, size))
    size_bytes, offset, *_ = struct.unpack("=QQHH4x", body)
    return body, fd, size_bytes, offset


def test_inflight_region_follows_split_requests(backend):
    memory = GuestMemory()
    frontend = negotiated(backend)
    body, fd, size_bytes, offset = inflight_region(frontend)
    assert os.pread(fd, size_bytes, offset) == bytes(size_bytes)
    frontend.set_memory(memory)
    frontend.tell(fe.SET_INFLIGHT_FD, body, [fd])
    disk = disk_on(frontend, memory)
    first = disk.read(0, 512)
    disk.read(0, 512)
    _, version, desc_num, _, used_idx = struct.unpack("<QHHHH", os.pread(fd, 16, offset))
    assert (version, desc_num, used_idx) == (1, 16, 2)
    assert all(os.pread(fd, 1, offset + 16 + 16 * k) == b"\0" for k in range(16)), "nothing is under way"
    # A former back-end took a request that it never gave back: it is done first.
    frontend.stop_vring(0)
    head = disk.ring.put_chain([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
    memory.write(disk.buffer, bytes(512))
    disk.ring.make_available(head)
    os.pwrite(fd, b"\1", offset + 16 + 16 * head)
    frontend.start_vring(0, disk.ring, base=2)
    assert disk.ring.wait_used() == (head, 513)
    assert memory.read(disk.buffer, 512) == first
    assert os.pread(fd, 1, offset + 16 + 16 * head) == b"\0"
    frontend.close()
    memory.close()
    os.close(fd)


def test_inflight_region_of_a_packed_ring(backend):
    features = PLAIN | fe.F_PACKED
    memory = GuestMemory()
    frontend = negotiated(backend, features)
    body, fd, _, offset = inflight_region(frontend)
    frontend.set_memory(memory)
    frontend.tell(fe.SET_INFLIGHT_FD, body, [fd])
    disk = disk_on(frontend, memory, features)
    content = [disk.read(sector, 512) for sector in range(9)]
    frontend.stop_vring(0)
    head = struct.unpack("<QHHHHHHBB", os.pread(fd, 22, offset))
    assert head[1] == 1
    position = 3 * 9 % 16 | (1 ^ (3 * 9 // 16 & 1)) << 15
    assert head[5] | head[7] << 15 == position == disk.ring.position()
    frontend.start_vring(0, disk.ring, base=0x8000)  # a stale base: the region knows better
    assert [disk.read(sector, 512) for sector in range(9)] == content
    frontend.close()
    memory.close()
    os.close(fd)


@pytest.mark.parametrize("numbers", [(0, 0, 0, 16), (0, 0, 99, 16), (0, 0, 2, 0), (0, 0, 2, 40000)])
def test_inflight_region_of_impossible_size(backend, numbers):
    frontend = negotiated(backend)
    frontend.send(fe.GET_INFLIGHT_FD, struct.pack("=QQHH4x", *numbers))
    with pytest.raises(ConnectionError):
        frontend.receive()
    frontend.close()


def test_inflight_region_that_is_too_small(backend):
    frontend = negotiated(backend)
    body, fd, size_bytes, _ = inflight_region(frontend)
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 64, 0, 2, 16), [fd])
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_INFLIGHT_FD, struct.pack("=QQHH4x", size_bytes - 8, 4, 1, 16), [fd])
    frontend.tell(fe.SET_INFLIGHT_FD, body, [fd])
    frontend.close()
    os.close(fd)


# In-band notifications


def test_in_band_notifications(backend):
    memory = GuestMemory()
    frontend = negotiated(backend, protocol=ALL_PROTOCOL)
    channel = frontend.open_channel()
    frontend.set_memory(memory)
    ring = DriverRing(memory)
    disk = BlkDriver(ring)
    frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, ring.size))
    frontend.set_addresses(0, ring)
    frontend.enable(0, 1)
    disk.memory.pack("<IIQ", disk.header, IN, 0, 0)

    calls = []

    def take_call():
        """Take the next message, which is a call, or False when it is another."""
        message = channel.receive()
        if message == (fe.CHANNEL_CALL, 1 | fe.NEED_REPLY, struct.pack("=II", 0, 0)):
            channel.acknowledge(fe.CHANNEL_CALL)
            calls.append(message)
            return True
        assert message[0] == fe.CHANNEL_ERR
        return False

    for _ in range(3):
        disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        frontend.tell(fe.VRING_KICK, struct.pack("=II", 0, 0))
        # A vring that starts is called once more than there is reason to, which comes by itself or with the first.
        while ring.used_idx() == ring.seen_used:
            assert take_call()
        assert disk.finish() == (OK, 513)
    ring.memory.pack("<H", ring.avail + 2, 999)  # breaks the ring
    frontend.tell(fe.VRING_KICK, struct.pack("=II", 0, 0))
    while take_call():
        pass
    assert calls
    frontend.close()
    channel.close()
    memory.close()


def test_in_band_notifications_need_a_channel_and_acknowledgements(backend):
    frontend = fe.Frontend(backend.socket)
    frontend.tell(fe.SET_PROTOCOL_FEATURES, struct.pack("=Q", fe.INBAND | fe.REPLY_ACK))
    with pytest.raises(ConnectionError):
        frontend.ask(fe.GET_FEATURES)
    frontend.close()


# Status, reset


def test_status_and_reset(backend):
    with started_disk(backend.socket) as (frontend, disk):
        pass
    memory = GuestMemory()
    frontend = negotiated(backend)
    frontend.set_memory(memory)
    for status in (1, 3, 11, 15):
        frontend.tell(fe.SET_STATUS, struct.pack("=Q", status))
        assert frontend.ask_u64(fe.GET_STATUS) == status
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_STATUS, struct.pack("=Q", 0x100))
    disk = disk_on(frontend, memory)
    content = disk.read(0, 512)
    frontend.tell(fe.SET_STATUS, struct.pack("=Q", 0))
    assert frontend.ask_u64(fe.GET_STATUS) == 0
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", PLAIN))
    again = disk_on(frontend, memory)
    assert again.read(0, 512) == content
    frontend.tell(fe.RESET_DEVICE)
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", PLAIN))
    assert disk_on(frontend, memory).read(0, 512) == content
    frontend.close()
    memory.close()


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_paused_vm_goes_on_after_a_status_reset(backend, layout):
    """QEMU before 8.1: SET_STATUS 0, then GET_VRING_BASE; the ring goes on from there."""
    memory = GuestMemory()
    features = PLAIN | layout | (1 << 11)
    frontend = negotiated(backend, features)
    frontend.set_memory(memory)
    frontend.tell(fe.SET_STATUS, struct.pack("=Q", 15))
    disk = disk_on(frontend, memory, features)
    frontend.tell(fe.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0")
    content = [disk.read(sector, 512) for sector in range(5)]
    frontend.tell(fe.SET_STATUS, struct.pack("=Q", 0))
    base = frontend.stop_vring(0)
    position = disk.ring.position() if layout else 5
    assert base == (position | position << 16 if layout else position)
    assert frontend.stop_vring(0) == base, "and again"
    assert frontend.get_config(32, 1) == b"\0", "the guest believes in its write-through"
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", features))
    frontend.start_vring(0, disk.ring, base)
    assert [disk.read(sector, 512) for sector in range(5)] == content
    frontend.tell(fe.RESET_DEVICE)
    assert frontend.get_config(32, 1) == b"\1"
    frontend.close()
    memory.close()


def test_message_whose_feature_was_not_negotiated_is_refused(backend):
    frontend = negotiated(backend, protocol=fe.REPLY_ACK)
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_STATUS, struct.pack("=Q", 1))
    with pytest.raises(fe.Refused):
        frontend.tell(fe.RESET_DEVICE)
    frontend.close()


@pytest.mark.parametrize("request_number", [19, 20, 23, 27, 29, 33])
def test_message_that_is_not_for_block_devices_is_refused(backend, request_number):
    frontend = negotiated(backend)
    with pytest.raises(fe.Refused):
        frontend.tell(request_number, bytes(8))
    assert frontend.ask_u64(fe.GET_QUEUE_NUM) == 4
    frontend.close()


@pytest.mark.parametrize("request_number", [26, 28, 30, 41, 44])
def test_message_that_cannot_be_answered_ends_the_session(backend, request_number):
    """A front-end that sends it breaks the protocol, and must not be left waiting for the answer."""
    frontend = negotiated(backend)
    frontend.send(request_number, bytes(8))
    with pytest.raises(ConnectionError):
        frontend.receive()
    frontend.close()


# Packed positions


@pytest.mark.parametrize(("size", "slot", "wrap"), [(16, 0, 1), (16, 15, 1), (7, 5, 0), (5, 0, 0), (2, 1, 1)])
def test_packed_ring_starts_anywhere(backend, size, slot, wrap):
    features = PLAIN | fe.F_PACKED
    memory = GuestMemory()
    frontend = negotiated(backend, features)
    frontend.set_memory(memory)
    ring = PackedRing(memory, size)
    ring.set_position(slot, wrap)
    frontend.start_vring(0, ring, slot | wrap << 15)
    disk = BlkDriver(ring, indirect=True)
    content = disk.read(0, 512)
    for _ in range(3 * size):
        assert disk.read(0, 512) == content
    base = frontend.stop_vring(0)
    assert base == ring.position() | ring.position() << 16
    frontend.close()
    memory.close()
