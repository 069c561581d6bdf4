"""What has changed: `compare A.json B.json` between two result files, `compare --base REV` between this tree and
another git revision, built in a worktree and run interleaved with this one.

Between files the headline is the normalised ratio: how much faster than the baseline B is, over how much faster than
the baseline A is. The baseline was interleaved with ours, so that it cancels what the machine did to both. Above 1 B
is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from .machine import ROOT, keep_memory, positive

# Device, our backend, timing, name of the case.
Key = tuple[str, str, str, str]
# p10, median, p90.
Range = tuple[float, float, float]

WITHIN_NOISE, BUSY = "within noise", "unsure on a busy machine"
CHANGED = ("faster", "slower")
THRESHOLD = 0.05
# Section and name in `machine` of a result file.
FACTS = (
    *(("machine", "cpu"), ("torch", "gpus"), ("build", "cpu_isa"), ("build", "compiler")),
    *(("versions", name) for name in ("python", "torch", "triton")),
)
TURNS, BLOCK_S, MAX_CALLS = 20, 0.02, 20
# After its turn, in which the threads of a parallel loop stop spinning.
PAUSE_S = 0.01


class CompareError(RuntimeError):
    """The comparison cannot be made, and why."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One case in both files. `plain` is A's median of ours over B's, `normalised` the same in units of the
    baseline, `noise` the larger A/A spread."""

    key: Key
    plain: float
    normalised: float
    noise: float
    verdict: str

    @property
    def name(self) -> str:
        device, backend, timing, name = self.key
        return name if device == "cpu" else f"{name}, {backend}, {timing}"


def load(path: pathlib.Path) -> dict[str, Any]:
    """A result file.

    Raises:
        CompareError: it is none.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CompareError(f"a result file must be readable JSON, got {path}: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list):
        raise CompareError(f"a result file contains a list `cases`, {path} does not")
    return report


def records(report: dict[str, Any], only: str = "") -> dict[Key, dict[str, Any]]:
    """A record for each of our backends in the cases whose name contains `only`."""
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
    """Of ours, in units of the baseline's median in the same series."""
    ours, baseline = record["ours_ms"], record["baseline_ms"]["median"]
    return ours["p10"] / baseline, ours["median"] / baseline, ours["p90"] / baseline


def judge(a: Range, b: Range, noise: float) -> tuple[float, str]:
    """A's median over B's, and what that says. Noise is a difference below the A/A spread, or medians of which each
    lies between the other's p10 and p90."""
    (a_low, a_median, a_high), (b_low, b_median, b_high) = a, b
    ratio = a_median / b_median
    if abs(ratio - 1) <= noise or (b_low <= a_median <= b_high and a_low <= b_median <= a_high):
        return ratio, WITHIN_NOISE
    if abs(ratio - 1) < THRESHOLD:
        return ratio, f"below {THRESHOLD:.0%}"
    return ratio, "faster" if ratio > 1 else "slower"


def change(key: Key, a: dict[str, Any], b: dict[str, Any]) -> Change:
    plain = a["ours_ms"]["median"] / b["ours_ms"]["median"]
    noise = max(a["aa_spread"], b["aa_spread"])
    normalised, verdict = judge(_range(a), _range(b), noise)
    if verdict in CHANGED and not (a.get("quiet", True) and b.get("quiet", True)):
        verdict = f"{BUSY}, else {verdict}"
    if a["baseline"] != b["baseline"]:
        verdict += f" (another baseline: {a['baseline']} / {b['baseline']})"
    return Change(key, plain, normalised, noise, verdict)


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """What two files should have in common for their times to be comparable."""
    machine = report.get("machine", {})
    found = {"threads": report.get("threads")}
    for section, name in FACTS:
        known = machine.get(section)
        # A text where it could not be found out.
        found[name] = known.get(name) if isinstance(known, dict) else None
    return found


def warnings_of(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """The facts in which the files differ, and which of them was measured on a busy machine."""
    first, second = facts(a), facts(b)
    yield from (f"{name}: {first[name]} / {second[name]}" for name in first if first[name] != second[name])
    for name, report in (("A", a), ("B", b)):
        if not report.get("quiet", True):
            yield f"{name} was measured on a busy machine"


def geomean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def compare_files(options: argparse.Namespace) -> int:
    """Prints the comparison. Returns the exit status: 1 where a case is slower than `--fail-below` allows.

    Raises:
        CompareError: a file is no result file, or the files have no case in common.
    """
    a, b = map(load, options.files)
    first, second = records(a, options.only), records(b, options.only)
    common = [key for key in first if key in second]
    if not common:
        raise CompareError(f"the files have no case in common that contains {options.only!r} in its name")
    changes = [change(key, first[key], second[key]) for key in common]
    changes.sort(key=lambda each: each.normalised)
    for name, report in (("A", a), ("B", b)):
        print(f"{name}: {report.get('when', 'no date')}, revision {report.get('revision', 'unknown')[:12]}")
    for text in warnings_of(a, b):
        print(f"WARNING: {text}")
    width = max(len(each.name) for each in changes)
    print(f"{'case':{width}} {'A/B':>8} {'normalised':>11} {'noise':>7}  verdict")
    for each in changes:
        figures = f"{each.plain:7.3f}x {each.normalised:10.3f}x {100 * each.noise:6.1f}%"
        print(f"{each.name:{width}} {figures}  {each.verdict}")
    for name, own, other in (("A", first, second), ("B", second, first)):
        for key in own:
            if key not in other:
                print(f"only in {name}: {', '.join(key)}")
    plain, normalised = (geomean(getattr(c, name) for c in changes) for name in ("plain", "normalised"))
    print(
        f"{len(changes)} cases: geomean {plain:.3f}x, normalised {normalised:.3f}x; worst "
        f"{changes[0].normalised:.3f}x ({changes[0].name})"
    )
    if options.fail_below is None:
        return 0
    sure = (each for each in changes if not each.verdict.startswith((WITHIN_NOISE, BUSY)))
    return int(any(each.normalised < options.fail_below for each in sure))


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one case, in milliseconds: REV's median over ours, the spread of two halves of one tree's own blocks."""

    ours: float
    base: float
    ratio: float
    spread: float
    verdict: str


class Tree:
    """A process that checks and times cases on the package `frd_kernels` in the folder `package`, with the benchmark
    code of this tree. It starts when it is first asked, and anew after it has crashed."""

    def __init__(self, label: str, package: pathlib.Path, folder: pathlib.Path, threads: int) -> None:
        folder.mkdir()
        (folder / "frd_kernels").symlink_to(package.resolve())
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        self.label, self.folder, self.threads = label, folder, threads
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, argument: Any) -> Any:
        """The answer of `serve`.

        Raises:
            CompareError: the process failed at it, or ended.
        """
        process = self.process = self.process or self._start()
        assert process.stdin and process.stdout
        # The empty answer tells.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([do, argument]) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.process = None
            raise CompareError(f"{self.label}: the process ended with status {process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise CompareError(f"{self.label}: {answer}")
        return answer

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.threads)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def serve(source: TextIO, target: TextIO) -> None:
    """The other end of `Tree`: ["build", case] -> seconds of a call, then ["time", calls] -> the seconds of each; a
    text says what went wrong."""
    from .gate import one_line
    from .timing import timed

    call: Any = None
    for line in source:
        do, argument = json.loads(line)
        answer: Any
        try:
            if do == "build":
                call = None
                call = checked_call(argument)
                answer = timed(call)
            else:
                # The first call finds what the other process has left in the caches, and is not counted.
                call()
                answer = [timed(call) for _ in range(argument)]
        # Whatever another revision's kernels raise.
        except Exception as error:
            answer = one_line(error)
        time.sleep(PAUSE_S)
        print(json.dumps(answer), file=target, flush=True)


def checked_call(name: str) -> Callable[[], object]:
    """Our call of the case, warm. Baselines are not timed, so none is compiled."""
    from .gate import gate
    from .registry import cases
    from .timing import warm_up

    (case,) = (case for case in cases("cpu") if case.name == name)
    case = dataclasses.replace(case, compiled=())
    impls = case.build(case)
    gate(case, impls)
    call = next(iter(impls.ours.values()))
    del impls
    gc.collect()
    warm_up(call, 5)
    return call


def compare_case(ours: Tree, base: Tree, name: str, turns: int = TURNS) -> Result:
    """The case in both trees, of which one computes at a time.

    Raises:
        CompareError: one of them cannot run it.
    """
    slower = max(tree.ask("build", name) for tree in (ours, base))
    calls = max(1, min(MAX_CALLS, round(BLOCK_S / slower)))
    blocks: dict[Tree, list[list[float]]] = {ours: [], base: []}
    for turn in range(turns):
        for tree in (ours, base) if turn % 2 == 0 else (base, ours):
            blocks[tree].append(tree.ask("time", calls))
    return result(blocks[ours], blocks[base])


def result(ours: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Result:
    """From the seconds in each block of either tree."""
    from .timing import summarize

    mine, other = (summarize([s for block in blocks for s in block]) for blocks in (ours, base))
    noise = max(spread(ours), spread(base))
    before, now = ((times["p10"], times["median"], times["p90"]) for times in (other, mine))
    ratio, verdict = judge(before, now, noise)
    return Result(mine["median"], other["median"], ratio, noise, verdict)


def spread(blocks: Sequence[Sequence[float]]) -> float:
    """One tree against itself: its blocks dealt in turns to two series."""
    even, odd = (statistics.median(s for block in blocks[i::2] for s in block) for i in (0, 1))
    return abs(even / odd - 1)


def git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompareError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def built(root: pathlib.Path, revision: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The package `frd_kernels` of a revision, with its CPU library."""
    tree = folder / "tree"
    git(root, "worktree", "add", "--detach", str(tree), revision)
    # By the revision's own setup.py, with this Python and its torch.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext"],
            cwd=tree,
            env=os.environ | {"FRD_CUDA": "OFF", "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            last = "\n".join(done.stdout.splitlines()[-30:])
            raise CompareError(f"the revision does not build:\n{last}")
        yield tree / "frd_kernels"
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], check=False)
        subprocess.run(["git", "-C", str(root), "worktree", "prune"], check=False)


def warn_if_stale(package: pathlib.Path) -> None:
    """A library that is older than its sources would be measured in place of them."""
    library = package / "libfrd_cpu.so"
    newest = max((ROOT / "csrc").rglob("*.*"), key=lambda path: path.stat().st_mtime)
    if library.exists() and newest.stat().st_mtime > library.stat().st_mtime:
        print(f"WARNING: {library} is older than {newest.relative_to(ROOT)}: build this tree first")


def print_results(ours: Tree, base: Tree, names: Sequence[str]) -> int:
    """Measures and prints; returns how many cases could be measured."""
    width, ratios = max(map(len, names), default=0), []
    print(f"{'case':{width}} {'ours ms':>9} {'base ms':>9} {'ratio':>8} {'A/A':>6}  verdict", flush=True)
    for name in names:
        try:
            found = compare_case(ours, base, name)
        except CompareError as error:
            print(f"{name:{width}} {error}", flush=True)
            continue
        ratios.append(found.ratio)
        times = f"{found.ours:9.3f} {found.base:9.3f} {found.ratio:7.3f}x {100 * found.spread:5.1f}%"
        print(f"{name:{width}} {times}  {found.verdict}", flush=True)
    if ratios:
        print(f"{len(ratios)} cases: geomean {geomean(ratios):.3f}x, worst {min(ratios):.3f}x")
    return len(ratios)


def compare_revision(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where nothing could be compared.

    Raises:
        CompareError: the revision is unknown or does not build.
    """
    import frd_kernels

    from .registry import cases

    package = pathlib.Path(frd_kernels.__file__).parent
    revision = git(ROOT, "rev-parse", "--verify", "--end-of-options", f"{options.base}^{{commit}}")
    names = [case.name for case in cases("cpu", options.only, options.quick)]
    warn_if_stale(package)
    with tempfile.TemporaryDirectory(prefix="frd-compare-") as name, contextlib.ExitStack() as trees:
        folder = pathlib.Path(name)
        print(f"building {options.base} ({revision[:12]}) for the CPU", flush=True)
        packages = {"this tree": package, "the base": trees.enter_context(built(ROOT, revision, folder))}
        ours, base = (
            trees.enter_context(contextlib.closing(Tree(label, path, folder / label, options.threads)))
            for label, path in packages.items()
        )
        print(f"ours: {package}; base: {options.base}; above 1 ours is faster", flush=True)
        return 0 if print_results(ours, base, names) else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="A.json B.json", help="result files")
    parser.add_argument("--base", metavar="REV", help="instead of files: a git revision")
    parser.add_argument("--only", default="", help="the cases whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="with --base: the essential cases")
    parser.add_argument("--threads", type=positive, default=2, help="with --base: CPU threads (default 2)")
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit status 1 if a file's case is slower, beyond noise and on a quiet machine",
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 2 where the comparison cannot be made."""
    if (options.base is None) == (len(options.files) != 2):
        print("compare: give two result files, or --base REV", file=sys.stderr)
        return 2
    try:
        return compare_files(options) if options.base is None else compare_revision(options)
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


def main() -> None:
    """Serves the requests of a `Tree`; the argument is the number of threads."""
    import torch

    with os.fdopen(os.dup(1), "w") as answers:
        # What else is printed must not get between the answers.
        os.dup2(2, 1)
        gc.disable()
        torch.set_num_threads(int(sys.argv[1]))
        keep_memory()
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
