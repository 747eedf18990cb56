"""Where things lie in the embedded sibling's RAM. Guest-physical 0 is the first byte of the shared memory.

Page 0 stays empty, so that no address is 0. Then for each vring two places for its rings, its requests, its data.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.driver_layout import DESCS_PER_REQUEST, TAG_BYTES
from kernels.virtio_layout import DESC_SIZE, avail_bytes, used_bytes
from vvupipe.errors import UserError
from vvupipe.units import human_bytes

_PAGE = 4096
_LINE = 128  # no two rings share a cache line, nor the pair that a CPU fetches together
#: A ring begins anew at its other place after a reconnect: what a dying back-end still writes hits the old one.
RING_PLACES = 2
#: The front-end's own addresses, as the back-end sees them; different from guest-physical ones on purpose.
UVA_BASE = 0x7F00_0000_0000


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Guest-physical addresses of the three parts of a vring."""

    desc_gpa: int
    avail_gpa: int
    used_gpa: int


@dataclass(frozen=True, slots=True)
class VringPlace:
    """What one vring has in guest memory."""

    rings: tuple[RingPlace, ...]
    tags_gpa: int
    data_gpa: int
    data_bytes: int


class RamLayout:
    """The layout of `mem_bytes` of RAM for `num_vrings` vrings of `queue_size` entries.

    Raises: UserError when they do not fit.
    """

    def __init__(self, mem_bytes: int, num_vrings: int, queue_size: int) -> None:
        self.mem_bytes = mem_bytes
        self.queue_size = queue_size
        position = _PAGE
        fixed: list[tuple[tuple[RingPlace, ...], int]] = []
        for _ in range(num_vrings):
            places = []
            for _ in range(RING_PLACES):
                desc = _round_up(position, _PAGE)
                avail = _round_up(desc + DESC_SIZE * queue_size, _LINE)
                used = _round_up(avail + avail_bytes(queue_size), _LINE)
                places.append(RingPlace(desc, avail, used))
                position = used + used_bytes(queue_size)
            tags = _round_up(position, _PAGE)
            position = tags + TAG_BYTES * queue_size
            fixed.append((tuple(places), tags))
        position = _round_up(position, _PAGE)
        share = (mem_bytes - position) // num_vrings // _PAGE * _PAGE
        if share < _PAGE:
            raise UserError(
                f"{num_vrings} vrings of {queue_size} entries do not fit in {human_bytes(mem_bytes)} of RAM: "
                "use a larger --mem"
            )
        self.vrings = [VringPlace(rings, tags, position + k * share, share) for k, (rings, tags) in enumerate(fixed)]


def tags_max(queue_size: int, *, indirect: bool) -> int:
    """Requests that can be in flight in a vring."""
    return queue_size if indirect else queue_size // DESCS_PER_REQUEST
