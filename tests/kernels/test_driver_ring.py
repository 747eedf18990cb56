import os
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import driver_ring
from kernels.driver_layout import ERR_USED_ID, ERR_USED_IDX, ERR_USED_LEN, STATUS_UNSET
from tests.kernels.driver_bench import AVAIL, USED, DriverBench
from tests.mock.blk_device import FLUSH, IN, OUT

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def bench():
    made = DriverBench()
    yield made
    made.close()


def put(bench, tag, kind=IN, sector=0):
    bench.tags[tag]["kind"] = kind
    bench.tags[tag]["sector"] = sector
    driver_ring.put_request(bench.ring, bench.tags[tag])


def kicks(bench):
    try:
        return os.eventfd_read(bench.kick_fd)
    except BlockingIOError:
        return 0


def event_passed(event, new, old):
    """virtio 1.2, 2.7.10: whether one of the indices old+1..new is the one after `event`."""
    return any((old + step) % 65536 == event for step in range((new - old) % 65536))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), indirect=st.booleans(), event_idx=st.booleans(), start=st.sampled_from([0, 1, 65530, 65535]))
def test_any_order_of_work_agrees_with_the_model(data, indirect, event_idx, start):
    """Puts, publishes, completions out of order and takes, against lists and a dictionary."""
    bench = DriverBench(size=16, indirect=indirect, event_idx=event_idx, start=start)
    try:
        free, unpublished, pending = set(range(bench.depth)), [], []
        completed, shown = [], deque()
        published_idx = start
        for _ in range(data.draw(st.integers(1, 60))):
            step = data.draw(st.sampled_from(["put", "publish", "take avail", "complete", "show", "take used"]))
            if step == "put" and free:
                tag = data.draw(st.sampled_from(sorted(free)))
                free.remove(tag)
                kind = data.draw(st.sampled_from([IN, OUT, FLUSH]))
                sector = data.draw(st.integers(0, 100))
                put(bench, tag, kind, sector)
                unpublished.append((tag, kind, sector))
            elif step == "publish":
                new = (published_idx + len(unpublished)) % 65536
                avail_event = int.from_bytes(bench.read(USED + 4 + 8 * 16, 2), "little")
                wanted = bool(unpublished) and (not event_idx or event_passed(avail_event, new, published_idx))
                assert driver_ring.publish(bench.ring) == wanted
                assert kicks(bench) == int(wanted)
                pending += unpublished
                unpublished, published_idx = [], new
            elif step == "take avail":
                before = len(bench.device.taken)
                bench.device.take()
                heads = bench.device.taken[before:]
                # In the order in which they were published, and nothing that was not.
                expected = pending[len(pending) - len(heads) :] if heads else []
                assert [int(bench.heads[head]) for head in heads] == [tag for tag, _, _ in expected]
            elif step == "complete" and bench.device.taken:
                head = bench.device.taken.pop(data.draw(st.integers(0, len(bench.device.taken) - 1)))
                tag = int(bench.heads[head])
                bench.device.complete(head)
                kind, sector = next((kind, sector) for known, kind, sector in pending if known == tag)
                assert bench.device.log[-1] == (kind, sector, 0 if kind == FLUSH else 512)
                completed.append(tag)
            elif step == "show":
                bench.device.publish()
                shown.extend(completed)
                completed = []
            elif step == "take used":
                assert driver_ring.count_used(bench.ring) == len(shown)
                if shown:
                    tag = shown.popleft()
                    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == tag
                    assert driver_ring.status_of(bench.tags[tag]) == 0
                    pending = [entry for entry in pending if entry[0] != tag]
                    free.add(tag)
            assert bench.ring["in_flight"] == bench.depth - len(free)
    finally:
        bench.close()


@pytest.mark.parametrize("indirect", [True, False])
def test_data_goes_both_ways(indirect):
    bench = DriverBench(indirect=indirect)
    bench.ram[0x20000 : 0x20000 + 512] = 7
    put(bench, 0, OUT, 3)
    driver_ring.publish(bench.ring)
    bench.device.serve()
    assert bench.image[3 * 512 : 4 * 512] == bytes([7]) * 512
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == 0
    bench.ram[0x20000 : 0x20000 + 512] = 0
    put(bench, 0, IN, 3)  # the same tag in the other direction: its descriptors must follow
    driver_ring.publish(bench.ring)
    bench.device.serve()
    assert bench.read(0x20000, 512) == bytes([7]) * 512
    bench.close()


def test_a_used_index_beyond_what_is_in_flight_is_refused(bench):
    put(bench, 0)
    driver_ring.publish(bench.ring)
    bench.device.jump = 1
    bench.device.serve()
    assert driver_ring.count_used(bench.ring) == ERR_USED_IDX


