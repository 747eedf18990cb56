"""The largest and the smallest of everything, on every transport: 64 vrings, 2 to 32768 entries."""

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import IN, OK, BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing

pytestmark = pytest.mark.timeout(60)

PLAIN = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_BLK_FLUSH | fe.F_INDIRECT | fe.F_EVENT_IDX
PROTOCOL = (1 << 20) - 1 & ~fe.INBAND
QUEUES = 64


@pytest.fixture(scope="module")
def backend(carrier, image, tmp_path_factory):
    options = ("--num-queues", QUEUES, "--queue-size", 32768)
    with carrier(tmp_path_factory.mktemp("sizes"), image, *options) as running:
        yield running


@pytest.fixture
def disk_of(backend):
    """disk_of(layout, size, index=0): a disk on a fresh front-end."""
    frontend = fe.Frontend(backend.socket)
    memory = GuestMemory(layout=((0, 128 << 20),))
    rings = []

    def start(layout, size, index=0):
        features = PLAIN | layout
        if not frontend.acks:
            frontend.negotiate(features, PROTOCOL)
            frontend.set_memory(memory)
        ring = (PackedRing if layout else DriverRing)(memory, size, event_idx=True)
        rings.append(ring)
        frontend.start_vring(index, ring, PackedRing.START if layout else 0)
        return BlkDriver(ring, indirect=size < 4)

    yield start
    frontend.close()
    for ring in rings:
        ring.close()
    memory.close()


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
@pytest.mark.parametrize("size", [2, 32768])
def test_ring_sizes(disk_of, layout, size):
    disk = disk_of(layout, size)
    content = disk.read(0, 512)
    assert [disk.read(0, 512) for _ in range(50)] == [content] * 50


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_whole_ring_of_the_largest_size_at_once(disk_of, layout):
    disk = disk_of(layout, 32768)
    memory, ring = disk.memory, disk.ring
    memory.pack("<IIQ", disk.header, IN, 0, 0)
    chain = [(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)]
    heads = [ring.put_chain(chain) for _ in range(32768 // 3)]
    ring.make_available(*heads)
    ring.kick()
    assert [ring.wait_used() for _ in heads] == [(head, 513) for head in heads]


def test_longest_chain(disk_of):
    """Every descriptor of a ring of 32768 in one request: a header, data a byte here and a sector there, the status."""
    disk = disk_of(0, 32768)
    memory = disk.memory
    memory.pack("<IIQ", disk.header, IN, 0, 0)
    pieces = [(disk.buffer + 16 * k, 16, True) for k in range(32768 - 2)]
    size = 16 * len(pieces) // 512 * 512
    pieces = pieces[: size // 16]
    disk.submit([(disk.header, 16, False), *pieces, (disk.status, 1, True)])
    assert disk.finish() == (OK, size + 1)


@pytest.mark.parametrize("layout", [0, fe.F_PACKED])
def test_all_vrings_at_once(disk_of, layout):
    disks = [disk_of(layout, 4, index) for index in range(QUEUES)]
    content = disks[0].read(8, 512)
    for _ in range(3):
        assert [disk.read(8, 512) for disk in disks] == [content] * QUEUES
