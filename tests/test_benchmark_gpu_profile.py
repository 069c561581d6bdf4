"""The stage that says why a kernel is slow: what is read of Nsight Compute's pages, with a stand-in for the tool, and
the trace without counters."""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import pathlib
import stat
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
NAMES = ("ncu", "profile", "page", "target")
ncu, profile, page, target = (importlib.import_module(f"{PACKAGE}.gpu.profiling.{name}") for name in NAMES)
gate = importlib.import_module(f"{PACKAGE}.gate")
ICM = "icm paper [1x256x16x16] bfloat16 nchw forward"

# The form is that of Nsight Compute 2024.1; the figures are made up.
RAW_METRICS = {
    "gpu__time_duration.sum": ("usecond", "12.5", "0.5"),
    "dram__bytes_read.sum": ("Kbyte", "1,024.5", "nan"),
    "launch__registers_per_thread": ("register/thread", "255", "16"),
    "launch__shared_mem_per_block_dynamic": ("Kbyte/block", "154.624", "0"),
    "launch__cluster_max_active": ("", "15", "0"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "1.25", "3"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "2.5", "0"),
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": ("%", "4.5", "0"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "7.5", "0"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1", "1"),
    "smsp__pcsamp_sample_count": ("", "12", "0"),
    "smsp__pcsamp_warps_issue_stalled_no_instructions": ("inst", "3", "0"),
    "smsp__pcsamp_warps_issue_stalled_long_scoreboard": ("warp", "9", "0"),
    "smsp__pcsamp_warps_issue_stalled_long_scoreboard_not_issued": ("warp", "8", "0"),
}
KERNELS = (
    "void frd::(anonymous namespace)::icm_kernel<__nv_bfloat16, (int)8>(frd::IcmArgs)",
    "at::fill(T1 *)",
)
HEAD = ["Address", "Source", "Warp Stall Sampling (All Samples)", "# Samples", "Instructions Executed"]
HEAD += ["stall_barrier", "stall_long_sb", "stall_no_inst", "stall_long_sb (Not Issued)"]
SASS = """
==WARNING== a line of the tool's own
"Kernel Name","void frd::icm_kernel<__nv_bfloat16, (int)8>(frd::IcmArgs)",
HEAD
"0x7f00","      LDG.E.128 R4, [R2.64] ","2","2","64","0","0","2","0"
"0x7f10","  @!P0 FFMA R4, R4, R5, R6 ","9","9","64","0","9","0","8"
"0x7f20","      BAR.SYNC 0x0 ","1","1","1,064","1","0","0","0"
"0x7f30","      EXIT ","0","0","0","0","0","0","0"
"Kernel Name","void frd::icm_kernel<__nv_bfloat16, (int)8>(frd::IcmArgs)",
HEAD
"0x7f00","      LDG.E.128 R4, [R2.64] ","2","2","64","0","0","2","0"
""".replace("HEAD", ",".join(f'"{name}"' for name in HEAD))
LINES = """
"File Path","/somewhere/csrc/icm/team_scores.cuh"
"Function Name","icm_kernel"
"Line No","Source","Address","Source","# Samples"
"7","<Unable to open source file>","-","-","2"
"","","0x7f00","      LDG.E.128 R4, [R2.64] ","2"
"","","...","...","-"
"File Path","/usr/include/cuda_fp16.hpp"
"Function Name","icm_kernel"
"Line No","Source","Address","Source","# Samples"
"1","<Unable to open source file>","-","-","9"
"","","0x7f10","  @!P0 FFMA R4, R4, R5, R6 ","9"
"2","<Unable to open source file>","-","-","1"
"","","0x7f20","      BAR.SYNC 0x0 ","1"
"""


def raw_page() -> str:
    fixed = ["ID", "Kernel Name", "Block Size", "Grid Size"]
    rows = [[*fixed, *RAW_METRICS], ["", "", "", "", *(unit for unit, *_ in RAW_METRICS.values())]]
    for index, kernel in enumerate(KERNELS):
        values = (metric[1 + index] for metric in RAW_METRICS.values())
        rows.append([str(index), kernel, "(256, 1, 1)", "(8, 1, 1)", *values])
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    return f"==PROF== Disconnected from process 1\n{text}\n"


