"""Which PCI functions of this machine may be VVU functions, and what stands in the way of driving one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vvupipe.ivshmem import layout as ivshmem
from vvupipe.pci.host_devices import PCI, VFIO_DRIVER, HostDevice, all_devices, find_device
from vvupipe.vvu import layout

_DEV_VFIO = Path("/dev/vfio")
_MEMORY_RESOURCE = f"resource{ivshmem.BAR_MEMORY}"


def is_ivshmem(device: HostDevice) -> bool:
    """Whether this is an ivshmem device, which may carry a VVU function."""
    return (device.vendor, device.device) == (ivshmem.VENDOR_ID, ivshmem.DEVICE_ID)


def is_candidate(device: HostDevice) -> bool:
    """Whether this may be a VVU function, by its identity."""
    vvu = {layout.DEVICE_ID, layout.DEVICE_ID_PROTOTYPE}
    return is_ivshmem(device) or (device.vendor == layout.VENDOR_ID and device.device in vvu)


def is_window(device: HostDevice) -> bool:
    """Whether this is an ivshmem device without doorbells: memory alone, such as a sibling's."""
    # ivshmem-spec.rst: "BAR1 holds MSI-X table and PBA (only ivshmem-doorbell)"
    try:
        return is_ivshmem(device) and int((device.folder / "resource").read_text().splitlines()[1].split()[1], 16) == 0
    except (OSError, ValueError, IndexError):
        return False


def bind_commands(device: HostDevice, pci: Path = PCI) -> str:
    """What a user types to bind a function to vfio-pci."""
    address = device.address
    steps = [f"echo {VFIO_DRIVER} > {pci}/devices/{address}/driver_override"]
    if device.driver:
        steps.append(f"echo {address} > {pci}/devices/{address}/driver/unbind")
    return " && ".join([*steps, f"echo {address} > {pci}/drivers_probe"])


@dataclass(frozen=True, slots=True)
class RealFunction:
    """A function that may be driven. obstacle: what stands in the way and what to do; None: nothing."""

    device: HostDevice
    obstacle: str | None


def real_functions(pci: Path = PCI, dev_vfio: Path = _DEV_VFIO) -> list[RealFunction]:
    """The candidates of this machine but for plain windows, by address."""
    found = [device for device in all_devices(pci) if is_candidate(device) and not is_window(device)]
    return [RealFunction(device, _obstacle(device, pci, dev_vfio)) for device in found]


def _obstacle(device: HostDevice, pci: Path, dev_vfio: Path) -> str | None:
    if not (pci / "drivers" / VFIO_DRIVER).is_dir():
        return "the module vfio-pci is not loaded: modprobe vfio-pci"
    if device.iommu_group is None:
        return "no IOMMU group: give this machine an IOMMU (kernel parameter intel_iommu=on)"
    for address in device.group_members():
        member = find_device(address, pci)
        if member is not None and member.driver not in {None, VFIO_DRIVER, "pcieport"}:
            return f"{address} of the same IOMMU group {device.iommu_group} is bound to {member.driver}"
    if device.driver != VFIO_DRIVER:
        bound = f"bound to {device.driver}" if device.driver else "bound to no driver"
        return f"{bound}: give 'vvupipe device block' --bind"
    nodes = [dev_vfio / str(device.iommu_group), dev_vfio / f"noiommu-{device.iommu_group}"]
    node = next((node for node in nodes if node.exists()), None)
    if node is None:
        return f"{nodes[0]} is not there"
    return _node_obstacle(node)


def _node_obstacle(node: Path) -> str | None:
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{node}: {error.strerror}"
    return None
