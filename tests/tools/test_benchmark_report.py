"""The generated documents, whole nets, and the command for a GPU as far as none is needed. No time decides here."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import pytest
import torch

import frd_kernels as fk
from benchmarks import __main__ as command
from benchmarks import card, gate, gpu, machine, model, report
from frd_model import create_model, save_model
from frd_model.score import fit_rule

# 64 pixels leave 4 x 4 tokens.
SMALL: dict[str, Any] = {
    "grids": ((2, 2), (2, 1), (1, 1)),
    "stages": (1, 2),
    "trace_widths": (8, 8),
    "pyramid_width": 8,
}


def made_up(ratio: float, **changes: Any) -> dict[str, Any]:
    texts = "op=dpm dtype=float32 layout=nchw mode=forward timing=wall device=cpu backend=cpu baseline=eager"
    record: dict[str, Any] = dict(text.split("=") for text in texts.split())
    record |= {"name": f"dpm {ratio}", "shape": [1, 2], "mean": 0.0, "aa_spread": 0.02, "quiet": True}
    record |= {"baselines": {"eager": {"ratio": ratio}, "folded": {"ratio": 1.25}}, "backends": {}}
    record |= {"lower_bounds": {"bare": {"ratio": 0.5}}, "left_out": {}, "ratio": ratio}
    record |= {"ours_ms": {"median": 2.0}, "baseline_ms": {"median": 2.0 * ratio}}
    return record | changes


def test_the_committed_documents_match_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--check"]) == 0, capsys.readouterr().out


def test_a_row_has_the_figures_of_its_record() -> None:
    row = report.case_row(made_up(2.5, mean=8.0))
    assert row == (
        "| dpm (mean 8) 1x2 nchw forward | float32 | 2 | cpu | 5 | 2.50x | 2.0% | - | folded 1.25x | bare 0.50x |"
    )
    # A baseline that is not the expected one is named.
    assert report.figures_of(made_up(2.5, baseline="folded"), "eager")[1] == "5 (folded)"


def test_worst_cases_and_baselines_that_are_faster() -> None:
    fast = {"eager": {"ratio": 4.0}, "folded": {"ratio": 0.8}, "compiled, default": {"ratio": 0.97}}
    records = [
        made_up(4.0, baselines=fast),
        made_up(1.0, op="icm"),
        made_up(0.99, op="pdc", baselines={"eager": {"ratio": 0.99}}),
        made_up(0.5, op="pdc", dtype="bfloat16", baselines={"eager": {"ratio": 0.5}}),
    ]
    found = list(report.overall_rows(records))
    assert [row[:5] for row in found] == [
        ["float32", "first", "3", "0", "0.99x"],
        ["float32", "fastest", "3", "1", "0.80x"],
        ["bfloat16", "first", "1", "1", "0.50x"],
        ["bfloat16", "fastest", "1", "1", "0.50x"],
    ]
    assert found[0][5] == f"{(4.0 * 1.0 * 0.99) ** (1 / 3):.2f}x"
    slower = [row.strip("| ").split(" | ") for row in report.slower_rows(records)]
    assert [(row[0], row[4]) for row in slower] == [
        ("0.50x", "eager"),
        ("0.80x", "folded"),
        ("0.97x", "compiled, default"),
    ]


def test_a_page_tells_of_a_busy_machine_and_of_what_has_no_time(tmp_path: pathlib.Path) -> None:
    problems, stages = {"icm": "RED GATE: wrong"}, {"kernels": {"seconds": 3.0, "problem": "cut | after 3 s"}}
    left_out = {"auto": "the same as cuda", "triton": "no kernel"}
    cases = [made_up(0.9, device="cuda", timing="graph", quiet=False, left_out=left_out)]
    found = {"when": "2026-01-02T03", "problems": problems, "stages": stages, "cases": cases}
    found |= {"state_before": {"gpu": {"name": "A GPU"}}, "revision": "0123456789abcdef"}
    machine.write_json(tmp_path / "kernels.json", found)
    net = made_up(1.5) | {"variant": "lite", "batch": 1, "size": 512, "execution": "eager"}
    net |= {"images_per_s": {"ours": 500.0}, "peak_bytes": {"ours": 2**30, "baseline": 3 * 2**29}}
    left_out = {"lite, batch 16": "needs about 90 s"}
    machine.write_json(
        tmp_path / "model.json", {"records": [net], "red": {"paper": "wrong"}, "left_out": left_out}
    )
    report.write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for expected in (
        "# A GPU\n",
        "revision 0123456789ab, 2026-01-02. **Something else was running during 1 of 1 cases.**",
        "| kernels | 3.0 | cut / after 3 s |",
        "## Kernels, graph",
        "| lite, batch 1, 512 | forward, eager | float32, wall | 2 | 3 | 1.50x | 2.0% | 500.00 | 1024 / 1536 |",
        "- red gate, no time: paper: wrong\n- left out: lite, batch 16: needs about 90 s",
        "- no time: icm: RED GATE: wrong\n- triton, 1 records: no kernel",
    ):
        assert expected in text


def test_only_the_tables_are_replaced() -> None:
    text = "a\n<!-- table:cpu -->\nold\n<!-- /table:cpu -->\nb\n<!-- table:gpu -->\n<!-- /table:gpu -->\n"
    filled = report.filled(text, {"cpu": lambda: r"new \1", "gpu": lambda: "none"}, "x.md")
    assert filled == text.replace("old", r"new \1").replace("gpu -->\n<!--", "gpu -->\nnone\n<!--")
    with pytest.raises(ValueError, match=r"x.md: a mark must name a table, got gpu"):
        report.filled(text, {"cpu": lambda: "old"}, "x.md")


def group(images: int, auc: float, found: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: [auc, auc - 0.1, auc + 0.1] for name in ("auc", "permute_f1", "optimal_f1")
    }
    figures |= {"found": {rate: [found, None, None] for rate in ("0.01", "0.05", "0.10")}}
    return {"images": images, "score_auc": [0.75, 0.5, 1.0], **figures}


def method(auc: float, **untouched: Any) -> dict[str, Any]:
    found = {"seen": group(9, auc, 0.25), "unseen": group(3, 0.5, 0.0), "copy_move": group(9, auc, 0.25)}
    found |= {"copy_move paste": group(9, auc, 0.25), "retouch warp": group(3, 0.5, 0.0)}
    return {"means": {"untouched": {"images": 4, "marked": [0.015, 0.01, 0.02], **untouched}, **found}}


@pytest.fixture
def results(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(card, "RESULTS", tmp_path)
    methods = {name: method(0.6) for name in ("centre", "Splicebuster", "net demo")}
    machine.write_json(tmp_path / "demo" / "comparison.json", {"unseen": ["warp"], "methods": methods})
    return tmp_path / "demo"


def test_the_cards_tables_of_pixels(results: pathlib.Path) -> None:
    lines = card.pixels("auc").splitlines()
    assert lines[0] == "| pixel AUC | seen, 9 | copy-move, 9 | unseen, 3 | warp, 3 |"
    assert (
        lines[2] == "| **the checkpoint** | 0.600 (0.500 to 0.700) | 0.600 | 0.500 (0.400 to 0.600) | 0.500 |"
    )
    assert [line.split(" | ")[0][2:] for line in lines[3:]] == [
        "Splicebuster-like clustering",
        "centre control",
    ]
    assert card.operations().splitlines()[2:] == [
        "| copy-move paste | 9 | 0.600 | 0.600 | 0.600 | 25.0 % |",
        "| retouch warp | 3 | 0.500 | 0.500 | 0.500 | 0.0 % |",
    ]


def test_the_cards_tables_of_photos(results: pathlib.Path) -> None:
    row = card.photos().splitlines()[2].strip("| ").split(" | ")
    assert row[1] == "0.750 (0.500 to 1.000)" and row[3:] == ["25.0 % / 0.0 %"] * 3 + ["1.5 % (1.0 to 2.0)"]
    assert card.verdict() == card.MISSING
    found = machine.read_json(results / "comparison.json")
    shares = {rate: [0.1, 0.0, 0.25] for rate in card.RATES}
    net = method(0.9, verdict=shares, marked_after_verdict=[0.001, 0.0, 0.002])
    for name in ("seen", "unseen"):
        net["means"][name]["verdict"] = shares
    found["methods"]["net demo"] = net
    machine.write_json(results / "comparison.json", found)
    assert (
        card.photos().splitlines()[2].endswith("1.5 % (1.0 to 2.0); after the verdict 0.1 % (0.0 to 0.2) |")
    )
    lines = card.verdict().splitlines()
    assert len(lines) == 5 and lines[3] == f"| **the checkpoint** | 5 % {'| 10.0 % (0.0 to 25.0) ' * 3}|"


def test_the_cards_learning_curve_and_levers(results: pathlib.Path) -> None:
    history = [
        {"epoch": i + 1.0, "val/auc": 0.5 + i / 100, "train/loss": 1.0, "seconds": 9.0} for i in range(40)
    ]
    machine.write_json(results / "training.json", {"history": history})
    lines = card.curve().splitlines()
    assert lines[0] == "| epoch | training loss | AUC |" and len(lines) == 2 + 12
    assert lines[2] == "| 1 | 1.000 | 0.500 |" and lines[-1] == "| 40 | 1.000 | 0.890 |"
    machine.write_json(results / "training.json", {"history": history[:3]})
    assert len(card.curve().splitlines()) == 2 + 3
    assert card.levers() == card.place() == card.MISSING
    (results / "levers.json").write_text(
        '[{"name": "base", "change": "none", "steps": 100, "val": {"AUC": 0.8}},'
        ' {"name": "crop", "change": "384", "steps": 100, "val": {"AUC": 0.81, "F1": 0.3}}]'
    )
    assert card.levers().splitlines()[2:] == [
        "| base | none | 100 | 0.800 | - |",
        "| crop | 384 | 100 | 0.810 | 0.300 |",
    ]


def test_the_cards_table_of_statistics(tmp_path: pathlib.Path) -> None:
    net, file = create_model("frdnet_mit_b0", preset="lite"), tmp_path / "net.safetensors"
    save_model(net, file)
    assert card.score(file) == card.MISSING
    values = {"max": [0.0, 1.0, 2.0, 3.0], "area": [0.0, 2.0, 1.0, 3.0]}
    rule = fit_rule(values, [False, False, True, True], hosts=["a", "b", "a", "b"])
    net.score_rule = rule
    save_model(net, file)
    rows = card.score(file).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| **max**, used", "| area"]
    assert " | 1.000 (" in rows[0] and " | 0.750 (" in rows[1] and rows[0].endswith(" | 100.0 % |")


def test_the_cards_shift_test(results: pathlib.Path) -> None:
    def means(middle: float, border: float) -> dict[str, Any]:
        values = {"middle": middle, "border": border, "difference": middle - border}
        return {key: {"mean": value, "low": -0.01, "high": 0.03} for key, value in values.items()}

    forged = {"images": 7, "auc": means(0.9, 0.875)}
    shift = {"forged": forged, "untouched": {"images": 5, "probability": means(0.1, 0.2)}}
    machine.write_json(results / "shift.json", {"shift_test": shift})
    assert card.place().splitlines()[2:] == [
        "| AUC of edits | 7 | 0.900 | 0.875 | +0.025 (-0.010 to +0.030) |",
        "| mean probability of untouched photos | 5 | 0.100 | 0.200 | -0.100 (-0.010 to +0.030) |",
    ]


def test_check_names_a_file_that_differs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [(tmp_path / "x.md", "new"), (tmp_path / "y.md", "")]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "generated", lambda: iter(files))
    files[1][0].write_text("")
    assert command.main(["report", "--check"]) == 1
    assert (
        capsys.readouterr().out == "not what the result files give: x.md; run python -m benchmarks report\n"
    )
    assert command.main(["report"]) == 0
    assert command.main(["report", "--check"]) == 0


def test_plots(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        report.write_plots(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    machine.write_json(tmp_path / "kernels.json", {"cases": [made_up(0.5 + i) for i in range(60)]})
    (path,) = report.write_plots(tmp_path)
    assert path.name == "ratio_forward.png" and path.stat().st_size > 5000


@pytest.fixture(scope="module")
def lite() -> model.Subject:
    return model.Subject("lite", 64, **SMALL)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_eager_nets_compute_the_same(variant: str) -> None:
    subject = model.Subject("lite", 64, **SMALL, variant=variant)
    found = model.baselines_of(subject.model)
    assert next(iter(found)) == "eager" and list(found)[-1] == model.FOLDED
    for net in (subject.model, *found.values()):
        assert subject.error(net, 1, torch.float32, "nchw") < 1e-5
        with torch.profiler.profile() as profile, torch.no_grad():
            net(subject.batch(1)[0])
        operators = [event.key for event in profile.key_averages() if event.key.startswith("frd::")]
        assert bool(operators) == (net is subject.model)
    assert model.FOLDED not in model.baselines_of(subject.model, training=True)


NCHW = dict.fromkeys(("cpu", "eager", model.FOLDED), "nchw")


@pytest.mark.parametrize("part", ["icm", "dpm", "stem"])
@pytest.mark.parametrize("mode", ["forward", "training step"])
def test_gate_is_red_for_a_spoiled_net(lite: model.Subject, part: str, mode: str) -> None:
    setting = model.Setting(1, mode)
    nets, impls = model.build_nets(lite, setting, dict(NCHW))
    assert impls.left_out == {} and list(impls.ours) == ["cpu"]
    assert set(model.gate_nets(lite, setting, nets, impls)) == {"cpu", *impls.baselines}
    kinds = {"icm": fk.ICM, "dpm": fk.DPM, "stem": fk.PDC2d}
    layer = next(m for m in nets["cpu"].model.modules() if isinstance(m, kinds[part]))
    with torch.no_grad():
        list(layer.parameters())[-1].mul_(1.003)
    with pytest.raises(gate.GateError, match="relative error"):
        model.gate_nets(lite, setting, nets, impls)


def test_a_wrong_baseline_is_dropped(lite: model.Subject) -> None:
    setting = model.Setting(1)
    nets, impls = model.build_nets(lite, setting, dict(NCHW))
    with torch.no_grad():
        next(nets[model.FOLDED].model.parameters()).mul_(2)
    model.gate_nets(lite, setting, nets, impls)
    assert list(impls.left_out) == [model.FOLDED] and list(impls.baselines) == ["eager"]


def test_near_ties_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model.build_model("lite", **SMALL).double()
    flat = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    with model.near_ties(net) as gaps, fk.use_backend("reference"):
        model.block_outputs(net, flat)
    assert len(gaps) == 2 * 2 and min(gaps) < model.NEAR_TIE
    monkeypatch.setattr(model, "TRIES", 2)
    with pytest.raises(gate.GateError, match="without a near tie"):
        model.Subject("lite", 64, grids=((8, 8), (4, 4), (2, 1))).batch(1)
    with pytest.raises(ValueError, match="variant must be one of"):
        model.build_model("none")


@pytest.mark.slow
def test_nets_on_the_cpu(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "peak_bytes_on_cpu", lambda *_: {"ours": 10, "baseline": 20})
    monkeypatch.setattr(model, "COMPILE_S", 1e9)
    monkeypatch.setitem(model.BUDGET_S, "cpu", 0.0)
    out = tmp_path / "model.json"
    model.run_on_cpu(model.Run("cpu", 64, 500, out), ["lite"], [1, 2], 64, **SMALL)
    written = json.loads(out.read_text())
    assert written["red"] == {} and list(written["left_out"]) == ["lite, batch 1, forward, compiled"]
    first, *rest = written["records"]
    assert (first["mode"], first["batch"]) == ("forward", 1) and first["peak_bytes"] == {
        "ours": 10,
        "baseline": 20,
    }
    assert sorted((r["mode"], r["batch"]) for r in rest) == [("forward", 2), ("training step", 1)]
    for record in written["records"]:
        assert (record["baseline"], record["backend"], record["timing"]) == ("eager", "cpu", "wall")
        assert record["ratio"] == record["baselines"]["eager"]["ratio"] and record["turns"] >= 5
        rate = 1e3 * record["batch"] / record["ours_ms"]["median"]
        assert record["images_per_s"]["ours"] == pytest.approx(rate)
        assert record["name"].startswith(f"model lite, batch {record['batch']}, {record['mode']}, eager")


def test_the_limit_leaves_the_rest_out() -> None:
    job = model.Run("cpu", 64, 0.0)
    job.attempt("late", 1.0, lambda: pytest.fail("must not run"))
    assert "needs about 1 s" in job.left_out["late"]

    def wrong() -> None:
        raise gate.GateError("a net is wrong")

    job.attempt("red", -1e9, wrong)
    assert job.red == {"red": "a net is wrong"}


@pytest.mark.slow
def test_peak_memory_of_a_fresh_process() -> None:
    layouts = {"ours": "nchw", "baseline": "channels_last"}
    one, four = (model.peak_bytes_on_cpu("lite", 128, batch, layouts, 200) for batch in (1, 4))
    for name in layouts:
        # The stem's planes alone: 19 of them in float32.
        assert one[name] >= 4 * 128 * 128 * 19 and four[name] > 2 * one[name]
    with pytest.raises(RuntimeError, match=r"peak memory: .*none"):
        model.peak_bytes_on_cpu("none", 64, 1, layouts, 100)


def test_parameters_and_operations() -> None:
    found = model.count(128, ["lite"])
    (row,), net = found["counted"], create_model("frdnet_mit_b0", preset="lite")
    assert row["parameters"] == sum(p.numel() for p in net.parameters())
    assert row["macs"]["total"] > row["macs"]["encoder"] + row["macs"]["blocks"] > 0
    text = report.complexity_table(found)
    assert f"| FRD-Net `lite` | {row['parameters'] / 1e6:.2f} M |" in text and "128 x 128" in text
    assert "| 39 M | 25.6 G |" in text


def gpu_run(tmp_path: pathlib.Path, **changes: Any) -> gpu.Run:
    options = {"limit": 60.0, "add": False, "only": "x", "quick": False, "archive": tmp_path / "a.tar.gz"}
    folder = tmp_path / "a-gpu"
    folder.mkdir(exist_ok=True)
    return gpu.Run(argparse.Namespace(stages=["kernels"], **(options | changes)), folder)


SCRIPT = """
import sys
from benchmarks.machine import append_line, read_lines
path, record = __import__("pathlib").Path(sys.argv[1]), {record}
done = [line["start"] for line in read_lines(path) if "start" in line]
for name in ("one", "crash", "three"):
    if name not in done:
        append_line(path, start=name)
        if name == "crash":
            sys.exit("Segmentation fault")
        append_line(path, end=name, records=[record | dict(name=name)])
