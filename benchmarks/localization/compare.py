"""Runs baselines, controls and nets over folders that `frd forge` made, image by image, and takes their means.

A method that the result file has is not run again: the baselines need one run, a net one for each checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.machine import read_json

from . import methods
from .splicebuster import splicebuster

Record = dict[str, Any]
Bools = npt.NDArray[np.bool_]

PIXEL_FIGURES = ("auc", "permute_f1", "optimal_f1")
# Shares of the untouched photos that may raise a false alarm.
ALARMS = (0.01, 0.05, 0.10)
STATISTIC = "window_128_contrast"


class Found(NamedTuple):
    """What a method says of a photo: a map float32 [H, W], the pixels that it marks, one number for the photo."""

    map: methods.FloatMap
    marked: Bools
    score: float


class Entrant(NamedTuple):
    """version: what a stored result depends on beside the images."""

    run: Callable[[methods.UInt8], Found]
    version: str = ""
    thresholds: dict[str, float] | None = None


def by_map(method: methods.Method) -> Entrant:
    """Marks by Otsu's threshold of the map; the score is the statistic that nets use."""
    from frd_model.map_statistics import statistic

    def run(image: methods.UInt8) -> Found:
        found = method(image)
        return Found(found, methods.marked(found), statistic(STATISTIC, found))

    return Entrant(run)


def white(image: methods.UInt8) -> Found:
    """A mask of every pixel."""
    everything = np.ones(image.shape[:2], np.bool_)
    return Found(everything.astype(np.float32), everything, 1.0)


def baselines() -> dict[str, Entrant]:
    """The methods that need no checkpoint, and the controls that look at no pixel."""
    from frd_model.centre_control import centre_map

    maps: dict[str, methods.Method] = {
        "error level": methods.error_level,
        "JPEG ghosts": methods.jpeg_ghosts,
        "noise variance": methods.noise_variance,
        "noise level": methods.noise_level,
        "Splicebuster": splicebuster,
        "centre": lambda image: centre_map(*image.shape[:2]),
    }
    return {**{name: by_map(method) for name, method in maps.items()}, "all white": Entrant(white)}


def net(checkpoint: str) -> Entrant:
    """A net as `frd predict` uses it; `marked` is what it marks whatever the verdict (`--raw`)."""
    from frd_model import load_model, predict
    from frd_model.weights import demo_path

    model = load_model(checkpoint)
    file = demo_path() if checkpoint == "demo" else pathlib.Path(checkpoint)
    rule = getattr(model, "score_rule", None)

    def run(image: methods.UInt8) -> Found:
        result = predict(image, model, raw=True)
        return Found(result.probability, result.mask, result.score)

    version = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Entrant(run, version, rule and rule.thresholds)


def entrants(checkpoints: Sequence[str]) -> dict[str, Entrant]:
    """Baselines, controls and a net for each checkpoint.

    Raises:
        ValueError: two checkpoints have one name.
    """
    names = [f"net {pathlib.Path(name).stem}" for name in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"--checkpoint must name files of different names, got {', '.join(checkpoints)}")
    return baselines() | {name: net(file) for name, file in zip(names, checkpoints, strict=True)}


class Image(NamedTuple):
    """operation: the forger's method, "" for an untouched photo."""

    name: str
    kind: str
    operation: str
    host: str
    image: pathlib.Path
    mask: pathlib.Path


def read_folders(folders: Sequence[pathlib.Path]) -> list[Image]:
    """What the manifests of `frd forge` list, one folder after another.

    Raises:
        ValueError: a folder has no manifest.
    """
    found = []
    for folder in folders:
        file = folder / "manifest.json"
        if not file.is_file():
            raise ValueError(
                f"--data must be folders that frd forge made, got {str(folder)!r} without manifest.json"
            )
        for item in json.loads(file.read_text())["items"]:
            paths = folder / item["image"], folder / item["mask"]
            found.append(
                Image(item["name"], item["kind"], item["parameters"].get("method", ""), item["host"], *paths)
            )
    return found


