"""The benchmark under pytest-benchmark: an entry for every side of every registered case, its results as JSON."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_every_side_is_an_entry_with_a_result(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "results.json"
    options = [f"--benchmark-json={out}", "--benchmark-only", "--benchmark-max-time=0.02"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    selected = "pdc_weight and central and not backward"
    result = subprocess.run([*command, *options, "-k", selected], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    report = json.loads(out.read_text())
    entries = {entry["extra_info"]["side"]: entry for entry in report["benchmarks"]}
    assert set(entries) == {"ours, cpu", "eager"}
    group = "cpu: pdc_weight central [256x256x3x3] float32 nchw forward"
    for entry in entries.values():
        assert entry["group"] == group
        assert entry["stats"]["median"] > 0
    assert report["machine_info"]["frd"]["versions"]["torch"]
