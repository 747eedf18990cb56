"""`vvupipe` whose --vfio is a mocked ivshmem device: `python ivshmem_backend.py FD DEVICES ARGUMENTS...`."""

import pathlib
import socket
import sys

from mock.ivshmem_device import IvshmemDevice

from vvupipe.cli.main import main
from vvupipe.ivshmem.driver_function import open_ivshmem
from vvupipe.pci.address import PciAddress
from vvupipe.vm import vvu_transport
from vvupipe.vvu.driver import VvuDriver
from vvupipe.vvu.driver_transport import VvuTransport
from vvupipe.vvu.memory_windows import MemoryWindows


def opener(guest_fd, devices):
    """What stands in for open_vvu_transport."""

    def open_mock(address, *_, **__):
        with socket.socket(fileno=guest_fd) as guest:
            _, fds, _, _ = socket.recv_fds(guest, 1, 1)
        function, memory = open_ivshmem(IvshmemDevice(socket.socket(fileno=fds[0])))
        driver = VvuDriver(function, memory, MemoryWindows(PciAddress.parse(address), devices))
        driver.start()
        return VvuTransport(driver)

    return open_mock


if __name__ == "__main__":
    vvu_transport.open_vvu_transport = opener(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
    del sys.argv[1:3]
    main()
