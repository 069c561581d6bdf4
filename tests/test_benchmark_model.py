"""The benchmark of whole nets: gate, records, components, growth, plots, the table of complexity. No timing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import sys
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_model import create_model

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
components, growth, harness, memory, model, plots, sides, table2, timing = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in (
        *("components", "growth", "harness", "model_memory", "model"),
        *("plots", "model_sides", "table2", "model_timing"),
    )
)
# 64 pixels leave 4 x 4 tokens, which the presets' 64 centres would only tie.
SMALL: dict[str, Any] = {
    "grids": ((2, 2), (2, 1), (1, 1)),
    "stages": (1, 2),
    "trace_widths": (8, 8),
    "pyramid_width": 8,
}
QUICK: dict[str, Any] = {"budget_s": 0.0}


@pytest.fixture(scope="module")
def lite() -> Any:
    return sides.Subject("lite", 64, **SMALL)


def test_eager_nets_compute_the_same(lite: Any) -> None:
    for variant in ("paper", "released"):
        subject = lite if variant == "paper" else sides.Subject("lite", 64, **SMALL, variant="released")
        rivals = sides.rivals_of(subject.model)
        assert next(iter(rivals)) == "eager" and list(rivals)[-1] == sides.FOLDED
        assert ("eager, gather and scatter_add" in rivals) == (variant == "released")
        for rival in (subject.model, *rivals.values()):
            assert subject.error(rival, 1, torch.float32, "nchw") < 1e-5
            foreign = [m for m in rival.modules() if isinstance(m, (sides.EagerICM, sides.EagerDPM))]
            assert bool(foreign) == (rival is not subject.model)
        assert sides.FOLDED not in sides.rivals_of(subject.model, training=True)


def test_gradients_have_the_names_of_our_model(lite: Any) -> None:
    names = [name for name, _ in lite.model.named_parameters()]
    eager = sides.rivals_of(lite.model, training=True)["eager"]
    assert [sides.parameter_name(name) for name, _ in eager.named_parameters()] == names
    errors = sides.gradient_errors(*[{name: torch.ones(2) for name in names}] * 2)
    assert errors == {"icm": 0.0, "dpm": 0.0, "rest": 0.0}


@pytest.mark.parametrize("part", ["icm", "dpm", "stem"])
@pytest.mark.parametrize("mode", ["forward", "training step"])
def test_gate_is_red_for_a_spoiled_net(lite: Any, part: str, mode: str) -> None:
    setting = timing.Setting(1, mode, **QUICK)
    layouts = dict.fromkeys(("cpu", "eager", sides.FOLDED), "nchw")
    ours, rivals, _, left_out = timing.build_sides(lite, setting, layouts)
    assert left_out == {} and list(ours) == ["cpu"]
    check = timing.check_inference if mode == "forward" else timing.check_training
    errors, wrong = check(lite, setting, ours, rivals)
    assert set(errors) == {"cpu", *rivals} and wrong == {}
    kinds = {"icm": fk.ICM, "dpm": fk.DPM, "stem": fk.PDC2d}
    layer = next(m for m in ours["cpu"].model.modules() if isinstance(m, kinds[part]))
    with torch.no_grad():
        list(layer.parameters())[-1].mul_(1.003)
    with pytest.raises(harness.GateError, match="relative error"):
        check(lite, setting, ours, rivals)


def test_a_wrong_rival_is_dropped(lite: Any) -> None:
    setting = timing.Setting(1, **QUICK)
    ours, rivals, _, _ = timing.build_sides(
        lite, setting, dict.fromkeys(("cpu", "eager", sides.FOLDED), "nchw")
    )
    with torch.no_grad():
        next(rivals[sides.FOLDED].model.parameters()).mul_(2)
    _, wrong = timing.check_inference(lite, setting, ours, rivals)
    assert list(wrong) == [sides.FOLDED] and list(rivals) == ["eager"]


def test_near_ties_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sides.build_model("lite", **SMALL).double()
    flat = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    with sides.near_ties(net) as gaps, fk.use_backend("reference"):
        sides.block_outputs(net, flat)
    assert len(gaps) == 2 * 2 and min(gaps) < sides.NEAR_TIE
    monkeypatch.setattr(sides, "TRIES", 2)
    with pytest.raises(harness.GateError, match="without a near tie"):
        sides.Subject("lite", 64, grids=((8, 8), (4, 4), (2, 1))).batch(1)


def test_run_on_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[Any] = []
    peaks = {"1": {"ours": 10, "rival": 20}, "2": {"ours": 30, "rival": 40}}
    monkeypatch.setattr(memory, "measure", lambda *args: peaks)
    run = model.Run(500, saved.append)
    plan = model.Plan(("lite",), (1, 2), 64, ("eager",), budget_s=0.0, overrides=SMALL)
    model.run_on_cpu(plan, run)
    assert run.red == {}
    measured = [(r["mode"], r["batch"]) for r in run.records]
    assert measured[0] == ("forward", 1) and sorted(measured[1:]) == [("forward", 2), ("training step", 1)]
    for record in run.records:
        assert record["rival"] == "eager" and record["backend"] == "cpu" and record["timing"] == "wall"
        assert record["ratio"] == record["rivals"]["eager"]["ratio"] and record["turns"] >= 5
        assert record["shape"] == [record["batch"], 3, 64, 64] and record["aa_spread"] >= 0
        rate = 1e3 * record["batch"] / record["ours_ms"]["median"]
        assert record["images_per_s"]["ours"] == pytest.approx(rate)
        assert record.get("peak_bytes") == (
            peaks[str(record["batch"])] if record["mode"] == "forward" else None
        )
    assert len(saved) >= 4 and [c["variant"] for c in run.components] == ["lite"]
    report = model.report_of(run, "cpu", 64)
    assert json.loads(json.dumps(report))["records"] == report["records"]
    assert capsys.readouterr().out.count("images/s") == 3


def test_limit_leaves_the_rest_out() -> None:
    run = model.Run(0.0)
    assert not run.attempt("late", 1.0, lambda: pytest.fail("must not run"))
    assert "needs about 1 s" in run.left_out["late"]

    def wrong() -> None:
        raise harness.GateError("a net is wrong")

    assert not run.attempt("red", -1e9, wrong) and run.red == {"red": "a net is wrong"}


def test_gpu_records_rehearsed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        ("lite", timing.Setting(1, dtype=torch.bfloat16, rivals=1, **QUICK), 0),
        ("lite", timing.Setting(1, "training step", **QUICK), 0),
    ]
    monkeypatch.setattr(model, "gpu_settings", lambda: chosen)
    saved: list[Any] = []
    report = model.gpu_records(100.0, 64, "cpu", saved.append, **SMALL)
    assert [len(partial["records"]) for partial in saved] == [1, 2]
    assert report["red"] == {} and report["left_out"] == {}
    assert [(r["dtype"], r["mode"]) for r in report["records"]] == [
        ("bfloat16", "forward"),
        ("float32", "training step"),
    ]


def test_gpu_settings_are_what_the_report_needs() -> None:
    settings = list(model.gpu_settings())
    forward = {(v, s.batch) for v, s, _ in settings if s.mode == "forward" and s.dtype == torch.bfloat16}
    assert forward == {(v, b) for v in sides.VARIANTS for b in (1, 8, 16)}
    assert {v for v, s, _ in settings if s.mode == "training step" and s.batch == 8} == set(sides.VARIANTS)
    assert [s.dtype for _, s, _ in settings if s.execution == "compiled"] == [torch.bfloat16]
    assert any(s.dtype == torch.float32 for _, s, _ in settings)
    assert any(s.backends > 1 for _, s, _ in settings)


def test_backends_beyond_the_first_can_be_left_out(lite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "own_sides", lambda *_: (["cpu", "other"], {}, {}))
    ours, _rivals, _pilots, left_out = timing.build_sides(lite, timing.Setting(1, backends=1), {})
    assert list(ours) == ["cpu"]
    assert left_out == {"other": "not measured in this setting, to save time"}


def test_peak_memory_of_a_fresh_process() -> None:
    found = memory.measure("lite", 128, [1, 4], {"ours": "nchw", "rival": "channels_last"}, 200)
    assert set(found) == {"1", "4"}
    for side in ("ours", "rival"):
        # The stem's planes alone: 19 of them in float32.
        least = 4 * 128 * 128 * 19
        assert found["1"][side] >= least and found["4"][side] > 2 * found["1"][side]


def test_peak_memory_of_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = {"ours": "nchw", "rival": "nchw"}
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="peak memory: no message"):
        memory.measure("lite", 64, [1], layouts, 10)
    with pytest.raises(ValueError, match="variant must be one of"):
        sides.build_model("none")


def test_components_sum_to_the_whole(lite: Any) -> None:
    found = components.measure(lite, runs=2)
    for side in ("ours", "rival"):
        parts = found[side]["parts"]
        assert {"stem", "trace branch", "ICM", "DPM", "MLP", "decoder", "encoder, stage 2"} < set(parts)
        assert list(parts)[-1] == components.REST
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        assert sum(part["ms"] for part in parts.values()) == pytest.approx(found[side]["whole_ms"])
    assert "| ICM |" in components.table(found)


def test_components_do_not_overlap() -> None:
    net = create_model("frdnet_mit_b0", preset="lite")
    modules = [module for part in components.parts_of(net).values() for module in part]
    inner = [id(m) for module in modules for m in module.modules()]
    assert len(inner) == len(set(inner))
    parameters = {id(p) for module in modules for p in module.parameters()}
    scales = {id(p) for name, p in net.named_parameters() if "scale" in name}
    assert parameters | scales == {id(p) for p in net.parameters()}


def test_fit_finds_the_exponent() -> None:
    x = [1, 2, 4, 8]
    fit = growth.fit_power(x, [3 * v**1.5 for v in x])
    assert fit.exponent == pytest.approx(1.5) and fit.factor == pytest.approx(3)
    assert fit.r_squared == pytest.approx(1) and (fit.least, fit.most, fit.points) == (1, 8, 4)
    noisy = growth.fit_power(x, [1.0, 5.0, 3.0, 9.0])
    assert 0.5 < noisy.r_squared < 0.95
    for bad in ([1, 1, 1, 1], [0, 2, 4, 8]):
        with pytest.raises(ValueError, match="must be positive and pair two different x"):
            growth.fit_power(bad, [1.0, 2.0, 3.0, 4.0])


def fake_point(x: float, ms: float, **facts: Any) -> dict[str, Any]:
    time = {"minimum": ms, "median": ms, "p10": 0.9 * ms, "p90": 1.2 * ms}
    double = {key: 2 * value for key, value in time.items()}
    return {"x": x, "ours_ms": time, "rival_ms": double, "ratio": 2.0, **facts}


def test_growth_stops_at_its_limit() -> None:
    run = model.Run(50.0)
    found = growth.grow(run, "net", "batch", [4, 1, 2], lambda value: fake_point(value, 1e3 * value))
    # 20 calls of 4 s each would follow the first point.
    assert [point["x"] for point in found["points"]] == [1]
    assert sorted(run.left_out) == ["net, batch 2", "net, batch 4"] and found["fits"] == {}
    found = growth.grow(model.Run(1e6), "net", "batch", [4, 1, 2], lambda value: fake_point(value, value))
    assert found["fits"]["ours"]["exponent"] == pytest.approx(1)


def test_growth_of_a_kernel_and_of_a_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BUDGET_S", 0.0)
    run = model.Run(100.0)
    report = growth.grow_all(run, "", "pdc central depthwise", [512, 1024], [1, 2], "cpu")
    assert run.red == {} and run.left_out == {}
    assert [(s["name"], s["over"]) for s in report["series"]] == [
        ("pdc central depthwise", "size"),
        ("pdc central depthwise", "batch"),
    ]
    assert [p["shape"] for p in report["series"][0]["points"]] == [[1, 256, 16, 16], [1, 256, 32, 32]]
    assert set(report["series"][0]["fits"]) == {"ours", "rival"}
    with pytest.raises(ValueError, match="variants must be of"):
        growth.grow_all(run, "none", "", [512], [], "cpu")


def test_plots_of_a_folder(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    point = fake_point(1, 1.0)
    cases = [
        {"name": f"case {i}", "mode": "forward", "aa_spread": 0.1, **point, "ratio": 0.5 + i}
        for i in range(60)
    ]
    shares = {
        "whole_ms": 2.0,
        "parts": {"ICM": {"ms": 1.5, "share": 0.75}, "rest": {"ms": 0.5, "share": 0.25}},
    }
    points = [fake_point(s**2, s**2, size=s) for s in (256, 512)]
    series = [growth.series_of("model lite", "size", points), growth.series_of("icm", "batch", points)]
    (tmp_path / "kernels.json").write_text(json.dumps({"cases": cases}))
    (tmp_path / "model.json").write_text(
        json.dumps(
            {"records": cases[:2], "components": [{"variant": "lite", "ours": shares, "rival": shares}]}
        )
    )
    (tmp_path / "growth.json").write_text(json.dumps({"series": series}))
    written = plots.write_all(tmp_path)
    assert sorted(path.name for path in written) == [
        "components.png",
        "growth_icm_batch.png",
        "growth_model_lite_size.png",
        "ratio_forward.png",
        "ratio_model.png",
    ]
    assert all(path.stat().st_size > 5000 for path in written)
    kept = plots.by_plot(cases)["forward"]
    assert len(kept) == plots.BARS_OF_A_PLOT and kept[0]["ratio"] == 0.5 and kept[-1]["ratio"] == 59.5


def test_plots_without_matplotlib(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotError, match="pip install matplotlib"):
        plots.write_all(tmp_path)
    assert plots.main([str(tmp_path)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_table_of_complexity() -> None:
    (row,) = table2.counted_rows(128, ["lite"])
    net = create_model("frdnet_mit_b0", preset="lite")
    assert row["parameters"] == sum(p.numel() for p in net.parameters())
    assert row["macs"]["total"] > row["macs"]["encoder"] + row["macs"]["blocks"] > 0
    text = table2.table([row], 128)
    assert f"| FRD-Net `lite` | {row['parameters'] / 1e6:.2f} M |" in text and "128 x 128" in text
    assert "| 39 M | 25.6 G |" in text and text.count("quoted: ") == len(table2.QUOTED)


@pytest.mark.parametrize(
    "arguments", [["--variants", "none"], ["--batches", "0"], ["--batches", "x"], ["--modes", "fast"]]
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        model.main(arguments)
    assert error.value.code == 2 and "must be" in capsys.readouterr().err
