"""A PCI function of this machine, driven through Linux's VFIO."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vvupipe.errors import TransportError, UserError
from vvupipe.memory.mapping import Mapping
from vvupipe.pci.address import PciAddress
from vvupipe.vfio import linux_ioctl as vfio
from vvupipe.vfio.function import MappableArea, VfioFunction
from vvupipe.vfio.linux_container import DmaDomain, GroupDomain
from vvupipe.vfio.linux_iommufd import IommufdDomain, device_node

log = logging.getLogger(__name__)

_SYSFS = Path("/sys/bus/pci/devices")


@dataclass(slots=True)
class _RegionInfo:
    size_bytes: int
    offset: int  # in the device fd
    areas: list[tuple[int, int]] = field(default_factory=list)  # (offset in the region, size) that can be mapped


class LinuxVfioFunction(VfioFunction):
    """Implements VfioFunction. The function must be bound to vfio-pci."""

    def __init__(self, name: str, domain: DmaDomain) -> None:
        """Takes over `domain`. Raises: UserError when this is no PCI function."""
        self.name = name
        self._domain: DmaDomain | None = domain
        self._fd = domain.device_fd
        self._regions: dict[int, _RegionInfo] = {}
        self._events: dict[tuple[int, int, bytes], int] = {}
        self._maps: dict[tuple[int, int], Mapping] = {}
        info = vfio.ask(self._fd, vfio.DEVICE_GET_INFO, vfio.DEVICE_INFO.pack(vfio.DEVICE_INFO.size, 0, 0, 0, 0, 0))
        self._flags = vfio.DEVICE_INFO.unpack(info)[1]
        if not self._flags & vfio.DEVICE_FLAGS_PCI:
            self.close()
            raise UserError(f"function {name} is no PCI function")
        self.hangup_fd = self._watch_removal()

    @classmethod
    def open(cls, address: PciAddress) -> LinuxVfioFunction:
        """The function at `address`, by iommufd where the kernel has it, else by its group.

        Raises: UserError when it cannot be had, with what to do.
        """
        node = device_node(address)
        if node is not None:
            return cls(str(address), IommufdDomain(address, node))
        link = _SYSFS / str(address) / "iommu_group"
        if not link.exists():
            raise UserError(
                f"function {address} has no IOMMU group: give this machine an IOMMU (kernel parameter intel_iommu=on)"
            )
        return cls(str(address), GroupDomain(address, int(link.resolve().name)))

    def _watch_removal(self) -> int:
        """An eventfd that is signalled when the host wants the device back; -1 when it cannot tell."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._set_irqs(vfio.IRQ_INDEX_REQUEST, 0, [fd])
        except TransportError:
            os.close(fd)
            return -1
        return fd

    def _ask(self, request: int, data: bytes) -> bytes:
        if self._fd < 0:
            raise TransportError(f"function {self.name} was let go")
        try:
            return vfio.ask(self._fd, request, data)
        except OSError as error:
            raise TransportError(f"function {self.name}: VFIO request {request:#x}: {error.strerror}") from error

    def _region(self, region: int) -> _RegionInfo:
        known = self._regions.get(region)
        if known is None:
            known = self._regions[region] = self._ask_region(region)
        return known

    def _ask_region(self, region: int) -> _RegionInfo:
        head = vfio.REGION_INFO.pack(vfio.REGION_INFO.size, 0, region, 0, 0, 0)
        data = self._ask(vfio.DEVICE_GET_REGION_INFO, head)
        needed = vfio.REGION_INFO.unpack_from(data)[0]
        if needed > len(data):
            head = vfio.REGION_INFO.pack(needed, 0, region, 0, 0, 0)
            data = self._ask(vfio.DEVICE_GET_REGION_INFO, head.ljust(needed, b"\0"))
        _, flags, _, cap_offset, size, offset = vfio.REGION_INFO.unpack_from(data)
        info = _RegionInfo(size, offset)
        if flags & vfio.REGION_FLAG_MMAP and size:
            sparse = _sparse_areas(data, cap_offset) if flags & vfio.REGION_FLAG_CAPS else None
            info.areas = [(0, size)] if sparse is None else sparse
        return info

    def region_size(self, region: int) -> int:
        """See VfioFunction."""
        return self._region(region).size_bytes

    def _place(self, region: int, offset: int, count: int) -> int:
        info = self._region(region)
        if self._fd < 0 or offset + count > info.size_bytes:
            raise TransportError(f"function {self.name}: {count} bytes at {offset:#x} are not in region {region}")
        return info.offset + offset

    def read(self, region: int, offset: int, count: int) -> bytes:
        """See VfioFunction."""
        place = self._place(region, offset, count)
        try:
            data = os.pread(self._fd, count, place)
        except OSError as error:
            raise TransportError(f"function {self.name}: reading region {region}: {error.strerror}") from error
        if len(data) != count:
            raise TransportError(f"function {self.name} gave {len(data)} of {count} bytes of region {region}")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """See VfioFunction."""
        place = self._place(region, offset, len(data))
        try:
            done = os.pwrite(self._fd, data, place)
        except OSError as error:
            raise TransportError(f"function {self.name}: writing region {region}: {error.strerror}") from error
        if done != len(data):
            raise TransportError(f"function {self.name} took {done} of {len(data)} bytes of region {region}")

    def mappable_areas(self, region: int) -> list[MappableArea]:
        """See VfioFunction."""
        info = self._region(region)
        return [MappableArea(start, size, os.dup(self._fd), info.offset + start) for start, size in info.areas]

    def io_event(self, region: int, offset: int, data: bytes) -> int | None:
        """See VfioFunction: the kernel does the write as soon as the eventfd is signalled."""
        key = (region, offset, data)
        if key not in self._events:
            place = self._place(region, offset, len(data))
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            layout = vfio.IOEVENTFD
            try:
                value = int.from_bytes(data, "little")
                self._ask(vfio.DEVICE_IOEVENTFD, layout.pack(layout.size, len(data), place, value, fd, 0))
            except BaseException:
                os.close(fd)
                raise
            self._events[key] = fd
        return os.dup(self._events[key])

    def irq_count(self, index: int) -> int:
        """See VfioFunction."""
        info = self._ask(vfio.DEVICE_GET_IRQ_INFO, vfio.IRQ_INFO.pack(vfio.IRQ_INFO.size, 0, index, 0))
        return int(vfio.IRQ_INFO.unpack(info)[3])

    def _set_irqs(self, index: int, start: int, fds: Sequence[int]) -> None:
        flags = vfio.IRQ_DATA_EVENTFD | vfio.IRQ_ACTION_TRIGGER
        eventfds = struct.pack(f"={len(fds)}i", *fds)
        head = vfio.IRQ_SET.pack(vfio.IRQ_SET.size + len(eventfds), flags, index, start, len(fds))
        self._ask(vfio.DEVICE_SET_IRQS, head + eventfds)

    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        """See VfioFunction. Before Linux 6.5 the first call decides how many vectors there are, from 0 on."""
        self._set_irqs(index, start, fds)

    def disable_irqs(self, index: int) -> None:
        """See VfioFunction."""
        flags = vfio.IRQ_DATA_NONE | vfio.IRQ_ACTION_TRIGGER
        self._ask(vfio.DEVICE_SET_IRQS, vfio.IRQ_SET.pack(vfio.IRQ_SET.size, flags, index, 0, 0))

    def dma_map(self, iova: int, size_bytes: int, fd: int, fd_offset: int) -> None:
        """See VfioFunction: the kernel pins the memory."""
        if self._domain is None:
            raise TransportError(f"function {self.name} was let go")
        mapping = Mapping(fd, size_bytes, fd_offset)
        try:
            self._domain.map(iova, mapping.address, size_bytes)
        except OSError as error:
            mapping.close()
            raise TransportError(f"function {self.name}: memory cannot be mapped for DMA: {error.strerror}") from error
        except BaseException:
            mapping.close()
            raise
        self._maps[iova, size_bytes] = mapping

    def dma_unmap(self, iova: int, size_bytes: int) -> None:
        """See VfioFunction."""
        mapping = self._maps.pop((iova, size_bytes), None)
        if mapping is None or self._domain is None:
            raise TransportError(f"function {self.name}: no DMA mapping at {iova:#x}")
        try:
            self._domain.unmap(iova, size_bytes)
        except OSError as error:
            raise TransportError(f"function {self.name}: {error.strerror}") from error
        finally:
            mapping.close()

    def reset(self) -> None:
        """See VfioFunction. Raises: TransportError also when the function has no way to be reset."""
        if not self._flags & vfio.DEVICE_FLAGS_RESET:
            raise TransportError(f"function {self.name} cannot be reset")
        self._ask(vfio.DEVICE_RESET, b"")

    def close(self) -> None:
        """See VfioFunction: Linux resets the function, if it can, when the last fd of it is closed."""
        for fd in self._events.values():
            os.close(fd)
        self._events.clear()
        if getattr(self, "hangup_fd", -1) >= 0:
            os.close(self.hangup_fd)
            self.hangup_fd = -1
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._domain:
            self._domain.close()
            self._domain = None
        for mapping in self._maps.values():
            mapping.close()
        self._maps.clear()


def _sparse_areas(data: bytes, offset: int) -> list[tuple[int, int]] | None:
    """The areas of the sparse-mmap capability; None without one."""
    while offset and offset + vfio.CAP_HEADER.size <= len(data):
        kind, _, following = vfio.CAP_HEADER.unpack_from(data, offset)
        if kind == vfio.CAP_SPARSE_MMAP:
            start = offset + vfio.CAP_HEADER.size
            count, _ = vfio.SPARSE_HEAD.unpack_from(data, start)
            start += vfio.SPARSE_HEAD.size
            end = start + count * vfio.SPARSE_AREA.size
            return [(a, b) for a, b in vfio.SPARSE_AREA.iter_unpack(data[start:end])]
        offset = following
    return None
