"""A front-end's requests about the device as a whole: configuration space, status, reset, state transfer."""

from __future__ import annotations

import asyncio
import contextlib
import os

from vvupipe.errors import ProtocolError, Refused
from vvupipe.pipe import read_all, write_all
from vvupipe.vhost_user.frontend_connection import FrontendConnection
from vvupipe.vhost_user.messages import Request
from vvupipe.vhost_user.payloads import (
    CONFIG_FLAG_MIGRATION,
    STATE_NO_FD,
    STATE_PHASE_STOPPED,
    STATUS_MAX,
    ConfigAccess,
    StateDirection,
    StateTransfer,
    pack_u64,
    unpack_u64,
)


class FrontendDevice(FrontendConnection):
    """Requests about the device. Errors: see FrontendConnection."""

    # Configuration space.

    async def get_config(self, offset: int, size_bytes: int) -> bytes:
        """GET_CONFIG: bytes of the device's configuration space. Raises: Refused."""
        request = ConfigAccess(offset, size_bytes, 0, bytes(size_bytes))
        answer = await self._ask(Request.GET_CONFIG, request.pack())
        if not answer.payload:
            raise Refused(f"the back-end refused GET_CONFIG of {size_bytes} bytes at {offset}")
        access = ConfigAccess.unpack(answer)
        if (access.offset, len(access.data)) != (offset, size_bytes):
            raise ProtocolError(
                f"GET_CONFIG of {size_bytes} bytes at {offset} was answered with {len(access.data)} at {access.offset}"
            )
        return access.data

    async def set_config(self, offset: int, data: bytes, *, migration: bool = False) -> None:
        """SET_CONFIG: what the driver wrote or, with `migration`, the whole space of where the guest came from."""
        flags = CONFIG_FLAG_MIGRATION if migration else 0
        await self._tell(Request.SET_CONFIG, ConfigAccess(offset, len(data), flags, data).pack())

    # Status and reset.

    async def set_status(self, status: int) -> None:
        """SET_STATUS: the driver's device status, 8 bits; 0 resets."""
        await self._tell(Request.SET_STATUS, pack_u64(status))

    async def get_status(self) -> int:
        """GET_STATUS."""
        status = await self._ask_u64(Request.GET_STATUS)
        if status > STATUS_MAX:
            raise ProtocolError(f"GET_STATUS was answered with {status:#x}, which has more than 8 bits")
        return status

    async def reset_device(self) -> None:
        """RESET_DEVICE: every vring is stopped and disabled."""
        await self._tell(Request.RESET_DEVICE)

    # State transfer.

    async def set_device_state_fd(self, direction: StateDirection, fd: int) -> int | None:
        """SET_DEVICE_STATE_FD. `fd`: the pipe's end that the back-end is to use; it stays the caller's.

        Returns the end that the back-end wants to be used instead, which the caller owns, or None. Raises: Refused.
        """
        payload = StateTransfer(direction, STATE_PHASE_STOPPED).pack()
        answer = await self._ask(Request.SET_DEVICE_STATE_FD, payload, [fd], brings_fd=True)
        try:
            code = unpack_u64(answer)
            if code & ~STATE_NO_FD:
                raise Refused(f"the back-end refused SET_DEVICE_STATE_FD (code {code & ~STATE_NO_FD:#x})")
            return None if code & STATE_NO_FD else answer.take_fd()
        finally:
            answer.close_fds()

    async def check_device_state(self) -> None:
        """CHECK_DEVICE_STATE: the transfer is through. Raises: Refused when it went wrong."""
        if code := await self._ask_u64(Request.CHECK_DEVICE_STATE):
            raise Refused(f"the transfer of the device's state failed (code {code:#x})")

    async def save_state(self) -> bytes:
        """The device's internal state, as the back-end tells it; vrings must be stopped. Raises: Refused."""
        async with asyncio.timeout(self.answer_timeout_s):
            fd = await self._transfer(StateDirection.SAVE)
            try:
                state = await read_all(fd)
            finally:
                os.close(fd)
        await self.check_device_state()
        return state

    async def load_state(self, state: bytes) -> None:
        """Give the back-end a state that `save_state` brought; vrings must be stopped. Raises: Refused."""
        async with asyncio.timeout(self.answer_timeout_s):
            fd = await self._transfer(StateDirection.LOAD)
            try:
                with contextlib.suppress(BrokenPipeError):  # CHECK_DEVICE_STATE says what went wrong
                    await write_all(fd, state)
            finally:
                os.close(fd)
        await self.check_device_state()

    async def _transfer(self, direction: StateDirection) -> int:
        """Begin a transfer; our end of its pipe, non-blocking."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (read_fd, write_fd) if direction == StateDirection.SAVE else (write_fd, read_fd)
        try:
            other = await self.set_device_state_fd(direction, theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if other is not None:
            os.close(ours)
            ours = other
        os.set_blocking(ours, False)
        return ours
