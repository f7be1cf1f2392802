"""Loads the modules that fill the table of instructions."""

from . import (  # noqa: F401
    instructions_arithmetic,
    instructions_control,
    instructions_conversion,
    instructions_matrix,
    instructions_mbarrier,
    instructions_memory,
)
