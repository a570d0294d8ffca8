"""``florence-fast info``: versions, devices, and the backend of each op on each device."""

from typing import Annotated

import typer
from rich.table import Table

from florence_fast.cli.usage import refusals_as_wrong_usage
from florence_fast.console import console
from florence_fast.strict_json import format_json


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report or a script.")] = False,
) -> None:
    """Print versions, devices, variables and backends.

    For every op, the backend that it would use here, and every reason against each of the others.
    """
    from florence_fast.info import collect

    with refusals_as_wrong_usage():
        facts = collect()
    if as_json:
        print(format_json(facts, indent=2))
        return
    terminal = console()
    for title, rows in facts.items():
        table = Table(*rows[0], title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for row in rows:
            table.add_row(*("; ".join(value) if isinstance(value, list) else str(value) for value in row.values()))
        terminal.print(table, "")
