"""Comparing result files and revisions, and the regression gate. Only counts decide here, no times."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import frd_kernels
from frd_model import cli

ROOT = pathlib.Path(__file__).parents[1]
# The folder `benchmarks` becomes a subpackage when it is installed.
PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
against, compare, main, regression = (
    importlib.import_module(f"{PACKAGE}.{name}") for name in ("against", "compare", "main", "regression")
)
ENVIRONMENT = {"isa": "avx2", "compiler": "12.2.0", "torch": "2.11.0", "python": "3.11.7"}
COUNTS = {"instructions": 1000, "entries": 20, "python_calls": 40}


def record(
    name: str, ours: float, rival: float, spread: float = 0.01, width: float = 0.0, **more: Any
) -> Any:
    """Times in milliseconds; p10 and p90 lie `width` of the median away from it."""
    times = {"median": ours, "p10": ours * (1 - width), "p90": ours * (1 + width)}
    return {
        "name": name,
        "ours_ms": times,
        "rival_ms": {"median": rival},
        "rival": "eager",
        "aa_spread": spread,
        **more,
    }


def report(*records: Any, cpu: str = "A", **more: Any) -> Any:
    machine = {"machine": {"cpu": cpu}, "build": "unknown (ImportError)", "versions": {"torch": "2.11"}}
    return {"when": "2026-01-02", "quiet": True, "machine": machine, "cases": list(records), **more}


@pytest.fixture
def compared(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `frd bench compare` on two reports; gives the exit status and the lines."""

    def run(a: Any, b: Any, *options: str) -> tuple[int, list[str]]:
        for name, value in (("a", a), ("b", b)):
            (tmp_path / name).write_text(json.dumps(value))
        status = main.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *options])
        return status, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    ("a", "b", "plain", "normalised", "verdict"),
    [
        pytest.param(record("x", 1, 4), record("x", 2, 4), 0.5, 0.5, "slower", id="slower"),
        pytest.param(record("x", 2, 4), record("x", 1, 4), 2.0, 2.0, "faster", id="faster"),
        pytest.param(record("x", 1, 4), record("x", 2, 8), 0.5, 1.0, "within noise", id="slower-machine"),
        pytest.param(
            record("x", 1, 4, 0.2), record("x", 1.15, 4), 0.87, 0.87, "within noise", id="spread-of-a"
        ),
        pytest.param(
            record("x", 1, 4), record("x", 1.15, 4, 0.2), 0.87, 0.87, "within noise", id="spread-of-b"
        ),
        pytest.param(
            record("x", 1, 4, width=0.2),
            record("x", 1.1, 4, width=0.2),
            0.909,
            0.909,
            "within noise",
            id="inside",
        ),
        pytest.param(
            record("x", 1, 4, width=0.2), record("x", 1.1, 4), 0.909, 0.909, "slower", id="one-side-inside"
        ),
        pytest.param(record("x", 1, 4), record("x", 1.03, 4), 0.971, 0.971, "below 5%", id="small"),
    ],
)
def test_change_of_a_case(a: Any, b: Any, plain: float, normalised: float, verdict: str) -> None:
    change = compare.change(("cpu", "cpu", "wall", "x"), a, b, threshold=0.05)
    assert (change.plain, change.normalised) == pytest.approx((plain, normalised), abs=1e-3)
    assert change.verdict == verdict


def test_a_busy_machine_decides_nothing(compared: Any) -> None:
    a, b = record("x", 1, 4), record("x", 2, 4, quiet=False)
    change = compare.change(("cpu", "cpu", "wall", "x"), a, b, 0.05)
    assert change.verdict == "unsure on a busy machine, else slower"
    assert compared(report(a), report(b), "--fail-below", "0.9")[0] == 0
    assert compared(report(a), report(b | {"quiet": True}), "--fail-below", "0.9")[0] == 1


def test_another_rival_is_named() -> None:
    a, b = record("x", 1, 4), record("x", 1, 4) | {"rival": "folded"}
    assert compare.change(("cpu", "cpu", "wall", "x"), a, b, 0.05).verdict == (
        "within noise (another rival: eager / folded)"
    )


