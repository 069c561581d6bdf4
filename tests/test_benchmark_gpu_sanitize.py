"""The stage that runs the small calls under NVIDIA's compute-sanitizer: what it makes of the tools' words, and those
calls without it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import stat
from typing import Any

import pytest
import torch

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
checks, proof_page, sanitize, small_calls = (
    importlib.import_module(f"{PACKAGE}.gpu.proof.{name}")
    for name in ("checks", "page", "sanitize", "small_calls")
)


def test_small_calls_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--only", "pdc_weight"]
    assert small_calls.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "small calls: 18 of 18 run, 0 failed"
    assert small_calls.main([*arguments, "--until", "0"]) == 1
    assert capsys.readouterr().out == "small calls: 0 of 18 run, 0 failed\n"


def test_small_calls_that_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (call,) = small_calls.all_calls("dispatch [2x4x24 to 49]")

    def raises(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    functions = raises, lambda module, x, *rest: x / 0
    calls = [call._replace(function=function, backward=False) for function in functions]
    monkeypatch.setattr(small_calls, "all_calls", lambda only: calls)
    assert small_calls.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: no kernel" in printed
    assert "FAILED: a result is not finite" in printed
    assert printed.endswith("small calls: 6 of 6 run, 6 failed\n")


CLEAN = """========= COMPUTE-SANITIZER
pdc_weight angular [8x6x3x3] forward+backward bfloat16
small calls: 18 of 18 run, 0 failed
========= ERROR SUMMARY: 0 errors
"""
OVERRUN = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void frd::pdc_add_parts<float>(const float *, int, int, float *, float *)+0x160
=========     by thread (31,0,0) in block (3,0,0)
=========     Access at 0x7f6f67000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6f67000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: frd::pdc_backward_cuda(frd::PdcProblem const&) [0x2a3b4] in libfrd_cuda.so
=========
small calls: 18 of 18 run, 0 failed
========= ERROR SUMMARY: 12 errors were not printed. Use --print-limit option to adjust the number of printed errors
========= ERROR SUMMARY: 13 errors
"""
NO_RACE = "small calls: 2 of 18 run, 0 failed\n"
NO_RACE += "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void frd::icm_kernel<float, 8>(frd::IcmArgs)+0xe60
=========     and Read access at void frd::icm_kernel<float, 8>(frd::IcmArgs)+0x1120 [496 hazards]
=========
small calls: 18 of 18 run, 0 failed
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
UNWRITTEN = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int, T2, T3)+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6f67000000
=========
{more}small calls: 18 of 18 run, 0 failed
========= ERROR SUMMARY: {count} errors
"""
OUR_READ = "========= Uninitialized __global__ memory read of size 4 bytes\n"
OUR_READ += "=========     at 0x60 in frd::point_grad()\n"
COPIED = "========= Host API uninitialized memory access\n=========     Saved host backtrace\n========= \n"


def outcome(tool: str, text: str, problem: str = "") -> tuple[str, dict[str, Any]]:
    calls = text.partition("small calls: ")[2].partition("\n")[0]
    found = sanitize.verdict(tool, text) | {"calls": calls}
    return sanitize.outcome(found, problem), found


def test_what_the_tools_say() -> None:
    assert outcome("memcheck", CLEAN)[0] == "ok"
    text, found = outcome("memcheck", OVERRUN, "exit status 99")
    assert text == "13 errors: Invalid __global__ write of size 4 bytes"
    assert found["log"][1].strip().startswith("at void frd::pdc_add_parts<float>")
    assert outcome("racecheck", NO_RACE)[0] == "ok"
    assert outcome("racecheck", RACE)[0].startswith("1 errors: Error: Race reported between Write access at")
    long = OVERRUN.replace("=========\n", "=========         Host Frame: main\n" * 90)
    assert len(outcome("memcheck", long)[1]["log"]) == sanitize.KEPT


def test_uninitialised_memory_counts_where_it_is_ours() -> None:
    text, found = outcome("initcheck", UNWRITTEN.format(more="", count=1), "exit status 99")
    assert (text, found["errors"], found["in_others"], found["log"]) == ("ok", 0, 1, [])
    text, found = outcome("initcheck", UNWRITTEN.format(more=OUR_READ + COPIED, count=3))
    assert (found["errors"], found["in_others"]) == (2, 1)
    assert text == "2 errors: Uninitialized __global__ memory read of size 4 bytes"


def test_a_tool_that_does_not_end_or_calls_that_fail_are_no_success() -> None:
    started = "========= COMPUTE-SANITIZER\n"
    assert outcome("memcheck", started, "cut after 36 s")[0] == "cut after 36 s"
    assert outcome("memcheck", started)[0] == "it has printed no summary"
    assert (
        outcome("memcheck", CLEAN.replace("0 failed", "2 failed"))[0]
        == "calls failed: 18 of 18 run, 2 failed"
    )
    cut = CLEAN.replace("small calls: 18 of 18 run, 0 failed\n", "")
    assert (
        outcome("memcheck", cut, "exit status 1")[0] == "the calls did not come to their end: exit status 1"
    )


TOOL = f"""#!/bin/sh
case "$*" in
*memcheck*) cat <<'END'
{OVERRUN}END
exit 99;;
*racecheck*) cat <<'END'
{NO_RACE}END
exit 0;;
*) echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; echo "small calls: 1 of 1 run, 0 failed"
echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


def test_all_tools_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(TOOL)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
    assert sanitize.find_program() == str(program)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    path = tmp_path / "sanitize.json"
    assert sanitize.main(["--out", str(path), "--limit", "40", "--only", "icm"]) == 1
    report = json.loads(path.read_text())
    outcomes = {name: tool["outcome"] for name, tool in report["tools"].items()}
    wrong = "13 errors: Invalid __global__ write of size 4 bytes"
    assert outcomes == {"memcheck": wrong, "racecheck": "ok", "synccheck": "ok", "initcheck": "ok"}
    assert capsys.readouterr().out == f"sanitize: memcheck: {wrong}\n"
    log = (tmp_path / "logs" / "sanitize.initcheck.log").read_text()
    assert (
        log.startswith("1 --tool initcheck") and " --own" in log and "3frd" not in log and "--only icm" in log
    )
    assert "3frd" in (tmp_path / "logs" / "sanitize.synccheck.log").read_text()
    section = proof_page.sanitize_section(report)
    assert f"| memcheck | {wrong} | 18 of 18 run, 0 failed | - |" in section
    assert "at void frd::pdc_add_parts<float>" in section


def test_the_calls_run_without_the_tool(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sanitize.json"
    assert (
        sanitize.main(["--out", str(path), "--device", "cpu", "--only", "pdc_weight", "--limit", "100"]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("left out: compute-sanitizer is not here")
    assert printed.endswith("small calls: 18 of 18 run, 0 failed\n")
    section = proof_page.sanitize_section(json.loads(path.read_text()))
    assert "Left out: memcheck, racecheck, synccheck, initcheck: compute-sanitizer is not here." in section


@pytest.mark.parametrize("stage", [checks, sanitize])
def test_nothing_to_do(stage: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main(["--out", str(tmp_path / "file.json"), "--only", "dpm"]) == 0
    assert capsys.readouterr().out == "left out: no call's name holds 'dpm'\n"
