"""FRD-Net in IMDL-BenCo: adapter and launcher against a stand-in, then BenCo's own scripts where it installs."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from frd_model import cli, create_model, load_model
from frd_model.losses import FRDLoss
from frd_model.metrics import image_score

NAME = "frd_model.integrations.imdl_benco"
SMALL = ["--encoder", "frdnet_mit_b0", "--preset", "lite"]
# What a BenCo script asks of its model and of a GPU, each thing once.
SCRIPT = """
import argparse, inspect, os, sys
import torch
from IMDLBenCo.registry import MODELS
model = MODELS.get("FRDNet")
parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda")
for name, given in list(inspect.signature(model.__init__).parameters.items())[1:]:
    parser.add_argument("--" + name, type=given.annotation, default=given.default)
flags = parser.parse_args()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group(backend="nccl", init_method="env://", world_size=world, rank=rank)
device = torch.device(flags.device)
net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model(flags.encoder, flags.preset)).to(device)
net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[rank], find_unused_parameters=False)
torch.manual_seed(rank)
image = torch.rand(1, 3, 64, 64, device=device)
out = net(image=image, mask=(image[:, :1] > 0.7).double(), label=[1], name=["x"], if_predcit_label=False)
torch.cuda.synchronize()
out["backward_loss"].backward()
norm = sum(p.grad.norm() for p in net.parameters()).double()
gathered = [torch.zeros((), dtype=torch.float64, device="cuda") for _ in range(world)]
torch.distributed.all_gather(gathered, norm)
total = torch.tensor([1.0], device="cuda").cuda()
torch.distributed.all_reduce(total)
assert torch.is_tensor(total) and len({float(g) for g in gathered}) == 1
torch.save({"args": flags}, f"flags-{rank}.pth")
torch.load(f"flags-{rank}.pth", weights_only=True)
if rank == 0:
    print("RESULT", sys.argv[1:], flags.device, total.item(), norm.item() > 0)
sys.exit(0)
"""
REGISTRY = """
class Registry(dict):
    def register_module(self, name=None, force=False, module=None):
        def keep(found):
            self[name or found.__name__] = found
            return found
        return keep
MODELS = Registry()
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stand_in")
    scripts = root / "IMDLBenCo/training_scripts"
    scripts.mkdir(parents=True)
    for folder in (scripts.parent, scripts):
        (folder / "__init__.py").touch()
    (scripts.parent / "registry.py").write_text(REGISTRY)
    for name in ("train.py", "test_complexity.py"):
        (scripts / name).write_text(SCRIPT if name == "train.py" else "import sys\nprint(sys.argv)\n")
    return root


