"""A vfio-user server in a thread of its own, with a made-up function, and a raw client with its own encoding."""

import array
import asyncio
import os
import socket
import struct
import threading

from vvupipe.vfio.dma_space import DmaSpace
from vvupipe.vfio.function import IoEvent, MappableArea
from vvupipe.vfio.irq_table import IrqTable
from vvupipe.vfio.served_function import Region
from vvupipe.vfio.user_server import VfioUserServer

HEADER = struct.Struct("=HHIII")
NAMES = """VERSION DMA_MAP DMA_UNMAP GET_INFO GET_REGION_INFO GET_REGION_IO_FDS GET_IRQ_INFO SET_IRQS REGION_READ
REGION_WRITE DMA_READ DMA_WRITE RESET"""
COMMANDS = {name: number for number, name in enumerate(NAMES.split(), 1)}
COMMANDS |= {"WRITE_MULTI": 15, "DEVICE_FEATURE": 16}


class MadeUpFunction:
    """Region 0: 4 KiB of registers; region 4: two areas from two memfds; five MSI-X vectors."""

    name = "made-up function"

    def __init__(self):
        self.dma = DmaSpace()
        self.irqs = {2: IrqTable(5)}
        self.registers = bytearray(4096)
        self.log = []
        self.memory = [os.memfd_create("area"), os.memfd_create("area")]
        for k, fd in enumerate(self.memory):
            os.ftruncate(fd, 16384)
            os.pwrite(fd, b"area %d" % k, 4096 * k)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)

    def region(self, index):
        if index == 0:
            return Region(4096)
        if index == 4:
            areas = [MappableArea(0, 8192, self.memory[0], 0), MappableArea(8192, 4096, self.memory[1], 4096)]
            return Region(1 << 20, areas)
        return Region(256 if index == 7 else 0)

    def read(self, region, offset, count):
        return bytes(self.registers[offset : offset + count]) if region == 0 else bytes(count)

    def write(self, region, offset, data):
        self.log.append((region, offset, data))
        if region == 0:
            self.registers[offset : offset + len(data)] = data

    def io_events(self, region):
        return [IoEvent(8, 0, self.bell), IoEvent(12, 4, self.bell)] if region == 2 else []

    def before_unmap(self, iova, size_bytes):
        self.log.append(("unmap", iova, size_bytes))

    def reset(self):
        self.log.append("reset")

    def client_left(self):
        self.log.append("left")


class ServerThread:
    def __init__(self, path, function=None):
        self.function = function or MadeUpFunction()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._ready.wait(10)

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        self.server = VfioUserServer(self.function, self._sock)
        self._task = asyncio.create_task(self.server.run())
        self._ready.set()
        await asyncio.gather(self._task, return_exceptions=True)

    def call(self, work):
        """Run `work()` in the server's thread and give its result."""

        async def run():
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def close(self):
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()


class RawClient:
    def __init__(self, path, version=b'{"capabilities":{"max_msg_fds":8}}\0'):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        if version is not None:
            error, body, _ = self.ask("VERSION", struct.pack("=HH", 0, 1) + version)
            assert error is None
            self.version = body

    def send(self, command, payload=b"", fds=(), flags=0, message_id=77):
        number = COMMANDS.get(command, command)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([HEADER.pack(message_id, number, 16 + len(payload), flags, 0) + payload], ancillary)
        return number

    def receive(self):
        fds, data, need = [], b"", 16
        while len(data) < need:
            chunk, ancillary, _, _ = self.sock.recvmsg(need - len(data), 4096)
            for _, _, body in ancillary:
                fds += array.array("i", body)
            if not chunk:
                raise ConnectionResetError
            data += chunk
            if len(data) == 16:
                need = HEADER.unpack(data)[2]
        return HEADER.unpack(data[:16]), data[16:], fds

    def ask(self, command, payload=b"", fds=()):
        """(errno or None, payload, fds) of the reply."""
        number = self.send(command, payload, fds)
        (message_id, answered, size, flags, error), body, answer_fds = self.receive()
        assert (message_id, answered, size) == (77, number, 16 + len(body))
        assert flags & 0xF == 1
        return (error if flags & 0x20 else None), body, answer_fds

    def close(self):
        self.sock.close()
