"""A folder shaped like /sys/bus/pci, so that the stock `lspci -O sysfs.path=...` shows our functions."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from vvupipe.pci.address import PciAddress
from vvupipe.pci.config_space import (
    BAR_PREFETCHABLE,
    CLASS_CODE,
    DEVICE_ID,
    REVISION_ID,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
    ConfigSpace,
)

log = logging.getLogger(__name__)

# Linux include/linux/ioport.h, as the `resource` file shows them
_IORESOURCE_MEM = 0x200
_IORESOURCE_PREFETCH = 0x2000
_IORESOURCE_SIZEALIGN = 0x40000
_IORESOURCE_MEM_64 = 0x100000
_RESOURCES = 7  # six BARs and the ROM


class SysfsTree:
    """Owns `root`, which it creates; `path` is what lspci takes as sysfs.path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path = root / "bus" / "pci"
        (self.path / "devices").mkdir(parents=True, exist_ok=True)

    def show(self, address: PciAddress, config: ConfigSpace) -> None:
        """Add a function, or bring its files up to date. Each file is replaced in one step."""
        folder = self.path / "devices" / str(address)
        folder.mkdir(exist_ok=True)
        texts = {
            "vendor": f"{config.get(VENDOR_ID, 2):#06x}\n",
            "device": f"{config.get(DEVICE_ID, 2):#06x}\n",
            "subsystem_vendor": f"{config.get(SUBSYSTEM_VENDOR_ID, 2):#06x}\n",
            "subsystem_device": f"{config.get(SUBSYSTEM_ID, 2):#06x}\n",
            "class": f"{config.get(CLASS_CODE, 3):#08x}\n",
            "revision": f"{config.get(REVISION_ID, 1):#04x}\n",
            "irq": "0\n",
            "resource": _resources(config),
        }
        for name, text in texts.items():
            _replace(folder / name, text.encode())
        _replace(folder / "config", config.read(0, 256))

    def update(self, address: PciAddress, config: ConfigSpace) -> None:
        """As `show`, but a disk that is full does not hold up whoever changed `config`: the files are late then."""
        try:
            self.show(address, config)
        except OSError as error:
            log.warning("%s: lspci does not see what changed: %s", address, error.strerror)

    def close(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self._root, ignore_errors=True)


def _resources(config: ConfigSpace) -> str:
    lines = ["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * _RESOURCES
    for bar in config.bars:
        start = config.bar_address(bar.index)
        flags = _IORESOURCE_MEM | _IORESOURCE_SIZEALIGN | (_IORESOURCE_MEM_64 if bar.is_64bit else 0)
        flags |= _IORESOURCE_PREFETCH | BAR_PREFETCHABLE if bar.prefetchable else 0
        lines[bar.index] = f"{start:#018x} {start + bar.size_bytes - 1:#018x} {flags:#018x}"
    return "\n".join(lines) + "\n"


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    os.replace(temporary, path)
