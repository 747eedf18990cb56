"""Server and driver of the carrier against each other, on a small function made for it."""

import asyncio
import errno
import os
import struct
import threading

import pytest
from mock.ivshmem_device import IvshmemDevice

from vvupipe.errors import TransportError, UserError
from vvupipe.ivshmem import layout
from vvupipe.ivshmem.driver_function import open_ivshmem
from vvupipe.ivshmem.server import IvshmemServer
from vvupipe.vfio.dma_space import DmaSpace
from vvupipe.vfio.function import IRQ_MSIX
from vvupipe.vfio.irq_table import IrqTable
from vvupipe.vfio.served_function import Region
from vvupipe.vvu.kick_relay import KickRelay


class Memory:
    """A function with 3000 bytes in BAR 0."""

    name = "memory"

    def __init__(self):
        self.dma = DmaSpace()
        self.irqs = {IRQ_MSIX: IrqTable(3)}
        self.bytes = bytearray(3000)
        self.resets = 0
        self.left = threading.Event()

    def region(self, index):
        return Region(len(self.bytes) if index == 0 else 0)

    def read(self, region, offset, count):
        if offset == 2999:
            raise RuntimeError("a bug")
        return bytes(self.bytes[offset : offset + count])

    def write(self, region, offset, data):
        if offset == 2000:
            raise OSError(errno.EPERM, "no")
        self.bytes[offset : offset + len(data)] = data

    def io_events(self, region):
        return []

    def before_unmap(self, iova, size_bytes):
        raise AssertionError

    def reset(self):
        self.resets += 1

    def client_left(self):
        self.left.set()


class Served:
    """A server in a thread with a loop of its own."""

    def __init__(self, events):
        self.function = Memory()
        self.relay = KickRelay()
        self.server = IvshmemServer(self.function, self.relay, events)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.task = asyncio.run_coroutine_threadsafe(self.server.run(), self.loop)
        greeting = threading.Thread(target=self.server.greet)
        greeting.start()
        self.device = IvshmemDevice(self.server.client_socket.dup())
        greeting.join(5)

    def memory(self):
        return self.server._mapping.view

    def close(self):
        self.device.close()
        self.task.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        for table in self.function.irqs.values():
            table.disable()
        self.function.dma.clear()
        self.server.close()
        self.relay.close()


@pytest.fixture
def served():
    served = Served([(2, 4 * k) for k in range(10)])
    yield served
    served.close()


def test_registers_are_read_and_written(served):
    function, memory = open_ivshmem(served.device)
    data = os.urandom(2990)[:1990]
    function.write(0, 7, data)
    assert function.read(0, 7, len(data)) == data
    assert bytes(served.function.bytes[7 : 7 + len(data)]) == data
    assert (function.region_size(0), function.region_size(5)) == (3000, 0)
    function.reset()
    assert served.function.resets == 1
    memory.close()
    function.close()


@pytest.mark.parametrize(("region", "offset", "count"), [(0, 2996, 8), (1, 0, 1), (0, 1 << 60, 4), (0, 2999, 1)])
def test_what_cannot_be_read_is_refused_and_the_server_goes_on(served, region, offset, count):
    function, memory = open_ivshmem(served.device)
    with pytest.raises(TransportError, match="refused"):
        function.read(region, offset, count)
    with pytest.raises(TransportError, match="not permitted"):
        function.write(0, 2000, b"x")
    assert function.read(0, 0, 4) == bytes(4)
    memory.close()
    function.close()


def test_a_hostile_request_is_answered(served):
    memory = served.memory()
    words = memory[layout.MAILBOX_OFFSET : layout.MAILBOX_OFFSET + 64].cast("I")
    for operation, count in [(1, 0xFFFFFFFF), (99, 4), (2, 1025)]:
        memory[layout.MAILBOX_OFFSET + 16 : layout.MAILBOX_OFFSET + 40] = struct.pack(
            "<IIQII", operation, 0, 0, count, 0
        )
        words[0] = (words[1] + 1) & 0xFFFFFFFF
        served.device.write(0, 12, (1 << 16).to_bytes(4, "little"))
        deadline = threading.Event()
        for _ in range(1000):
            if words[0] == words[1]:
                break
            deadline.wait(0.005)
        assert words[0] == words[1]
        assert words[12] in {errno.EINVAL, errno.EOPNOTSUPP}
    words.release()


