"""Transfer of a device's internal state (docs/interop/vhost-user.rst, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE)."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial

from vvupipe.errors import ProtocolError
from vvupipe.pipe import read_all, write_all
from vvupipe.vhost_user.device import Device
from vvupipe.vhost_user.messages import Message
from vvupipe.vhost_user.payloads import STATE_NO_FD, STATE_PHASE_STOPPED, StateDirection, StateTransfer, pack_u64

log = logging.getLogger(__name__)

_STATE_MAX_BYTES = 1 << 20
_CHECK_S = 30.0  # a front-end that asks before it has sent everything is waited for that long
_FAILED = 1


class StateTransfers:
    """At most one transfer at a time; the pipe's end that the front-end gives is used and closed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._task: asyncio.Task[None] | None = None

    async def begin(self, message: Message, *, running: bool) -> bytes:
        """Start to save or to load. The reply's payload."""
        try:
            transfer = StateTransfer.unpack(message)
            if transfer.phase != STATE_PHASE_STOPPED or transfer.direction not in set(StateDirection):
                raise ProtocolError(f"direction {transfer.direction} in phase {transfer.phase} is not known")
            if running:
                raise ProtocolError("vrings are running")
            if self._task and not self._task.done():
                raise ProtocolError("another transfer is under way")
            if message.fds:
                os.set_blocking(message.fds[0], False)
            fd = message.take_fd()
        except (ProtocolError, OSError) as error:
            log.warning("SET_DEVICE_STATE_FD refused: %s", error)
            return pack_u64(_FAILED | STATE_NO_FD)
        work = self._save if transfer.direction == StateDirection.SAVE else self._load
        self._task = asyncio.create_task(work(fd))
        # Not in the task: one that is cancelled before its first step does nothing.
        self._task.add_done_callback(partial(_ended, fd))
        return pack_u64(STATE_NO_FD)

    async def check(self) -> bytes:
        """The reply to CHECK_DEVICE_STATE: whether the last transfer went well."""
        if self._task is None:
            log.warning("CHECK_DEVICE_STATE without a transfer")
            return pack_u64(_FAILED)
        task, self._task = self._task, None
        try:
            await asyncio.wait_for(task, _CHECK_S)
        except (ProtocolError, OSError, TimeoutError) as error:
            log.warning("the transfer of the device's state failed: %s", error or "it did not end")
            return pack_u64(_FAILED)
        return pack_u64(0)

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _save(self, fd: int) -> None:
        await write_all(fd, self._device.save_state())

    async def _load(self, fd: int) -> None:
        try:
            state = await read_all(fd, _STATE_MAX_BYTES)
        except ValueError as error:
            raise ProtocolError(f"a state of which {error}") from error
        self._device.load_state(state)


def _ended(fd: int, task: asyncio.Task[None]) -> None:
    os.close(fd)
    if not task.cancelled():
        task.exception()  # a front-end need not ask how it went
