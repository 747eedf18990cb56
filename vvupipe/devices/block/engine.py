"""How a worker reads and writes the image: by copying from a mapping, by io_uring, or by system calls that wait."""

from __future__ import annotations

import enum
import mmap
import os
from dataclasses import dataclass

from vvupipe.devices.block import file_memory, polled_queues
from vvupipe.devices.block.image import Image
from vvupipe.errors import UserError
from vvupipe.workers import io_uring

_MERGE_BYTES = 256 << 10
_FOR_URING = "--sqpoll, --iopoll and --pin-memory"
_HELPERS = 16
_HELPERS_BESIDE_URING = 4  # for what io_uring does not do


class Engine(enum.StrEnum):
    """The values of --engine. Whatever would make a worker wait is done by io_uring or a helper thread in each."""

    AUTO = "auto"
    MMAP = "mmap"  #: copy from and to a mapping of the image where that is in memory
    URING = "uring"  #: everything by io_uring
    SYNC = "sync"  #: preadv and pwritev, in helper threads where they wait


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine of an image. uring: io_uring does what takes waiting; sqpoll: a thread of the kernel takes it."""

    engine: Engine
    uring: bool
    sqpoll: bool = False
    iopoll: bool = False  #: completions are looked for at the device
    pin_memory: bool = False  #: the front-end's memory is registered with io_uring
    writable_map: bool = False  #: writes are copied into the mapping
    map_always: bool = False  #: what is mapped is never on a disk (DAX)


def choose(
    wanted: Engine, image: Image, *, sqpoll: bool = False, iopoll: bool = False, pin_memory: bool = False
) -> EngineChoice:
    """What `wanted` comes to for the image on this machine.

    Raises: UserError when it is not possible.
    """
    if wanted == Engine.SYNC and (sqpoll or iopoll or pin_memory):
        raise UserError(f"{_FOR_URING} are for io_uring, which --engine sync does not use: leave them away")
    if iopoll and not image.direct:
        raise UserError("--iopoll is for what goes around the page cache: add --direct")
    missing = "not wanted" if wanted == Engine.SYNC else io_uring.available()
    if missing and (wanted == Engine.URING or sqpoll or iopoll or pin_memory):
        hint = "use --engine sync" if wanted == Engine.URING else f"leave {_FOR_URING} away"
        raise UserError(f"io_uring cannot be used: {missing}: {hint}")
    if wanted == Engine.MMAP and image.direct:
        raise UserError("--engine mmap goes through the page cache and --direct around it: leave one of them away")
    readable = not image.direct and _maps(image, mmap.PROT_READ)
    if wanted == Engine.MMAP and not readable:
        raise UserError(f"{image.path} cannot be mapped: use --engine uring or sync")
    if readable and not _may_see_what_is_in_memory(image):
        if wanted == Engine.MMAP:
            raise UserError(
                f"--engine mmap: Linux tells what of {image.path} is in memory only to who owns it or may write it: "
                "use --engine uring or sync"
            )
        readable = False
    if wanted == Engine.AUTO:
        wanted = Engine.MMAP if readable else Engine.SYNC if missing else Engine.URING
    if iopoll and (why := polled_queues.missing(image.fd, image.limits.direct_alignment_bytes)):
        raise UserError(f"--iopoll: completions on {image.path} cannot be polled for: {why}; or leave --iopoll away")
    if wanted != Engine.MMAP:
        return EngineChoice(wanted, not missing, sqpoll, iopoll, pin_memory)
    dax = file_memory.is_dax(image.fd)
    # Elsewhere each page that was written back takes a fault when it is written again: pwritev costs less.
    in_memory = dax or file_memory.is_tmpfs(image.fd)
    writable = in_memory and not image.read_only and _maps(image, mmap.PROT_READ | mmap.PROT_WRITE)
    return EngineChoice(wanted, not missing, sqpoll, False, pin_memory, writable, dax)


def _may_see_what_is_in_memory(image: Image) -> bool:
    """Whether mincore(2) tells the truth; to others it says since Linux 5.2 that all is there."""
    if os.geteuid() in (0, os.fstat(image.fd).st_uid) or file_memory.is_dax(image.fd):
        return True
    return os.access(f"/proc/self/fd/{image.fd}", os.W_OK, effective_ids=True)


def _maps(image: Image, protection: int) -> bool:
    try:
        mmap.mmap(image.fd, min(mmap.PAGESIZE, image.size_bytes), mmap.MAP_SHARED, protection).close()
    except (OSError, ValueError):
        return False
    return True


def engine_fields(choice: EngineChoice, image: Image) -> dict[str, int]:
    """What a worker is told (fields of kernels.blk_disk.DISK, and of worker.BlockKernel.open)."""
    return {
        "maps": choice.engine == Engine.MMAP,
        "writable_map": choice.writable_map,
        "map_always": choice.map_always,
        "nowait": choice.engine == Engine.SYNC and not image.direct,
        "merge_bytes": _MERGE_BYTES,
        "uring": choice.uring,
        "sqpoll": choice.sqpoll,
        "iopoll": choice.iopoll,
        "registers": choice.pin_memory,
        "helpers": _HELPERS_BESIDE_URING if choice.uring else _HELPERS,
    }
