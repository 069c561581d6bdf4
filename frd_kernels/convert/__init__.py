"""Converts models and checkpoints of other projects to `PDC2d`, and `PDC2d` to plain convolutions.

`fold` converts a model to plain convolutions for deployment. `replace_pdc` replaces the PDC layers of PiDiNet, CDCN
and DEA-Net in a model by `PDC2d`. The other functions convert checkpoints, in both directions.
"""

from .checkpoints import (
    from_cdcn,
    from_deconv,
    from_pidinet,
    from_plain_weight,
    pidinet_kinds,
    to_cdcn,
    to_deconv,
    to_pidinet,
)
from .fold import PlainBlock2d, fold
from .replace import replace_pdc
from .report import Entry, Report

__all__ = [
    "Entry",
    "PlainBlock2d",
    "Report",
    "fold",
    "from_cdcn",
    "from_deconv",
    "from_pidinet",
    "from_plain_weight",
    "pidinet_kinds",
    "replace_pdc",
    "to_cdcn",
    "to_deconv",
    "to_pidinet",
]
