"""Too few files, more bytes than any message has, a function that breaks its queues."""

import asyncio
import os
import resource
import struct

import psutil
import pytest

from tests.mock import frontend as fe
from tests.vvupipe.vvu.device_vm import ADDRESS
from tests.vvupipe.vvu.test_vvu_path import ask, connect, opened, run, tell
from vvupipe.errors import TransportError, UserError
from vvupipe.vhost_user.payloads import pack_u64
from vvupipe.vm.vvu_transport import open_vvu_transport


def test_answers_still_go_out_after_no_file_could_be_opened(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            question = await tell(frontend, connection, fe.GET_INFLIGHT_FD, bytes(24))
            area = struct.pack("=QQHH4x", 4096, 0, 1, 128)
            limits = resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                await connection.send(question.reply(area))
                assert await asyncio.to_thread(frontend.receive) == (fe.GET_INFLIGHT_FD, 5, area)  # without a file
            finally:
                resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, limits)
            assert await ask(frontend, connection, fe.GET_FEATURES, pack_u64(1)) == pack_u64(1)
            frontend.close()

    run(test)


def test_driver_for_which_too_few_files_may_be_open(vm):
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"needs 67 eventfds .*: raise ulimit -n"):
            open_vvu_transport(ADDRESS, vm.name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


def test_driver_that_sends_more_than_any_message_is(vm):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            driver = transport.driver
            address_space = psutil.Process(vm.process.pid).memory_info().vms
            room = address_space + (32 << 20)
            resource.prlimit(vm.process.pid, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
            everything = (driver._memory.gpa, driver._memory.size_bytes)
            head = driver._queues[1].add([everything] * 200, [])
            driver._tx_buffers[head] = driver._tx_free.pop()
            driver._notify(1)
            assert await ask(frontend, connection, fe.GET_FEATURES, pack_u64(1)) == pack_u64(1)
            assert f"sent {200 * everything[1]} bytes" in vm.log()
            frontend.close()

    run(test)


@pytest.mark.parametrize("queue", [0, 1])
def test_function_that_gives_back_what_it_does_not_have(vm, queue):
    async def test():
        with opened(vm) as transport:
            frontend, connection = await connect(vm, transport)
            question = await tell(frontend, connection, fe.GET_FEATURES)
            rings = transport.driver._queues[queue]._rings
            used = transport.driver._queues[queue]._last_used
            rings.used_elem[2 * used] = 200
            rings.used_u16[1] = used + 1
            with pytest.raises(TransportError, match="gave back chain 200"):
                await (connection.send(question.reply(pack_u64(1))) if queue else connection.receive())
            frontend.close()

    run(test)
