"""`examples/ray_predict.py` with two workers, one of which dies amid its photos."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

DRIVER = """
import os, signal, sys
from pathlib import Path

import ray
import ray_predict

folder = Path(sys.argv[1])


class Dying(ray_predict.Predictor):
    def one(self, job):
        if job.name == "13" and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record = super().one(job)
        with (folder / "done").open("a") as log:
            log.write(job.name + "\\n")
        return record


if __name__ == "__main__":
    ray_predict.Predictor = Dying
    ray.init(num_cpus=2, include_dashboard=False)
    rows = list(ray_predict.run([str(folder / "in"), "none/*.jpg"], folder / "out", "demo", workers=2, gpus=0))
    print("rows", *sorted(Path(row["path"]).stem for row in rows if not row["error"]))
    print("failed", *(row["error"] for row in rows if row["error"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_dies_loses_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    names = [f"{n:02d}" for n in range(20)]
    for n, name in enumerate(names):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.jpg")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "driver.py").write_text(DRIVER)
    tree = [] if os.environ.get("FRD_TEST_INSTALLED") else [str(ROOT)]
    # Ray's sockets need a short path, and workers a while to import torch on a busy machine.
    with tempfile.TemporaryDirectory(prefix="ray") as short:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), *tree]),
            "RAY_TMPDIR": short,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_register_timeout_seconds": "600",
        }
        command = [sys.executable, tmp_path / "driver.py", tmp_path]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    lines = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("rows ", "failed "))
    )
    assert lines["rows"].split() == names and "Pillow can read" in lines["failed"]
    assert "none/*.jpg" in lines["failed"]
    log = Counter((tmp_path / "done").read_text().split())
    assert log.pop("bad") >= 1, "a photo that failed may be tried again"
    assert log == Counter(names), "each once"
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 20
