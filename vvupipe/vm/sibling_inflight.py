"""The embedded sibling's inflight region: what a back-end notes of its requests, so that the next one can go on.

The region is asked for once and outlives back-ends (docs/interop/vhost-user.rst, "Inflight I/O tracking"). With it the
vrings stay as they are when a back-end dies; without it they begin anew, with a new region.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.virtio_layout import F_RING_EVENT_IDX, F_RING_INDIRECT_DESC
from vvupipe.errors import Disconnected, Refused
from vvupipe.vhost_user.frontend import Frontend
from vvupipe.vhost_user.frontend_vrings import InflightRegion
from vvupipe.vhost_user.messages import ProtocolFeature

__all__ = ["LeftAtSize", "SiblingInflight"]

#: What says how a ring is to be read: one that goes on must not change it.
_RING_FEATURES = F_RING_EVENT_IDX | F_RING_INDIRECT_DESC


class LeftAtSize(Disconnected):
    """The back-end left when it was told how large the vrings are: by chance, or because they are too large."""


class SiblingInflight:
    """Owns the region of `num_vrings` vrings of `queue_size` entries. say: gets a line when it is lost."""

    def __init__(self, num_vrings: int, queue_size: int, say: Callable[[str], None]) -> None:
        self._num_vrings = num_vrings
        self._queue_size = queue_size
        self._say = say
        self._region: InflightRegion | None = None
        self._handed_on = False  # the present back-end is not the one that made the region
        self._features = 0  # those of _RING_FEATURES that the vrings began with

    async def hand_over(self, frontend: Frontend) -> bool:
        """Give the back-end its region, before any vring starts.

        True: it has what the one before left, so that the vrings must go on where they stand. False: it knows nothing
        of them, and they must begin anew. Raises: LeftAtSize, Disconnected, ProtocolError.
        """
        if ProtocolFeature.INFLIGHT_SHMFD not in frontend.protocol_features:
            self._lose("the back-end does not track inflight requests any more")
            return False
        features = frontend.taken_features & _RING_FEATURES
        if self._features != features:
            self._lose("the back-end offers other features of rings than the one before")
            self._features = features
        self._handed_on = self._region is not None
        if self._region is not None:
            try:
                await frontend.set_inflight(self._region)
                if ProtocolFeature.REPLY_ACK not in frontend.protocol_features:
                    # It can refuse by hanging up only; an answer to something else tells that it did not.
                    await frontend.get_protocol_features()
            except Refused:
                self._lose("the back-end refused the inflight region of the one before")
            else:
                return True
        self._handed_on = False
        try:
            self._region = await self._get(frontend)
            await frontend.set_inflight(self._region)
        except Refused as error:
            self.forget()
            self._say(f"{error}: it goes on without one")
        return False

    async def _get(self, frontend: Frontend) -> InflightRegion:
        try:
            return await frontend.get_inflight(self._num_vrings, self._queue_size)
        except Disconnected as error:
            raise LeftAtSize(str(error)) from error

    def left_early(self) -> None:
        """The back-end left before its vrings ran. The next one gets another region.

        With what the one before left, leaving may be its way to refuse it. With a new one, not every vring had begun.
        """
        if self._handed_on:
            self._lose("the back-end left while it was given vrings that go on")
        self.forget()

    def _lose(self, reason: str) -> None:
        if self._region is not None:
            self._say(f"{reason}: the vrings begin anew")
            self.forget()

    def forget(self) -> None:
        """Close the region. Harmless when called again."""
        if self._region is not None:
            self._region.close()
            self._region = None
