"""The small calls under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, wrong barriers,
reads of memory that nothing has written. Writes JSON after every tool.

    python -m benchmarks.gpu.proof.sanitize --out FILE.json [--only TEXT] [--limit SECONDS] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any, NamedTuple

from ... import conditions
from ...launch import module_command
from ..process import last_line, run_logged
from .small_calls import all_calls

PROGRAM = "compute-sanitizer"
# All our kernels, and no other ones, have this in their mangled names.
OURS, OURS_DEMANGLED = "3frd", "frd::"
OK = "ok"
END_S = 8.0  # for the call that is running when no other one is begun, and for the tool's summary
KEPT = 50  # lines of errors
FOUND = 99  # exit status where a tool has found something
SUMMARY = re.compile(
    r"=+ (?:ERROR SUMMARY: (?P<errors>\d+) errors?|RACECHECK SUMMARY: (?P<hazards>\d+) hazards?.*)$"
)


class Tool(NamedTuple):
    """initcheck has to see what every kernel writes, so it looks into those of torch as well; only what it says of
    ours, and of memory that is copied to the host, counts."""

    share: float  # of the time
    all_kernels: bool = False
    options: tuple[str, ...] = ()


TOOLS = {
    "memcheck": Tool(0.3, options=("--padding", "256")),
    "racecheck": Tool(0.35),
    "synccheck": Tool(0.15),
    "initcheck": Tool(0.2, all_kernels=True),
}


def find_program() -> str:
    """compute-sanitizer of the PATH, or of the toolkit that nvcc belongs to; '' where there is none."""
    if found := shutil.which(PROGRAM):
        return found
    compilers = [shutil.which("nvcc"), os.environ.get("CUDACXX"), "/usr/local/cuda/bin/nvcc"]
    for compiler in filter(None, compilers):
        program = pathlib.Path(compiler).resolve().parent / PROGRAM
        if program.exists():
            return str(program)
    return ""


def command_of(name: str, program: str, only: str, device: str, seconds: float) -> list[str]:
    tool = TOOLS[name]
    command = [program, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "1000"]
    command += ["--show-backtrace", "device", *tool.options]
    if not tool.all_kernels:
        command += ["--kernel-name", f"kernel_substring={OURS}"]
    return [*command, *target(only, device, seconds), *(["--own"] if tool.all_kernels else [])]


def target(only: str, device: str, seconds: float) -> list[str]:
    until = time.time() + max(0.0, seconds - END_S)
    command = [*module_command("gpu.proof.small_calls"), "--device", device, "--only", only]
    return [*command, "--until", f"{until:.0f}"]


def verdict(name: str, text: str) -> dict[str, Any]:
    """What a tool has said: the number of errors that count, and their first lines. No number without a summary."""
    lines = [line.rstrip() for line in text.splitlines()]
    summaries = [match for line in lines if (match := SUMMARY.match(line))]
    if not summaries:
        return {"errors": None, "log": [line for line in lines if line.startswith("===")][-KEPT:]}
    found, count = blocks(lines), int(summaries[-1]["errors"] or summaries[-1]["hazards"])
    result: dict[str, Any] = {"errors": count, "summary": summaries[-1][0].strip("= ")}
    if TOOLS[name].all_kernels:
        ours = [block for block in found if is_ours(block)]
        result |= {"errors": len(ours), "in_others": count - len(ours)}
        found = ours
    return result | {"log": [line for block in found for line in block][:KEPT]}


def blocks(lines: list[str]) -> list[list[str]]:
    """The errors of a log: a line each, and the indented ones behind it."""
    found: list[list[str]] = []
    for line in lines:
        match = re.match(r"=+ (?P<indent> *)(?P<text>\S.*)$", line)
        if match is None or "SUMMARY" in line or line.endswith("COMPUTE-SANITIZER"):
            continue
        if not match["indent"]:
            found.append([])
        if found:
            found[-1].append(match["indent"] + match["text"])
    return found


def is_ours(block: list[str]) -> bool:
    """In a kernel of ours, or in a result that was copied to the host."""
    places = [line for line in block[1:] if line.lstrip().startswith("at ")]
    return "Host API" in block[0] or any(OURS_DEMANGLED in line for line in places)


def outcome(found: dict[str, Any], problem: str) -> str:
    """OK or what is wrong. The exit status alone says little: errors in kernels that are not ours set it too."""
    if found["errors"] is None:
        return problem or "it has printed no summary"
    if found["errors"]:
        return f"{found['errors']} errors: {found['log'][0] if found['log'] else found['summary']}"
    if not found["calls"]:
        return f"the calls did not come to their end: {problem}"
    return OK if found["calls"].endswith(" 0 failed") else f"calls failed: {found['calls']}"


def run_tool(name: str, program: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    log = options.out.parent / "logs" / f"sanitize.{name}.log"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    command = command_of(name, program, options.only, options.device, limit)
    problem = run_logged(command, log, limit)
    text = log.read_text(errors="replace")
    calls = re.findall(r"^small calls: (.*)$", text, re.MULTILINE)
    found = verdict(name, text) | {"calls": calls[-1] if calls else ""}
    return found | {
        "outcome": outcome(found, problem),
        "exit": problem,
        "seconds": round(time.monotonic() - began, 1),
    }


def run_plain(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Without a tool."""
    report["left_out"] = dict.fromkeys(TOOLS, f"{PROGRAM} is not here")
    log = options.out.parent / "logs" / "sanitize.plain.log"
    problem = run_logged(target(options.only, options.device, options.limit), log, options.limit)
    report["plain"] = problem or last_line(log)
    conditions.write(options.out, report)
    print(f"left out: {PROGRAM} is not here; without it: {report['plain']}"[:199], flush=True)
    return int(bool(problem))


def run_tools(program: str, report: dict[str, Any], options: argparse.Namespace) -> int:
    # A write past the end of one tensor is seen where no other one shares its block of memory.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    end, shares = time.monotonic() + options.limit, sum(tool.share for tool in TOOLS.values())
    for name, tool in TOOLS.items():
        limit = max(1.0, (end - time.monotonic()) * tool.share / shares)  # with what others have left over
        shares -= tool.share
        report["tools"][name] = run_tool(name, program, options, limit)
        conditions.write(options.out, report)
    found = report["tools"]
    wrong = [f"{name}: {tool['outcome']}" for name, tool in found.items() if tool["outcome"] != OK]
    ran = ", ".join(f"{name} {tool['calls'].partition(' run')[0]}" for name, tool in found.items())
    print(f"sanitize: {'; '.join(wrong) or f'no errors ({ran} calls)'}"[:199], flush=True)
    return int(bool(wrong))


def run(options: argparse.Namespace) -> int:
    if not all_calls(options.only):
        print(f"left out: no call's name holds {options.only!r}", flush=True)
        return 0
    report: dict[str, Any] = conditions.origin(options.device) | {"tools": {}, "left_out": {}}
    conditions.write(options.out, report)
    program = find_program() if options.device == "cuda" else ""
    return run_tools(program, report, options) if program else run_plain(report, options)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a tool has found an error, or has not come to its end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.proof.sanitize", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", default="", help="the calls whose name holds this text")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds (default 120)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
