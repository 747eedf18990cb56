"""`vvupipe device`: device back-ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from vvupipe.cli.block_options import BlockOptions, print_capabilities
from vvupipe.cli.device_list import list_functions
from vvupipe.cli.device_resize import resize
from vvupipe.cli.discovery import discovery
from vvupipe.cli.parameters import CPU_LIST, SIZE, check_cpus, json_option, set_up_logging, verbose_option

_QUEUES_MAX = 64


@click.group()
def device() -> None:
    """Run a device back-end."""


device.add_command(list_functions)
device.add_command(resize)
device.add_command(discovery)


@device.command()
@click.option("--file", "--blk-file", "image", type=click.Path(path_type=Path), help="Disk image or block device.")
@click.option(
    "--socket", "--socket-path", type=click.Path(path_type=Path), help="Listen for vhost-user front-ends here."
)
@click.option("--fd", type=click.IntRange(min=0), help="vhost-user socket that was inherited, listening or connected.")
@click.option("--vfio", metavar="ADDR", help="PCI address of the VVU function to drive, as 0000:00:10.0.")
@click.option("--vm", metavar="NAME", help="The VM that has the function, when several have one there.")
@click.option("--bind", is_flag=True, help="With --vfio: bind the function to vfio-pci as long as it is driven.")
@click.option("--read-only", is_flag=True, help="Offer a read-only disk.")
@click.option("--cpus", type=CPU_LIST, help="CPUs to pin the workers to, as 0,2-3.  [default: all allowed]")
@click.option("--num-queues", type=click.IntRange(1, _QUEUES_MAX), default=16, show_default=True)
@click.option("--queue-size", type=int, default=256, show_default=True, help="Largest vring accepted.")
@click.option(
    "--block-size",
    type=SIZE,
    help="Logical block size in bytes.  [default: a block device's own, else 512; more if --direct needs it]",
)
@click.option("--serial", help="Serial number, at most 20 characters.  [default: made from the path]")
@click.option(
    "--cache",
    type=click.Choice(["writeback", "writethrough", "unsafe"]),
    default="writeback",
    show_default=True,
    help="Where a completed write is: in the host's page cache, or on the disk; unsafe ignores flushes.",
)
@click.option("--direct", is_flag=True, help="Go around the host's page cache (O_DIRECT).")
@click.option(
    "--engine",
    type=click.Choice(["auto", "mmap", "uring", "sync"]),
    default="auto",
    show_default=True,
    help="How the image is read and written: copies from and to a mapping of it, io_uring, or preadv and pwritev; "
    "auto takes mmap, with --direct uring, and sync where those cannot be.",
)
@click.option("--sqpoll", is_flag=True, help="Have a thread of the kernel take io_uring's requests: it spins.")
@click.option(
    "--iopoll", is_flag=True, help="With --direct: look for completions at the device, which spins meanwhile."
)
@click.option("--pin-memory", is_flag=True, help="Register guest memory with io_uring: all of it is pinned.")
@click.option("--sparse/--no-sparse", default=True, show_default=True, help="Offer discard; punch holes for zeroes.")
@click.option("--lock/--no-lock", default=True, show_default=True, help="Lock the image as QEMU does.")
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1_000_000),
    default=200,
    show_default=True,
    help="Longest time that a worker spins before it sleeps; 0 never spins.",
)
@click.option(
    "--print-capabilities",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_capabilities,
    help="Say what this program can do, as JSON, and exit.",
)
@json_option
@verbose_option
def block(as_json: bool, verbose: int, cpus: list[int] | None, **options: Any) -> int:
    """Serve a disk image by vhost-user, on a socket or on a VVU function.

    Without --socket, --fd and --vfio it takes the socket that systemd hands over (LISTEN_FDS). SIGUSR1 has it take the
    size that the image has now.
    """
    set_up_logging(verbose)
    chosen = BlockOptions(cpus=check_cpus(cpus), as_json=as_json, **options)
    chosen.check()
    return asyncio.run(_serve_block(chosen))


async def _serve_block(options: BlockOptions) -> int:
    from vvupipe.devices import server
    from vvupipe.devices.block.device import BlockDevice, CacheMode
    from vvupipe.devices.block.engine import Engine, choose
    from vvupipe.devices.block.image import open_image
    from vvupipe.events import EventPrinter
    from vvupipe.vhost_user.socket_transport import SocketTransport
    from vvupipe.vhost_user.transport import Transport

    assert options.image is not None
    image = open_image(
        options.image,
        read_only=options.read_only,
        block_size_bytes=options.block_size,
        serial=options.serial,
        direct=options.direct,
        lock=options.lock,
    )
    engine = choose(
        Engine(options.engine),
        image,
        sqpoll=options.sqpoll,
        iopoll=options.iopoll,
        pin_memory=options.pin_memory,
    )
    transport: Transport
    if options.socket is not None:
        transport = SocketTransport.listen(options.socket)
    elif options.fd is not None:
        transport = SocketTransport.from_fd(options.fd)
    else:
        from vvupipe.vm.vvu_transport import open_vvu_transport

        assert options.vfio is not None
        transport = open_vvu_transport(options.vfio, options.vm, bind=options.bind)
    device = BlockDevice(
        image,
        options.cpus,
        options.num_queues,
        options.queue_size,
        options.spin_us * 1000,
        CacheMode(options.cache),
        sparse=options.sparse,
        engine=engine,
    )
    return await server.run(device, transport, EventPrinter(as_json=options.as_json))
