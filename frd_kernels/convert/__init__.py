"""What people have, brought to `PDC2d`, and `PDC2d` brought to plain convolutions.

`fold` makes a model of plain convolutions for deployment, `replace_pdc` puts `PDC2d` into a live model that
holds the PDC layers of PiDiNet, CDCN or DEA-Net, and the others convert checkpoints, both ways.
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
