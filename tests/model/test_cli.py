"""The `frd` command: help, usage errors, exit status, lazy imports."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from frd_model import cli, create_model
from frd_model.cli import COMMANDS, EXAMPLES, PASSED_ON, Parser, main
from frd_model.data.images import write_png


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {name}" in text for name in (*COMMANDS, *PASSED_ON))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: frd {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_example_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = EXAMPLES[name].split()
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert " ".join(words) in " ".join(capsys.readouterr().out.split())
    parser = Parser(prog=f"frd {name}")
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    assert words[:2] == ["frd", name] and parser.parse_args(words[2:])


@pytest.mark.parametrize("argv", [[], ["fly"], ["predict"], ["evaluate"], ["train", "--epochs", "many"]])
def test_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["", *COMMANDS, "data check"])
def test_help_imports_neither_torch_nor_opencv(command: str) -> None:
    code = (
        "import sys; from frd_model.cli import main\n"
        f"try: main({[*command.split(), '--help']})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'cv2', 'timm')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["info", "data"])
def test_a_reader_that_is_gone_is_no_traceback(command: str, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    check = ["check", "--images", str(tmp_path), "--masks", str(tmp_path)]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "frd_model", command, *(check if command == "data" else [])],
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_bad_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  learning_rate: 1\n")
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "unknown key optim.learning_rate" in error
    assert error.count("\n") == 1


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and not shown.out
    assert all(f"    {name}" in shown.err for name in COMMANDS)


def test_version_and_module_run() -> None:
    expected = f"frd {cli._version()}\n"
    assert expected.split()[1][0].isdigit()
    code = "import sys; from frd_model.cli import main\n"
    code += "try: main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    for arguments in (["-m", "frd_model", "--version"], ["-c", code]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
    done = subprocess.run([sys.executable, "-m", "frd_model"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: frd" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "frd: argument COMMAND: invalid choice: 'fly'"),
        (["predict", "a.png"], "frd predict: the following arguments are required: --out"),
        (
            ["predict", "a.png", "--out", "x", "--tile", "8"],
            "frd predict: argument --tile: must be a whole number of at least 64",
        ),
        (
            ["predict", "a.png", "--out", "x", "--preset", "big"],
            "frd predict: argument --preset: invalid choice: 'big'",
        ),
        (["data", "check"], "frd data check: one of the arguments"),
        (["data"], "frd data: the following arguments are required: ACTION"),
        (["info", "--yaml"], "frd info: unrecognized arguments: --yaml"),
        (["--verbose"], "frd: "),
    ],
)
def test_usage_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(message) and error.count("\n") == 1


def test_paths_begin_at_home_and_types_have_public_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def _share(text: str) -> float:
        return float(text)

    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser(prog="frd")
    sub = parser.add_subparsers().add_parser("x")
    sub.add_argument("--out", type=Path)
    sub.add_argument("--share", type=_share)
    assert parser.parse_args(["x", "--out=~/a b"]).out == tmp_path / "a b"
    assert parser.parse_args(["x", "--out", "~nobody-of-that-name/a"]).out == Path("~nobody-of-that-name/a")
    with pytest.raises(SystemExit):
        parser.parse_args(["x", "--share", "much"])
    assert capsys.readouterr().err.startswith("frd x: argument --share: invalid share value: 'much'")


class OwnError(Exception):
    """As libraries define them, outside Python's hierarchy."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size: must be\npositive"), "frd x: size: must be positive"),
        (OwnError("cannot decode"), "frd x: OwnError: cannot decode"),
        (MemoryError(), "frd x: out of memory"),
        (ImportError("libGL.so.1 is missing"), "frd x: ImportError: libGL.so.1 is missing"),
        (OverflowError("too large"), "frd x: OverflowError: too large"),
    ],
)
def test_errors_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> int:
        raise error

    assert cli._run(SimpleNamespace(run=run), argparse.Namespace(command="x")) == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_a_defect_keeps_its_traceback() -> None:
    def run(_: argparse.Namespace) -> int:
        raise KeyError("lost")

    with pytest.raises(KeyError):
        cli._run(SimpleNamespace(run=run), argparse.Namespace(command="x"))


def test_a_closed_stdout_is_no_error(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    command = ["sh", "-c", '"$0" -m frd_model predict "$1" --out "$2" >&-', sys.executable]
    done = subprocess.run([*command, tmp_path / "a.png", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "out" / "a.json").is_file()


def test_a_reader_that_leaves_is_no_error() -> None:
    code = """
import sys
from types import SimpleNamespace
from frd_model import cli

def run(_):
    for i in range(100000):
        print(i)
    return 0

sys.exit(cli._run(SimpleNamespace(run=run), SimpleNamespace(command="x")))
"""
    command = ["sh", "-c", '"$0" -c "$1" | head -1', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_foreign_checkpoint_is_used_by_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from frd_model.data.images import write_png

    write_png(tmp_path / "photo.png", torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())
    state = create_model("frdnet_mit_b0", "lite").state_dict()
    torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    command = ["predict", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    assert (
        main(
            [
                *command,
                "--checkpoint",
                str(tmp_path / "net.pth"),
                "--model",
                "frdnet_mit_b0",
                "--preset",
                "lite",
            ]
        )
        == 0
    )
    assert (tmp_path / "out" / "photo_mask.png").is_file()
    capsys.readouterr()
    assert main([*command, "--overwrite", "--checkpoint", str(tmp_path / "net.pth")]) == 1
    error = capsys.readouterr().err
    assert (
        "assumed was preset 'released'" in error and "(--model, --preset)" in error and error.count("\n") == 1
    )


def test_info_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
