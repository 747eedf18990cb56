"""QEMU's ivshmem-doorbell device as its driver sees it by VFIO, without QEMU: the server's client."""

import os
import select
import socket
import struct
import threading

from vvupipe.vfio.function import MappableArea, VfioFunction

BAR_REGISTERS, BAR_MEMORY, CONFIG = 0, 2, 7
MSIX = 2


class IvshmemDevice(VfioFunction):
    """Takes what the server sends on `client` when it is made; interrupts pass through a thread of its own."""

    def __init__(self, client):
        self.name = "mock ivshmem"
        self.hangup_fd = -1
        self.peers = {}
        self.memory = -1
        self._client = client
        self._targets = []
        self._command = bytes(2)
        assert self._receive() == (0, None)  # the protocol's version
        self.own, none = self._receive()
        assert none is None
        client.settimeout(5)
        while self.memory < 0 or not self._complete():
            peer, fd = self._receive()
            if peer == -1:
                self.memory = fd
            else:
                self.peers.setdefault(peer, []).append(fd)
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _receive(self):
        data, fds, _, _ = socket.recv_fds(self._client, 8, 1)
        assert len(data) == 8
        return struct.unpack("<q", data)[0], fds[0] if fds else None

    def _complete(self):
        """Our own vectors come last, as many as the header says: the mailbox's and the function's."""
        header = os.pread(self.memory, 64, 0)
        return len(self.peers.get(self.own, [])) == 1 + struct.unpack_from("<I", header, 36)[0]

    def _relay(self):
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        numbers = {fd: number for number, fd in enumerate(self.peers[self.own])}
        for fd in numbers:
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop:
                    return
                os.eventfd_read(fd)
                number = numbers[fd]
                if number < len(self._targets) and self._targets[number] >= 0:
                    os.eventfd_write(self._targets[number], 1)

    def _bell(self, data):
        value = int.from_bytes(data, "little")
        return self.peers[value >> 16][value & 0xFFFF]

    def region_size(self, region):
        return {0: 256, 2: os.fstat(self.memory).st_size, 7: 256}.get(region, 0)

    def read(self, region, offset, count):
        if region == BAR_MEMORY:
            return os.pread(self.memory, count, offset)
        if region == CONFIG:
            whole = bytes.fromhex("f41a1011") + self._command
            return whole[offset : offset + count]
        return bytes(count)

    def write(self, region, offset, data):
        if region == CONFIG:
            self._command = data
        else:
            assert (region, offset, len(data)) == (BAR_REGISTERS, 12, 4)
            os.eventfd_write(self._bell(data), 1)

    def mappable_areas(self, region):
        return [MappableArea(0, self.region_size(2), os.dup(self.memory), 0)] if region == BAR_MEMORY else []

    def io_event(self, region, offset, data):
        assert (region, offset, len(data)) == (BAR_REGISTERS, 12, 4)
        return os.dup(self._bell(data))

    def irq_count(self, index):
        return len(self.peers[self.own]) if index == MSIX else 0

    def set_irq_eventfds(self, index, start, fds):
        assert (index, start) == (MSIX, 0)
        self._targets = list(fds)

    def disable_irqs(self, index):
        self._targets = []

    def dma_map(self, iova, size_bytes, fd, fd_offset):
        raise AssertionError("an ivshmem device does no DMA")

    dma_unmap = dma_map

    def reset(self):
        self.disable_irqs(MSIX)

    def close(self):
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join(5)
            for fd in [self._stop, self.memory, *(fd for fds in self.peers.values() for fd in fds)]:
                os.close(fd)
            self._client.close()
