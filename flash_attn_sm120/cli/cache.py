"""flash-attn-sm120 cache: the compiled kernels in the cache directory."""

from __future__ import annotations

import argparse
import time

from flash_attn_sm120.cli.words import add_command
from flash_attn_sm120.terminal import paint, table

DESCRIPTION = """\
Shows the compiled kernels in the cache directory, the one used last first, or removes them all.
"""
EPILOG = """\
examples:
  flash-attn-sm120 cache
  flash-attn-sm120 cache clear

Environment: FLASH_ATTN_SM120_CACHE_DIR, FLASH_ATTN_SM120_CACHE_SIZE (MB).
Exit code: 0 if there is a cache, 1 if there is none or it can't be written to.
"""


def add(commands: argparse._SubParsersAction) -> None:
    text = "show the compiled kernels in the cache directory, or remove them"
    parser = add_command(commands, "cache", text, DESCRIPTION, EPILOG)
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show", help="(default: show)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return clear_cache() if arguments.action == "clear" else show_cache()


def show_cache() -> int:
    """What is kept, the one used last first. 1 where there is no cache, with the reason."""
    from flash_attn_sm120 import cache

    kept, reason = cache.open_cache()
    if kept is None:
        print(paint(f"No cache: {reason}.", "red"))
        return 1
    entries = kept.entries()
    rows = []
    for entry in entries:
        key = entry.key or {}
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        rows.append((key.get("target", "-"), key.get("variant", "damaged"), f"{entry.size / 1024:.0f}", used))
    if rows:
        print(table(("target", "variant", "KB", "last used"), rows))
    total = sum(entry.size for entry in entries)
    print(f"{len(entries)} kernels, {total / 2**20:.1f} of {kept.limit / 2**20:.0f} MB, in {kept.folder}")
    return 0


def clear_cache() -> int:
    """Removes every kernel. 1 where there is no cache, or where it can't be written to."""
    from flash_attn_sm120 import cache

    kept, reason = cache.open_cache()
    if kept is not None:
        try:
            count, total = kept.clear()
        except OSError as error:
            reason = str(error)
        else:
            print(f"Removed {count} kernels, {total / 2**20:.1f} MB, from {kept.folder}.")
            return 0
    print(paint(f"Nothing removed: {reason}.", "red"))
    return 1
