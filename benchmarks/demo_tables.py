"""The tables of docs/model-card.md, from the result files of the demonstration checkpoint."""

from __future__ import annotations

from typing import Any

FIGURES = (("permute_f1", "permute-F1"), ("f1", "F1"), ("auc", "AUC"), ("iou", "IoU"))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _figures(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.3f}" for key, _ in FIGURES]


def heldout_table(trained: dict[str, Any], untrained: dict[str, Any]) -> str:
    """Means over forged images: the checkpoint (and by kind of forgery), the untrained net, the all-white mask."""
    rows = [("**demo checkpoint**", trained["forged"])]
    rows += [(f"... {kind.replace('_', '-')} alone", row) for kind, row in trained["by_kind"].items()]
    rows += [("the same net, untrained", untrained["forged"]), ("all-white mask", trained["white_mask"])]
    lines = [_row("on forged images", *(title for _, title in FIGURES)), _row(*["---"] * 5)]
    return "\n".join(lines + [_row(name, *_figures(row)) for name, row in rows])


def alarm_table(trained: dict[str, Any], untrained: dict[str, Any]) -> str:
    """What the nets mark in untouched photos."""
    titles = (
        "on untouched images",
        "pixels marked",
        "score above 0.5",
        "AUC of the score, forged against untouched",
    )
    lines = [_row(*titles), _row(*["---"] * 4)]
    for name, summary in (("**demo checkpoint**", trained), ("the same net, untrained", untrained)):
        clean = summary["authentic"]
        alarms = (f"{100 * clean[key]:.1f} %" for key in ("pixel_false_alarm", "photo_false_alarm"))
        lines.append(_row(name, *alarms, f"{clean['score_auc']:.3f}"))
    return "\n".join(lines)


def training_table(run: dict[str, Any]) -> str:
    """The run that made the checkpoint, and the validation figures of the epoch that was kept."""
    kept = run["kept"]
    rows = [
        ("seed", run["seed"]),
        (
            "epochs, steps of each, images of a step",
            f"{run['epochs']}, {run['steps_per_epoch']}, {run['batch_size']}",
        ),
        ("fastest epoch", f"{run['fastest_epoch_seconds']:.0f} s"),
        ("kept", f"epoch {kept['epoch']:.0f}"),
        (
            "validation figures of that epoch",
            f"AUC {kept['val/auc']:.3f}, permute-F1 {kept['val/permute_f1']:.3f}, F1 {kept['val/f1']:.3f}, "
            f"pixels marked in untouched images {100 * kept['val/false_alarm']:.1f} %",
        ),
        ("machine", run["machine"]),
    ]
    return "\n".join([_row("run", ""), _row("---", "---")] + [_row(*row) for row in rows])
