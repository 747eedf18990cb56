"""The embedded device VM: RAM, a PCI bus with VVU functions, each served to a driver by vfio-user."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vvupipe.ending_signals import ending_signals
from vvupipe.errors import UserError
from vvupipe.events import EventPrinter
from vvupipe.memory import huge_pages
from vvupipe.memory.huge_pages import pages_text
from vvupipe.pci.address import PciAddress
from vvupipe.pci.sysfs_tree import SysfsTree
from vvupipe.unix_path import listen_private
from vvupipe.vfio.user_server import VfioUserServer
from vvupipe.vhost_user.socket_transport import SocketTransport
from vvupipe.vhost_user.trace_lines import TraceOutput
from vvupipe.vhost_user.tracer import Tracer
from vvupipe.vm.guest_ram import SLOT_BYTES, GuestRam
from vvupipe.vm.lspci import SYSFS, function_line, lspci_lines
from vvupipe.vm.pci_bus import PciBus
from vvupipe.vm.runtime_folder import RuntimeFolder

if TYPE_CHECKING:
    from vvupipe.vm.qemu_device_vm import QemuDeviceVmOptions

__all__ = ["DeviceVmOptions", "ProxyOptions", "lspci_lines", "run_device_vm"]

log = logging.getLogger(__name__)

_RAM_MIN_BYTES = 4 * SLOT_BYTES


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """One --vvu-proxy: where the sibling connects, where the function sits (None: anywhere), its uuid.

    shared_memory_bytes: of a real VM, address space for the sibling's RAM; None: as much as usual.
    """

    socket_path: Path
    address: str | None = None
    uuid: str | None = None
    shared_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceVmOptions:
    """What `vvupipe run --vvu-proxy` was asked for. trace: where its siblings' messages are shown.

    hugepages: the RAM is in huge pages.
    """

    proxies: Sequence[ProxyOptions]
    name: str | None = None
    mem_mib: int = 256
    cpus: Sequence[int] | None = None
    json: bool = False
    trace: TraceOutput | None = None
    hugepages: bool = False


async def run_device_vm(options: DeviceVmOptions) -> int:
    """Run the VM until SIGINT or SIGTERM. Returns the exit status.

    Raises: UserError when the name, an address or a socket is taken or malformed, or there is no room.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in ending_signals():
        loop.add_signal_handler(number, stop.set)
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    allow_many_files()
    with DeviceVm(options) as vm:
        serving = asyncio.gather(*vm.tasks())
        stopping = asyncio.create_task(stop.wait())
        waited: list[asyncio.Future[Any]] = [serving, stopping]
        try:
            vm.announce(EventPrinter(as_json=options.json))
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()  # tells what went wrong: none of them ends by itself
        finally:
            stopping.cancel()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
    return 0


@dataclass(slots=True)
class _Slot:
    """One function and what belongs to it."""

    address: PciAddress
    options: ProxyOptions
    function: Any
    server: VfioUserServer
    socket_name: str
    proxy: Any = None


