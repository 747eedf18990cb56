"""The back-end side of vhost-user: one session answers one front-end's requests.

Specification: QEMU docs/interop/vhost-user.rst. The session knows a transport.Connection and a device.Device; what
carries the one and what the other stores are not its business.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable

from kernels.virtio_layout import F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1
from vvupipe.errors import ProtocolError, WorkerError
from vvupipe.memory.doorbell import Doorbell
from vvupipe.vhost_user.device import Device
from vvupipe.vhost_user.messages import (
    ANSWERED,
    F_PROTOCOL_FEATURES,
    VRING_INDEX_MASK,
    ConfigAccess,
    Message,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
    pack_u64,
    unpack_u64,
)
from vvupipe.vhost_user.transport import Connection
from vvupipe.vhost_user.vring import Vring
from vvupipe.workers.vring_setup import VringSetup

log = logging.getLogger(__name__)

_PROTOCOL_FEATURES = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
_CONFIG_SPACE_MAX = 256  # "Virtio device config space": VHOST_USER_MAX_CONFIG_SIZE of the protocol
_DONE = 0
_FAILED = 1


class Session:
    """One front-end's stay. `run` returns when it leaves; `close` then stops its vrings and forgets its memory."""

    def __init__(self, connection: Connection, device: Device) -> None:
        self._connection = connection
        self._device = device
        self._offered_protocol = _PROTOCOL_FEATURES & connection.protocol_features
        self._protocol = ProtocolFeature(0)
        self._features = 0
        self._vrings = [Vring(index) for index in range(device.num_queues)]
        self._has_memory = False
        self._handlers: dict[int, Callable[[Message], Awaitable[bytes | None]]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
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
        try:
            for vring in self._vrings:
                await self._stop(vring)
                vring.close()
            await self._device.pool.set_memory([])
        finally:
            self._connection.close()

    async def _answer(self, message: Message) -> None:
        handler = self._handlers.get(message.request)
        wants_ack = (
            message.need_reply and ProtocolFeature.REPLY_ACK in self._protocol and message.request not in ANSWERED
        )
        if handler is None:
            # "REPLY_ACK": whoever asks is told that it failed; whoever does not ask expects nothing.
            log.warning("%s is not implemented%s", message.name, "" if wants_ack else ", ignored")
            reply = None
            code = _FAILED
        else:
            try:
                reply = await handler(message)
                code = _DONE
            except (ProtocolError, WorkerError) as error:
                if not wants_ack:
                    raise ProtocolError(f"{message.name}: {error}") from error
                log.warning("%s refused: %s", message.name, error)
                reply = None
                code = _FAILED
        if reply is None and wants_ack:
            reply = pack_u64(code)
        if reply is not None:
            await self._connection.send(message.reply(reply))

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"vring {index} does not exist, there are {len(self._vrings)}")
        return self._vrings[index]

    async def _get_features(self, message: Message) -> bytes:
        return pack_u64(self._device.features | F_PROTOCOL_FEATURES)

    async def _set_features(self, message: Message) -> None:
        features = unpack_u64(message)
        unknown = features & ~(self._device.features | F_PROTOCOL_FEATURES)
        if unknown:
            raise ProtocolError(f"features {unknown:#x} were not offered")
        if not features & F_VERSION_1:
            log.info("the front-end did not take VIRTIO_F_VERSION_1")
        self._features = features
        # "Ring states": without protocol features a ring starts enabled.
        if not features & F_PROTOCOL_FEATURES:
            for vring in self._vrings:
                vring.enabled = True

    async def _get_protocol_features(self, message: Message) -> bytes:
        return pack_u64(self._offered_protocol)

    async def _set_protocol_features(self, message: Message) -> None:
        wanted = unpack_u64(message)
        if wanted & ~self._offered_protocol:
            raise ProtocolError(f"protocol features {wanted & ~self._offered_protocol:#x} were not offered")
        self._protocol = ProtocolFeature(wanted)

    async def _set_owner(self, message: Message) -> None:
        """One session has one owner from the start."""

    async def _reset_owner(self, message: Message) -> None:
        # Deprecated and ambiguous; like other back-ends, stop the rings and keep the rest.
        for vring in self._vrings:
            await self._stop(vring)

    async def _get_queue_num(self, message: Message) -> bytes:
        return pack_u64(len(self._vrings))

    async def _set_mem_table(self, message: Message) -> None:
        regions = await self._connection.memory_regions(message)
        log.info("memory table: %d regions, %d MiB", len(regions), sum(r.size_bytes for r in regions) >> 20)
        await self._device.pool.set_memory(regions)
        self._has_memory = True
        for vring in self._vrings:
            await self._start_if_complete(vring)

    async def _set_vring_num(self, message: Message) -> None:
        state = VringState.unpack(message)
        size = state.num
        if not 0 < size <= self._device.queue_size_max or size & (size - 1):
            raise ProtocolError(
                f"vring size {size}: a power of two up to {self._device.queue_size_max} is possible (--queue-size)"
            )
        vring = self._stopped_vring(state.index)
        vring.size = size

    async def _set_vring_addr(self, message: Message) -> None:
        address = VringAddress.unpack(message)
        vring = self._vring(address.index)
        parts = (address.descriptor_uva, address.available_uva, address.used_uva)
        if vring.running and parts != vring.addresses:
            raise ProtocolError(f"vring {vring.index} cannot move while it runs")
        vring.addresses = parts
        await self._start_if_complete(vring)

    async def _set_vring_base(self, message: Message) -> None:
        state = VringState.unpack(message)
        self._stopped_vring(state.index).last_avail_idx = state.num & 0xFFFF

    def _stopped_vring(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise ProtocolError(f"vring {index} is running; stop it first")
        return vring

    async def _get_vring_base(self, message: Message) -> bytes:
        vring = self._vring(VringState.unpack(message).index)
        await self._stop(vring)
        vring.drop_kick()
        return VringState(vring.index, vring.last_avail_idx).pack()

    async def _set_vring_kick(self, message: Message) -> None:
        vring = self._vring(unpack_u64(message) & VRING_INDEX_MASK)
        await self._stop(vring)
        vring.set_kick(self._connection.kick(message))
        await self._start_if_complete(vring)

    async def _set_vring_call(self, message: Message) -> None:
        await self._set_doorbell(message, "call", self._connection.call)

    async def _set_vring_err(self, message: Message) -> None:
        await self._set_doorbell(message, "err", self._connection.err)

    async def _set_doorbell(self, message: Message, which: str, obtain: Callable[[Message], Doorbell | None]) -> None:
        vring = self._vring(unpack_u64(message) & VRING_INDEX_MASK)
        doorbell = obtain(message)
        vring.set_doorbell(which, doorbell)
        if vring.running:
            copy = Doorbell(os.dup(doorbell.fd)) if doorbell else None
            await self._device.pool.replace_doorbell(vring.index, which, copy)

    async def _set_vring_enable(self, message: Message) -> None:
        state = VringState.unpack(message)
        vring = self._vring(state.index)
        vring.enabled = bool(state.num)
        if vring.enabled:
            await self._start_if_complete(vring)
        else:
            await self._stop(vring)

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
        raise ProtocolError(f"the {wanted.size_bytes} configuration bytes at {wanted.offset} are read-only")

    async def _start_if_complete(self, vring: Vring) -> None:
        if vring.running or not vring.complete or not self._has_memory:
            return
        assert vring.addresses is not None
        desc_uva, avail_uva, used_uva = vring.addresses
        setup = VringSetup(
            vring.index,
            vring.size,
            desc_uva,
            avail_uva,
            used_uva,
            event_idx=bool(self._features & F_RING_EVENT_IDX),
            indirect=bool(self._features & F_RING_INDIRECT_DESC),
            write_through=self._device.write_through(self._features),
            kick_fd=os.dup(vring.kick_fd) if vring.kick_fd >= 0 else -1,
            call=Doorbell(os.dup(vring.call.fd)) if vring.call else None,
            err=Doorbell(os.dup(vring.err.fd)) if vring.err else None,
        )
        try:
            started_at = await self._device.pool.start_vring(setup)
        except WorkerError:
            if vring.err:
                vring.err.ring()
            raise
        if started_at != vring.last_avail_idx:
            log.warning(
                "vring %d: base %d, but the used ring says %d; what was left undone is done again",
                vring.index,
                vring.last_avail_idx,
                started_at,
            )
        vring.running = True
        log.info("vring %d started at %d, %d entries", vring.index, started_at, vring.size)

    async def _stop(self, vring: Vring) -> None:
        if vring.running:
            vring.last_avail_idx = await self._device.pool.stop_vring(vring.index)
            vring.running = False
            log.info("vring %d stopped at %d", vring.index, vring.last_avail_idx)


async def serve(connection: Connection, device: Device) -> None:
    """Serve one front-end until it leaves. Only a failure of the carrier or of the workers is raised.

    Raises: TransportError, WorkerError.
    """
    session = Session(connection, device)
    try:
        await session.run()
        log.info("the front-end left")
    except ProtocolError as error:
        log.warning("front-end dropped: %s", error)
    finally:
        await session.close()
