"""`frd bench --against REV`: the kernels in use against those of another git revision.

REV is built in a worktree of its own, CPU library only. Each side then runs in a process with its own `frd_kernels` and
the benchmark code of this version, and only one of them computes at a time, in the order A B B A A B B A ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import frd_kernels

from .compare import geomean, judge
from .timing import Timing, summarise

BENCHMARKS = pathlib.Path(__file__).resolve().parent
TURNS, BLOCK_S, MOST_CALLS = 20, 0.02, 20
THRESHOLD = 0.05


class AgainstError(RuntimeError):
    """The comparison cannot be made, and why."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one case; `ratio` is REV's median over ours."""

    ours: Timing
    other: Timing
    ratio: float
    spread: float  # by how much two halves of one side's own blocks differ
    verdict: str


class Side:
    """A worker process on the package `frd_kernels` in the folder `package`. Its process starts when it is first
    asked, and anew after it has crashed."""

    def __init__(self, package: pathlib.Path, folder: pathlib.Path, threads: int) -> None:
        folder.mkdir()
        (folder / "frd_kernels").symlink_to(package.resolve())
        (folder / "benchmarks").symlink_to(BENCHMARKS)
        self.folder, self.threads = folder, threads
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer; with "error" where the worker failed at it, or ended."""
        process = self.process or self._start()
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # the empty answer tells
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        self.process = None
        return {"error": f"the process ended with status {status}"}

    def _start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(self.threads)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.process

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def measure(ours: Side, other: Side, name: str, turns: int = TURNS) -> Result | str:
    """The case on both sides, or why one of them cannot run it."""
    first = {}
    for label, side in (("this version", ours), ("the other", other)):
        first[label] = side.ask("build", name=name)
        if "error" in first[label]:
            return f"{label} cannot run it: {first[label]['error']}"
    slower = max(answer["seconds"] for answer in first.values())
    calls = max(1, min(MOST_CALLS, round(BLOCK_S / slower)))
    blocks: dict[Side, list[list[float]]] = {ours: [], other: []}
    for turn in range(turns):
        for side in (ours, other) if turn % 2 == 0 else (other, ours):
            answer = side.ask("time", calls=calls)
            if "error" in answer:
                return f"{'this version' if side is ours else 'the other'} failed: {answer['error']}"
            blocks[side].append(answer["seconds"])
    return result(blocks[ours], blocks[other])


def result(ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Result:
    """From the seconds in each block of either side."""
    mine, others = (summarise([s for block in blocks for s in block]) for blocks in (ours, other))
    noise = max(spread(ours), spread(other))
    before, now = ((timing.p10, timing.median, timing.p90) for timing in (others, mine))
    ratio, verdict = judge(before, now, noise, THRESHOLD)
    return Result(mine, others, ratio, noise, verdict)


def spread(blocks: Sequence[Sequence[float]]) -> float:
    """One side against itself: its blocks in turns dealt to two series."""
    even, odd = (statistics.median(s for block in blocks[i::2] for s in block) for i in (0, 1))
    return abs(even / odd - 1)


def git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AgainstError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def checkout() -> pathlib.Path:
    """The git checkout of this project that the current folder lies in."""
    try:
        root = pathlib.Path(git(pathlib.Path.cwd(), "rev-parse", "--show-toplevel"))
    except (AgainstError, FileNotFoundError):
        root = None
    if root is None or not (root / "csrc" / "register.cpp").exists():
        raise AgainstError(
            f"--against builds a revision from a git checkout of frd_kernels: run it in one, got {pathlib.Path.cwd()}"
        )
    return root


@contextlib.contextmanager
def built(root: pathlib.Path, revision: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The package `frd_kernels` of a revision, with its CPU library."""
    tree = folder / "tree"
    git(root, "worktree", "add", "--detach", str(tree), revision)
    try:
        build(tree)
        yield tree / "frd_kernels"
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], check=False)
        subprocess.run(["git", "-C", str(root), "worktree", "prune"], check=False)


def build(tree: pathlib.Path) -> None:
    """By the revision's own setup.py, with this Python and its torch."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tree,
        env=os.environ | {"FRD_CUDA": "OFF", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    output, shown = [], time.monotonic()
    for line in process.stdout:
        output.append(line)
        if time.monotonic() > shown + 5:
            print(f"  {line.strip()[:110]}", flush=True)
            shown = time.monotonic()
    if process.wait():
        raise AgainstError(f"the revision does not build:\n{''.join(output[-30:])}")


def warn_if_stale(root: pathlib.Path, package: pathlib.Path) -> None:
    """A library that is older than its sources would be measured in place of them."""
    library = package / "libfrd_cpu.so"
    newest = max((root / "csrc").rglob("*.*"), key=lambda path: path.stat().st_mtime)
    if library.exists() and newest.stat().st_mtime > library.stat().st_mtime:
        print(f"WARNING: {library} is older than {newest.relative_to(root)}: build this version first")


def run(ours: Side, other: Side, only: str, short: bool) -> int:
    """Measures and prints; returns how many cases could be measured."""
    names = ours.ask("list", only=only, short=short)["cases"]
    width, results = max(map(len, names), default=0), []
    print(f"{'case':{width}} {'ours ms':>9} {'other ms':>9} {'ratio':>8} {'A/A':>6}  verdict", flush=True)
    for name in names:
        found = measure(ours, other, name)
        if isinstance(found, str):
            print(f"{name:{width}} {found}", flush=True)
            continue
        results.append(found.ratio)
        print(
            f"{name:{width}} {found.ours.median:9.3f} {found.other.median:9.3f} {found.ratio:7.3f}x "
            f"{100 * found.spread:5.1f}%  {found.verdict}",
            flush=True,
        )
    if results:
        print(f"{len(results)} cases: geomean {geomean(results):.3f}x, worst {min(results):.3f}x")
    return len(results)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where nothing could be compared."""
    parser = argparse.ArgumentParser(
        prog="frd bench", description="the kernels in use against those of another revision, in turns"
    )
    parser.add_argument("--against", required=True, metavar="REV", help="a git revision")
    parser.add_argument("--only", default="", help="the cases whose name holds this text")
    parser.add_argument("--short", action="store_true", help="the few cases that the demo shows")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    package = pathlib.Path(frd_kernels.__file__).parent
    try:
        root = checkout()
        revision = git(root, "rev-parse", "--verify", "--end-of-options", f"{options.against}^{{commit}}")
        warn_if_stale(root, package)
        with tempfile.TemporaryDirectory(prefix="frd-against-") as name:
            folder = pathlib.Path(name)
            print(f"building {options.against} ({revision[:12]}) for the CPU", flush=True)
            with (
                built(root, revision, folder) as other_package,
                Side(package, folder / "ours", options.threads) as ours,
                Side(other_package, folder / "other", options.threads) as other,
            ):
                print(
                    f"ours: {package}; other: {options.against}; above 1 ours is the faster one", flush=True
                )
                return 0 if run(ours, other, options.only, options.short) else 1
    except AgainstError as error:
        print(f"frd bench --against: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
