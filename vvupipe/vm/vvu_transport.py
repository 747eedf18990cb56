"""Programs in an embedded device VM: from a PCI address to the vhost-user transport on the function there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vfio.user_client import VfioUserFunction
from vvupipe.vm.guest_ram import RamSlot
from vvupipe.vm.runtime_folder import RunningVm, find_vm, running_vms
from vvupipe.vvu.driver import VvuDriver
from vvupipe.vvu.driver_transport import VvuTransport


@dataclass(frozen=True, slots=True)
class FunctionPlace:
    """A function of a running VM."""

    address: PciAddress
    vm: RunningVm
    socket_path: Path


def find_function(address: PciAddress, vm_name: str | None) -> FunctionPlace:
    """Where the function at `address` is served.

    Raises: UserError when there is no such VM or function, or several VMs have one there and none is named.
    """
    vms = [find_vm(vm_name)] if vm_name is not None or not running_vms() else running_vms()
    having = [vm for vm in vms if str(address) in vm.functions]
    if len(having) > 1:
        names = ", ".join(vm.name for vm in having)
        raise UserError(f"several device VMs have a function at {address} ({names}): say which with --vm NAME")
    if not having:
        there = "; ".join(f"{vm.name} has {', '.join(vm.functions) or 'none'}" for vm in vms)
        raise UserError(f"no VVU function at {address}: {there}")
    vm = having[0]
    return FunctionPlace(address, vm, vm.folder / vm.functions[str(address)])


def open_vvu_transport(address: str, vm_name: str | None) -> VvuTransport:
    """Drive the function at `address` ("0000:00:10.0" or "00:10.0") and be ready for its sibling.

    Raises: UserError when it is not there or in use, TransportError when it does not behave.
    """
    place = find_function(PciAddress.parse(address), vm_name)
    function = VfioUserFunction.connect(place.socket_path, f"{place.address} of {place.vm.name}")
    try:
        function.check()
        slot = RamSlot.take(place.vm.ram_name)
    except BaseException:
        function.close()
        raise
    driver = VvuDriver(function, slot)
    try:
        driver.start()
    except BaseException:
        driver.close()
        raise
    return VvuTransport(driver)
