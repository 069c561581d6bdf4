"""The benchmark: every case's correctness gate, how times are taken, records and the command. No time decides here."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import frd_kernels as fk
from benchmarks import __main__ as command
from benchmarks import cluster, gate, machine, registry, timing
from frd_model import cli
from frd_model.cli import bench

ROOT = pathlib.Path(__file__).parents[2]
CASES = registry.cases()
QUICK = registry.cases(quick=True)
# The cases of GPUs compute on the CPU here: other data types and shapes of the same operations.
ALL = [(case, "") for case in CASES] + [(case, "gpu ") for case in registry.cases("cuda")]
# Inputs and parameters of each op.
GRADIENTS = {"pdc": 2, "pdc_weight": 1, "pdc_block": 3, "dpm": 5, "icm": 15, "cluster": 4}
TINY = "pdc_weight central [256x256x3x3] float32 nchw forward"


def reduced(case: registry.Case, **changes: Any) -> registry.Case:
    """The case on less data, on the CPU; the clusters of the ICM need room to lie apart."""
    channels = 128 if case.op.startswith("icm") else 32
    shape = (24, 16, 3, 3) if case.op.startswith("pdc_weight") else (min(case.shape[0], 2), channels, 16, 16)
    return dataclasses.replace(case, **({"shape": shape, "device": "cpu", "compiled": ()} | changes))


def constant(value: torch.Tensor) -> registry.Call:
    return lambda: (value,)


def impls(ours: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> registry.Impls:
    return registry.Impls({"cpu": constant(ours)}, {"baseline": constant(baseline)}, constant(exact))


@pytest.fixture
def case() -> registry.Case:
    return reduced(QUICK[0])


@pytest.mark.parametrize("case", [case for case, _ in ALL], ids=[where + case.name for case, where in ALL])
def test_gate_is_green(case: registry.Case) -> None:
    case = reduced(case)
    built = case.build(case)
    errors = gate.gate(case, built)
    assert set(errors) == {"ours", *built.baselines}
    if case.mean:
        assert errors["ours"] < min(error for name, error in errors.items() if name != "ours")
    for call in (*built.ours.values(), *built.baselines.values()):
        results = call()
        assert len(results) == 1 + GRADIENTS[case.op.split()[0]] * case.backward
        assert not any(result.requires_grad for result in results)
        if case.layout == "channels_last":
            # The output, and the gradient of the image.
            assert all(out.is_contiguous(memory_format=torch.channels_last) for out in results[:2])


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("shape", [(2, 128, 16, 16), *cluster.SHAPES])
def test_clusters_lie_apart(variant: str, shape: tuple[int, ...]) -> None:
    """In no round can rounding decide a label: the two best cosines differ by a thousand times its error."""
    some = dataclasses.replace(cluster.CASES[0], shape=shape)
    x, *parameters = (t.double() for t in cluster.icm_inputs(some, variant))
    projections, _alpha, _beta = cluster.split(parameters)
    tokens, hw = x.flatten(2).transpose(1, 2), shape[2:]
    for (key, key_bias, value, value_bias), grid in zip(projections, cluster.ICM_GRIDS, strict=True):
        keys, values = tokens @ key.T + key_bias, tokens @ value.T + value_bias
        centres = torch.nn.functional.adaptive_avg_pool2d(keys.transpose(1, 2).unflatten(2, hw), grid)
        units = torch.nn.functional.normalize(centres.flatten(2).transpose(1, 2), dim=2)
        best = (torch.nn.functional.normalize(keys, dim=2) @ units.transpose(1, 2)).topk(2, dim=2).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-3
        aggregate = "count" if variant == "paper" else "similarity"
        tokens = fk.reference.cluster(keys, values, grid, hw, aggregate=aggregate, beta=0.1).centres
        hw = grid


def test_the_registry() -> None:
    for device in ("cpu", "cuda"):
        names = [case.name for case in registry.cases(device)]
        assert len(set(names)) == len(names) >= 58
    assert {case.op.split()[0] for case in CASES} == {"pdc", "pdc_weight", "dpm", "icm", "cluster"}
    assert [case.name for case in registry.cases(only="icm paper", quick=True)] == [
        "icm paper [4x256x16x16] float32 nchw forward"
    ]


ONES, NOTHING = torch.ones(4, dtype=torch.float64), torch.full((4,), float("nan"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "baseline", "words"),
    [
        (1.9e-6, 1e-6, ""),
        (2.1e-6, 1e-6, "relative error 2.10e-06, at most 2.00e-06 is allowed"),
        (4.6e-7, 0.0, ""),
        (1e-4, 1.0, "at most 1.00e-05 is allowed"),
        (1e-4, NOTHING, "at most 1.00e-05 is allowed"),
        (NOTHING, NOTHING, "relative error inf"),
        (torch.zeros(3), 1.0, "relative error inf"),
    ],
    ids=["twice", "more", "rounding", "wrong-baseline", "no-baseline", "nan", "shape"],
)
def test_gate_allows_twice_the_baselines_error_within_its_cap(
    case: registry.Case, ours: Any, baseline: Any, words: str
) -> None:
    results = (value if isinstance(value, torch.Tensor) else ONES * (1 + value) for value in (ours, baseline))
    built = impls(*results, ONES)
    if words:
        with pytest.raises(gate.GateError, match=f"pdc angular.*{words}"):
            gate.gate(case, built)
    else:
        assert gate.gate(case, built)["ours"] == pytest.approx(ours)


def test_one_wrong_pixel_is_seen(case: registry.Case) -> None:
    built = case.build(case)
    wrong = built.ours["cpu"]()[0].clone()
    wrong[0, 0, 0, 0] += 1
    with pytest.raises(gate.GateError):
        gate.gate(case, dataclasses.replace(built, ours={"cpu": constant(wrong)}))


def test_a_wrong_gradient_is_seen() -> None:
    (case,) = registry.cases(only="dpm [4x256x16x16] float32 nchw forward+backward")
    case = reduced(case)
    built = case.build(case)
    right = list(built.ours["cpu"]())
    for i, tensor in enumerate(right):
        wrong = [*right[:i], tensor * 1.001, *right[i + 1 :]]
        with pytest.raises(gate.GateError):
            gate.gate(case, dataclasses.replace(built, ours={"cpu": lambda wrong=wrong: wrong}))


def test_a_baseline_in_another_layout_does_not_set_the_limit(case: registry.Case) -> None:
    built = impls(ONES * (1 + 1.9e-6), ONES * (1 + 1e-6), ONES)
    built.baselines["converted"] = constant(ONES)
    built.converted.add("converted")
    assert gate.gate(case, built)["converted"] == 0
    built.converted.clear()
    with pytest.raises(gate.GateError, match=r"at most 4\.70e-07"):
        gate.gate(case, built)


def test_a_baseline_without_a_result_is_left_out(case: registry.Case) -> None:
    def broken() -> Any:
        raise RuntimeError("no\nkernel")

    built = impls(ONES, ONES, ONES)
    built.baselines.update(broken=broken, nothing=constant(NOTHING))
    assert gate.gate(case, built) == {"ours": 0, "baseline": 0}
    assert built.left_out["broken"] == "RuntimeError: no kernel"
    assert built.left_out["nothing"] == "its result contains NaN or has another shape"


def test_the_gate_sees_what_was_never_written(case: registry.Case) -> None:
    def forgetful() -> Any:
        out = torch.empty(4, dtype=torch.float64)
        out[:3] = 1
        return (out,)

    built = dataclasses.replace(impls(ONES, ONES, ONES), ours={"cpu": forgetful})
    with pytest.raises(gate.GateError, match="relative error inf"):
        gate.gate(case, built)
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_red_backend_does_not_hide_the_others(case: registry.Case) -> None:
    built = impls(ONES, ONES, ONES)
    built.ours.update(wrong=constant(ONES + 1), other=constant(ONES))
    (record,) = timing.measure(dataclasses.replace(case, build=lambda _case: built), repeats=2)
    assert record["red"] == ["wrong"]
    assert record["left_out"] == {"wrong": "RED GATE: relative error 1.00e+00, at most 4.70e-07 is allowed"}
    assert (record["backend"], list(record["backends"])) == ("cpu", ["cpu", "other"])


def test_forward_runs_without_autograd() -> None:
    x, seen = torch.randn(3, requires_grad=True), []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return 2 * x

    (out,) = registry.with_gradients(double, (x,), None, "forward")()
    assert not out.requires_grad
    out, grad = registry.with_gradients(double, (x,), torch.ones(3), "forward+backward")()
    assert grad.tolist() == [2, 2, 2]
    assert seen == [False, True]
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'backward'"):
        registry.with_gradients(double, (x,), None, "backward")


def test_a_call_keeps_to_its_timings_and_settings(case: registry.Case) -> None:
    built, seen = case.build(case), []
    built.contexts["eager"] = registry.cudnn_benchmark
    built.baselines["eager"] = lambda: (seen.append(torch.backends.cudnn.benchmark), torch.ones(1))[1:]
    built.timings["folded"] = ("graph",)
    record = timing.compare_all(built, timing.Wall(case, built), repeats=1)
    assert seen and all(seen) and not torch.backends.cudnn.benchmark
    assert "folded" not in record["baselines"] and "eager channels_last" in record["baselines"]


def test_implementations_alternate() -> None:
    log: list[str] = []
    samples = {name: lambda name=name: log.append(name) or 1.0 for name in "AB"}
    seconds = timing.interleave(samples, repeats=4)
    assert "".join(log) == "AAABBB" + "ABBAABBA"
    assert seconds == {"A": [1.0] * 4, "B": [1.0] * 4}
    assert gc.isenabled()
    seconds = timing.interleave(samples, repeats=100, budget_s=0.0)
    assert [len(values) for values in seconds.values()] == [timing.MIN_TURNS] * 2


def test_summary_of_times() -> None:
    times = timing.summarize([i / 1000 for i in (5, 1, 4, 2, 3, 6, 7, 8, 11, 9, 10)])
    assert tuple(times.values()) == pytest.approx((1, 6, 2, 10))
    record = timing.without_flush({"ours": [3.0, 3.0], "baseline": [5.0, 5.0], "flush": [1.0, 1.0]})
    assert (record["ratio"], record["flush_ms"]) == (2.0, 1000.0)
    with pytest.raises(timing.CannotTime, match="less than the writes before it vary"):
        timing.without_flush({"ours": [3.0], "baseline": [1.0], "flush": [1.0]})


@pytest.mark.slow
def test_the_compiled_baseline_is_checked_and_timed(
    case: registry.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, and not handed to a compiler, which takes long."""
    whole = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, mode, **options: whole(call, backend="eager", **options)
    )
    (record,) = timing.measure(dataclasses.replace(case, compiled=("default",)), repeats=2)
    assert record["relative_errors"]["compiled, default"] < 1e-6
    assert record["baselines"]["compiled, default"]["turns"] == 2


