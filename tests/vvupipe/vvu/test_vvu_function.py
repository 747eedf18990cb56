"""The function register by register, with offsets and layouts written out again here."""

import errno
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvupipe.vvu.function import VvuFunction
from vvupipe.vvu.kick_relay import KickRelay

CONFIG, MSIX = 7, 2
RAM = 0x100000


SHARED_RELAY = []


@pytest.fixture(scope="module", autouse=True)
def relay():
    relay = KickRelay()
    SHARED_RELAY.append(relay)  # for tests that hypothesis runs many times
    yield relay
    SHARED_RELAY.clear()
    relay.close()


class Told:
    """What a proxy is told."""

    def __init__(self):
        self.events = []

    def backend_up(self):
        self.events.append("up")

    def backend_down(self):
        self.events.append("down")

    def notified(self, queue):
        self.events.append(queue)


@pytest.fixture
def function(relay):
    function = VvuFunction("f", relay, uuid=bytes(range(16)))
    function.backend = Told()
    yield function
    function.close()


@pytest.fixture
def ram(function):
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    function.dma.map(RAM, 1 << 20, fd, 0, writable=True)
    yield fd
    os.close(fd)


def get(function, region, offset, width):
    return int.from_bytes(function.read(region, offset, width), "little")


def put(function, region, offset, width, value):
    function.write(region, offset, value.to_bytes(width, "little"))


def capabilities(function):
    config, found = function.read(CONFIG, 0, 256), {}
    offset = config[0x34]
    while offset:
        if config[offset] == 9:
            found[config[offset + 3]] = config[offset : offset + config[offset + 2]]
        offset = config[offset + 1]
    return found


def test_function_level_reset(function):
    config = function.read(CONFIG, 0, 256)
    offset = config[0x34]
    while config[offset] != 0x13:
        offset = config[offset + 1]
    assert config[offset + 2 : offset + 6] == bytes((6, 3, 0, 0))
    function.write(0, 0x2000, b"\1")  # back-end up
    function.write(CONFIG, offset + 4, b"\0")
    assert function.read(0, 0x2000, 1) == b"\1"
    function.write(CONFIG, offset + 4, b"\1")
    assert function.read(0, 0x2000, 1) == b"\0"
    assert function.read(CONFIG, offset + 4, 1) == b"\0"


def test_pci_identity(function):
    config = function.read(CONFIG, 0, 64)
    assert struct.unpack_from("<HH", config) == (0x1AF4, 0x107D)
    assert config[8:12] == bytes((1, 0x00, 0xFF, 0x00))


def test_capabilities_of_the_contract(function):
    caps = capabilities(function)
    assert set(caps) == {1, 2, 3, 4, 5, 6, 7, 8, 0x76}
    where = {kind: (cap[4], *struct.unpack_from("<II", cap, 8)) for kind, cap in caps.items()}
    assert where[1][2] == 56
    assert where[4][2] == 24
    assert {where[k][0] for k in (1, 2, 3, 4)} == {0}
    assert (where[6], len(caps[6]), struct.unpack_from("<I", caps[6], 16)) == ((2, 0, 0x2000), 20, (4,))
    assert (where[7], len(caps[7])) == ((2, 0x2000, 0x1000), 16)
    offset_low, length_low, offset_high, length_high = struct.unpack_from("<IIII", caps[8], 8)
    assert (caps[8][4], len(caps[8]), offset_low | offset_high << 32) == (4, 24, 0)
    assert length_low | length_high << 32 == 1 << 38


def test_small_shared_memory_has_the_short_capability(relay):
    function = VvuFunction("f", relay, shared_memory_bytes=1 << 30)
    cap = capabilities(function)[8]
    assert (len(cap), struct.unpack_from("<II", cap, 8)) == (16, (0, 1 << 30))
    function.close()


