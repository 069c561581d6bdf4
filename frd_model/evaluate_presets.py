"""Protocols of evaluation by name: at which size, at which threshold, and what enters the means.

Imports neither torch nor OpenCV, so that `frd evaluate --help` comes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Not a policy of `predict`: the photo is scaled to the scoring size, and the map is not scaled back.
SCALED = "scaled"
# Maps from files, whatever the network saw.
SAVED = "saved"


@dataclass(frozen=True)
class EvalPreset:
    """One protocol. Its means are over the forged photos: untouched ones have no pixel metric and bring false alarms.

    Attributes:
        name: what results call it.
        size: a policy of `frd_model.predict` ("auto", "whole", "tiles", "resize"); "scaled": the photo is resized
            bilinearly to `scored_at` and goes through the network in one piece; "saved": the maps come from files.
        scored_at: side of the square at which maps and masks are compared, the mask resized by nearest neighbour; None
            is the photo's own size.
        main: the metric that the protocol reports.
        table: the metrics that it gives to Table 1, by its halves "optimal" and "fixed".
        threshold: of the metrics with a fixed threshold, and of a photo's score.
        note: how the code that the protocol is named after differs; "" for not at all.
    """

    name: str
    size: str
    scored_at: int | None
    main: str
    table: Mapping[str, str]
    threshold: float = 0.5
    note: str = ""

    def describe(self) -> str:
        """The rules in one line."""
        side = self.scored_at
        sizes = {SCALED: f"photo resized to {side} (bilinear)", SAVED: "saved maps"}
        size = sizes.get(self.size, f"size policy {self.size}")
        scored = f"scored at {side} x {side} (mask nearest)" if side else "scored at the photo's own size"
        rule = "the best threshold of each photo" if "_opt" in self.main else f"threshold {self.threshold:g}"
        band = "border band left out" if self.main.endswith("_band") else "all pixels"
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {size}, {scored}; {self.main} at {rule}, {band}; mean over forged photos{note}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a result file has them."""
        return dataclasses.asdict(self) | {"table": dict(self.table)}


EVAL_PRESETS: dict[str, EvalPreset] = {
    preset.name: preset
    for preset in (
        # Whole photos or tiles as `frd predict` has them, all pixels.
        EvalPreset("original", "auto", None, "f1", {"optimal": "permute_f1_opt", "fixed": "permute_f1"}),
        # CAT-Net's protocol as Table 1's right half quotes it.
        EvalPreset("cat-fixed", "whole", None, "permute_f1", {"fixed": "permute_f1"}),
        # TruFor's evaluation code, which leaves the border of the mask out.
        EvalPreset("trufor-opt", "whole", None, "permute_f1_opt_band", {"optimal": "permute_f1_opt_band"}),
        # IMDL-BenCo's `--if_resizing`; Table 1's left half as FRD-Net's own code has it: at 512, with the band.
        EvalPreset(
            "benco-512",
            SCALED,
            512,
            "f1",
            {"optimal": "permute_f1_opt_band", "fixed": "permute_f1"},
            note="IMDL-BenCo counts untouched photos too, as 0",
        ),
    )
}


def eval_preset(name: str, *, size: str | None = None, threshold: float | None = None) -> EvalPreset:
    """The preset of that name, with what was given instead of its own.

    Raises ValueError for an unknown name, and for a size policy where the preset fixes the scoring size.
    """
    if name not in EVAL_PRESETS:
        raise ValueError(f"preset must be one of {', '.join(EVAL_PRESETS)}, got {name!r}")
    preset = EVAL_PRESETS[name]
    if size is not None and preset.scored_at is not None:
        raise ValueError(f"size must be left out with preset {name}, which fixes it, got {size!r}")
    changes: dict[str, Any] = {"size": size, "threshold": threshold}
    return dataclasses.replace(preset, **{k: v for k, v in changes.items() if v is not None})
