"""The wheel as `python -m build` makes it, in an environment that holds its declared requirements and nothing else."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from frd_model import load_model, predict

ROOT = pathlib.Path(__file__).parents[2]


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """What the command prints, run far from the source tree."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def requirements(site: pathlib.Path) -> set[str]:
    """The distributions that frd-kernels in `site` needs, directly or not, without its extras."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    (wheel,) = importlib.metadata.distributions(name="frd-kernels", path=[str(site)])
    waiting = list(wheel.requires or [])
    while waiting:
        needed = Requirement(waiting.pop())
        # An extra's marker is false for the empty one.
        if needed.name not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found.add(needed.name)
            waiting += importlib.metadata.requires(needed.name) or []
    return found


def link_requirements(site: pathlib.Path) -> None:
    """Puts them, as they are installed here, into `site`."""
    for name in requirements(site):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(pathlib.Path(str(distribution.locate_file(top))).resolve())


# In a tree that has been built, as after `make setup`, there is nothing left to compile.
pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def archives() -> pathlib.Path:
    """A folder of this run with both archives; the first worker that asks makes them, since all build in one tree."""
    out = pathlib.Path(os.environ["FRD_TEST_RUN"]) / "dist"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(out.glob("*.whl")):
            build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
            done = subprocess.run([*build, "--sdist", "--wheel", str(ROOT)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return out


@pytest.fixture(scope="module")
def clean(archives: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A virtual environment with the wheel and its requirements."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    (wheel,) = archives.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run(*pip, "install", "-q", "--no-index", "--no-deps", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    link_requirements(pathlib.Path(site.strip()))
    return folder


def test_predict_of_the_wheel(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    # On some processors the default is bfloat16.
    run(clean / "bin/frd", "predict", "photo.png", "--out", "results", "--precision", "float32", cwd=tmp_path)
    record = json.loads((tmp_path / "results/photo.json").read_text())
    assert record["score"] == pytest.approx(predict(photo, load_model("demo")).score, abs=1e-4)
    assert Image.open(tmp_path / "results/photo_mask.png").size == (128, 96)


def test_layer_of_the_wheel(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = """
import torch, frd_kernels as fk
layer = fk.PDC2d(4, 4, 3, padding=1, groups=4, kind="angular")
x = torch.randn(2, 4, 9, 9, requires_grad=True)
y = layer(x)
y.sum().backward()
torch.testing.assert_close(y, layer.to_conv2d()(x))
assert fk.backends()["cpu"][0] and x.grad.abs().sum() > 0
print(fk.__file__)
"""
    package = pathlib.Path(run(clean / "bin/python", "-c", code, cwd=tmp_path).strip())
    assert clean in package.parents


def test_command_of_the_wheel(clean: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert run(clean / "bin/frd", "--version", cwd=tmp_path).split()[1] == importlib.metadata.version(
        "frd-kernels"
    )
    assert json.loads(run(clean / "bin/frd", "info", "--json", cwd=tmp_path))["backends"]["cpu"][0]


def test_wheel_holds_the_packages_alone(archives: pathlib.Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"frd_kernels", "frd_model"}
    for package in ("frd_kernels", "frd_model"):
        tree = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert tree <= set(names)


def test_source_archive_is_complete(archives: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It holds each file of the native code, and CMake finds all that it names."""
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for folder in ("csrc", "build_backend", "frd_kernels", "frd_model"):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        missing = [f for f in files if f.suffix not in (".so", ".pyc") and not (source / f).is_file()]
        assert not missing
    code = "import frd_backend; print(frd_backend.prepare_metadata_for_build_wheel('.'))"
    run(sys.executable, "-c", f"import sys; sys.path.insert(0, 'build_backend'); {code}", cwd=source)
    cmake = shutil.which("cmake")
    assert cmake
    python = f"-DPython_EXECUTABLE={sys.executable}"
    native = f"-DFRD_TORCH_DIR={pathlib.Path(torch.__file__).parent}"
    run(cmake, "-S", source, "-B", tmp_path / "build", "-DFRD_CUDA=OFF", python, native, cwd=tmp_path)
