"""The whole way: a plain front-end on the socket, the device VM in its own process, the driver's transport here."""

import asyncio
import contextlib
import os
import random
import select
import socket
import struct
import time

import pytest

from tests.mock import frontend as fe
from tests.mock.guest_memory import GuestMemory
from tests.vvupipe.vvu.device_vm import ADDRESS, Vm
from vvupipe.errors import TransportError, UserError
from vvupipe.vhost_user.messages import ProtocolFeature
from vvupipe.vhost_user.payloads import pack_u64
from vvupipe.vm.vvu_transport import open_vvu_transport

LIMIT_S = 20
EVERYTHING = (1 << 17) - 1


def signalled(fd, timeout_s=5):
    return bool(select.select([fd], [], [], timeout_s)[0]) and os.eventfd_read(fd)


def run(test, *args):
    async def limited():
        async with asyncio.timeout(LIMIT_S):
            await test(*args)

    asyncio.run(limited())


@contextlib.contextmanager
def opened(vm):
    transport = open_vvu_transport(ADDRESS, vm.name)
    try:
        yield transport
    finally:
        transport.close()


async def tell(frontend, connection, request, payload=b"", fds=()):
    """A request without an answer, and the message that the driver gets."""
    frontend.send(request, payload, fds)
    message = await connection.receive()
    assert (message.request, message.payload) == (request, payload)
    return message


async def ask(frontend, connection, request, answer, payload=b""):
    """A request with an answer, and what the front-end gets."""
    message = await tell(frontend, connection, request, payload)
    await connection.send(message.reply(answer))
    answered, flags, body = await asyncio.to_thread(frontend.receive)
    assert (answered, flags) == (request, 5)
    return body


async def connect(vm, transport):
    """(front-end, connection) after the first message."""
    frontend = fe.Frontend(vm.socket)
    frontend.send(fe.SET_OWNER)
    connection = await transport.accept()
    message = await connection.receive()
    assert message.request == fe.SET_OWNER
    return frontend, connection


