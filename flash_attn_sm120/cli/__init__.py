"""flash-attn-sm120, or python -m flash_attn_sm120. One file a subcommand; each has add(commands) and run(arguments)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flash_attn_sm120 import __version__
from flash_attn_sm120.cli import bench, cache, check, compile, doctor

COMMANDS = (doctor, check, bench, compile, cache)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DESCRIPTION = "The attention forward for NVIDIA SM120 and SM121 (GeForce RTX 50, RTX PRO 6000, DGX Spark)."
EPILOG = """\
start with:
  flash-attn-sm120 doctor                     is all there that a call needs?
  flash-attn-sm120 check                      are the results right on this GPU?
  flash-attn-sm120 bench                      how fast is it here, beside other packages?
  flash-attn-sm120 COMMAND --help             options and examples of a command

Exit codes: 0 all is well, 1 something isn't (the last line says what), 2 wrong command line, 130 interrupted.
Colours are for terminals only; NO_COLOR=1 turns them off there too.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="flash-attn-sm120",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a wrong command line exits with 2 at once."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
