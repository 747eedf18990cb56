"""Both sides against each other, and the device's side against a driver that lies."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvupipe.errors import ProtocolError
from vvupipe.virtio.split_queue import DeviceQueue, DriverQueue, FlatMemory, QueueLayout

BASE = 0x100000


def make(size=8, memory_bytes=1 << 16):
    store = bytearray(memory_bytes)
    memory = FlatMemory(memoryview(store), BASE)
    layout = QueueLayout.packed_at(BASE, size)
    return store, memory, layout, DriverQueue(memory, layout), DeviceQueue(memory, layout)


def put_desc(store, index, address, length, flags, following):
    struct.pack_into("<QIHH", store, 16 * index, address, length, flags, following)


def offer(store, layout, heads, idx=None):
    avail = layout.avail_gpa - BASE
    for k, head in enumerate(heads):
        struct.pack_into("<H", store, avail + 4 + 2 * (k % layout.size), head)
    struct.pack_into("<H", store, avail + 2, len(heads) if idx is None else idx)


def test_layout_follows_the_alignment_of_the_specification():
    layout = QueueLayout.packed_at(0x1000, 256)
    assert layout.avail_gpa == 0x1000 + 4096
    assert layout.used_gpa % 4 == 0
    assert layout.used_gpa >= layout.avail_gpa + 6 + 512
    layout.check()


@pytest.mark.parametrize(
    "layout",
    [
        QueueLayout(0, 0, 0, 0),
        QueueLayout(3, 0, 0, 0),
        QueueLayout(65536, 0, 0, 0),
        QueueLayout(8, 8, 0, 0),
        QueueLayout(8, 0, 1, 0),
        QueueLayout(8, 0, 0, 2),
    ],
)
def test_impossible_layout_is_refused(layout):
    with pytest.raises(ProtocolError):
        layout.check()


def test_ring_outside_of_memory_is_refused():
    memory = FlatMemory(memoryview(bytearray(256)), BASE)
    with pytest.raises(ProtocolError, match="outside of memory"):
        DeviceQueue(memory, QueueLayout.packed_at(BASE, 256))


def test_message_there_and_back():
    store, _, _, driver, device = make()
    store[0x8000:0x8005] = b"hello"
    head = driver.add([(BASE + 0x8000, 5)], [(BASE + 0x9000, 3), (BASE + 0xA000, 10)])
    assert device.available == 1
    chain = device.pop()
    assert (chain.read(), chain.room_bytes) == (b"hello", 13)
    assert chain.write(b"answer") == 6
    assert device.push(chain.head, 6)
    assert driver.take() == (head, 6)
    assert (bytes(store[0x9000:0x9003]), bytes(store[0xA000:0xA003])) == (b"ans", b"wer")
    assert driver.take() is None
    assert driver.free_descriptors == 8


def test_chain_too_small_for_the_message():
    _, _, _, driver, device = make()
    driver.add([], [(BASE + 0x8000, 4)])
    with pytest.raises(ProtocolError, match="do not fit"):
        device.pop().write(b"12345")


def test_interrupt_suppression_is_heeded():
    store, _, layout, driver, device = make()
    driver.add([], [(BASE + 0x8000, 4)])
    struct.pack_into("<H", store, layout.avail_gpa - BASE, 1)
    assert device.push(device.pop().head, 0) is False


def test_more_chains_than_the_ring_holds():
    store, _, layout, _, device = make()
    offer(store, layout, [], idx=9)
    with pytest.raises(ProtocolError, match="9 chains"):
        device.pop()


@pytest.mark.parametrize(
    ("descriptors", "rule"),
    [
        ([(BASE, 16, 1, 8)], "descriptor 8"),
        ([(BASE, 16, 1, 0)], "longer than its queue"),
        ([(BASE, 16, 3, 1), (BASE, 16, 0, 0)], "after a device-writable"),
        ([(BASE, 16, 4, 0)], "indirect"),
        ([(BASE + 0xFFFF, 2, 0, 0)], "outside of memory"),
        ([(0, 16, 2, 0)], "outside of memory"),
        ([((1 << 64) - 1, 0xFFFFFFFF, 2, 0)], "outside of memory"),
    ],
)
def test_malformed_chain_names_the_broken_rule(descriptors, rule):
    store, _, layout, _, device = make()
    for index, descriptor in enumerate(descriptors):
        put_desc(store, index, *descriptor)
    offer(store, layout, [0])
    with pytest.raises(ProtocolError, match=rule):
        device.pop()


def test_head_outside_of_the_table():
    store, _, layout, _, device = make()
    offer(store, layout, [8])
    with pytest.raises(ProtocolError, match="descriptor 8"):
        device.pop()


def test_driver_refuses_what_it_did_not_give():
    _, _, _, driver, device = make()
    driver.add([], [(BASE + 0x8000, 4)])
    device.push(5, 0)
    with pytest.raises(ProtocolError, match="chain 5"):
        driver.take()


def test_too_many_descriptors():
    _, _, _, driver, _ = make(4)
    with pytest.raises(ValueError, match="5 descriptors"):
        driver.add([(BASE, 1)] * 5, [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any), min_size=1, max_size=12), st.randoms())
def test_many_chains_in_any_order_of_completion(shapes, rng):
    """66000 rounds would wrap the indices; starting near the wrap shows the same in a few."""
    _, memory, layout, driver, device = make(16)
    driver._avail_idx = driver._last_used = 0xFFFA
    device._last_avail = device._used_idx = 0xFFFA
    memory.view(layout.avail_gpa, 4).cast("H")[1] = 0xFFFA
    memory.view(layout.used_gpa, 4).cast("H")[1] = 0xFFFA
    waiting = {}
    for readable, writable in shapes:
        if readable + writable > driver.free_descriptors:
            continue
        head = driver.add([(BASE + 0x8000, 8)] * readable, [(BASE + 0x9000, 8)] * writable)
        chain = device.pop()
        assert (chain.head, len(chain.readable), len(chain.writable)) == (head, readable, writable)
        waiting[head] = rng.randrange(100)
    done = list(waiting.items())
    rng.shuffle(done)
    for head, written in done:
        device.push(head, written)
        assert driver.take() == (head, written)
    assert driver.free_descriptors == 16


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=700, max_size=700), st.integers(0, 20))
def test_random_memory_never_does_worse_than_a_protocol_error(noise, idx):
    store, _, layout, _, device = make(16)
    store[: len(noise)] = noise
    struct.pack_into("<H", store, layout.avail_gpa - BASE + 2, idx)
    with contextlib.suppress(ProtocolError):  # anything else fails the test
        while (chain := device.pop()) is not None:
            assert len(chain.readable) + len(chain.writable) <= 16


def test_buffers_that_may_only_be_read():
    store, _, layout, _, _ = make()
    rest = bytes(64)

    class Memory(FlatMemory):
        def view(self, address_gpa, size_bytes):
            return memoryview(rest)[:size_bytes] if address_gpa == 0 else super().view(address_gpa, size_bytes)

    device = DeviceQueue(Memory(memoryview(store), BASE), layout)
    put_desc(store, 0, 0, 64, 0, 0)
    put_desc(store, 1, 0, 64, 2, 0)
    offer(store, layout, [0, 1])
    assert device.pop().read() == rest
    with pytest.raises(ProtocolError, match="not mapped for writing"):
        device.pop()
