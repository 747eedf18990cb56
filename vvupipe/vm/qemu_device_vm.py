"""The device VM as a real guest in stock QEMU: VVU functions in it, its siblings' memory shown to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vvupipe.errors import TransportError, UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vhost_user.socket_transport import SocketTransport
from vvupipe.vhost_user.trace_lines import TraceOutput
from vvupipe.vm.device_vm import ProxyOptions, allow_many_files, parse_uuid, start_relay, tracer_for
from vvupipe.vm.function_carriers import Carrier, IvshmemCarrier, VfioUserCarrier
from vvupipe.vm.memory_plugs import MemoryPlugs
from vvupipe.vm.pci_bus import PciBus
from vvupipe.vm.qemu_binary import QemuBinary, find_qemu, kvm_usable
from vvupipe.vm.qemu_machine import (
    HugeRam,
    MachineOptions,
    check_machine,
    huge_ram,
    machine_arguments,
    memory_argument,
    remove_console,
    storage_arguments,
)
from vvupipe.vm.qemu_monitor import QemuMonitor
from vvupipe.vm.qemu_process import start_process, terminal_kept
from vvupipe.vm.qemu_run import end_qemu, until_signal, verdict
from vvupipe.vm.runtime_folder import RuntimeFolder
from vvupipe.vm.sibling_memory import MemoryPool, SiblingMemory

CarrierChoice = Literal["auto", "vfio-user", "ivshmem"]

_IOMMU_PARAMETER = "intel_iommu=on"
_ICH9 = "00:1f.0"  # the q35's own device
_PORTS_PER_PROXY = 4  # functions of one PCI device
_BAR_BYTES = 1 << 36  # BAR 4 of a function in a real VM: 64 GiB of address space
_SHARED_MEMORY_BYTES = 16 << 30  # the default: only what a sibling touches of it is memory
_DEVICES_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuDeviceVmOptions(MachineOptions):
    """A device VM. vm_name: by which other commands know it; None: vm0, vm1, ...

    trace: where its siblings' messages are shown.
    """

    proxies: Sequence[ProxyOptions]
    vm_name: str | None = None
    carrier: CarrierChoice = "auto"
    trace: TraceOutput | None = None
    restart_on_reset: bool = True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run_qemu_device_vm(options: QemuDeviceVmOptions, *, say: Callable[[str], None] = _say) -> int:
    """Run the VM to its end; 0 when the guest powered off, else 1 (also after SIGINT, SIGTERM, SIGHUP).

    Raises: UserError when QEMU, kernel, initrd, an address or a socket cannot be used.
    """
    check_machine(options)
    for proxy in options.proxies:
        size = _shared_memory(proxy)
        if size & (size - 1) or not 1 << 20 <= size <= _BAR_BYTES:
            raise UserError(f"shared-memory of {size} bytes: use a power of two from 1M to {_BAR_BYTES >> 30}G")
    binary = find_qemu(options.qemu)
    carrier = choose_carrier(options.carrier, binary)
    allow_many_files()
    return await until_signal(_stay(options, binary, carrier, say))


def choose_carrier(choice: CarrierChoice, binary: QemuBinary) -> Literal["vfio-user", "ivshmem"]:
    """The carrier to use with a QEMU. Raises: UserError when it cannot do what was asked for."""
    if choice == "ivshmem":
        return choice
    try:
        done = subprocess.run(
            [binary.path, "-device", "vfio-user-pci,help"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_DEVICES_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{binary.path} does not tell its devices: {error}") from error
    if b"vfio-user-pci options" in done.stdout:
        return "vfio-user"
    if choice == "vfio-user":
        version = ".".join(map(str, binary.version))
        raise UserError(f"QEMU {version} has no vfio-user-pci: use 10.1 or newer (--qemu), or --carrier ivshmem")
    return "ivshmem"


async def _stay(
    options: QemuDeviceVmOptions,
    binary: QemuBinary,
    carrier: Literal["vfio-user", "ivshmem"],
    say: Callable[[str], None],
) -> int:
    on_terminal = os.isatty(0) and options.serial.kind == "stdout"
    ours, theirs = socket.socketpair()
    monitor = QemuMonitor(ours)
    with ours, theirs, terminal_kept(), _DeviceVm(options, binary, carrier, monitor) as vm:
        command = vm.command(theirs.fileno(), on_terminal=on_terminal)
        process = await start_process(command, [theirs.fileno(), *vm.inherited()])
        theirs.close()
        following = asyncio.create_task(monitor.follow())
        try:
            await vm.serve(process, say, on_terminal=on_terminal)
        finally:
            try:
                await end_qemu(process, monitor)
            finally:
                remove_console(options.serial)
            following.cancel()
            await vm.plugs.close()
    return verdict(process, monitor, say)


@dataclass(slots=True)
class _Slot:
    """One function and what belongs to it."""

    options: ProxyOptions
    address: PciAddress
    function: Any
    carrier: Carrier
    pool: MemoryPool
    pool_address: PciAddress
    ports: list[tuple[str, PciAddress]]
    proxy: Any = None


class _DeviceVm:
    """Everything that one VM has besides QEMU itself; leaving the `with` removes all of it."""

    def __init__(
        self,
        options: QemuDeviceVmOptions,
        binary: QemuBinary,
        carrier: Literal["vfio-user", "ivshmem"],
        monitor: QemuMonitor,
    ) -> None:
        self._options = options
        self._binary = binary
        self._carrier = carrier
        self._monitor = monitor
        self._slots: list[_Slot] = []
        self._huge: HugeRam | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _DeviceVm:
        with self._stack:
            self._make()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        options = self._options
        self._huge = self._stack.enter_context(huge_ram(options))
        bus = PciBus()
        bus.take(_ICH9)
        asked = sorted(options.proxies, key=lambda proxy: proxy.address is None)
        places = {id(proxy): bus.take(proxy.address) for proxy in asked}
        uuids = {id(proxy): parse_uuid(proxy.uuid) for proxy in asked}
        self.folder = RuntimeFolder.create(options.vm_name)
        self._stack.callback(self.folder.close)
        relay = start_relay()
        self._stack.callback(relay.close)
        for number, proxy in enumerate(options.proxies):
            self._add(number, proxy, places[id(proxy)], uuids[id(proxy)], relay, bus)
        ports = [(name, port.device << 3 | port.function) for slot in self._slots for name, port in slot.ports]
        self.plugs = MemoryPlugs(self._monitor, self._binary.version, ports)
        self._monitor.listeners.append(self._on_event)
        self.folder.describe(
            {
                "kind": "qemu",
                "pools": {str(slot.options.socket_path.absolute()): slot.pool.name for slot in self._slots},
                "listening": [str(slot.options.socket_path.absolute()) for slot in self._slots],
            }
        )
        for slot in self._slots:
            self._listen(slot)

    def _add(self, number: int, proxy: ProxyOptions, address: PciAddress, uuid: bytes, relay: Any, bus: PciBus) -> None:
        from vvupipe.vvu.function import VvuFunction

        pool_address, ports = bus.take(None), bus.take(None)
        function = VvuFunction(f"VVU function {address}", relay, uuid=uuid, shared_memory_bytes=_BAR_BYTES)
        self._stack.callback(function.close)
        carrier: Carrier
        if self._carrier == "ivshmem":
            carrier = IvshmemCarrier(function, relay, number)
        else:
            carrier = VfioUserCarrier(function, self.folder.path / f"{address}.vfio-user")
        self._stack.callback(carrier.close)
        pool = MemoryPool(self.folder.name, number, _shared_memory(proxy))
        self._stack.callback(pool.close)
        functions = [PciAddress(0, 0, ports.device, k) for k in range(_PORTS_PER_PROXY)]
        named = [(f"port{number}.{k}", port) for k, port in enumerate(functions)]
        self._slots.append(_Slot(proxy, address, function, carrier, pool, pool_address, named))

    def _listen(self, slot: _Slot) -> None:
        from vvupipe.vvu.proxy import VvuProxy

        listening = SocketTransport.listen(slot.options.socket_path)
        self._stack.callback(listening.close)
        devfn = slot.pool_address.device << 3
        memory = SiblingMemory(self.plugs, slot.pool, devfn)
        slot.proxy = VvuProxy(slot.function, listening, memory, tracer_for(self._options, slot.address))

    def command(self, monitor_fd: int, *, on_terminal: bool) -> list[str]:
        """QEMU's command line. Raises: UserError when the accelerator cannot be had."""
        options = self._options
        caching = ",caching-mode=on" if self._carrier == "vfio-user" else ""
        # Interrupt remapping and an in-kernel I/O APIC exclude each other.
        split = ",kernel-irqchip=split" if options.accel != "tcg" and kvm_usable() else ""
        command = machine_arguments(
            options,
            self._binary,
            monitor_fd,
            memory=memory_argument(options, self._huge),
            machine=f"q35{split}",
            parameters=(_IOMMU_PARAMETER,),
            on_terminal=on_terminal,
        )
        command += ["-device", f"intel-iommu,intremap=on{caching}"]
        for number, slot in enumerate(self._slots):
            command += slot.carrier.arguments(_place(slot.address))
            size = f"{slot.pool.size_bytes >> 20}M"
            command += [
                "-object",
                f"memory-backend-file,id=pool{number},mem-path={slot.pool.path},size={size},share=on",
            ]
            command += ["-device", f"ivshmem-plain,memdev=pool{number},addr={_place(slot.pool_address)}"]
            for k, (name, port) in enumerate(slot.ports):
                index = 1 + number * _PORTS_PER_PROXY + k
                command += [
                    "-device",
                    f"pcie-root-port,id={name},addr={_place(port)},chassis={index},slot={index},"
                    f"multifunction={'on' if k == 0 else 'off'},io-reserve=0,pref64-reserve={size}",
                ]
        return command + storage_arguments(options)

    def inherited(self) -> list[int]:
        """File descriptors that QEMU must inherit."""
        ram = [self._huge.fd] if self._huge else []
        return ram + [fd for slot in self._slots for fd in slot.carrier.inherited()]

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "RESET" and data.get("guest"):
            for slot in self._slots:
                slot.carrier.guest_reset()

    async def serve(self, process: Process, say: Callable[[str], None], *, on_terminal: bool) -> None:
        """Serve the functions until QEMU has ended."""
        tasks = [asyncio.create_task(work.run()) for slot in self._slots for work in (slot.carrier, slot.proxy)]
        ended = asyncio.create_task(process.wait())
        try:
            with contextlib.suppress(TransportError):  # QEMU ended at once, which `verdict` tells
                for slot in self._slots:
                    await slot.carrier.started()
            if await self._monitor.start():
                self._announce(say, on_terminal=on_terminal)
            waited: list[asyncio.Task[Any]] = [ended, *tasks]
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {ended}:
                task.result()  # tells what went wrong: none of them ends by itself
        finally:
            for task in [ended, *tasks]:
                task.cancel()
            await asyncio.gather(ended, *tasks, return_exceptions=True)

    def _announce(self, say: Callable[[str], None], *, on_terminal: bool) -> None:
        name = self.folder.name
        options = self._options
        ram_text = f"{options.mem_mib} MiB of RAM" + (f" in {self._huge.pages}" if self._huge else "")
        say(f"device VM {name}: {ram_text}, QEMU {'.'.join(map(str, self._binary.version))}")
        for slot in self._slots:
            say(f"{slot.address.short} VVU function by {slot.carrier.name} ({slot.carrier.identity})")
            say(f"  its back-end, in the VM:  vvupipe device block --vfio {slot.address} --bind --file IMG")
            say(f"  its sibling:              vvupipe run --vhost-user-blk {slot.options.socket_path}")
        if on_terminal:
            say("the guest's console is this terminal; Ctrl-A X ends the VM")


def _place(address: PciAddress) -> str:
    return f"{address.device:x}.{address.function}"


def _shared_memory(proxy: ProxyOptions) -> int:
    return _SHARED_MEMORY_BYTES if proxy.shared_memory_bytes is None else proxy.shared_memory_bytes
