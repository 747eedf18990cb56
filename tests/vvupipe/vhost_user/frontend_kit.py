"""A front-end on a scripted back-end, and the files that go with its messages."""

import asyncio
import contextlib
import os
import struct

from tests.mock import frontend as wire
from tests.mock.scripted_backend import ScriptedBackend
from vvupipe.vhost_user.frontend import Frontend
from vvupipe.vhost_user.messages import ProtocolFeature

PAGEFAULT = 1 << 8
EVERYTHING = (1 << 23) - 1


def on_back_end(work, protocol=EVERYTHING, features=wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM):
    """Run `work(frontend, peer)` after negotiation, each message of which is checked."""

    async def main():
        peer = ScriptedBackend()
        frontend = Frontend(peer.socket_of_front_end)
        try:
            offered = features | wire.F_PROTOCOL_FEATURES
            await peer.during(frontend.get_features(), 1, answer=struct.pack("=Q", offered))
            await peer.during(frontend.get_protocol_features(), 15, answer=struct.pack("=Q", EVERYTHING))
            await peer.during(
                frontend.set_protocol_features(ProtocolFeature(protocol)), 16, struct.pack("=Q", protocol)
            )
            tell = peer.acknowledge if protocol & wire.REPLY_ACK else peer.during
            await tell(frontend.set_features(features), 2, struct.pack("=Q", offered))
            return await work(frontend, peer)
        finally:
            await frontend.close()
            peer.close()

    async def with_limit():
        async with asyncio.timeout(30):
            return await main()

    return asyncio.run(with_limit())


@contextlib.contextmanager
def files(count=1, size_bytes=1 << 20):
    """fds of different files."""
    fds = [os.memfd_create("file") for _ in range(count)]
    for fd in fds:
        os.ftruncate(fd, size_bytes)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def open_fds():
    """How many fds this process has."""
    return len(os.listdir("/proc/self/fd"))
