"""vhost-user requests and their answers, on every transport."""

import os
import struct
import time

import pytest

from tests.conformance.conftest import IMAGE_BYTES
from tests.mock import frontend as fe
from tests.mock.blk_driver import BlkDriver, started_disk
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory

pytestmark = pytest.mark.timeout(60)


def used_within(ring, seconds):
    """Whether the device uses anything in this time. (A call may still be on its way from the request before.)"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ring.used_idx() != ring.seen_used:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def frontend(backend):
    connection = fe.Frontend(backend.socket)
    yield connection
    connection.close()


def test_features(frontend):
    offered, protocol = frontend.negotiate()
    wanted = fe.F_VERSION_1 | fe.F_INDIRECT | fe.F_EVENT_IDX | fe.F_BLK_FLUSH | fe.F_BLK_MQ | fe.F_PROTOCOL_FEATURES
    assert offered & wanted == wanted
    assert not offered & fe.F_BLK_RO
    assert protocol & (fe.MQ | fe.REPLY_ACK | fe.CONFIG) == fe.MQ | fe.REPLY_ACK | fe.CONFIG


def test_queue_number(frontend):
    frontend.negotiate()
    assert frontend.ask_u64(fe.GET_QUEUE_NUM) == 4


def test_configuration_space(frontend):
    frontend.negotiate()
    space = frontend.get_config(0, 60)
    assert len(space) == 60
    capacity, _, seg_max = struct.unpack_from("<QII", space)
    assert capacity * 512 == IMAGE_BYTES
    assert seg_max == 254
    assert struct.unpack_from("<I", space, 20) == (512,)
    assert struct.unpack_from("<H", space, 34) == (4,)
    assert frontend.get_config(0, 8) == space[:8]


def test_configuration_space_beyond_its_end_gives_an_empty_answer(frontend):
    frontend.negotiate()
    assert frontend.ask(fe.GET_CONFIG, struct.pack("=III", 250, 60, 0) + bytes(60)) == b""


def test_set_config_is_refused(frontend):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8))


def test_unknown_request_is_refused_and_the_session_goes_on(frontend):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(999, bytes(8))
    assert frontend.ask_u64(fe.GET_QUEUE_NUM) == 4


def test_unknown_request_without_need_reply_is_ignored(frontend):
    frontend.negotiate(protocol=fe.MQ | fe.CONFIG)
    frontend.send(999, bytes(8))
    assert frontend.ask_u64(fe.GET_QUEUE_NUM) == 4


def test_features_that_were_not_offered_are_refused(frontend):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_FEATURES, struct.pack("=Q", 1 << 50))


@pytest.mark.parametrize("size", [0, 3, 512, 1 << 20])
def test_vring_size_that_is_not_possible_is_refused(frontend, size):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, size))


@pytest.mark.parametrize("request_number", [fe.SET_VRING_NUM, fe.SET_VRING_BASE, fe.SET_VRING_ENABLE])
def test_vring_that_does_not_exist_is_refused(frontend, request_number):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(request_number, struct.pack("=II", 4, 16))


@pytest.mark.parametrize("body", [b"", bytes(4), bytes(12)])
def test_payload_of_a_wrong_size_is_refused(frontend, body):
    frontend.negotiate()
    with pytest.raises(fe.Refused):
        frontend.tell(fe.SET_FEATURES, body)


def test_reply_without_payload_rules_when_acks_are_off(frontend):
    frontend.negotiate(protocol=fe.MQ)
    frontend.tell(fe.SET_OWNER)
    assert frontend.ask_u64(fe.GET_QUEUE_NUM) == 4


def test_wrong_version_ends_the_session_and_the_next_front_end_is_served(backend, frontend):
    frontend.send(fe.GET_FEATURES, flags=2)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        frontend.receive()
    again = fe.Frontend(backend.socket)
    again.negotiate()
    again.close()


def test_oversized_payload_ends_the_session_and_the_next_front_end_is_served(backend, frontend):
    frontend.sock.sendall(fe.HEADER.pack(fe.SET_FEATURES, 1, 1 << 30))
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        frontend.receive()
    again = fe.Frontend(backend.socket)
    again.negotiate()
    again.close()


def test_memory_table_with_fewer_fds_than_regions_ends_or_is_refused(backend, frontend):
    frontend.negotiate()
    body = struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 0, 4096, 0, 0) + struct.pack("=QQQQ", 8192, 4096, 8192, 0)
    memory = GuestMemory(((0, 4096),))
    with pytest.raises((fe.Refused, ConnectionResetError)):
        frontend.tell(fe.SET_MEM_TABLE, body, [memory.regions[0][3]])
    memory.close()
    frontend.close()
    with started_disk(backend.socket) as (_, disk):
        disk.read(0, 512)


def test_memory_table_longer_than_its_file_is_refused(backend, frontend):
    frontend.negotiate()
    memory = GuestMemory(((0, 4096),))
    with pytest.raises((fe.Refused, ConnectionResetError)):
        frontend.tell(fe.SET_MEM_TABLE, struct.pack("=IIQQQQ", 1, 0, 0, 1 << 30, 0, 0), [memory.regions[0][3]])
    memory.close()
    frontend.close()
    with started_disk(backend.socket) as (_, disk):
        disk.read(0, 512)


def test_vring_base_is_given_back(frontend):
    frontend.negotiate()
    frontend.tell(fe.SET_VRING_BASE, struct.pack("=II", 2, 4711))
    assert frontend.stop_vring(2) == 4711


def test_start_stop_start_on_one_connection(backend):
    with started_disk(backend.socket) as (frontend, disk):
        first = disk.read(0, 4096)
        assert frontend.stop_vring(0) == 1
        frontend.start_vring(0, disk.ring, base=1)
        assert disk.read(0, 4096) == first
        assert frontend.stop_vring(0) == 2
        fresh = BlkDriver(DriverRing(disk.memory, 8))
        frontend.start_vring(0, fresh.ring)
        assert fresh.read(0, 4096) == first
        fresh.ring.close()


def test_stopped_ring_is_not_served_until_it_starts_again(backend):
    with started_disk(backend.socket) as (frontend, disk):
        disk.read(0, 512)
        base = frontend.stop_vring(0)
        disk.memory.pack("<IIQ", disk.header, 0, 0, 0)
        disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        assert not used_within(disk.ring, 0.3)
        frontend.start_vring(0, disk.ring, base=base)
        assert disk.finish() == (0, 513)


def test_disabled_ring_is_not_served_until_it_is_enabled(backend):
    with started_disk(backend.socket) as (frontend, disk):
        frontend.enable(0, 0)
        disk.memory.pack("<IIQ", disk.header, 0, 0, 0)
        disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        assert not used_within(disk.ring, 0.3)
        frontend.enable(0, 1)
        assert disk.finish() == (0, 513)


def test_ring_starts_enabled_without_protocol_features(backend):
    features = fe.F_VERSION_1 | fe.F_BLK_FLUSH
    frontend = fe.Frontend(backend.socket)
    memory = GuestMemory()
    frontend.tell(fe.SET_OWNER)
    frontend.tell(fe.SET_FEATURES, struct.pack("=Q", features))
    frontend.set_memory(memory)
    disk = BlkDriver(DriverRing(memory))
    frontend.start_vring(0, disk.ring, enable=False)
    disk.read(0, 512)
    frontend.close()
    memory.close()
    disk.ring.close()


def test_several_vrings_at_once(backend):
    with started_disk(backend.socket) as (frontend, disk):
        others = [BlkDriver(DriverRing(disk.memory)) for _ in range(3)]
        for index, other in enumerate(others, 1):
            frontend.start_vring(index, other.ring)
        for other in [disk, *others]:
            assert other.read(8, 512) == disk.read(8, 512)
        for other in others:
            other.ring.close()


def test_call_eventfd_can_change_while_the_ring_runs(backend):

    with started_disk(backend.socket) as (frontend, disk):
        disk.read(0, 512)
        old = disk.ring.call_fd
        disk.ring.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        frontend.tell(fe.SET_VRING_CALL, struct.pack("=Q", 0), [disk.ring.call_fd])
        assert disk.ring.wait_call(0.5) in (True, False)  # a call for good measure is allowed
        disk.memory.pack("<IIQ", disk.header, 0, 0, 0)
        disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
        assert disk.ring.wait_call()
        os.close(old)


def test_memory_table_can_change_while_a_ring_runs(backend):
    with started_disk(backend.socket) as (frontend, disk):
        before = disk.read(16, 4096)
        frontend.set_memory(disk.memory)
        assert disk.read(16, 4096) == before


def test_ring_outside_of_memory_is_refused(backend):
    with started_disk(backend.socket) as (frontend, disk):
        disk.read(0, 512)
        frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 1, 16))
        frontend.tell(fe.SET_VRING_ADDR, struct.pack("=IIQQQQ", 1, 0, 0x1000, 0x2000, 0x3000, 0))
        frontend.tell(fe.SET_VRING_ENABLE, struct.pack("=II", 1, 1))
        kick = os.eventfd(0)
        with pytest.raises(fe.Refused):
            frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", 1), [kick])
        os.close(kick)
        disk.read(0, 512)


def test_front_end_that_leaves_in_the_middle_of_a_message(backend, frontend):
    frontend.sock.sendall(fe.HEADER.pack(fe.SET_FEATURES, 1, 8) + b"abc")
    frontend.close()
    with started_disk(backend.socket) as (_, disk):
        disk.read(0, 512)
