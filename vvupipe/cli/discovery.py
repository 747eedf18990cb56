"""`vvupipe device discovery`: the file by which management software finds the back-end."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import click

from vvupipe.cli import conventions
from vvupipe.errors import UserError


@click.command("discovery")
@click.option(
    "--install", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help=f"Write DIR/{conventions.DISCOVERY_FILE}; DIR is /etc/qemu/vhost-user or ~/.config/qemu/vhost-user.",
)  # fmt: skip
def discovery(folder: Path | None) -> None:
    """Print the JSON by which management software finds vvupipe-block, or install it."""
    text = json.dumps(conventions.discovery(_installed_program()), indent=2)
    if folder is None:
        click.echo(text)
        return
    path = folder / conventions.DISCOVERY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(path)


def _installed_program() -> Path:
    """The program of the installation that runs now, rather than another one in PATH. Raises: UserError."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        found = shutil.which(conventions.BLOCK_PROGRAM, path=folder)
        if found:
            return Path(found)
    found = shutil.which(conventions.BLOCK_PROGRAM)
    if not found:
        raise UserError(f"{conventions.BLOCK_PROGRAM} is not installed: install vvupipe with pip first")
    return Path(found).absolute()
