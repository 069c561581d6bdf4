"""The documents' tables: what they show of made-up result files, and that the committed ones match theirs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The folder `benchmarks` becomes a subpackage when it is installed.
PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
gpu_section, kernel_tables, model_tables, report = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in ("gpu.section", "kernel_tables", "model_tables", "report")
)


def made_up(ratio: float, target: float | None = None, **changes: Any) -> dict[str, Any]:
    times = {"ours_ms": {"median": 2.0}, "rival_ms": {"median": 2.0 * ratio}, "ratio": ratio}
    record = {"op": "dpm", "shape": [1, 2], "dtype": "float32", "layout": "nchw", "mode": "forward"}
    others = {
        "rival": "eager",
        "rivals": {"eager": times, "folded": {"ratio": 1.25}},
        "floors": {"bare": {"ratio": 0.5}},
        "aa_spread": 0.02,
    }
    return record | times | others | {"target": target, "quiet": True} | changes


def rows(table: str) -> list[list[str]]:
    """The cells below the header."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_every_case() -> None:
    records = [
        made_up(2.5, 2.0),
        made_up(1.5, 2.0, layout="channels_last"),
        made_up(1.01, 1.0, op="icm", mode="forward+backward"),
        made_up(9.0, dtype="bfloat16", quiet=False, mean=8.0),
    ]
    lines = kernel_tables.every_case({"cases": records}).splitlines()
    assert lines[2] == (
        "| dpm | [1, 2] | float32 | nchw | forward | 2.000 | 5.000 | 2.50x | 2.0% | 2.0x | yes "
        "| folded 1.25x, bare 0.50x |"
    )
    assert [line.split(" | ")[10] for line in lines[2:]] == ["yes", "**no**", "within noise", "-"]
    assert lines[5].startswith("| dpm (mean 8) |")
    assert rows(kernel_tables.by_op({"cases": records})) == [
        ["dpm", "forward", "1.5x", "2.5x"],
        ["icm", "forward+backward", "1.0x", "1.0x"],
    ]


def test_worst_cases_and_rivals_that_are_faster() -> None:
    fast = {"eager": {"ratio": 4.0}, "folded": {"ratio": 0.8}, "compiled, default": {"ratio": 0.97}}
    records = [
        made_up(4.0, rivals=fast),
        made_up(1.0, op="icm"),
        made_up(0.99, op="pdc", rivals={"eager": {"ratio": 0.99}}),
        made_up(0.5, op="pdc", dtype="bfloat16", rivals={"eager": {"ratio": 0.5}}, mean=8.0),
    ]
    found = rows(kernel_tables.overall({"cases": records}))
    assert [row[:4] + row[-1:] for row in found] == [
        ["float32", "3", "headline rival", "0.99x", "0"],
        ["float32", "3", "its best rival", "0.80x", "1"],
        ["bfloat16", "1", "headline rival", "0.50x", "1"],
        ["bfloat16", "1", "its best rival", "0.50x", "1"],
    ]
    assert found[0][5] == f"{(4.0 * 1.0 * 0.99) ** (1 / 3):.2f}x"
    assert [(row[0], row[2], row[4]) for row in rows(kernel_tables.behind({"cases": records}))] == [
        ("0.50x", "pdc (mean 8) [1, 2] nchw forward", "eager"),
        ("0.80x", "dpm [1, 2] nchw forward", "folded"),
        ("0.97x", "dpm [1, 2] nchw forward", "compiled, default"),
    ]
    assert kernel_tables.behind({"cases": records[1:2]}).startswith("No rival is faster")


def test_compiled_rivals() -> None:
    both = {
        "eager": {"ratio": 2.0},
        "compiled, default": {"ratio": 1.5},
        "compiled, max-autotune": {"ratio": 1.2},
    }
    one = {"eager": {"ratio": 2.0}, "compiled, default": {"ratio": 3.0}}
    records = [made_up(2.0, rivals=both), made_up(2.0), made_up(2.0, op="icm", rivals=one)]
    table = kernel_tables.compiled({"cases": records})
    assert table.splitlines()[0].endswith("| torch.compile, default | torch.compile, max-autotune |")
    assert [row[-2:] for row in rows(table)] == [["1.50x", "1.20x"], ["3.00x", "-"]]
    assert kernel_tables.compiled({"cases": records[1:2]}) == "No result file holds compiled rivals."


