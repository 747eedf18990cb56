"""`vvupipe device list`: the functions that a back-end could drive."""

from __future__ import annotations

import json

import click

from vvupipe.cli.parameters import json_option


@click.command("list")
@json_option
def list_functions(as_json: bool) -> None:
    """List the VVU functions that could be driven from here, and what stands in the way of each."""
    from vvupipe.vm.function_list import all_functions

    functions = all_functions()
    if as_json:
        for function in functions:
            click.echo(json.dumps(function.as_dict()))
        return
    if not functions:
        click.echo("no VVU function here: start a device VM (vvupipe run --vvu-proxy SOCK), or look inside one")
    width = max((len(function.where) for function in functions), default=0)
    for function in functions:
        click.echo(f"{function.address}  {function.identity}  {function.where:{width}}  {function.state}")
        click.echo(f"    {function.command}" if function.command else "    nothing to type yet")
