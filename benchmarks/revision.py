"""Which revision of the project is at work. Imports neither torch nor frd_kernels."""

from __future__ import annotations

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Set where the tree is a copy whose own revision says nothing.
VARIABLE = "FRD_REVISION"


def revision() -> str:
    """FRD_REVISION, else the git revision of this checkout, "+" behind it where tracked files differ; "unknown"
    outside of one."""
    if given := os.environ.get(VARIABLE):
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode or changes.returncode or not (ROOT / ".git").exists():
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
