"""Every request of the front-end, byte by byte, and whatever a back-end may answer."""

import asyncio
import os
import struct

import pytest

from tests.mock import frontend as wire
from tests.vvupipe.vhost_user.frontend_kit import EVERYTHING, files, on_back_end, open_fds
from tests.vvupipe.vhost_user.frontend_requests import (
    ALL,
    ASKED,
    INFLIGHT,
    REGION,
    TOLD,
    WITH_FD,
    region,
    u32s,
    u64,
)
from vvupipe.errors import Disconnected, NotNegotiated, ProtocolError, Refused
from vvupipe.vhost_user.frontend_channel import ChannelHandlers
from vvupipe.vhost_user.frontend_vrings import InflightRegion, PackedBase
from vvupipe.vhost_user.messages import Message, ProtocolFeature, Request
from vvupipe.vhost_user.payloads import InflightArea

pytestmark = pytest.mark.timeout(60)


def named(cases):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def sent_files(case, a, b):
    return [{"a": a, "b": b}[letter] for letter in case.files]


def run(case, protocol=EVERYTHING, *, silent=False, **answer):
    """Make the request; its one message is checked, and answered as told."""

    async def work(frontend, peer):
        frontend.answer_timeout_s = 0.2 if silent else 10
        result = peer.during(case.make(frontend, a, b), case.request, case.payload, sent_files(case, a, b), **answer)
        try:
            return await result
        finally:
            assert peer.has_nothing()

    with files(2) as (a, b):
        return on_back_end(work, protocol)


def test_every_request_is_here():
    """Those of other devices, and what is tested where it is used, are named."""
    elsewhere = {"SET_PROTOCOL_FEATURES", "SET_BACKEND_REQ_FD"}
    of_others = {"SEND_RARP", "NET_SET_MTU", "SET_VRING_ENDIAN", "CREATE_CRYPTO_SESSION", "CLOSE_CRYPTO_SESSION"}
    of_others |= {"GPU_SET_SOCKET", "GET_SHARED_OBJECT", "GET_SHMEM_CONFIG"}
    covered = {Request(case.request).name for case in ALL.values()}
    assert {request.name for request in Request} - covered == elsewhere | of_others


@named(TOLD)
def test_an_acknowledged_request(case):
    assert run(case, flags=1 | wire.NEED_REPLY, answer=u64(0)) is None


@named({name: case for name, case in TOLD.items() if name != "VRING_KICK"})
def test_a_request_without_acknowledgements(case):
    assert run(case, EVERYTHING & ~(wire.REPLY_ACK | wire.INBAND)) is None


@named(TOLD)
def test_a_refused_request(case):
    with pytest.raises(Refused, match=f"refused {Request(case.request).name}"):
        run(case, flags=1 | wire.NEED_REPLY, answer=u64(1))


@named(TOLD)
@pytest.mark.parametrize(
    ("answer", "match"),
    [(b"", "expected 8"), (bytes(4), "expected 8"), (bytes(12), "expected 8"), ((20, bytes(8)), "with")],
)
def test_a_senseless_acknowledgement(case, answer, match):
    with pytest.raises(ProtocolError, match=match) as caught:
        run(case, flags=1 | wire.NEED_REPLY, answer=answer)
    assert not isinstance(caught.value, Refused)


@named(ASKED)
def test_an_answered_request(case):
    assert run(case, answer=case.answer) == case.result


@named(ASKED)
@pytest.mark.parametrize("bad", ["longer", "shorter", "other request", "fd"])
def test_a_senseless_answer(case, bad):
    with files() as (extra,):
        answer, fds = {
            "longer": (case.answer + b"\0", []),
            "shorter": (case.answer[:-1], []),
            "other request": ((case.request ^ 64, case.answer), []),
            "fd": (case.answer, [extra]),
        }[bad]
        before = open_fds()
        with pytest.raises(ProtocolError) as caught:
            run(case, answer=answer, answer_fds=fds)
        assert not isinstance(caught.value, Refused)
        assert open_fds() == before


@named(ALL)
def test_silence(case):
    told = case in TOLD.values()
    with pytest.raises(ProtocolError, match=r"did not answer .* within 0\.2 s"):
        run(case, flags=1 | wire.NEED_REPLY if told else 1, silent=True)


@named({name: case for name, case in ALL.items() if case.needs})
def test_what_was_not_negotiated_is_not_sent(case):
    lost = case.needs | (wire.INBAND if case.needs in (wire.REPLY_ACK, wire.BACKEND_REQ) else 0)

    async def work(frontend, peer):
        name = ProtocolFeature(case.needs).name
        with pytest.raises(NotNegotiated, match=f"{Request(case.request).name} needs the protocol feature {name}"):
            await case.make(frontend, a, b)
        assert peer.has_nothing()
        return True

    with files(2) as (a, b):
        assert on_back_end(work, EVERYTHING & ~lost)


def test_iotlb_needs_its_feature():
    async def work(frontend, peer):
        for asking in (frontend.update_iotlb(0, 1, 0, 3), frontend.invalidate_iotlb(0, 1)):
            with pytest.raises(NotNegotiated, match="VIRTIO_F_ACCESS_PLATFORM"):
                await asking
        assert peer.has_nothing()
        return True

    assert on_back_end(work, features=wire.F_VERSION_1)


