"""The stages: what each runs, and the time that it may take."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable

from .kernels import measure, selection
from .process import last_line, run_logged
from .run import Run

# Seconds that a stage may take, and its share of what is left where that is less. In the order in which they run.
LIMITS = {
    "build": (300.0, 0.7),
    "tests": (240.0, 0.5),
    "checks": (90.0, 0.4),
    "sanitize": (150.0, 0.6),
    "calibrate": (45.0, 0.3),
    "compile": (75.0, 0.3),
    "kernels": (400.0, 0.65),
    "model": (150.0, 0.6),
    "training": (120.0, 0.8),
    "profile": (240.0, 0.9),
    "plots": (30.0, 1.0),
}
GROUPS = {
    "check": ("build", "tests", "checks", "sanitize"),
    "measure": ("build", "calibrate", "compile", "kernels", "model", "training", "plots"),
}
USUAL = ("build", "tests", "checks", *GROUPS["measure"][1:])


def build(run: Run, limit: float) -> str:
    """Compiles for this GPU where the library does not load; without nvcc the Triton kernels can still run."""
    probe = "import frd_kernels as fk; ok, why = fk.backends()['cuda']; raise SystemExit(0 if ok else why)"
    log = run.folder / "logs" / "build.log"
    missing = run_logged([sys.executable, "-c", probe], log, limit)
    if not missing or run.options.device == "cpu":
        return ""
    import torch

    major, minor = torch.cuda.get_device_capability()
    script = f"TORCH_CUDA_ARCH_LIST={major}.{minor} PYTHON={sys.executable} tools/build_inplace.sh"
    return run_logged(["bash", "-c", script], log, limit)


def tests(run: Run, limit: float) -> str:
    """The suite of the kernels on the GPU's backends, or with `--tests` whatever pytest is told to run."""
    log = run.folder / "logs" / "tests.log"
    if run.options.tests:
        problem = run_logged([sys.executable, "-m", "pytest", *run.options.tests], log, limit)
    else:
        command = run.worker(
            "proof.suite", "--out", run.folder / "suite.json", "--limit", f"{limit - 10:.0f}"
        )
        command += ["--triton-share", run.options.triton_share, "--only", run.options.only]
        problem = run_logged(command, log, limit)
    run.stages["tests"]["summary"] = last_line(log)
    return problem


def own(name: str, module: str, reserve: float = 5.0) -> Callable[[Run, float], str]:
    """A stage that is one module: it keeps to its limit itself, writes NAME.json as it goes, and prints a summary
    last."""

    def stage(run: Run, limit: float) -> str:
        log = run.folder / "logs" / f"{name}.log"
        command = run.worker(module, "--out", run.folder / f"{name}.json", "--only", run.options.only)
        problem = run_logged([*command, "--limit", f"{max(1.0, limit - reserve):.0f}"], log, limit)
        run.stages[name]["summary"] = last_line(log)
        return problem

    return stage


def calibrate(run: Run, limit: float) -> str:
    command = run.worker("worker", "calibrate", "--out", run.folder / "calibration.json")
    return run_logged(command, run.folder / "logs" / "calibrate.log", limit)


def compile_all(run: Run, limit: float) -> str:
    """Fills the compilers' caches with a process for every other core, before one process alone measures."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 2))
    log = run.folder / "logs" / "compile.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    commands = [
        run.worker("worker", "compile", "--part", part, "--of", parts, *selection(run.options))
        for part in range(parts)
    ]
    script = "export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=2\n"
    script += "\n".join(f"{shlex.join(command)} &" for command in commands) + "\nwait"
    run.stages["compile"]["summary"] = run_logged(["bash", "-c", script], log, limit)
    return ""  # what it does not reach is compiled when it is measured


def model(run: Run, limit: float) -> str:
    command = run.worker("worker", "model", "--out", run.folder / "model.json")
    command += ["--limit", f"{max(5.0, limit - 15):.0f}"]
    return run_logged(command, run.folder / "logs" / "model.log", limit)


def plots(run: Run, limit: float) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "left out: matplotlib is not installed"
    return run_logged(
        run.worker("worker", "plots", "--out", run.folder), run.folder / "logs" / "plots.log", limit
    )


RUNNERS: dict[str, Callable[[Run, float], str]] = {
    "build": build,
    "tests": tests,
    "checks": own("checks", "proof.checks"),
    "sanitize": own("sanitize", "proof.sanitize"),
    "calibrate": calibrate,
    "compile": compile_all,
    "kernels": measure,
    "model": model,
    "training": own("training", "training.train", reserve=10.0),
    "profile": own("profile", "profiling.profile", reserve=10.0),
    "plots": plots,
}
