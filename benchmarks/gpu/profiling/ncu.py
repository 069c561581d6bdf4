"""Nsight Compute: how it is called, and what the pages of its reports say. Imports neither torch nor frd_kernels."""

from __future__ import annotations

import collections
import csv
import glob
import io
import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

LAUNCHES = 24  # of one call that are looked at
COUNTERS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "SchedulerStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
# These need a copy of the kernel that counts, which a large one may not survive.
PATCHED = (
    "InstructionStats",
    "MemoryWorkloadAnalysis_Chart",
    "MemoryWorkloadAnalysis_Tables",
    "SourceCounters",
)
SAMPLES = "group:smsp__pcsamp_warp_stall_reasons"  # where warps wait, without such a copy
FIELDS = {
    "us": "gpu__time_duration.sum",
    "cycles": "gpc__cycles_elapsed.max",
    "sm_active_cycles": "sm__cycles_active.avg",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_limit_percent": "sm__maximum_warps_per_active_cycle_pct",
    "registers": "launch__registers_per_thread",
    "dynamic_shared_bytes": "launch__shared_mem_per_block_dynamic",
    "static_shared_bytes": "launch__shared_mem_per_block_static",
    "cluster": "launch__cluster_size",
    "clusters_at_once": "launch__cluster_max_active",
    "waves": "launch__waves_per_multiprocessor",
    "instructions": "smsp__inst_executed.sum",
    "instructions_per_cycle": "sm__inst_executed.avg.per_cycle_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "eligible_warps": "smsp__warps_eligible.avg.per_cycle_active",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "bank_conflicts_of_loads": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "bank_conflicts_of_stores": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "local_loads": "smsp__sass_inst_executed_op_local_ld.sum",
    "local_stores": "smsp__sass_inst_executed_op_local_st.sum",
    "samples": "smsp__pcsamp_sample_count",
    "sample_cycles": "smsp__pcsamp_interval_cycles",
    "dropped_sample_bytes": "smsp__pcsamp_dropped_bytes",
}
TENSOR = re.compile(r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
SAMPLED = re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+)")
SAMPLED_HERE = re.compile(r"(?:stall_|smsp__pcsamp_warps_issue_stalled_)(\w+)")  # of an instruction
SCALE = {"n": 1e-3, "u": 1.0, "m": 1e3, "": 1e6}  # seconds -> us
BYTES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
# How the source page shortens the reasons of the raw one.
REASONS = {
    "dispatch": "dispatch_stall",
    "imc": "imc_miss",
    "lg": "lg_throttle",
    "long_sb": "long_scoreboard",
    "math": "math_pipe_throttle",
    "mio": "mio_throttle",
    "no_inst": "no_instruction",
    "no_instructions": "no_instruction",
    "short_sb": "short_scoreboard",
    "sleep": "sleeping",
    "tex": "tex_throttle",
}
CAST = re.compile(r"\((?:bool|char|short|int|long|unsigned int|unsigned long)\)")
STEPS = 64  # instructions of a range
TOP = 40


def find() -> str:
    """The Nsight Compute of the search path, else the newest that is installed, else ''."""
    places = [shutil.which("ncu") or "", *glob.glob("/usr/local/cuda*/bin/ncu")]
    places += sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), key=_version, reverse=True)
    return next((place for place in places if place), "")


def _version(path: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path)]


def known(listed: str, patched: bool) -> list[str]:
    """The sections to collect, of those in the answer to --list-sections: a name that is none would be an error."""
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    wanted = [*COUNTERS, *(PATCHED if patched else ())]
    return [section for section in wanted if section in names] or wanted


