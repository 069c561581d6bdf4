"""The command that measures a GPU, rehearsed on a CPU; what its page says of the goals."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import sys
import tarfile
import textwrap
from typing import Any

import pytest
import torch

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
MODULES = ("gpu.command", "gpu.goals", "gpu.kernels", "measure", "registry")
gpu, goals, kernels, measure, registry = (importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES)


@pytest.fixture
def record() -> dict[str, Any]:
    (case,) = [
        case
        for case in registry.cases("cuda")
        if case.name == "pdc_weight angular [256x256x3x3] bfloat16 nchw forward"
    ]
    small = dataclasses.replace(case, shape=(8, 8, 3, 3), device="cpu", compiled=(), dtype=torch.float32)
    (found,) = measure.measure(small, repeats=2)
    return found


def rehearse(folder: pathlib.Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    status = gpu.main(["--device", "cpu", "--name", "A GPU", "--out", str(folder), *arguments])
    found = folder / "a-gpu"
    return status, json.loads((found / "kernels.json").read_text()), (found / "README.md").read_text()


def test_rehearsal(tmp_path: pathlib.Path) -> None:
    """Of every stage but those whose own tests run what they call."""
    stages = ["build", "tests", "calibrate", "compile", "kernels", "plots"]
    options = ("--short", "--only", "pdc_weight", "--tests=--version", "--stages", ",".join(stages))
    status, report, page = rehearse(tmp_path, *options)
    assert status == 0
    assert "pytest" in report["stages"]["tests"]["summary"]
    assert list(report["stages"]) == stages
    assert [record["name"] for record in report["cases"]] == [
        "pdc_weight angular [8x8x3x3] bfloat16 nchw forward"
    ]
    assert report["cases"][0]["floors"]["memory floor"]["kind"] == "memory"
    assert report["stages"]["kernels"]["problem"] == ""
    assert (tmp_path / "a-gpu" / "calibration.json").exists()
    assert "| pdc_weight angular | 8x8x3x3 |" in page
    assert "GB/s, read and written" in page


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path: pathlib.Path) -> None:
    status, report, page = rehearse(tmp_path, "--stages", "kernels,plots", "--limit", "2")
    assert status == 1
    assert report["stages"]["kernels"]["problem"] == "cut after 1 s"
    assert report["cases"] == []
    assert page.startswith("# A GPU\n")


WORKER = """
import json, pathlib, sys, time
out, done = pathlib.Path(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
record = json.loads(sys.argv[3])
def write(**line):
    with out.open("a") as file:
        print(json.dumps(line), file=file, flush=True)
for name, action in (("good", ""), ("crash", "exit"), ("hang", "sleep"), ("red", ""), ("last", "")):
    if name in done:
        continue
    write(start=name, limit=1.0)
    if action == "exit":
        sys.exit("the kernel died")
    if action == "sleep":
        time.sleep(60)
    if name == "red":
        write(red=name, reason="relative error inf")
    else:
        write(records=[record | {"name": name}])
"""


def test_a_case_that_ends_or_hangs_the_process_is_passed_over(
    record: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))

    def worker(run: Any, *command: Any) -> list[str]:
        _module, _stage, _out, out, _done, done = command
        return [sys.executable, str(script), str(out), str(done), json.dumps(record)]

    monkeypatch.setattr(gpu.Run, "worker", worker)
    monkeypatch.setattr(kernels, "selection", lambda options: [])
    status, report, page = rehearse(tmp_path, "--stages", "kernels")
    assert status == 1
    assert [record["name"] for record in report["cases"]] == ["good", "last"]
    assert report["problems"] == {
        "crash": "exit status 1: the kernel died",
        "hang": "cut: a case took too long",
        "red": "RED GATE: relative error inf",
    }
    assert "- hang: cut: a case took too long" in page


def test_usage_errors() -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--stages", "build,fly"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        gpu.main(["--stages", "plots"])


def test_groups_of_stages() -> None:
    assert gpu.stage_names("plots,check") == ["build", "tests", "checks", "sanitize", "plots"]
    assert set(gpu.RUNNERS) == set(gpu.LIMITS)


def test_commands_add_to_one_report(tmp_path: pathlib.Path) -> None:
    first = ("--stages", "kernels", "--only", "pdc_weight angular", "--revision", "abc")
    archive = tmp_path / "all.tar.gz"
    second = ("--stages", "calibrate,kernels", "--only", "pdc_weight", "--add", "--archive", str(archive))
    rehearse(tmp_path, *first)
    status, report, page = rehearse(tmp_path, *second, "--revision", "def")
    assert status == 0
    revisions = {record["name"].split()[1]: record["revision"] for record in report["cases"]}
    assert revisions == {"angular": "abc", "radial": "def"}
    assert list(report["stages"]) == ["kernels", "calibrate"]
    assert "pdc_weight angular" in page
    with tarfile.open(archive) as packed:
        assert {"a-gpu/kernels.json", "a-gpu/logs/calibrate.log"} <= set(packed.getnames())
    _status, report, _page = rehearse(tmp_path, "--stages", "kernels", "--only", "pdc_weight angular")
    assert [record["name"].split()[1] for record in report["cases"]] == ["angular"]


def test_goals_are_of_registered_cases() -> None:
    names = {case.name.replace(" bfloat16", "") for case in registry.cases("cuda") if "bfloat16" in case.name}
    assert {goal.case for kernel in goals.KERNELS for goal in kernel.goals} <= names


@pytest.mark.parametrize(
    ("value", "of", "figure", "met"),
    [
        (1.5, "ratio", "2.00x", True),
        (2.5, "ratio", "2.00x", False),
        (3.0, "us", "2.5 us", True),
        (2.0, "us", "2.5 us", False),
        (0.4, "floor", "50 %", True),
        (0.6, "floor", "50 %", False),
    ],
)
def test_goal(value: float, of: str, figure: str, met: bool) -> None:
    record = {"ratio": 2.0, "ours_ms": {"median": 2.5e-3}, "floors": {"memory floor": {"of_ours": 0.5}}}
    assert goals.Goal("case", value, of).met(record) == (figure, met)


def test_state_of_the_kernels(tmp_path: pathlib.Path, record: dict[str, Any]) -> None:
    goal = goals.Goal("a forward", 2.0)
    kernel = goals.Kernel("k", "pdc2d", "one", "two", (goal, dataclasses.replace(goal, case="b forward")))
    assert "| k | one | two | not seen | not seen | 0 of 2 | 0 of 0 |" in goals.state(tmp_path, [kernel])
    found = record | {"name": "a bfloat16 forward", "dtype": "bfloat16", "timing": "graph", "ratio": 1.5}
    (tmp_path / "kernels.json").write_text(json.dumps({"cases": [found]}))
    runs = [
        {"counts": {"cuda": {"pdc2d": {"passed": 7, "failed": 0}}}},
        {
            "counts": {
                "cuda": {"icm": {"passed": 9, "failed": 9}},
                "triton": {"all": {"passed": 3, "failed": 1}},
            }
        },
        {"what": "a run that counted nothing"},
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"runs": runs}))
    rights = "| yes: none of 7 cases failed | **no**: 1 of 4 cases of all ops failed |"
    assert f"{rights} 1 of 2 | 0 of 1 |" in goals.state(tmp_path, [kernel])
    assert "| a forward | graph | 2x of eager | 1.50x | **no** |" in goals.each(tmp_path, [kernel])
    assert "| b forward | graph | 2x of eager | not yet | - |" in goals.each(tmp_path, [kernel])


def test_right_tells_of_the_whole_suite_and_of_what_ran_since() -> None:
    def run(passed: int, failed: int, only: str = "") -> dict[str, Any]:
        return {"only": only, "counts": {"cuda": {"icm": {"passed": passed, "failed": failed}}}}

    whole, mended, worse = run(8, 2), run(2, 0, "x"), run(1, 1, "y")
    assert (
        goals.right([whole, mended], "cuda", "icm")
        == "yes: 2 of 10 cases failed; later none of 2 cases failed"
    )
    assert goals.right([whole, mended, worse], "cuda", "icm").startswith(
        "**no**: 2 of 10 cases failed; later 1 of 2"
    )
    assert goals.right([mended], "cuda", "icm") == "yes: none of 2 cases failed"
    assert goals.right([run(0, 0)], "cuda", "icm") == "not seen"