def test_messages_cross_whole_both_ways(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            assert await ask(frontend, connection, fe.GET_FEATURES, pack_u64(0x1234)) == pack_u64(0x1234)
            config = struct.pack("=III", 0, 256, 0) + os.urandom(256)
            assert await ask(frontend, connection, fe.GET_CONFIG, config, config) == config
            largest = os.urandom(4084)
            await tell(frontend, connection, 99, largest)
            for k in range(300):  # more than either queue holds
                await tell(frontend, connection, fe.SET_VRING_NUM, struct.pack("=II", 0, k))
            for k in range(20):
                frontend.send(fe.SET_VRING_NUM, struct.pack("=II", 0, k))  # none waits for the one before
            for k in range(20):
                assert (await connection.receive()).payload == struct.pack("=II", 0, k)
            frontend.close()

    run(test)


def test_protocol_features_that_cannot_be_carried_are_masked(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            body = await ask(frontend, connection, fe.GET_PROTOCOL_FEATURES, pack_u64(EVERYTHING))
            carried = ProtocolFeature(struct.unpack("=Q", body)[0])
            assert carried == connection.protocol_features
            assert carried == sum(1 << bit for bit in (0, 1, 3, 5, 9, 12, 13, 14, 15, 16))
            frontend.close()

    run(test)


def test_memory_is_the_sibling_s_own_byte_for_byte(vm):
    async def test():
        memory = GuestMemory(layout=((0, 2 << 20), (1 << 32, 1 << 20)), fd_offset=8192)
        memory.write(0x1234, b"low memory")
        memory.write((1 << 32) + 77, b"high memory")
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            table = struct.pack("=II", 2, 0) + b"".join(
                struct.pack("=QQQQ", gpa, size, uva, offset) for gpa, size, uva, _, offset in memory.regions
            )
            fds = [region[3] for region in memory.regions]
            message = await tell(frontend, connection, fe.SET_MEM_TABLE, table, fds)
            regions = await connection.memory_regions(message)
            assert [(r.gpa, r.size_bytes, r.uva) for r in regions] == [region[:3] for region in memory.regions]
            assert os.pread(regions[0].fd, 10, regions[0].fd_offset + 0x1234) == b"low memory"
            assert os.pread(regions[1].fd, 11, regions[1].fd_offset + 77) == b"high memory"
            os.pwrite(regions[1].fd, b"from the back-end", regions[1].fd_offset + 4096)
            assert memory.read((1 << 32) + 4096, 17) == b"from the back-end"
            # A client that cannot map reads the same through the BAR: the second region follows the first.
            function = transport.driver.function
            assert function.read(4, (2 << 20) + 77, 11) == b"high memory"
            function.write(4, 0x1234, b"LOW")
            assert memory.read(0x1234, 10) == b"LOW memory"
            for region in regions:
                region.close()
            # another table, learned anew
            table = struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 1 << 32, 1 << 20, 5 << 32, 8192)
            message = await tell(frontend, connection, fe.SET_MEM_TABLE, table, fds[1:])
            (region,) = await connection.memory_regions(message)
            assert os.pread(region.fd, 11, region.fd_offset + 77) == b"high memory"
            region.close()
            frontend.close()
        memory.close()

    run(test)


def test_as_many_memory_slots_as_are_told_whatever_else_is_in_the_bar(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            assert await ask(frontend, connection, fe.GET_MAX_MEM_SLOTS, pack_u64(509)) == pack_u64(32)
            memory = os.memfd_create("memory")
            os.ftruncate(memory, 4096)
            frontend.send(fe.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 4096, 0, 1, 128), [memory])
            assert (await connection.receive()).request == fe.SET_INFLIGHT_FD
            for k in range(32):
                frontend.send(fe.ADD_MEM_REG, struct.pack("=QQQQQ", 0, k << 20, 4096, k << 20, 0), [memory])
                message = await connection.receive()
                assert message is not None, f"slot {k} was refused"
                (region,) = await connection.added_region(message)
                assert region.gpa == k << 20
                region.close()
            frontend.send(fe.ADD_MEM_REG, struct.pack("=QQQQQ", 0, 32 << 20, 4096, 32 << 20, 0), [memory])
            assert await connection.receive() is None
            os.close(memory)
            frontend.close()

    run(test)


def test_kick_and_call_and_err_need_nobody_in_between(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            rings = {index: [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)] for index in (0, 1, 63)}
            kicks, doorbells = {}, {}
            for index, (kick, call, err) in rings.items():
                which = struct.pack("=Q", index)
                kicks[index] = connection.kick(await tell(frontend, connection, fe.SET_VRING_KICK, which, [kick]))
                called = connection.call(await tell(frontend, connection, fe.SET_VRING_CALL, which, [call]))
                erred = connection.err(await tell(frontend, connection, fe.SET_VRING_ERR, which, [err]))
                doorbells[index] = (called, erred)
            os.kill(vm.process.pid, 19)  # SIGSTOP: calls reach the sibling all the same
            for index, (_, call, err) in rings.items():
                doorbells[index][0].ring()
                assert signalled(call) == 1
                doorbells[index][1].ring()
                assert signalled(err) == 1
                assert not any(signalled(fd, 0) for other in rings.values() for fd in other[1:])
            os.kill(vm.process.pid, 18)
            for index, (kick, _, _) in rings.items():
                os.eventfd_write(kick, 1)
                assert signalled(kicks[index])
                assert not any(signalled(fd, 0) for fd in kicks.values())
            # a plain register write, as a foreign client does it
            transport.driver.function.write(2, 4 * 63, b"\0")
            assert signalled(rings[63][1]) == 1
            # bit 8: no eventfd
            nothing = struct.pack("=Q", 0x100)
            assert connection.kick(await tell(frontend, connection, fe.SET_VRING_KICK, nothing)) is None
            assert connection.call(await tell(frontend, connection, fe.SET_VRING_CALL, nothing)) is None
            os.eventfd_write(rings[0][0], 1)
            assert not signalled(kicks[0], 0.1)
            frontend.close()

    run(test)


def test_what_does_not_fit_its_message_is_refused_or_ends_the_session(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            await tell(frontend, connection, fe.SET_PROTOCOL_FEATURES, pack_u64(fe.REPLY_ACK))
            pending = asyncio.create_task(connection.receive())
            table = struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, 4096, 0, 0)
            short = os.memfd_create("short")
            os.ftruncate(short, 100)
            for fds in ([], [short], [short, short]):
                frontend.send(fe.SET_MEM_TABLE, table, fds, flags=9)
                assert await asyncio.to_thread(frontend.receive) == (fe.SET_MEM_TABLE, 5, pack_u64(1))
            frontend.send(fe.SET_VRING_CALL, pack_u64(0), [short], flags=9)  # no eventfd
            assert await asyncio.to_thread(frontend.receive) == (fe.SET_VRING_CALL, 5, pack_u64(1))
            frontend.send(fe.SET_VRING_KICK, pack_u64(0))  # without NEED_REPLY there is nothing to answer
            assert await pending is None
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(frontend.receive)
            frontend.close()
            frontend, connection = await connect(vm, transport)  # the next one is served
            frontend.close()

    run(test)


def test_sibling_leaves_and_the_next_one_comes(vm):
    async def test():
        with opened(vm) as transport:
            for _ in range(3):
                frontend, connection = await connect(vm, transport)
                assert transport.driver.function.read(0, 0x2000, 1) == b"\3"
                kick = os.eventfd(0, os.EFD_NONBLOCK)
                woken = connection.kick(await tell(frontend, connection, fe.SET_VRING_KICK, pack_u64(0), [kick]))
                call = connection.call(await tell(frontend, connection, fe.SET_VRING_CALL, pack_u64(0), [kick]))
                frontend.close()
                assert await connection.receive() is None
                assert await connection.receive() is None
                assert transport.driver.function.read(0, 0x2000, 1) == b"\1"
                assert await transport.driver.shared_memory_areas() == []
                assert transport.driver.doorbell(0) is None
                os.eventfd_write(kick, 1)
                assert not signalled(woken, 0.05)
                call.close()
                connection.close()

    run(test)


def test_front_end_that_came_first_waits(vm):
    async def test():
        frontend = fe.Frontend(vm.socket)
        frontend.send(fe.GET_FEATURES)
        await asyncio.sleep(0.2)
        with opened(vm) as transport:
            connection = await transport.accept()
            message = await connection.receive()
            await connection.send(message.reply(pack_u64(7)))
            assert (await asyncio.to_thread(frontend.receive))[2] == pack_u64(7)
            frontend.close()

    run(test)


def test_back_end_leaves_and_comes_back(vm):
    async def test():
        for _ in range(3):
            with opened(vm) as transport:
                frontend, _ = await connect(vm, transport)
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(frontend.receive)
            frontend.close()

    run(test)


def test_dropped_front_end_sees_its_end_and_what_it_said_is_skipped(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            for _ in range(10):
                frontend.send(fe.GET_FEATURES)
            await connection.receive()
            connection.close()
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(frontend.receive)
            frontend.close()
            assert await connection.receive() is None
            frontend, connection = await connect(vm, transport)  # its first message is its own
            frontend.close()

    run(test)


def test_answer_for_one_who_left_never_reaches_the_next(vm):
    async def test():
        with opened(vm) as transport:
            first, connection = await connect(vm, transport)
            question = await tell(first, connection, fe.GET_FEATURES)
            first.close()
            second = fe.Frontend(vm.socket)
            second.send(fe.GET_FEATURES)
            await asyncio.sleep(0.1)
            await connection.send(question.reply(pack_u64(1)))  # we have not seen yet that it left
            assert await connection.receive() is None
            connection = await transport.accept()
            question = await connection.receive()
            await connection.send(question.reply(pack_u64(2)))
            assert (await asyncio.to_thread(second.receive))[2] == pack_u64(2)
            second.close()

    run(test)


def test_front_end_that_says_nothing_is_nobody(vm):
    async def test():
        with opened(vm) as transport:
            for _ in range(3):
                fe.Frontend(vm.socket).close()
            frontend, _ = await connect(vm, transport)
            frontend.close()

    run(test)


def test_broken_framing_ends_the_session(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            frontend.sock.sendall(struct.pack("=III", 1, 2, 0))
            assert await connection.receive() is None
            frontend.close()

    run(test)


def test_two_drivers_cannot_have_one_function(vm):
    with opened(vm), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        open_vvu_transport(ADDRESS, vm.name)
    with opened(vm):  # and it is free again at once
        pass


def test_function_of_a_dead_vm(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    vm = Vm(tmp_path)

    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            receiving = asyncio.create_task(connection.receive())
            await asyncio.sleep(0.05)
            vm.kill()
            with pytest.raises(TransportError, match=f"function {ADDRESS} of dev is gone: its VM ended"):
                await receiving
            connection.close()
            with pytest.raises(TransportError, match="gone"):
                await transport.accept()
            frontend.close()

    run(test)
    with pytest.raises(UserError, match="no device VM named dev runs"):
        open_vvu_transport(ADDRESS, "dev")


def test_driver_that_breaks_its_queue_is_told_to_reset(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            driver = transport.driver
            avail = driver._queues[0].layout.avail_gpa - driver._memory.gpa
            receiving = asyncio.create_task(connection.receive())
            await asyncio.sleep(0.05)  # it has given the last buffer back and waits
            struct.pack_into("<H", driver._memory.view, avail + 2, 0x7777)
            frontend.send(fe.GET_FEATURES)
            with pytest.raises(TransportError, match="must be reset"):
                await receiving
            frontend.close()
        with opened(vm) as transport:  # a fresh start is all it takes
            frontend, connection = await connect(vm, transport)
            frontend.close()

    run(test)


def test_kick_latency_of_the_relay_is_that_of_a_system_call(vm):
    """Python in the path would show: one interpreted loop turn is far above what the relay takes in the median."""

    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            kick = os.eventfd(0, os.EFD_NONBLOCK)
            woken = connection.kick(await tell(frontend, connection, fe.SET_VRING_KICK, pack_u64(0), [kick]))
            taken = []
            for _ in range(200):
                before = time.perf_counter()
                os.eventfd_write(kick, 1)
                assert signalled(woken)
                taken.append(time.perf_counter() - before)
            assert sorted(taken)[100] < 5e-3
            frontend.close()

    run(test)


def test_socket_file_is_private(vm):
    assert os.stat(vm.socket).st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(vm.socket))


def test_random_messages_with_random_fds_hurt_nobody(vm):
    rng = random.Random(7)

    async def babble():
        frontend = await asyncio.to_thread(fe.Frontend, vm.socket)
        fds = [os.eventfd(0), os.memfd_create("m"), os.open("/dev/null", os.O_RDWR), *os.pipe()]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(rng.randrange(1, 8)):
                payload = rng.choice([rng.randbytes(rng.randrange(60)), pack_u64(rng.randrange(300)), table()])
                some = rng.sample(fds, rng.randrange(4))
                await asyncio.to_thread(frontend.send, rng.randrange(42), payload, some, rng.choice([1, 1, 9, 5]))
        for fd in fds:
            os.close(fd)
        frontend.close()

    def table():
        count = rng.randrange(4)
        return struct.pack("=II", count, 0) + b"".join(
            struct.pack("=QQQQ", *(rng.choice([0, 4096, 1 << 20, (1 << 64) - 1]) for _ in range(4)))
            for _ in range(count)
        )

    async def serve(transport):
        while True:
            connection = await transport.accept()
            while await connection.receive() is not None:
                pass
            connection.close()

    async def test():
        with opened(vm) as transport:
            serving = asyncio.create_task(serve(transport))
            for _ in range(60):
                await babble()
                assert not serving.done()
            await asyncio.sleep(0.3)
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            frontend, connection = await connect(vm, transport)
            assert await ask(frontend, connection, fe.GET_FEATURES, pack_u64(1)) == pack_u64(1)
            frontend.close()

    run(test)
    fds = os.listdir(f"/proc/{vm.process.pid}/fd")
    assert len(fds) < 40  # nothing of what came stayed open
