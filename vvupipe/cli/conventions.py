"""What management software expects of a back-end program.

QEMU, docs/interop/vhost-user.rst ("Backend program conventions") and docs/interop/vhost-user.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

BLOCK_PROGRAM = "vvupipe-block"
DISCOVERY_FILE = "50-vvupipe-block.json"

#: VHostUserBackendCapabilities of the schema.
CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def print_capabilities() -> None:
    """Answer --print-capabilities, on standard output."""
    click.echo(json.dumps(CAPABILITIES, indent=2))


def discovery(binary: Path) -> dict[str, str]:
    """VhostUserBackend of the schema: what a file in share/qemu/vhost-user/ says about the program `binary`.

    Raises: ValueError when the path is not absolute, as the schema wants it.
    """
    if not binary.is_absolute():
        raise ValueError(f"{binary} is not an absolute path")
    return {"description": "vvupipe block back-end", "type": "block", "binary": str(binary)}
