"""PCI addresses as people and sysfs write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vvupipe.errors import UserError

_FORM = re.compile(r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)
_DEVICES_ON_A_BUS = 32


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """domain:bus:device.function; `str` gives the full form, "0000:00:10.0"."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """From "0000:00:10.0" or "00:10.0". Raises: UserError."""
        match = _FORM.fullmatch(text.strip())
        if not match or int(match[3], 16) >= _DEVICES_ON_A_BUS:
            raise UserError(f"'{text}' is not a PCI address: write it like 0000:00:10.0 (device 00-1f, function 0-7)")
        return cls(int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4]))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"

    @property
    def short(self) -> str:
        """Without the domain, as lspci prints it in domain 0."""
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"
