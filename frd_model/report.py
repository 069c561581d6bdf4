"""One HTML page of the results of `frd predict`: self-contained, works offline, with a slider for the threshold."""

from __future__ import annotations

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from frd_model.data.images import ImageError, fit, read_image, replacing
from frd_model.output import one_line, printable
from frd_model.results import KINDS, record_of
from frd_model.saved_maps import read_map
from frd_model.score import EDITED, NO_TRACE, UNCLEAR

UInt8 = npt.NDArray[np.uint8]

# Longest side of a thumbnail in pixels.
SIDE = 320
# A map's 8-bit levels are steps of its logit, so that thresholds near 0 and 1 can be told apart.
ZERO, STEPS = 128, 12
_ORDER = {NO_TRACE: 0, UNCLEAR: 1, EDITED: 2}


def write_report(
    folder: Path, file: Path, names: Iterable[str] | None = None
) -> tuple[int, list[tuple[str, str]]]:
    """Write a page of the results in `folder`, the highest score first; returns their number and what failed.

    `names` are those of the results to show; None takes all.

    A thumbnail is of the photo where it still lies at its path, else of the overlay. The slider needs maps
    (`--save map` or `npz`); without one a photo shows its mask.

    Raises ValueError where the folder holds no results.
    """
    files = folder.glob("*.json") if names is None else (folder / f"{name}.json" for name in names)
    records = {path: record for path in sorted(files) if (record := record_of(path))}
    if not records:
        raise ValueError(f"DIR must hold results of `frd predict`, got none in {str(folder)!r}")
    ranked = sorted(records.items(), key=lambda item: -float(item[1]["score"]))
    (threshold, _), *_ = Counter(float(r["threshold"]) for r in records.values()).most_common()
    shown, failed = 0, []
    with replacing(file) as page:
        page.write(_head(len(records), threshold, any("verdict" in r for r in records.values())).encode())
        for path, record in ranked:
            try:
                row = _row(path, record)
            # A damaged file must not stop the others.
            except Exception as error:
                failed.append((str(path), one_line(error)))
                continue
            page.write(row.encode())
            shown += 1
        page.write(_FOOT.encode())
    return shown, failed


def _row(path: Path, record: dict[str, Any]) -> str:
    size = int(record["size"]["height"]), int(record["size"]["width"])
    photo, notes = _photo(path, record, size)
    thumbnail = fit(photo, SIDE)
    levels, threshold_fixed = _levels(path, size, thumbnail.shape[:2])
    if threshold_fixed:
        notes.append("threshold fixed: no map saved")
    notes += (record.get("provenance") or {}).get("remarks") or []
    verdict = str(record.get("verdict", ""))
    emptied = verdict == NO_TRACE and not record.get("raw")
    score, marked = float(record["score"]), float(record["edited_fraction"])
    return f"""<tr{' class="emptied"' if emptied else ""}>
<td data-v="{_text(record["name"])}"><div class="photo"><img alt="" src="{_jpeg(thumbnail)}">\
<img alt="" class="map" src="{_png(levels)}"></div>
<b title="{_text(record["path"])}">{_text(record["name"])}</b><small>{_text("; ".join(notes))}</small></td>
<td class="verdict" data-v="{_ORDER.get(verdict, -1)}">{_text(verdict)}\
<small>{_text(record.get("explanation", ""))}</small></td>
<td data-v="{score}">{score:.3f}</td>
<td data-v="{marked}">{100 * marked:.1f} %</td>
<td data-v="{size[0] * size[1]}">{size[1]} x {size[0]}</td></tr>
"""


def _photo(path: Path, record: dict[str, Any], size: tuple[int, int]) -> tuple[UInt8, list[str]]:
    """The photo, or what can take its place, and what is to be said of that."""
    overlay = path.with_name(path.name.removesuffix(".json") + KINDS["overlay"])
    for file, notes in ((Path(record["path"]), []), (overlay, ["photo not found, overlay shown"])):
        try:
            pixels = read_image(file)
        except ImageError:
            continue
        if pixels.shape[:2] == size:
            return pixels, notes
    return np.full((*size, 3), 128, np.uint8), ["photo not found"]


