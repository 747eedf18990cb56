"""vvupipe's front-end library, message by message, on its own back-end and on qemu-storage-daemon's export.

The storage daemon is the judge of the library: it was written by others. Whatever a back-end offers is used; a request
that it does not offer must be refused by the library before anything is sent.
"""

import asyncio
import os
import struct
import warnings

import pytest
from front_end_life import CONFIG_BYTES, PLAIN, SECTOR, WCE_OFFSET, capacity, run, storage_daemon_version, until, write

from tests.mock import frontend as wire
from tests.mock.blk_driver import GET_ID, IN, IOERR, OK
from tests.vvupipe.vhost_user.frontend_kit import files
from tests.vvupipe.vhost_user.frontend_requests import ALL
from vvupipe.errors import NotNegotiated, Refused
from vvupipe.vhost_user.frontend_channel import ChannelHandlers
from vvupipe.vhost_user.messages import ProtocolFeature, Request
from vvupipe.vhost_user.transport import FileArea

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
DISCARD, WRITE_ZEROES = 11, 13
F = ProtocolFeature

#: What QEMU 7.2's export offers (libvhost-user). PAGEFAULT depends on the kernel.
STORAGE_DAEMON = F.MQ | F.LOG_SHMFD | F.REPLY_ACK | F.BACKEND_REQ | F.CONFIG | F.CONFIGURE_MEM_SLOTS
STORAGE_DAEMON |= F.BACKEND_SEND_FD | F.HOST_NOTIFIER
MAYBE = {"storage-daemon": F.PAGEFAULT}
#: What vvupipe must offer on every transport.
VVUPIPE = F.MQ | F.LOG_SHMFD | F.REPLY_ACK | F.BACKEND_REQ | F.CONFIG | F.CONFIGURE_MEM_SLOTS
VVUPIPE |= F.INFLIGHT_SHMFD | F.RESET_DEVICE | F.STATUS


def test_protocol_features(served):
    """What is new in a later version is told, and does not fail."""

    async def work():
        async with served.life() as life:
            return life.frontend.offered_protocol_features

    offered = asyncio.run(work())
    required = VVUPIPE if served.is_ours else STORAGE_DAEMON
    assert offered & required == required, [feature.name for feature in F if feature in required & ~offered]
    new = int(offered) & ~int(required | MAYBE.get(served.name, F(0)))
    if not served.is_ours and new:
        warnings.warn(f"{served.name} offers more than is tried here: {F(new)!r}", stacklevel=1)


def test_requests_that_are_not_offered_are_not_sent(served):
    async def work():
        async with served.life() as life:
            frontend = life.frontend
            lacking = [case for case in ALL.values() if case.needs and not life.offers(F(case.needs))]
            if not served.is_ours:
                assert {Request(case.request) for case in lacking} >= {
                    Request.GET_INFLIGHT_FD,
                    Request.SET_INFLIGHT_FD,
                    Request.RESET_DEVICE,
                    Request.SET_STATUS,
                    Request.GET_STATUS,
                    Request.SET_DEVICE_STATE_FD,
                    Request.CHECK_DEVICE_STATE,
                }
            with files(2) as (a, b):
                for case in lacking:
                    with pytest.raises(NotNegotiated):
                        await case.make(frontend, a, b)
                if not life.offers(wire.F_ACCESS_PLATFORM):
                    with pytest.raises(NotNegotiated):
                        await frontend.update_iotlb(0, 4096, 0, 3)
            with pytest.raises(NotNegotiated):
                await frontend.vring_kick(0)  # offered or not, it was not negotiated
            assert not frontend.closed.done()
            assert await frontend.get_features() == frontend.features

    run(work())


