"""The tables of the model card, from `results/demo` and the checkpoint in the package."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from .machine import RESULTS, ROOT, read_json
from .markdown import cells, table

Record = dict[str, Any]

# Rows of the card's comparison by their names in the file; other nets are named as they are there.
ROWS = {
    "net demo": "**the checkpoint**",
    "net second": "the one before it",
    "net before": "the first one",
    "Splicebuster": "Splicebuster-like clustering",
    "noise variance": "noise-residual variance",
    "noise level": "noise level",
    "error level": "error level analysis",
    "JPEG ghosts": "JPEG ghosts",
    "centre": "centre control",
    "all white": "all-white mask",
}
PIXELS = {"auc": "AUC", "permute_f1": "permute-F1", "optimal_f1": "best permute-F1"}
RATES = {"0.01": "1 %", "0.05": "5 %", "0.10": "10 %"}
MISSING = "*Not measured.*"


def comparison() -> dict[str, Record]:
    """Means of the card's methods by the text of their row, the nets first."""
    methods = read_json(RESULTS / "demo" / "comparison.json")["methods"]
    nets = [name for name in methods if name.startswith("net ") and name not in ROWS]
    return {ROWS.get(name, name): methods[name]["means"] for name in (*ROWS, *nets) if name in methods}


def middle(value: Sequence[float | None], percent: bool = False) -> str:
    """A mean without its interval."""
    return "-" if value[0] is None else f"{100 * value[0]:.1f} %" if percent else f"{value[0]:.3f}"


def interval(value: Sequence[float | None], percent: bool = False) -> str:
    if value[1] is None:
        return middle(value, percent)
    ends = [f"{100 * end:.1f}" if percent else f"{end:.3f}" for end in value[1:]]
    return f"{middle(value, percent)} ({' to '.join(ends)})"


def pixels(figure: str) -> str:
    """A pixel figure of each method: seen operations, each kind of them, unseen operations, each of these."""
    unseen = read_json(RESULTS / "demo" / "comparison.json")["unseen"]
    means = comparison()
    first = next(iter(means.values()))
    kinds = [kind for kind in ("splicing", "copy_move", "removal", "retouch") if kind in first]
    groups = ["seen", *kinds, "unseen", *(name for name in first if name.split()[-1] in unseen)]
    titles = [f"{name.split()[-1].replace('_', '-')}, {first[name]['images']}" for name in groups]
    rows = [
        cells(text, *((interval if g in ("seen", "unseen") else middle)(row[g][figure]) for g in groups))
        for text, row in means.items()
    ]
    return table((f"pixel {PIXELS[figure]}", *titles), rows)


def operations() -> str:
    """Each operation: pixel AUC of the net, the best baseline and the centre control; photos that the net finds."""
    means = comparison()
    net = next(iter(means))
    shown = [net, ROWS["Splicebuster"], ROWS["centre"]]
    rows = [
        cells(
            name.replace("_", "-"),
            row["images"],
            *(middle(means[method][name]["auc"]) for method in shown),
            middle(row["found"]["0.05"], percent=True),
        )
        for name, row in means[net].items()
        if " " in name
    ]
    return table(("operation", "images", *(f"AUC, {name}" for name in shown), "photos found at 5 %"), rows)


def photos() -> str:
    """What each method's score says of a photo, and what it marks in untouched ones."""
    rows = []
    for name, means in comparison().items():
        groups = (means["seen"], means["unseen"])
        figures = [interval(group["score_auc"]) for group in groups]
        figures += [" / ".join(middle(g["found"][r], percent=True) for g in groups) for r in RATES]
        untouched = means["untouched"]
        marked = interval(untouched["marked"], percent=True)
        if after := untouched.get("marked_after_verdict"):
            marked += f"; after the verdict {interval(after, percent=True)}"
        rows.append(cells(name, *figures, marked))
    found = [f"found at {rate}, seen / unseen" for rate in RATES.values()]
    return table(
        ("of a photo", "AUC, seen", "AUC, unseen", *found, "pixels marked in untouched photos"), rows
    )


def verdict() -> str:
    """How many photos pass each threshold that a checkpoint stores."""
    rows = []
    for name, means in comparison().items():
        for rate, text in RATES.items() if "verdict" in means["untouched"] else ():
            shares = (means[group]["verdict"][rate] for group in ("untouched", "seen", "unseen"))
            rows.append(cells(name, text, *(interval(share, percent=True) for share in shares)))
    titles = ("net", "threshold of, in the calibration", "untouched above it", "seen edits", "unseen edits")
    return table(titles, rows) if rows else MISSING


