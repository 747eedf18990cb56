"""Replies of vfio-user that carry regions: areas to map and eventfds to write to, with our extensions (docs/vvu.md)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vvupipe.errors import ProtocolError
from vvupipe.vfio import user_messages as wire
from vvupipe.vfio.function import IoEvent, MappableArea
from vvupipe.vfio.served_function import Region


def _distinct(fds: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(fds))


def pack_region(index: int, region: Region, argsz: int, fds_max: int) -> tuple[bytes, list[int]]:
    """(payload, fds) of GET_REGION_INFO's reply. fds_max 0: the client cannot take areas, so none are told."""
    flags = wire.REGION_READ_FLAG | wire.REGION_WRITE_FLAG if region.size_bytes else 0
    fds = _distinct([area.fd for area in region.areas])
    capabilities = b""
    if region.areas and len(fds) <= fds_max:
        flags |= wire.REGION_MMAP_FLAG | wire.REGION_CAPS_FLAG
        capabilities = _pack_areas(region.areas, fds)
    needed = wire.REGION_INFO.size + len(capabilities)
    cap_offset = wire.REGION_INFO.size if capabilities else 0
    if argsz < needed:
        # "Message sizes": the client learns how much it takes and asks again.
        return wire.REGION_INFO.pack(needed, flags, index, 0, region.size_bytes, 0), []
    head = wire.REGION_INFO.pack(needed, flags, index, cap_offset, region.size_bytes, 0)
    return head + capabilities, fds if capabilities else []


def _pack_areas(areas: Sequence[MappableArea], fds: list[int]) -> bytes:
    sparse = wire.SPARSE_HEAD.pack(len(areas), 0)
    sparse += b"".join(wire.SPARSE_AREA.pack(area.offset, area.size_bytes) for area in areas)
    following = wire.REGION_INFO.size + wire.CAP_HEADER.size + len(sparse)
    ours = wire.SPARSE_HEAD.pack(len(areas), 0)
    ours += b"".join(wire.AREA_FD.pack(fds.index(area.fd), 0, area.fd_offset) for area in areas)
    return (
        wire.CAP_HEADER.pack(wire.CAP_SPARSE_MMAP, 1, following)
        + sparse
        + wire.CAP_HEADER.pack(wire.CAP_AREA_FDS, 1, 0)
        + ours
    )


def unpack_areas(payload: bytes) -> list[tuple[int, int, int, int]]:
    """(offset in the region, size, fd index, offset in the fd) of each area of GET_REGION_INFO's reply.

    Raises: ProtocolError when the reply contradicts itself.
    """
    sparse: list[tuple[int, int]] = []
    backing: list[tuple[int, int]] = []
    _, flags, _, offset, size, _ = wire.REGION_INFO.unpack_from(payload)
    if not flags & wire.REGION_CAPS_FLAG:
        return []
    seen = set()
    while offset:
        if offset in seen or offset + wire.CAP_HEADER.size > len(payload):
            raise ProtocolError("region capabilities that lead nowhere")
        seen.add(offset)
        kind, _, following = wire.CAP_HEADER.unpack_from(payload, offset)
        start = offset + wire.CAP_HEADER.size
        if kind == wire.CAP_SPARSE_MMAP:
            sparse = [(a, b) for a, b in _entries(payload, start, wire.SPARSE_AREA)]
        elif kind == wire.CAP_AREA_FDS:
            backing = [(a, c) for a, _, c in _entries(payload, start, wire.AREA_FD)]
        offset = following
    if len(sparse) != len(backing):
        raise ProtocolError(f"{len(sparse)} mappable areas with {len(backing)} file descriptors")
    if any(start + length > size for start, length in sparse):
        raise ProtocolError("a mappable area beyond its region")
    return [(*area, *fd) for area, fd in zip(sparse, backing, strict=True)]


def _entries(payload: bytes, start: int, layout: struct.Struct) -> list[tuple[int, ...]]:
    if start + wire.SPARSE_HEAD.size > len(payload):
        raise ProtocolError("a region capability that is cut off")
    count, _ = wire.SPARSE_HEAD.unpack_from(payload, start)
    start += wire.SPARSE_HEAD.size
    end = start + count * layout.size
    if end > len(payload):
        raise ProtocolError("a region capability that is cut off")
    return list(layout.iter_unpack(payload[start:end]))


def pack_io_events(index: int, events: Sequence[IoEvent], argsz: int, fds_max: int) -> tuple[bytes, list[int]]:
    """(payload, fds) of GET_REGION_IO_FDS's reply; as many events as the client can take fds."""
    while len(fds := _distinct([event.fd for event in events])) > fds_max:
        events = events[:-1]
    needed = wire.REGION_IO_FDS.size + len(events) * wire.IO_FD.size
    head = wire.REGION_IO_FDS.pack(needed, 0, index, len(events))
    if argsz < needed:
        return head, []
    body = b"".join(
        wire.IO_FD.pack(event.offset, event.size_bytes, fds.index(event.fd), wire.IO_FD_IOEVENTFD, 0, 0, 0)
        for event in events
    )
    return head + body, fds
