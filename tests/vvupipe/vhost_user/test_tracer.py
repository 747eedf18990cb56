"""Which reply belongs to which request, and the lines that come of it."""

import asyncio
import io
import json
import re
import struct

import pytest

from vvupipe.vhost_user.describe import Side
from vvupipe.vhost_user.messages import FLAG_NEED_REPLY, VERSION, BackendRequest, Message, ProtocolFeature, Request
from vvupipe.vhost_user.payloads import pack_u64
from vvupipe.vhost_user.trace_lines import TraceOutput

FRONT, BACK = Side.FRONT_END, Side.BACK_END
NEED = VERSION | FLAG_NEED_REPLY


@pytest.fixture(params=[False, True], ids=["text", "json"])
def as_json(request):
    return request.param


def traced(story, *, as_json=False, label=""):
    """The lines of a stay in which `story(stay)` happens, without those of its beginning and end."""
    sink = io.BytesIO()

    async def run():
        stay = TraceOutput(sink, as_json).tracer(label).stay("connected")
        await story(stay)
        stay.end("left")

    asyncio.run(run())
    lines = sink.getvalue().decode().splitlines()
    if as_json:
        objects = [json.loads(line) for line in lines]
        assert (objects[0]["event"], objects[-1]["event"]) == ("connected", "disconnected")
        return objects[1:-1]
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6} .*--- front-end 1 connected ---", lines[0])
    assert re.search(r"\+\+\+ front-end 1 left after \d+ messages \+\+\+", lines[-1])
    return [re.sub(r"<\d+\.\d{6}>", "<T>", line[16:]) for line in lines[1:-1]]


def with_acks(stay):
    stay.message(FRONT, Message(Request.SET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.REPLY_ACK)))


def test_reply_stands_beside_its_request():
    async def story(stay):
        stay.message(FRONT, Message(Request.GET_QUEUE_NUM))
        stay.message(BACK, Message(Request.GET_QUEUE_NUM).reply(pack_u64(4)))

    assert traced(story) == ["front-end GET_QUEUE_NUM() = 4 <T>"]
    (message,) = traced(story, as_json=True)
    assert message["elapsed_us"] >= 0
    assert message["time"] > 1e9
    wanted = {"event": "message", "stay": 1, "from": "front-end", "name": "GET_QUEUE_NUM", "request": 17, "flags": 1,
              "need_reply": False, "fields": {}, "fds": [], "reply": {"queues": 4}, "refused": False}  # fmt: skip
    assert {key: message[key] for key in wanted} == wanted


def test_message_without_reply_comes_at_once():
    async def story(stay):
        stay.message(FRONT, Message(Request.SET_VRING_NUM, struct.pack("=II", 1, 64)))
        stay.message(FRONT, Message(Request.SET_VRING_NUM, struct.pack("=II", 2, 64), NEED))  # nobody took REPLY_ACK
        stay.message(FRONT, Message(Request.GET_QUEUE_NUM))
        stay.message(BACK, Message(Request.GET_QUEUE_NUM).reply(pack_u64(4)))

    assert traced(story) == [
        "front-end SET_VRING_NUM(vring=1, num=64)",
        "front-end SET_VRING_NUM(vring=2, num=64)",
        "front-end GET_QUEUE_NUM() = 4 <T>",
    ]


def test_acknowledged_and_refused():
    async def story(stay):
        with_acks(stay)
        for code in (0, 1):
            stay.message(FRONT, Message(Request.SET_OWNER, b"", NEED))
            stay.message(BACK, Message(Request.SET_OWNER).reply(pack_u64(code)))

    assert traced(story)[1:] == ["front-end SET_OWNER() = 0 <T>", "front-end SET_OWNER() = 1 (refused) <T>"]
    assert [message["refused"] for message in traced(story, as_json=True)] == [False, False, True]


def test_requests_that_wait_together_are_answered_in_their_order():
    async def story(stay):
        with_acks(stay)
        for vring in range(2):
            stay.message(FRONT, Message(Request.SET_VRING_NUM, struct.pack("=II", vring, 64), NEED))
        stay.message(FRONT, Message(Request.GET_QUEUE_NUM))
        for code in (0, 1):
            stay.message(BACK, Message(Request.SET_VRING_NUM).reply(pack_u64(code)))
        stay.message(BACK, Message(Request.GET_QUEUE_NUM).reply(pack_u64(4)))

    assert traced(story)[1:] == [
        "front-end SET_VRING_NUM(vring=0, num=64) = 0 <T>",
        "front-end SET_VRING_NUM(vring=1, num=64) = 1 (refused) <T>",
        "front-end GET_QUEUE_NUM() = 4 <T>",
    ]