def test_compare_prints_the_worst_first_and_names_what_is_missing(compared: Any) -> None:
    a = report(record("pdc", 1, 2), record("icm", 1, 2), record("gone", 1, 2), threads=2)
    b = report(record("pdc", 1, 2), record("icm", 2, 2), record("new", 1, 2), threads=1, cpu="B", quiet=False)
    status, lines = compared(a, b)
    assert status == 0
    text = "\n".join(lines)
    for expected in ("CPU: A / B", "threads: 2 / 1", "B was measured on a busy machine"):
        assert f"WARNING: {expected}" in text
    cases = [line.split()[0] for line in lines if line.startswith(("pdc", "icm"))]
    assert cases == ["icm", "pdc"]
    assert "only in A: cpu, cpu, wall, gone" in text
    assert "only in B: cpu, cpu, wall, new" in text
    assert lines[-1].startswith("2 cases: geomean 0.707x, normalised 0.707x; worst 0.500x (icm)")


def test_timings_and_backends_of_a_gpu_are_cases_of_their_own(compared: Any) -> None:
    def both(cuda: float, triton: float, timing: str) -> Any:
        backends = {
            name: {"ours_ms": dict.fromkeys(("median", "p10", "p90"), ms)}
            for name, ms in (("cuda", cuda), ("triton", triton))
        }
        return record("dpm", cuda, 4, device="cuda", timing=timing, backend="cuda", backends=backends)

    status, lines = compared(
        report(both(1, 2, "wall"), both(1, 2, "graph")), report(both(2, 2, "graph"), both(1, 1, "wall"))
    )
    changes = [line.split("  ")[0] for line in lines if line.startswith("dpm")]
    assert changes == ["dpm, cuda, graph", "dpm, cuda, wall", "dpm, triton, graph", "dpm, triton, wall"]
    assert "normalised 1.000x; worst 0.500x (dpm, cuda, graph)" in lines[-1]
    assert status == 0


@pytest.mark.parametrize(
    ("ours", "spread", "options", "status"),
    [
        (1.25, 0.01, ["--fail-below", "0.9"], 1),
        (1.25, 0.01, ["--fail-below", "0.7"], 0),
        (1.25, 0.30, ["--fail-below", "0.9"], 0),
        (1.25, 0.01, ["--fail-below", "0.9", "--only", "icm"], 0),
        (1.25, 0.01, [], 0),
    ],
)
def test_fail_below(compared: Any, ours: float, spread: float, options: list[str], status: int) -> None:
    a = report(record("pdc", 1, 2, spread), record("icm", 1, 2))
    b = report(record("pdc", ours, 2, spread), record("icm", 1, 2))
    assert compared(a, b, *options)[0] == status


@pytest.mark.parametrize(
    ("b", "options", "words"),
    [
        (report(record("y", 1, 2)), [], "no case in common"),
        (report(record("x", 1, 2)), ["--only", "y"], "no case in common that holds 'y'"),
        (report(record("x", 1, 2)), ["--threshold", "200%"], "must lie between 0 and 100%"),
        ({"records": []}, [], "holds a list `cases`"),
    ],
)
def test_compare_usage_errors(
    compared: Any, capsys: pytest.CaptureFixture[str], b: Any, options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        compared(report(record("x", 1, 2)), b, *options)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_committed_result_file_equals_itself(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "benchmarks" / "results" / "cpu" / "kernels.json")
    assert main.main(["compare", path, path, "--fail-below", "1"]) == 0
    assert "geomean 1.000x, normalised 1.000x; worst 1.000x" in capsys.readouterr().out


def test_frd_bench_passes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.PASSED_ON, "bench", (main.__name__, ""))
    assert cli.main(["bench", "--list", "--only", "icm paper"]) == 0
    assert "icm paper [" in capsys.readouterr().out
    for arguments, words in ((["--help"], "--against REV"), (["compare", "--help"], "A.json B.json")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *arguments])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out


