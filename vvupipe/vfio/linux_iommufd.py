"""Getting hold of a device by its own character device and an iommufd (Linux >= 6.6, userspace-api/iommufd.rst)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vfio import linux_ioctl as vfio

_SYSFS = Path("/sys/bus/pci/devices")
_DEV = Path("/dev")


def device_node(address: PciAddress, devices: Path = _SYSFS, dev: Path = _DEV) -> Path | None:
    """/dev/vfio/devices/vfioN of a function; None where the kernel has none, or no iommufd."""
    names = sorted(path.name for path in (devices / str(address) / "vfio-dev").glob("vfio*"))
    node = dev / "vfio" / "devices" / names[0] if names else None
    return node if node is not None and node.exists() and (dev / "iommu").exists() else None


class IommufdDomain:
    """Implements linux_container.DmaDomain."""

    def __init__(self, address: PciAddress, node: Path, dev: Path = _DEV) -> None:
        """Raises: UserError when the device cannot be had."""
        self._iommufd = -1
        self.device_fd = -1
        try:
            self.device_fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            self._iommufd = os.open(dev / "iommu", os.O_RDWR | os.O_CLOEXEC)
            bind = vfio.BIND_IOMMUFD.pack(vfio.BIND_IOMMUFD.size, 0, self._iommufd, 0)
            vfio.ask(self.device_fd, vfio.DEVICE_BIND_IOMMUFD, bind)
            alloc = vfio.IOAS_ALLOC_STRUCT.pack(vfio.IOAS_ALLOC_STRUCT.size, 0, 0)
            self._ioas = vfio.IOAS_ALLOC_STRUCT.unpack(vfio.ask(self._iommufd, vfio.IOAS_ALLOC, alloc))[2]
            attach = vfio.ATTACH_PT.pack(vfio.ATTACH_PT.size, 0, self._ioas)
            vfio.ask(self.device_fd, vfio.DEVICE_ATTACH_IOMMUFD_PT, attach)
        except OSError as error:
            self.close()
            if self.device_fd >= 0:
                os.close(self.device_fd)
            if error.errno == errno.EBUSY:
                raise UserError(f"function {address} is in use by another process: stop that one first") from error
            raise UserError(f"function {address} cannot be had by iommufd: {error.strerror or error}") from error

    def map(self, iova: int, address: int, size_bytes: int) -> None:
        """See DmaDomain."""
        flags = vfio.IOAS_MAP_FIXED_IOVA | vfio.IOAS_MAP_WRITEABLE | vfio.IOAS_MAP_READABLE
        layout = vfio.IOAS_MAP_STRUCT
        request = layout.pack(layout.size, flags, self._ioas, 0, address, size_bytes, iova)
        vfio.ask(self._iommufd, vfio.IOAS_MAP, request)

    def unmap(self, iova: int, size_bytes: int) -> None:
        """See DmaDomain."""
        layout = vfio.IOAS_UNMAP_STRUCT
        vfio.ask(self._iommufd, vfio.IOAS_UNMAP, layout.pack(layout.size, self._ioas, iova, size_bytes))

    def close(self) -> None:
        """See DmaDomain."""
        if self._iommufd >= 0:
            os.close(self._iommufd)
            self._iommufd = -1
