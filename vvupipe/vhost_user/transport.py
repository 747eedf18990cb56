"""What the vhost-user back-end asks of whatever carries it: a message channel, memory regions, doorbells.

A UNIX socket (`socket_transport`) and a VVU function (`vvupipe.vvu.driver_transport`) implement these; nothing above
this interface knows which one it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.messages import Message, ProtocolFeature


@dataclass(frozen=True, slots=True)
class FileArea:
    """Memory that is not the guest's (a log, an inflight region): `size_bytes` of `fd` from `offset` on."""

    fd: int
    size_bytes: int
    offset: int


class MessageChannel(Protocol):
    """Messages one way, replies the other: the back-end channel."""

    async def receive(self) -> Message | None:
        """The next message, or None at its end. Raises: ProtocolError, TransportError."""

    async def send(self, message: Message) -> None:
        """Send a message. Raises: Disconnected, TransportError."""

    def close(self) -> None:
        """Harmless when called again."""


class Connection(Protocol):
    """One stay of one front-end.

    What takes a file descriptor of a message may raise OSError as well, when that is of no use.
    """

    #: Protocol features that this carrier can pass on; the back-end offers no others.
    protocol_features: ProtocolFeature

    async def receive(self) -> Message | None:
        """The next message, or None when the front-end has gone.

        Raises: ProtocolError when the peer breaks the framing, TransportError when the carrier fails.
        """

    async def send(self, message: Message) -> None:
        """Send a reply. Raises: Disconnected when the front-end has gone, TransportError."""

    async def memory_regions(self, message: Message) -> list[MemoryRegion]:
        """The regions that SET_MEM_TABLE tells of, each with an fd that the caller owns.

        Raises: ProtocolError when the message and what came with it do not fit together.
        """

    async def added_region(self, message: Message) -> list[MemoryRegion]:
        """The region of ADD_MEM_REG, in one part or more. Raises: ProtocolError."""

    async def area(self, message: Message, size_bytes: int, offset: int) -> FileArea:
        """What SET_LOG_BASE or SET_INFLIGHT_FD brings, with an fd that the caller owns. Raises: ProtocolError."""

    def attach_area(self, reply: Message, size_bytes: int) -> None:
        """Have the reply to GET_INFLIGHT_FD bring a fresh area of zeros to the front-end."""

    def kick(self, message: Message) -> int | None:
        """The eventfd of SET_VRING_KICK, owned by the caller; None asks for polling."""

    def call(self, message: Message) -> Doorbell | None:
        """The doorbell of SET_VRING_CALL, owned by the caller; None wants no interrupts."""

    def err(self, message: Message) -> Doorbell | None:
        """The doorbell of SET_VRING_ERR, owned by the caller."""

    def log_event(self, message: Message) -> Doorbell | None:
        """The doorbell of SET_LOG_FD, owned by the caller."""

    def back_end_channel(self, message: Message) -> MessageChannel:
        """The channel of SET_BACKEND_REQ_FD, owned by the caller. Raises: ProtocolError."""

    def close(self) -> None:
        """End this stay: the front-end sees a disconnect. Harmless when called again."""


class Transport(Protocol):
    """Where front-ends come from."""

    async def accept(self) -> Connection:
        """Wait for the next front-end. Raises: TransportError when the carrier itself is gone for good."""

    def close(self) -> None:
        """Stop accepting and remove what was created (socket file, DMA mappings)."""

    def describe(self) -> str:
        """Where front-ends connect, for a person: "socket /tmp/x" or "VVU function 0000:00:10.0 of vm0"."""
