"""What the project does, on photos that come with scikit-image and scikit-learn: forge, localize, compare, measure.

`make demo`, or `python examples/demo.py --out DIR`. The photos are held-out ones: the demonstration network never saw
them in training. Beside them their untouched versions, where nothing should be found. `--picture docs/images/demo.jpg`
makes the README's picture and stops there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from frd_model.cli import bench
from frd_model.cli.arguments import Checkpoint, open_checkpoint
from frd_model.data import read_image, write_jpeg, write_png
from frd_model.labelled import Labelled, forged_samples
from frd_model.metrics import image_metrics
from frd_model.predict import Prediction, predict
from frd_model.results import Job, save_prediction

PANEL_WIDTH = 320
# The README's rows, fixed before any network was looked at: every photo, three kinds of edit, one photo untouched.
PICTURE = ("china-splicing-0", "coffee-removal-0", "astronaut-retouch-0", "coffee-authentic-0")


def localize(sample: Labelled, out: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Writes the photo and its true mask into `out`/photos, what was found into `out`; returns a table row."""
    photo = write_png(out / "photos" / f"{sample.name}.png", sample.image)
    write_png(out / "photos" / f"{sample.name}_truth.png", sample.mask)
    # The map is shown whatever the verdict, which would empty the mask of a photo without a trace.
    result = predict(sample.image, checkpoint.model, raw=True)
    save_prediction(out, Job(photo, sample.name), sample.image, result, checkpoint.label)
    row: dict[str, Any] = {
        "name": sample.name,
        "marked": float(result.mask.mean()),
        "score": result.score,
        "verdict": result.verdict or "",
        "milliseconds": 1e3 * result.seconds,
        "panel": panel(sample, read_image(out / f"{sample.name}_overlay.png"), result),
    }
    if sample.mask.any():
        row |= image_metrics(result.probability, sample.mask, result.threshold)
    return row


def panel(sample: Labelled, heat: np.ndarray, result: Prediction) -> np.ndarray:
    """Photo, true mask, and heat map with verdict and score, side by side, each PANEL_WIDTH wide."""
    truth = np.repeat(sample.mask[:, :, None].astype(np.uint8) * 255, 3, axis=2)
    height = round(PANEL_WIDTH * sample.image.shape[0] / sample.image.shape[1])
    parts = [
        cv2.resize(part, (PANEL_WIDTH, height), interpolation=cv2.INTER_AREA)
        for part in (sample.image, truth, heat)
    ]
    text = f"{result.verdict or 'score'} {result.score:.2f}"
    # On a dark band, so that it is legible on any photo.
    parts[2][height - 28 :] //= 3
    where = (8, height - 9)
    cv2.putText(parts[2], text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.55, (255,) * 3, 1, cv2.LINE_AA)
    return np.hstack(parts)


def line(row: dict[str, Any]) -> str:
    f1, auc = (f"{row[key]:6.3f}" if key in row else "     -" for key in ("f1", "auc"))
    figures = f"{100 * row['marked']:8.1f} {row['score']:7.3f} {row['milliseconds']:8.0f}"
    return f"{row['name']:26} {f1} {auc} {figures}  {row['verdict']}".rstrip()


def main() -> int:
    """Returns the exit status: 1 where a kernel failed its correctness gate."""
    parser = argparse.ArgumentParser(description="forge and localize the sample photos, a short benchmark")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="where to write (default demo_out)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the forgeries (default 0)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write the README's picture, no benchmark"
    )
    options = parser.parse_args()

    checkpoint = open_checkpoint(None, "cpu")
    source = forged_samples("heldout", 1, options.seed)
    print(f"{'photo':26} {'F1':>6} {'AUC':>6} {'marked %':>8} {'score':>7} {'ms':>8}  verdict", flush=True)
    panels = {}
    for sample in source.samples:
        row = localize(sample, options.out, checkpoint)
        print(line(row), flush=True)
        panels[row["name"]] = row["panel"]
    overview = write_jpeg(options.out / "overview.jpg", np.vstack(list(panels.values())), quality=90)
    print(
        f"{source.length} photos: masks, heat maps and scores in {options.out}, all at a glance in {overview}\n"
    )
    if options.picture:
        write_jpeg(options.picture, np.vstack([panels[name] for name in PICTURE]), quality=85)
        return 0

    print("Kernels, ours against eager PyTorch (ratio above 1: ours is faster)")
    return bench.main(["run", "--quick", "--repeats", "15"])


if __name__ == "__main__":
    sys.exit(main())