@pytest.mark.parametrize(
    ("name", "size", "flops"),
    [
        ("pdc angular depthwise [4x256x16x16] float32 nchw forward", 2, 0),
        ("pdc angular dense [4x64x64x64] float32 nchw forward+backward", 5, 3 * 8 * 2 * 16384 * 64**2),
        ("dpm [4x256x16x16] float32 nchw forward", 4, 2 * 2 * 1024 * 256**2),
        ("cluster [4x64x64x64] float32 nchw forward", 3, 0),
    ],
)
def test_lower_bounds(name: str, size: int, flops: int) -> None:
    """`size`: images that are moved at least."""
    (case,) = [case for case in CASES if case.name == name]
    image = 4 * torch.Size(case.shape).numel()
    assert (registry.min_bytes(case), registry.min_flops(case)) == (size * image, flops)
    calibration = {"copy": {"bytes_per_s": size * image}, "matrix": {"float32": {"flops_per_s": 1e9}}}
    bounds = registry.lower_bounds(case, calibration, ours_ms=2000)
    assert bounds["memory"] == {"ms": 1000, "ratio": 0.5}
    assert ("arithmetic" in bounds) == bool(flops)


def test_record_survives_json(case: registry.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    calibration = timing.calibrate("cpu", scale=1 / 128, repeats=2)
    (record,) = timing.measure(case, 2, calibration)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["baseline"] == "eager"
    assert set(record["baselines"]) == {"eager", "eager channels_last", "folded", "folded channels_last"}
    assert (record["device"], record["timing"], record["mean"]) == ("cpu", "wall", 0)
    assert record["backends"] == {"cpu": record["baselines"]["eager"]}
    assert set(record["lower_bounds"]) == {"plain F.conv2d", "memory"}
    assert record["ratio"] == record["baseline_ms"]["median"] / record["ours_ms"]["median"]
    assert record["turns"] == 2 and record["aa_spread"] >= 0 and record["quiet"]
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.5, 0.5))
    (record,) = timing.measure(case, 1)
    assert (record["load"], record["quiet"]) == (9.5, False)


