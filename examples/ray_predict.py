"""`frd predict` for very many photos on the machines of a Ray cluster, or with several workers on this one.

    pip install "frd-kernels[ray]"
    python examples/ray_predict.py photos --out results --workers 2

Every worker holds one network. The results are those of `frd predict`, so that `frd report` shows them. A worker that
dies is started again and its photos are given out again; those that have results already are not repeated, neither
then nor by a second run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from frd_model import load_model, predict
from frd_model.cli.predict_jobs import begin, collect, remove
from frd_model.data.images import read_file, read_image
from frd_model.device import to_first_device
from frd_model.provenance import provenance
from frd_model.results import Job, record_of, save_prediction

COLUMNS = ("path", "score", "verdict", "error")


class Predictor:
    """What a worker holds and does: files of photos -> files of results, and a row for each."""

    def __init__(self, checkpoint: str, out: Path) -> None:
        self.checkpoint = checkpoint
        self.out = out
        # A worker sees the GPU that Ray has given it, or none.
        self.model = to_first_device(load_model(checkpoint))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        jobs = [Job(Path(path), name) for path, name in zip(batch["path"], batch["name"], strict=True)]
        records = [self.earlier(job) or self.one(job) for job in jobs]
        return {column: [str(record.get(column, "")) for record in records] for column in COLUMNS}

    def earlier(self, job: Job) -> dict[str, Any] | None:
        """The record of a run before with this checkpoint."""
        record = record_of(self.out / f"{job.name}.json")
        return record if record and record.get("checkpoint") == self.checkpoint else None

    def one(self, job: Job) -> dict[str, Any]:
        try:
            data = read_file(job.path)
            pixels = read_image(job.path, data=data)
            settings = {"provenance": provenance(job.path, data)}
            result = predict(pixels, self.model)
            begin(job, self.out)
            return save_prediction(self.out, job, pixels, result, self.checkpoint, settings)
        # A bad photo must not stop the others.
        except Exception as error:
            remove(job, self.out)
            return {"path": str(job.path), "error": str(error)}


def run(photos: list[str], out: Path, checkpoint: str, workers: int, gpus: float) -> Iterator[dict[str, Any]]:
    """Predict photos, folders and patterns; yields a row of COLUMNS for each photo, or bad argument, as it is done."""
    found = collect(photos, out, recursive=True)
    for name, reason in found.failed:
        yield {"path": name, "score": "", "verdict": "", "error": reason}
    if not found.jobs:
        return
    rows = ray.data.from_items([{"path": str(job.path.absolute()), "name": job.name} for job in found.jobs])
    done = rows.map_batches(
        Predictor,
        fn_constructor_args=(checkpoint, out.absolute()),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=8,
        num_gpus=gpus,
    )
    yield from done.iter_rows()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "photos", nargs="+", help="photos, folders and patterns, on a disk that all workers see"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, on such a disk too")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a worker; 0.5: two share one")
    parser.add_argument("--address", help="a Ray cluster's, or auto (default: workers on this machine)")
    args = parser.parse_args()
    ray.init(args.address, num_cpus=None if args.address else args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for row in run(args.photos, args.out, args.checkpoint, args.workers, args.gpus):
        failed += bool(row["error"])
        print(*(row[column] for column in COLUMNS if row[column]), sep="  ")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
