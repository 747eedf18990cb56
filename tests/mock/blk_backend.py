"""A vhost-user-blk back-end in plain Python: its own encoding (struct), one thread, able to misbehave on purpose."""

import array
import mmap
import os
import select
import socket
import struct
import threading

from tests.mock.blk_device import BlkDevice
from tests.mock.frontend import (
    CONFIG,
    F_BLK_FLUSH,
    F_BLK_MQ,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL_FEATURES,
    F_VERSION_1,
    GET_CONFIG,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_VRING_BASE,
    HEADER,
    INFLIGHT_SHMFD,
    MQ,
    NEED_REPLY,
    REPLY,
    REPLY_ACK,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
)
from tests.mock.inflight_region import SplitRegion, part_bytes

ALL_FEATURES = F_PROTOCOL_FEATURES | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_BLK_FLUSH | F_BLK_MQ
ALL_PROTOCOL = MQ | REPLY_ACK | CONFIG
WITH_INFLIGHT = ALL_PROTOCOL | INFLIGHT_SHMFD


class _Vring:
    def __init__(self):
        self.size, self.parts, self.kick, self.call, self.err, self.device = 0, None, -1, -1, -1, None


class BlkBackend:
    """Listens on `path` from `start` to `stop`. `refused`: requests that get a failure. `muted`: get no answer.

    `answers` replaces the payload of a reply. `prepare(device)` sets a BlkDevice's hooks when its vring starts.
    `after(requests)` is called after each turn and may return "leave" to drop the connection, without a word.
    `bases`: what SET_VRING_BASE told. `region`: the inflight region of this connection (a mapping), if it has one.
    """

    def __init__(self, path, image=None, features=ALL_FEATURES, protocol=ALL_PROTOCOL, queues=2):
        self.path, self.image = str(path), bytearray(1 << 20) if image is None else image
        self.features, self.protocol, self.queues = features, protocol, queues
        self.refused, self.muted, self.answers = set(), set(), {}
        self.prepare = lambda device: None
        self.after = lambda requests: None
        self.requests, self.connections, self.need_reply, self.served = [], 0, [], 0
        self.taken_features = self.taken_protocol = None
        self.bases, self.region = [], None
        self.error = None
        self._stop_r, self._stop_w = os.pipe()
        self._thread = threading.Thread(target=self._run)

    def start(self):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread.start()
        return self

    def wait(self, timeout_s):
        """Wait until it ended by itself (`end`), or with an error."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()

    def end(self):
        """Listen to nobody else; what is being served goes on."""
        os.write(self._stop_w, b"x")

    def stop(self):
        os.write(self._stop_w, b"x")
        self._thread.join(10)
        os.close(self._stop_r)
        os.close(self._stop_w)
        self._listener.close()
        if self.error:
            raise self.error

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def config(self):
        sectors = len(self.image) // 512
        return struct.pack("<QII4sI8sBBH", sectors, 0, 0, bytes(4), 512, bytes(8), 0, 0, self.queues).ljust(64, b"\0")

    def _run(self):
        try:
            while self._stop_r not in select.select([self._listener, self._stop_r], [], [])[0]:
                with self._listener.accept()[0] as connection:
                    self.connections += 1
                    if self._session(connection) == "stop":
                        return
        except BaseException as error:
            self.error = error
            self._listener.close()  # nobody is to wait for a back-end that failed

    def _session(self, connection):
        self._vrings = [_Vring() for _ in range(self.queues)]
        self._ram = self.region = None
        try:
            while True:
                kicks = {vring.kick: vring for vring in self._vrings if vring.device}
                ready = select.select([connection, self._stop_r, *kicks], [], [])[0]
                if self._stop_r in ready:
                    return "stop"
                if connection in ready and not self._message(connection):
                    return None
                for fd in ready:
                    if fd in kicks and kicks[fd].device:
                        os.eventfd_read(fd)
                        self.served += kicks[fd].device.serve()
                        os.eventfd_write(kicks[fd].call, 1)
                        if self.after(self.served) == "leave":
                            return None
        finally:
            for vring in self._vrings:
                for fd in (vring.kick, vring.call, vring.err):
                    if fd >= 0:
                        os.close(fd)

    def ring_err(self, index):
        os.eventfd_write(self._vrings[index].err, 1)

    def _exactly(self, connection, count):
        data, fds = b"", array.array("i")
        while len(data) < count:
            chunk, ancillary, _, _ = connection.recvmsg(count - len(data), 1024)
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            if not chunk:
                return None, []
            data += chunk
        return data, list(fds)

    def _message(self, connection):
        head, fds = self._exactly(connection, HEADER.size)
        if head is None:
            return False
        request, flags, size = HEADER.unpack(head)
        body, more = self._exactly(connection, size)
        self.requests.append(request)
        if flags & NEED_REPLY:
            self.need_reply.append(request)
        reply = self._handle(request, body, fds + more)
        if reply is None and flags & NEED_REPLY and (self.taken_protocol or 0) & REPLY_ACK:
            reply = struct.pack("=Q", int(request in self.refused))
        files = []
        if isinstance(reply, tuple):
            reply, files = reply[0], [reply[1]]
        reply = self.answers.get(request, reply)
        if reply is not None and request not in self.muted:
            socket.send_fds(connection, [HEADER.pack(request, 1 | REPLY, len(reply)) + reply], files)
        for fd in files:
            os.close(fd)
        return True

    def _handle(self, request, body, fds):
        if request == GET_FEATURES:
            return struct.pack("=Q", self.features)
        if request == GET_PROTOCOL_FEATURES:
            return struct.pack("=Q", self.protocol)
        if request == GET_QUEUE_NUM:
            return struct.pack("=Q", self.queues)
        if request == GET_CONFIG:
            offset, size, flags = struct.unpack_from("=III", body)
            return struct.pack("=III", offset, size, flags) + self.config()[offset : offset + size]
        if request == SET_FEATURES:
            (self.taken_features,) = struct.unpack("=Q", body)
        elif request == SET_PROTOCOL_FEATURES:
            (self.taken_protocol,) = struct.unpack("=Q", body)
        elif request == SET_MEM_TABLE:
            count, _, gpa, size, self._uva, offset = struct.unpack("=IIQQQQ", body)
            assert (count, gpa, offset, len(fds)) == (1, 0, 0, 1)
            self._ram = memoryview(mmap.mmap(fds[0], size))
            os.close(fds[0])
        elif request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            (index,) = struct.unpack("=Q", body)
            name = {SET_VRING_KICK: "kick", SET_VRING_CALL: "call", SET_VRING_ERR: "err"}[request]
            setattr(self._vrings[index], name, fds[0])
        elif request == SET_VRING_NUM:
            index, size = struct.unpack("=II", body)
            self._vrings[index].size = size
        elif request == GET_INFLIGHT_FD:
            _, _, queues, size = struct.unpack("=QQHH4x", body)
            total = queues * part_bytes(size)
            file = os.memfd_create("inflight")
            os.truncate(file, total)
            return struct.pack("=QQHH4x", total, 0, queues, size), file
        elif request == SET_INFLIGHT_FD:
            total, offset, _, self._region_size = struct.unpack("=QQHH4x", body)
            assert (offset, len(fds)) == (0, 1)
            if request not in self.refused:
                self.region = mmap.mmap(fds[0], total)
            os.close(fds[0])
        elif request == SET_VRING_BASE:
            self.bases.append(struct.unpack("=II", body))
        elif request == SET_VRING_ADDR:
            index, _, desc, used, avail, _ = struct.unpack("=IIQQQQ", body)
            self._vrings[index].parts = [part - self._uva for part in (desc, avail, used)]
        elif request == SET_VRING_ENABLE:
            index, on = struct.unpack("=II", body)
            vring = self._vrings[index]
            vring.device = None
            if on:
                event_idx = bool(self.taken_features & F_EVENT_IDX)
                part = SplitRegion(self.region, index * part_bytes(self._region_size)) if self.region else None
                vring.device = BlkDevice(self._ram, self.image, *vring.parts, vring.size, event_idx, inflight=part)
                self.prepare(vring.device)
        elif request == GET_VRING_BASE:
            index, _ = struct.unpack("=II", body)
            device, self._vrings[index].device = self._vrings[index].device, None
            return struct.pack("=II", index, device.last_avail if device else 0)
        return None
