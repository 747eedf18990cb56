"""The back-end side of vhost-user: one session answers one front-end's requests.

Specification: QEMU docs/interop/vhost-user.rst. The session knows a transport.Connection and a device.Device; what
carries the one and what the other stores are not its business.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from kernels.virtio_layout import F_VERSION_1
from vvupipe.errors import Disconnected, ProtocolError, TransportError, UserError, WorkerError
from vvupipe.vhost_user.back_end_channel import BackendChannel
from vvupipe.vhost_user.device import Device
from vvupipe.vhost_user.device_state import StateTransfers
from vvupipe.vhost_user.messages import (
    ANSWERED,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    IN_BAND_NEEDS,
    NEEDED_FEATURE,
    BackendRequest,
    Message,
    ProtocolFeature,
    Request,
)
from vvupipe.vhost_user.payloads import CONFIG_FLAG_MIGRATION, STATUS_MAX, ConfigAccess, pack_u64, unpack_u64
from vvupipe.vhost_user.session_memory import SessionMemory
from vvupipe.vhost_user.session_vrings import SessionVrings
from vvupipe.vhost_user.transport import Connection

log = logging.getLogger(__name__)

#: what the session implements; a carrier offers those of them that it can pass on
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)
#: asked by old front-ends that did not negotiate their features
_TOLERATED = {Request.GET_QUEUE_NUM, Request.GET_CONFIG, Request.SET_CONFIG}
_NEEDS = {request: feature for request, feature in NEEDED_FEATURE.items() if request not in _TOLERATED}
_CONFIG_SPACE_MAX = 256  # "Virtio device config space": VHOST_USER_MAX_CONFIG_SIZE of the protocol
_DONE = 0
_FAILED = 1

Reply = bytes | Message | None


class Session:
    """One front-end's stay. `run` returns when it leaves; `close` then stops its vrings and forgets its memory."""

    def __init__(self, connection: Connection, device: Device) -> None:
        self._connection = connection
        self._device = device
        self._offered_protocol = PROTOCOL_FEATURES & connection.protocol_features
        self._protocol = ProtocolFeature(0)
        self._status = 0
        self._channel: BackendChannel | None = None
        self._notices: set[asyncio.Task[None]] = set()
        self._memory = SessionMemory(connection, device.pool)
        self._vrings = SessionVrings(connection, device, lambda: self._memory.known)
        self._memory.channel = self._vrings.channel = lambda: self._channel
        self._states = StateTransfers(device)
        device.on_config_change = self._tell_config_change
        vrings, memory = self._vrings, self._memory
        self._handlers: dict[int, Callable[[Message], Awaitable[Reply]]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: memory.set_log_base,
            Request.SET_LOG_FD: memory.set_log_event,
            Request.SET_VRING_NUM: vrings.set_num,
            Request.SET_VRING_ADDR: vrings.set_addr,
            Request.SET_VRING_BASE: vrings.set_base,
            Request.GET_VRING_BASE: vrings.get_base,
            Request.SET_VRING_KICK: vrings.set_kick,
            Request.SET_VRING_CALL: vrings.set_call,
            Request.SET_VRING_ERR: vrings.set_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: vrings.set_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.IOTLB_MSG: memory.iotlb,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: vrings.get_inflight,
            Request.SET_INFLIGHT_FD: vrings.set_inflight,
            Request.RESET_DEVICE: self._reset_device,
            Request.VRING_KICK: vrings.kick_in_band,
            Request.GET_MAX_MEM_SLOTS: memory.get_max_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: memory.remove_region,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
            Request.SET_DEVICE_STATE_FD: self._set_device_state_fd,
            Request.CHECK_DEVICE_STATE: self._check_device_state,
        }

    async def run(self) -> None:
        """Answer requests until the front-end leaves.

        Raises: ProtocolError when it breaks the protocol so that no answer can say so, TransportError.
        """
        while (message := await self._connection.receive()) is not None:
            log.debug("<- %s, %d bytes, flags %#x", message.name, len(message.payload), message.flags)
            try:
                await self._answer(message)
            finally:
                message.close_fds()

    async def close(self) -> None:
        """Stop what runs and let go of the front-end's memory and eventfds."""
        self._device.on_config_change = lambda: None
        try:
            await self._states.close()
            await self._vrings.close()
            await self._memory.close()
            for task in self._notices:
                task.cancel()
            if self._channel:
                await self._channel.close()
            self._device.reset()
        finally:
            self._connection.close()

    async def _answer(self, message: Message) -> None:
        handler = self._handlers.get(message.request)
        has_reply = message.request in ANSWERED or message.request == Request.SET_LOG_BASE
        wants_ack = message.need_reply and ProtocolFeature.REPLY_ACK in self._protocol and not has_reply
        reply: Reply = None
        code = _FAILED
        if handler is None and has_reply:
            # Its answer would have a shape that only its feature knows: silence would leave the front-end waiting.
            raise ProtocolError(f"{message.name} needs a feature that was not offered")
        if handler is None:
            # "REPLY_ACK": whoever asks is told that it failed; whoever does not ask expects nothing.
            log.warning("%s is not implemented%s", message.name, "" if wants_ack else ", ignored")
        else:
            try:
                self._check_negotiated(message)
                reply = await handler(message)
                code = _DONE
            except (ProtocolError, WorkerError, UserError, OSError) as error:
                # Whatever its file descriptors are, or this machine lacks, is no reason to end the back-end.
                if not wants_ack:
                    raise ProtocolError(f"{message.name}: {_reason(error)}") from error
                log.warning("%s refused: %s", message.name, _reason(error))
        if reply is None and wants_ack:
            reply = pack_u64(code)
        if reply is None:
            return
        answer = reply if isinstance(reply, Message) else message.reply(reply)
        try:
            await self._connection.send(answer)
        except OSError as error:
            raise ProtocolError(f"the answer to {message.name} cannot be sent: {_reason(error)}") from error
        finally:
            answer.close_fds()

    def _check_negotiated(self, message: Message) -> None:
        needed = _NEEDS.get(Request(message.request))
        if needed is not None and needed not in self._protocol:
            raise ProtocolError(f"it needs the protocol feature {needed.name}, which was not negotiated")

    # Features.

    async def _get_features(self, message: Message) -> bytes:
        return pack_u64(self._offered_features())

    def _offered_features(self) -> int:
        log_all = F_LOG_ALL if ProtocolFeature.LOG_SHMFD in self._offered_protocol else 0
        return self._device.features | F_PROTOCOL_FEATURES | log_all

    async def _set_features(self, message: Message) -> None:
        features = unpack_u64(message)
        unknown = features & ~self._offered_features()
        if unknown:
            raise ProtocolError(f"features {unknown:#x} were not offered")
        if not features & F_VERSION_1:
            log.info("the front-end did not take VIRTIO_F_VERSION_1")
        self._vrings.features = features
        await self._memory.set_logging(bool(features & F_LOG_ALL))
        # "Ring states": without protocol features a ring starts enabled.
        if not features & F_PROTOCOL_FEATURES:
            self._vrings.enable_all()

    async def _get_protocol_features(self, message: Message) -> bytes:
        return pack_u64(self._offered_protocol)

    async def _set_protocol_features(self, message: Message) -> None:
        wanted = unpack_u64(message)
        if wanted & ~self._offered_protocol:
            raise ProtocolError(f"protocol features {wanted & ~self._offered_protocol:#x} were not offered")
        in_band = bool(wanted & ProtocolFeature.INBAND_NOTIFICATIONS)
        if in_band and wanted & IN_BAND_NEEDS != IN_BAND_NEEDS:
            # The specification wants the connection closed, whether an acknowledgement was asked for or not.
            self._protocol = ProtocolFeature(0)
            raise ProtocolError("INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK")
        self._protocol = ProtocolFeature(wanted)
        self._vrings.in_band = in_band

    async def _get_queue_num(self, message: Message) -> bytes:
        return pack_u64(self._device.num_queues)

    # The device as a whole.

    async def _set_owner(self, message: Message) -> None:
        """One session has one owner from the start."""

    async def _reset_owner(self, message: Message) -> None:
        # Deprecated and ambiguous; like other back-ends, stop the rings and keep the rest.
        await self._vrings.stop_all()

    async def _reset_device(self, message: Message) -> None:
        await self._reset_virtio()
        self._device.reset()

    async def _reset_virtio(self) -> None:
        await self._vrings.reset()
        self._vrings.features = 0
        self._status = 0
        await self._memory.set_logging(False)

    async def _set_status(self, message: Message) -> None:
        status = unpack_u64(message)
        if status > STATUS_MAX:
            raise ProtocolError(f"device status {status:#x} has more than 8 bits")
        if status == 0 and self._status:
            # QEMU pauses a VM like this as well, and does not tell a driver's write cache again: that stays.
            await self._reset_virtio()
        self._status = status

    async def _get_status(self, message: Message) -> bytes:
        return pack_u64(self._status)

    async def _set_device_state_fd(self, message: Message) -> bytes:
        return await self._states.begin(message, running=self._vrings.running)

    async def _check_device_state(self, message: Message) -> bytes:
        return await self._states.check()

    # Memory.

    async def _set_mem_table(self, message: Message) -> None:
        await self._memory.set_table(message)
        await self._vrings.start_complete()

    async def _add_mem_reg(self, message: Message) -> None:
        await self._memory.add_region(message)
        await self._vrings.start_complete()

    # Back-end channel.

    async def _set_backend_req_fd(self, message: Message) -> None:
        channel = self._connection.back_end_channel(message)
        former = self._channel
        # Who waits on the former one finds the new one when that is closed.
        self._channel = BackendChannel(channel, acks=ProtocolFeature.REPLY_ACK in self._protocol)
        if former:
            await former.close()
        self._memory.ask_again()

    def _tell_config_change(self) -> None:
        task = asyncio.create_task(self._send_config_change())
        self._notices.add(task)
        task.add_done_callback(self._notices.discard)

    async def _send_config_change(self) -> None:
        if self._channel is None or ProtocolFeature.CONFIG not in self._protocol:
            log.warning("the front-end cannot be told of the new configuration: it sees it when it looks")
            return
        with contextlib.suppress(Disconnected):  # its end is seen on the main channel
            try:
                code = await self._channel.request(BackendRequest.CONFIG_CHANGE_MSG)
            except (ProtocolError, TransportError) as error:
                log.warning("the front-end was not told of the new configuration: %s", error)
                return
            if code:
                log.warning("the front-end did not take the new configuration (code %d)", code)

    # Configuration space.

    async def _get_config(self, message: Message) -> bytes:
        wanted = ConfigAccess.unpack(message)
        if wanted.offset + wanted.size_bytes > _CONFIG_SPACE_MAX:
            log.warning("GET_CONFIG of %d bytes at %d goes beyond the space", wanted.size_bytes, wanted.offset)
            return b""  # "GET_CONFIG": an empty payload says that it failed
        space = self._device.config_space().ljust(_CONFIG_SPACE_MAX, b"\0")
        data = space[wanted.offset : wanted.offset + wanted.size_bytes]
        return dataclasses.replace(wanted, data=data).pack()

    async def _set_config(self, message: Message) -> None:
        wanted = ConfigAccess.unpack(message)
        if wanted.flags not in {0, CONFIG_FLAG_MIGRATION}:
            raise ProtocolError(f"flags {wanted.flags:#x}")
        migration = wanted.flags == CONFIG_FLAG_MIGRATION
        await self._device.set_config(wanted.offset, wanted.data, self._vrings.features, migration=migration)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


async def serve(connection: Connection, device: Device) -> None:
    """Serve one front-end until it leaves. Only a failure of the carrier or of the workers is raised.

    Raises: TransportError, WorkerError.
    """
    session = Session(connection, device)
    try:
        await session.run()
        log.info("the front-end left")
    except (ProtocolError, OSError) as error:
        log.warning("front-end dropped: %s", _reason(error))
    finally:
        await session.close()