def test_configuration_space(served):
    async def work():
        async with served.life() as life:
            frontend = life.frontend
            queues = await frontend.get_queue_num()
            assert queues >= served.backend.queues
            space = await frontend.get_config(0, CONFIG_BYTES)
            assert capacity(space) == served.image.stat().st_size
            assert struct.unpack_from("<I", space, 20)[0] in (512, 4096), "block size"
            assert struct.unpack_from("<H", space, 34)[0] == queues
            if served.is_ours:  # QEMU's export of 7.2 reads from 0 whatever the offset
                assert await frontend.get_config(32, 4) == space[32:36]
            try:
                assert (await frontend.get_config(0, 256))[:CONFIG_BYTES] == space
            except Refused:
                assert not served.is_ours, "the whole space may be read"
            assert life.offers(wire.F_BLK_CONFIG_WCE)
            for value in (0, 1):
                await frontend.set_config(WCE_OFFSET, bytes([value]))
                assert (await frontend.get_config(0, CONFIG_BYTES))[WCE_OFFSET] == value

    run(work())


def test_a_whole_life(served):
    """Memory table, vrings, I/O of every kind, stop, start where it stopped, twice, and another owner."""

    async def work():
        async with served.life() as life:
            frontend = life.frontend
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.start(ring)
            assert await disk.read(0, 8192) == served.content[:8192]
            await write(served, disk, 100, b"life" * 1024)
            await disk.flush()
            assert await disk.read(100, 4096) == b"life" * 1024
            assert served.image.read_bytes()[100 * SECTOR :][:4096] == b"life" * 1024
            status, serial, length = await disk.request(GET_ID, size=20)
            assert (status, length) == (OK, 21)
            serial.rstrip(b"\0").decode("ascii")
            assert (await disk.request(IN, sector=1 << 40, size=512))[0] == IOERR
            assert life.offers(wire.F_BLK_WRITE_ZEROES)
            assert (await disk.request(WRITE_ZEROES, data=struct.pack("<QII", 101, 2, 0)))[0] == OK
            served.content[101 * SECTOR : 103 * SECTOR] = bytes(2 * SECTOR)
            assert await disk.read(100, 4096) == served.content[100 * SECTOR :][:4096]
            assert life.offers(wire.F_BLK_DISCARD)
            assert (await disk.request(DISCARD, data=struct.pack("<QII", 2048, 128, 0)))[0] == OK
            await write(served, disk, 2048, os.urandom(64 << 10))  # what discarded blocks hold is nobody's business

            # The base is the number of requests, as long as nothing is under way.
            assert await frontend.get_vring_base(0) == disk.requests
            for _ in range(2):
                await life.start(ring, base=disk.requests)
                assert await disk.read(100, 4096) == served.content[100 * SECTOR :][:4096]
                assert await frontend.get_vring_base(0) == disk.requests
            await frontend.reset_owner()
            assert await frontend.get_features() == frontend.features

    run(work())


def test_two_vrings_and_a_new_memory_table_between(served):
    async def work():
        async with served.life() as life:
            frontend = life.frontend
            await frontend.set_memory_table(life.regions[:1])
            rings = [life.ring() for _ in range(2)]
            for index, (ring, _) in enumerate(rings):
                await life.start(ring, index)
            await asyncio.gather(
                *(write(served, disk, 300 + 8 * k, bytes([k]) * 512) for k, (_, disk) in enumerate(rings))
            )
            for index, (_, disk) in enumerate(rings):
                await frontend.set_vring_enable(index, False)
                assert await frontend.get_vring_base(index) == disk.requests
            await frontend.set_memory_table(life.regions)
            for index, (ring, disk) in enumerate(rings):
                await life.start(ring, index, base=disk.requests)
                disk.driver.buffer = (1 << 30) + 4096 * index
                assert await disk.read(300, 8192) == served.content[300 * SECTOR :][:8192]

    run(work())


def test_notification_without_eventfds(served):
    """Without a call the driver looks by itself. Without a kick the back-end should; QEMU's waits for one to come."""

    async def work():
        async with served.life(PLAIN) as life:
            frontend = life.frontend
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.place(ring)
            await frontend.set_vring_err(0, None)
            await frontend.set_vring_call(0, None)
            await frontend.set_vring_kick(0, None)
            await frontend.set_vring_enable(0, True)
            driver = disk.driver
            life.memory.pack("<IIQ", driver.header, IN, 0, 0)
            driver.submit([(driver.header, 16, False), (driver.buffer, 512, True), (driver.status, 1, True)])
            if not served.is_ours:
                os.eventfd_read(ring.kick_fd)
                await frontend.set_vring_kick(0, ring.kick_fd)
                ring.kick()
            await until(lambda: ring.used_idx() == 1)
            assert life.memory.read(driver.buffer, 512) == served.content[:512]
            assert await frontend.get_vring_base(0) == 1

    run(work())


