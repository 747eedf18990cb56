"""Follows the messages of a vhost-user connection: which reply belongs to which request, and how long it took.

A tracer only looks. It never touches a message, and whoever passes the messages on calls it before it does so.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vvupipe.vhost_user.describe import Fields, Side, describe_fds, describe_reply, describe_request, name_of
from vvupipe.vhost_user.messages import ANSWERED, BackendRequest, Message, ProtocolFeature, Request
from vvupipe.vhost_user.payloads import unpack_u64

_UNFINISHED_S = 0.1  # a reply that takes longer is told in a line of its own
_REMEMBERED = 64  # requests that should have no reply, in case that one comes


@dataclass(slots=True)
class Exchange:
    """A request and what became of it. Times are seconds since the epoch and nanoseconds.

    reply: None when there is none (yet). told: a line about the request was written already.
    """

    stay: int
    requester: Side
    request: int
    name: str
    flags: int
    need_reply: bool
    fields: Fields
    fds: list[str]
    time_s: float
    started_ns: int
    awaited: bool = False
    told: bool = False
    reply: Fields | None = None
    reply_fds: list[str] = field(default_factory=list)
    elapsed_ns: int | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def refused(self) -> bool:
        """Whether the reply says that it failed."""
        return bool(self.reply and (self.reply.get("code") or self.reply.get("failed")))


class Lines(Protocol):
    """Where a trace is written; trace_lines implements it."""

    def note(self, stay: int, event: str, text: str) -> None:
        """Something that is no message: a front-end came or left."""

    def done(self, exchange: Exchange) -> None:
        """A request that awaits no reply, or whose reply is here; after `unfinished` it resumes."""

    def unfinished(self, exchange: Exchange) -> None:
        """A request whose reply takes its time."""

    def unanswered(self, exchange: Exchange) -> None:
        """A request whose reply will not come any more."""

    def stray(self, sender: Side, exchange: Exchange) -> None:
        """What nobody could have expected from `sender`: a reply to nothing, a request on the wrong way."""


class _Conversation:
    """One channel: `requester` asks, the other side replies."""

    def __init__(self, requester: Side, stay: int, lines: Lines, awaits: Callable[[Message], bool]) -> None:
        self._requester = requester
        self._stay = stay
        self._lines = lines
        self._awaits = awaits
        self._waiting: deque[Exchange] = deque()
        self._told: deque[Exchange] = deque(maxlen=_REMEMBERED)

    def seen(self, sender: Side, message: Message) -> None:
        if (sender is self._requester) == message.is_reply:
            self._lines.stray(sender, self._exchange(message))
        elif message.is_reply:
            self._replied(message)
        else:
            self._requested(message)

    def _exchange(self, message: Message) -> Exchange:
        return Exchange(
            stay=self._stay,
            requester=self._requester,
            request=message.request,
            name=name_of(self._requester, message.request),
            flags=message.flags,
            need_reply=message.need_reply,
            fields=(describe_reply if message.is_reply else describe_request)(self._requester, message),
            fds=describe_fds(message.fds),
            time_s=time.time(),
            started_ns=time.monotonic_ns(),
        )

    def _requested(self, message: Message) -> None:
        exchange = self._exchange(message)
        if self._awaits(message):
            exchange.awaited = True
            exchange.timer = asyncio.get_running_loop().call_later(_UNFINISHED_S, self._overdue, exchange)
            self._waiting.append(exchange)
        else:
            self._lines.done(exchange)
            exchange.told = True
            self._told.append(exchange)

    def _overdue(self, exchange: Exchange) -> None:
        self._lines.unfinished(exchange)
        exchange.told = True

    def _replied(self, message: Message) -> None:
        exchange = self._take(message.request)
        if exchange is None:
            self._lines.stray(_other(self._requester), self._exchange(message))
            return
        if exchange.timer:
            exchange.timer.cancel()
        exchange.reply = describe_reply(self._requester, message)
        exchange.reply_fds = describe_fds(message.fds)
        exchange.elapsed_ns = time.monotonic_ns() - exchange.started_ns
        self._lines.done(exchange)

    def _take(self, request: int) -> Exchange | None:
        """The request that a reply belongs to: the oldest that waits, else the last one that should have had none."""
        for exchanges in (self._waiting, reversed(self._told)):
            for exchange in exchanges:
                if exchange.request == request:
                    (self._waiting if exchange.awaited else self._told).remove(exchange)
                    return exchange
        return None

    def end(self) -> None:
        while self._waiting:
            exchange = self._waiting.popleft()
            if exchange.timer:
                exchange.timer.cancel()
            self._lines.unanswered(exchange)


def _other(side: Side) -> Side:
    return Side.BACK_END if side is Side.FRONT_END else Side.FRONT_END


class Stay:
    """One front-end's connection, with its back-end channel."""

    def __init__(self, number: int, lines: Lines) -> None:
        self.number = number
        self._lines = lines
        self._protocol = ProtocolFeature(0)
        self._messages = 0
        self._main = _Conversation(Side.FRONT_END, number, lines, self._front_end_awaits)
        self._channel = _Conversation(Side.BACK_END, number, lines, self._back_end_awaits)

    def message(self, sender: Side, message: Message) -> None:
        """`sender` sent it on the connection itself. Call it in the event loop, before its fds go."""
        self._messages += 1
        if sender is Side.FRONT_END and message.request == Request.SET_PROTOCOL_FEATURES and len(message.payload) == 8:
            self._protocol = ProtocolFeature(unpack_u64(message))
        self._main.seen(sender, message)

    def channel_message(self, sender: Side, message: Message) -> None:
        """`sender` sent it on the back-end channel."""
        self._messages += 1
        self._channel.seen(sender, message)

    def note(self, event: str, text: str) -> None:
        """Write down something that is no message."""
        self._lines.note(self.number, event, text)

    def end(self, reason: str) -> None:
        """The connection is gone; requests that still wait stay without a reply."""
        self._main.end()
        self._channel.end()
        self.note("disconnected", f"{reason} after {self._messages} messages")

    def _front_end_awaits(self, message: Message) -> bool:
        if message.request == Request.SET_LOG_BASE and ProtocolFeature.LOG_SHMFD in self._protocol:
            return True
        return message.request in ANSWERED or self._acknowledged(message)

    def _back_end_awaits(self, message: Message) -> bool:
        return message.request == BackendRequest.SHARED_OBJECT_LOOKUP or self._acknowledged(message)

    def _acknowledged(self, message: Message) -> bool:
        return message.need_reply and ProtocolFeature.REPLY_ACK in self._protocol


class Tracer:
    """Counts the stays, from 1."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._stays = 0

    def stay(self, text: str) -> Stay:
        """A front-end connected."""
        self._stays += 1
        stay = Stay(self._stays, self._lines)
        stay.note("connected", text)
        return stay
