"""Getting hold of a device through its IOMMU group (Linux Documentation/driver-api/vfio.rst), also without an IOMMU."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

from vvupipe.errors import TransportError, UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vfio import linux_ioctl as vfio

_DEV = Path("/dev/vfio")


class DmaDomain(Protocol):
    """What a device's DMA addresses lead to."""

    device_fd: int

    def map(self, iova: int, address: int, size_bytes: int) -> None:
        """Let the device read and write memory of this process. Raises: OSError, TransportError."""

    def unmap(self, iova: int, size_bytes: int) -> None:
        """Take that back. Raises: OSError."""

    def close(self) -> None:
        """Give everything back but `device_fd`, which is the caller's."""


class GroupDomain:
    """A type-1 container with one group; `device_fd` belongs to whoever takes it."""

    def __init__(self, address: PciAddress, group: int, dev: Path = _DEV) -> None:
        """Raises: UserError when the group cannot be had, with what to do."""
        self._container = -1
        self._group = -1
        self._has_iommu = (dev / str(group)).exists()
        path = dev / (str(group) if self._has_iommu else f"noiommu-{group}")
        try:
            self._group = _open(path)
            self._container = _open(dev / "vfio")
            if fcntl.ioctl(self._container, vfio.GET_API_VERSION) != vfio.API_VERSION:
                raise UserError(f"{dev / 'vfio'} speaks another version of VFIO than this program")
            status = vfio.ask(self._group, vfio.GROUP_GET_STATUS, vfio.GROUP_STATUS.pack(vfio.GROUP_STATUS.size, 0))
            if not vfio.GROUP_STATUS.unpack(status)[1] & vfio.GROUP_VIABLE:
                raise UserError(
                    f"function {address}: others of its IOMMU group {group} are bound to drivers of the host "
                    "('vvupipe device list' names them)"
                )
            fcntl.ioctl(self._group, vfio.GROUP_SET_CONTAINER, self._container.to_bytes(4, "little"))
            kind = vfio.TYPE1V2_IOMMU if self._has_iommu else vfio.NOIOMMU_IOMMU
            fcntl.ioctl(self._container, vfio.SET_IOMMU, kind)
            name = bytearray(f"{address}\0".encode())  # for an immutable one fcntl gives no integer
            self.device_fd: int = fcntl.ioctl(self._group, vfio.GROUP_GET_DEVICE_FD, name)
            os.set_inheritable(self.device_fd, False)
        except OSError as error:
            self.close()
            raise UserError(f"function {address} cannot be had by VFIO: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def map(self, iova: int, address: int, size_bytes: int) -> None:
        """See DmaDomain."""
        if not self._has_iommu:
            raise TransportError(
                "no DMA in VFIO's no-IOMMU mode: give this VM an IOMMU (kernel parameter intel_iommu=on)"
            )
        flags = vfio.DMA_READ | vfio.DMA_WRITE
        request = vfio.DMA_MAP.pack(vfio.DMA_MAP.size, flags, address, iova, size_bytes)
        vfio.ask(self._container, vfio.IOMMU_MAP_DMA, request)

    def unmap(self, iova: int, size_bytes: int) -> None:
        """See DmaDomain."""
        request = vfio.DMA_UNMAP.pack(vfio.DMA_UNMAP.size, 0, iova, size_bytes)
        vfio.ask(self._container, vfio.IOMMU_UNMAP_DMA, request)

    def close(self) -> None:
        """See DmaDomain."""
        for fd in (self._group, self._container):
            if fd >= 0:
                os.close(fd)
        self._group = self._container = -1


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: load the module vfio-pci (modprobe vfio-pci)") from None
    except PermissionError:
        raise UserError(f"{path} may not be used by this user: run as root or change its owner") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(f"{path} is in use by another process: stop that one first") from None
        raise