def test_a_used_index_that_goes_back_is_refused(bench):
    put(bench, 0)
    driver_ring.publish(bench.ring)
    bench.device.jump = -2
    bench.device.serve()
    assert driver_ring.count_used(bench.ring) == ERR_USED_IDX


@pytest.mark.parametrize("head", [1, 15, 16, 17, 65535, 65536, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_used_id_that_is_not_in_flight_is_refused(bench, head):
    put(bench, 0)
    driver_ring.publish(bench.ring)
    bench.device.used = lambda _, written: [(head, written)]
    bench.device.serve()
    assert driver_ring.count_used(bench.ring) == 1
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == ERR_USED_ID
    assert bench.ring["in_flight"] == 1


def test_a_request_that_is_used_twice_is_refused(bench):
    for tag in (0, 1):
        put(bench, tag)
    driver_ring.publish(bench.ring)
    bench.device.used = lambda _, written: [(0, written)]
    bench.device.serve()
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == 0
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == ERR_USED_ID


def test_without_indirect_only_the_head_of_a_chain_names_it():
    bench = DriverBench(indirect=False)
    put(bench, 0)
    driver_ring.publish(bench.ring)
    bench.device.used = lambda _, written: [(1, written)]  # its data descriptor
    bench.device.serve()
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == ERR_USED_ID
    bench.close()


@pytest.mark.parametrize(("kind", "written"), [(IN, 514), (OUT, 2), (FLUSH, 514), (IN, 0xFFFFFFFF)])
def test_more_written_than_there_is_room_for_is_refused(bench, kind, written):
    put(bench, 0, kind)
    driver_ring.publish(bench.ring)
    bench.device.used = lambda head, _: [(head, written)]
    bench.device.serve()
    assert driver_ring.take_used(bench.ring, bench.tags, bench.heads) == ERR_USED_LEN


def test_a_status_that_was_not_written_is_seen(bench):
    for _ in range(2):  # the second time an OK of the first is in memory
        put(bench, 0)
        driver_ring.publish(bench.ring)
        bench.device.serve()
        driver_ring.take_used(bench.ring, bench.tags, bench.heads)
        seen = driver_ring.status_of(bench.tags[0])
        bench.device.status = lambda kind, sector: None
    assert seen == STATUS_UNSET


@pytest.mark.parametrize("event_idx", [True, False])
def test_calls_are_wanted_only_before_a_sleep(event_idx):
    bench = DriverBench(event_idx=event_idx, start=65535)
    driver_ring.refuse_calls(bench.ring)
    if not event_idx:
        assert bench.read(AVAIL, 2) == b"\1\0"
    assert not driver_ring.want_calls(bench.ring)
    if event_idx:
        assert bench.read(AVAIL + 4 + 2 * 16, 2) == b"\xff\xff"
    else:
        assert bench.read(AVAIL, 2) == b"\0\0"
    put(bench, 0)
    driver_ring.publish(bench.ring)
    bench.device.serve()
    assert driver_ring.want_calls(bench.ring)  # work is there: no sleep
    bench.close()


def test_no_kick_for_a_device_that_wants_none():
    bench = DriverBench(event_idx=False)
    bench.ram[USED] = 1  # VIRTQ_USED_F_NO_NOTIFY
    put(bench, 0)
    assert not driver_ring.publish(bench.ring)
    assert kicks(bench) == 0
    bench.ram[USED] = 0
    put(bench, 1)
    assert driver_ring.publish(bench.ring)
    assert kicks(bench) == 1
    bench.close()


@pytest.mark.parametrize("indirect", [True, False])
def test_resubmitted_requests_are_those_that_were_in_flight(indirect):
    bench = DriverBench(indirect=indirect)
    for tag in range(4):
        put(bench, tag, OUT, 10 + tag)
    driver_ring.publish(bench.ring)
    bench.device.take()
    for head in (bench.device.taken[2], bench.device.taken[0]):
        bench.device.complete(head)
    bench.device.publish()
    driver_ring.take_used(bench.ring, bench.tags, bench.heads)  # tag 2; that tag 0 is done is not known yet
    driver_ring.reset_ring(bench.ring)
    bench.device.last_avail = bench.device.used_idx = 0
    bench.device.taken.clear()
    bench.device.log.clear()
    driver_ring.resubmit(bench.ring, bench.tags, bench.heads)
    assert kicks(bench)
    assert bench.device.serve() == 3
    assert bench.device.log == [(OUT, 10 + tag, 512) for tag in (0, 1, 3)]
    taken = [driver_ring.take_used(bench.ring, bench.tags, bench.heads) for _ in range(3)]
    assert taken == [0, 1, 3]
    assert not np.any(bench.tags["in_flight"])
    bench.close()
