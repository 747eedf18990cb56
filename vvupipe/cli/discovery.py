"""`vvupipe device discovery`: the file by which libvirt finds the back-end (QEMU docs/interop/vhost-user.json)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from vvupipe.errors import UserError

FILE_NAME = "50-vvupipe-block.json"
PROGRAM = "vvupipe-block"


@click.command()
@click.option(
    "--install", type=click.Path(path_type=Path), metavar="DIR",
    help="Write the file there (/usr/share/qemu/vhost-user, or /etc/qemu/vhost-user) instead of printing it.",
)  # fmt: skip
def discovery(install: Path | None) -> int:
    """Describe the block back-end for programs that manage VMs."""
    text = json.dumps({"description": "vvupipe vhost-user-blk", "type": "block", "binary": str(_program())}, indent=2)
    if install is None:
        click.echo(text)
        return 0
    try:
        install.mkdir(parents=True, exist_ok=True)
        (install / FILE_NAME).write_text(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {install / FILE_NAME}: {error.strerror}") from error
    click.echo(str(install / FILE_NAME))
    return 0


def _program() -> Path:
    """The installed vvupipe-block. Raises: UserError when there is none."""
    beside = Path(sys.executable).parent / PROGRAM
    found = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if found is None:
        raise UserError(f"{PROGRAM} is not installed: install vvupipe first (pip install .)")
    return Path(found).absolute()