def test_msix_has_two_and_one_and_one_for_each_vring(function):
    assert function.irqs[MSIX].count == 2 + 1 + 64
    assert get(function, CONFIG, 0x42, 2) == 66


def test_features_and_queues(function):
    put(function, 0, 0, 4, 1)
    assert get(function, 0, 4, 4) == 3
    put(function, 0, 0, 4, 0)
    assert get(function, 0, 4, 4) == 0
    assert (get(function, 0, 18, 2), get(function, 0, 24, 2)) == (2, 256)


def test_device_configuration(function):
    assert struct.unpack("<II16s", function.read(0, 0x2000, 24)) == (0, 64, bytes(range(16)))
    put(function, 0, 0x2004, 4, 0)  # read-only
    put(function, 0, 0x2000, 4, 0xFFFFFFFF)  # only bit 0 is the driver's
    assert struct.unpack("<II", function.read(0, 0x2000, 8)) == (1, 64)


def start(function, desc=RAM, features=3, places=None, enabled=(0, 1)):
    """places: addresses of descriptors, available and used ring of queue 0; None: one after the other from `desc`.

    enabled: the queues that are enabled before DRIVER_OK.
    """
    places = places or {part: desc + 0x2000 * part for part in range(3)}
    put(function, 0, 20, 1, 3)
    put(function, 0, 8, 4, 1)
    put(function, 0, 12, 4, features)
    put(function, 0, 20, 1, 11)
    for queue in (0, 1):
        put(function, 0, 22, 2, queue)
        put(function, 0, 26, 2, 1 + queue)
        for part in range(3):
            put(function, 0, 32 + 8 * part, 8, places[part] + 0x10000 * queue)
        if queue in enabled:
            put(function, 0, 28, 2, 1)
    put(function, 0, 16, 2, 0)
    put(function, 0, 20, 1, 15)
    return get(function, 0, 20, 1)


def test_back_end_is_up_after_driver_ok_and_status_bit(function, ram):
    put(function, 0, 0x2000, 4, 1)
    assert function.backend.events == []
    assert start(function) == 15
    assert function.backend.events == ["up"]
    put(function, 0, 0x3000, 2, 0)
    put(function, 0, 0x3004, 2, 1)
    put(function, 0, 0x2000, 4, 0)
    put(function, 0, 0x2000, 4, 1)
    assert function.backend.events == ["up", 0, 1, "down", "up"]
    put(function, 0, 20, 1, 0)
    assert function.backend.events[-1] == "down"
    assert get(function, 0, 0x2000, 4) == 0
    assert function.queue(0) is None


@pytest.mark.parametrize("early", [(), (0,), (1,)])
def test_queues_may_be_enabled_after_driver_ok(function, ram, early):
    put(function, 0, 0x2000, 4, 1)
    start(function, enabled=early)
    assert function.backend.events == []
    for queue in {0, 1} - set(early):
        put(function, 0, 22, 2, queue)
        put(function, 0, 28, 2, 1)
    assert function.backend.events == ["up"]
    assert function.queue(0)
    assert function.queue(1)


def test_notification_before_driver_ok_is_dropped(function):
    put(function, 0, 0x3000, 2, 0)
    assert function.backend.events == []


def test_queue_outside_of_memory_makes_the_function_ask_for_a_reset(function, ram):
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    function.irqs[MSIX].set_eventfd(0, eventfd)
    assert start(function, desc=0x10000000) & 0x40
    assert os.eventfd_read(eventfd) == 1
    put(function, 0, 20, 1, 0)
    assert start(function) == 15


def test_memory_of_a_queue_in_use_cannot_be_taken_away(function, ram):
    start(function)
    function.before_unmap(0, 0x1000)
    assert get(function, 0, 20, 1) == 15
    function.before_unmap(RAM, 1 << 20)
    assert get(function, 0, 20, 1) & 0x40


