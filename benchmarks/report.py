"""Writes what is generated from the result files: `results/<machine>/README.md` with every case, the tables of the
documents, with `--plots` three plots a machine. `--check` writes nothing and names what differs.

A table of a document stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; the rest is left alone. Imports
neither torch nor frd_kernels.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import card
from .compare import geomean
from .machine import RESULTS, ROOT, read_json
from .markdown import cells, table

Record = dict[str, Any]

DOCUMENTS = ("docs/performance.md", "docs/model-card.md", "README.md")
# The rows of README's table.
SUMMARY = (
    ("pdc angular depthwise", "forward"),
    ("pdc central depthwise", "forward+backward"),
    ("dpm", "forward"),
    ("dpm", "forward+backward"),
    ("icm paper", "forward"),
    ("icm paper", "forward+backward"),
)
# dtype and timing that stand for a device in it.
SUMMARY_TIMINGS = {"cpu": (("float32", "wall"),), "cuda": (("bfloat16", "wall"), ("bfloat16", "graph"))}
BARS_OF_A_PLOT = 45
OURS, SLOWER = "#1f6feb", "#cf222e"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def op(record: Record) -> str:
    return f"{record['op']} (mean {record['mean']:g})" if record.get("mean") else str(record["op"])


def label(record: Record) -> str:
    return f"{op(record)} {'x'.join(map(str, record['shape']))} {record['layout']} {record['mode']}"


def figures_of(record: Record, eager: str = "") -> list[str]:
    """Milliseconds of ours and of the baseline to four digits, ratio, A/A noise. With `eager`, what the baseline is
    expected to be, another one is named: not every form can be a CUDA graph."""
    ours, baseline = (f"{record[key]['median']:.4g}" for key in ("ours_ms", "baseline_ms"))
    if eager and record["baseline"] != eager:
        baseline += f" ({record['baseline']})"
    return [ours, baseline, times(record["ratio"]), noise(record)]


def noise(record: Record) -> str:
    return f"{100 * record['aa_spread']:.1f}%"


def machines() -> list[pathlib.Path]:
    """The folders with results of kernels."""
    return sorted(path.parent for path in RESULTS.glob("*/kernels.json"))


def device_of(report: Record) -> str:
    return str(next((record.get("device", "cpu") for record in report.get("cases", [])), "cpu"))


def name_of(folder: pathlib.Path) -> str:
    """The GPU's name, or the CPU's."""
    report = read_json(folder / "kernels.json")
    gpu: str | None = report.get("state_before", {}).get("gpu", {}).get("name")
    return gpu or report.get("machine", {}).get("machine", {}).get("cpu", folder.name)


def conditions(report: Record) -> str:
    """When, on what and how quiet the machine was."""
    machine = report.get("machine", {})
    build, versions = machine.get("build", {}), machine.get("versions", {})
    facts = [f"{report['threads']} threads"] if report.get("threads") else []
    if device_of(report) == "cpu" and isinstance(build, dict) and "cpu_isa" in build:
        facts.append(f"{build['cpu_isa']} kernels")
    facts += [f"{name} {versions[name]}" for name in ("torch", "triton", "python") if versions.get(name)]
    facts += [f"revision {report.get('revision', 'unknown')[:12]}", report["when"][:10]]
    if load := report.get("load_before"):
        facts.append(f"load average before the run {load[0]:.1f}")
    busy = sum(not record["quiet"] for record in report["cases"])
    warning = (
        f" **Something else was running during {busy} of {len(report['cases'])} cases.**" if busy else ""
    )
    return ", ".join(facts) + "." + warning


def calibration_lines(calibration: Record) -> Iterator[str]:
    """What the machine itself reached."""
    if not calibration:
        return
    yield f"- copy: {calibration['copy']['bytes_per_s'] / 1e9:.0f} GB/s, read and written"
    for dtype, entry in calibration["matrix"].items():
        size, rate = entry["size"], entry["flops_per_s"]
        yield f"- {dtype} product {size}x{size}x{size}: {rate / 1e12:.2f} TFLOP/s"
    if launch := calibration.get("launch"):
        graph, wall = (1e3 * launch[key]["median"] / launch["launches"] for key in ("graph_ms", "wall_ms"))
        yield f"- an empty kernel: {graph:.2f} us in a graph, {wall:.2f} us launched by the host"


def by_timing(records: list[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.get("timing", "wall"), []).append(record)
    return found


def overall_rows(records: list[Record]) -> Iterator[list[str]]:
    """For each dtype: worst, geomean and best ratio to the first baseline, and to each case's fastest one."""
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        chosen = [record for record in records if record["dtype"] == dtype]
        fastest = [min(pair["ratio"] for pair in r["baselines"].values()) for r in chosen]
        for against, ratios in (("first", [r["ratio"] for r in chosen]), ("fastest", fastest)):
            worst = chosen[ratios.index(min(ratios))]
            behind = sum(ratio < 1 - r["aa_spread"] for ratio, r in zip(ratios, chosen, strict=True))
            figures = map(times, (min(ratios), geomean(ratios), max(ratios)))
            yield [dtype, against, str(len(chosen)), str(behind), *figures, label(worst)]


