"""Comparing result files and revisions, and the gate on instruction counts. Counts decide here, no times."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import frd_kernels
from benchmarks import __main__ as command
from benchmarks import compare, machine, regression

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {"isa": "avx2", "compiler": "12.2.0", "torch": "2.11.0", "python": "3.11.7"}
COUNTS = {"instructions": 1000, "entries": 20, "python_calls": 40}


def record(name: str, ours: float, baseline: float = 4, width: float = 0.0, **more: Any) -> Any:
    """Times in milliseconds; p10 and p90 lie `width` of the median away from it."""
    times = {"median": ours, "p10": ours * (1 - width), "p90": ours * (1 + width)}
    other = {"baseline_ms": {"median": baseline}, "baseline": "eager", "aa_spread": 0.01}
    return {"name": name, "ours_ms": times, **other, **more}


def report(*records: Any, cpu: str = "A", **more: Any) -> Any:
    facts = {"machine": {"cpu": cpu}, "build": "unknown (ImportError)", "versions": {"torch": "2.11"}}
    return {"when": "2026-01-02", "quiet": True, "machine": facts, "cases": list(records), **more}


@pytest.fixture
def compared(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `compare` on two reports; gives the exit status and what was printed."""

    def run(a: Any, b: Any, *options: str) -> tuple[int, str]:
        for name, value in (("a", a), ("b", b)):
            (tmp_path / name).write_text(json.dumps(value))
        status = command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


ONE = record("x", 1)
CHANGES = {
    "slower": (ONE, record("x", 2), 0.5, "slower"),
    "faster": (ONE, record("x", 0.5), 2.0, "faster"),
    "slower machine": (ONE, record("x", 2, 8), 1.0, "within noise"),
    "noise of A": (record("x", 1, aa_spread=0.2), record("x", 1.15), 0.87, "within noise"),
    "noise of B": (ONE, record("x", 1.15, aa_spread=0.2), 0.87, "within noise"),
    "both inside": (record("x", 1, width=0.2), record("x", 1.1, width=0.2), 0.909, "within noise"),
    "one inside": (record("x", 1, width=0.2), record("x", 1.1), 0.909, "slower"),
    "small": (ONE, record("x", 1.03), 0.971, "below 5%"),
    "busy": (ONE, record("x", 2, quiet=False), 0.5, "unsure on a busy machine, else slower"),
    "other baseline": (
        ONE,
        ONE | {"baseline": "folded"},
        1.0,
        "within noise (another baseline: eager / folded)",
    ),
}


@pytest.mark.parametrize(("a", "b", "normalised", "verdict"), CHANGES.values(), ids=list(CHANGES))
def test_change_of_a_case(a: Any, b: Any, normalised: float, verdict: str) -> None:
    change = compare.change(("cpu", "cpu", "wall", "x"), a, b)
    assert change.plain == a["ours_ms"]["median"] / b["ours_ms"]["median"]
    assert (change.normalised, change.verdict) == (pytest.approx(normalised, abs=1e-3), verdict)


def test_compare_prints_the_worst_first_and_names_what_is_missing(compared: Any) -> None:
    a = report(record("pdc", 1, 2), record("icm", 1, 2), record("gone", 1, 2), threads=2)
    b = report(record("pdc", 1, 2), record("icm", 2, 2), record("new", 1, 2), threads=1, cpu="B", quiet=False)
    status, text = compared(a, b)
    assert status == 0
    for expected in ("cpu: A / B", "threads: 2 / 1", "B was measured on a busy machine"):
        assert f"WARNING: {expected}" in text
    cases = [line.split()[0] for line in text.splitlines() if line.startswith(("pdc", "icm"))]
    assert cases == ["icm", "pdc"]
    assert "only in A: cpu, cpu, wall, gone" in text and "only in B: cpu, cpu, wall, new" in text
    assert "2 cases: geomean 0.707x, normalised 0.707x; worst 0.500x (icm)" in text