def test_raw_page() -> None:
    first, second = ncu.launches(raw_page())
    assert (first["kernel"], first["grid"]) == ("icm_kernel<__nv_bfloat16, 8>", "(8, 1, 1)")
    assert (first["us"], second["us"]) == (12.5, 0.5)
    assert (first["dram_read_bytes"], first["dynamic_shared_bytes"]) == (1024500.0, 154624.0)
    assert "dram_read_bytes" not in second
    assert (first["registers"], first["clusters_at_once"], first["tensor_percent"]) == (255, 15, 4.5)
    assert first["stalls"] == {"long_scoreboard": 7.5, "selected": 1.0}
    assert first["sampled"] == {"long_scoreboard": 9.0, "no_instruction": 3.0}
    assert ncu.launches("==ERROR== nothing\n") == []


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("ns", 1e-3), ("usecond", 1), ("ms", 1e3), ("second", 1e6), ("%", 1), ("cycle/ns", 1)],
)
def test_units_of_time(unit: str, factor: float) -> None:
    text = f'"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum"\n"","","","","{unit}"\n'
    (launch,) = ncu.launches(text + '"0","k()","(1, 1, 1)","(1, 1, 1)","2"\n')
    assert launch["us"] == pytest.approx(2 * factor)


def test_source_pages() -> None:
    code, where = ncu.instructions(SASS), ncu.lines(LINES)
    assert [step["opcode"] for step in code] == ["LDG.E.128", "FFMA", "BAR.SYNC", "EXIT"]
    assert code[1]["stalls"] == {"long_scoreboard": 9}
    assert where == {
        0x7F00: ("csrc/icm/team_scores.cuh", 7),
        0x7F10: ("cuda_fp16.hpp", 1),
        0x7F20: ("cuda_fp16.hpp", 2),
    }
    found = ncu.hot(code, where)
    assert (found["samples"], found["instructions_of_code"], found["instructions_run"]) == (12, 4, 3)
    assert [entry["name"] for entry in found["lines"]] == [
        *("cuda_fp16.hpp:1", "csrc/icm/team_scores.cuh:7", "cuda_fp16.hpp:2")
    ]
    assert found["lines"][0] | {"percent": 75.0, "stall": "long_scoreboard"} == found["lines"][0]
    assert found["files"][0]["samples"] == 10
    assert found["ranges"] == [
        {"name": "0x0", "samples": 12, "percent": 100.0, "stall": "long_scoreboard", "at": "cuda_fp16.hpp:1"}
    ]
    listing = ncu.listing(code, where).splitlines()
    assert listing[2] == '0x10,64,9,long_scoreboard:9,cuda_fp16.hpp,1,"@!P0 FFMA R4, R4, R5, R6"'
    assert listing[4] == "0x30,0,0,,,,EXIT"


def test_source_page_of_metric_names_without_totals() -> None:
    text = '"Kernel Name","k",\n"Address","Source","smsp__pcsamp_warps_issue_stalled_wait"\n"0x10","EXIT ;","4"\n'
    (step,) = ncu.instructions(text)
    assert (step["samples"], step["stalls"], step["opcode"]) == (4, {"wait": 4}, "EXIT")
    found = ncu.hot(
        [step], ncu.lines('==WARNING== No lineinfo available to show CUDA-C source related to "k".')
    )
    assert found["instructions"][0]["name"] == "0x0 EXIT"
    assert "lines" not in found


def test_commands() -> None:
    listed = "Identifier  Display Name\n---- ----\nSpeedOfLight GPU Speed Of Light\nSourceCounters Source\n"
    assert ncu.known(listed, True) == ["SpeedOfLight", "SourceCounters"]
    assert ncu.known(listed, False) == ["SpeedOfLight"]
    assert ncu.known("another form", False) == list(ncu.COUNTERS)
    report = pathlib.Path("r.ncu-rep")
    whole = ncu.profile_command("ncu", report, ["python"], ncu.known(listed, True))
    assert whole[-5:] == ["--section", "SpeedOfLight", "--section", "SourceCounters", "python"]
    less = ncu.profile_command("ncu", report, ["python"], ["SpeedOfLight"])
    assert less[-3:] == ["--metrics", ncu.SAMPLES, "python"]
    assert ncu.page_command("ncu", report, "source", "sass", 2)[-4:] == [
        *("--launch-skip", "2", "--launch-count", "1")
    ]