def test_channel_needs_its_feature():
    async def work(frontend, peer):
        with pytest.raises(NotNegotiated, match="BACKEND_REQ"):
            await frontend.open_channel(ChannelHandlers())
        assert peer.has_nothing()
        return True

    assert on_back_end(work, EVERYTHING & ~(wire.BACKEND_REQ | wire.INBAND))


@pytest.mark.parametrize("wanted", [wire.INBAND, wire.INBAND | wire.REPLY_ACK, wire.INBAND | wire.BACKEND_REQ, 1 << 40])
def test_impossible_protocol_features_are_not_sent(wanted):
    async def work(frontend, peer):
        with pytest.raises(NotNegotiated):
            await frontend.set_protocol_features(ProtocolFeature(wanted))
        assert peer.has_nothing()
        return True

    assert on_back_end(work)


def test_numbers_without_room_are_not_sent():
    async def work(frontend, peer):
        for asking in (frontend.set_vring_kick(256, None), frontend.set_memory_table([])):
            with pytest.raises(ValueError, match=r"256|0 regions"):
                await asking
        assert peer.has_nothing()
        return True

    assert on_back_end(work)


# What answers mean.


@pytest.mark.parametrize(
    ("case", "answer", "error", "match"),
    [
        (ASKED["GET_VRING_BASE"], u32s(2, 0), ProtocolError, "for vring 2"),
        (ASKED["GET_VRING_BASE"], u32s(3, 65536), ProtocolError, "split vring"),
        (ASKED["GET_STATUS"], u64(256), ProtocolError, "8 bits"),
        (ASKED["GET_CONFIG"], b"", Refused, "refused GET_CONFIG"),
        (ASKED["GET_CONFIG"], u32s(9, 4, 0) + b"abcd", ProtocolError, "at 9"),
        (ASKED["GET_CONFIG"], u32s(8, 3, 0) + b"abc", ProtocolError, "with 3"),
        (ASKED["GET_CONFIG"], u32s(8, 4, 0) + b"abc", ProtocolError, "brings 3"),
        (ASKED["IOTLB_MSG update"], u64(1), Refused, "refused IOTLB_MSG"),
        (ASKED["POSTCOPY_END"], u64(1), Refused, "refused POSTCOPY_END"),
        (ASKED["CHECK_DEVICE_STATE"], u64(2), Refused, "code 0x2"),
        (WITH_FD["POSTCOPY_ADVISE"], b"", ProtocolError, "without the file descriptor"),
        (WITH_FD["GET_INFLIGHT_FD"], INFLIGHT, Refused, "no inflight region"),
        (WITH_FD["GET_INFLIGHT_FD"], struct.pack("=QQHH4x", 640, 0, 2, 16), ProtocolError, "without the file"),
        (WITH_FD["SET_DEVICE_STATE_FD"], u64(0x101), Refused, "code 0x1"),
        (WITH_FD["SET_DEVICE_STATE_FD"], u64(0), ProtocolError, "without the file descriptor"),
    ],
)
def test_an_answer_that_says_no_or_nonsense(case, answer, error, match):
    before = open_fds()
    with pytest.raises(error, match=match) as caught:
        run(case, answer=answer)
    assert type(caught.value) is error
    assert open_fds() == before


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (struct.pack("=QQHH4x", 640, 0, 1, 16), "1 vrings of 16"),
        (struct.pack("=QQHH4x", 640, 0, 2, 32), "2 vrings of 32"),
        (struct.pack("=QQHH4x", 1 << 21, 0, 2, 16), "ends at byte"),
        (struct.pack("=QQHH4x", 640, 1 << 63, 2, 16), "where no file ends"),
        (bytes(23), "expected"),
    ],
)
def test_an_inflight_region_that_does_not_fit(answer, match):
    with files() as (fd,):
        before = open_fds()
        with pytest.raises(ProtocolError, match=match):
            run(WITH_FD["GET_INFLIGHT_FD"], answer=answer, answer_fds=[fd])
        assert open_fds() == before


@named(WITH_FD)
def test_an_answer_with_an_fd(case):
    with files() as (fd,):
        result = run(case, answer=case.answer, answer_fds=[fd])
        given = result.fd if isinstance(result, InflightRegion) else result
        assert os.fstat(given).st_ino == os.fstat(fd).st_ino
        os.close(given)
    if isinstance(result, InflightRegion):
        assert result.area == InflightArea(640, 64, 2, 16)


@named(WITH_FD)
def test_an_answer_with_two_fds(case):
    with files(2) as fds:
        before = open_fds()
        with pytest.raises(ProtocolError, match="with 2 file descriptors"):
            run(case, answer=case.answer, answer_fds=fds)
        assert open_fds() == before


def test_an_unpadded_inflight_answer():
    """The specification has no padding; peers of both kinds exist."""
    with files() as (fd,):
        region = run(WITH_FD["GET_INFLIGHT_FD"], answer=struct.pack("=QQHH", 640, 0, 2, 16), answer_fds=[fd])
    region.close()
    assert region.area.size_bytes == 640


