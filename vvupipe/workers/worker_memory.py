"""The front-end's memory as a worker has it: mapped regions, translations, the dirty-page log."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.region_table import COLUMNS
from kernels.virtio_layout import ACCESS_BOTH, ACCESS_REFUSED
from vvupipe.errors import WorkerError
from vvupipe.memory.iotlb import Iotlb, Translation
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import commands

Table = npt.NDArray[np.uint64]


class WorkerMemory:
    """Maps what commands bring. `table`: the memory table; `translations`: an IOTLB's (kernels.region_table)."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping] = {}
        self._iotlb = Iotlb()
        self._log: Mapping | None = None
        self.table: Table = np.zeros((0, COLUMNS), np.uint64)
        self.translations: Table = np.zeros((0, COLUMNS), np.uint64)

    def map(self, fields: commands.Fields, fds: list[int]) -> None:
        """Map regions that a later table uses: `regions` of (id, size, file offset), a file for each.

        Those that are mapped already, under the same number, stay where they are: a table may name them.

        Raises: WorkerError, with nothing mapped.
        """
        added: dict[int, Mapping] = {}
        try:
            for (number, size_bytes, fd_offset), fd in zip(fields["regions"], fds, strict=True):
                if number not in self._mappings:
                    added[number] = Mapping(fd, size_bytes, fd_offset)
        except (OSError, ValueError) as error:
            for mapping in added.values():
                mapping.close()
            raise WorkerError(f"cannot map the front-end's memory: {error}") from error
        self._mappings |= added

    def set_table(self, fields: commands.Fields) -> list[Mapping]:
        """Replace the memory table: `regions` of (id, gpa, uva). Returns mappings that no row uses: close them.

        Raises: WorkerError when one of them is not mapped.
        """
        rows = [(gpa, number, uva) for number, gpa, uva in fields["regions"]]
        if lacking := {number for _, number, _ in rows} - self._mappings.keys():
            raise WorkerError(f"{len(lacking)} regions of the memory table are not mapped")
        used = {number: self._mappings[number] for _, number, _ in rows}
        self.table = np.array(
            [
                (gpa, used[number].size_bytes, used[number].address, uva, ACCESS_BOTH)
                for gpa, number, uva in sorted(rows)
            ],
            np.uint64,
        ).reshape(-1, COLUMNS)
        unused = [mapping for number, mapping in self._mappings.items() if number not in used]
        self._mappings = used
        self._translate()
        return unused

    def takes_away(self, fields: commands.Fields) -> bool:
        """Whether a change of translations leads somewhere else what requests that are under way may use."""
        return bool(fields.get("clear") or fields.get("invalidate")) or any(
            self._iotlb.replaces(Translation(*entry)) for entry in fields.get("update", ())
        )

    def change_translations(self, fields: commands.Fields) -> None:
        """`clear`, then `invalidate`: (iova, size) each, then `update`: (iova, size, uva, access) each."""
        if fields.get("clear"):
            self._iotlb.clear()
        for iova, size_bytes in fields.get("invalidate", ()):
            self._iotlb.invalidate(iova, size_bytes)
        for entry in fields.get("update", ()):
            self._iotlb.update(Translation(*entry))
        self._translate()

    def _translate(self) -> None:
        """Make `translations`; neighbours that lie together here too become one row."""
        rows: list[list[int]] = []
        for entry in self._iotlb:
            for iova, size_bytes, address, uva, access in self._here(entry):
                last = rows[-1] if rows else None
                if last and last[0] + last[1] == iova and last[2] + last[1] == address and last[4] == access:
                    last[1] += size_bytes
                else:
                    rows.append([iova, size_bytes, address, uva, access])
        self.translations = np.array(rows, np.uint64).reshape(-1, COLUMNS)

    def _here(self, entry: Translation) -> list[tuple[int, int, int, int, int]]:
        """The rows of one translation, cut where memory regions end; what is in none has no row."""
        if entry.access & ACCESS_REFUSED:
            return [(entry.iova, entry.size_bytes, 0, 0, entry.access)]
        rows = []
        for _, size, address, uva, _ in sorted(self.table.tolist(), key=lambda row: row[3]):
            start = max(entry.uva, uva)
            end = min(entry.uva + entry.size_bytes, uva + size)
            if start < end:
                rows.append((entry.iova + start - entry.uva, end - start, address + start - uva, start, entry.access))
        return rows

    def map_log(self, fields: commands.Fields, fds: list[int]) -> tuple[int, int]:
        """Map the dirty-page log: `size_bytes` (0: none) at `offset` of the first file. (its address, its bytes).

        The former one is unmapped: point the rings elsewhere before they run again. Raises: WorkerError.
        """
        try:
            new = Mapping(fds[0], int(fields["size_bytes"]), int(fields["offset"])) if fields["size_bytes"] else None
        except (OSError, ValueError) as error:
            raise WorkerError(f"cannot map the dirty-page log: {error}") from error
        if self._log:
            self._log.close()
        self._log = new
        return (new.address, new.size_bytes) if new else (0, 0)