OVERALL = ("dtype", "baseline", "cases", "slower", "worst", "geomean", "best", "worst case")


def slower_rows(records: list[Record]) -> list[str]:
    """Every baseline that is faster than ours by more than noise, the worst first."""
    found = [
        (pair["ratio"], name, record)
        for record in records
        for name, pair in record["baselines"].items()
        if pair["ratio"] < 1 - record["aa_spread"]
    ]
    found.sort(key=lambda entry: entry[0])
    return [cells(times(ratio), noise(r), label(r), r["dtype"], name) for ratio, name, r in found]


def pairs_text(pairs: dict[str, Record]) -> str:
    return ", ".join(f"{name} {times(pair['ratio'])}" for name, pair in pairs.items()) or "-"


def others(pairs: dict[str, Record], but: str) -> str:
    return pairs_text({name: pair for name, pair in pairs.items() if name != but})


def case_row(record: Record) -> str:
    ours, *compared = figures_of(record)
    return cells(
        *(label(record), record["dtype"], ours, record["backend"], *compared),
        others(record.get("backends", {}), record["backend"]),
        others(record["baselines"], record["baseline"]),
        pairs_text(record["lower_bounds"]),
    )


CASE = ("case", "dtype", "ours, ms", "backend", "baseline, ms", "ratio", "A/A", "other backends")
CASE_ENDS = ("other baselines", "lower bounds")


def kernel_sections(report: Record) -> Iterator[str]:
    for timing, records in by_timing(report["cases"]).items():
        yield f"## Kernels, {timing}"
        yield table(OVERALL, [cells(*row) for row in overall_rows(records)])
        if rows := slower_rows(records):
            yield "Baselines that are faster than ours by more than noise:"
            yield table(("ratio", "A/A", "case", "dtype", "baseline"), rows)
        yield "Every case, the worst ratio first:"
        rows = [case_row(record) for record in sorted(records, key=lambda record: float(record["ratio"]))]
        yield table((*CASE, *CASE_ENDS), rows)


def net_row(record: Record) -> str:
    peak = record.get("peak_bytes")
    return cells(
        f"{record['variant']}, batch {record['batch']}, {record['size']}",
        f"{record['mode']}, {record['execution']}",
        f"{record['dtype']}, {record['timing']}",
        *figures_of(record, "eager"),
        f"{record['images_per_s']['ours']:.2f}",
        " / ".join(f"{peak[key] / 2**20:.0f}" for key in ("ours", "baseline")) if peak else "-",
        others(record["baselines"], record["baseline"]),
    )


NET = ("net", "mode", "dtype, timing", "ours, ms", "eager, ms", "ratio", "A/A", "images/s")
NET_ENDS = ("peak MiB, ours / eager", "other baselines")


def net_section(model: Record) -> Iterator[str]:
    if not model:
        return
    yield "## FRD-Net"
    yield table((*NET, *NET_ENDS), [net_row(record) for record in model["records"]])
    missing = [f"- red gate, no time: {name}: {reason}" for name, reason in model["red"].items()]
    missing += [f"- left out: {name}: {reason}" for name, reason in model["left_out"].items()]
    if missing:
        yield "\n".join(missing)


