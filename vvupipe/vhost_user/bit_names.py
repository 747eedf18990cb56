"""Names of feature and status bits, for people who read a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from kernels import virtio_layout
from vvupipe.vhost_user.messages import F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeature
from vvupipe.virtio import pci_common


@dataclass(frozen=True, slots=True)
class Bits:
    """A number whose bits have names."""

    value: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "|".join(self.names) or "0"


def _constants(module: ModuleType, prefix: str) -> dict[int, str]:
    return {value.bit_length() - 1: name for name, value in vars(module).items() if name.startswith(prefix)}


#: Feature bits as virtio 1.2 has them, without its VIRTIO_: 6 Reserved Feature Bits, 6.3 Legacy Interface, 5.2.3 Block
#: Device. Bits 0 to 23 belong to the device's type; a trace does not see the type and names them as a block device's.
FEATURES: Mapping[int, str] = {
    0: "BLK_F_BARRIER",
    4: "BLK_F_GEOMETRY",
    7: "BLK_F_SCSI",
    **_constants(virtio_layout, "BLK_F_"),
    24: "F_NOTIFY_ON_EMPTY",
    F_LOG_ALL.bit_length() - 1: "F_LOG_ALL",
    27: "F_ANY_LAYOUT",
    F_PROTOCOL_FEATURES.bit_length() - 1: "F_PROTOCOL_FEATURES",
    37: "F_SR_IOV",
    39: "F_NOTIF_CONFIG_DATA",
    **_constants(virtio_layout, "F_"),
}

PROTOCOL_FEATURES: Mapping[int, str] = {
    feature.value.bit_length() - 1: str(feature.name) for feature in ProtocolFeature
}

#: virtio 1.2, 2.1 Device Status Field
STATUS: Mapping[int, str] = {
    bit: name.removeprefix("STATUS_") for bit, name in _constants(pci_common, "STATUS_").items()
}


def name_bits(value: int, names: Mapping[int, str]) -> Bits:
    """Each set bit by its name; one that has none as "bit N"."""
    places = [bit for bit in range(value.bit_length()) if value >> bit & 1]
    return Bits(value, tuple(names.get(bit, f"bit {bit}") for bit in places))