def test_sides_left_out_are_told_with_their_reason() -> None:
    records = [made_up(1.0, left_out={"compiled, default": "no compiler"})] * 2 + [made_up(1.0)]
    assert kernel_tables.left_out({"cases": records}) == "- compiled, default (2 cases): no compiler"


def test_conditions_tell_of_a_busy_machine() -> None:
    machine = {
        "machine": {"cpu": "A CPU"},
        "build": {"cpu_isa": "avx2"},
        "versions": {"torch": "2.11", "python": "3.10"},
    }
    written = {"machine": machine, "threads": 2, "when": "2026-01-02T03", "load_before": [0.25, 1, 1]}
    text = (
        "A CPU, 2 threads, avx2 kernels, torch 2.11, Python 3.10, float32 unless said, 2026-01-02, load average "
        "before the run 0.2"
    )
    assert kernel_tables.conditions(written | {"cases": [made_up(2.0)]}) == f"{text}."
    calibration = {
        "copy": {"bytes_per_s": 2e10},
        "matrix": {"float32": {"size": 2048, "flops_per_s": 9e10}},
    }
    written |= {"revision": "0123456789abcdef", "calibration": calibration}
    busy = kernel_tables.conditions(written | {"cases": [made_up(2.0), made_up(2.0, quiet=False)]})
    assert busy == (
        f"{text}, revision 0123456789ab. Measured here: copy 20.0 GB/s read and written, float32 product of 2048x2048 "
        "matrices 90 GFLOP/s. **Something else ran on the machine during 1 of 2 cases.**"
    )


def net(**changes: Any) -> dict[str, Any]:
    record = made_up(1.5) | {
        "variant": "lite",
        "batch": 1,
        "size": 512,
        "execution": "eager",
        "timing": "wall",
        "backend": "cpu",
        "images_per_s": {"ours": 500.0, "rival": 333.0},
    }
    return record | changes


def test_nets() -> None:
    peaks = {"ours": 2**30, "rival": 3 * 2**29}
    written = {
        "records": [net(), net(mode="training step", peak_bytes=peaks)],
        "red": {"paper": "relative error 1"},
        "left_out": {"lite, batch 16": "needs about 90 s"},
    }
    table = model_tables.latency(written)
    first, second = rows(table.split("\n\n")[0])
    assert " | ".join(first) == (
        "lite | forward, eager | 1 | 512 | float32 | wall | 2.0 | cpu | 3.0 | 1.50x | 2.0% | 500.00 | - | folded 1.25x"
    )
    assert (second[1], second[12]) == ("training step, eager", "1024 / 1536")
    assert table.split("\n\n")[1].splitlines() == [
        "- no time, red gate: paper: relative error 1",
        "- left out: lite, batch 16: needs about 90 s",
    ]
    assert model_tables.latency(None) == model_tables.conditions(None) == model_tables.NOTHING


def test_growth() -> None:
    points = [{"x": 256**2, "size": 256, "ratio": 2.0}, {"x": 512**2, "size": 512, "ratio": 1.5}]
    fit = {"exponent": 1.012, "r_squared": 0.9991}
    series = {"name": "dpm", "over": "size", "points": points, "fits": {"ours": fit, "rival": fit}}
    single = {"name": "icm", "over": "batch", "points": [{"x": 4, "batch": 4, "ratio": 0.9}], "fits": {}}
    empty = {"name": "net", "over": "batch", "points": [], "fits": {}}
    table = model_tables.growth({"series": [series, single, empty], "left_out": {"net, batch 1": "no time"}})
    body, notes = table.split("\n\n")
    assert rows(body) == [
        ["dpm", "size", "256", "512", "2", *["1.01 (r² 0.999)"] * 2, "2.00x, 1.50x", "1.50x"],
        ["icm", "batch", "4", "4", "1", "-", "-", "0.90x, 0.90x", "0.90x"],
    ]
    assert notes == "- left out: net, batch 1: no time"


