"""How vrings are started, polled, reset and told of changes, on every transport."""

import json
import os
import signal
import struct
import time

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import IN, OK, BlkDriver, started_disk
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing

pytestmark = pytest.mark.timeout(60)

PLAIN = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_BLK_FLUSH | fe.F_INDIRECT
PROTOCOL = (1 << 20) - 1 & ~fe.INBAND
CONFIG_WCE = 1 << 11
F_RING_RESET, F_ORDER_PLATFORM = 1 << 40, 1 << 36
NO_FD = 0x100
MIB = 1 << 20
SAVE, LOAD, STOPPED = 0, 1, 0


@pytest.fixture
def frontend(backend):
    connection = fe.Frontend(backend.socket)
    yield connection
    connection.close()


@pytest.fixture
def memory():
    ram = GuestMemory()
    yield ram
    ram.close()


def ring_of(memory, features, size=16):
    kind = PackedRing if features & fe.F_PACKED else DriverRing
    return kind(memory, size, event_idx=bool(features & fe.F_EVENT_IDX))


def base_of(features):
    return PackedRing.START if features & fe.F_PACKED else 0


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_ring_without_kick_and_call_is_polled_on_both_sides(frontend, memory, layout):
    features = PLAIN | layout
    frontend.negotiate(features, PROTOCOL)
    frontend.set_memory(memory)
    ring = ring_of(memory, features)
    frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, ring.size))
    frontend.set_addresses(0, ring)
    frontend.tell(fe.SET_VRING_BASE, struct.pack("=II", 0, base_of(features)))
    frontend.tell(fe.SET_VRING_CALL, struct.pack("=Q", NO_FD))
    frontend.tell(fe.SET_VRING_ERR, struct.pack("=Q", NO_FD))
    frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", NO_FD))
    frontend.enable(0, 1)
    disk = BlkDriver(ring)
    memory.pack("<IIQ", disk.header, IN, 0, 0)
    for _ in range(5):
        before = ring.used_idx()
        # Nobody kicks and nobody calls.
        ring.make_available(
            ring.put_chain([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        )
        deadline = time.monotonic() + 10
        while ring.used_idx() == before:
            assert time.monotonic() < deadline, "the ring is not polled"
            time.sleep(0.002)
        assert ring.wait_used()[1] == 513
        time.sleep(0.02)  # long enough for the worker to fall asleep
    ring.close()


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
@pytest.mark.parametrize("indirect", [False, True])
def test_event_index(backend, layout, indirect):
    features = PLAIN | fe.F_EVENT_IDX | layout
    with started_disk(backend.socket, features, indirect=indirect) as (_, disk):
        content = [disk.read(sector, 512) for sector in range(40)]
        assert [disk.read(sector, 512) for sector in range(40)] == content
        time.sleep(0.3)  # the worker sleeps: it asks for a kick at the very next chain
        if layout:
            assert disk.ring.event() == (disk.ring.position(), 2)
        else:
            assert disk.ring.avail_event() == disk.ring.avail_idx
        assert disk.read(0, 512) == content[0]


def test_all_ring_features_at_once(backend):
    features = PLAIN | fe.F_EVENT_IDX | fe.F_PACKED | fe.F_IN_ORDER | F_RING_RESET | F_ORDER_PLATFORM
    with started_disk(backend.socket, features, indirect=True) as (_, disk):
        first = disk.read(0, 4096)
        order = []
        chains = [
            [(disk.header, 16, False), (disk.buffer + 512 * k, 512, True), (disk.status, 1, True)] for k in range(8)
        ]
        heads = [disk.put(chain) for chain in chains]
        disk.ring.make_available(*heads)
        disk.ring.kick()
        while len(order) < len(heads):
            order.append(disk.ring.wait_used()[0])
        assert order == heads, "IN_ORDER"
        assert disk.read(0, 4096) == first


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_one_ring_is_reset_while_another_runs(frontend, memory, layout):
    """VIRTIO_F_RING_RESET: a front-end stops the one ring, and starts it elsewhere and with another size."""
    features = PLAIN | F_RING_RESET | layout
    frontend.negotiate(features, PROTOCOL)
    frontend.set_memory(memory)
    rings = [ring_of(memory, features) for _ in range(2)]
    for index, ring in enumerate(rings):
        frontend.start_vring(index, ring, base_of(features))
    disks = [BlkDriver(ring) for ring in rings]
    content = disks[0].read(0, 512)
    for size in (8, 4, 16):
        frontend.enable(1, 0)
        frontend.stop_vring(1)
        assert disks[0].read(0, 512) == content
        fresh = ring_of(memory, features, size)
        frontend.start_vring(1, fresh, base_of(features))
        buffers = BlkDriver(fresh)
        assert [buffers.read(0, 512) for _ in range(2 * size)] == [content] * (2 * size)
        assert disks[0].read(0, 512) == content


def test_reset_owner_stops_the_rings(frontend, memory):
    frontend.negotiate(PLAIN, PROTOCOL)
    frontend.set_memory(memory)
    ring = ring_of(memory, PLAIN)
    frontend.start_vring(0, ring)
    disk = BlkDriver(ring)
    disk.read(0, 512)
    frontend.tell(fe.RESET_OWNER)
    memory.pack("<IIQ", disk.header, IN, 0, 0)
    disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
    time.sleep(0.2)
    assert ring.used_idx() == 1, "nothing is served any more"
    assert frontend.stop_vring(0) == 1


def test_new_size_reaches_the_front_end_by_the_channel(backend, image, frontend):
    frontend.negotiate(PLAIN, PROTOCOL)
    channel = frontend.open_channel()
    size_bytes = image.stat().st_size
    try:
        os.truncate(image, size_bytes + MIB)
        os.kill(backend.process.pid, signal.SIGUSR1)
        assert channel.receive() == (fe.CHANNEL_CONFIG_CHANGE, 1 | fe.NEED_REPLY, b"")
        channel.acknowledge(fe.CHANNEL_CONFIG_CHANGE)
        assert struct.unpack("<Q", frontend.get_config(0, 8)) == ((size_bytes + MIB) // 512,)
    finally:
        os.truncate(image, size_bytes)
        os.kill(backend.process.pid, signal.SIGUSR1)
    assert channel.receive()[0] == fe.CHANNEL_CONFIG_CHANGE
    channel.acknowledge(fe.CHANNEL_CONFIG_CHANGE)
    assert struct.unpack("<Q", frontend.get_config(0, 8)) == (size_bytes // 512,)
    channel.close()


def carries_state(frontend, backend):
    """A pipe's end cannot cross a VVU function: its proxy masks the feature."""
    _, offered = frontend.negotiate(PLAIN | CONFIG_WCE, PROTOCOL)
    assert bool(offered & fe.DEVICE_STATE) == (backend.name in {"socket", "fd"})
    return offered & fe.DEVICE_STATE


def transfer(frontend, direction, end):
    (answer,) = struct.unpack("=Q", frontend.ask(fe.SET_DEVICE_STATE_FD, struct.pack("=II", direction, STOPPED), [end]))
    return answer


def test_device_state_goes_from_one_back_end_to_the_next(frontend, backend):
    if not carries_state(frontend, backend):
        return
    frontend.tell(fe.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0")
    ours, theirs = os.pipe()
    assert transfer(frontend, SAVE, theirs) == NO_FD
    os.close(theirs)
    with open(ours, "rb") as pipe:
        state = pipe.read()
    assert frontend.ask_u64(fe.CHECK_DEVICE_STATE) == 0
    assert json.loads(state)["writeback"] is False
    frontend.tell(fe.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\1")
    theirs, ours = os.pipe()
    assert transfer(frontend, LOAD, theirs) == NO_FD
    os.close(theirs)
    with open(ours, "wb") as pipe:
        pipe.write(state)
    assert frontend.ask_u64(fe.CHECK_DEVICE_STATE) == 0
    assert frontend.get_config(32, 1) == b"\0"


def test_device_state_that_is_none_is_refused(frontend, backend, memory):
    if not carries_state(frontend, backend):
        return
    assert frontend.ask_u64(fe.CHECK_DEVICE_STATE) != 0, "nothing was transferred"
    theirs, ours = os.pipe()
    assert transfer(frontend, LOAD, theirs) == NO_FD
    os.write(ours, b"nonsense")
    os.close(ours)
    assert frontend.ask_u64(fe.CHECK_DEVICE_STATE) != 0
    assert transfer(frontend, 7, theirs) & 0xFF, "no such direction"
    frontend.set_memory(memory)
    ring = ring_of(memory, PLAIN)
    frontend.start_vring(0, ring)
    assert transfer(frontend, SAVE, theirs) & 0xFF, "a ring runs"
    assert BlkDriver(ring).request(IN, size=512)[0] == OK
    os.close(theirs)


def test_offered_protocol_features(frontend, backend):
    """Bits of docs/interop/vhost-user.rst, "Protocol features"; nothing is offered that is not implemented."""
    _, offered = frontend.negotiate()
    everywhere = {0, 1, 3, 5, 9, 12, 13, 14, 15, 16}
    on_sockets = {19} if backend.name in {"socket", "fd"} else set()
    assert {bit for bit in range(64) if offered >> bit & 1} == everywhere | on_sockets


def test_offered_features(frontend):
    """virtio 1.2, 5.2.3 and 6, with vhost-user's own bits."""
    offered, _ = frontend.negotiate()
    block = {2, 6, 9, 10, 11, 12, 13, 14}
    reserved = {28, 29, 32, 33, 34, 35, 36, 40}
    vhost_user = {26, 30}
    assert {bit for bit in range(64) if offered >> bit & 1} == block | reserved | vhost_user


def test_memory_beyond_4_gib(backend, image):
    """A ring and its buffers behind 5 GiB of other memory, and a buffer across the 4 GiB line inside it."""
    ram = GuestMemory(layout=((1 << 33, 16 * MIB), (0, 5 << 30)))
    content = image.read_bytes()
    with started_disk(backend.socket, memory=ram) as (_, disk):
        assert disk.read(3, 4096) == content[1536 : 1536 + 4096]
        disk.buffer = (4 << 30) - 1024
        assert disk.read(8, 4096) == content[4096:8192]
        disk.write(8, content[4096:8192])