class Scripted:
    """A side whose answers are given: of "build", then of each "time"."""

    def __init__(self, build: Any, *times: Any) -> None:
        self.build, self.times = build, list(times)
        self.asked: list[str] = []

    def ask(self, do: str, **request: Any) -> Any:
        self.asked.append(do)
        return self.build if do == "build" else self.times.pop(0)


def test_turns_and_result_of_two_sides() -> None:
    ours = Scripted({"seconds": 0.01}, *[{"seconds": [0.010, 0.011]}] * 4)
    other = Scripted({"seconds": 0.02}, *[{"seconds": [0.020, 0.022]}] * 4)
    found = against.measure(ours, other, "x", turns=4)
    assert found.ratio == pytest.approx(2.0)
    assert (found.ours.median, found.other.median) == pytest.approx((10.5, 21))
    assert (found.spread, found.verdict) == (0, "faster")
    assert ours.asked == other.asked == ["build"] + 4 * ["time"]


def test_spread_of_one_sides_own_blocks() -> None:
    found = against.result([[1.0], [1.2], [1.0], [1.2]], [[1.1], [1.1], [1.1], [1.1]])
    assert found.spread == pytest.approx(1 - 1 / 1.2)
    assert found.verdict == "within noise"


def test_a_case_that_a_revision_cannot_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    fine, unable = Scripted({"seconds": 1.0}), Scripted({"error": "AttributeError: no pdc_block"})
    assert against.measure(fine, unable, "x") == "the other cannot run it: AttributeError: no pdc_block"
    assert against.measure(unable, fine, "x").startswith("this version cannot run it")
    crashing = Scripted({"seconds": 1.0}, {"error": "the process ended with status -11"})
    steady = Scripted({"seconds": 1.0}, {"seconds": [1.0]})
    assert against.measure(steady, crashing, "x") == "the other failed: the process ended with status -11"