def complexity_table(found: Record) -> str:
    """Parameters and multiply-accumulates as counted, beside the published rows."""
    rows, source = [], f"counted at {found['size']} x {found['size']}"
    for row in found["counted"]:
        parts = ", ".join(f"{row['macs'][part] / 1e9:.2f} G" for part in ("encoder", "blocks", "decoder"))
        figures = f"{row['parameters'] / 1e6:.2f} M", f"{row['macs']['total'] / 1e9:.2f} G", parts
        rows.append(cells(f"FRD-Net `{row['variant']}`", *figures, source))
    for row in found["quoted"]:
        rows.append(cells(row["model"], row["parameters"], row["macs"], "-", f"quoted: {row['source']}"))
    parts = "of which encoder, FRD blocks, decoder"
    return table(("model", "parameters", "multiply-accumulates", parts, "source"), rows)


def suite_section(suite: Record) -> Iterator[str]:
    """The test runs on this GPU that `suite.json` records."""
    if not suite:
        return
    yield "## Tests"
    lines = []
    for run in suite["runs"]:
        names = ("passed", "failed", "skipped", "error", "errors", "hazards")
        figures = ", ".join(f"{run[name]} {name}" for name in names if name in run) or "nothing ran"
        note = f" ({run['note']})" if run.get("note") else ""
        lines.append(f"- revision {run['revision'][:12]}, {run['what']}: {figures}{note}")
    yield "\n".join(lines)


def left_out_lines(report: Record) -> list[str]:
    lines = [f"- no time: {case}: {reason}" for case, reason in report.get("problems", {}).items()]
    # "auto" is no implementation: which default was in force when the file was written.
    reasons = collections.Counter(
        entry for r in report["cases"] for entry in r.get("left_out", {}).items() if entry[0] != "auto"
    )
    return lines + [f"- {name}, {count} records: {reason}" for (name, reason), count in reasons.items()]


def page(folder: pathlib.Path) -> str:
    """Markdown with everything that the files of a machine say."""
    report = read_json(folder / "kernels.json")
    parts = [
        f"# {name_of(folder)}",
        "Generated by `python -m benchmarks report`; "
        "[docs/performance.md](../../../docs/performance.md) explains the words.",
        conditions(report),
    ]
    if stages := report.get("stages"):
        rows = []
        for name, stage in stages.items():
            outcome = stage.get("problem") or stage.get("summary") or "done"
            rows.append(cells(name, stage.get("seconds", "running"), outcome))
        parts += [table(("stage", "seconds", "outcome"), rows)]
    parts += suite_section(read_json(folder / "suite.json"))
    calibration = read_json(folder / "calibration.json") or report.get("calibration", {})
    parts += ["## Calibration", "\n".join(calibration_lines(calibration))] if calibration else []
    parts += kernel_sections(report)
    parts += net_section(read_json(folder / "model.json"))
    if complexity := read_json(folder / "complexity.json"):
        parts += ["## Parameters and operations", complexity_table(complexity)]
    if lines := left_out_lines(report):
        parts += ["## Left out", "\n".join(lines)]
    parts += [f"![{plot.stem}]({plot.name})" for plot in sorted(folder.glob("*.png"))]
    return "\n\n".join(parts) + "\n"


def write_page(folder: pathlib.Path) -> None:
    (folder / "README.md").write_text(page(folder))


def summary() -> str:
    """README's rows: for each machine the span of the ratio over shapes and layouts."""
    columns: list[tuple[str, dict[tuple[str, str], list[float]]]] = []
    for folder in machines():
        report = read_json(folder / "kernels.json")
        for dtype, timing in SUMMARY_TIMINGS[device_of(report)]:
            ratios: dict[tuple[str, str], list[float]] = {}
            for record in report["cases"]:
                if (record["dtype"], record["timing"], record["mean"]) == (dtype, timing, 0):
                    ratios.setdefault((record["op"], record["mode"]), []).append(record["ratio"])
            columns.append((f"{name_of(folder)}, {dtype}, {timing}", ratios))
    rows = [
        cells(f"{name}, {mode}", *(span(ratios.get((name, mode), [])) for _, ratios in columns))
        for name, mode in SUMMARY
    ]
    return table(("against eager PyTorch", *(title for title, _ in columns)), rows)


