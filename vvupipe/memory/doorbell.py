"""A doorbell: how one side wakes the other."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(slots=True)
class Doorbell:
    """Rung by writing an 8-byte 1 to an eventfd. The holder owns `fd`."""

    fd: int

    def ring(self) -> None:
        """Ring it from the control plane."""
        try:
            os.write(self.fd, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:
            return  # a full counter already wakes the other side

    def close(self) -> None:
        """Close the eventfd."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
