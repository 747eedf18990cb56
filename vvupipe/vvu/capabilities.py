"""Finding the structures of a virtio function by its PCI capabilities, as a driver does (virtio 1.2, 4.1.4)."""

from __future__ import annotations

from dataclasses import dataclass

from vvupipe.errors import TransportError
from vvupipe.pci.config_space import CAP_VENDOR, CAPABILITIES, CONFIG_BYTES
from vvupipe.vfio.function import REGION_CONFIG, VfioFunction
from vvupipe.vvu import layout

_CAPABILITIES_MAX = 48  # more do not fit into 256 bytes
_FIRST = 0x40


@dataclass(frozen=True, slots=True)
class Structure:
    """Where a structure lies. `extra`: the multiplier of the notify and doorbell structures, else 0."""

    bar: int
    offset: int
    length: int
    extra: int


def find_structures(function: VfioFunction) -> dict[int, Structure]:
    """The first capability of each kind (layout.CFG_*). Raises: TransportError when the list is broken."""
    config = function.read(REGION_CONFIG, 0, CONFIG_BYTES)
    found: dict[int, Structure] = {}
    offset = config[CAPABILITIES] & ~3
    for _ in range(_CAPABILITIES_MAX):
        if not offset:
            return found
        if offset < _FIRST:
            break
        if config[offset] == CAP_VENDOR:
            _add(found, config[offset:])
        offset = config[offset + 1] & ~3
    raise TransportError(f"function {function.name}: its capability list is broken")


def _add(found: dict[int, Structure], capability: bytes) -> None:
    least = layout.CAP_HEAD_BYTES + layout.CAP_BODY.size
    size = capability[2] if len(capability) >= least else 0
    if size < least or size > len(capability):
        return
    _, kind, bar, _, offset, length = layout.CAP_BODY.unpack_from(capability, layout.CAP_HEAD_BYTES)
    extra = 0
    if kind in {layout.CFG_NOTIFY, layout.CFG_DOORBELL} and size >= least + layout.CAP_EXTRA_LE32.size:
        (extra,) = layout.CAP_EXTRA_LE32.unpack_from(capability, least)
    elif kind == layout.CFG_SHARED_MEMORY and size >= least + layout.CAP64_EXTRA.size:
        offset_high, length_high = layout.CAP64_EXTRA.unpack_from(capability, least)
        offset |= offset_high << 32
        length |= length_high << 32
    # "The driver MUST ignore any vendor-specific capability structure which has a reserved bar value"
    if bar <= 5:
        found.setdefault(kind, Structure(bar, offset, length, extra))
