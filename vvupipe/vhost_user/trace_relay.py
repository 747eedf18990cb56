"""Sits between vhost-user front-ends and a back-end, passes everything on unchanged, and shows it to a tracer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vvupipe.ending_signals import ending_signals
from vvupipe.errors import ProtocolError
from vvupipe.fd_socket import accept, peer_pid
from vvupipe.unix_path import connect_if_there
from vvupipe.vhost_user.describe import Side
from vvupipe.vhost_user.messages import Message, Request
from vvupipe.vhost_user.socket_transport import MessageSocket, listen_at
from vvupipe.vhost_user.tracer import Stay, Tracer

_RETRY_S = 0.1


class TraceRelay:
    """Takes one front-end after another at `listen_path` and connects each to the back-end at `back_end_path`.

    say: told what a person should know besides the trace.
    """

    def __init__(self, back_end_path: Path, listen_path: Path, tracer: Tracer, say: Callable[[str], None]) -> None:
        self._back_end_path = back_end_path
        self._listen_path = listen_path
        self._tracer = tracer
        self._say = say
        self._listening = listen_at(listen_path)
        self._listening.setblocking(False)

    def close(self) -> None:
        """Stop listening; the socket file goes."""
        self._listening.close()
        self._listen_path.unlink(missing_ok=True)

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._serve(await accept(self._listening, f"{self._listen_path}: a front-end"))

    async def _serve(self, front_end: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(front_end.close)
            stay = self._tracer.stay(f"connected (pid {peer_pid(front_end)})")
            reason = "was cut off"
            try:
                back_end = await self._connect(front_end)
                if back_end is None:
                    reason = "left before there was a back-end,"
                    return
                stack.pop_all()
                reason = await _Connection(stay, MessageSocket(front_end), MessageSocket(back_end)).run()
            finally:
                stay.end(reason)

    async def _connect(self, front_end: socket.socket) -> socket.socket | None:
        """A connection to the back-end, waited for; None when the front-end goes away first."""
        said = False
        while True:
            if sock := connect_if_there(self._back_end_path):
                return sock
            if not said:
                said = True
                self._say(f"waiting for the back-end at {self._back_end_path}")
            if _hung_up(front_end):
                return None
            await asyncio.sleep(_RETRY_S)


async def run_until_signal(relay: TraceRelay, ready: Callable[[], None]) -> None:
    """Run the relay until SIGINT, SIGTERM or SIGHUP; `ready` is called once these are heeded.

    Raises: OSError when the sockets cannot be used.
    """
    stop = asyncio.Event()
    for number in ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ready()
    serving = asyncio.create_task(relay.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        await _end([serving, stopping])


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


class _Connection:
    """One front-end, its back-end and the back-end channel between them. Owns all of it."""

    def __init__(self, stay: Stay, front_end: MessageSocket, back_end: MessageSocket) -> None:
        self._stay = stay
        self._front_end = front_end
        self._back_end = back_end
        self._channels: set[asyncio.Task[None]] = set()

    async def run(self) -> str:
        """Pass messages on until one side ends; why."""
        pumps = {
            asyncio.create_task(self._forward(self._front_end, self._back_end, Side.FRONT_END)): "left",
            asyncio.create_task(self._forward(self._back_end, self._front_end, Side.BACK_END)): "lost its back-end",
        }
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            pump = next(pump for pump in pumps if pump in done)
            return f"was cut off: {pump.result()}," if pump.result() else pumps[pump]
        finally:
            await _end([*pumps, *self._channels])
            self._front_end.close()
            self._back_end.close()

    async def _forward(self, source: MessageSocket, target: MessageSocket, sender: Side) -> str:
        """Pass on what `sender` sends. What ended it, empty when the sender left."""
        adapt = self._put_between if sender is Side.FRONT_END else None
        return await _pump(source, target, partial(self._stay.message, sender), adapt)

    def _put_between(self, message: Message) -> None:
        """The back-end channel of a SET_BACKEND_REQ_FD runs through here."""
        if message.request != Request.SET_BACKEND_REQ_FD or len(message.fds) != 1:
            return
        if not stat.S_ISSOCK(os.fstat(message.fds[0]).st_mode):
            return  # the back-end will see for itself
        ours, given = socket.socketpair()
        theirs = socket.socket(fileno=message.fds[0])
        message.fds[0] = given.detach()
        task = asyncio.create_task(self._relay_channel(MessageSocket(theirs), MessageSocket(ours)))
        self._channels.add(task)
        task.add_done_callback(self._channels.discard)

    async def _relay_channel(self, front_end: MessageSocket, back_end: MessageSocket) -> None:
        show = self._stay.channel_message
        pumps = [
            asyncio.create_task(_pump(front_end, back_end, partial(show, Side.FRONT_END))),
            asyncio.create_task(_pump(back_end, front_end, partial(show, Side.BACK_END))),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in done:
                if pump.result():
                    self._stay.note("channel-closed", f"lost its back-end channel: {pump.result()}")
        finally:
            await _end(pumps)
            front_end.close()
            back_end.close()


async def _pump(
    source: MessageSocket,
    target: MessageSocket,
    show: Callable[[Message], None],
    adapt: Callable[[Message], None] | None = None,
) -> str:
    """Pass messages on, one at a time, so that a slow reader slows the writer down. What ended it, empty: the end."""
    try:
        while (message := await source.receive()) is not None:
            try:
                show(message)
                if adapt:
                    adapt(message)
                await target.send(message)
            finally:
                message.close_fds()
    except (ProtocolError, OSError) as error:
        return str(error)
    return ""


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
