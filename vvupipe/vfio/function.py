"""What a user-space driver needs of a PCI function: registers, mappable areas, interrupts, DMA.

`user_client.VfioUserFunction` implements it over a vfio-user socket, `linux_function.LinuxVfioFunction` on Linux's
/dev/vfio, `vvupipe.ivshmem.driver_function.IvshmemFunction` through the shared memory of an ivshmem device.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

# linux/vfio.h: VFIO_PCI_*_REGION_INDEX
REGION_BAR0 = 0
REGION_BAR2 = 2
REGION_BAR4 = 4
REGION_ROM = 6
REGION_CONFIG = 7
REGION_VGA = 8
NUM_REGIONS = 9

# linux/vfio.h: VFIO_PCI_*_IRQ_INDEX
IRQ_INTX = 0
IRQ_MSI = 1
IRQ_MSIX = 2
NUM_IRQS = 5


@dataclass(slots=True)
class MappableArea:
    """`size_bytes` of a region from `offset` on, which are the bytes of `fd` from `fd_offset` on.

    Whoever is handed one owns `fd`.
    """

    offset: int
    size_bytes: int
    fd: int
    fd_offset: int

    def close(self) -> None:
        """Close the fd; mappings stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class IoEvent:
    """A write to `offset` of a region does nothing but signal the eventfd `fd`, so write to that instead.

    Whoever is handed one owns `fd`.
    """

    offset: int
    size_bytes: int
    fd: int

    def close(self) -> None:
        """Close the eventfd."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class VfioFunction(ABC):
    """A PCI function that this process drives. Every method raises TransportError when the function is gone."""

    #: for people: which function this is
    name: str
    #: becomes readable (end of file) when the function is gone; -1 when nothing tells
    hangup_fd: int = -1

    @abstractmethod
    def region_size(self, region: int) -> int:
        """Size in bytes; 0 when the region does not exist."""

    @abstractmethod
    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read registers or memory of a region. Raises: TransportError when the function refuses."""

    @abstractmethod
    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write registers or memory of a region. Raises: TransportError when the function refuses."""

    @abstractmethod
    def mappable_areas(self, region: int) -> list[MappableArea]:
        """The areas of a region that can be mapped, as they are now."""

    @abstractmethod
    def io_event(self, region: int, offset: int, data: bytes) -> int | None:
        """An eventfd that is as good as writing `data` (1, 2, 4 or 8 bytes) at `offset`; owned by the caller.

        None when such a write would do nothing now. Raises: TransportError when no eventfd can stand for it.
        """

    @abstractmethod
    def irq_count(self, index: int) -> int:
        """How many interrupts of a kind (IRQ_*) the function has."""

    @abstractmethod
    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Have interrupts `start`, `start + 1`, ... signal these eventfds, which stay the caller's."""

    @abstractmethod
    def disable_irqs(self, index: int) -> None:
        """Untie all interrupts of a kind."""

    @abstractmethod
    def dma_map(self, iova: int, size_bytes: int, fd: int, fd_offset: int) -> None:
        """Let the function read and write these bytes of `fd` at `iova`."""

    @abstractmethod
    def dma_unmap(self, iova: int, size_bytes: int) -> None:
        """Take back a mapping, exactly as it was made."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the function."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the function; harmless when called again."""
