"""The loop over a section's cells: it saves as it goes, and leaves out what a GPU has no memory for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Save = Callable[[dict], object]
Watch = Callable[[list], Iterable]


def conditions(occupancy: str) -> dict[str, Any]:
    """What all sections say of the machine."""
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "occupancy": occupancy}


def collect_rows(found: dict, cells: list, measure: Callable[[Any], dict], save: Save, watch: Watch) -> dict:
    """Adds a row a cell to found["rows"], or the cell's name to found["skipped"] where memory ran out; returns found.

    save: called with what there is after each cell, so that a run that is cut short leaves what it has. watch: what the
    cells are drawn through, such as a progress bar."""
    found["rows"] = []
    for cell in watch(cells):
        try:
            found["rows"].append(measure(cell))
        except torch.OutOfMemoryError:
            found.setdefault("skipped", []).append(cell.name)
            torch.cuda.empty_cache()
        save(found)
    return found
