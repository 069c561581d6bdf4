"""How a JPEG file was written: quantization tables and the quality they stand for, chroma subsampling, segments."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegPresets import presets

# Annex K of the JPEG standard, which libjpeg scales by its quality.
_LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 32),
)
# The mean difference of a step, as a part of the mean step, up to which a table counts as a standard one: other
# programs round the scaled tables differently.
STANDARD_DISTANCE = 0.02
_SUBSAMPLING = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (4, 1): "4:1:1",
    (1, 2): "4:4:0",
    (4, 2): "4:1:0",
}


@lru_cache(maxsize=1)
def _standard_tables() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The luminance and the chrominance table of libjpeg's qualities 1 to 100, each [100, 64]."""
    quality = np.arange(1, 101)[:, None]
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    luminance, chrominance = (
        np.clip((np.array(table) * percent + 50) // 100, 1, 255) for table in (_LUMINANCE, _CHROMINANCE)
    )
    return luminance, chrominance


def nearest_quality(table: list[int]) -> dict[str, Any]:
    """The libjpeg table nearest to 64 steps (row by row): kind, quality, and relative distance, 0 for the same."""
    values = np.array(table, np.int64)
    found: list[dict[str, Any]] = []
    for kind, tables in zip(("luminance", "chrominance"), _standard_tables(), strict=True):
        distance = np.abs(tables - values).sum(axis=1) / max(1, int(values.sum()))
        best = int(distance.argmin())
        found.append({"kind": kind, "quality": best + 1, "distance": round(float(distance[best]), 4)})
    return min(found, key=lambda fit: fit["distance"])


def describe(image: Image.Image) -> dict[str, Any]:
    """The facts of an opened JPEG (or MPO) image, ready for JSON."""
    opened: Any = image
    used = [opened.quantization[index] for index in sorted(opened.quantization)]
    fits = [nearest_quality(table) for table in used]
    standard = bool(fits) and all(fit["distance"] <= STANDARD_DISTANCE for fit in fits)
    qualities = {fit["quality"] for fit in fits}
    return {
        "quantization": [
            {"steps": list(table), "nearest": fit} for table, fit in zip(used, fits, strict=True)
        ],
        "tables": _name_tables(used, fits, standard),
        "quality": qualities.pop() if standard and len(qualities) == 1 else None,
        "subsampling": _subsampling(opened.layer),
        "progressive": bool(image.info.get("progressive")),
        "segments": dict(Counter(name for name, _ in opened.applist if name != "COM")),
        "photoshop_resources": "photoshop" in image.info,
        "images": len(getattr(image, "mpinfo", {}).get(0xB002, [])) or 1,
    }


def _name_tables(used: list[list[int]], fits: list[dict[str, Any]], standard: bool) -> str:
    for name, preset in presets.items():
        known: Any = preset["quantization"]
        if used == [list(table) for table in known]:
            return f"Photoshop's for {name.replace('_', ' ')!r}"
    if not standard:
        return "no standard table"
    exact = all(fit["distance"] == 0 for fit in fits)
    qualities = list(dict.fromkeys(str(fit["quality"]) for fit in fits))
    return f"{'' if exact else 'nearly '}libjpeg's for quality {' and '.join(qualities)}"


def _subsampling(layers: list[tuple[int, int, int, int]]) -> str | None:
    """None for grey; the factors of each component where they have no usual name."""
    if len(layers) < 2:
        return None
    factors = [layer[1:3] for layer in layers]
    name = _SUBSAMPLING.get(factors[0])
    # A fourth component, CMYK's black, is stored as fully as the first.
    if name and all(f == (1, 1) for f in factors[1:3]) and all(f == factors[0] for f in factors[3:]):
        return name
    return ", ".join(f"{across}x{down}" for across, down in factors)