def test_the_log_may_be_answered_without_a_number():
    assert run(ASKED["SET_LOG_BASE"], answer=b"") is None


def test_state_goes_through_the_fd_that_was_sent():
    assert run(WITH_FD["SET_DEVICE_STATE_FD"], answer=u64(0x100)) is None


def test_packed_base():
    base = PackedBase(5, True, 3, False)
    assert base.pack() == 0x8005 | 3 << 16
    assert PackedBase.unpack(base.pack()) == base

    async def work(frontend, peer):
        answer = u32s(0, 0x8005 | 0x8003 << 16)
        return await peer.during(frontend.get_vring_base(0), 11, u32s(0, 0), answer=answer)

    got = on_back_end(work, features=wire.F_VERSION_1 | wire.F_PACKED)
    assert PackedBase.unpack(got) == PackedBase(5, True, 3, True)


# A device's state.


@pytest.mark.parametrize("own_pipe", [False, True])
def test_save_state(own_pipe):
    state = os.urandom(300_000)

    async def work(frontend, peer):
        def serve():
            request, _, payload, (fd,) = peer.receive()
            assert (request, payload) == (42, u32s(0, 0))
            other = os.pipe() if own_pipe else None
            peer.send(42, u64(0 if own_pipe else 0x100), other[:1] if other else [])
            with os.fdopen(other[1] if other else os.dup(fd), "wb") as out:
                peer.close_fds()
                out.write(state)
            if other:
                os.close(other[0])
            assert peer.receive()[:3] == (43, 1, b"")
            peer.send(43, u64(0))

        saved, _ = await asyncio.gather(frontend.save_state(), asyncio.to_thread(serve))
        return saved

    before = open_fds()
    assert on_back_end(work) == state
    assert open_fds() == before


@pytest.mark.parametrize("code", [0, 1])
def test_load_state(code):
    state = os.urandom(300_000)
    arrived = bytearray()

    async def work(frontend, peer):
        def serve():
            request, _, payload, (fd,) = peer.receive()
            assert (request, payload) == (42, u32s(1, 0))
            peer.send(42, u64(0x100))
            while part := os.read(fd, 65536):
                arrived.extend(part)
            assert peer.receive()[:3] == (43, 1, b"")
            peer.send(43, u64(code))

        await asyncio.gather(frontend.load_state(state), asyncio.to_thread(serve))
        return True

    if code:
        with pytest.raises(Refused, match="code 0x1"):
            on_back_end(work)
    else:
        assert on_back_end(work)
    assert arrived == state


# Postcopy.


def test_postcopy_memory_table():
    theirs = struct.pack("=QQQQ", 0x10_0000, 0x8000, 0xAAAA_0000, 0x1000)

    async def work(frontend, peer):
        asking = frontend.set_memory_table_postcopy([region(a)])
        table = u32s(1, 0)
        entries = await peer.during(asking, 5, table + REGION, [a], answer=table + theirs)
        assert (await asyncio.to_thread(peer.receive))[:3] == (5, 1, u64(0))
        return entries

    with files() as (a,):
        (entry,) = on_back_end(work)
    assert entry.uva == 0xAAAA_0000


# Any message, and the connection.


def test_raw_messages():
    async def work(frontend, peer):
        sending = frontend.send_raw(Message(777, b"xy", 0x3, [a, b]), answered=False)
        assert await peer.during(sending, 777, b"xy", [a, b], flags=3) is None
        asking = frontend.send_raw(Message(15), answered=True)
        answer = await peer.during(asking, 15, answer=(999, b"what"), answer_fds=[a])
        fd = answer.take_fd()
        os.close(fd)
        return answer.request, answer.payload

    with files(2) as (a, b):
        assert on_back_end(work) == (999, b"what")


def test_a_request_that_is_given_up_ends_the_connection():
    """Its answer, which may still come, must not be taken for that of another."""

    async def work(frontend, peer):
        task = asyncio.create_task(frontend.get_queue_num())
        assert (await asyncio.to_thread(peer.receive))[0] == 17
        task.cancel()
        await asyncio.wait({task})
        assert await asyncio.to_thread(peer.gone)
        with pytest.raises(Disconnected):
            await frontend.get_queue_num()
        return True

    assert on_back_end(work)


def test_a_refusal_leaves_the_connection_usable():
    async def work(frontend, peer):
        with pytest.raises(Refused):
            await peer.acknowledge(frontend.set_vring_num(0, 7), 8, u32s(0, 7), code=1)
        return await peer.during(frontend.get_queue_num(), 17, answer=u64(4))

    assert on_back_end(work) == 4


def test_more_fds_than_any_message_has():
    async def work(frontend, peer):
        with pytest.raises(ProtocolError, match="9 file descriptors"):
            await peer.during(frontend.get_queue_num(), 17, answer=u64(4), answer_fds=[a] * 9)
        return True

    with files() as (a,):
        before = open_fds()
        assert on_back_end(work)
        assert open_fds() == before
