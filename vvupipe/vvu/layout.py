"""The numbers of the VVU function: PCI identity, BARs, capabilities, registers. docs/vvu.md is their specification.

Those of the contract (facts/vvu-device.md) are marked C; the others are our choice and can be changed at will, since a
driver learns them from the capabilities.
"""

from __future__ import annotations

import struct

from kernels.virtio_layout import F_ACCESS_PLATFORM, F_VERSION_1
from vvupipe.vhost_user.messages import ProtocolFeature

# PCI identity (C)
VENDOR_ID = 0x1AF4
DEVICE_ID = 0x107D  #: 0x1040 + virtio device type 61
DEVICE_ID_PROTOTYPE = 0x1058  #: type 25 of the QEMU prototype; a driver takes both
CLASS_CODE = 0x00FF00  #: unclassified
REVISION = 1
SUBSYSTEM_ID = 0x1100

FEATURES = F_VERSION_1 | F_ACCESS_PLATFORM  # C

# Queues (C)
RXQ = 0  #: device -> driver: messages of the sibling
TXQ = 1  #: driver -> device: replies
QUEUE_SIZE = 256
NUM_QUEUES = 2
MAX_VHOST_QUEUES = 64  #: offered; crosvm had 16

# MSI-X vectors (C: how many; which is which is the driver's choice, this one is our driver's)
VECTOR_CONFIG = 0
VECTOR_RXQ = 1
VECTOR_TXQ = 2
VECTOR_FIRST_VRING = 3
NO_VECTOR = 0xFFFF


def vector_count(max_vhost_queues: int) -> int:
    """Two for the function's own queues, one for the configuration, one for each vring."""
    return NUM_QUEUES + 1 + max_vhost_queues


# BAR 0: the virtio structures and MSI-X
BAR_VIRTIO = 0
COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
ISR_BYTES = 1
DEVICE_CONFIG_OFFSET = 0x2000
NOTIFY_OFFSET = 0x3000
NOTIFY_MULTIPLIER = 4
NOTIFY_BYTES = NUM_QUEUES * NOTIFY_MULTIPLIER
MSIX_TABLE_OFFSET = 0x4000
MSIX_PBA_OFFSET = 0x6000
BAR_VIRTIO_BYTES = 0x8000

# BAR 2: doorbells and notification registers (C)
BAR_DOORBELL = 2
DOORBELL_OFFSET = 0x0000
DOORBELL_BYTES = 0x2000
DOORBELL_MULTIPLIER = 4
DOORBELL_WRITE_BYTES = 4  #: the contract takes any size
ERR_DOORBELL_BASE = 1024  #: ours: doorbell 1024 + i raises the sibling's err event of vring i
LOG_DOORBELL = 960  #: ours: tells the sibling that its dirty-page log has news (SET_LOG_FD)
NOTIFICATION_OFFSET = 0x2000
NOTIFICATION_BYTES = 0x1000
NOTIFICATION_SELECT = 0  #: le16
NOTIFICATION_VECTOR = 2  #: le16
REGION_TABLE_OFFSET = 0x3000  #: ours, as everything of the region table
REGION_TABLE_BYTES = 0x1000
BAR_DOORBELL_BYTES = 0x4000

# Region table: le32 count, then entries; each says where a piece of BAR 4 can be mapped
REGION_TABLE_HEAD = struct.Struct("<I12x")
REGION_TABLE_ENTRY = struct.Struct("<QQQII")  #: offset in BAR 4, size, offset in the window, place, devfn
REGION_TABLE_MAX = (REGION_TABLE_BYTES - REGION_TABLE_HEAD.size) // REGION_TABLE_ENTRY.size
WINDOW_IN_BAR = 0  #: the piece is mapped through BAR 4 itself; the last three fields are 0
WINDOW_ON_BUS = 1  #: through BAR 2 of the function `devfn` of the bus that this function sits on
WINDOW_BEHIND_PORT = 2  #: through BAR 2 of function 0 behind the bridge `devfn` of that bus
WINDOW_BAR = 2

# BAR 4: shared memory (C), 64-bit and prefetchable
BAR_SHARED_MEMORY = 4
SHARED_MEMORY_BYTES = 1 << 38  #: 256 GiB of address space, no memory
SHARED_MEMORY_ID = 0

# Virtio structure PCI capabilities (virtio 1.2, 4.1.4): what follows cap_vndr and cap_next
CFG_COMMON = 1
CFG_NOTIFY = 2
CFG_ISR = 3
CFG_DEVICE = 4
CFG_PCI = 5
CFG_DOORBELL = 6  # C
CFG_NOTIFICATION = 7  # C
CFG_SHARED_MEMORY = 8  # C, and the standard's VIRTIO_PCI_CAP_SHARED_MEMORY_CFG
CFG_REGION_TABLE = 0x76  #: ours
CAP_HEAD_BYTES = 2
CAP_BODY = struct.Struct("<BBBB2xII")  #: cap_len, cfg_type, bar, id, offset, length
CAP_EXTRA_LE32 = struct.Struct("<I")  #: notify_off_multiplier, doorbell_off_multiplier
CAP64_EXTRA = struct.Struct("<II")  #: offset_hi, length_hi (virtio_pci_cap64)
PCI_CFG_BAR = 4  # 4.1.4.9, from the capability's start: the driver writes bar, offset and length,
PCI_CFG_OFFSET = 8
PCI_CFG_LENGTH = 12
PCI_CFG_DATA = 16  # then accesses the BAR through these four bytes
PCI_CFG_DATA_BYTES = 4

# ISR status (virtio 1.2, 4.1.4.5)
ISR_QUEUE = 1
ISR_CONFIG = 2

# Advanced Features (PCI ECN), so that whoever gave the function to a process can reset it afterwards
AF_BODY = struct.Struct("<BBBB")  #: length, capabilities, control, status
AF_BYTES = 6
AF_TP_FLR = 3  #: transactions pending is told; function-level reset can be done
AF_CONTROL = 4  #: from the capability's start
AF_INITIATE_FLR = 1

# Device configuration (C)
DEVICE_CONFIG = struct.Struct("<II16s")  #: status, max_vhost_queues, uuid
DEVICE_CONFIG_BYTES = DEVICE_CONFIG.size
STATUS_BACKEND_UP = 1  #: the driver sets it
STATUS_FRONTEND_UP = 2  #: the function sets it

#: Protocol features that can pass the function; the proxy masks the others out of the back-end's answer. Not those that
#: hand a file from the back-end to the front-end or the other way in ways of their own.
CARRIED = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
MEM_SLOTS_MAX = 32  #: the most that a proxy lets a front-end have: each takes a place in the region table