def test_interrupts_reach_the_eventfds_and_the_mailbox_keeps_its_own(served):
    function, memory = open_ivshmem(served.device)
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    assert function.irq_count(IRQ_MSIX) == 3
    function.set_irq_eventfds(IRQ_MSIX, 0, fds)
    served.function.irqs[IRQ_MSIX].signal(2)
    waiting = os.eventfd(0)
    os.close(waiting)
    os.set_blocking(fds[2], True)
    assert os.eventfd_read(fds[2]) == 1
    function.disable_irqs(IRQ_MSIX)
    assert function.region_size(0) == 3000
    with pytest.raises(TransportError):
        function.set_irq_eventfds(IRQ_MSIX, 1, fds)
    for fd in fds:
        os.close(fd)
    memory.close()
    function.close()


def test_a_doorbell_reaches_what_is_tied_to_it(served):
    function, memory = open_ivshmem(served.device)
    first, second = os.eventfd(0), os.eventfd(0)
    bell = function.io_event(2, 12, bytes(4))
    os.eventfd_write(bell, 1)  # nothing is tied
    served.server.tie(2, 12, first)
    os.eventfd_write(bell, 1)
    assert os.eventfd_read(first) == 1
    served.server.tie(2, 12, second)
    os.eventfd_write(bell, 1)
    assert os.eventfd_read(second) == 1
    os.set_blocking(first, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(first)
    with pytest.raises(TransportError, match="no doorbell"):
        function.io_event(2, 40, bytes(4))
    for fd in (first, second, bell):
        os.close(fd)
    memory.close()
    function.close()


class LateRing:
    """A relay during whose `remove` the guest rings once more."""

    def __init__(self):
        self.settled = 0

    def add(self, kick_fd, signal_fd):
        pass

    def settle(self):
        self.settled += 1

    def remove(self, kick_fd):
        os.eventfd_write(kick_fd, 1)


def test_a_ring_while_another_eventfd_is_tied_is_not_lost():
    relay = LateRing()
    server = IvshmemServer(Memory(), relay, [(2, 12)])
    first, second = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    server.tie(2, 12, first)
    os.eventfd_write(server._bells[0], 1)
    server.tie(2, 12, second)
    assert relay.settled == 1, "what was rung before has reached the former one by the relay"
    assert os.eventfd_read(first) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(second)
    server.close()
    for fd in (first, second):
        os.close(fd)


def test_dma_memory_is_what_the_function_reaches(served):
    function, memory = open_ivshmem(served.device)
    function.dma_map(memory.gpa, memory.size_bytes, memory.fd, memory.fd_offset)
    memory.view[100:104] = b"ring"
    assert bytes(served.function.dma.view(memory.gpa + 100, 4)) == b"ring"
    with pytest.raises(TransportError, match="its own memory"):
        function.dma_map(0, 4096, memory.fd, memory.fd_offset)
    function.dma_unmap(memory.gpa, memory.size_bytes)
    memory.close()
    function.close()


def test_a_guest_reset_is_a_driver_that_left(served):
    function, memory = open_ivshmem(served.device)
    served.server.guest_reset()
    assert served.function.left.is_set()
    memory.close()
    function.close()


@pytest.mark.parametrize(("offset", "data", "says"), [(0, b"x", "none of vvupipe's"), (16, b"\2", "another vvupipe")])
def test_memory_that_is_not_ours(served, offset, data, says):
    served.memory()[offset : offset + len(data)] = data
    with pytest.raises(UserError, match=says):
        open_ivshmem(served.device)
