"""A sibling and a driver that are always quicker than the device VM: everybody else still has a turn."""

import asyncio
import contextlib
import struct
import subprocess
import sys
import time

from tests.mock import frontend as fe
from tests.vvupipe.vvu.test_vvu_path import connect, opened, run, tell
from vvupipe.vhost_user.payloads import pack_u64
from vvupipe.virtio.split_queue import Chain
from vvupipe.vvu.proxy import VvuProxy

# Sends what it was given again and again, and drops what comes back.
TALK = """
import select, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
sock.setblocking(False)
data = bytes.fromhex(sys.argv[2]) * 2000
rest = memoryview(data)
print("begins", flush=True)
while True:
    readable, writable, _ = select.select([sock], [sock], [])
    if readable and not sock.recv(1 << 16):
        break
    if writable:
        rest = rest[sock.send(rest):] or memoryview(data)
"""


@contextlib.contextmanager
def talking(sock, message):
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(sock.fileno()), message.hex()],
        pass_fds=[sock.fileno()],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline()
        time.sleep(0.3)
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_sibling_whose_messages_are_refused(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            await tell(frontend, connection, fe.SET_PROTOCOL_FEATURES, pack_u64(fe.REPLY_ACK))
            receiving = asyncio.create_task(connection.receive())
            await asyncio.sleep(0.05)
            with talking(frontend.sock, struct.pack("=III", fe.SET_MEM_TABLE, 9, 0)):
                transport.driver.check()  # raises when it is not answered for 10 s
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            frontend.close()

    run(test)


class FullQueue:
    """A txq that is never empty, for two seconds."""

    def __init__(self):
        self.end = time.monotonic() + 2

    def pop(self):
        return Chain(0, [memoryview(b"no message")], []) if time.monotonic() < self.end else None

    def push(self, head, written):
        return False


class FullFunction:
    name = "f"
    backend = None

    def __init__(self):
        self.txq = FullQueue()

    def queue(self, index):
        return self.txq if index == 1 else None


def test_driver_whose_txq_is_never_empty():
    async def test():
        function = FullFunction()
        proxy = VvuProxy(function, None)
        transmitting = asyncio.create_task(proxy._transmit())
        proxy.notified(1)
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert time.monotonic() < function.txq.end, "others wait until the queue is empty"
        transmitting.cancel()
        await asyncio.gather(transmitting, return_exceptions=True)

    run(test)