def figures(found: Found, mask: Bools) -> Record:
    """Of one photo; pixel figures only where something was edited."""
    from frd_model.metrics import auc, optimal_f1, permute_f1

    row: Record = {"score": found.score, "marked": float(found.marked.mean())}
    if mask.any():
        row["auc"] = auc(found.map, mask)
        row["permute_f1"] = permute_f1(found.marked, mask)
        row["optimal_f1"] = optimal_f1(found.map, mask).f1
    return row


def measure(entrant: Entrant, images: Sequence[Image]) -> Record:
    """A column for each figure, null where it is not defined, and the median seconds of a megapixel."""
    from tqdm import tqdm

    from frd_model.data import read_image
    from frd_model.data.images import read_mask

    rows, pace = [], []
    for entry in tqdm(images, disable=None):
        photo = read_image(entry.image)
        start = time.perf_counter()
        found = entrant.run(photo)
        pace.append((time.perf_counter() - start) / photo[..., 0].size * 1e6)
        rows.append(figures(found, read_mask(entry.mask, photo.shape[:2])))
    columns = {
        name: [None if math.isnan(v := row.get(name, math.nan)) else round(v, 5) for row in rows]
        for name in (*PIXEL_FIGURES, "score", "marked")
    }
    result = {
        "version": entrant.version,
        "seconds_per_megapixel": round(float(np.median(pace)), 3),
        **columns,
    }
    return result if entrant.thresholds is None else result | {"thresholds": entrant.thresholds}


def groups(images: Sequence[Record], unseen: Sequence[str]) -> dict[str, Bools]:
    """The forged images of each group: seen and unseen operations, kinds (seen ones only) and operations."""
    forged = np.array([image["kind"] != "authentic" for image in images])
    new = np.array([image["operation"] in unseen for image in images])
    found = {"seen": forged & ~new, "unseen": forged & new}
    kinds = np.array([image["kind"] for image in images])
    labels = np.array([f"{image['kind']} {image['operation']}".strip() for image in images])
    found |= {str(kind): (kinds == kind) & ~new for kind in np.unique(kinds[found["seen"]])}
    found |= {str(label): labels == label for label in np.unique(labels[forged])}
    return {name: chosen for name, chosen in found.items() if chosen.any()}


def summarize(method: Record, images: Sequence[Record], unseen: Sequence[str]) -> Record:
    """Means over each group with 95 % bootstrap intervals that draw whole host photos: [mean, low, high].

    "untouched": share of the pixels marked. Of a group against all untouched photos: "score_auc", and "found", the
    share of it above the lowest score that at most 1, 5 or 10 % of the untouched photos exceed. For a net with stored
    thresholds "verdict": the shares above each.
    """
    from frd_model.metrics import alarm_threshold, auc, bootstrap_detection

    hosts = [image["host"] for image in images]
    untouched = np.array([image["kind"] == "authentic" for image in images])
    score = np.array(method["score"], np.float64)
    limits = (
        {f"{rate:.2f}": alarm_threshold(score[untouched], rate) for rate in ALARMS} if untouched.any() else {}
    )
    stored = method.get("thresholds") or {}
    result: Record = {"untouched": {"images": int(untouched.sum())}}
    if untouched.any():
        marked = np.array(method["marked"], np.float64)
        result["untouched"]["marked"] = mean(marked, untouched, hosts)
        if stored:
            judged = np.where(score > stored["0.10"], marked, 0.0)
            result["untouched"]["marked_after_verdict"] = mean(judged, untouched, hosts)
            result["untouched"]["verdict"] = {r: mean(score > t, untouched, hosts) for r, t in stored.items()}
    for name, chosen in groups(images, unseen).items():
        row: Record = {"images": int(chosen.sum())}
        row |= {key: mean(np.array(method[key], np.float64), chosen, hosts) for key in PIXEL_FIGURES}
        if untouched.any():
            both = chosen | untouched
            cluster = [host for host, used in zip(hosts, both, strict=True) if used]
            interval = bootstrap_detection(score[both], chosen[both], clusters=cluster)["auc"]
            row["score_auc"] = rounded(auc(score[both], chosen[both]), *interval)
            row["found"] = {rate: mean(score > value, chosen, hosts) for rate, value in limits.items()}
            row |= (
                {"verdict": {r: mean(score > t, chosen, hosts) for r, t in stored.items()}} if stored else {}
            )
        result[name] = row
    return result


