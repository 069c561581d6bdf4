"""Exits with a message unless this is a Python that the project supports."""

import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"frd_kernels needs Python 3.10 to 3.13, got {found}: run `make PYTHON=python3.12 ...`")
