"""A device VM whose function is carried by ivshmem, without QEMU: `python ivshmem_vm.py SOCKET DEVICES GUEST_FD`.

The device's client end is waited for on the listening socket GUEST_FD, for one back-end after another.
"""

import asyncio
import logging
import os
import pathlib
import signal
import socket
import sys

from mock.window_placer import WindowPlacer

from vvupipe.vhost_user.socket_transport import SocketTransport
from vvupipe.vm.device_vm import start_relay
from vvupipe.vm.function_carriers import IvshmemCarrier
from vvupipe.vvu.function import VvuFunction
from vvupipe.vvu.proxy import VvuProxy


async def main(path, devices, guest_fd):
    relay = start_relay()
    function = VvuFunction("VVU function in a test", relay)
    carrier = IvshmemCarrier(function, relay, 0)
    listening = SocketTransport.listen(pathlib.Path(path))
    proxy = VvuProxy(function, listening, WindowPlacer(pathlib.Path(devices)))
    tasks = [asyncio.create_task(carrier.run()), asyncio.create_task(proxy.run())]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # As QEMU: the client's end goes to the guest process, here as a file descriptor.
    with socket.socket(fileno=guest_fd) as guest:
        socket.send_fds(guest, [b"x"], [carrier.inherited()[0]])
    await carrier.started()
    print('{"event": "ready"}', flush=True)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    listening.close()
    carrier.close()
    function.close()
    relay.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    os.environ["PYTHONUNBUFFERED"] = "1"
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
