"""vvupipe's front-end library on what only some back-ends offer, and nonsense that it can send to any."""

import asyncio
import os
import struct

import pytest
from front_end_life import CONFIG_BYTES, IN_BAND, PLAIN, SECTOR, WCE_OFFSET, run, until

from tests.mock import frontend as wire
from tests.mock.blk_driver import IN
from tests.vvupipe.vhost_user.frontend_kit import files
from vvupipe.errors import ProtocolError, Refused
from vvupipe.vhost_user.frontend_channel import ChannelHandlers
from vvupipe.vhost_user.frontend_vrings import PackedBase
from vvupipe.vhost_user.messages import Message, ProtocolFeature, Request

pytestmark = pytest.mark.timeout(120)

F = ProtocolFeature


def offered_or_skip(served, life, feature, name):
    if not life.offers(feature):
        assert not served.is_ours or feature == F.DEVICE_STATE, "vvupipe offers it, but for what the VVU path lacks"
        pytest.skip(f"{served.name} does not offer {name}")


def test_packed_base(served):
    async def work():
        async with served.life(PLAIN | wire.F_PACKED) as life:
            offered_or_skip(served, life, wire.F_PACKED, "packed rings")
            frontend = life.frontend
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring(16)
            await life.start(ring)
            for sector in range(7):  # three descriptors each: once around the ring
                assert await disk.read(sector, 512) == served.content[sector * SECTOR :][:512]
            base = await frontend.get_vring_base(0)
            assert PackedBase.unpack(base) == PackedBase(21 - 16, False, 21 - 16, False)
            await life.start(ring, base=base)
            assert await disk.read(3, 512) == served.content[3 * SECTOR :][:512]

    run(work())


def test_inflight_region(served):
    async def work():
        async with served.life(PLAIN) as life:
            offered_or_skip(served, life, F.INFLIGHT_SHMFD, "INFLIGHT_SHMFD")
            frontend = life.frontend
            region = await frontend.get_inflight(2, 16)
            await frontend.set_memory_table(life.regions)
            await frontend.set_inflight(region)
            ring, disk = life.ring()
            await life.start(ring)
            for sector in range(3):
                await disk.read(sector, 512)
            # struct of a split queue's region: features, version, desc_num, last_batch_head, used_idx
            head = struct.unpack("<QHHHH", os.pread(region.fd, 16, region.area.offset))
            assert (head[1], head[2], head[4]) == (1, 16, 3)
            assert await frontend.get_vring_base(0) == 3
            region.close()

    run(work())


def test_in_band_notifications(served):
    async def work():
        calls, errors = asyncio.Queue(), asyncio.Queue()
        async with served.life(PLAIN, protocol=~F(0)) as life:
            offered_or_skip(served, life, IN_BAND, "INBAND_NOTIFICATIONS")
            frontend = life.frontend
            await frontend.open_channel(ChannelHandlers(vring_call=calls.put, vring_err=errors.put))
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.place(ring)
            await frontend.set_vring_enable(0, True)
            driver = disk.driver
            for turn in range(3):
                life.memory.pack("<IIQ", driver.header, IN, 0, turn)
                driver.submit([(driver.header, 16, False), (driver.buffer, 512, True), (driver.status, 1, True)])
                await frontend.vring_kick(0)
                assert await asyncio.wait_for(calls.get(), 10) == 0
                await until(lambda done=turn + 1: ring.used_idx() == done)
                assert life.memory.read(driver.buffer, 512) == served.content[turn * SECTOR :][:512]
            life.memory.pack("<H", ring.avail + 2, 999)  # breaks the ring
            await frontend.vring_kick(0)
            assert await asyncio.wait_for(errors.get(), 10) == 0

    run(work())


