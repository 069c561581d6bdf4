"""All cases: `cases()` for the CPU, `cases("cuda")` for a GPU."""

from __future__ import annotations

from . import cluster, icm, pdc, pdc_block
from .cases import Case

FAMILIES = (pdc, pdc_block, icm, cluster)


def cases(device: str = "cpu", only: str = "", short: bool = False) -> list[Case]:
    """The registered cases of a device whose name holds `only`; with `short` the essential ones."""
    found: list[Case] = []
    for family in FAMILIES:
        found += family.CASES if device == "cpu" else family.GPU_CASES
    return [case for case in found if only in case.name and (case.short or not short)]