@pytest.fixture
def adapter(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(stand_in)
    known = set(sys.modules)
    yield importlib.import_module(NAME)
    for name in set(sys.modules) - known:
        if name.startswith((NAME, "IMDLBenCo")):
            del sys.modules[name]


def sample(sizes: list[tuple[int, int]], margin: float = 0.0) -> dict[str, Any]:
    """A batch as BenCo's data sets give it, padded to 96 x 80."""
    generator = torch.Generator().manual_seed(3)
    image = torch.full((len(sizes), 3, 96, 80), margin)
    mask = torch.zeros(len(sizes), 1, 96, 80, dtype=torch.float64)
    inside = torch.zeros_like(mask)
    for i, (height, width) in enumerate(sizes):
        image[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)[:, :96, :80]
        mask[i, :, height // 2 : height, 5:width] = 1
        inside[i, :, :height, :width] = 1
    names = [f"{i}.png" for i in range(len(sizes))]
    return {"image": image, "mask": mask, "shape": torch.tensor(sizes), "shape_mask": inside, "name": names}


def test_model_is_registered_with_flags_that_argparse_can_read(adapter: ModuleType) -> None:
    from IMDLBenCo.registry import MODELS

    assert MODELS["FRDNet"] is adapter.BencoFRDNet
    parameters = dict(inspect.signature(adapter.BencoFRDNet.__init__).parameters)
    del parameters["self"]
    for given in parameters.values():
        assert given.annotation in (str, int, float)
        assert isinstance(given.default, given.annotation)


def test_state_dict_and_weights_are_the_nets(adapter: ModuleType) -> None:
    net = adapter.BencoFRDNet("frdnet_mit_b0", "lite", pretrained="demo", edge_mask_width=None)
    # IMDL-BenCo trains and scores the map alone, so that the image-level head stays out.
    demo = {
        k: v for k, v in load_model("demo").state_dict().items() if not k.startswith("decoder.image_head.")
    }
    assert list(net.state_dict()) == list(demo)
    assert all(torch.equal(value, demo[key]) for key, value in net.state_dict().items())
    assert net.loss.edge_width == 7


@pytest.mark.parametrize("form", ["paper", "released"])
def test_results_of_a_batch(adapter: ModuleType, form: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"loss_form": form, "edge_weight": 0.5, "bce_weight": 2.0, "edge_mask_width": 5}
    net = adapter.BencoFRDNet("frdnet_mit_b0", "lite", **options).eval()
    plain = create_model("frdnet_mit_b0", "lite").eval()
    plain.load_state_dict(net.state_dict())
    batch = sample([(96, 80), (96, 80)])
    del batch["shape_mask"]
    result = net(**batch, edge_mask=batch["mask"], label=torch.ones(2), if_predcit_label=False)
    with torch.no_grad():
        logits = plain(batch["image"])
    terms = FRDLoss(form, 0.5, 5, 2.0)(logits, batch["mask"].float())
    assert torch.equal(result["pred_mask"], logits.sigmoid())
    assert torch.equal(result["backward_loss"].detach(), terms["total"])
    assert {k: v.item() for k, v in result["visual_loss"].items()} == {k: v.item() for k, v in terms.items()}
    scores = [image_score(each.numpy()) for each in logits.sigmoid()]
    np.testing.assert_allclose(result["pred_label"].numpy(), scores, rtol=1e-6)
    assert result["visual_image"] == {} and result["backward_loss"].requires_grad


def test_padded_batch_is_trained_and_scored_as_the_images_alone(adapter: ModuleType) -> None:
    """The second image is larger than the batch, which BenCo then crops."""
    torch.manual_seed(0)
    net = adapter.BencoFRDNet("frdnet_mit_b0", "lite", bce_weight=1.0)
    for height, width in [(50, 61), (120, 70)]:
        batch = sample([(height, width)], margin=5.0)
        height, width = min(height, 96), min(width, 80)
        alone = {key: batch[key][:, :, :height, :width] for key in ("image", "mask")}
        results = []
        for given in (batch, alone):
            net.zero_grad()
            result = net(**given)
            result["backward_loss"].backward()
            gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            results.append((result, gradients))
        (found, gradient), (expected, expected_gradient) = results
        torch.testing.assert_close(found["pred_mask"][:, :, :height, :width], expected["pred_mask"])
        assert not found["pred_mask"][:, :, height:].any() and not found["pred_mask"][..., width:].any()
        torch.testing.assert_close(found["pred_label"], expected["pred_label"])
        torch.testing.assert_close(found["backward_loss"], expected["backward_loss"])
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def save_as_benco(net: torch.nn.Module, path: Path) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}}
    torch.save({**state, "args": argparse.Namespace(model="FRDNet", lr=1e-4)}, path)


def test_checkpoints_load_in_frd(adapter: ModuleType, tmp_path: Path) -> None:
    net = adapter.BencoFRDNet("frdnet_mit_b0", "lite")
    checkpoint, out = tmp_path / "checkpoint-3.pth", tmp_path / "net.safetensors"
    save_as_benco(net, checkpoint)
    adapter.to_frd(checkpoint, out, "frdnet_mit_b0", "lite")
    for loaded in (load_model(out), load_model(checkpoint, model="frdnet_mit_b0", preset="lite")):
        assert loaded.config == net.config
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match=r"checkpoint-3.pth: does not fit this FRDNet"):
        adapter.to_frd(checkpoint, out, "frdnet_mit_b0", "paper")


def test_the_package_needs_no_benco_and_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IMDLBenCo", None)
    message = (
        r"^frd_model.integrations.imdl_benco: needs IMDL-BenCo \(pip install .*\), got [^\n]*IMDLBenCo[^\n]*$"
    )
    with pytest.raises(ImportError, match=message):
        importlib.import_module(NAME)
    with pytest.raises(SystemExit, match=message):
        runpy.run_module(NAME, run_name="__main__")


