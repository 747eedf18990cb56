"""The client's side of vfio-user: a VfioFunction at the other end of a UNIX socket. Blocking, with a time limit."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from vvupipe.errors import ProtocolError, TransportError, UserError
from vvupipe.fd_socket import close_all, dup_all
from vvupipe.unix_path import reachable
from vvupipe.vfio import user_messages as wire
from vvupipe.vfio.function import NUM_IRQS, NUM_REGIONS, IoEvent, MappableArea, VfioFunction
from vvupipe.vfio.region_info import unpack_areas
from vvupipe.vfio.user_messages import Command, Header

_ANSWER_S = 10.0  # a server answers in microseconds; only one that hangs takes this long
_ROOM_BYTES = 16384  # first guess of a reply's size


class VfioUserFunction(VfioFunction):
    """A function served by vfio-user. `name` is for people, as in "0000:00:10.0 of vm0"."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Takes over a connected socket; `negotiate` comes next."""
        sock.settimeout(_ANSWER_S)
        self.name = name
        self._sock: socket.socket | None = sock
        self.hangup_fd = sock.fileno()
        self._message_id = 0
        self._extensions: frozenset[str] = frozenset()
        self._server_fds = 1
        self._server_transfer = wire.DATA_TRANSFER_MAX

    @classmethod
    def connect(cls, path: Path, name: str) -> VfioUserFunction:
        """Connect and negotiate. Raises: UserError when nobody serves there or another process has the function."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            with reachable(path) as short:
                sock.connect(short)
        except OSError as error:
            sock.close()
            raise UserError(f"function {name} does not answer at {path}: {error.strerror}") from error
        function = cls(sock, name)
        try:
            function.negotiate()
        except BaseException:
            function.close()
            raise
        return function

    def negotiate(self) -> None:
        """Agree on the version. Raises: UserError when the function is in use, TransportError."""
        ours = {wire.EXTENSION_AREA_FDS: True, wire.EXTENSION_DOORBELL_FDS: True}
        capabilities = {
            "max_msg_fds": wire.MESSAGE_FDS_MAX,
            "max_data_xfer_size": wire.DATA_TRANSFER_MAX,
            wire.EXTENSION: ours,
        }
        header, payload, fds = self._exchange(Command.VERSION, wire.pack_version(capabilities))
        close_all(fds)
        if header.flags & wire.FLAG_ERROR:
            if header.errno == errno.EBUSY:
                named = len(payload) == wire.BUSY_REPLY.size
                holder = f"process {wire.BUSY_REPLY.unpack(payload)[0]}" if named else "another process"
                raise UserError(f"function {self.name} is in use by {holder}: stop that first, or choose another")
            raise TransportError(f"function {self.name} refused our protocol version: {os.strerror(header.errno)}")
        try:
            major, _, theirs = wire.unpack_version(payload)
            self._server_fds = wire.capability_number(theirs, "max_msg_fds", 1)
            self._server_transfer = wire.capability_number(theirs, "max_data_xfer_size", wire.DATA_TRANSFER_MAX)
        except ProtocolError as error:
            raise TransportError(f"function {self.name}: {error}") from error
        if not self._server_transfer:
            raise TransportError(f"function {self.name} takes no data (max_data_xfer_size is 0)")
        if major != wire.VERSION_MAJOR:
            raise TransportError(f"function {self.name} speaks version {major} of vfio-user, not {wire.VERSION_MAJOR}")
        self._extensions = wire.our_extensions(theirs)

    def region_size(self, region: int) -> int:
        """See VfioFunction."""
        payload, fds = self._region_info(region)
        close_all(fds)
        return int(wire.REGION_INFO.unpack_from(payload)[4])

    def _region_info(self, region: int) -> tuple[bytes, list[int]]:
        def request(room: int) -> bytes:
            return wire.REGION_INFO.pack(room, 0, region, 0, 0, 0)

        return self._ask_sized(Command.DEVICE_GET_REGION_INFO, request, wire.REGION_INFO.size)

    def _ask_sized(self, command: Command, request: object, least: int) -> tuple[bytes, list[int]]:
        """Ask with a guess of the reply's size, and again with the size that the server names."""
        assert callable(request)
        room = _ROOM_BYTES
        while True:
            payload, fds = self._ask(command, request(room), least=least)
            needed = int.from_bytes(payload[:4], "little")
            if needed <= room:
                return payload, fds
            close_all(fds)
            if needed > wire.MESSAGE_MAX:
                raise TransportError(f"function {self.name} needs {needed} bytes for an answer")
            room = needed

    def read(self, region: int, offset: int, count: int) -> bytes:
        """See VfioFunction."""
        parts = []
        while count:
            size = min(count, self._server_transfer)
            payload, fds = self._ask(
                Command.REGION_READ,
                wire.REGION_ACCESS.pack(offset, region, size),
                least=wire.REGION_ACCESS.size + size,
            )
            close_all(fds)
            parts.append(payload[wire.REGION_ACCESS.size : wire.REGION_ACCESS.size + size])
            offset += size
            count -= size
        return b"".join(parts)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """See VfioFunction."""
        for start in range(0, len(data), self._server_transfer):
            piece = data[start : start + self._server_transfer]
            head = wire.REGION_ACCESS.pack(offset + start, region, len(piece))
            self._tell(Command.REGION_WRITE, head + piece)

    def mappable_areas(self, region: int) -> list[MappableArea]:
        """See VfioFunction. Without the server knowing our extension there are none."""
        payload, fds = self._region_info(region)
        try:
            entries = unpack_areas(payload)
            if any(index >= len(fds) for _, _, index, _ in entries):
                raise ProtocolError("a mappable area without its file descriptor")
            own = dup_all([fds[index] for _, _, index, _ in entries])
            return [
                MappableArea(offset, size, fd, fd_offset)
                for fd, (offset, size, _, fd_offset) in zip(own, entries, strict=True)
            ]
        except ProtocolError as error:
            raise TransportError(f"function {self.name}, region {region}: {error}") from error
        finally:
            close_all(fds)

    def io_event(self, region: int, offset: int, data: bytes) -> int | None:
        """See VfioFunction: the server has one eventfd for writes of any data."""
        found = None
        for event in self._io_events(region):
            if event.offset == offset and event.size_bytes in {0, len(data)} and found is None:
                found = event.fd
            else:
                event.close()
        return found

    def _io_events(self, region: int) -> list[IoEvent]:
        def request(room: int) -> bytes:
            return wire.REGION_IO_FDS.pack(room, 0, region, 0)

        payload, fds = self._ask_sized(Command.DEVICE_GET_REGION_IO_FDS, request, wire.REGION_IO_FDS.size)
        try:
            _, _, _, count = wire.REGION_IO_FDS.unpack_from(payload)
            body = payload[wire.REGION_IO_FDS.size :]
            if len(body) < count * wire.IO_FD.size:
                raise TransportError(f"function {self.name}, region {region}: {count} I/O eventfds are cut off")
            entries = [wire.IO_FD.unpack_from(body, k * wire.IO_FD.size) for k in range(count)]
            if any(entry[2] >= len(fds) for entry in entries):
                raise TransportError(f"function {self.name}, region {region}: an I/O eventfd is missing")
            events = [entry for entry in entries if entry[3] == wire.IO_FD_IOEVENTFD]
            own = dup_all([fds[index] for _, _, index, *_ in events])
            return [IoEvent(offset, size, fd) for fd, (offset, size, *_) in zip(own, events, strict=True)]
        finally:
            close_all(fds)

    def irq_count(self, index: int) -> int:
        """See VfioFunction."""
        payload, fds = self._ask(
            Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(wire.IRQ_INFO.size, 0, index, 0), least=wire.IRQ_INFO.size
        )
        close_all(fds)
        return int(wire.IRQ_INFO.unpack_from(payload)[3])

    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        """See VfioFunction."""
        flags = wire.IRQ_DATA_EVENTFD | wire.IRQ_ACTION_TRIGGER
        step = max(1, min(self._server_fds, wire.MESSAGE_FDS_MAX))
        for done in range(0, len(fds), step):
            some = fds[done : done + step]
            self._tell(
                Command.DEVICE_SET_IRQS,
                wire.IRQ_SET.pack(wire.IRQ_SET.size, flags, index, start + done, len(some)),
                some,
            )

    def disable_irqs(self, index: int) -> None:
        """See VfioFunction."""
        flags = wire.IRQ_DATA_NONE | wire.IRQ_ACTION_TRIGGER
        self._tell(Command.DEVICE_SET_IRQS, wire.IRQ_SET.pack(wire.IRQ_SET.size, flags, index, 0, 0))

    def dma_map(self, iova: int, size_bytes: int, fd: int, fd_offset: int) -> None:
        """See VfioFunction."""
        flags = wire.DMA_READABLE | wire.DMA_WRITABLE
        self._tell(Command.DMA_MAP, wire.DMA_MAP.pack(wire.DMA_MAP.size, flags, fd_offset, iova, size_bytes), [fd])

    def dma_unmap(self, iova: int, size_bytes: int) -> None:
        """See VfioFunction."""
        self._tell(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, iova, size_bytes))

    def reset(self) -> None:
        """See VfioFunction."""
        self._tell(Command.DEVICE_RESET, b"")

    def device_info(self) -> tuple[int, int, int]:
        """(flags, number of regions, number of interrupt kinds) as the server gives them."""
        request = wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0)
        payload, fds = self._ask(Command.DEVICE_GET_INFO, request, least=wire.DEVICE_INFO.size)
        close_all(fds)
        _, flags, regions, irqs = wire.DEVICE_INFO.unpack_from(payload)
        return flags, regions, irqs

    def check(self) -> None:
        """Raises: UserError when this is no PCI function."""
        flags, regions, irqs = self.device_info()
        if not flags & wire.DEVICE_FLAGS_PCI or regions < NUM_REGIONS or irqs < NUM_IRQS:
            raise UserError(f"function {self.name} is no PCI function")

    def close(self) -> None:
        """See VfioFunction."""
        if self._sock:
            self._sock.close()
            self._sock = None
            self.hangup_fd = -1

    def _tell(self, command: Command, payload: bytes, fds: Sequence[int] = ()) -> None:
        close_all(self._ask(command, payload, fds)[1])

    def _ask(
        self, command: Command, payload: bytes, fds: Sequence[int] = (), *, least: int = 0
    ) -> tuple[bytes, list[int]]:
        """Send a command and take its reply of `least` bytes or more. Raises: TransportError."""
        header, answer, answer_fds = self._exchange(command, payload, fds)
        if header.flags & wire.FLAG_ERROR:
            close_all(answer_fds)
            raise TransportError(f"function {self.name} refused {command.name}: {os.strerror(header.errno)}")
        if len(answer) < least:
            close_all(answer_fds)
            raise TransportError(f"function {self.name} answered {command.name} with {len(answer)} bytes")
        return answer, answer_fds

    def _exchange(self, command: Command, payload: bytes, fds: Sequence[int] = ()) -> tuple[Header, bytes, list[int]]:
        if self._sock is None:
            raise TransportError(f"function {self.name} was let go")
        self._message_id = (self._message_id + 1) & 0xFFFF
        try:
            self._send(wire.pack_command(self._message_id, command, payload), fds)
            return self._receive(command)
        except TimeoutError as error:
            raise TransportError(f"function {self.name} has not answered for {_ANSWER_S:.0f} s") from error
        except ConnectionError as error:
            # End of file, a reset or a broken pipe: which of them is only a matter of when it was killed.
            raise TransportError(f"function {self.name} is gone: its VM ended") from error
        except ProtocolError as error:
            raise TransportError(f"function {self.name} is gone: {error}") from error

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        assert self._sock is not None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._sock.sendmsg([data], ancillary)
        if sent < len(data):
            self._sock.sendall(data[sent:])

    def _receive(self, command: Command) -> tuple[Header, bytes, list[int]]:
        fds: list[int] = []
        try:
            header = Header.unpack(self._exactly(wire.HEADER.size, fds))
            payload = self._exactly(header.size_bytes - wire.HEADER.size, fds)
            if not header.is_reply or (header.message_id, header.command) != (self._message_id, command):
                raise ProtocolError(f"message {header.message_id} instead of the reply to {command.name}")
        except BaseException:
            close_all(fds)
            raise
        return header, payload, fds

    def _exactly(self, count: int, fds: list[int]) -> bytes:
        assert self._sock is not None
        data = b""
        room = socket.CMSG_SPACE(wire.MESSAGE_FDS_MAX * 4)
        while len(data) < count:
            chunk, ancillary, flags, _ = self._sock.recvmsg(count - len(data), room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, body in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(array.array("i", body[: len(body) // 4 * 4]))
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("file descriptors were lost on the way: this process has too many open")
            if not chunk:
                raise ConnectionResetError("end of file")
            data += chunk
        return data
