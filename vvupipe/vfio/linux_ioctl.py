"""The part of linux/vfio.h that a driver of PCI functions needs: request numbers, structures, flags."""

from __future__ import annotations

import fcntl
import struct
from typing import Final

_TYPE = 0x3B64  # _IO(VFIO_TYPE, VFIO_BASE + n): no direction, no size


def _io(number: int) -> int:
    return _TYPE + number


GET_API_VERSION: Final = _io(0)
CHECK_EXTENSION: Final = _io(1)
SET_IOMMU: Final = _io(2)
GROUP_GET_STATUS: Final = _io(3)
GROUP_SET_CONTAINER: Final = _io(4)
GROUP_GET_DEVICE_FD: Final = _io(6)
DEVICE_GET_INFO: Final = _io(7)
DEVICE_GET_REGION_INFO: Final = _io(8)
DEVICE_GET_IRQ_INFO: Final = _io(9)
DEVICE_SET_IRQS: Final = _io(10)
DEVICE_RESET: Final = _io(11)
IOMMU_MAP_DMA: Final = _io(13)
IOMMU_UNMAP_DMA: Final = _io(14)
DEVICE_IOEVENTFD: Final = _io(16)
DEVICE_BIND_IOMMUFD: Final = _io(18)
DEVICE_ATTACH_IOMMUFD_PT: Final = _io(19)

API_VERSION: Final = 0
TYPE1V2_IOMMU: Final = 3
NOIOMMU_IOMMU: Final = 8

GROUP_STATUS: Final = struct.Struct("=II")  #: argsz, flags
GROUP_VIABLE: Final = 1
DEVICE_INFO: Final = struct.Struct("=IIIIII")  #: argsz, flags, regions, irqs, cap_offset, pad
DEVICE_FLAGS_RESET: Final = 1
DEVICE_FLAGS_PCI: Final = 2
REGION_INFO: Final = struct.Struct("=IIIIQQ")  #: argsz, flags, index, cap_offset, size, offset
REGION_FLAG_MMAP: Final = 4
REGION_FLAG_CAPS: Final = 8
CAP_HEADER: Final = struct.Struct("=HHI")  #: id, version, next
CAP_SPARSE_MMAP: Final = 1
SPARSE_HEAD: Final = struct.Struct("=II")  #: number of areas, reserved
SPARSE_AREA: Final = struct.Struct("=QQ")  #: offset, size
IRQ_INFO: Final = struct.Struct("=IIII")  #: argsz, flags, index, count
IRQ_SET: Final = struct.Struct("=IIIII")  #: argsz, flags, index, start, count; eventfds follow
IRQ_DATA_NONE: Final = 1
IRQ_DATA_EVENTFD: Final = 4
IRQ_ACTION_TRIGGER: Final = 32
IRQ_INDEX_REQUEST: Final = 4  #: VFIO_PCI_REQ_IRQ_INDEX: the host asks for the device back
DMA_MAP: Final = struct.Struct("=IIQQQ")  #: argsz, flags, vaddr, iova, size
DMA_UNMAP: Final = struct.Struct("=IIQQ")  #: argsz, flags, iova, size
DMA_READ: Final = 1
DMA_WRITE: Final = 2
IOEVENTFD: Final = struct.Struct("=IIQQii")  #: argsz, flags (the width in bytes), offset, data, fd, reserved
BIND_IOMMUFD: Final = struct.Struct("=IIiI")  #: argsz, flags, iommufd, out_devid
ATTACH_PT: Final = struct.Struct("=III")  #: argsz, flags, pt_id

# linux/iommufd.h: _IO(';', 0x80 + n), sizes inside the structures
_IOMMUFD_TYPE = 0x3B80
IOAS_ALLOC: Final = _IOMMUFD_TYPE + 1
IOAS_MAP: Final = _IOMMUFD_TYPE + 5
IOAS_UNMAP: Final = _IOMMUFD_TYPE + 6
IOAS_ALLOC_STRUCT: Final = struct.Struct("=III")  #: size, flags, out_ioas_id
IOAS_MAP_STRUCT: Final = struct.Struct("=IIIIQQQ")  #: size, flags, ioas_id, reserved, user_va, length, iova
IOAS_UNMAP_STRUCT: Final = struct.Struct("=IIQQ")  #: size, ioas_id, iova, length
IOAS_MAP_FIXED_IOVA: Final = 1
IOAS_MAP_WRITEABLE: Final = 2
IOAS_MAP_READABLE: Final = 4


def ask(fd: int, request: int, data: bytes) -> bytes:
    """Call `request` with a structure that the kernel may fill in; the structure afterwards. Raises: OSError."""
    buffer = bytearray(data)
    fcntl.ioctl(fd, request, buffer)
    return bytes(buffer)
