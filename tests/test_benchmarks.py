"""The benchmark: every case's correctness gate, the harness that takes the times, records and tables. No timing."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import pathlib
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_model import cli

# The folder `benchmarks` becomes a subpackage when it is installed.
PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
cpu, harness, icm, registry = (
    importlib.import_module(f"{PACKAGE}.{name}") for name in ("cpu", "harness", "icm", "registry")
)

CASES = cpu.cases()
SHORT = cpu.cases(short=True)
# The cases of GPUs compute on the CPU here: other data types and shapes of the same operations.
ALL = [(case, "") for case in CASES] + [(case, "gpu ") for case in registry.cases("cuda")]
# Inputs and parameters of each op.
GRADIENTS = {"pdc": 2, "pdc_weight": 1, "pdc_block": 3, "dpm": 5, "icm": 15, "cluster": 4}


def reduced(case: Any, compiled: tuple[str, ...] = ()) -> Any:
    """The case on less data, on the CPU; the clusters of the ICM need room to lie apart."""
    channels = 128 if case.op.startswith("icm") else 32
    shape = (24, 16, 3, 3) if case.op.startswith("pdc_weight") else (min(case.shape[0], 2), channels, 16, 16)
    return dataclasses.replace(case, shape=shape, device="cpu", compiled=compiled)


def constant(value: torch.Tensor) -> Any:
    return lambda: (value,)


def sides(ours: torch.Tensor, rival: torch.Tensor, exact: torch.Tensor) -> Any:
    return harness.Providers({"cpu": constant(ours)}, {"rival": constant(rival)}, constant(exact))


@pytest.fixture
def case() -> Any:
    return reduced(SHORT[0])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """`frd bench` runs the package under test, which the tree holds under another name."""
    monkeypatch.setitem(cli.PASSED_ON, "bench", (cpu.__name__, ""))


@pytest.mark.parametrize("case", [case for case, _ in ALL], ids=[where + case.name for case, where in ALL])
def test_gate_is_green(case: Any) -> None:
    case = reduced(case)
    built = case.build(case)
    errors = harness.gate(case, built)
    assert set(errors) == {"ours", *built.rivals}
    if case.mean:
        assert errors["ours"] < min(error for name, error in errors.items() if name != "ours")
    for call in (*built.ours.values(), *built.rivals.values()):
        results = call()
        assert len(results) == 1 + GRADIENTS[case.op.split()[0]] * case.backward
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
    for call in (*built.ours.values(), *built.rivals.values()):
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
    right = built.ours["cpu"]()[0]
    one_off, gap = right.clone(), right.clone()
    one_off[0, 0, 0, 0] += 1
    gap[0, 0, 0, 0] = float("nan")
    for wrong in (one_off, gap, right[:, :, :1], right.flip(3)):
        with pytest.raises(harness.GateError, match="pdc angular"):
            harness.gate(case, dataclasses.replace(built, ours={"cpu": constant(wrong)}))


def test_a_failing_rival_does_not_let_us_through(case: Any) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    nothing = exact * float("nan")
    for rival in (nothing, exact + 1):
        with pytest.raises(harness.GateError):
            harness.gate(case, sides(exact + 1e-4, rival, exact))
    with pytest.raises(harness.GateError, match="relative error inf"):
        harness.gate(case, sides(nothing, nothing, exact))


def test_a_rival_in_another_layout_is_no_yardstick(case: Any) -> None:
    exact = torch.randn(50, dtype=torch.float64)
    built = sides(exact * (1 + 1.9e-6), exact * (1 + 1e-6), exact)
    built.rivals["converted"] = constant(exact)
    built.converted.add("converted")
    assert harness.gate(case, built)["converted"] == 0
    built.converted.clear()
    with pytest.raises(harness.GateError, match=r"at most 4\.70e-07"):
        harness.gate(case, built)


def test_a_rival_without_a_result_is_left_out(case: Any) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    built = sides(exact, exact, exact)

    def broken() -> Any:
        raise RuntimeError("no\nkernel")

    built.rivals.update(broken=broken, nothing=constant(exact * float("nan")))
    assert harness.gate(case, built) == {"ours": 0, "rival": 0}
    assert list(built.rivals) == ["rival"]
    assert built.left_out == {
        "broken": "RuntimeError: no kernel",
        "nothing": "its result holds NaN or has another shape",
    }


def test_the_gate_sees_what_was_never_written(case: Any) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    built = sides(exact, exact, exact)

    def forgetful() -> Any:
        out = torch.empty(4, dtype=torch.float64)
        out[:3] = 1
        return (out,)

    with pytest.raises(harness.GateError, match="relative error inf"):
        harness.gate(case, dataclasses.replace(built, ours={"cpu": forgetful}))
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_red_backend_does_not_hide_the_others(case: Any) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    built = sides(exact, exact, exact)
    built.ours.update(wrong=constant(exact + 1), other=constant(exact))
    record = harness.run_case(dataclasses.replace(case, build=lambda _case: built), repeats=2)
    assert record["red"] == ["wrong"]
    assert record["left_out"] == {"wrong": "RED GATE: relative error 1.00e+00, at most 4.70e-07 is allowed"}
    assert (record["backend"], list(record["backends"])) == ("cpu", ["cpu", "other"])
    built.ours.clear()
    built.ours.update(one=constant(exact + 1), two=constant(-exact))
    with pytest.raises(harness.GateError, match=r"one: relative error .* two: relative error"):
        harness.run_case(dataclasses.replace(case, build=lambda _case: built), repeats=2)


def test_a_wrong_gradient_is_seen() -> None:
    (case,) = cpu.cases("dpm [4x256x16x16] float32 nchw forward+backward")
    case = reduced(case)
    built = case.build(case)
    for i in range(1 + GRADIENTS["dpm"]):
        wrong = list(built.ours["cpu"]())
        wrong[i] = wrong[i] * 1.001
        with pytest.raises(harness.GateError):
            harness.gate(case, dataclasses.replace(built, ours={"cpu": lambda wrong=wrong: wrong}))


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
    assert set(record["rivals"]) == {"eager", "eager channels_last", "folded", "folded channels_last"}
    assert (record["device"], record["timing"], record["mean"]) == ("cpu", "wall", 0)
    assert record["backends"] == {"cpu": record["rivals"]["eager"]}
    assert record["floors"]["plain F.conv2d"]["turns"] == 2
    assert record["ratio"] == record["rival_ms"]["median"] / record["ours_ms"]["median"]
    assert record["turns"] == 2
    assert record["aa_spread"] >= 0
    assert record["quiet"]
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.5, 0.5))
    record = harness.run_case(case, repeats=1)
    assert (record["load"], record["quiet"]) == (9.5, False)


def test_bench_command_writes_a_report(
    bench: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
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