TOOL = """
import pathlib, sys
words, folder = sys.argv[1:], pathlib.Path(__file__).parent
if "--export" in words:
    with (folder / "asked").open("a") as asked:
        print("SourceCounters" in words, file=asked)
    says = (folder / "says").read_text()
    if says and not (says == "patched" and "SourceCounters" not in words):
        sys.exit(says)
    pathlib.Path(words[words.index("--export") + 1]).write_text("a report")
elif "--version" in words:
    print("Version 2025.3.1.0 (build 1)")
elif "--list-sections" in words:
    print("SpeedOfLight a" + chr(10) + "SourceCounters b")
else:
    page = words[words.index("--page") + 1]
    launch = words[words.index("--launch-skip") + 1] if "--launch-skip" in words else ""
    source = words[words.index("--print-source") + 1] if "--print-source" in words else ""
    print((folder / {"raw": "raw", "sass": "sass", "cuda,sass": "lines"}[source or page]).read_text())
"""


@pytest.fixture
def with_tool(tmp_path: pathlib.Path) -> Callable[[str], Any]:
    """A stage with a stand-in for Nsight Compute that says something and fails, or leaves a report."""

    def make(says: str) -> Any:
        tool = tmp_path / "ncu"
        tool.write_text(f"#!{sys.executable}\n{textwrap.dedent(TOOL)}")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        pages = {"says": says, "raw": raw_page(), "sass": SASS, "lines": LINES}
        for name, text in pages.items():
            (tmp_path / name).write_text(text)
        options = argparse.Namespace(device="cpu", out=tmp_path / "out" / "profile.json", limit=90.0, only="")
        stage = profile.Profile(options)
        stage.tool, stage.report["without_counters"] = str(tool), ""
        stage.ask()
        return stage

    return make


