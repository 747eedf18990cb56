"""What a virtio-blk device tells of itself: feature bits and configuration space (virtio 1.2, 5.2.3 and 5.2.4)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kernels import virtio_layout as layout
from kernels.virtio_layout import SECTOR_BYTES
from vvupipe.errors import ProtocolError
from vvupipe.vhost_user.messages import F_PROTOCOL_FEATURES, ProtocolFeature

#: capacity, size_max, seg_max, geometry, blk_size, topology (4 fields), writeback, unused, num_queues
_CONFIG = struct.Struct("<QII4sI BBHI BBH")
CONFIG_BYTES = _CONFIG.size
assert CONFIG_BYTES == 36

_BLK_F_GEOMETRY = 1 << 4

#: What this driver takes of what is offered.
FEATURES = (
    layout.F_VERSION_1
    | layout.F_RING_INDIRECT_DESC
    | layout.F_RING_EVENT_IDX
    | layout.BLK_F_SIZE_MAX
    | layout.BLK_F_SEG_MAX
    | layout.BLK_F_RO
    | layout.BLK_F_BLK_SIZE
    | layout.BLK_F_FLUSH
    | layout.BLK_F_TOPOLOGY
    | layout.BLK_F_MQ
)

#: Names of feature bits as the specification has them (5.2.3 and 6), and vhost-user's own.
_NAMES = {
    1: "SIZE_MAX",
    2: "SEG_MAX",
    4: "GEOMETRY",
    5: "RO",
    6: "BLK_SIZE",
    9: "FLUSH",
    10: "TOPOLOGY",
    11: "CONFIG_WCE",
    12: "MQ",
    13: "DISCARD",
    14: "WRITE_ZEROES",
    15: "LIFETIME",
    16: "SECURE_ERASE",
    24: "NOTIFY_ON_EMPTY",
    26: "LOG_ALL",
    27: "ANY_LAYOUT",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    30: "PROTOCOL_FEATURES",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    40: "RING_RESET",
}


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """A disk as its back-end describes it. `features` are those offered."""

    features: int
    protocol_features: ProtocolFeature
    size_bytes: int
    sector_bytes: int  #: logical block size: what a request must be a multiple of
    physical_block_bytes: int
    request_bytes_max: int  #: of one data segment; 0: no limit
    num_queues: int
    segments_max: int = 0  #: of a request; 0: not told

    @classmethod
    def from_config(cls, features: int, config: bytes, queues: int, protocol: ProtocolFeature) -> DiskFacts:
        """From the first CONFIG_BYTES of the configuration space. Raises: ProtocolError when it makes no sense."""
        capacity, size_max, seg_max, _, blk_size, exponent, _, _, _, _, _, num_queues = _CONFIG.unpack(config)
        if not features & layout.F_VERSION_1:
            raise ProtocolError("the back-end does not offer VIRTIO_F_VERSION_1: it is too old for this driver")
        sector_bytes = blk_size if features & layout.BLK_F_BLK_SIZE else SECTOR_BYTES
        if sector_bytes < SECTOR_BYTES or sector_bytes & (sector_bytes - 1):
            raise ProtocolError(f"the back-end says that a sector has {sector_bytes} bytes")
        # QEMU offers SIZE_MAX with 0, by which it means no limit.
        if features & layout.BLK_F_SIZE_MAX and 0 < size_max < sector_bytes:
            raise ProtocolError(f"the back-end takes {size_max} bytes in a segment, less than a sector")
        if capacity >= (1 << 63) // SECTOR_BYTES:
            raise ProtocolError(f"the back-end says that the disk has {capacity} sectors")
        shift = min(exponent, 16) if features & layout.BLK_F_TOPOLOGY else 0
        return cls(
            features,
            protocol,
            capacity * SECTOR_BYTES,
            sector_bytes,
            sector_bytes << shift,
            size_max if features & layout.BLK_F_SIZE_MAX else 0,
            max(1, min(queues, num_queues)) if features & layout.BLK_F_MQ else 1,
            seg_max if features & layout.BLK_F_SEG_MAX else 0,
        )

    def has(self, feature: int) -> bool:
        """Whether a feature is offered, and so taken."""
        return bool(self.features & FEATURES & feature)

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.has(layout.BLK_F_RO)

    @property
    def can_flush(self) -> bool:
        """Whether there is a flush request."""
        return self.has(layout.BLK_F_FLUSH)

    def smaller_queue_size(self, refused: int) -> int:
        """A size of vrings to try when the back-end takes none of `refused` entries; it has no way to tell its own."""
        # Back-ends tell of as many segments as their vrings have room for beside the header and the status.
        told = 1 << (self.segments_max + 2).bit_length() - 1
        return told if 4 <= told < refused else max(4, refused // 2)

    @property
    def feature_names(self) -> list[str]:
        """The offered features, in the order of their bits; a bit without a name as its number."""
        bits = (bit for bit in range(64) if self.features & (1 << bit) & ~F_PROTOCOL_FEATURES)
        return [_NAMES.get(bit, f"bit {bit}") for bit in bits]

    @property
    def protocol_feature_names(self) -> list[str]:
        """The protocol features in use."""
        return [feature.name or str(feature.value) for feature in self.protocol_features]

    def check_same(self, other: DiskFacts) -> None:
        """Raises: ProtocolError when the disk that came back is another one, or lacks what is in use."""
        if (other.size_bytes, other.sector_bytes, other.read_only) != (
            self.size_bytes,
            self.sector_bytes,
            self.read_only,
        ):
            raise ProtocolError(
                f"the back-end came back with another disk: {other.size_bytes} bytes instead of {self.size_bytes}, "
                f"sectors of {other.sector_bytes} instead of {self.sector_bytes}"
                + (", read-only" if other.read_only and not self.read_only else "")
            )
        lost = self.features & FEATURES & ~other.features
        if lost or other.num_queues < self.num_queues:
            raise ProtocolError("the back-end came back with fewer features or queues than before")
