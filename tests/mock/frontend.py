"""A vhost-user front-end in plain Python: its own encoding (struct), blocking, able to say anything."""

import array
import socket
import struct
import time

HEADER = struct.Struct("=III")
REPLY, NEED_REPLY = 4, 8

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 15, 16, 17
SET_VRING_ENABLE, GET_CONFIG, SET_CONFIG = 18, 24, 25
MQ, REPLY_ACK, CONFIG = 1 << 0, 1 << 3, 1 << 9
F_PROTOCOL_FEATURES, F_EVENT_IDX, F_INDIRECT, F_VERSION_1 = 1 << 30, 1 << 29, 1 << 28, 1 << 32
F_BLK_RO, F_BLK_FLUSH, F_BLK_MQ = 1 << 5, 1 << 9, 1 << 12
SET_LOG_BASE, SET_LOG_FD, SET_BACKEND_REQ_FD, IOTLB_MSG = 6, 7, 21, 22
GET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE, VRING_KICK = 31, 32, 34, 35
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS = 36, 37, 38, 39, 40
SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43
LOG_SHMFD, BACKEND_REQ, INFLIGHT_SHMFD, RESET_DEVICE_F = 1 << 1, 1 << 5, 1 << 12, 1 << 13
INBAND, MEM_SLOTS, STATUS, DEVICE_STATE = 1 << 14, 1 << 15, 1 << 16, 1 << 19
CHANNEL_IOTLB, CHANNEL_CONFIG_CHANGE, CHANNEL_CALL, CHANNEL_ERR = 1, 2, 4, 5
F_LOG_ALL, F_ACCESS_PLATFORM, F_PACKED, F_IN_ORDER = 1 << 26, 1 << 33, 1 << 34, 1 << 35
F_BLK_CONFIG_WCE, F_BLK_DISCARD, F_BLK_WRITE_ZEROES = 1 << 11, 1 << 13, 1 << 14
NOT_BY_DEFAULT = F_LOG_ALL | F_ACCESS_PLATFORM | F_PACKED  # what changes how everything else is said


class Refused(Exception):
    """The back-end answered REPLY_ACK with something other than zero."""


class ChannelEnd:
    """The front-end's end of the back-end channel."""

    def __init__(self, sock):
        self.sock = sock

    def receive(self):
        """(request, flags, payload) of the back-end's next request."""
        data = self.sock.recv(HEADER.size, socket.MSG_WAITALL)
        if len(data) < HEADER.size:
            raise ConnectionResetError("the back-end closed its channel")
        request, flags, size = HEADER.unpack(data)
        return request, flags, self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def acknowledge(self, request, code=0):
        self.sock.sendall(HEADER.pack(request, 1 | REPLY, 8) + struct.pack("=Q", code))

    def close(self):
        self.sock.close()


class Frontend:
    def __init__(self, path, timeout_s=20):
        deadline = time.monotonic() + timeout_s
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            try:
                self.sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self.sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.acks = False

    def close(self):
        self.sock.close()

    def send(self, request, payload=b"", fds=(), flags=1):
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([HEADER.pack(request, flags, len(payload)) + payload], ancillary)

    def _exactly(self, count):
        data = b""
        while len(data) < count:
            chunk = self.sock.recv(count - len(data))
            if not chunk:
                raise ConnectionResetError("the back-end closed the connection")
            data += chunk
        return data

    def receive(self):
        request, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return request, flags, self._exactly(size)

    def ask_for_fd(self, request, payload):
        """A request whose answer brings a file: (payload, fd)."""
        self.send(request, payload)
        data, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, 8)
        answered, flags, size = HEADER.unpack(data)
        assert (answered, flags) == (request, 1 | REPLY)
        body = self._exactly(size)
        assert len(fds) == 1
        return body, fds[0]

    def open_channel(self):
        """SET_BACKEND_REQ_FD; our end, which `ChannelEnd` reads."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.tell(SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        ours.settimeout(20)
        return ChannelEnd(ours)

    def ask(self, request, payload=b"", fds=()):
        """A request that has an answer of its own."""
        self.send(request, payload, fds)
        answered, flags, body = self.receive()
        assert (answered, flags) == (request, 1 | REPLY)
        return body

    def ask_u64(self, request, payload=b""):
        (value,) = struct.unpack("=Q", self.ask(request, payload))
        return value

    def tell(self, request, payload=b"", fds=()):
        """A request without an answer; with REPLY_ACK its success is checked."""
        if not self.acks:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, 1 | NEED_REPLY)
        answered, flags, body = self.receive()
        assert (answered, flags & 3) == (request, 1)
        assert flags & REPLY
        if struct.unpack("=Q", body) != (0,):
            raise Refused(request)

    def negotiate(self, features=None, protocol=MQ | REPLY_ACK | CONFIG):
        offered = self.ask_u64(GET_FEATURES)
        assert offered & F_PROTOCOL_FEATURES
        offered_protocol = self.ask_u64(GET_PROTOCOL_FEATURES)
        self.tell(SET_PROTOCOL_FEATURES, struct.pack("=Q", protocol & offered_protocol))
        self.acks = bool(protocol & offered_protocol & REPLY_ACK)
        self.tell(SET_OWNER)
        wanted = offered & ~NOT_BY_DEFAULT if features is None else features
        self.tell(SET_FEATURES, struct.pack("=Q", wanted))
        return offered, offered_protocol

    def set_memory(self, memory):
        body = struct.pack("=II", len(memory.regions), 0)
        for gpa, size_bytes, uva, _, fd_offset in memory.regions:
            body += struct.pack("=QQQQ", gpa, size_bytes, uva, fd_offset)
        self.tell(SET_MEM_TABLE, body, [region[3] for region in memory.regions])

    def set_addresses(self, index, ring):
        to_uva = ring.memory.to_uva
        parts = (to_uva(ring.desc), to_uva(ring.used), to_uva(ring.avail))
        self.tell(SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *parts, 0))

    def start_vring(self, index, ring, base=0, enable=True):
        self.tell(SET_VRING_NUM, struct.pack("=II", index, ring.size))
        self.set_addresses(index, ring)
        self.tell(SET_VRING_BASE, struct.pack("=II", index, base))
        self.tell(SET_VRING_ERR, struct.pack("=Q", index), [ring.err_fd])
        self.tell(SET_VRING_CALL, struct.pack("=Q", index), [ring.call_fd])
        self.tell(SET_VRING_KICK, struct.pack("=Q", index), [ring.kick_fd])
        if enable:
            self.enable(index, 1)

    def enable(self, index, on):
        self.tell(SET_VRING_ENABLE, struct.pack("=II", index, on))

    def stop_vring(self, index):
        """GET_VRING_BASE; returns the base."""
        got, base = struct.unpack("=II", self.ask(GET_VRING_BASE, struct.pack("=II", index, 0)))
        assert got == index
        return base

    def get_config(self, offset, size):
        body = self.ask(GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
        return body[12:]
