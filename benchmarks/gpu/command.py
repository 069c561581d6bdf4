"""One command on one GPU, offline, in less than nine minutes: `python -m benchmarks.gpu [--short] [--only TEXT]`.

Builds the library where it is missing, runs the GPU's tests, calibrates, measures the kernels and the models, draws.
Each stage is a process of its own with a time limit and a log; what there is so far is on disk after every case.
Where a machine is lent for minutes, `--stages check`, `--stages measure` and `--stages profile` are commands of their
own that add to one report. Imports nothing of frd_kernels, which may have to be built first.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import re
import shlex
import time

from .. import revision
from .process import ROOT
from .run import Run
from .stages import GROUPS, LIMITS, RUNNERS, USUAL


def run_stages(run: Run) -> int:
    """Returns the exit status: 1 where a stage failed or a case has no time."""
    for name in run.options.stages:
        most, share = LIMITS[name]
        last = name == run.options.stages[-1]
        limit, began = min(most, (1.0 if last else share) * run.left()), time.monotonic()
        for log in (run.folder / "logs").glob(f"{name}.*"):
            log.unlink()
        run.stages[name] = {"limit_s": round(limit, 1), "when": run.options.when}
        problem = RUNNERS[name](run, limit) if limit >= 1 else "cut: no time was left"
        seconds = time.monotonic() - began
        run.stages[name] |= {"seconds": round(seconds, 1), "problem": problem}
        print(f"{name:10} {seconds:6.1f} s of {limit:5.1f}  {problem or 'done'}", flush=True)
        run.write()
        run.pack()
    problems = [run.stages[name]["problem"] for name in run.options.stages]
    failed = any(problem and not problem.startswith("left out") for problem in problems)
    if "kernels" in run.options.stages:
        failed |= bool(run.problems) or any(record["red"] for record in run.records.values())
    return int(failed)


def stage_names(text: str) -> list[str]:
    """Names of stages, and of groups of them, in the order in which they run."""
    names = {stage for name in text.split(",") for stage in GROUPS.get(name, (name,))}
    if unknown := sorted(names - set(LIMITS)):
        raise argparse.ArgumentTypeError(
            f"must be some of {', '.join([*GROUPS, *LIMITS])}, got {', '.join(unknown)}"
        )
    return [name for name in LIMITS if name in names]


def device_name(device: str) -> str:
    """The GPU's name; raises SystemExit where torch sees none."""
    if device == "cpu":
        return "rehearsal"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no GPU (--device cpu rehearses the stages on tiny data)")
    return torch.cuda.get_device_name()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    groups = "; ".join(f"{name} = {','.join(stages)}" for name, stages in GROUPS.items())
    parser.add_argument(
        "--stages",
        type=stage_names,
        default=list(USUAL),
        help=f"of {','.join(LIMITS)}; {groups} (default {','.join(USUAL)})",
    )
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for all (default 530)")
    parser.add_argument(
        "--short", action="store_true", help="the essential cases, without compilers' searches"
    )
    parser.add_argument("--only", default="", help="the cases whose name holds this text")
    parser.add_argument(
        "--add", action="store_true", help="only cases without a time in the folder, then compilers' searches"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="holds a folder for each GPU (default benchmarks/results)"
    )
    parser.add_argument("--archive", type=pathlib.Path, help="packs that folder into a .tar.gz as well")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, on tiny data"
    )
    parser.add_argument("--name", help="of the folder (default: the GPU's)")
    parser.add_argument("--revision", help="of the project, where the tree is a copy without its history")
    parser.add_argument("--tests", type=shlex.split, help="arguments of pytest instead of the GPU's suite")
    parser.add_argument(
        "--triton-share",
        default="1/5",
        help="K/N: of Triton's cases every N-th from the K-th, as each must be compiled (default 1/5)",
    )
    options = parser.parse_args(argv)
    options.when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    options.name = options.name or device_name(options.device)
    rehearsed = options.device == "cpu"
    options.out = options.out or ROOT / ("build/rehearsal" if rehearsed else "benchmarks/results")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = arguments(argv)
    if options.revision:
        os.environ[revision.VARIABLE] = options.revision
    folder = options.out.resolve() / re.sub(r"[^a-z0-9]+", "-", options.name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(options, folder, time.monotonic() + options.limit)
    status = run_stages(run)
    print(f"{len(run.records)} records, {len(run.problems)} cases without a time: {folder}")
    return status