def test_published_rows_stand_beside_the_counted_ones() -> None:
    macs = {"total": 3e9, "encoder": 2e9, "blocks": 0.75e9, "decoder": 0.25e9}
    counted = {"variant": "lite", "parameters": 2_500_000, "macs": macs}
    table = model_tables.published({"size": 512, "counted": [counted], "quoted": []})
    assert "2.50 M" in table
    assert "3.00 G" in table
    assert "39 M" in table
    assert model_tables.published(None) == model_tables.growth(None) == model_tables.NOTHING


def test_a_section_for_each_gpu(tmp_path: pathlib.Path) -> None:
    assert gpu_section.all_gpus(tmp_path) == gpu_section.NOTHING
    for folder, device in (("a-gpu", "cuda"), ("cpu", "cpu")):
        (tmp_path / folder).mkdir()
        case = made_up(
            0.9,
            name="dpm x",
            device=device,
            timing="graph",
            backend="cuda",
            backends={},
            left_out={},
            mean=0.0,
        )
        written = {
            "when": "2026-01-02",
            "revision": "0123456789abcdef",
            "machine": {"versions": {"torch": "2.11"}},
            "state_before": {"gpu": {"name": "A GPU"}},
            "state_after": {},
            "stages": {"kernels": {"seconds": 3.0, "problem": ""}},
            "problems": {},
            "cases": [case],
        }
        (tmp_path / folder / "kernels.json").write_text(json.dumps(written))
    (tmp_path / "a-gpu" / "ratios.png").write_bytes(b"")
    part = {"whole_ms": 2.0, "batch": 1, "dtype": "bfloat16", "parts": {"DPM": {"ms": 2.0, "share": 1.0}}}
    entry = {"variant": "lite", "size": 512, "device": "cuda", "ours": part, "rival": part}
    nets = {"records": [], "red": {}, "left_out": {}, "components": [entry]}
    (tmp_path / "a-gpu" / "model.json").write_text(json.dumps(nets))
    text = gpu_section.all_gpus(tmp_path)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        *("### A GPU", "#### Worst cases, graph", "#### Kernels, graph"),
        "#### Share of time of each component",
    ]
    assert "| DPM | 2.00 | 100.0 % | 2.00 | 100.0 % |" in text
    assert "| 0.90x | 2.0% | dpm [1, 2] nchw forward | float32 | eager |" in text
    assert text.count("A GPU") == 1
    assert "/a-gpu/ratios.png)" in text


def test_only_the_tables_are_replaced() -> None:
    text = "a\n<!-- table:cpu -->\nold\n<!-- /table:cpu -->\nb\n<!-- table:gpu -->\n<!-- /table:gpu -->\n"
    replaced = report.replace_table(text, "cpu", r"new \1")
    assert replaced == text.replace("old", r"new \1")
    assert report.replace_table(replaced, "cpu", r"new \1") == replaced
    assert report.filled(text, {"cpu": "old", "gpu": "none"}, "x.md") == text.replace(
        "gpu -->\n<!--", "gpu -->\nnone\n<!--"
    )
    with pytest.raises(ValueError, match=r"x.md: a mark must name a table, got gpu"):
        report.filled(text, {"cpu": "old"}, "x.md")


def test_check_names_a_document_that_differs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", ("x.md", "y.md"))
    monkeypatch.setattr(report, "all_tables", lambda: {"cpu": "new"})
    for name, content in (("x.md", "old"), ("y.md", "new")):
        (tmp_path / name).write_text(f"<!-- table:cpu -->\n{content}\n<!-- /table:cpu -->\n")
    assert report.main(["--check"]) == 1
    assert "x.md; run python -m benchmarks.report" in capsys.readouterr().out
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert (tmp_path / "x.md").read_text() == (tmp_path / "y.md").read_text()


def test_the_committed_documents_match_their_files() -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