@pytest.mark.parametrize("part", [0, 1, 2], ids=["descriptors", "available", "used"])
def test_each_part_of_a_queue_in_use_may_lie_anywhere(function, ram, part):
    order = [(part + k) % 3 for k in range(3)]  # the one in question is the lowest
    places = {each: RAM + 0x4000 * k for k, each in enumerate(order)}
    start(function, places=places)
    assert get(function, 0, 20, 1) == 15
    function.before_unmap(RAM + 0x1000, 0x3000)  # between two parts
    assert get(function, 0, 20, 1) == 15
    function.before_unmap(RAM, 0x1000)
    assert get(function, 0, 20, 1) & 0x40


@pytest.mark.parametrize(("read_only", "status"), [(0, 15), (1, 15), (2, 15 | 0x40)])
def test_what_the_function_only_reads_may_be_mapped_for_reading_alone(function, read_only, status):
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    for part in range(3):
        place = RAM + 0x20000 * part
        function.dma.map(place, 0x20000, fd, 0x20000 * part, writable=part != read_only)
    os.close(fd)
    assert start(function, places={part: RAM + 0x20000 * part for part in range(3)}) == status


def test_front_end_bit_interrupts_and_moves_the_generation(function, ram):
    start(function)
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    function.irqs[MSIX].set_eventfd(0, eventfd)
    generation = get(function, 0, 21, 1)
    function.set_frontend_up(True)
    function.set_frontend_up(True)
    assert os.eventfd_read(eventfd) == 1
    assert get(function, 0, 0x2000, 4) == 2
    assert get(function, 0, 21, 1) == generation + 1
    assert get(function, 0, 0x1000, 1) == 2  # ISR, cleared by reading
    assert get(function, 0, 0x1000, 1) == 0


def test_notification_registers(function):
    assert get(function, 2, 0x2000, 4) == 0xFFFF0000
    put(function, 2, 0x2000, 2, 5)
    put(function, 2, 0x2002, 2, 8)
    assert get(function, 2, 0x2000, 4) == 8 << 16 | 5
    put(function, 2, 0x2000, 4, 9 << 16 | 6)
    assert (get(function, 2, 0x2000, 2), get(function, 2, 0x2002, 2)) == (6, 9)
    put(function, 2, 0x2002, 2, 67)  # no such vector
    assert get(function, 2, 0x2002, 2) == 0xFFFF
    put(function, 2, 0x2000, 2, 64)  # no such vring
    put(function, 2, 0x2002, 2, 1)
    assert get(function, 2, 0x2002, 2) == 0xFFFF
    put(function, 2, 0x2000, 2, 5)
    assert get(function, 2, 0x2002, 2) == 8
    function.reset()
    assert get(function, 2, 0x2000, 4) == 0xFFFF0000


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_doorbell_takes_a_write_of_any_size(function, width):
    from vvupipe.memory.doorbell import Doorbell

    call, err = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    function.notifications.set_call(3, Doorbell(os.dup(call)))
    function.notifications.set_err(3, Doorbell(os.dup(err)))
    put(function, 2, 12, width, 0)
    assert os.eventfd_read(call) == 1
    put(function, 2, (1024 + 3) * 4, width, 0)
    assert os.eventfd_read(err) == 1
    put(function, 2, 16, width, 0)  # tied to nothing
    put(function, 2, 4 * 64, width, 0)  # beyond the last vring
    assert [(e.offset, os.fstat(e.fd).st_ino) for e in function.io_events(2)] == [
        (12, os.fstat(call).st_ino),
        ((1024 + 3) * 4, os.fstat(err).st_ino),
    ]
    function.notifications.forget_sibling()
    assert function.io_events(2) == []


