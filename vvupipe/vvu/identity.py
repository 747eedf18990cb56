"""The configuration space of the VVU function: identity, BARs, capabilities."""

from __future__ import annotations

from dataclasses import dataclass

from vvupipe.pci.config_space import CAP_ADVANCED_FEATURES, CAP_VENDOR, Bar, ConfigSpace
from vvupipe.pci.msix import Msix
from vvupipe.virtio.pci_common import COMMON_CONFIG_BYTES
from vvupipe.vvu import layout

_LARGEST_32BIT = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Identity:
    """A configuration space, the MSI-X in it and where its window into the BARs (VIRTIO_PCI_CAP_PCI_CFG) is."""

    config: ConfigSpace
    msix: Msix
    pci_cfg_offset: int
    advanced_features_offset: int


def build_identity(max_vhost_queues: int, shared_memory_bytes: int) -> Identity:
    """The function as it is after power-on. Raises: ValueError on a size that is no power of two."""
    config = ConfigSpace(
        vendor=layout.VENDOR_ID,
        device=layout.DEVICE_ID,
        class_code=layout.CLASS_CODE,
        revision=layout.REVISION,
        subsystem_vendor=layout.VENDOR_ID,
        subsystem=layout.SUBSYSTEM_ID,
    )
    config.add_bar(Bar(layout.BAR_VIRTIO, layout.BAR_VIRTIO_BYTES))
    config.add_bar(Bar(layout.BAR_DOORBELL, layout.BAR_DOORBELL_BYTES))
    config.add_bar(Bar(layout.BAR_SHARED_MEMORY, shared_memory_bytes, is_64bit=True, prefetchable=True))
    vectors = layout.vector_count(max_vhost_queues)
    msix = Msix(config, vectors, layout.BAR_VIRTIO, layout.MSIX_TABLE_OFFSET, layout.MSIX_PBA_OFFSET)

    def add(kind: int, bar: int, offset: int, length: int, extra: bytes = b"", writable: bytes = b"") -> int:
        size = layout.CAP_HEAD_BYTES + layout.CAP_BODY.size + len(extra)
        identifier = layout.SHARED_MEMORY_ID if kind == layout.CFG_SHARED_MEMORY else 0
        body = layout.CAP_BODY.pack(size, kind, bar, identifier, offset, length) + extra
        return config.add_capability(CAP_VENDOR, body, writable)

    multiplier = layout.CAP_EXTRA_LE32.pack
    add(layout.CFG_COMMON, layout.BAR_VIRTIO, layout.COMMON_OFFSET, COMMON_CONFIG_BYTES)
    add(
        layout.CFG_NOTIFY,
        layout.BAR_VIRTIO,
        layout.NOTIFY_OFFSET,
        layout.NOTIFY_BYTES,
        multiplier(layout.NOTIFY_MULTIPLIER),
    )
    add(layout.CFG_ISR, layout.BAR_VIRTIO, layout.ISR_OFFSET, layout.ISR_BYTES)
    add(layout.CFG_DEVICE, layout.BAR_VIRTIO, layout.DEVICE_CONFIG_OFFSET, layout.DEVICE_CONFIG_BYTES)
    # 4.1.4.9: bar, offset, length and data are the driver's; cap_len and cfg_type before and the padding are not.
    window = bytes((0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12
    pci_cfg = add(layout.CFG_PCI, 0, 0, 0, bytes(layout.PCI_CFG_DATA_BYTES), window)
    add(
        layout.CFG_DOORBELL,
        layout.BAR_DOORBELL,
        layout.DOORBELL_OFFSET,
        layout.DOORBELL_BYTES,
        multiplier(layout.DOORBELL_MULTIPLIER),
    )
    add(layout.CFG_NOTIFICATION, layout.BAR_DOORBELL, layout.NOTIFICATION_OFFSET, layout.NOTIFICATION_BYTES)
    add(layout.CFG_REGION_TABLE, layout.BAR_DOORBELL, layout.REGION_TABLE_OFFSET, layout.REGION_TABLE_BYTES)
    high = shared_memory_bytes >> 32
    add(
        layout.CFG_SHARED_MEMORY,
        layout.BAR_SHARED_MEMORY,
        0,
        shared_memory_bytes & _LARGEST_32BIT,
        layout.CAP64_EXTRA.pack(0, high) if high else b"",
    )
    features = layout.AF_BODY.pack(layout.AF_BYTES, layout.AF_TP_FLR, 0, 0)
    return Identity(config, msix, pci_cfg, config.add_capability(CAP_ADVANCED_FEATURES, features))
