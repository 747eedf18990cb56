"""What the vfio-user server asks of the function that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vvupipe.vfio.dma_space import DmaSpace
from vvupipe.vfio.function import IoEvent, MappableArea
from vvupipe.vfio.irq_table import IrqTable


@dataclass(frozen=True, slots=True)
class Region:
    """A region as it is now. The fds of `areas` stay the function's; they may be mapped one by one."""

    size_bytes: int
    areas: Sequence[MappableArea] = field(default=())


class ServedFunction(Protocol):
    """A PCI function made in software. Nothing here blocks."""

    name: str
    dma: DmaSpace
    #: interrupts by kind (function.IRQ_*); a kind that is missing has none
    irqs: dict[int, IrqTable]

    def region(self, index: int) -> Region:
        """A region; size 0 when it does not exist."""

    def read(self, region: int, offset: int, count: int) -> bytes:
        """`count` bytes inside the region. Raises: OSError."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Bytes inside the region. Raises: OSError."""

    def io_events(self, region: int) -> list[IoEvent]:
        """The eventfds that stand for writes to a region; the fds stay the function's."""

    def before_unmap(self, iova: int, size_bytes: int) -> None:
        """A DMA mapping is about to go: let go of its bytes."""

    def reset(self) -> None:
        """DEVICE_RESET."""

    def client_left(self) -> None:
        """The client is gone; its DMA mappings and eventfds go right after."""
