"""`frd bench compare A.json B.json`: what has changed from one result file to another.

The headline is the normalised ratio: how much faster than the rival B is, over how much faster than the rival A is. The
rival ran in turns with ours, so it cancels what the machine did to both. Above 1 B is the faster one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import Any

Key = tuple[str, str, str, str]  # device, our backend, timing, name of the case
Range = tuple[float, float, float]  # p10, median, p90

WITHIN_NOISE, BUSY = "within noise", "unsure on a busy machine"
CHANGED = ("faster", "slower")


@dataclasses.dataclass(frozen=True)
class Change:
    """One case in both files. `plain` is A's median of ours over B's, `normalised` the same in units of the rival."""

    key: Key
    plain: float
    normalised: float
    noise: float  # the larger A/A spread
    verdict: str

    @property
    def name(self) -> str:
        device, backend, timing, name = self.key
        return name if device == "cpu" else f"{name}, {backend}, {timing}"


def load(path: pathlib.Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is none.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"a result file must be readable JSON, got {path}: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list):
        raise ValueError(f"a result file holds a list `cases`, {path} does not")
    return report


def records(report: dict[str, Any], only: str = "") -> dict[Key, dict[str, Any]]:
    """A record for each of our backends in the cases whose name holds `only`; files of earlier versions know the CPU
    alone."""
    found: dict[Key, dict[str, Any]] = {}
    for record in report["cases"]:
        if only not in record["name"]:
            continue
        backends = record.get("backends") or {record.get("backend", "cpu"): record}
        for backend, pair in backends.items():
            key = (record.get("device", "cpu"), backend, record.get("timing", "wall"), record["name"])
            found[key] = record | pair
    return found


def _range(record: dict[str, Any]) -> Range:
    """p10, median and p90 of ours, in units of the rival's median in the same series."""
    ours, rival = record["ours_ms"], record["rival_ms"]["median"]
    return ours["p10"] / rival, ours["median"] / rival, ours["p90"] / rival


def judge(a: Range, b: Range, noise: float, threshold: float) -> tuple[float, str]:
    """A's median over B's, and what that says. Noise is a difference below the A/A spreads, or medians of which each
    lies between the other's p10 and p90."""
    (a_low, a_median, a_high), (b_low, b_median, b_high) = a, b
    ratio = a_median / b_median
    if abs(ratio - 1) <= noise or (b_low <= a_median <= b_high and a_low <= b_median <= a_high):
        return ratio, WITHIN_NOISE
    if abs(ratio - 1) < threshold:
        return ratio, f"below {threshold:.0%}"
    return ratio, "faster" if ratio > 1 else "slower"


def change(key: Key, a: dict[str, Any], b: dict[str, Any], threshold: float) -> Change:
    """Compares two records."""
    plain = a["ours_ms"]["median"] / b["ours_ms"]["median"]
    noise = max(a["aa_spread"], b["aa_spread"])
    normalised, verdict = judge(_range(a), _range(b), noise, threshold)
    if verdict in CHANGED and not (a.get("quiet", True) and b.get("quiet", True)):
        verdict = f"{BUSY}, else {verdict}"
    if a["rival"] != b["rival"]:
        verdict += f" (another rival: {a['rival']} / {b['rival']})"
    return Change(key, plain, normalised, noise, verdict)


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """What two files should have in common for their times to be comparable."""
    machine = report.get("machine", {})

    def fact(section: str, name: str) -> Any:
        known = machine.get(section)
        return known.get(name) if isinstance(known, dict) else None  # a text where it could not be found out

    return {
        "CPU": fact("machine", "cpu"),
        "GPUs": fact("torch", "gpus"),
        "threads": report.get("threads"),
        "instruction set": fact("build", "cpu_isa"),
        "compiler": fact("build", "compiler"),
    } | {name: fact("versions", name) for name in ("python", "torch", "triton")}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In which of these facts the files differ, and which of them was taken on a busy machine."""
    first, second = facts(a), facts(b)
    found = [f"{name}: {first[name]} / {second[name]}" for name in first if first[name] != second[name]]
    found += [
        f"{name} was measured on a busy machine"
        for name, r in (("A", a), ("B", b))
        if not r.get("quiet", True)
    ]
    return found


def geomean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def lines(
    a: dict[str, Any], b: dict[str, Any], changes: list[Change], missing: dict[str, list[Key]]
) -> Iterator[str]:
    """The comparison in words, the worst case first."""
    for name, report in (("A", a), ("B", b)):
        yield f"{name}: {report.get('when', 'no date')}, revision {report.get('revision', 'unknown')[:12]}"
    for difference in differences(a, b):
        yield f"WARNING: {difference}"
    width = max((len(each.name) for each in changes), default=0)
    yield f"{'case':{width}} {'A/B':>8} {'normalised':>11} {'noise':>7}  verdict"
    for each in changes:
        yield (
            f"{each.name:{width}} {each.plain:7.3f}x {each.normalised:10.3f}x {100 * each.noise:6.1f}%  "
            f"{each.verdict}"
        )
    for name, keys in missing.items():
        for key in keys:
            yield f"only in {name}: {', '.join(key)}"
    if changes:
        yield (
            f"{len(changes)} cases: geomean {geomean(c.plain for c in changes):.3f}x, normalised "
            f"{geomean(c.normalised for c in changes):.3f}x; worst {changes[0].normalised:.3f}x ({changes[0].name})"
        )


def _share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05."""
    number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 100%, got {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a case is slower than `--fail-below` allows, 2 for files without a case in
    common."""
    parser = argparse.ArgumentParser(
        prog="frd bench compare", description="what has changed from A to B; above 1 B is the faster one"
    )
    parser.add_argument("a", type=pathlib.Path, metavar="A.json")
    parser.add_argument("b", type=pathlib.Path, metavar="B.json")
    parser.add_argument("--only", default="", help="the cases whose name holds this text")
    parser.add_argument(
        "--threshold", type=_share, default=0.05, help="smaller changes are not called one (default 5%%)"
    )
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit status 1 if the normalised ratio of a case is smaller, beyond noise and on a quiet machine",
    )
    options = parser.parse_args(argv)
    try:
        a, b = load(options.a), load(options.b)
    except ValueError as error:
        parser.error(str(error))
    first, second = records(a, options.only), records(b, options.only)
    common = [key for key in first if key in second]
    if not common:
        parser.error(f"the files have no case in common that holds {options.only!r} in its name")
    changes = [change(key, first[key], second[key], options.threshold) for key in common]
    changes.sort(key=lambda each: each.normalised)
    missing = {
        "A": [key for key in first if key not in second],
        "B": [key for key in second if key not in first],
    }
    print("\n".join(lines(a, b, changes, missing)))
    if options.fail_below is None:
        return 0
    sure = (each for each in changes if not each.verdict.startswith((WITHIN_NOISE, BUSY)))
    failed = [each for each in sure if each.normalised < options.fail_below]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