def test_translations(served):
    """The driver's addresses are guest-physical ones, and the back-end has to ask for each page of them."""

    async def work():
        missed = []
        async with served.life(PLAIN | wire.F_ACCESS_PLATFORM) as life:
            offered_or_skip(served, life, wire.F_ACCESS_PLATFORM, "ACCESS_PLATFORM")
            frontend = life.frontend

            async def miss(iova, access):
                page = iova & ~4095
                missed.append(page)
                try:
                    uva = life.memory.to_uva(page)
                except KeyError:
                    raise Refused(f"nothing is at {iova:#x}") from None
                await frontend.update_iotlb(page, 4096, uva, 3)

            await frontend.open_channel(ChannelHandlers(iotlb_miss=miss))
            await frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.start(ring, to_uva=lambda gpa: gpa)
            assert await disk.read(0, 8192) == served.content[:8192]
            buffer = disk.driver.buffer
            assert {buffer, buffer + 4096} <= set(missed)
            missed.clear()
            await frontend.invalidate_iotlb(buffer, 4096)
            assert await disk.read(16, 4096) == served.content[16 * SECTOR :][:4096]
            assert missed == [buffer]
            disk.driver.buffer = 1 << 40
            with pytest.raises(KeyError):
                await disk.request(IN, size=512)  # the driver cannot look there either
            assert missed[-1] == 1 << 40
            with pytest.raises(Refused):
                await frontend.update_iotlb(0, 4096, 12345, 3)

    run(work())


def test_status_and_reset(served):
    async def work():
        async with served.life() as life:
            offered_or_skip(served, life, F.STATUS, "STATUS")
            frontend = life.frontend
            features = frontend.taken_features
            await frontend.set_memory_table(life.regions)
            for reset in (frontend.set_status, frontend.reset_device):
                for status in (1, 3, 11, 15):
                    await frontend.set_status(status)
                    assert await frontend.get_status() == status
                ring, disk = life.ring()
                await life.start(ring)
                assert await disk.read(5, 512) == served.content[5 * SECTOR :][:512]
                await (reset(0) if reset == frontend.set_status else reset())
                assert await frontend.get_status() == 0
                await frontend.set_features(features)
            with pytest.raises(Refused):
                await frontend.set_status(0x100)

    run(work())


def test_device_state(served):
    async def work():
        async with served.life() as life:
            offered_or_skip(served, life, F.DEVICE_STATE, "DEVICE_STATE")
            frontend = life.frontend
            await frontend.set_config(WCE_OFFSET, b"\0")
            state = await frontend.save_state()
            await frontend.set_config(WCE_OFFSET, b"\1")
            await frontend.load_state(state)
            assert (await frontend.get_config(0, CONFIG_BYTES))[WCE_OFFSET] == 0
            with pytest.raises(Refused):
                await frontend.load_state(b"no state of ours")
            with pytest.raises(Refused):
                await frontend.check_device_state()
            with files() as (fd,), pytest.raises(Refused):
                await frontend.set_device_state_fd(2, fd)

    run(work())


# Nonsense: the back-end may end the connection, and serves the next one.


@pytest.mark.parametrize(
    "message",
    [
        Message(999, b"", 1 | wire.NEED_REPLY),
        Message(Request.SET_VRING_NUM, b"short", 1 | wire.NEED_REPLY),
        Message(Request.SET_VRING_KICK, struct.pack("=Q", 200), 1 | wire.NEED_REPLY),
        Message(Request.SET_MEM_TABLE, struct.pack("=II", 1, 0), 1 | wire.NEED_REPLY),
    ],
    ids=lambda message: message.name,
)
def test_raw_nonsense(served, message):
    if not served.is_ours and message.request in {Request.SET_VRING_NUM, Request.SET_MEM_TABLE}:
        pytest.skip("libvhost-user does not look at the size of these, and takes what is in its memory")

    async def work():
        async with served.life() as life:
            try:
                answer = await life.frontend.send_raw(message, answered=True)
                assert answer.request == message.request
                if served.is_ours:  # libvhost-user acknowledges it and then ends
                    assert struct.unpack("=Q", answer.payload) != (0,)
            except ProtocolError:
                assert await asyncio.wait_for(life.frontend.closed, 10)
        async with served.life() as life:
            await life.frontend.set_memory_table(life.regions)
            ring, disk = life.ring()
            await life.start(ring)
            assert await disk.read(0, 512) == served.content[:512]

    run(work())