def test_two_processes_of_this_version(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    package, name = pathlib.Path(frd_kernels.__file__).parent, "pdc_weight central"
    with (
        against.Side(package, tmp_path / "ours", 1) as ours,
        against.Side(package, tmp_path / "other", 1) as other,
    ):
        (forward, _both) = ours.ask("list", only=name, short=False)["cases"]
        found = against.measure(ours, other, forward, turns=2)
        assert found.ours.median > 0 and found.other.median > 0
        assert "ValueError" in ours.ask("build", name="no such case")["error"]
        assert ours.process is not None
        ours.process.kill()
        assert "ended with status -9" in ours.ask("list", only=name, short=False)["error"]
        assert len(ours.ask("list", only=name, short=False)["cases"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_against_needs_a_checkout(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["--against", "HEAD"]) == 1
    assert f"from a git checkout of frd_kernels: run it in one, got {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("builds", [True, False])
def test_the_worktree_of_a_revision_goes_again(
    tmp_path: pathlib.Path, builds: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a small repository with a setup.py of its own, which sees what it is to build."""
    root = tmp_path / "root"
    (root / "frd_kernels").mkdir(parents=True)
    script = "import os, sys\nopen('frd_kernels/built', 'w').write(os.environ['FRD_CUDA'])\n"
    (root / "setup.py").write_text(script if builds else script + "sys.exit('no compiler here')\n")
    (root / "frd_kernels" / "__init__.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    try:
        with against.built(root, "HEAD", tmp_path) as package:
            assert (package / "built").read_text() == "OFF"
            assert package != root / "frd_kernels"
    except against.AgainstError as error:
        assert not builds
        assert "the revision does not build:\nno compiler here" in str(error)
    else:
        assert builds
    assert not (tmp_path / "tree").exists()
    assert len(against.git(root, "worktree", "list").splitlines()) == 1
    with pytest.raises(against.AgainstError, match="git worktree"), against.built(root, "nothing", tmp_path):
        pass


def test_margins_follow_what_is_comparable() -> None:
    everything = {"instructions": 0.05, "entries": 0.05, "python_calls": 0.15}
    assert regression.margins(ENVIRONMENT, ENVIRONMENT) == everything
    assert regression.margins(ENVIRONMENT | {"python": "3.11.9"}, ENVIRONMENT) == everything
    other_python = regression.margins(ENVIRONMENT | {"python": "3.12.1"}, ENVIRONMENT)
    assert other_python == {"instructions": 0.05, "entries": 0.05}
    assert regression.margins(ENVIRONMENT | {"torch": "2.14.1"}, ENVIRONMENT) == {"instructions": 0.10}
    keys = {regression.key(ENVIRONMENT | change) for change in ({}, {"isa": "scalar"}, {"compiler": "14"})}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("figure", "value", "status"),
    [
        ("instructions", 1050, 0),
        ("instructions", 1051, 1),
        ("entries", 22, 1),
        ("python_calls", 46, 0),
        ("python_calls", 47, 1),
        ("instructions", 500, 0),
    ],
)
def test_gate_on_recorded_counts(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: str,
    value: int,
    status: int,
) -> None:
    counted = {"environment": ENVIRONMENT, "cases": {"x": dict(COUNTS), "y": dict(COUNTS)}}
    monkeypatch.setattr(regression.instructions, "problem", lambda: "")
    monkeypatch.setattr(regression, "count_all", lambda only, isa: counted)
    baselines = ["--baselines", str(tmp_path / "counts.json")]
    assert regression.main(["--update", *baselines]) == 0
    counted["cases"]["x"][figure] = value
    assert regression.main(baselines) == status
    out = capsys.readouterr().out
    assert (f"GROWN {figure} " in out) == bool(status)
    assert out.splitlines()[-1].endswith(f", {status} grown")
    counted["environment"] = ENVIRONMENT | {"compiler": "14.1.0"}
    assert regression.main(baselines) == regression.NOT_COMPARABLE
    assert "no counts for 'avx2, compiler 14.1.0'" in capsys.readouterr().out


def test_update_keeps_what_was_not_counted(tmp_path: pathlib.Path) -> None:
    path, second = tmp_path / "counts.json", COUNTS | {"entries": 7}
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"x": COUNTS, "y": COUNTS}}, whole=True)
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"y": second}}, whole=False)
    name = regression.key(ENVIRONMENT)
    assert json.loads(path.read_text())[name]["cases"] == {"x": COUNTS, "y": second}
    regression.update(path, {"environment": ENVIRONMENT, "cases": {"y": COUNTS}}, whole=True)
    assert json.loads(path.read_text())[name]["cases"] == {"y": COUNTS}


def in_tree(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python from the root of the checkout, where the counter's source lies."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_counts_repeat_and_a_slower_call_fails_the_gate() -> None:
    script = """
import dataclasses, json, torch
from benchmarks import instructions, registry
torch.set_num_threads(1)
if reason := instructions.problem():
    raise SystemExit(f"SKIP {reason}")
case = dataclasses.replace(registry.cases("cpu", "pdc_weight central")[0], shape=(8, 8, 3, 3), compiled=())
call = case.build(case).ours["cpu"]
counts = [instructions.count(c) for c in (call, call, lambda: (call(), call()))]
print(json.dumps([dataclasses.asdict(c) for c in counts]))
"""
    result = in_tree("-c", script)
    if result.stderr.startswith("SKIP"):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    once, again, twice = json.loads(result.stdout)
    assert once == again
    assert twice["instructions"] == 2 * once["instructions"]
    allowed = regression.margins(ENVIRONMENT, ENVIRONMENT)
    assert regression.grown(again, once, allowed) == []
    assert [text.split(",")[0] for text in regression.grown(twice, once, allowed)][:2] == [
        "instructions +100.0%",
        "entries +100.0%",
    ]


def test_no_kernel_needs_more_instructions_than_recorded() -> None:
    names = ["pdc_weight angular", "pdc vanilla depthwise", "cluster"]
    only = [option for name in names for option in ("--only", name)]
    result = in_tree("-m", "benchmarks.regression", *only)
    if result.returncode == regression.NOT_COMPARABLE:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": ok") >= len(names)