def test_bench_writes_a_report_and_lines(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lines, threads = tmp_path / "kernels.json", tmp_path / "lines.jsonl", torch.get_num_threads()
    calibration = tmp_path / "calibration.json"
    machine.write_json(calibration, timing.calibrate("cpu", scale=1 / 128, repeats=2))
    options = ["--only", TINY, "--quick", "--out", str(out), "--lines", str(lines)]
    options += ["--calibration", str(calibration)]
    assert command.main(["list", "--only", TINY]) == 0
    assert capsys.readouterr().out.split("\n")[0] == TINY
    # Of the cases of `--quick` none has this name.
    assert command.main(options) == 2
    options.remove("--quick")
    assert command.main([*options, "--repeats", "1", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(out.read_text())
    assert [record["name"] for record in written["cases"]] == [TINY, f"{TINY}+backward"]
    assert (written["threads"], written["problems"]) == (1, {})
    assert all("memory" in record["lower_bounds"] for record in written["cases"])
    assert written["load_limit"] == pytest.approx(1.2) and isinstance(written["quiet"], bool)
    kinds = [next(iter(line)) for line in machine.read_lines(lines)]
    assert kinds == ["head", "start", "end", "start", "end", "head"]
    # What the lines have is passed over.
    with lines.open("a") as file:
        file.write('{"cut": ')
    assert command.main([*options, "--repeats", "1"]) == 0
    assert json.loads(out.read_text())["cases"] == []
    assert [next(iter(line)) for line in machine.read_lines(lines)] == [*kinds, "head", "head"]


def test_a_red_gate_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dataclasses.replace(QUICK[0], build=lambda _case: impls(*torch.eye(3, dtype=torch.float64)))
    monkeypatch.setattr(registry, "cases", lambda *_: [wrong])
    assert cli.main(["bench", "--threads", "1"]) == 1
    assert f"no time shown for {wrong.name}: RED GATE: pdc angular" in capsys.readouterr().out
    assert cli.main(["bench", "run", "--check", "0/1"]) == 1
    assert f"RED: {wrong.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [["--repeats", "0"], ["run", "--threads", "two"], ["run", "--check", "4/4"], ["model", "--batches", "x"]],
)
def test_usage_errors(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(wrong)
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["gpu"], ["run", "--device", "cuda"], ["model", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "torch sees no GPU" in captured.err
    assert command.main(["list", "--device", "cuda", "--only", "icm released"]) == 0
    assert capsys.readouterr().out.count("bfloat16") == 6


def test_bench_outside_of_a_checkout(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "frd_model" / "cli" / "bench.py"))
    assert cli.main(["bench", "--quick"]) == 2
    assert capsys.readouterr().err == (
        "frd bench: works in a source checkout of frd_kernels: cd there, or run `python -m benchmarks`\n"
    )
    (tmp_path / "benchmarks").mkdir()
    assert bench.checkout() is None
    monkeypatch.chdir(ROOT / "docs")
    assert bench.checkout() == ROOT


@pytest.mark.slow
def test_each_implementation_is_an_entry_of_pytest_benchmark(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "results.json"
    options = [f"--benchmark-json={out}", "--benchmark-only", "--benchmark-max-time=0.02"]
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *options]
    selected = ["-k", "pdc_weight and central and not backward"]
    result = subprocess.run([*pytest_command, *selected], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = {e["extra_info"]["implementation"]: e for e in json.loads(out.read_text())["benchmarks"]}
    assert set(entries) == {"ours, cpu", "eager"}
    for entry in entries.values():
        assert entry["group"] == f"cpu: {TINY}"
        assert entry["stats"]["median"] > 0


def test_nothing_of_the_benchmarks_is_installed() -> None:
    script = """
import setuptools, sys
setuptools.setup = lambda **options: print(*options["packages"], options.get("package_dir"))
sys.argv = ["setup.py"]
exec(open("setup.py").read(), {"__file__": "setup.py", "__name__": "setup"})
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "frd_kernels" in result.stdout and "frd_model" in result.stdout, result.stderr
    assert "benchmarks" not in result.stdout


def test_the_revision_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.REVISION, "abc")
    assert machine.revision() == "abc"
    monkeypatch.delenv(machine.REVISION)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if head:
        assert machine.revision().removesuffix("+") == head
    monkeypatch.setattr(machine, "ROOT", pathlib.Path("/"))
    assert machine.revision() == "unknown"