def span(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def overall() -> str:
    rows = []
    for folder in machines():
        link = f"[{name_of(folder)}](../benchmarks/results/{folder.name}/README.md)"
        for timing, records in by_timing(read_json(folder / "kernels.json")["cases"]).items():
            rows += [cells(link, timing, *row) for row in overall_rows(records)]
    return table(("machine", "timing", *OVERALL), rows)


def nets() -> str:
    rows = []
    for folder in machines():
        for record in read_json(folder / "model.json").get("records", []):
            titles = (name_of(folder), f"{record['variant']}, batch {record['batch']}", record["dtype"])
            mode = f"{record['mode']}, {record['execution']}, {record['timing']}"
            rows.append(cells(*titles, mode, *figures_of(record, "eager")))
    return table(("machine", "net", "dtype", "mode", "ours, ms", "eager, ms", "ratio", "A/A"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "overall": overall,
    "nets": nets,
    **card.TABLES,
}


def filled(text: str, tables: Mapping[str, Callable[[], str]], name: str) -> str:
    """A document with its tables replaced.

    Raises:
        ValueError: it has a mark that is no table's.
    """
    marks = set(re.findall(r"<!-- /?table:(\S+) -->", text))
    if unknown := marks - set(tables):
        raise ValueError(f"{name}: a mark must name a table, got {', '.join(sorted(unknown))}")
    for mark in marks:
        pattern = rf"(<!-- table:{mark} -->\n).*?(<!-- /table:{mark} -->)"
        content = tables[mark]().replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    return text


def generated() -> Iterator[tuple[pathlib.Path, str]]:
    """Each file and what it should contain."""
    for folder in machines():
        yield folder / "README.md", page(folder)
    for name in DOCUMENTS:
        yield ROOT / name, filled((ROOT / name).read_text(), TABLES, name)


def ratio_figure(plt: Any, records: list[Record], title: str) -> Any:
    """Time of the first baseline over ours, the worst at the bottom; where ours is slower the bar is red. Of very many
    both ends: the worst are never cut."""
    ordered = sorted(records, key=lambda record: float(record["ratio"]))
    if len(ordered) > BARS_OF_A_PLOT:
        ordered = ordered[: -(-2 * BARS_OF_A_PLOT // 3)] + ordered[-(BARS_OF_A_PLOT // 3) :]
    ratios = [record["ratio"] for record in ordered]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(ordered)))
    errors = [(record.get("aa_spread") or 0.0) * record["ratio"] for record in ordered]
    colours = [OURS if ratio >= 1 else SLOWER for ratio in ratios]
    bars = axes.barh(range(len(ordered)), ratios, color=colours, xerr=errors)
    axes.bar_label(bars, [f" {times(ratio)}" for ratio in ratios], fontsize=7)
    axes.set_yticks(range(len(ordered)), [record["name"] for record in ordered], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    limits = min(0.5, 0.8 * min(ratios)), 1.6 * max(ratios)
    ticks = [2.0**power for power in range(-6, 10) if limits[0] <= 2.0**power <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=limits, ylim=(-0.6, len(ordered) - 0.4), title=title)
    axes.set_xlabel("baseline's time over ours, with the A/A noise")
    figure.tight_layout()
    return figure


def write_plots(folder: pathlib.Path) -> list[pathlib.Path]:
    """Forward and forward+backward of the kernels, on a GPU as CUDA graphs, and the nets; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report, model = read_json(folder / "kernels.json"), read_json(folder / "model.json")
    timing = "graph" if device_of(report) == "cuda" else "wall"
    found = {"ratio_model": model.get("records", [])}
    for mode in ("forward", "forward+backward"):
        found[f"ratio_{mode}"] = [
            record for record in report["cases"] if (record["mode"], record["timing"]) == (mode, timing)
        ]
    written = []
    for name, records in found.items():
        if records:
            title = f"{name_of(folder)}: " + ("FRD-Net" if name == "ratio_model" else f"kernels, {timing}")
            figure = ratio_figure(pyplot, records, title)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            written.append(folder / f"{name}.png")
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that differ")
    parser.add_argument("--plots", action="store_true", help="draw the plots as well; needs matplotlib")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where `--check` finds a file that differs from what the results give."""
    if options.plots and not options.check:
        try:
            for folder in machines():
                print("\n".join(map(str, write_plots(folder))))
        except ImportError:
            print("benchmarks report: --plots needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 1
    differing = [(path, text) for path, text in generated() if not path.exists() or path.read_text() != text]
    if options.check:
        if differing:
            names = ", ".join(str(path.relative_to(ROOT)) for path, _ in differing)
            print(f"not what the result files give: {names}; run python -m benchmarks report")
        return int(bool(differing))
    for path, text in differing:
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0
