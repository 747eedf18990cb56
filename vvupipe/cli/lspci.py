"""`vvupipe lspci`: the PCI bus of an embedded VM, as lspci shows it."""

from __future__ import annotations

import click

from vvupipe.cli.parameters import json_option


@click.command()
@click.option("--vm", metavar="NAME", help="The VM; needed when several run.")
@click.option("-s", "slot", metavar="SLOT", help="Only this function, as lspci -s has it: 00:10.0.")
@json_option
def lspci(vm: str | None, slot: str | None, as_json: bool) -> None:
    """List the PCI functions of an embedded VM."""
    import json

    from vvupipe.vm.device_vm import lspci_lines

    lines = lspci_lines(vm)
    if slot is not None:
        from vvupipe.pci.address import PciAddress

        wanted = PciAddress.parse(slot)
        lines = [line for line in lines if PciAddress.parse(line.split()[0]) == wanted]
    for line in lines:
        click.echo(json.dumps({"slot": line.split()[0], "text": line}) if as_json else line)
