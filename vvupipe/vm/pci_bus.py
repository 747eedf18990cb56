"""The PCI bus of an embedded VM: who sits where, and where firmware would have put the BARs."""

from __future__ import annotations

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress
from vvupipe.pci.config_space import ConfigSpace

_FIRST_FREE_DEVICE = 1  # 00:00.0 is the host bridge's
_DEVICES = 32
_MMIO_32BIT = 0xE000_0000
_MMIO_32BIT_END = 0xFEC0_0000
_MMIO_64BIT = 1 << 40


class PciBus:
    """Bus 0 of domain 0."""

    def __init__(self) -> None:
        self._taken: set[PciAddress] = set()
        self._free_32bit = _MMIO_32BIT
        self._free_64bit = _MMIO_64BIT

    def take(self, text: str | None) -> PciAddress:
        """The address asked for, or the first free one. Raises: UserError when it is malformed, taken or elsewhere."""
        if text is None:
            for device in range(_FIRST_FREE_DEVICE, _DEVICES):
                address = PciAddress(0, 0, device, 0)
                if address not in self._taken:
                    break
            else:
                raise UserError(f"the PCI bus is full: {_DEVICES - _FIRST_FREE_DEVICE} functions is the most")
        else:
            address = PciAddress.parse(text)
        if (address.domain, address.bus) != (0, 0):
            raise UserError(f"{address}: the embedded VM has bus 00 of domain 0000 only, as in 0000:00:10.0")
        if address in self._taken:
            raise UserError(f"PCI address {address} is taken: give each --vvu-proxy another addr=")
        self._taken.add(address)
        return address

    def place_bars(self, config: ConfigSpace) -> None:
        """Give every BAR of a function an address of its own. Raises: UserError when there is no room."""
        for bar in config.bars:
            start = self._free_64bit if bar.is_64bit else self._free_32bit
            start = (start + bar.size_bytes - 1) // bar.size_bytes * bar.size_bytes
            end = start + bar.size_bytes
            if bar.is_64bit:
                self._free_64bit = end
            elif end > _MMIO_32BIT_END:
                raise UserError("no room for another PCI function")
            else:
                self._free_32bit = end
            config.place_bar(bar.index, start)
