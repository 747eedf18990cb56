"""The back-end channel of a sibling, which the function keeps: its end, its successor, a sibling that breaks it."""

import asyncio
import contextlib
import socket
import struct

import pytest

from tests.mock import frontend as fe
from tests.vvupipe.vvu.device_vm import Vm
from tests.vvupipe.vvu.test_vvu_path import ask, connect, opened, run, tell
from vvupipe.errors import TransportError
from vvupipe.vhost_user.messages import Message
from vvupipe.vhost_user.payloads import pack_u64


async def give_channel(frontend, connection):
    """The sibling's end of a back-end channel, and the message by which the driver was told of it."""
    ours, given = socket.socketpair()
    with given:
        return ours, await tell(frontend, connection, fe.SET_BACKEND_REQ_FD, b"", [given.fileno()])


async def send_until_full(channel):
    """The task of the first message that finds socket and txq full."""
    while True:
        sending = asyncio.create_task(channel.send(Message(2)))
        done, _ = await asyncio.wait({sending}, timeout=0.5)
        if not done:
            return sending


def test_channel_that_carries_no_messages_is_refused(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            await tell(frontend, connection, fe.SET_PROTOCOL_FEATURES, pack_u64(fe.REPLY_ACK))
            pending = asyncio.create_task(connection.receive())
            datagrams = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM), *socket.socketpair(type=socket.SOCK_DGRAM)]
            for sock in datagrams:
                frontend.send(fe.SET_BACKEND_REQ_FD, b"", [sock.fileno()], flags=9)
                assert await asyncio.to_thread(frontend.receive) == (fe.SET_BACKEND_REQ_FD, 5, pack_u64(1))
                sock.close()
            frontend.send(fe.GET_FEATURES)
            await connection.send((await pending).reply(pack_u64(3)))
            assert (await asyncio.to_thread(frontend.receive))[2] == pack_u64(3)
            frontend.close()

    run(test)


def test_another_channel_ends_the_former(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            channels = [(await give_channel(frontend, connection))[0] for _ in range(2)]
            for ours in channels:
                ours.settimeout(5)
            assert await asyncio.to_thread(channels[0].recv, 1) == b""
            await connection.send(Message(2))
            assert await asyncio.to_thread(channels[1].recv, 12) == struct.pack("=III", 2, 1, 0)
            for ours in channels:
                ours.close()
            frontend.close()

    run(test)


def test_what_a_channel_still_holds_does_not_reach_the_next_sibling(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            ours, _ = await give_channel(frontend, connection)
            ours.setblocking(False)
            for _ in range(2):  # more than there are rx buffers, so that some wait in the socket
                with contextlib.suppress(BlockingIOError):
                    while True:
                        ours.send(struct.pack("=IIIQ", 2, 5, 8, 0))
                await asyncio.sleep(0.2)
            frontend.close()
            assert await connection.receive() is None
            following = asyncio.create_task(transport.next_message())
            await asyncio.sleep(0.3)
            assert not following.done()
            following.cancel()
            ours.close()

    run(test)


def test_one_who_waits_to_send_takes_nothing_from_one_who_receives(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    vm = Vm(tmp_path)

    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            ours, message = await give_channel(frontend, connection)
            channel = connection.back_end_channel(message)
            receiving = asyncio.create_task(connection.receive())
            sending = await send_until_full(channel)
            sending.cancel()
            await asyncio.wait({sending})
            vm.kill()
            with pytest.raises(TransportError, match="its VM ended"):
                await asyncio.wait_for(receiving, 5)
            frontend.close()
            ours.close()

    run(test)


def test_sibling_that_reads_nothing_of_its_channel_and_breaks_it(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            ours, message = await give_channel(frontend, connection)
            channel = connection.back_end_channel(message)
            sending = await send_until_full(channel)
            ours.send(struct.pack("=III", 2, 0, 0))  # of no version
            await asyncio.wait_for(sending, 5)
            assert await ask(frontend, connection, fe.GET_FEATURES, pack_u64(1)) == pack_u64(1)
            frontend.close()
            ours.close()

    run(test)