def test_kick_that_the_kernel_watches_no_more_leaves_no_file_open(function, relay, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    function.irqs[MSIX].set_eventfd(3, os.eventfd(0, os.EFD_NONBLOCK))
    put(function, 2, 0x2000, 4, 3 << 16)
    function.notifications.set_kick(0, os.eventfd(0, os.EFD_NONBLOCK))

    def add(kick_fd, signal_fd):
        raise OSError(errno.ENOSPC, "max_user_watches")

    with monkeypatch.context() as patched:
        patched.setattr(relay, "add", add)
        for _ in range(3):
            with pytest.raises(OSError, match="max_user_watches"):
                function.notifications.set_kick(0, os.eventfd(0, os.EFD_NONBLOCK))
            with pytest.raises(OSError, match="max_user_watches"):
                function.irqs[MSIX].set_eventfd(3, os.eventfd(0, os.EFD_NONBLOCK))
        assert len(os.listdir("/proc/self/fd")) == before + 2
    function.notifications.set_kick(0, None)
    function.irqs[MSIX].disable()
    assert len(os.listdir("/proc/self/fd")) == before


def test_window_in_configuration_space_reaches_the_bars(function):
    config = function.read(CONFIG, 0, 256)
    offset = next(o for o in range(64, 256, 4) if config[o] == 9 and config[o + 3] == 5 and config[o + 2] == 20)
    put(function, CONFIG, offset + 4, 1, 0)
    put(function, CONFIG, offset + 8, 4, 0x2004)
    put(function, CONFIG, offset + 12, 4, 4)
    assert get(function, CONFIG, offset + 16, 4) == 64
    put(function, CONFIG, offset + 8, 4, 20)
    put(function, CONFIG, offset + 12, 4, 1)
    put(function, CONFIG, offset + 16, 1, 3)
    assert get(function, 0, 20, 1) == 3
    put(function, CONFIG, offset + 12, 4, 3)  # no access size
    put(function, CONFIG, offset + 16, 1, 0)
    assert get(function, 0, 20, 1) == 3


def test_regions(function):
    sizes = [function.region(index).size_bytes for index in range(9)]
    assert sizes == [0x8000, 0, 0x4000, 0, 1 << 38, 0, 0, 256, 0]
    with pytest.raises(OSError, match="does not exist"):
        function.read(1, 0, 1)


def test_client_that_left_leaves_a_function_as_new(function, ram):
    start(function)
    put(function, 0, 0x2000, 4, 1)
    put(function, CONFIG, 4, 2, 6)
    function.client_left()
    assert function.backend.events[-1] == "down"
    assert (get(function, 0, 20, 1), get(function, 0, 0x2000, 4), get(function, CONFIG, 4, 2)) == (0, 0, 0)


@pytest.mark.parametrize("offset", [0, 0x1000, 0x2000, 0x3000, 0x4000])
def test_access_of_no_bytes_is_none(function, ram, offset):
    start(function)
    function.set_frontend_up(True)
    function.backend.events.clear()
    function.write(0, offset, b"")
    function.write(2, 0, b"")
    assert function.read(0, offset, 0) == b""
    assert function.backend.events == []
    assert get(function, 0, 0x1000, 1) == 2, "the ISR status is cleared by reading it"


ACCESS = st.tuples(
    st.sampled_from([0, 0, 0, 2, 7]),
    st.one_of(st.integers(0, 64), st.integers(0x1FFC, 0x3010), st.integers(0, 0x3FF8)),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.integers(0, 255), st.just(RAM), st.integers(0, (1 << 64) - 1)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESS, max_size=60), st.booleans())
def test_no_register_access_does_worse_than_a_reset_can_mend(accesses, started):
    relay = SHARED_RELAY[0]
    function = VvuFunction("f", relay)
    function.backend = Told()
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    function.dma.map(RAM, 1 << 20, fd, 0, writable=True)
    os.close(fd)
    if started:
        assert start(function) == 15
    for region, offset, width, value in accesses:
        if offset + width <= function.region(region).size_bytes:
            assert len(function.read(region, offset, width)) == width
            put(function, region, offset, width, value & ((1 << 8 * width) - 1))
    put(function, 0, 20, 1, 0)
    assert start(function) == 15
    function.close()