def _levels(path: Path, size: tuple[int, int], shape: tuple[int, ...]) -> tuple[UInt8, bool]:
    """The highest level of the map under each pixel of a thumbnail, and whether only the mask was there."""
    stem = path.name.removesuffix(".json")
    files = [path.with_name(stem + KINDS[kind]) for kind in ("npz", "map", "mask")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return np.zeros(shape, np.uint8), True
    return _level(highest(read_map(file, size).probability, shape)), file == files[2]


def highest(probability: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The highest probability under each pixel of a smaller map of `shape`.

    So a pixel of it is marked where any pixel of the photo under it is, and no small region is lost.
    """
    for axis in (0, 1):
        starts = np.arange(shape[axis]) * probability.shape[axis] // shape[axis]
        probability = np.maximum.reduceat(probability, starts, axis=axis)
    return probability


def _level(probability: Any) -> UInt8:
    p = np.clip(np.asarray(probability, np.float64), 1e-9, 1 - 1e-9)
    return np.clip(np.rint(ZERO + STEPS * np.log(p / (1 - p))), 0, 255).astype(np.uint8)


def _jpeg(image: UInt8) -> str:
    return _data_uri(
        ".jpg", "image/jpeg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80]
    )


def _png(image: UInt8) -> str:
    return _data_uri(".png", "image/png", image, [])


def _data_uri(ending: str, kind: str, image: Any, options: list[int]) -> str:
    _, data = cv2.imencode(ending, image, options)
    return f"data:{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _head(photos: int, threshold: float, calibrated: bool) -> str:
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return _HEAD.format(
        allowed=allowed,
        style=_STYLE,
        photos=photos,
        meaning=MEANING[calibrated],
        plain="" if calibrated else ' class="plain"',
        level=int(_level(threshold)),
        threshold=f"{threshold:g}",
        zero=ZERO,
        steps=STEPS,
    )


MEANING = {
    True: """The verdict compares the score with those of photos that were known to be untouched: the explanation
beside it says how many of them scored as high or as low. That rate holds for photos like those; other cameras, sizes,
edits and compression have other ones. <b>Edited</b> is no proof of an edit: some untouched photos score as high.
<b>No trace found</b> is no proof that a photo is untouched: the forgeries that the net misses score as low. Neither
says what an edit means or who made it: sharpening, a filter or a new compression can leave traces too.""",
    False: """The score ranks photos and is no probability: this checkpoint was not calibrated, so that no rate of
false alarms is known. A high score is no proof of an edit, and a low one no proof that a photo is untouched. Neither
says what an edit means or who made it: sharpening, a filter or a new compression can leave traces too.""",
}

_STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
p{max-width:60rem}
table{border-collapse:collapse;width:100%}
th,td{padding:.5rem;text-align:left;vertical-align:top;border-bottom:1px solid #ccc}
th button{font:inherit;font-weight:bold;border:0;background:none;padding:0;cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\25B2"}th[aria-sort=descending] button::after{content:" \\25BC"}
td small{display:block;color:#555;max-width:24rem}td b{overflow-wrap:anywhere}
.bar{position:sticky;top:0;background:#fff;padding:.5rem 0;z-index:1}
.bar input[type=range]{width:18rem;vertical-align:middle}
.photo{position:relative;width:fit-content}.photo img{display:block}
.photo .map{position:absolute;top:0;left:0;filter:url(#above);image-rendering:pixelated}
.plain .verdict{display:none}
body:not(.all) .emptied .map{display:none}"""

# The filter makes a map's level its opacity, 1 above the threshold and 0 elsewhere, and fills that with yellow.
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{allowed}'">
<meta name="viewport" content="width=device-width"><title>frd report</title><style>{style}</style></head><body{plain}>
<svg width="0" height="0" style="position:absolute"><filter id="above" x="0" y="0" width="1" height="1" \
color-interpolation-filters="sRGB"><feColorMatrix values="1 0 0 0 0 0 1 0 0 0 0 0 1 0 0 1 0 0 0 0"/>
<feComponentTransfer result="marked"><feFuncA type="discrete" tableValues="0"/></feComponentTransfer>
<feFlood flood-color="#ffe600" flood-opacity="0.65"/><feComposite operator="in" in2="marked"/></filter></svg>
<h1>{photos} photos, looked at for edits</h1>
<p>{meaning}</p>
<div class="bar"><label>Mark pixels with a probability above
<input type="range" id="slider" min="0" max="255" value="{level}" data-zero="{zero}" data-steps="{steps}"></label>
<output id="shown">{threshold}</output>
<label class="verdict"><input type="checkbox" id="all"> also where no trace was found</label></div>
<table><thead><tr><th><button>Photo</button></th><th class="verdict"><button>Verdict</button></th>\
<th aria-sort="descending"><button>Score</button></th>\
<th><button>Marked</button></th><th><button>Size</button></th></tr></thead><tbody>
"""

_SCRIPT = """
const slider = document.getElementById("slider"), marked = document.querySelector("feFuncA");
function mark() {
  const level = Number(slider.value);
  marked.setAttribute("tableValues", Array.from({length: 256}, (_, k) => k > level ? 1 : 0).join(" "));
}
slider.addEventListener("input", () => {
  mark();
  const logit = (Number(slider.value) - slider.dataset.zero) / slider.dataset.steps;
  document.getElementById("shown").value = (1 / (1 + Math.exp(-logit))).toFixed(4);
});
document.getElementById("all").addEventListener("change",
  event => document.body.classList.toggle("all", event.target.checked));
const heads = [...document.querySelectorAll("th")], body = document.querySelector("tbody");
heads.forEach((head, column) => head.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending", value = row => row.cells[column].dataset.v;
  const order = column ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b));
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
}));
mark();
"""

_FOOT = f"</tbody></table><script>{_SCRIPT}</script></body></html>\n"