def test_timings_and_backends_of_a_gpu_are_cases_of_their_own(compared: Any) -> None:
    def both(timing: str, **milliseconds: float) -> Any:
        backends = {
            name: {"ours_ms": dict.fromkeys(("median", "p10", "p90"), ms)}
            for name, ms in milliseconds.items()
        }
        return record("dpm", 1, 4, device="cuda", timing=timing, backend="cuda", backends=backends)

    a = report(both("wall", cuda=1, triton=2), both("graph", cuda=1, triton=2))
    b = report(both("wall", cuda=1, triton=1), both("graph", cuda=2, triton=2))
    _, text = compared(a, b)
    changes = [line.split("  ")[0] for line in text.splitlines() if line.startswith("dpm")]
    assert changes == ["dpm, cuda, graph", "dpm, cuda, wall", "dpm, triton, graph", "dpm, triton, wall"]
    assert "normalised 1.000x; worst 0.500x (dpm, cuda, graph)" in text


@pytest.mark.parametrize(
    ("more", "options", "status"),
    [({}, [], 1), ({"aa_spread": 0.3}, [], 0), ({"quiet": False}, [], 0), ({}, ["--only", "icm"], 0)],
)
def test_fail_below(compared: Any, more: dict[str, Any], options: list[str], status: int) -> None:
    a, b = report(record("pdc", 1), record("icm", 1)), report(record("pdc", 1.25, **more), record("icm", 1))
    assert compared(a, b, "--fail-below", "0.9", *options)[0] == status
    assert compared(a, b, "--fail-below", "0.7", *options)[0] == 0


@pytest.mark.parametrize(
    ("b", "options", "words"),
    [
        (report(record("y", 1)), [], "no case in common"),
        (report(ONE), ["--only", "y"], "no case in common that contains 'y'"),
        ({"records": []}, [], "contains a list `cases`"),
        (report(ONE), ["--base", "HEAD"], "give two result files, or --base REV"),
    ],
)
def test_what_cannot_be_compared(compared: Any, b: Any, options: list[str], words: str) -> None:
    status, text = compared(report(ONE), b, *options)
    assert status == 2 and words in text and text.count("\n") == 1


def test_an_unknown_revision_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["compare", "--base", "no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("compare: git rev-parse: ")


@pytest.mark.parametrize("machine", ["cpu", "nvidia-h100-80gb-hbm3"])
def test_the_committed_result_files_equal_themselves(
    machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "benchmarks" / "results" / machine / "kernels.json")
    assert command.main(["compare", path, path, "--fail-below", "1"]) == 0
    assert "geomean 1.000x, normalised 1.000x; worst 1.000x" in capsys.readouterr().out


def test_result_of_two_trees() -> None:
    found = compare.result([[0.010, 0.011]] * 4, [[0.020, 0.022]] * 4)
    assert (found.ratio, found.ours, found.base) == pytest.approx((2.0, 10.5, 21))
    assert (found.spread, found.verdict) == (0, "faster")
    found = compare.result([[1.0], [1.2], [1.0], [1.2]], [[1.1], [1.1], [1.1], [1.1]])
    assert (found.spread, found.verdict) == (pytest.approx(1 - 1 / 1.2), "within noise")


@pytest.mark.slow
def test_two_processes_of_this_tree(tmp_path: pathlib.Path) -> None:
    package, name = (
        pathlib.Path(frd_kernels.__file__).parent,
        "pdc_weight central [256x256x3x3] float32 nchw forward",
    )
    ours, base = (compare.Tree(label, package, tmp_path / label, 1) for label in ("this tree", "the base"))
    try:
        found = compare.compare_case(ours, base, name, turns=2)
        assert found.ours > 0 and found.base > 0
        with pytest.raises(compare.CompareError, match="this tree: ValueError"):
            compare.compare_case(ours, base, "no such case")
        assert base.process is not None
        base.process.kill()
        with pytest.raises(compare.CompareError, match="the base: the process ended with status -9"):
            compare.compare_case(ours, base, name, turns=2)
        # It has started again.
        assert compare.compare_case(ours, base, name, turns=2).base > 0
    finally:
        ours.close()
        base.close()


@pytest.mark.parametrize("last", ["", "sys.exit('no compiler here')"], ids=["builds", "fails"])
def test_the_worktree_of_a_revision_is_removed(tmp_path: pathlib.Path, last: str) -> None:
    """On a small repository with a setup.py of its own, which sees what it is to build."""
    root = tmp_path / "root"
    (root / "frd_kernels").mkdir(parents=True)
    (root / "frd_kernels" / "__init__.py").write_text("")
    script = "import os, sys\nopen('frd_kernels/built', 'w').write(os.environ['FRD_CUDA'])\n"
    (root / "setup.py").write_text(script + last)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for git in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(root), *git], check=True)
    fails = pytest.raises(compare.CompareError, match="does not build:\nno compiler here")
    with fails if last else contextlib.nullcontext(), compare.built(root, "HEAD", tmp_path) as package:
        assert (package / "built").read_text() == "OFF"
        assert package != root / "frd_kernels"
    assert not (tmp_path / "tree").exists()
    assert len(compare.git(root, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "margins"),
    [
        ({"python": "3.11.9"}, {"instructions": 0.05, "entries": 0.05, "python_calls": 0.15}),
        ({"python": "3.12.1"}, {"instructions": 0.05, "entries": 0.05}),
        ({"torch": "2.14.1"}, {"instructions": 0.10}),
    ],
)
def test_margins_follow_what_is_comparable(change: dict[str, str], margins: dict[str, float]) -> None:
    assert regression.margins(ENVIRONMENT | change, ENVIRONMENT) == margins


