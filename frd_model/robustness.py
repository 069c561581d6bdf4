"""How the scores of a network fall as photos are distorted: the paper's Figure 3.

Photos are distorted at their own size, before the preset of the evaluation resizes them.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.data.files import name_bytes
from frd_model.data.traces import jpeg
from frd_model.evaluate import PIXEL_METRICS, Report, evaluate
from frd_model.labelled import Labelled, Source, Unusable
from frd_model.output import one_line

UInt8 = npt.NDArray[np.uint8]
Samples = Iterable[Labelled | Unusable]


class Condition(NamedTuple):
    """A distortion of `GRIDS` and its level; "clean" and 0 for none."""

    distortion: str
    level: int


CLEAN = Condition("clean", 0)
STRENGTHS = (3, 7, 11, 15, 19, 23)
# Levels as in the figure, by distortion. The paper's code hands its noise levels over as variances.
GRIDS: dict[str, tuple[int, ...]] = {
    "noise-variance": STRENGTHS,
    "noise-sigma": STRENGTHS,
    "blur": STRENGTHS,
    "jpeg": (100, 90, 80, 70, 60, 50),
    "gamma": (130, 115, 100, 85, 70),
}
TITLES = {
    "noise-variance": "Gaussian noise: variance (as published)",
    "noise-sigma": "Gaussian noise: standard deviation",
    "blur": "Gaussian blur: kernel",
    "jpeg": "JPEG: quality",
    "gamma": "Gamma: exponent x 100",
}
# An exponent of 1 changes no photo.
UNCHANGED = Condition("gamma", 100)


def conditions(distortions: Sequence[str]) -> list[Condition]:
    """The clean photos, then every level of the distortions but the gamma that changes nothing."""
    unknown = [name for name in distortions if name not in GRIDS]
    if unknown:
        raise ValueError(f"distortion must be one of {', '.join(GRIDS)}, got {unknown[0]!r}")
    found = [Condition(name, level) for name in dict.fromkeys(distortions) for level in GRIDS[name]]
    return [CLEAN, *(condition for condition in found if condition != UNCHANGED)]


def distort(image: UInt8, condition: Condition, seed: int, name: str) -> UInt8:
    """A distorted copy of an RGB photo uint8 [H, W, 3].

    noise-variance, noise-sigma: Gaussian noise in each channel, of standard deviation sqrt(level) or level grey levels,
    rounded and clipped. Its draws depend on the seed and the photo's name alone: levels differ in scale only.
    blur: OpenCV's Gaussian blur by a kernel of that side, sigma = 0.3 ((level - 1) / 2 - 1) + 0.8.
    jpeg: baseline JPEG of that quality, chroma 4:2:0.
    gamma: 255 (value / 255) ^ (level / 100), rounded.
    """
    kind, level = condition
    if kind == "clean":
        return image
    if kind in ("noise-variance", "noise-sigma"):
        sigma = math.sqrt(level) if kind == "noise-variance" else float(level)
        noise = _generator(seed, name).standard_normal(image.shape, dtype=np.float32)
        return np.clip(np.rint(image + np.float32(sigma) * noise), 0, 255).astype(np.uint8)
    if kind == "blur":
        return np.asarray(cv2.GaussianBlur(image, (level, level), 0), np.uint8)
    if kind == "jpeg":
        return jpeg(image, level)
    if kind == "gamma":
        values = 255.0 * (np.arange(256) / 255.0) ** (level / 100)
        return np.asarray(np.rint(values).astype(np.uint8)[image])
    raise ValueError(f"distortion must be one of clean, {', '.join(GRIDS)}, got {kind!r}")


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name_bytes(name)).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def distorted(samples: Samples, condition: Condition, seed: int) -> Iterator[Labelled | Unusable]:
    """The samples with their photos distorted; one whose photo cannot be becomes unusable."""
    for sample in samples:
        if isinstance(sample, Unusable):
            yield sample
            continue
        try:
            image = distort(sample.image, condition, seed, sample.name)
        # One photo, such as one too large for the memory, must not stop the others.
        except Exception as error:
            yield Unusable(sample.name, one_line(error))
            continue
        yield dataclasses.replace(sample, image=image)


Row = dict[str, Any]
Progress = Callable[[str, Condition, Source], Samples]


def measure(
    open_sources: Callable[[], dict[str, Source]],
    model: nn.Module,
    wanted: Sequence[Condition],
    *,
    preset: str,
    seed: int = 0,
    device: str | None = None,
    done: Sequence[Row] = (),
    watch: Progress = lambda name, condition, source: source.samples,
) -> Iterator[tuple[Row, Report]]:
    """Evaluate a network on every set under every condition, one row at a time.

    Args:
        open_sources: the sets by name, anew at each call: their samples are read once for every condition.
        wanted: see :func:`conditions`.
        preset, device: see :func:`frd_model.evaluate.evaluate`.
        seed: of the noise.
        done: rows of an earlier call, whose sets and conditions are left out.
        watch: may wrap the samples of a set, for a progress bar.

    Yields:
        set, distortion, level, images, failed and for each metric its mean, low and high (None: not defined), and the
        report that the row is made of.

    Raises:
        ValueError: a set of which no forged photo could be scored.
    """
    finished = {(row["set"], row["distortion"], row["level"]) for row in done}
    for condition in wanted:
        for name, source in open_sources().items():
            if (name, *condition) in finished:
                continue
            samples = distorted(watch(name, condition, source), condition, seed)
            report = evaluate(samples, model, preset=preset, device=device)
            row = _row(name, condition, report)
            if not row["images"]:
                raise ValueError(f"set {name!r} must hold a forged photo that can be scored, got none")
            yield row, report


def _row(name: str, condition: Condition, report: Report) -> Row:
    summary = report.summary()
    row: Row = {"set": name, "distortion": condition.distortion, "level": condition.level}
    row |= {"images": summary["forged"]["images"], "failed": len(report.failed)}
    for metric in PIXEL_METRICS:
        figures = summary["means"][metric]
        row[metric] = {key: _number(figures[key]) for key in ("mean", "low", "high")}
    return row


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def curves(result: dict[str, Any], metric: str) -> dict[str, dict[str, list[tuple[str, float | None]]]]:
    """Means of a metric, by distortion and set: (label, mean) from the clean photos on, in the grid's order.

    Levels that are not measured (yet) are left out, a distortion without any too.
    """
    found = {(r["set"], r["distortion"], r["level"]): r[metric]["mean"] for r in result["rows"]}
    sets = list(dict.fromkeys(row["set"] for row in result["rows"]))
    by_distortion: dict[str, dict[str, list[tuple[str, float | None]]]] = {}
    for kind, levels in GRIDS.items():
        lines = {}
        for name in sets:
            clean = found.get((name, *CLEAN))
            points = [
                (str(level), found[name, kind, level]) for level in levels if (name, kind, level) in found
            ]
            if not points:
                continue
            if kind == "gamma":
                # Where the exponent is 1 the photos are the clean ones.
                means = dict(points) | {"100": clean}
                lines[name] = [(str(level), means[str(level)]) for level in levels if str(level) in means]
            else:
                lines[name] = [("clean", clean), *points]
        if lines:
            by_distortion[kind] = lines
    return by_distortion


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A table for each distortion with a row for every result and set, of the first result's metric."""
    metric = results[0]["settings"]["metric"]
    found = [(result["settings"]["method"], curves(result, metric)) for result in results]
    lines = [f"# Figure 3: {metric} of distorted photos", ""]
    for kind, title in TITLES.items():
        rows = [
            (f"{method}, {name}", points) for method, c in found for name, points in c.get(kind, {}).items()
        ]
        if not rows:
            continue
        labels = list(dict.fromkeys(label for _, points in rows for label, _ in points))
        lines += [f"## {title}", "", _line(["method, set", *labels]), _line(["---"] * (len(labels) + 1))]
        for name, points in rows:
            means = dict(points)
            lines.append(_line([name, *(_cell(means.get(label)) for label in labels)]))
        lines.append("")
    lines += [f"- {_how(result, metric)}" for result in results]
    return "\n".join(lines) + "\n"


