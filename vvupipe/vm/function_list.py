"""The functions that a back-end of this user, on this machine, could drive."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vvupipe.vm.qemu_backend import is_connected, is_listening
from vvupipe.vm.real_functions import RealFunction, real_functions
from vvupipe.vm.runtime_folder import RunningVm, running_vms
from vvupipe.vvu import layout

_READY = "ready"


@dataclass(frozen=True, slots=True)
class ListedFunction:
    """state: "ready", or what stands in the way. command: what drives it, "" when nothing can yet."""

    address: str
    identity: str
    where: str
    state: str
    command: str

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return dataclasses.asdict(self)


def all_functions() -> list[ListedFunction]:
    """Those of this machine's PCI bus, then those of embedded VMs."""
    real = [_real(function) for function in real_functions()]
    return real + [_embedded(vm, address) for vm in running_vms() for address in sorted(vm.functions)]


def _command(address: str, *options: str) -> str:
    return " ".join(["vvupipe device block --vfio", address, *options, "--file IMG"])


def _real(function: RealFunction) -> ListedFunction:
    device = function.device
    address = str(device.address)
    identity = f"{device.vendor:04x}:{device.device:04x}"
    if function.obstacle is None:
        return ListedFunction(address, identity, "this machine", _READY, _command(address))
    command = _command(address, "--bind") if "--bind" in function.obstacle else ""
    return ListedFunction(address, identity, "this machine", function.obstacle, command)


def _embedded(vm: RunningVm, address: str) -> ListedFunction:
    identity = f"{layout.VENDOR_ID:04x}:{layout.DEVICE_ID:04x}"
    path = vm.folder / vm.functions[address]
    state = "in use: stop its back-end first" if is_connected(path) else _READY
    if not is_listening(path):
        state = f"its VM (pid {vm.pid}) is starting or ending"
    return ListedFunction(address, identity, f"VM {vm.name}", state, _command(address, "--vm", vm.name))