LIMITS = {"instructions": 1050, "entries": 21, "python_calls": 46}


@pytest.mark.parametrize("figure", LIMITS)
def test_gate_on_recorded_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figure: str
) -> None:
    counted = {"environment": ENVIRONMENT, "cases": {"x": dict(COUNTS), "y": dict(COUNTS)}}
    monkeypatch.setattr(regression, "problem", lambda: "")
    monkeypatch.setattr(regression, "count_all", lambda only: counted)
    monkeypatch.setattr(regression, "RECORDED", tmp_path / "counts.json")
    assert command.main(["gate", "--update"]) == 0
    for more, status in ((0, 0), (1, 1), (-10, 0)):
        counted["cases"]["x"][figure] = LIMITS[figure] + more
        assert command.main(["gate"]) == status
        out = capsys.readouterr().out
        assert (f"GROWN {figure} " in out) == bool(status) and out.endswith(f", {status} grown\n")
    counted["environment"] = ENVIRONMENT | {"compiler": "14.1.0"}
    assert command.main(["gate"]) == regression.NOT_COMPARABLE
    assert "no counts for 'avx2, compiler 14.1.0'" in capsys.readouterr().out


def test_update_keeps_what_was_not_counted(tmp_path: pathlib.Path) -> None:
    path, second = tmp_path / "counts.json", COUNTS | {"entries": 7}
    name = regression.key(ENVIRONMENT)
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"x": COUNTS, "y": COUNTS}}, whole=True)
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"y": second}}, whole=False)
    assert machine.read_json(path)[name]["cases"] == {"x": COUNTS, "y": second}
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"y": COUNTS}}, whole=True)
    assert machine.read_json(path)[name]["cases"] == {"y": COUNTS}


def test_counts_repeat_and_a_slower_call_fails_the_gate() -> None:
    script = """
import dataclasses, json, torch
from benchmarks import regression, registry
torch.set_num_threads(1)
if reason := regression.problem():
    raise SystemExit(f"SKIP {reason}")
case = dataclasses.replace(registry.cases("cpu", "pdc_weight central")[0], shape=(8, 8, 3, 3), compiled=())
call = case.build(case).ours["cpu"]
counts = [regression.count(c) for c in (call, call, lambda: (call(), call()))]
print(json.dumps([dataclasses.asdict(c) for c in counts]))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    if result.stderr.startswith("SKIP"):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    once, again, twice = json.loads(result.stdout)
    assert once == again
    assert twice["instructions"] == 2 * once["instructions"]
    allowed = regression.margins(ENVIRONMENT, ENVIRONMENT)
    assert regression.grown(again, once, allowed) == []
    grown = [text.split(",")[0] for text in regression.grown(twice, once, allowed)]
    assert grown[:2] == ["instructions +100.0%", "entries +100.0%"]


@pytest.mark.slow
def test_no_kernel_needs_more_instructions_than_recorded() -> None:
    names = ["pdc_weight angular", "pdc vanilla depthwise", "cluster"]
    only = [option for name in names for option in ("--only", name)]
    gate = [sys.executable, "-m", "benchmarks", "gate", *only]
    result = subprocess.run(gate, cwd=ROOT, capture_output=True, text=True)
    if result.returncode == regression.NOT_COMPARABLE:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": ok") >= len(names)
