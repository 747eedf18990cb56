"""How long, and at what pace, a back-end is tried again that leaves before it has done anything."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from vvupipe.errors import UserError

__all__ = ["Patience"]

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0


class Patience:
    """Tries of the back-end at `path`, for `timeout_s` from now on (None: for ever), with pauses that grow."""

    def __init__(self, path: Path, timeout_s: float | None) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None: no end."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def pause(self) -> None:
        """The back-end left: wait before the next try. Raises: UserError when there is no time for one."""
        left_s = self.left_s
        if left_s is not None and left_s <= self._pause_s:
            await asyncio.sleep(left_s)
            raise UserError(
                f"the back-end at {self._path} hung up during the set-up, again and again for {self._timeout_s:.3g} s: "
                "see what it says"
            )
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
