"""The server's end of the mailbox: register accesses of the driver, done on the function that is carried."""

from __future__ import annotations

import errno
import logging
import os

from vvupipe.ivshmem import layout
from vvupipe.vfio.served_function import ServedFunction

log = logging.getLogger(__name__)


class Mailbox:
    """Answers requests in `memory` (the whole shared memory), which its other end may change at any time."""

    def __init__(self, function: ServedFunction, memory: memoryview) -> None:
        self._function = function
        start = layout.MAILBOX_OFFSET
        self._words = memory[start : start + layout.DATA].cast("I")
        self._head = memory[start : start + layout.DATA]
        self._data = memory[start + layout.DATA : start + layout.DATA + layout.DATA_BYTES]

    def answer(self) -> bool:
        """Do the request that waits, if one does. Returns whether there was one."""
        asked = self._words[layout.ASKED // 4]
        if asked == self._words[layout.ANSWERED // 4]:
            return False
        request = bytes(self._head[layout.REQUEST : layout.REQUEST + layout.REQUEST_FORMAT.size])
        operation, region, offset, count, _ = layout.REQUEST_FORMAT.unpack(request)
        try:
            status, value = 0, self._perform(operation, region, offset, count)
        except OSError as error:
            status, value = error.errno or errno.EIO, 0
        except Exception as error:  # nothing that the guest writes may end the server
            log.error("%s: operation %d on region %d: %r", self._function.name, operation, region, error)
            status, value = errno.EIO, 0
        answer = layout.ANSWER_FORMAT.pack(status, 0, value)
        self._head[layout.ANSWER : layout.ANSWER + len(answer)] = answer
        self._words[layout.ANSWERED // 4] = asked
        return True

    def _perform(self, operation: int, region: int, offset: int, count: int) -> int:
        if operation == layout.OPERATION_RESET:
            self._function.reset()
            return 0
        size = self._function.region(region).size_bytes
        if operation == layout.OPERATION_REGION_SIZE:
            return size
        if count > layout.DATA_BYTES or offset + count > size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if operation == layout.OPERATION_READ:
            self._data[:count] = self._function.read(region, offset, count)
        elif operation == layout.OPERATION_WRITE:
            self._function.write(region, offset, bytes(self._data[:count]))
        else:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return count

    def close(self) -> None:
        """Let go of the memory."""
        for view in (self._words, self._head, self._data):
            view.release()
