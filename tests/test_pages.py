"""The pages: every block of commands or Python runs, those of a page from top to bottom in one folder that holds the
files that the pages speak of. Only the work is made smaller (`SMALLER`). A comment `<!-- not run: REASON -->` above a
block exempts it: it must still be commands that the programs take, or Python that compiles and finds its imports."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import frd_model
from frd_model import cli
from frd_model.state_dicts import export_state, huggingface_encoder
from frd_model.weights import demo_path

from .convert.cases import CDCNConv, DEConv, PiDiNetConv, pidinet_function
from .model import test_sets as layouts
from .model.hub_server import Repository, StandInHub

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SHELL, PYTHON = ("", "sh"), ("python",)
SHOWN = ("text", "bibtex", "{toctree}", "{eval-rst}", "json", "yaml", "dockerfile")
SLOW = ("convert", "data", "evaluation", "experiments", "export", "forging", "frdnet", "photos", "training")
FENCED = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TINY = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}
TRAINING = f"--model frdnet_mit_b0 --model-preset lite --set 'model.options={json.dumps(TINY)}'"
SMALLER = {
    "train": shlex.split(
        f"{TRAINING} --crop 32 --batch-size 2 --epochs 1 --set optim.warmup_epochs=0 --amp none"
    ),
    "forge": ["--count", "4"],
    "calibrate": ["--resamples", "10"],
    "complexity": ["--size", "64", "--repeats", "1"],
}
# `frd` and `python` are this interpreter and these packages; what installs is checked by `check_command` alone.
PROGRAMS = {
    "frd": '#!/bin/bash\ncase "$1" in\n{cases}\nesac\nexec "{python}" -m frd_model "$@"\n',
    "python": '#!/bin/bash\nexec "{python}" "$@"\n',
    **dict.fromkeys(("pip", "make"), "#!/bin/bash\n"),
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    exempt: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"

    def lines(self) -> list[str]:
        """Its command lines, loops unrolled to their first round."""
        joined = self.text.replace("\\\n", " ")
        for name, first in re.findall(r"for (\w+) in (\S+)", joined):
            joined = re.sub(rf"\${name}\b", first, joined)
        return [line.strip() for line in joined.splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)), found[2], found[3], found[1] or "")
        for found in FENCED.finditer(text)
    ]


def check_line(line: str) -> None:
    """That the commands of a line are ones that the programs take; of other programs nothing is known."""
    for command in re.split(r" (?:\||&&|\|\|) ", line):
        command = re.sub(r"^(torchrun .*?|python) -m frd_model ", "frd ", command)
        if command.startswith(("frd ", "python -m benchmarks ", "pip ", "make ")):
            check_command(shlex.split(re.sub(r" [<>] .*", "", command), comments=True))


def check_command(words: list[str]) -> None:
    if words[0] == "frd" and words[1] in cli.COMMANDS:
        module, arguments = cli.COMMANDS[words[1]][0], words[2:]
    elif words[0] == "frd":
        assert words[1] in cli.PASSED_ON
        return
    elif words[0] == "python":
        module, arguments = importlib.import_module("benchmarks.__main__").COMMANDS[words[3]][0], words[4:]
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    else:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extras in re.findall(r"(?:frd-kernels|\.)\[([\w,]+)\]", " ".join(words)):
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras.split(","))
        return
    parser = cli.Parser()
    importlib.import_module(module).add_arguments(parser)
    parser.parse_args(arguments)


def check_python(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, block.place)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def run_shell(block: Block, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of `frd`, also after a pipe, run in this process where a block has no others; else bash runs it."""
    lines = [
        re.sub(r"\s#.*", "", line) for line in block.lines() if not line.startswith(("pip ", "make ", "#"))
    ]
    found = [re.fullmatch(r"(?:([^|]+) \| )?frd ([^|<>$*&;]+)", line) for line in lines]
    if all(found):
        for source, command in (match.groups() for match in found if match):
            given = (
                subprocess.run(source, shell=True, check=True, stdout=subprocess.PIPE).stdout
                if source
                else b""
            )
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
            name, *arguments = shlex.split(command)
            if name == "train" and "--resume" not in arguments:
                shutil.rmtree("runs/mine", ignore_errors=True)  # given to the pages that do not train it
            assert cli.main([name, *arguments, *SMALLER.get(name, [])]) == 0, f"{block.place}: {command}"
        return
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if "site-packages" not in frd_model.__path__[0]:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.place}:\n{block.text}\n{done.stdout}{done.stderr}"