def _how(result: dict[str, Any], metric: str) -> str:
    settings = result["settings"]
    sets = "; ".join(f"{name}: {data}" for name, data in settings["data"].items())
    images = sorted({row["images"] for row in result["rows"]})
    counts = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
    return (
        f"{settings['method']}: {metric}, preset {settings['preset']['name']}, {counts} forged photos, "
        f"distorted at their own size; noise seed {settings['noise_seed']}; {sets}"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def csv_text(result: dict[str, Any]) -> str:
    """One line for each set and condition, with the mean and the 95 % interval of every metric."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    ends = ("mean", "low", "high")
    writer.writerow(
        ["set", "distortion", "level", "images", "failed", *(f"{m}_{e}" for m in PIXEL_METRICS for e in ends)]
    )
    for row in result["rows"]:
        figures = [row[metric][end] for metric in PIXEL_METRICS for end in ends]
        writer.writerow([*(row[key] for key in ("set", "distortion", "level", "images", "failed")), *figures])
    return text.getvalue()


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """A panel for each distortion, as in the figure, with a line for every result and set, of the first's metric.

    Raises ModuleNotFoundError, one line, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'frd-kernels[plots]'") from None
    metric = results[0]["settings"]["metric"]
    found = [(result["settings"]["method"], curves(result, metric)) for result in results]
    kinds = [kind for kind in TITLES if any(kind in c for _, c in found)]
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for method, by_distortion in found:
            for name, points in by_distortion.get(kind, {}).items():
                means = [math.nan if mean is None else mean for _, mean in points]
                axis.plot([label for label, _ in points], means, marker="o", label=f"{method}, {name}")
        axis.set_title(TITLES[kind], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    axes[-1].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