def place() -> str:
    """The shift test of `frd evaluate`: the same pixels in the middle of a crop and beside its border."""
    found = read_json(RESULTS / "demo" / "shift.json").get("shift_test")
    if not found:
        return MISSING
    titles = ("the same pixels", "images", "in the middle", "beside a border", "difference, 95 % interval")
    rows = []
    for text, group, figure in (
        ("AUC of edits", "forged", "auc"),
        ("mean probability of untouched photos", "untouched", "probability"),
    ):
        row = found[group][figure]
        ends = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["difference"])
        means = (f"{row[key]['mean']:.3f}" for key in ("middle", "border"))
        rows.append(cells(text, found[group]["images"], *means, ends))
    return table(titles, rows)


def score(checkpoint: pathlib.Path = ROOT / "frd_model" / "assets" / "demo.safetensors") -> str:
    """How well each statistic tells edited from untouched photos of the calibration, the one used first."""
    from safetensors import safe_open

    with safe_open(checkpoint, "np") as file:
        rule = json.loads((file.metadata() or {}).get("metadata", "{}")).get("score")
    if not rule:
        return MISSING
    used, measured = rule["statistic"], rule["validation"]["statistics"]
    names = sorted(measured, key=lambda name: (name != used, -measured[name]["auc"]))
    rows = [
        cells(
            f"**{name}**, used" if name == used else name,
            interval([measured[name]["auc"], *(measured[name]["auc_interval"] or (None, None))]),
            middle([measured[name]["found_0.05"]], percent=True),
        )
        for name in names
    ]
    return table(("statistic", "AUC, photos of the calibration", "found at 5 %"), rows)


def training() -> str:
    """The run that made the checkpoint, and the validation figures of the epoch that was kept."""
    run = read_json(RESULTS / "demo" / "training.json")
    kept, steps = run["kept"], f"{run['epochs']}, {run['steps_per_epoch']}, {run['batch_size']}"
    figures = (
        f"AUC {kept['val/auc']:.3f}, permute-F1 {kept['val/permute_f1']:.3f}, F1 {kept['val/f1']:.3f}, "
        f"pixels marked in untouched images {100 * kept['val/false_alarm']:.1f} %"
    )
    rows = {
        "seed": run["seed"],
        "epochs, steps of each, images of a step": steps,
        "fastest epoch": f"{run['fastest_epoch_seconds']:.0f} s",
        "kept": f"epoch {kept['epoch']:.0f}",
        "validation figures of that epoch": figures,
        "machine": run["machine"],
    }
    return table(("run", ""), [cells(*row) for row in rows.items()])


def curve(rows: int = 12) -> str:
    """Validation figures along the run: the first and the last epoch and some between."""
    history = read_json(RESULTS / "demo" / "training.json")["history"]
    last = len(history) - 1
    shown = sorted({round(i * last / (rows - 1)) for i in range(rows)})
    names = [key for key in CURVE if key in history[-1]]
    lines = [cells(f"{history[i]['epoch']:.0f}", *(f"{history[i][key]:.3f}" for key in names)) for i in shown]
    return table(("epoch", *(CURVE[key] for key in names)), lines)


CURVE = {
    "train/loss": "training loss",
    "val/auc": "AUC",
    "val/permute_f1": "permute-F1",
    "val/f1": "F1",
    "val/false_alarm": "share of untouched pixels marked",
}


def levers() -> str:
    """What each change did to validation in a short run."""
    levers: Any = read_json(RESULTS / "demo" / "levers.json")
    if not levers:
        return MISSING
    names = list(dict.fromkeys(key for lever in levers for key in lever["val"]))
    rows = [
        cells(
            lever["name"],
            lever["change"],
            lever["steps"],
            *(f"{lever['val'][key]:.3f}" if key in lever["val"] else "-" for key in names),
        )
        for lever in levers
    ]
    return table(("lever", "change", "steps", *names), rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo-training": training,
    "demo-curve": curve,
    "demo-levers": levers,
    "demo-auc": lambda: pixels("auc"),
    "demo-f1": lambda: pixels("permute_f1"),
    "demo-best-f1": lambda: pixels("optimal_f1"),
    "demo-operations": operations,
    "demo-photos": photos,
    "demo-verdict": verdict,
    "demo-place": place,
    "demo-score": score,
}
