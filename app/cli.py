"""The ``accordion`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from app.commands import CommandError, elastic, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0 done, 1 the answer is no, 2 it could not be carried out."""
    parser = argparse.ArgumentParser(prog="accordion", description="Operate an Accordion application on Ray.")
    commands = parser.add_subparsers(title="commands", required=True)
    plan.add(commands)
    elastic.add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except CommandError as error:
        print(f"accordion: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
