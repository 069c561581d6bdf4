"""The `frd` command: help, usage errors, exit status, lazy imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from frd_model.cli import COMMANDS, PASSED_ON, main


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


@pytest.mark.parametrize("argv", [[], ["fly"], ["predict"], ["evaluate"], ["train", "--epochs", "many"]])
def test_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_help_imports_neither_torch_nor_opencv() -> None:
    code = (
        "import sys; from frd_model.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'cv2', 'timm')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_bad_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  learning_rate: 1\n")
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "unknown key optim.learning_rate" in error
    assert error.count("\n") == 1


def test_info_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
