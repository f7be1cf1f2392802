"""What the subcommands say in the same way: help pages and verdicts."""

from __future__ import annotations

import argparse

from flash_attn_sm120.terminal import paint


def add_command(
    commands: argparse._SubParsersAction, name: str, text: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A subcommand whose help keeps the line breaks of its description and epilog. text: its line in the list."""
    kind = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=text, description=description, epilog=epilog, formatter_class=kind)


def verdict(problem: str) -> int:
    """Prints the last line of a command and returns its exit code. problem: what is wrong, "" if nothing is."""
    print(paint(f"Not ready: {problem}.", "red") if problem else paint("Ready.", "green"))
    return 1 if problem else 0