def test_memory_slots(served):
    async def work():
        async with served.life() as life:
            frontend = life.frontend
            assert life.offers(F.CONFIGURE_MEM_SLOTS)
            assert await frontend.get_max_mem_slots() >= 8
            await frontend.add_mem_reg(life.regions[0])
            ring, disk = life.ring()
            await life.start(ring)
            assert await disk.read(7, 512) == served.content[7 * SECTOR :][:512]
            await frontend.add_mem_reg(life.regions[1])
            near, disk.driver.buffer = disk.driver.buffer, 1 << 30
            assert await disk.read(8, 512) == served.content[8 * SECTOR :][:512]
            disk.driver.buffer = near
            await frontend.rem_mem_reg(life.regions[1])
            assert await disk.read(9, 512) == served.content[9 * SECTOR :][:512]
            assert await frontend.get_vring_base(0) == disk.requests

    run(work())


def test_dirty_log(served):
    async def work():
        async with served.life() as life:
            frontend = life.frontend
            assert life.offers(wire.F_LOG_ALL)
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.start(ring)
            log_bytes = ((1 << 30) + (4 << 20)) // 4096 // 8
            with files(1, log_bytes) as (log,):
                event = os.eventfd(0, os.EFD_NONBLOCK)
                await frontend.set_log_base(FileArea(log, log_bytes, 0))
                await frontend.set_log_fd(event)
                await frontend.set_features(frontend.taken_features | wire.F_LOG_ALL)
                assert await frontend.get_vring_base(0) == 0
                await life.start(ring, log_gpa=ring.used)
                assert await disk.read(0, 8192) == served.content[:8192]

                def dirty():
                    data = os.pread(log, log_bytes, 0)
                    return {8 * at + bit for at, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}

                first = disk.driver.buffer >> 12
                assert dirty() >= {first, first + 1, disk.driver.status >> 12, ring.used >> 12}
                assert not dirty() & {first + 2, first + 100}
                await until(lambda: os.eventfd_read(event) > 0)
                os.close(event)
            await frontend.set_features(frontend.taken_features & ~wire.F_LOG_ALL)
            assert await disk.read(0, 512) == served.content[:512]

    run(work())


def test_resize_is_told_on_the_back_end_channel(served):
    async def work():
        told = asyncio.Event()

        async def config_change():
            told.set()

        async with served.life() as life:
            frontend = life.frontend
            channel = await frontend.open_channel(ChannelHandlers(config_change=config_change))
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.start(ring)
            before = capacity(await frontend.get_config(0, CONFIG_BYTES))
            await asyncio.to_thread(served.resize, before + MIB)
            if not served.is_ours and storage_daemon_version() < (8, 1):
                await asyncio.sleep(1)
                assert [told.is_set(), channel.closed.done(), frontend.closed.done()] == [False] * 3
                assert await disk.read(0, 512) == served.content[:512]
                pytest.skip("qemu-storage-daemon tells of a new size since 8.1")
            await asyncio.wait_for(told.wait(), 20)
            assert capacity(await frontend.get_config(0, CONFIG_BYTES)) == before + MIB
            await write(served, disk, before // SECTOR, b"n" * 512)
            assert not channel.closed.done()

    run(work())


def test_postcopy(served):
    """A memory table that faults, and the end of it: from then on it is memory as any other."""

    async def work():
        async with served.life() as life:
            if not life.offers(F.PAGEFAULT):
                pytest.skip(f"{served.name} does not offer PAGEFAULT here")
            frontend = life.frontend
            faults = await frontend.postcopy_advise()
            await frontend.postcopy_listen()
            entries = await frontend.set_memory_table_postcopy(life.regions)
            assert len({entry.uva for entry in entries}) == len(life.regions)
            await frontend.postcopy_end()
            os.close(faults)
            ring, disk = life.ring()
            await life.start(ring)
            assert await disk.read(0, 512) == served.content[:512]

    run(work())
