"""`import frd_kernels` needs torch and NumPy alone: the model's packages are not imported, and need not be there."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import frd_kernels

SCRIPT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"timm", "cv2", "torchvision", "PIL", "yaml", "tqdm", "safetensors"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch, frd_kernels as fk

x = torch.randn(1, 8, 16, 16, requires_grad=True)
(fk.DPM(8)(x) + fk.ICM(8)(x) + fk.PDC2d(8, 8, padding=1)(x)).sum().backward()
fk.convert.fold(fk.DPM(8).eval())
assert x.grad is not None
"""


def test_the_kernels_run_where_no_package_of_the_model_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=pathlib.Path(frd_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