def only_case(
    stage: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    monkeypatch.setattr(profile, "CASES", (name,))
    stage.cases()
    report = json.loads(stage.options.out.read_text())
    return report["cases"][0], report


def test_a_case_with_counters(with_tool: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case, report = only_case(with_tool(""), ICM, monkeypatch)
    assert (case["how"], case["problem"], report["problems"]) == ("counters and source", "", {})
    assert report["tool"] == "Nsight Compute 2025.3.1.0"
    first, second = case["launches"]
    assert first["hot"]["lines"][0]["name"] == "cuda_fp16.hpp:1"
    assert "problem" not in first["hot"]
    assert "hot" not in second  # it takes too little of the time
    assert profile.summary(report) == "profile: 1 cases, 1 with counters, 0 points of the waves"
    text = page.section(report)
    assert "| `icm_kernel<__nv_bfloat16, 8>` | 12.50 |" in text
    assert "long_scoreboard 7.5 (100 %)" in text
    assert "| 75.0 % | cuda_fp16.hpp:1 |" in text
    assert "| L2 throughput | 1 % | 1.25 % |" in text
    assert "| clusters at once | 14 or 15 | 15 |" in text
    assert "| waits for instructions, of the samples | 5 to 16 % | 25.0 % |" in text


def test_the_report_is_kept(
    with_tool: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_case(with_tool(""), ICM, monkeypatch)
    kept = {path.name: gzip.decompress(path.read_bytes()).decode() for path in tmp_path.glob("out/profile/*")}
    assert set(kept) == {f"{profile.slug(ICM)}.{name}.csv.gz" for name in ("raw", "0.instructions")}
    assert kept[f"{profile.slug(ICM)}.raw.csv.gz"].strip() == raw_page().strip()


def test_source_lines_are_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cuh").write_text("one\n  two | or three\n")
    monkeypatch.setattr(profile, "ROOT", tmp_path)
    lines = [{"name": "csrc/a.cuh:2"}, {"name": "csrc/gone.cuh:1"}, {"name": "a.hpp:1"}]
    profile.add_text(lines)
    assert [entry.get("text") for entry in lines] == ["two | or three", None, None]


def test_other_samples_than_the_counters_are_told(
    with_tool: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = with_tool("")
    (tmp_path / "sass").write_text(SASS.replace('"9","9"', '"5","5"'))
    case, report = only_case(stage, ICM, monkeypatch)
    assert case["launches"][0]["hot"]["problem"] == "the counters tell of 12 samples, the source of 8"
    assert "Beware: the counters tell of 12 samples" in page.section(report)


def test_a_source_page_of_another_form_leaves_the_counters(
    with_tool: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = with_tool("")
    (tmp_path / "sass").write_text('"Address","Source"\n"not an address","EXIT"\n')
    case, report = only_case(stage, ICM, monkeypatch)
    assert case["launches"][0]["hot"]["left_out"].startswith("ValueError")
    assert "Where it waits could not be read: ValueError" in page.section(report)


def test_a_kernel_that_cannot_be_patched(
    with_tool: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = with_tool("patched")
    case, _report = only_case(stage, ICM, monkeypatch)
    assert case["how"] == "counters and samples"
    assert case["problem"] == "exit status 1: patched"
    assert (tmp_path / "asked").read_text().split() == ["True", "False"]
    only_case(stage, ICM, monkeypatch)  # is not tried again
    assert (tmp_path / "asked").read_text().split() == ["True", "False", "False"]


def test_a_red_case_is_not_tried_again(
    with_tool: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, report = only_case(with_tool("not profiled: relative error inf"), ICM, monkeypatch)
    assert (case["how"], case["launches"]) == ("nothing", [])
    assert report["problems"] == {ICM: "not profiled: relative error inf"}
    assert len((tmp_path / "asked").read_text().split()) == 1
    assert "- icm paper" in page.section(report)


def test_without_permission_there_is_a_trace(
    with_tool: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    stage = with_tool(refusal)
    name = "pdc_weight angular [256x256x3x3] bfloat16 nchw forward"
    case, report = only_case(stage, name, monkeypatch)
    assert (case["how"], stage.tool, report["without_counters"]) == ("trace", "", refusal)
    assert [launch["kernel"] for launch in case["launches"]] == ["frd::pdc_weight"]
    assert case["launches"][0]["launches"] == 1
    assert report["problems"] == {}
    assert f"no counters ({refusal})" not in page.section(report)
    assert f"({refusal}): PyTorch's profiler tells" in page.section(report)


def test_a_cut_leaves_the_rest_out(with_tool: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = with_tool("")
    stage.options.limit = 1.0
    monkeypatch.setattr(profile, "CASES", ("a", "b"))
    stage.cases()
    report = json.loads(stage.options.out.read_text())
    assert (report["cases"], report["left_out"]) == ([], ["a", "b"])
    assert profile.summary(report).endswith("2 cases left out")
    assert "- b: no time was left" in page.section(report)


def test_a_case_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match="--case must name a registered case of the GPU, got 'fly'"):
        target.main(["--case", "fly", "--device", "cpu"])


def test_the_default_cases_are_registered() -> None:
    assert [target.find_case(name, "cuda").name for name in profile.CASES] == list(profile.CASES)


def test_a_wrong_result_is_not_profiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def red(case: Any) -> Any:
        raise gate.GateError("relative error inf")

    monkeypatch.setattr(target, "checked", red)
    assert target.main(["--case", ICM, "--device", "cpu"]) == 1
    assert capsys.readouterr().out == f"{target.RED}relative error inf\n"


def test_trace_of_a_gpu() -> None:
    kernel = {
        "cat": "kernel",
        "name": "void frd::icm_kernel<__nv_bfloat16, 8>(frd::IcmArgs)",
        "args": {
            "grid": [8, 1, 1],
            "block": [256, 1, 1],
            "registers per thread": 255,
            "shared memory": 154624,
        },
    }
    events = [kernel | {"ts": 10 * i, "dur": i} for i in range(1, 2 * target.CALLS + 1)]
    events += [{"cat": "gpu_memset", "name": "Memset (Device)", "ts": 0, "dur": 1, "args": {}}]
    events += [{"cat": "cpu_op", "name": "frd::icm", "ts": 0, "dur": 99}, {"name": "no kind"}]
    memset, icm = target.launches(events, "cuda")
    assert (memset["kernel"], memset["launches"]) == ("Memset (Device)", 1 / target.CALLS)
    assert icm == {
        "kernel": "icm_kernel<__nv_bfloat16, 8>",
        "us": 5.5,
        "launches": 2,
        "grid": "(8, 1, 1)",
        "block": "(256, 1, 1)",
        "registers": 255,
        "dynamic_shared_bytes": 154624,
    }


def test_rehearsal(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "profile.json"
    name = "cluster [8x64x16x16] bfloat16 nchw forward+backward"
    assert profile.main(["--device", "cpu", "--out", str(path), "--only", name]) == 0
    report = json.loads(path.read_text())
    assert [case["name"] for case in report["cases"]] == [name]
    assert "frd::cluster_backward" in {launch["kernel"] for launch in report["cases"][0]["launches"]}
    assert report["without_counters"] == "Nsight Compute was not found"
    assert report["waves"]["points"] == []
    assert report["seconds"] > 0
