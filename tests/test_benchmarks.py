"""The benchmark: every case's correctness gate, the harness that takes the times, records and tables. No timing."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_model import cli

ROOT = pathlib.Path(__file__).parents[1]
# The folder `benchmarks` becomes a subpackage when it is installed.
PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
cpu, harness, icm, report = (
    importlib.import_module(f"{PACKAGE}.{name}") for name in ("cpu", "harness", "icm", "report")
)

CASES = cpu.cases()
SHORT = cpu.cases(short=True)
GRADIENTS = {"pdc": 2, "pdc_weight": 1, "dpm": 5, "icm": 15, "cluster": 4}  # inputs and parameters of each op


def reduced(case: Any) -> Any:
    """The case on less data; the clusters of the ICM need room to lie apart."""
    if case.op.startswith("pdc_weight"):
        return dataclasses.replace(case, shape=(24, 16, 3, 3))
    channels = 128 if case.op.startswith("icm") else 32
    return dataclasses.replace(case, shape=(min(case.shape[0], 2), channels, 16, 16))


def constant(value: torch.Tensor) -> Any:
    return lambda: (value,)


def sides(ours: torch.Tensor, rival: torch.Tensor, exact: torch.Tensor) -> Any:
    return harness.Providers(constant(ours), {"rival": constant(rival)}, constant(exact))


@pytest.fixture
def case() -> Any:
    return reduced(SHORT[0])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """`frd bench` runs the package under test, which the tree holds under another name."""
    monkeypatch.setitem(cli.PASSED_ON, "bench", (cpu.__name__, ""))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate_is_green(case: Any) -> None:
    case = reduced(case)
    built = case.build(case)
    errors = harness.gate(case, built)
    assert set(errors) == {"ours", *built.rivals}
    backward = case.mode == "forward+backward"
    for call in (built.ours, *built.rivals.values()):
        results = call()
        assert len(results) == 1 + GRADIENTS[case.op.split()[0]] * backward
        assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_gate_is_green_on_the_real_shape(case: Any) -> None:
    harness.gate(case, case.build(case))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.layout == "channels_last"], ids=lambda case: case.name
)
def test_both_sides_work_in_channels_last(case: Any) -> None:
    case = reduced(case)
    built = case.build(case)
    for call in (built.ours, *built.rivals.values()):
        # The output, and the gradient of the image.
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in call()[:2])


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("shape", [(2, 128, 16, 16), *icm.SHAPES])
def test_clusters_lie_apart(variant: str, shape: tuple[int, ...]) -> None:
    """In no round can rounding decide a label: the two best cosines differ by a thousand times its error."""
    x, *parameters = (t.double() for t in icm.data(dataclasses.replace(icm.CASES[0], shape=shape), variant))
    projections, _alpha, _beta = icm.split(parameters)
    tokens, hw = x.flatten(2).transpose(1, 2), shape[2:]
    for (key, key_bias, value, value_bias), grid in zip(projections, icm.GRIDS, strict=True):
        keys, values = tokens @ key.T + key_bias, tokens @ value.T + value_bias
        centres = torch.nn.functional.adaptive_avg_pool2d(keys.transpose(1, 2).unflatten(2, hw), grid)
        units = torch.nn.functional.normalize(centres.flatten(2).transpose(1, 2), dim=2)
        best = (torch.nn.functional.normalize(keys, dim=2) @ units.transpose(1, 2)).topk(2, dim=2).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-3
        aggregate = "count" if variant == "paper" else "similarity"
        tokens = fk.reference.cluster(keys, values, grid, hw, aggregate=aggregate, beta=0.1).centres
        hw = grid


def test_names_are_unique_and_targets_stand() -> None:
    targets = {case.name: case.target for case in CASES}
    assert len(targets) == len(CASES)
    small = "[4x256x16x16] float32"
    assert targets[f"pdc angular depthwise {small} nchw forward"] == 1.5
    assert targets[f"pdc angular depthwise {small} channels_last forward"] == 1.0
    assert targets[f"pdc central depthwise {small} channels_last forward"] == 2.0
    assert targets[f"pdc angular depthwise {small} nchw forward+backward"] == 2.0
    assert targets[f"dpm {small} channels_last forward"] == 1.8
    assert targets[f"icm released {small} nchw forward+backward"] == 4.0
    assert targets[f"pdc radial depthwise {small} nchw forward"] is None


def test_gate_lets_through_twice_the_rivals_error(case: Any) -> None:
    exact = torch.randn(50, dtype=torch.float64)
    rival = exact * (1 + 1e-6)
    errors = harness.gate(case, sides(exact * (1 + 1.9e-6), rival, exact))
    assert errors["ours"] == pytest.approx(1.9e-6)
    with pytest.raises(harness.GateError, match=r"relative error 2.10e-06, at most 2.00e-06"):
        harness.gate(case, sides(exact * (1 + 2.1e-6), rival, exact))


def test_gate_is_red_for_wrong_results(case: Any) -> None:
    built = case.build(case)
    right = built.ours()[0]
    one_off, gap = right.clone(), right.clone()
    one_off[0, 0, 0, 0] += 1
    gap[0, 0, 0, 0] = float("nan")
    for wrong in (one_off, gap, right[:, :, :1], right.flip(3)):
        with pytest.raises(harness.GateError, match="pdc angular"):
            harness.gate(case, dataclasses.replace(built, ours=constant(wrong)))


def test_a_failing_rival_does_not_let_us_through(case: Any) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    nothing = exact * float("nan")
    for rival in (nothing, exact + 1):
        with pytest.raises(harness.GateError):
            harness.gate(case, sides(exact + 1e-4, rival, exact))
    with pytest.raises(harness.GateError, match="relative error inf"):
        harness.gate(case, sides(nothing, nothing, exact))


def test_a_wrong_gradient_is_seen() -> None:
    (case,) = cpu.cases("dpm [4x256x16x16] float32 nchw forward+backward")
    case = reduced(case)
    built = case.build(case)
    for i in range(1 + GRADIENTS["dpm"]):
        wrong = list(built.ours())
        wrong[i] = wrong[i] * 1.001
        with pytest.raises(harness.GateError):
            harness.gate(case, dataclasses.replace(built, ours=lambda wrong=wrong: wrong))


def test_forward_runs_without_autograd() -> None:
    x, seen = torch.randn(3, requires_grad=True), []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return 2 * x

    (out,) = harness.with_gradients(double, (x,), None, "forward")()
    assert not out.requires_grad
    out, grad = harness.with_gradients(double, (x,), torch.ones(3), "forward+backward")()
    assert grad.tolist() == [2, 2, 2]
    assert seen == [False, True]
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'backward'"):
        harness.with_gradients(double, (x,), None, "backward")


def test_turns_alternate() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "AB"}
    seconds = harness.alternate(calls, repeats=4, warmup=2)
    assert "".join(log) == "AABB" + "ABBAABBA"
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert gc.isenabled()


def test_a_long_case_takes_fewer_turns() -> None:
    seconds = harness.alternate({"A": tuple, "B": tuple}, repeats=100, budget_s=0.0)
    assert [len(values) for values in seconds.values()] == [5, 5]


def test_summary_of_times() -> None:
    timing = harness.summarise([i / 1000 for i in (5, 1, 4, 2, 3, 6, 7, 8, 11, 9, 10)])
    assert (timing.minimum, timing.median, timing.p10, timing.p90) == pytest.approx((1, 6, 2, 10))


def test_record_survives_json(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    record = harness.run_case(case, repeats=2)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["rival"] == "eager"
    assert set(record["rivals"]) == {"eager", "folded", "folded channels_last"}
    assert record["ratio"] == record["rival_ms"]["median"] / record["ours_ms"]["median"]
    assert record["turns"] == 2
    assert record["aa_spread"] >= 0
    assert record["quiet"]
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.5, 0.5))
    record = harness.run_case(case, repeats=1)
    assert (record["load"], record["quiet"]) == (9.5, False)


def made_up(ratio: float, target: float | None, **changes: Any) -> dict[str, Any]:
    times = {"ours_ms": {"median": 2.0}, "rival_ms": {"median": 2.0 * ratio}, "ratio": ratio}
    record = {"op": "dpm", "shape": [1, 2], "dtype": "float32", "layout": "nchw", "mode": "forward"}
    others = {
        "rival": "eager",
        "rivals": {"eager": times, "folded": {"ratio": 1.25}},
        "floors": {"bare": {"ratio": 0.5}},
        "aa_spread": 0.02,
    }
    return record | times | others | {"target": target, "quiet": True} | changes


def test_tables() -> None:
    records = [
        made_up(2.5, 2.0),
        made_up(1.5, 2.0, layout="channels_last"),
        made_up(1.01, 1.0, op="icm", mode="forward+backward"),
        made_up(9.0, None, dtype="bfloat16", quiet=False),
    ]
    rows = report.cpu_table({"cases": records}).splitlines()
    assert rows[2] == (
        "| dpm | [1, 2] | float32 | nchw | forward | 2.000 | 5.000 | 2.50x | 2.0% | 2.0x | yes "
        "| folded 1.25x, bare 0.50x |"
    )
    assert [row.split(" | ")[10] for row in rows[2:]] == ["yes", "**no**", "within noise", "-"]
    assert report.cpu_summary({"cases": records}).splitlines()[2:] == [
        "| dpm | forward | 1.5x | 2.5x |",
        "| icm | forward+backward | 1.0x | 1.0x |",
    ]


def test_conditions_tell_of_a_busy_machine() -> None:
    machine = {
        "machine": {"cpu": "A CPU"},
        "build": {"cpu_isa": "avx2"},
        "versions": {"torch": "2.11", "python": "3.10"},
    }
    written = {"machine": machine, "threads": 2, "when": "2026-01-02T03", "load_before": [0.25, 1, 1]}
    assert report.cpu_conditions(written | {"cases": [made_up(2.0, None)]}) == (
        "A CPU, 2 threads, avx2 kernels, torch 2.11, Python 3.10, float32 unless said, 2026-01-02, load average "
        "before the run 0.2."
    )
    busy = report.cpu_conditions(written | {"cases": [made_up(2.0, None), made_up(2.0, None, quiet=False)]})
    assert "Something else ran on the machine during 1 of 2 cases." in busy


def test_report_replaces_only_its_tables() -> None:
    text = "a\n<!-- table:cpu -->\nold\n<!-- /table:cpu -->\nb\n<!-- table:gpu -->\n<!-- /table:gpu -->\n"
    replaced = report.replace_table(text, "cpu", r"new \1")
    assert replaced == text.replace("old", r"new \1")
    assert report.replace_table(replaced, "cpu", r"new \1") == replaced
    assert report.replace_table(text, "none", "x") == text


def write_demo_results(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    figures = {"permute_f1": 0.25, "f1": 0.25, "auc": 0.5, "iou": 0.125}
    clean = {"pixel_false_alarm": 0.05, "photo_false_alarm": 0.5, "score_auc": 0.75}
    summary = {"forged": figures, "by_kind": {"removal": figures}, "white_mask": figures, "authentic": clean}
    kept = {"epoch": 3.0, "val/auc": 0.9, "val/permute_f1": 0.5, "val/f1": 0.5, "val/false_alarm": 0.01}
    run = {"seed": 1, "epochs": 4, "steps_per_epoch": 2, "batch_size": 8, "fastest_epoch_seconds": 9.0}
    for name, value in (
        ("heldout", summary),
        ("untrained", summary),
        ("training", run | {"kept": kept, "machine": "a machine"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_bench_command_writes_a_report(
    bench: None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    out = results / "cpu" / "kernels.json"
    threads = torch.get_num_threads()
    assert cli.main(["bench", "--short", "--repeats", "1", "--threads", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in SHORT)
    written = json.loads(out.read_text())
    assert [record["name"] for record in written["cases"]] == [case.name for case in SHORT]
    assert written["threads"] == 1
    assert written["load_limit"] == pytest.approx(1.2)
    assert isinstance(written["quiet"], bool)

    write_demo_results(results / "demo")
    docs.mkdir()
    names = ("cpu", "cpu-summary", "cpu-conditions", "demo-heldout", "demo-alarms", "demo-training")
    marks = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in names)
    for document in (docs / "performance.md", docs / "model-card.md", tmp_path / "README.md"):
        document.write_text(marks)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)
    assert report.main() == 0
    text = (docs / "performance.md").read_text()
    assert "| icm paper | [4, 256, 16, 16] | float32 | nchw | forward |" in text
    assert "1 threads" in text
    assert "| all-white mask | 0.250 | 0.250 | 0.500 | 0.125 |" in text
    assert "| **demo checkpoint** | 5.0 % | 50.0 % | 0.750 |" in text
    assert "| kept | epoch 3 |" in text
    assert (tmp_path / "README.md").read_text() == text


def test_a_red_gate_is_exit_status_1(
    bench: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dataclasses.replace(SHORT[0], build=lambda _case: sides(*torch.eye(3, dtype=torch.float64)))
    monkeypatch.setattr(cpu, "cases", lambda only="", short=False: [wrong])
    assert cli.main(["bench", "--threads", "1"]) == 1
    _header, line = capsys.readouterr().out.splitlines()
    assert line.startswith("RED GATE, no time shown: pdc angular depthwise")


def test_bench_lists_and_selects(bench: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--only", "icm paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("icm paper [") and line.endswith("target 4.0x") for line in lines)


@pytest.mark.parametrize("wrong", [["--only", "fft"], ["--repeats", "0"], ["--threads", "two"]])
def test_bench_usage_errors(bench: None, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *wrong])
    assert stop.value.code == 2


def test_pytest_benchmark_entry_points() -> None:
    selected = "pdc_weight and angular and not backward"
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks",
        "--benchmark-only",
        "-k",
        selected,
    ]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
