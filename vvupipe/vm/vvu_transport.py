"""From a PCI address to the vhost-user transport on the VVU function there, in an embedded VM or in this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.ivshmem.driver_function import open_ivshmem
from vvupipe.pci.address import PciAddress
from vvupipe.pci.host_devices import VFIO_DRIVER, Binding, HostDevice, find_device
from vvupipe.vfio.function import VfioFunction
from vvupipe.vfio.linux_function import LinuxVfioFunction
from vvupipe.vfio.locked_memory import LockedMemory
from vvupipe.vfio.user_client import VfioUserFunction
from vvupipe.vm.guest_ram import RamSlot
from vvupipe.vm.real_functions import bind_commands, is_candidate, is_ivshmem
from vvupipe.vm.runtime_folder import RunningVm, find_vm, running_vms
from vvupipe.vvu.driver import DmaBuffer, VvuDriver
from vvupipe.vvu.driver_transport import VvuTransport
from vvupipe.vvu.memory_windows import MemoryWindows

_DMA_BYTES = 1 << 19  # rings and buffers of VvuDriver, which are 330 KiB
_DMA_GPA = 1 << 20  # any address but 0 that is not the interrupts'


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


def open_vvu_transport(address: str, vm_name: str | None, *, bind: bool = False) -> VvuTransport:
    """Drive the function at `address` ("0000:00:10.0" or "00:10.0") and be ready for its sibling.

    It is looked for on this machine's own PCI bus and in the embedded VMs (vm_name: only in that one).
    bind: bind one of this machine to vfio-pci first, and give it back when the transport is closed.
    Raises: UserError when it is not there, in use or in no state to be driven, TransportError when it misbehaves.
    """
    place = PciAddress.parse(address)
    device = find_device(place) if vm_name is None else None
    if device is not None and is_candidate(device):
        if any(str(place) in vm.functions for vm in running_vms()):
            raise UserError(
                f"both this machine and an embedded VM have a function at {place}: say --vm NAME for the VM's"
            )
        return _open_real(device, bind=bind)
    if bind:
        raise UserError(f"--bind is for a VVU function of this machine, and there is none at {place}")
    return _open_embedded(find_function(place, vm_name))


def _open_embedded(place: FunctionPlace) -> VvuTransport:
    function = VfioUserFunction.connect(place.socket_path, f"{place.address} of {place.vm.name}")
    try:
        function.check()
        slot = RamSlot.take(place.vm.ram_name)
    except BaseException:
        function.close()
        raise
    return _start(VvuDriver(function, slot))


def _open_real(device: HostDevice, *, bind: bool) -> VvuTransport:
    binding = _bound(device, bind=bind)
    try:
        function, memory = _open_function(device)
        driver = VvuDriver(function, memory, MemoryWindows(device.address))
        return _start(driver, binding.close if binding else None)
    except BaseException:
        if binding:
            binding.close()
        raise


def _bound(device: HostDevice, *, bind: bool) -> Binding | None:
    """The binding to undo at the end, None when it was bound already. Raises: UserError when it is not to be."""
    if device.driver == VFIO_DRIVER:
        return None
    if not bind:
        bound = f"bound to {device.driver}" if device.driver else "bound to no driver"
        raise UserError(f"function {device.address} is {bound}: add --bind, or type: {bind_commands(device)}")
    return Binding(device)


def _open_function(device: HostDevice) -> tuple[VfioFunction, DmaBuffer]:
    function = LinuxVfioFunction.open(device.address)
    if is_ivshmem(device):
        return open_ivshmem(function)
    try:
        return function, LockedMemory(_DMA_BYTES, _DMA_GPA)
    except BaseException:
        function.close()
        raise


def _start(driver: VvuDriver, on_close: Callable[[], None] | None = None) -> VvuTransport:
    try:
        driver.start()
    except BaseException:
        driver.close()
        raise
    return VvuTransport(driver, on_close)