def profile_command(
    tool: str, report: pathlib.Path, target: Sequence[str], sections: Sequence[str]
) -> list[str]:
    """Profiles what `target` launches between cudaProfilerStart and -Stop, clocks and caches left as they are."""
    command = [tool, "--force-overwrite", "--export", str(report), "--profile-from-start", "off"]
    command += ["--target-processes", "all", "--clock-control", "none", "--cache-control", "none"]
    command += ["--launch-count", str(LAUNCHES)]
    for section in sections:
        command += ["--section", section]
    return [*command, *([] if "SourceCounters" in sections else ["--metrics", SAMPLES]), *target]


def page_command(
    tool: str, report: pathlib.Path, page: str, source: str = "", launch: int | None = None
) -> list[str]:
    command = [tool, "--import", str(report), "--csv", "--page", page]
    command += ["--print-source", source] if source else []
    return command + ([] if launch is None else ["--launch-skip", str(launch), "--launch-count", "1"])


def _rows(text: str) -> Iterator[list[str]]:
    """The rows of a page in CSV without the tool's own lines, which begin with ==."""
    return csv.reader(line for line in text.splitlines() if line.startswith('"'))


def _number(cell: str) -> float | None:
    try:
        value = float(cell.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scaled(value: float, unit: str) -> float:
    """In us or bytes, whatever prefix the unit has."""
    unit = unit.partition("/")[0]
    if match := re.fullmatch(r"([num]?)s(?:econd)?", unit):
        return value * SCALE[match[1]]
    match = re.fullmatch(r"([KMG]?)byte", unit)
    return value * BYTES[match[1]] if match else value


def launches(text: str) -> list[dict[str, Any]]:
    """What the raw page says of each launch, under the names of FIELDS."""
    rows = _rows(text)
    head = next((row for row in rows if row and row[0] == "ID"), [])
    units = next(rows, [])
    unit = dict(zip(head, units, strict=True)) if head else {}
    return [_launch(dict(zip(head, row, strict=True)), unit) for row in rows if len(row) == len(head)]


def _launch(cells: dict[str, str], unit: dict[str, str]) -> dict[str, Any]:
    values = {
        name: _scaled(value, unit[name])
        for name, cell in cells.items()
        if (value := _number(cell)) is not None
    }
    found: dict[str, Any] = {"kernel": short_name(cells["Kernel Name"])}
    found |= {"grid": cells["Grid Size"], "block": cells["Block Size"]}
    found |= {field: values[name] for field, name in FIELDS.items() if name in values}
    tensor = [value for name, value in values.items() if TENSOR.fullmatch(name)]
    found |= {"tensor_percent": max(tensor)} if tensor else {}
    return found | {"stalls": _reasons(STALL, values), "sampled": _reasons(SAMPLED, values)}


def _reasons(pattern: re.Pattern[str], values: dict[str, float]) -> dict[str, float]:
    """Stall reason -> value, largest first, without zeros; what counts cycles without an issue alone is left out."""
    found = {
        REASONS.get(match[1], match[1]): value
        for name, value in values.items()
        if value and (match := pattern.fullmatch(name)) and not match[1].endswith("_not_issued")
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def short_name(kernel: str) -> str:
    """Without return type, namespaces, casts and parameters: icm_kernel<__nv_bfloat16, 8>."""
    name = CAST.sub("", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))
    name = name.replace("<unnamed>::", "").partition("(")[0]
    return re.sub(r"\b(?:\w+::)+", "", name)


def instructions(text: str) -> list[dict[str, Any]]:
    """The first kernel of a source page of SASS: address, opcode, samples, and those samples by stall reason."""
    found: list[dict[str, Any]] = []
    head: list[str] = []
    for row in _rows(text):
        if "Address" in row and "Source" in row:
            if found:
                break  # some versions print a kernel twice
            head = row
        elif head and len(row) == len(head):
            found.append(_instruction(dict(zip(head, row, strict=True))))
    return found


def _instruction(cells: dict[str, str]) -> dict[str, Any]:
    counts = {name: count for name, cell in cells.items() if (count := _number(cell))}
    stalls = _reasons(SAMPLED_HERE, counts)
    total = _number(cells.get("Warp Stall Sampling (All Samples)") or cells.get("# Samples") or "")
    source = cells["Source"].strip().rstrip(" ;")
    words = [word for word in source.split() if not word.startswith("@")]
    return {
        "address": int(cells["Address"], 16),
        "opcode": words[0] if words else "",
        "source": source,
        "samples": sum(stalls.values()) if total is None else total,
        "executed": _number(cells.get("Instructions Executed", "")),
        "stalls": stalls,
    }


def lines(text: str) -> dict[int, tuple[str, int]]:
    """Address -> file and line, of a source page of CUDA and SASS; empty without line numbers in the library."""
    found: dict[int, tuple[str, int]] = {}
    file, line, address = "", 0, None
    for row in _rows(text):
        if row[0] == "File Path":
            file = row[1][row[1].rfind("csrc/") :] if "csrc/" in row[1] else pathlib.PurePath(row[1]).name
        elif row.count("Source") == 2 and "Address" in row:
            address = row.index("Address")
        elif address is not None and len(row) > address:
            line = int(row[0]) if row[0].isdigit() else line
            if row[address].startswith("0x"):
                found.setdefault(int(row[address], 16), (file, line))
    return found


def listing(code: Sequence[dict[str, Any]], where: dict[int, tuple[str, int]]) -> str:
    """Every instruction with its line, how often it ran and what its samples waited for, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["offset", "executed", "samples", "stalls", "file", "line", "instruction"])
    for step in code:
        offset = f"{step['address'] - code[0]['address']:#x}"
        stalls = " ".join(f"{reason}:{count:.0f}" for reason, count in step["stalls"].items())
        counts = ("" if step[name] is None else f"{step[name]:.0f}" for name in ("executed", "samples"))
        writer.writerow([offset, *counts, stalls, *where.get(step["address"], ("", "")), step["source"]])
    return text.getvalue()


def hot(code: Sequence[dict[str, Any]], where: dict[int, tuple[str, int]]) -> dict[str, Any]:
    """Where the samples of a launch lie: by line, file, opcode, range of addresses and instruction."""
    total = sum(step["samples"] for step in code)
    run = [step["executed"] > 0 for step in code if step["executed"] is not None]
    found: dict[str, Any] = {"samples": total, "instructions_of_code": len(code)}
    found |= {"instructions_run": sum(run)} if run else {}
    if not total:
        return found
    first = code[0]["address"]
    groups: dict[str, dict[Any, list[dict[str, Any]]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for index, step in enumerate(code):
        if not step["samples"]:
            continue
        file, line = where.get(step["address"], ("", 0))
        groups["opcodes"][step["opcode"]].append(step)
        groups["ranges"][f"{index // STEPS * STEPS * 16:#x}"].append(step)
        groups["instructions"][f"{step['address'] - first:#x} {step['source']}"].append(step)
        if file:
            groups["files"][file].append(step)
            groups["lines"][f"{file}:{line}"].append(step)
    return found | {kind: _ranked(steps, where, total) for kind, steps in groups.items()}


def _ranked(
    groups: dict[Any, list[dict[str, Any]]], where: dict[int, tuple[str, int]], total: float
) -> list[dict[str, Any]]:
    ranked = []
    for name, steps in groups.items():
        stalls: collections.Counter[str] = collections.Counter()
        for step in steps:
            stalls.update(step["stalls"])
        samples = sum(step["samples"] for step in steps)
        file, line = where.get(max(steps, key=lambda step: step["samples"])["address"], ("", 0))
        entry = {"name": name, "samples": samples, "percent": round(100 * samples / total, 2)}
        entry |= {"stall": max(stalls, key=lambda stall: stalls[stall])} if stalls else {}
        at = f"{file}:{line}"
        ranked.append(entry | ({"at": at} if file and at != name else {}))
    return sorted(ranked, key=lambda entry: -entry["samples"])[:TOP]
