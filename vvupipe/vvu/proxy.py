"""The VVU function's side towards its sibling: a vhost-user back-end that passes messages on to the driver.

It keeps the file descriptors that come with them, since those cannot cross (contract, "Messages over rxq/txq").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

from vvupipe.errors import Disconnected, ProtocolError, UserError
from vvupipe.memory.shared import create_unnamed
from vvupipe.vhost_user.describe import Side
from vvupipe.vhost_user.messages import ANSWERED, HEADER, MAX_PAYLOAD, Message, ProtocolFeature, Request, unpack
from vvupipe.vhost_user.payloads import InflightArea, pack_u64, unpack_u64
from vvupipe.vhost_user.socket_transport import MessageSocket, SocketConnection, SocketTransport
from vvupipe.vhost_user.tracer import Stay, Tracer
from vvupipe.vvu import layout
from vvupipe.vvu.function import VvuFunction
from vvupipe.vvu.proxy_fds import ProxyFds
from vvupipe.vvu.region_table import MemoryPlacer

log = logging.getLogger(__name__)

_CAUGHT_UP_S = 10.0  # a driver that gives buffers back in batches is not waited for any longer
_REFUSED = 1
_INFLIGHT_MAX = 256 << 20
_MESSAGE_MAX = HEADER.size + MAX_PAYLOAD


class VvuProxy:
    """Serves siblings at `listening` for `function`, one after another. `run` does the work.

    placer: shows the sibling's memory to the VM; None when the driver maps BAR 4 itself. tracer: told every message
    that the sibling sends or gets.
    """

    def __init__(
        self,
        function: VvuFunction,
        listening: SocketTransport,
        placer: MemoryPlacer | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._function = function
        self._listening = listening
        self._fds = ProxyFds(function, placer, self._caught_up)
        self._relaying: set[asyncio.Task[None]] = set()
        self._delivering = asyncio.Lock()
        self._told_masked: set[str] = set()
        self._sibling: SocketConnection | None = None
        self._tracer = tracer
        self._stay: Stay | None = None
        self._sending = asyncio.Lock()
        self._requesting = asyncio.Lock()  # the same, on the back-end channel
        self._acks = False
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._rx = asyncio.Event()
        self._tx = asyncio.Event()
        self._rx_posted = 0
        function.backend = self

    # What the function tells (function.Backend).

    def backend_up(self) -> None:
        """A driver is ready."""
        log.info("%s: the back-end is up", self._function.name)
        self._down = asyncio.Event()  # of this stay of the back-end; the former one's stays set
        self._up.set()

    def backend_down(self) -> None:
        """The driver is gone or not ready."""
        if self._up.is_set():
            log.info("%s: the back-end is down", self._function.name)
        self._up.clear()
        self._down.set()
        if self._function.queue(layout.RXQ) is None:
            self._rx_posted = 0
        self._forget_sibling()
        self._rx.set()
        self._tx.set()

    def notified(self, queue: int) -> None:
        """Chains are available."""
        (self._rx if queue == layout.RXQ else self._tx).set()

    async def run(self) -> None:
        """Serve until cancelled."""
        transmitting = asyncio.create_task(self._transmit())
        try:
            while True:
                await self._up.wait()
                down = self._down
                # What the last sibling left undone must not reach the next one.
                await self._caught_up()
                if down.is_set():
                    continue
                connection = await _unless(down, self._listening.accept())
                if connection:
                    await self._serve(connection, down)
        finally:
            transmitting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await transmitting

    async def _serve(self, connection: SocketConnection, down: asyncio.Event) -> None:
        log.info("%s: sibling connected", self._function.name)
        self._sibling = connection
        self._stay = self._tracer.stay("connected") if self._tracer else None
        self._acks = False
        self._function.set_frontend_up(True)
        reason = "was cut off"
        try:
            await _unless(down, self._receive(connection))
            reason = "lost its back-end" if down.is_set() else "left"
        except (ProtocolError, OSError) as error:
            log.warning("%s: sibling dropped: %s", self._function.name, error)
            reason = f"was cut off: {error},"
        finally:
            if self._stay:
                self._stay.end(reason)
                self._stay = None
            self._forget_sibling()
            connection.shut_down()
            async with self._sending:  # whoever waits in `send` must wake before the fd goes
                connection.close()
        log.info("%s: sibling left", self._function.name)
        await self._deliver(b"")

    def _forget_sibling(self) -> None:
        self._sibling = None
        self._fds.forget()
        self._function.set_frontend_up(False)

    async def _receive(self, connection: SocketConnection) -> None:
        while (message := await connection.receive()) is not None:
            log.debug("%s: -> %s, %d bytes", self._function.name, message.name, len(message.payload))
            self._show(Side.FRONT_END, message)
            try:
                await self._fds.keep(connection, message)
            except ProtocolError as error:
                await self._refuse(connection, message, error)
                continue
            finally:
                message.close_fds()
            if message.request == Request.SET_PROTOCOL_FEATURES and len(message.payload) == 8:
                self._acks = bool(unpack_u64(message) & ProtocolFeature.REPLY_ACK)
            if message.request == Request.SET_BACKEND_REQ_FD and self._fds.channel:
                task = asyncio.create_task(self._relay_replies(self._fds.channel))
                self._relaying.add(task)
                task.add_done_callback(self._relaying.discard)
            if not await self._deliver(message.pack()):
                return
            await self._fds.after(message)

    async def _refuse(self, connection: SocketConnection, message: Message, error: ProtocolError) -> None:
        """What we cannot take never reaches the back-end; the answer is the one that it would give."""
        if not (message.need_reply and self._acks) or message.request in ANSWERED:
            raise error
        log.warning("%s: %s refused: %s", self._function.name, message.name, error)
        await self._caught_up()  # earlier answers go first
        reply = message.reply(pack_u64(_REFUSED))
        async with self._sending:
            self._show(Side.BACK_END, reply)
            await connection.send(reply)

    def _show(self, sender: Side, message: Message) -> None:
        if self._stay:
            self._stay.message(sender, message)

    async def _relay_replies(self, channel: MessageSocket) -> None:
        """Take the sibling's replies on the back-end channel to the driver; its requests went by `_send`."""
        stay = self._stay
        try:
            while (message := await channel.receive()) is not None:
                current = self._fds.channel is channel
                if current and stay:
                    stay.channel_message(Side.FRONT_END, message)
                message.close_fds()
                if not current:
                    return  # what it still holds must not reach the next sibling's stay
                if not message.is_reply:
                    log.warning("%s: a request on the back-end channel was dropped", self._function.name)
                elif not await self._deliver(message.pack()):
                    return
        except (ProtocolError, OSError, Disconnected) as error:
            log.warning("%s: back-end channel: %s", self._function.name, error)
        finally:
            if self._fds.channel is channel:
                self._fds.channel = None
            channel.shut_down()
            async with self._requesting:  # whoever waits in `send` must wake before the fd goes
                channel.close()

    # rxq

    async def _deliver(self, data: bytes) -> bool:
        """Put one message (or the zero-length one) on the rxq. False when the driver is gone."""
        async with self._delivering:
            return await self._put_on_rxq(data)

    async def _put_on_rxq(self, data: bytes) -> bool:
        while (queue := self._function.queue(layout.RXQ)) is not None:
            self._rx.clear()
            try:
                self._count_posted()
                chain = queue.pop()
                if chain is None:
                    await self._rx.wait()
                    continue
                written = chain.write(data)
            except ProtocolError as error:
                self._function.fail(error)
                return False
            if queue.push(chain.head, written):
                self._function.interrupt_queue(layout.RXQ)
            return True
        return False

    def _count_posted(self) -> int:
        queue = self._function.queue(layout.RXQ)
        available = queue.available if queue else 0
        self._rx_posted = max(self._rx_posted, available)
        return available

    async def _caught_up(self) -> None:
        """Return once the driver has given back every rx buffer that we filled, so has dealt with the messages."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CAUGHT_UP_S):
                while self._function.queue(layout.RXQ):
                    self._rx.clear()
                    try:
                        if self._count_posted() >= self._rx_posted:
                            return
                    except ProtocolError as error:
                        self._function.fail(error)
                        return
                    await self._rx.wait()
                return
        log.warning("%s: the driver has not given its buffers back for %.0f s", self._function.name, _CAUGHT_UP_S)

    # txq

    async def _transmit(self) -> None:
        """Send what the driver puts on the txq to the sibling of the moment; without one it is dropped."""
        while True:
            await self._tx.wait()
            self._tx.clear()
            while (queue := self._function.queue(layout.TXQ)) is not None:
                try:
                    chain = queue.pop()
                except ProtocolError as error:
                    self._function.fail(error)
                    break
                if chain is None:
                    break
                size = chain.readable_bytes
                if size > _MESSAGE_MAX:
                    log.error("%s: the driver sent %d bytes, which are no message", self._function.name, size)
                else:
                    await self._send(chain.read())
                # The driver may have reset the function meanwhile.
                if self._function.queue(layout.TXQ) is queue and queue.push(chain.head, 0):
                    self._function.interrupt_queue(layout.TXQ)
                await asyncio.sleep(0)  # the queue may never be empty

    async def _send(self, data: bytes) -> None:
        try:
            message = unpack(data)
        except ProtocolError as error:
            log.error("%s: the driver sent no vhost-user message: %s", self._function.name, error)
            return
        if not message.is_reply:
            await self._send_request(message)
            return
        self._adapt(message)
        try:
            async with self._sending:
                sibling = self._sibling
                if sibling is None:
                    log.debug("%s: %s came after the sibling left", self._function.name, message.name)
                    return
                self._show(Side.BACK_END, message)
                try:
                    await sibling.send(message)
                except Disconnected:
                    return  # `_receive` sees its end too
                except OSError as error:
                    log.warning("%s: %s cannot be answered: %s", self._function.name, message.name, error)
                    sibling.shut_down()
        finally:
            message.close_fds()

    async def _send_request(self, message: Message) -> None:
        """A request of the back-end goes to its channel."""
        channel = self._fds.channel
        if channel is None:
            log.warning("%s: the back-end sent a request and has no channel for it", self._function.name)
            return
        if self._stay:
            self._stay.channel_message(Side.BACK_END, message)
        try:
            async with self._requesting:
                await channel.send(message)
        except Disconnected:
            return  # whoever reads the channel sees its end too
        except OSError as error:
            log.warning("%s: back-end channel: %s", self._function.name, error)
            channel.shut_down()

    def _adapt(self, message: Message) -> None:
        """Make a reply of the driver one that the sibling can have."""
        if message.request == Request.GET_PROTOCOL_FEATURES and len(message.payload) == 8:
            offered = ProtocolFeature(unpack_u64(message))
            message.payload = pack_u64(offered & layout.CARRIED)
            masked = ", ".join(sorted(str(feature.name) for feature in offered & ~layout.CARRIED))
            if masked and masked not in self._told_masked:
                self._told_masked.add(masked)
                log.info("%s: the back-end offers %s, which a proxy cannot carry", self._function.name, masked)
        elif message.request == Request.GET_MAX_MEM_SLOTS and len(message.payload) == 8:
            message.payload = pack_u64(min(unpack_u64(message), layout.MEM_SLOTS_MAX))
        elif message.request == Request.GET_INFLIGHT_FD:
            try:
                area = InflightArea.unpack(message)
                if not 0 < area.size_bytes <= _INFLIGHT_MAX:
                    raise ProtocolError(f"an inflight region of {area.size_bytes} bytes")
                message.fds.append(create_unnamed(area.size_bytes))
            except (ProtocolError, UserError, OSError) as error:
                log.error("%s: the sibling gets no inflight region: %s", self._function.name, error)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> Any:
    """The work's result, or None when `event` comes first and the work is cancelled."""
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return None if task.cancelled() else task.result()
