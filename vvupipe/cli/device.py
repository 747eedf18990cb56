"""`vvupipe device`: device back-ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from vvupipe.cli.device_list import list_functions
from vvupipe.cli.device_resize import resize
from vvupipe.cli.discovery import discovery
from vvupipe.cli.parameters import CPU_LIST, SIZE, check_cpus, json_option, set_up_logging, verbose_option
from vvupipe.errors import UserError

_QUEUE_SIZE_MAX = 32768
_QUEUES_MAX = 64


@click.group()
def device() -> None:
    """Run a device back-end."""


device.add_command(list_functions)
device.add_command(discovery)
device.add_command(resize)


@device.command()
@click.option("--file", "image", type=click.Path(path_type=Path), required=True, help="Disk image or block device.")
@click.option("--socket", type=click.Path(path_type=Path), help="Listen for vhost-user front-ends here.")
@click.option("--fd", type=click.IntRange(min=0), help="vhost-user socket that was inherited, listening or connected.")
@click.option("--vfio", metavar="ADDR", help="PCI address of the VVU function to drive, as 0000:00:10.0.")
@click.option("--vm", metavar="NAME", help="The VM that has the function, when several have one there.")
@click.option("--bind", is_flag=True, help="With --vfio: bind the function to vfio-pci as long as it is driven.")
@click.option("--read-only", is_flag=True, help="Offer a read-only disk.")
@click.option("--cpus", type=CPU_LIST, help="CPUs to pin the workers to, as 0,2-3.  [default: all allowed]")
@click.option("--num-queues", type=click.IntRange(1, _QUEUES_MAX), default=16, show_default=True)
@click.option("--queue-size", type=int, default=256, show_default=True, help="Largest vring accepted.")
@click.option("--block-size", type=SIZE, default="512", show_default=True, help="Logical block size in bytes.")
@click.option("--serial", help="Serial number, at most 20 characters.  [default: made from the path]")
@click.option(
    "--spin-us", type=click.IntRange(0, 1_000_000), default=200, show_default=True,
    help="Longest time that a worker spins before it sleeps; 0 never spins.",
)  # fmt: skip
@json_option
@verbose_option
def block(
    image: Path,
    socket: Path | None,
    fd: int | None,
    vfio: str | None,
    vm: str | None,
    bind: bool,
    read_only: bool,
    cpus: list[int] | None,
    num_queues: int,
    queue_size: int,
    block_size: int,
    serial: str | None,
    spin_us: int,
    as_json: bool,
    verbose: int,
) -> int:
    """Serve a disk image by vhost-user, on a socket or on a VVU function."""
    set_up_logging(verbose)
    if sum(given is not None for given in (socket, fd, vfio)) != 1:
        raise UserError("say where front-ends come from: one of --socket PATH, --fd N or --vfio ADDR")
    if vm is not None and vfio is None:
        raise UserError("--vm goes with --vfio")
    if bind and vfio is None:
        raise UserError("--bind goes with --vfio")
    if not 2 <= queue_size <= _QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
        raise UserError(f"--queue-size {queue_size}: use a power of two from 2 to {_QUEUE_SIZE_MAX}")
    cpu_list = check_cpus(cpus)
    return asyncio.run(
        _serve_block(
            image,
            socket,
            fd,
            vfio,
            vm,
            bind,
            read_only,
            cpu_list,
            num_queues,
            queue_size,
            block_size,
            serial,
            spin_us,
            as_json,
        )
    )


async def _serve_block(
    image_path: Path,
    socket: Path | None,
    fd: int | None,
    vfio: str | None,
    vm: str | None,
    bind: bool,
    read_only: bool,
    cpus: list[int],
    num_queues: int,
    queue_size: int,
    block_size: int,
    serial: str | None,
    spin_us: int,
    as_json: bool,
) -> int:
    from vvupipe.devices import server
    from vvupipe.devices.block.device import BlockDevice
    from vvupipe.devices.block.image import open_image
    from vvupipe.events import EventPrinter
    from vvupipe.vhost_user.socket_transport import SocketTransport
    from vvupipe.vhost_user.transport import Transport

    image = open_image(image_path, read_only=read_only, block_size_bytes=block_size, serial=serial)
    transport: Transport
    if socket is not None:
        transport = SocketTransport.listen(socket)
    elif fd is not None:
        transport = SocketTransport.from_fd(fd)
    else:
        from vvupipe.vm.vvu_transport import open_vvu_transport

        assert vfio is not None
        transport = open_vvu_transport(vfio, vm, bind=bind)
    block_device = BlockDevice(image, cpus, num_queues, queue_size, spin_us * 1000)
    return await server.run(block_device, transport, EventPrinter(as_json=as_json))