def test_slow_reply_and_one_that_never_comes():
    async def story(stay):
        stay.message(FRONT, Message(Request.GET_QUEUE_NUM))
        stay.message(FRONT, Message(Request.GET_STATUS))
        await asyncio.sleep(0.2)
        stay.message(BACK, Message(Request.GET_QUEUE_NUM).reply(pack_u64(4)))
        stay.message(FRONT, Message(Request.GET_FEATURES))

    assert traced(story) == [
        "front-end GET_QUEUE_NUM() <unfinished ...>",
        "front-end GET_STATUS() <unfinished ...>",
        "front-end <... GET_QUEUE_NUM resumed> = 4 <T>",
        "front-end <... GET_STATUS resumed> = ?",
        "front-end GET_FEATURES() = ?",
    ]
    messages = traced(story, as_json=True)
    assert [(message["event"], message["resumed"]) for message in messages] == [
        ("unfinished", False), ("unfinished", False), ("message", True), ("unanswered", False), ("unanswered", False),
    ]  # fmt: skip
    assert messages[2]["elapsed_us"] > 100_000


def test_back_end_channel_is_a_conversation_of_its_own():
    async def story(stay):
        with_acks(stay)
        stay.message(FRONT, Message(Request.SET_OWNER, b"", NEED))
        stay.channel_message(BACK, Message(BackendRequest.VRING_HOST_NOTIFIER_MSG,
                                           struct.pack("=QQQ", 1, 0, 0), NEED))  # fmt: skip
        stay.channel_message(FRONT, Message(BackendRequest.VRING_HOST_NOTIFIER_MSG).reply(pack_u64(1)))
        stay.message(BACK, Message(Request.SET_OWNER).reply(pack_u64(0)))
        stay.channel_message(BACK, Message(BackendRequest.CONFIG_CHANGE_MSG))

    assert traced(story)[1:] == [
        "back-end  VRING_HOST_NOTIFIER_MSG(vring=1, flags=0x0, size=0x0, offset=0x0) = 1 (refused) <T>",
        "front-end SET_OWNER() = 0 <T>",
        "back-end  CONFIG_CHANGE_MSG()",
    ]


def test_reply_that_nobody_needed_is_paired_and_one_to_nothing_is_told():
    async def story(stay):
        stay.message(FRONT, Message(Request.SET_OWNER))
        stay.message(BACK, Message(Request.SET_OWNER).reply(pack_u64(0)))
        stay.message(BACK, Message(Request.SET_OWNER).reply(pack_u64(0)))
        stay.message(BACK, Message(Request.GET_STATUS))
        stay.message(FRONT, Message(Request.GET_STATUS).reply(pack_u64(1)))

    assert traced(story) == [
        "front-end SET_OWNER()",
        "front-end <... SET_OWNER resumed> = 0 <T>",
        "back-end  SET_OWNER(code=0) <reply to nothing>",
        "back-end  GET_STATUS() <request on the wrong way>",
        "front-end GET_STATUS(status=ACKNOWLEDGE) <reply by who asks>",
    ]
    strays = [message for message in traced(story, as_json=True) if message["event"] == "stray"]
    assert [stray["from"] for stray in strays] == ["back-end", "back-end", "front-end"]


def test_log_base_has_a_reply_with_log_shmfd():
    async def story(stay):
        stay.message(FRONT, Message(Request.SET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.LOG_SHMFD)))
        stay.message(FRONT, Message(Request.SET_LOG_BASE, struct.pack("=QQ", 4096, 0)))
        stay.message(BACK, Message(Request.SET_LOG_BASE).reply(b""))

    assert traced(story)[1:] == ["front-end SET_LOG_BASE(size=0x1000, offset=0x0) = () <T>"]


def test_label_and_long_payloads(as_json):
    async def story(stay):
        stay.message(FRONT, Message(99, bytes(100)))

    (line,) = traced(story, as_json=as_json, label="0000:00:10.0")
    if as_json:
        assert line["proxy"] == "0000:00:10.0"
        assert line["fields"] == {"payload": "00" * 100}
    else:
        assert line == f"0000:00:10.0 front-end request 99(payload={'00' * 32}...(100 bytes))"


def test_names_of_peers_files_stay_in_their_line(tmp_path):
    path = tmp_path / "two\nlines\x1b[2J"

    async def story(stay):
        with path.open("w") as file:
            stay.message(FRONT, Message(Request.SET_LOG_FD, fds=[file.fileno()]))

    (line,) = traced(story)
    assert line == f"front-end SET_LOG_FD(fd=<{tmp_path}/two\\nlines\\x1b[2J>)"


class Full(io.BytesIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_trace_that_cannot_be_written_stops_nothing(caplog, as_json):
    async def story():
        stay = TraceOutput(Full(), as_json).tracer("").stay("connected")
        stay.message(FRONT, Message(Request.SET_OWNER))
        stay.end("left")

    asyncio.run(story())
    assert [record.getMessage() for record in caplog.records] == [
        "the trace ends here, the messages still pass: No space left on device"
    ]