def run_python(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: photos, photos with masks, public sets, a trained net."""
    root = tmp_path_factory.mktemp("inputs")
    for name, seed in (("data", "0"), ("test", "1")):
        flags = ["--sample", "val", "--size", "96", "--seed", seed, "--count", "8"]
        assert cli.main(["forge", *flags, "--out", str(root / name)]) == 0
    images = iter(sorted((root / "data" / "images").iterdir()))
    for folder in ("photos", "photos", "photos/train", "photos/train", "photos/val", "photos/heldout"):
        (root / folder).mkdir(exist_ok=True)
        image = next(images)
        Image.open(image).convert("RGB").save(root / folder / f"{image.stem}.jpg", quality=90)
    shutil.copy(image, root / "photo.jpg")
    shutil.copytree(root / "photos", root / "data" / "compRAISE")
    (root / "maps").mkdir()
    for image in (root / "test" / "images").iterdir():
        np.save(root / "maps" / f"{image.stem}.npy", np.random.default_rng(0).random((96, 96), np.float32))
    pairs = [[f"data/images/{p.name}", f"data/masks/{p.name}"] for p in (root / "data" / "images").iterdir()]
    (root / "list.json").write_text(json.dumps(pairs))
    (root / "data" / "list.txt").write_text("".join(f"../{photo} ../{mask}\n" for photo, mask in pairs))
    (root / "runs" / "mine").mkdir(parents=True)
    shutil.copy(demo_path(), root / "runs" / "mine" / "best.safetensors")
    for name, folder in (
        ("casia1", "CASIA1"), ("casia2", "CASIA2"), ("columbia", "Columbia"), ("cover", "COVER"), ("nist16", "NIST16"),
        ("cocoglide", "COCOGlide"), ("imd2020", "IMD2020"), ("fantasticreality", "FR"), ("tampcoco", "tampCOCO"),
    ):  # fmt: skip
        layouts.TREES[name][0](root / "data" / folder)
    return root


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    cases = "\n".join(f'{name}) set -- "$@" {shlex.join(flags)};;' for name, flags in SMALLER.items())
    for name, text in PROGRAMS.items():
        path = folder / name
        path.write_text(text.replace("{python}", sys.executable).replace("{cases}", cases))
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repository]:
    folder = tmp_path_factory.mktemp("net")
    frd_model.load_model("demo").save_pretrained(folder)
    encoder = frd_model.create_model("frdnet_mit_b0", preset="lite", **TINY).encoder
    state, file = export_state(encoder.state_dict(), huggingface_encoder), io.BytesIO()
    torch.save(state, file)
    theirs = {"pytorch_model.bin": file.getvalue(), "config.json": b'{"model_type": "segformer"}'}
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {"OWNER/NAME": Repository(ours), "nvidia/mit-b0": Repository(theirs)}


@pytest.fixture
def hub(
    repositories: dict[str, Repository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """huggingface_hub reaches a server of this process, which has the `repositories`."""
    with StandInHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        hub.repositories |= repositories
        yield


def given(page: str) -> dict[str, Any]:
    """What the reader of a page on other nets has: layers and checkpoints of these."""
    if page != "convert":
        return {}
    spec = importlib.util.spec_from_file_location("pidinet_example", ROOT / "examples" / "pidinet.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.save(example.EdgeNet("carv4", 4, 3, True).state_dict(), "table5_pidinet.pth")
    torch.save(torch.nn.Sequential(CDCNConv(3, 4)).state_dict(), "cdcn.pth")
    torch.save({"model": DEConv(4).state_dict()}, "dea_net.pk")
    return {
        "pidinet": lambda args: torch.nn.Sequential(PiDiNetConv(pidinet_function("ad"), 3, 3)),
        "args": None,
    }


def cases() -> list[Any]:
    return [
        pytest.param(
            page,
            id=page.stem,
            marks=(pytest.mark.slow, pytest.mark.timeout(900)) if page.stem in SLOW else (),
        )
        for page in PAGES
        if any(block.language in SHELL + PYTHON and not block.exempt for block in blocks(page))
    ]


@pytest.mark.parametrize("page", cases())
def test_the_commands_of_a_page_run(
    page: Path, inputs: Path, programs: Path, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(inputs, tmp_path / "work"))
    threads, names = torch.get_num_threads(), given(page.stem)
    for block in blocks(page):
        if block.exempt or block.language in SHOWN:
            continue
        if block.language in PYTHON:
            run_python(block, names)
        else:
            run_shell(block, programs, monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all blocks, those that do not run too."""
    for block in blocks(page):
        assert block.language in SHELL + PYTHON + SHOWN, f"{block.place}: unknown language {block.language!r}"
        if block.language in PYTHON:
            check_python(block)
        elif block.language in SHELL:
            for line in block.lines():
                try:
                    check_line(line)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.place}: {line}: {error}") from error


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings, and MyST likewise."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


# Options that the text names of other programs: examples/demo.py, benchmarks.place, pip, ncu, torchrun.
FOREIGN = {
    "--picture",
    "--photos",
    "--no-build-isolation",
    "--profile-from-start",
    "--nproc-per-node",
    "--nproc_per_node",
    "--max-restarts",
}


def options(module: str) -> set[str]:
    parser = cli.Parser()
    importlib.import_module(module).add_arguments(parser)
    text = parser.format_help()
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        text += "".join(sub.format_help() for sub in action.choices.values())  # type: ignore[union-attr]
    return set(re.findall(r"--[a-z][\w-]*", text))


def test_options_in_the_text_exist() -> None:
    benchmarks = importlib.import_module("benchmarks.__main__").COMMANDS
    known = set().union(*(options(module) for module, _ in [*cli.COMMANDS.values(), *benchmarks.values()]))
    missing = {
        f"{page.name}: {option}"
        for page in PAGES
        if page.stem not in ("deploy", "imdl-benco")  # Docker's and IMDL-BenCo's
        for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text(encoding="utf-8")))
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        if option not in known | FOREIGN
    }
    assert not missing