def mean(values: npt.NDArray[Any], chosen: Bools, hosts: Sequence[str]) -> list[float | None]:
    from frd_model.metrics import bootstrap_means

    part = values[chosen].astype(np.float64)
    clusters = [host for host, used in zip(hosts, chosen, strict=True) if used]
    defined = part[~np.isnan(part)]
    middle = float(defined.mean()) if defined.size else math.nan
    return rounded(middle, *bootstrap_means({"x": part}, clusters=clusters)["x"])


def rounded(*values: float) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else round(value, 4) for value in values]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        nargs="+",
        metavar="DIR",
        help="folders that frd forge made",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="demo|FILE",
        help="a net, named after its file; may be repeated",
    )
    parser.add_argument(
        "--methods",
        help="run these, separated by commas, even if the file has them (default: those that it lacks)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="the result file; what it has is kept"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 2 for wrong usage and for images that cannot be used."""
    try:
        compare(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks localization: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Adds the methods that the result file lacks; each is on disk before the next one starts."""
    images = read_folders(options.data)
    given = entrants(options.checkpoint)
    result = opened(options.out, options.data, images)
    for name in chosen_methods(options.methods, given, result["methods"]):
        print(name, flush=True)
        found = measure(given[name], images)
        found["means"] = summarize(found, result["images"], result["unseen"])
        result["methods"][name] = found
        save(options.out, result)
    print_means(result)


def opened(file: pathlib.Path, folders: Sequence[pathlib.Path], images: Sequence[Image]) -> Record:
    """The result file, or a new one for these images.

    Raises:
        ValueError: the file is of other images.
    """
    from frd_model.data.forge_options import UNSEEN

    manifests = b"".join((folder / "manifest.json").read_bytes() for folder in folders)
    head = {"manifests": hashlib.sha256(manifests).hexdigest()[:16]}
    old = read_json(file)
    if old and old.get("manifests") != head["manifests"]:
        raise ValueError(f"--out must hold results of the images of --data, got {str(file)!r} of others")
    columns = [{"name": i.name, "kind": i.kind, "operation": i.operation, "host": i.host} for i in images]
    return old or {**head, "unseen": list(UNSEEN), "methods": {}, "images": columns}


def chosen_methods(text: str | None, given: dict[str, Entrant], done: Record) -> list[str]:
    """Those asked for, else those that were not run or are of another version.

    Raises:
        ValueError: one that is not known.
    """
    if text is None:
        return [
            name for name, entrant in given.items() if done.get(name, {}).get("version") != entrant.version
        ]
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in given]:
        raise ValueError(f"--methods must be some of {', '.join(given)}, got {unknown[0]!r}")
    return names


def save(file: pathlib.Path, result: Record) -> None:
    """Lists and objects without others inside stand on one line."""
    from frd_model.data.images import write_bytes

    text = json.dumps(result, indent=1, allow_nan=False)
    flat = re.sub(r"[\[{][^][{}]*[]}]", lambda part: " ".join(part[0].split()), text)
    write_bytes(file, (flat + "\n").encode())


def print_means(result: Record) -> None:
    for group in ("seen", "unseen"):
        print(f"{group:24} {'AUC':>7} {'permute-F1':>10} {'best F1':>8} {'score AUC':>9} {'s/MP':>6}")
        for name, method in result["methods"].items():
            if row := method["means"].get(group):
                cells = [f"{row[key][0]:.3f}" if key in row else "-" for key in (*PIXEL_FIGURES, "score_auc")]
                print("{:24} {:>7} {:>10} {:>8} {:>9}".format(name, *cells), method["seconds_per_megapixel"])