def launch(
    folder: Path, where: Path, *arguments: str, processes: int = 0, python: str = sys.executable
) -> str:
    """Output of the launcher in a folder, with `folder` on the path; fails with its output."""
    run = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    )
    command = [python, *run, "-m", NAME, *arguments]
    paths = [str(folder), str(Path(__file__).parents[2])]
    if os.environ.get("FRD_TEST_INSTALLED"):
        paths.pop()
    # No GPU: two processes cannot share one.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **hidden}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_launcher_runs_a_script_for_gpus_on_the_cpu(stand_in: Path, tmp_path: Path, processes: int) -> None:
    out = launch(stand_in, tmp_path, "train", *SMALL, processes=processes)
    expected = f"RESULT {[*SMALL, '--device', 'cpu']} cpu {float(max(processes, 1))} True"
    assert expected in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["trian"], "script: must be one of train, .* or a file .*, got 'trian'"),
        (["./none.py"], r"\./none\.py: no such file"),
    ],
)
def test_launcher_refuses_in_one_line(adapter: ModuleType, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        adapter.main(arguments)


REQUIREMENTS = ("imdlbenco==0.1.45", "requests", "einops")


@pytest.fixture(scope="module")
def benco_python() -> str:
    """An interpreter with BenCo: FRD_BENCO_PYTHON, or that of an environment in the user's cache, made once."""
    given = os.environ.get("FRD_BENCO_PYTHON")
    if given:
        return given
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    identity = "\n".join((sys.prefix, torch.__version__, pins, *REQUIREMENTS))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frd_kernels"
    folder = cache / f"imdlbenco-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not (folder / "ready").is_file():
        try:
            install_benco(folder)
        except (subprocess.SubprocessError, OSError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            pytest.skip(f"imdlbenco cannot be installed here: {reason}")
        (folder / "ready").touch()
    return str(folder / "bin/python")


def install_benco(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, clear=True, symlinks=True)
    python = str(folder / "bin/python")
    # Behind its own packages those of this environment: BenCo needs an older NumPy and OpenCV, but no other torch.
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", *REQUIREMENTS]
    command.append(f"torch=={torch.__version__.partition('+')[0]}")
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)


def forge(folder: Path) -> None:
    """A ManiDataset of four photos of several sizes."""
    forged = str(folder / "forged")
    assert (
        cli.main(
            ["forge", "--sample", "all", "--out", forged, "--count", "4", "--size", "128", "--seed", "3"]
        )
        == 0
    )
    sizes = [(128, 128), (100, 128), (128, 90), (116, 119)]
    for source, target in (("images", "Tp"), ("masks", "Gt")):
        (folder / "M" / target).mkdir(parents=True)
        for file, size in zip(sorted(Path(forged, source).iterdir()), sizes, strict=True):
            Image.open(file).crop((0, 0, *size)).save(folder / "M" / target / file.name)


def f1_of(log: Path) -> float:
    values = json.loads(log.read_text().splitlines()[-1])
    return float(values["test_pixel-level F1"])


def evaluated(folder: Path, *flags: str) -> float:
    """F1 of `frd evaluate`."""
    result = folder / "frd.json"
    arguments = ["--mani", str(folder / "M"), "--checkpoint", str(folder / "one/checkpoint-0.pth"), *flags]
    net = ["--model", "frdnet_mit_b0", "--model-preset", "lite", "--json-out", str(result), "--overwrite"]
    assert cli.main(["evaluate", *arguments, *net]) == 0
    return float(json.loads(result.read_text())["means"]["f1"]["mean"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scripts_of_benco(benco_python: str, tmp_path: Path) -> None:
    """All five, padded and resized: F1 as `frd evaluate` has it, and the checkpoint goes from script to script."""

    def run(script: str, flags: str, processes: int = 0) -> str:
        common = f"--model FRDNet {' '.join(SMALL)} --num_workers 0 --no_pin_mem --edge_mask_width 7 {flags}"
        return launch(tmp_path, tmp_path, script, *common.split(), processes=processes, python=benco_python)

    forge(tmp_path)
    padded = "--if_padding --image_size 128 --test_batch_size 2 --test_data_path M"
    steps = "--batch_size 2 --epochs 1 --accum_iter 1 --lr 1e-5 --warmup_epochs 0"
    training = f"{padded} --data_path M --pretrained demo {steps}"
    run("train", f"{training} --output_dir one --log_dir one")
    run("train", f"{training} --output_dir two --log_dir two", processes=2)
    for name in ("one", "two"):
        log = json.loads((tmp_path / name / "log.txt").read_text())
        assert math.isfinite(log["train_total"]) and 0 < log["train_total"] < 2.5
    trained = load_model(tmp_path / "two/checkpoint-0.pth", model="frdnet_mit_b0", preset="lite").state_dict()
    assert any(not torch.equal(value, trained[key]) for key, value in load_model("demo").state_dict().items())
    # `train` ends with the test of its checkpoint.
    assert f1_of(tmp_path / "one/log.txt") == pytest.approx(evaluated(tmp_path), abs=1e-4)
    assert f1_of(tmp_path / "one/log.txt") > 0.01

    (tmp_path / "tests.json").write_text('{"M": "M"}')
    resized = "--if_resizing --test_batch_size 2 --test_data_json tests.json"
    run("test", f"{resized} --checkpoint_path one --output_dir t --log_dir t")
    expected = evaluated(tmp_path, "--preset", "benco-512")
    assert f1_of(tmp_path / "t/M/log.txt") == pytest.approx(expected, abs=1e-4)

    checkpoint = f"--checkpoint_path {tmp_path}/one/checkpoint-0.pth"
    run("test_save_images", f"{padded} {checkpoint} --output_dir s")
    saved = sorted(path.name for path in (tmp_path / "s/pred").iterdir())
    assert saved == sorted(path.name for path in (tmp_path / "M/Tp").iterdir())
    run("test_robust", f"{padded} {checkpoint} --output_dir r --log_dir r")
    assert len(list((tmp_path / "r").rglob("log.txt"))) == 19
    out = run("test_complexity", "--if_resizing --image_size 128 --test_batch_size 1")
    assert re.search(r"\| model +\| 1\.999M +\| 0\.27\dG ", out)