append_line(path, head=dict(state_after={{}}))
"""


def test_the_measuring_process_is_started_again_behind_a_crash(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a process in place of the one that measures on a GPU."""
    script = SCRIPT.format(record=made_up(2.0, device="cuda"))
    monkeypatch.setattr(gpu, "measuring", lambda run, *_: [sys.executable, "-c", script, str(run.lines)])
    run = gpu_run(tmp_path)
    assert list(gpu.run_stages(run)) == [""]
    written = machine.read_json(run.folder / "kernels.json")
    assert [record["name"] for record in written["cases"]] == ["one", "three"]
    assert written["problems"] == {"crash": "the process ended, or took too long"}
    assert "Segmentation fault" in run.log("kernels").read_text()
    assert "dpm" in (run.folder / "README.md").read_text() and run.options.archive.stat().st_size > 0
    # `--add` measures what has no time, and keeps the rest.
    again = gpu_run(tmp_path, add=True)
    list(gpu.run_stages(again))
    started = [line["start"] for line in machine.read_lines(again.lines) if "start" in line]
    assert started == ["one", "three", "crash"] and len(again.report["cases"]) == 2


def test_a_process_is_ended_in_time(tmp_path: pathlib.Path) -> None:
    log, sleep = (
        tmp_path / "log",
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"],
    )
    assert gpu.run_logged(sleep, log, 0.1) == "cut after 0 s"
    assert gpu.run_logged(sleep, log, 60, watch=lambda: False) == "cut: a case took too long"
    assert gpu.run_logged([sys.executable, "-c", "raise SystemExit('no')"], log, 60) == "exit status 1: no"
    assert gpu.run_logged([sys.executable, "-c", ""], log, 60) == ""


def test_outcomes_of_a_pytest_that_ends_without_a_word_are_counted(tmp_path: pathlib.Path) -> None:
    run, path = gpu_run(tmp_path), tmp_path / "test_small.py"
    path.write_text("""
import os, pytest
@pytest.mark.parametrize("x", [1, 2, 1])
def test_some(x): assert x == 1
@pytest.mark.skip
def test_left_out(): pass
def test_last(): os._exit(3)
""")
    options = ["-v", "-p", "no:cacheprovider", "-p", "no:logging", "-c", os.devnull]
    command_line = gpu.python("-m", "pytest", path, *options)
    problem = gpu.run_tests(run, "small", run.log("tests.small"), command_line, 120)
    assert problem.startswith("small: exit status 3: ")
    text = "".join(report.suite_section(machine.read_json(run.folder / "suite.json")))
    assert "small: 2 passed, 1 failed, 1 skipped (exit status" in text


def test_stages_are_ordered_and_known() -> None:
    assert gpu.stage_names("model,build,tests") == ["build", "tests", "model"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be some of .*, got proof"):
        gpu.stage_names("build,proof")
    assert set(gpu.RUNNERS) == set(gpu.LIMITS)
