"""`vvupipe run`: virtual machines, embedded or real."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vvupipe.cli.machine import machine_fields, parse_option_size
from vvupipe.cli.parameters import (
    CPU_LIST,
    DURATION,
    SIZE,
    check_cpus,
    json_option,
    open_output,
    set_up_logging,
    verbose_option,
)
from vvupipe.errors import UserError

if TYPE_CHECKING:
    from vvupipe.vhost_user.trace_lines import TraceOutput
    from vvupipe.vm.device_vm import ProxyOptions

_DEFAULT_MEM_MIB = 128
_WORKLOADS = ("randread", "randwrite", "read", "write", "randrw", "rw", "verify")


@click.command()
@click.argument("kernel", required=False, type=click.Path(path_type=Path))
@click.option(
    "--vvu-proxy",
    "proxies",
    multiple=True,
    metavar="SOCK[,addr=ADDR][,uuid=UUID][,shared-memory=SIZE]",
    help="Device VM: give it a VVU function whose sibling connects at SOCK; shared-memory= with KERNEL.",
)
@click.option(
    "--vhost-user-blk",
    "disks",
    multiple=True,
    metavar="SOCK[,num-queues=N]",
    help="Sibling VM: a virtio-blk disk served by the vhost-user back-end at SOCK; num-queues= with KERNEL.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Device VM: write each vhost-user message of its siblings to FILE, as vvupipe trace shows it.",
)
@click.option("--name", help="Name of the VM.  [default: vm0, vm1, ...]")
@click.option("--mem", type=click.IntRange(16), help="Guest RAM in MiB.  [default: 128; with KERNEL 512]")
@click.option(
    "--hugepages", is_flag=True, help="RAM in huge pages: transparent ones if the kernel gives them, else reserved."
)
@click.option("--cpus", help="CPUs to pin vCPU processes to, as 0,2-3; with KERNEL the number of vCPUs.")
@click.option("--timeout", type=DURATION, help="How long to wait for a back-end.  [default: for ever]")
@click.option("--initrd", type=click.Path(path_type=Path), help="With KERNEL: its initramfs.")
@click.option("-p", "--params", multiple=True, help="With KERNEL: kernel parameters, may be repeated.")
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="With KERNEL: how QEMU runs the guest.",
)
@click.option(
    "--block",
    "blocks",
    multiple=True,
    metavar="PATH[,ro=true]",
    help="With KERNEL: a raw image as a disk of QEMU's own.",
)
@click.option(
    "--shared-dir",
    "shared_dirs",
    multiple=True,
    metavar="PATH:TAG[:ro=true]",
    help="With KERNEL: a folder that the guest can mount by 9p.",
)
@click.option(
    "--serial",
    metavar="type=TYPE[,path=PATH]",
    help="With KERNEL: where its console goes: stdout, sink, file or unix (a socket to connect to).  [default: stdout]",
)
@click.option(
    "--carrier",
    type=click.Choice(["auto", "vfio-user", "ivshmem"]),
    default="auto",
    show_default=True,
    help="Device VM with KERNEL: how its functions reach the guest; auto takes vfio-user where QEMU has it (10.1).",
)
@click.option("--qemu", help="With KERNEL: the QEMU binary.  [default: qemu-system-x86_64 of the PATH]")
@click.option("--workload", type=click.Choice(_WORKLOADS), help="Embedded sibling: what its driver does.")
@click.option("--bs", type=SIZE, default="4k", show_default=True, help="Workload: bytes per request.")
@click.option(
    "--iodepth",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Workload: requests in flight, for each job.",
)
@click.option("--runtime", type=DURATION, help="Workload: how long.  [default: as many requests as --size has blocks]")
@click.option("--size", type=SIZE, help="Workload: the first bytes of the disk to work on.  [default: all]")
@click.option(
    "--numjobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Workload: vCPU processes, each with a vring of its own.",
)
@click.option(
    "--rwmixread",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    help="Workload rw and randrw: percentage of reads.",
)
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1_000_000),
    default=200,
    show_default=True,
    help="Embedded sibling: longest time that its driver spins before it sleeps; 0 never spins.",
)
@click.option("--copy-out", type=click.Path(path_type=Path), help="Embedded sibling: copy the whole disk to a file.")
@click.option("--copy-in", type=click.Path(path_type=Path), help="Embedded sibling: copy a file over the whole disk.")
@click.option("--sha256", is_flag=True, help="Embedded sibling: read the whole disk and print its sha256.")
@click.option("--queue-size", type=int, default=256, show_default=True, help="Entries of each vring.")
@json_option
@verbose_option
def run(**options: Any) -> int:
    """Run a virtual machine.

    Without KERNEL it is embedded: pinned processes whose RAM is POSIX shared memory, nothing to install. With KERNEL
    it is a Linux guest in stock QEMU. --vvu-proxy makes it a device VM, --vhost-user-blk a sibling VM.
    """
    set_up_logging(options["verbose"])
    if options["proxies"] and options["disks"]:
        raise UserError("one VM is a device VM (--vvu-proxy) or a sibling (--vhost-user-blk), not both")
    if options["proxies"]:
        if options["trace"] is None:
            return _run_device_vm(options, None)
        from vvupipe.vhost_user.trace_lines import TraceOutput

        with open_output(options["trace"]) as sink:
            return _run_device_vm(options, TraceOutput(sink, options["as_json"]))
    _refuse(options, ("trace",), "goes with --vvu-proxy")
    if options["disks"]:
        return _run_sibling(options) if options["kernel"] is None else _run_qemu_sibling(options)
    raise UserError("say what the VM is for: --vvu-proxy SOCK (device VM) or --vhost-user-blk SOCK (sibling VM)")


@dataclass(frozen=True)
class _SocketOption:
    """SOCK,key=value,... of a repeated option."""

    path: Path
    values: dict[str, str]


def _parse_socket_option(
    option: str, text: str, keys: tuple[str, ...], keys_with_kernel: tuple[str, ...] = ()
) -> _SocketOption:
    """keys_with_kernel: those that are refused here, and that a VM with a KERNEL has. Raises: UserError."""
    path, *pairs = text.split(",")
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key in keys_with_kernel:
            raise UserError(f"{option} {text}: {key} is for a VM with a KERNEL")
        if not equals or key not in keys or not value or key in values:
            raise UserError(f"{option} {text}: '{pair}' cannot be: use {_words(keys)}")
        values[key] = value
    if not path:
        raise UserError(f"{option} {text}: the socket's path is missing")
    return _SocketOption(Path(path), values)


def _words(keys: tuple[str, ...]) -> str:
    """ "a=VALUE, b=VALUE or c=VALUE, each once"."""
    *first, last = (f"{key}=VALUE" for key in keys) if keys else ("the path alone",)
    return f"{', '.join(first)} or {last}, each once" if first else last


def _cpu_list(text: str | None) -> list[int] | None:
    """Of --cpus where it is no number of vCPUs. Raises: click.BadParameter, UserError."""
    if text is None:
        return None
    context = click.get_current_context()
    option = next(param for param in context.command.params if param.name == "cpus")
    return check_cpus(CPU_LIST.convert(text, option, context))


def _refuse(options: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(param.opts[-1] for param in context.command.params if param.name == name)
            raise UserError(f"{option} {why}")


_OF_WORKLOAD = ("bs", "iodepth", "runtime", "size", "numjobs", "rwmixread")
_MIXED = ("randrw", "rw")
_WORK = ("workload", *_OF_WORKLOAD, "spin_us", "copy_out", "copy_in", "sha256")
_MACHINE = ("initrd", "params", "accel", "qemu", "blocks", "shared_dirs", "serial")
_REAL = (*_MACHINE, "carrier")


def _run_device_vm(options: dict[str, Any], trace: TraceOutput | None) -> int:
    from vvupipe.vm.device_vm import DeviceVmOptions, run_device_vm

    if options["kernel"] is not None:
        return _run_qemu_device_vm(options, trace)
    _refuse(options, (*_WORK, *_REAL, "timeout", "queue_size"), "does not go with the embedded device VM")
    return asyncio.run(
        run_device_vm(
            DeviceVmOptions(
                name=options["name"],
                mem_mib=options["mem"] or _DEFAULT_MEM_MIB,
                cpus=_cpu_list(options["cpus"]),
                proxies=_proxies(options, with_kernel=False),
                json=options["as_json"],
                trace=trace,
                hugepages=options["hugepages"],
            )
        )
    )


def _proxies(options: dict[str, Any], *, with_kernel: bool) -> tuple[ProxyOptions, ...]:
    from vvupipe.vm.device_vm import ProxyOptions

    keys, others = ("addr", "uuid"), ("shared-memory",)
    allowed, refused = ((*keys, *others), ()) if with_kernel else (keys, others)
    parsed = [_parse_socket_option("--vvu-proxy", text, allowed, refused) for text in options["proxies"]]
    return tuple(
        ProxyOptions(
            each.path,
            each.values.get("addr"),
            each.values.get("uuid"),
            parse_option_size("--vvu-proxy", "shared-memory", each.values.get("shared-memory")),
        )
        for each in parsed
    )


def _run_qemu_device_vm(options: dict[str, Any], trace: TraceOutput | None) -> int:
    from vvupipe.vm.qemu_device_vm import QemuDeviceVmOptions, run_qemu_device_vm

    _refuse(options, (*_WORK, "timeout", "queue_size"), "does not go with a device VM that has a KERNEL")
    if trace is None:
        _refuse(options, ("as_json",), "goes with --trace where a device VM has a KERNEL")
    return asyncio.run(
        run_qemu_device_vm(
            QemuDeviceVmOptions(
                proxies=_proxies(options, with_kernel=True),
                vm_name=options["name"],
                carrier=options["carrier"],
                trace=trace,
                **machine_fields(options),
            )
        )
    )


def _one_disk(options: dict[str, Any]) -> Path:
    if len(options["disks"]) > 1:
        raise UserError("the embedded sibling has one disk; give a KERNEL for more")
    return _parse_socket_option("--vhost-user-blk", options["disks"][0], (), ("num-queues",)).path


def _run_sibling(options: dict[str, Any]) -> int:
    from vvupipe.vm.sibling import SiblingOptions, run_sibling

    _refuse(options, _REAL, "goes with a KERNEL")
    if options["workload"] is None:
        _refuse(options, _OF_WORKLOAD, "goes with --workload")
    elif options["workload"] not in _MIXED:
        _refuse(options, ("rwmixread",), f"goes with --workload {' or '.join(_MIXED)}")
    return asyncio.run(
        run_sibling(
            SiblingOptions(
                socket_path=_one_disk(options),
                mem_mib=options["mem"] or _DEFAULT_MEM_MIB,
                cpus=_cpu_list(options["cpus"]),
                timeout_s=options["timeout"],
                name=options["name"],
                json=options["as_json"],
                workload=options["workload"],
                bs=options["bs"],
                iodepth=options["iodepth"],
                runtime_s=options["runtime"],
                size=options["size"],
                numjobs=options["numjobs"],
                rwmixread=options["rwmixread"],
                spin_max_ns=options["spin_us"] * 1000,
                copy_out=options["copy_out"],
                copy_in=options["copy_in"],
                sha256=options["sha256"],
                queue_size=options["queue_size"],
                hugepages=options["hugepages"],
            )
        )
    )


def _run_qemu_sibling(options: dict[str, Any]) -> int:
    from vvupipe.vm.qemu_sibling import QemuSiblingOptions, VhostUserDisk, run_qemu_sibling

    _refuse(options, (*_WORK, "as_json"), "is for the embedded sibling, without KERNEL")
    _refuse(options, ("carrier",), "goes with --vvu-proxy")
    disks = []
    for text in options["disks"]:
        parsed = _parse_socket_option("--vhost-user-blk", text, ("num-queues",))
        queues = parsed.values.get("num-queues")
        if queues is not None and (not queues.isdecimal() or int(queues) < 1):
            raise UserError(f"--vhost-user-blk {text}: num-queues is a number from 1 on")
        disks.append(
            VhostUserDisk(parsed.path, num_queues=int(queues) if queues else None, queue_size=options["queue_size"])
        )
    return asyncio.run(
        run_qemu_sibling(
            QemuSiblingOptions(vhost_user_blk=tuple(disks), timeout_s=options["timeout"], **machine_fields(options))
        )
    )
