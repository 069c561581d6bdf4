"""setuptools.build_meta, run inside pip's isolated build with the environment's own packages visible.

torch depends on setuptools, so where torch is installed nothing has to be downloaded: `pip install .` works
offline, with or without build isolation. What is missing (torch, setuptools, cmake, ninja) pip is asked for;
the stable ABI lets a library built against one torch run with another (>= 2.11).
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from typing import Any

for _key in ("platlib", "purelib"):
    if sysconfig.get_path(_key) not in sys.path:
        sys.path.append(sysconfig.get_path(_key))
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def _requires(config_settings: Any = None) -> list[str]:
    missing = [] if importlib.util.find_spec("torch") else ["torch>=2.11"]
    missing += [] if importlib.util.find_spec("setuptools") else ["setuptools>=77"]
    return missing + [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _requires


def __getattr__(name: str) -> Any:
    """build_wheel, build_editable, build_sdist, prepare_metadata_for_build_*."""
    try:
        from setuptools import build_meta
    except ImportError:
        sys.exit(
            "frd_kernels cannot be built: setuptools >= 77 is not installed: run `pip install setuptools` first"
        )
    return getattr(build_meta, name)
