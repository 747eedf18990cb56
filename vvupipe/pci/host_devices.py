"""The PCI functions of this machine (or VM), by sysfs (Linux Documentation/PCI/sysfs-pci.rst)."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress

log = logging.getLogger(__name__)

PCI = Path("/sys/bus/pci")
VFIO_DRIVER = "vfio-pci"
_NONE = "(null)"  # what driver_override reads as when nothing is written to it


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A function as sysfs shows it. `folder` is its folder there."""

    address: PciAddress
    vendor: int
    device: int
    class_code: int
    revision: int
    driver: str | None
    iommu_group: int | None
    folder: Path

    def group_members(self) -> list[PciAddress]:
        """The other functions of its IOMMU group."""
        folder = self.folder / "iommu_group" / "devices"
        members = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(PciAddress.parse(name) for name in members if name != str(self.address))


def find_device(address: PciAddress, pci: Path = PCI) -> HostDevice | None:
    """The function at `address`, or None."""
    folder = pci / "devices" / str(address)
    try:
        driver = folder / "driver"
        group = folder / "iommu_group"
        return HostDevice(
            address,
            int((folder / "vendor").read_text(), 16),
            int((folder / "device").read_text(), 16),
            int((folder / "class").read_text(), 16),
            int((folder / "revision").read_text(), 16),
            driver.resolve().name if driver.exists() else None,
            int(group.resolve().name) if group.exists() else None,
            folder,
        )
    except (OSError, ValueError):
        return None


def all_devices(pci: Path = PCI) -> list[HostDevice]:
    """Every function, by address."""
    folder = pci / "devices"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    addresses = sorted(PciAddress.parse(name) for name in names if re.fullmatch(r"[0-9a-f]{4}:.*", name))
    return [device for address in addresses if (device := find_device(address, pci)) is not None]


class Binding:
    """A function bound to vfio-pci until `close`, which gives it back to the driver that it had."""

    def __init__(self, device: HostDevice, pci: Path = PCI) -> None:
        """Raises: UserError when it cannot be bound, with what to do."""
        self._device = device
        self._pci = pci
        self._bound = False
        if device.driver == VFIO_DRIVER:
            return
        if not (pci / "drivers" / VFIO_DRIVER).is_dir():
            raise UserError("the module vfio-pci is not loaded: modprobe vfio-pci")
        override = device.folder / "driver_override"
        try:
            self._former_override = override.read_text().strip()
            override.write_text(f"{VFIO_DRIVER}\n")
            self._bound = True
            self._move()
        except OSError as error:
            self.close()
            raise UserError(f"function {device.address} cannot be bound to vfio-pci: {error.strerror}") from error
        now = find_device(device.address, pci)
        if now is None or now.driver != VFIO_DRIVER:
            self.close()
            raise UserError(f"function {device.address} was not taken by vfio-pci: see dmesg")
        log.info("function %s bound to vfio-pci", device.address)

    def _move(self) -> None:
        """Take it from the driver that it has and have the kernel look for one again."""
        driver = self._device.folder / "driver"
        if driver.exists():
            (driver / "unbind").write_text(f"{self._device.address}\n")
        (self._pci / "drivers_probe").write_text(f"{self._device.address}\n")

    def close(self) -> None:
        """Undo it; harmless when called again."""
        if not self._bound:
            return
        self._bound = False
        former = "" if self._former_override == _NONE else self._former_override
        try:
            (self._device.folder / "driver_override").write_text(f"{former}\n")
            driver = self._device.folder / "driver"
            if driver.exists():
                (driver / "unbind").write_text(f"{self._device.address}\n")
            if self._device.driver or former:
                (self._pci / "drivers_probe").write_text(f"{self._device.address}\n")
        except OSError as error:
            log.warning("function %s stays bound to vfio-pci: %s", self._device.address, error.strerror)