@dataclass
class DeviceVm:
    """Everything that one VM has; leaving the `with` removes all of it."""

    options: DeviceVmOptions
    _slots: list[_Slot] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> DeviceVm:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        ram_bytes = self.options.mem_mib << 20
        if ram_bytes < _RAM_MIN_BYTES:
            raise UserError(f"--mem {self.options.mem_mib}: a device VM needs {_RAM_MIN_BYTES >> 20} MiB or more")
        pages = huge_pages.choose(ram_bytes) if self.options.hugepages else None
        bus = PciBus()
        # Those with an address choose first, whatever their order.
        asked = sorted(self.options.proxies, key=lambda proxy: proxy.address is None)
        places = {id(proxy): bus.take(proxy.address) for proxy in asked}
        uuids = {id(proxy): parse_uuid(proxy.uuid) for proxy in asked}
        self.folder = RuntimeFolder.create(self.options.name)
        self._stack.callback(self.folder.close)
        ram = GuestRam(self.folder.name, ram_bytes, pages)
        self._stack.callback(ram.close)
        self._ram_text = pages_text(pages)
        relay = start_relay()
        self._stack.callback(relay.close)
        sysfs = SysfsTree(self.folder.path / SYSFS)
        for proxy in self.options.proxies:
            self._add(proxy, places[id(proxy)], uuids[id(proxy)], relay, bus, sysfs)
        self.folder.describe(
            {
                "ram": ram.name,
                "ram_bytes": ram_bytes,
                "ram_pages": self._ram_text,
                "functions": {str(slot.address): slot.socket_name for slot in self._slots},
                "listening": [str(proxy.socket_path.absolute()) for proxy in self.options.proxies],
            }
        )
        # Last: whoever sees a proxy's socket finds everything else ready.
        for slot in self._slots:
            slot.proxy = self._listen(slot)

    def _listen(self, slot: _Slot) -> Any:
        from vvupipe.vvu.proxy import VvuProxy

        listening = SocketTransport.listen(slot.options.socket_path)
        self._stack.callback(listening.close)
        return VvuProxy(slot.function, listening, tracer=tracer_for(self.options, slot.address))

    def _add(
        self,
        options: ProxyOptions,
        address: PciAddress,
        function_uuid: bytes,
        relay: Any,
        bus: PciBus,
        sysfs: SysfsTree,
    ) -> None:
        from vvupipe.vvu.function import VvuFunction

        function = VvuFunction(f"VVU function {address}", relay, uuid=function_uuid)
        self._stack.callback(function.close)
        bus.place_bars(function.config)
        function.config.on_change = lambda: sysfs.update(address, function.config)
        sysfs.show(address, function.config)
        socket_name = f"{address}.vfio-user"
        server = VfioUserServer(function, listen_private(self.folder.path / socket_name))
        self._slots.append(_Slot(address, options, function, server, socket_name))

    def tasks(self) -> list[asyncio.Task[None]]:
        """What serves the functions; none of them ends by itself."""
        return [asyncio.create_task(work.run()) for slot in self._slots for work in (slot.server, slot.proxy)]

    def announce(self, events: EventPrinter) -> None:
        """Tell the user what is there and what to type next."""
        name = self.folder.name
        ram_text = f"{self.options.mem_mib} MiB of RAM" + (f" in {self._ram_text}" if self.options.hugepages else "")
        lines = [f"device VM {name}: {ram_text}, pid {os.getpid()}"]
        for slot in self._slots:
            path = slot.options.socket_path
            lines += [
                function_line(slot.address),
                f"  its back-end:  vvupipe device block --vfio {slot.address} --vm {name} --file IMG",
                f"  its sibling:   vvupipe run --vhost-user-blk {path}",
            ]
        events.emit(
            "ready",
            "\n".join(lines),
            pid=os.getpid(),
            name=name,
            folder=str(self.folder.path),
            ram={"size_bytes": self.options.mem_mib << 20, "pages": self._ram_text},
            functions=[
                {
                    "address": str(slot.address),
                    "lspci": function_line(slot.address),
                    "socket": str(slot.options.socket_path),
                    "uuid": slot.options.uuid,
                }
                for slot in self._slots
            ],
        )


def tracer_for(options: DeviceVmOptions | QemuDeviceVmOptions, address: PciAddress) -> Tracer | None:
    """What the proxy at `address` shows its messages to; where there are several, the lines say which one it is."""
    label = str(address) if len(options.proxies) > 1 else ""
    return options.trace.tracer(label) if options.trace else None


def allow_many_files() -> None:
    """One function may hold 260 eventfds: three for each of the sibling's vrings and the driver's vectors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def parse_uuid(text: str | None) -> bytes:
    """The bytes of uuid=TEXT, zeros for None. Raises: UserError."""
    if text is None:
        return bytes(16)
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise UserError(f"uuid={text} is not a UUID: write it like {uuid.UUID(int=0)}") from None


def start_relay() -> Any:
    """The VM's KickRelay."""
    from vvupipe.vvu.kick_relay import KickRelay

    return KickRelay()
