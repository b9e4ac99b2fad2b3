"""Write a page that is made from the code, or check that the one in the repository is fresh."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def run(render: Callable[[], str], page: Path, script: str, what: str, argv: list[str] | None = None) -> int:
    """Command line of a script that makes one page: ``--check`` compares instead of writing.

    Args:
        render: makes the text.
        page: where it belongs.
        script: its path in the repository, for the message.
        what: first line of the help.
        argv: arguments, default: the process's.

    Returns:
        Exit status: 1 where ``--check`` finds another text.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    parser.add_argument("--out", type=Path, default=page, help=f"the page (default: docs/{page.name})")
    args = parser.parse_args(argv)
    text = render()
    if not args.check:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        return 0
    if args.out.is_file() and args.out.read_text(encoding="utf-8") == text:
        return 0
    print(f"{args.out} is stale: run python {script}", file=sys.stderr)
    return 1
