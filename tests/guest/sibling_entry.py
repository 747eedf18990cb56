"""Runs one QEMU sibling for a test: `python sibling_entry.py JSON`, the fields of QemuSiblingOptions in JSON."""

import asyncio
import json
import sys
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.vm.qemu_sibling import QemuSiblingOptions, VhostUserDisk, run_qemu_sibling


def main() -> int:
    fields = json.loads(sys.argv[1])
    disks = tuple(
        VhostUserDisk(
            **{**disk, "socket_path": Path(disk["socket_path"]), "properties": tuple(disk.get("properties", ()))}
        )
        for disk in fields.pop("vhost_user_blk")
    )
    for name in ("kernel", "initrd"):
        if fields.get(name) is not None:
            fields[name] = Path(fields[name])
    fields["params"] = tuple(fields.get("params", ()))
    try:
        return asyncio.run(run_qemu_sibling(QemuSiblingOptions(vhost_user_blk=disks, **fields)))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
