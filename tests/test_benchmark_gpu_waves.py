"""The times of the ICM that show how many clusters of blocks run at once, beside what was predicted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import sys
from typing import Any

import pytest

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
NAMES = ("occupancy", "predicted", "page", "waves")
occupancy, predicted, page, waves = (
    importlib.import_module(f"{PACKAGE}.gpu.profiling.{name}") for name in NAMES
)
gate = importlib.import_module(f"{PACKAGE}.gate")


def test_points() -> None:
    points = {point.key: point for point in waves.points()}
    assert len(points) == len(list(waves.points()))
    assert {point.base for point in points.values()} <= set(points)
    assert set(predicted.POINTS) - set(points) == {
        f"forward+backward, batch {batch}" for batch in (2, 4, 12, 17, 24)
    }


def test_waves(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "waves.json"
    monkeypatch.setattr(waves, "REPEATS", 2)
    for only, count in (("rounds 2", 1), ("backward, batch 16", 1), ("256 tokens", 2), ("tokens 64", 1)):
        assert waves.main(["--device", "cpu", "--only", only, "--out", str(path)]) == 0
        report = json.loads(path.read_text())
        assert len(report["points"]) == count
        for point in report["points"]:
            assert 0 < point["relative_error"] < 4e-2
            assert point["ms"]["median"] > 0
        assert report["driver"] == {"left_out": "there is no GPU to ask"}


def test_a_red_point_has_no_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = waves.checked

    def red(case: Any) -> Any:
        if case.layout == "channels_last":
            raise gate.GateError("relative error inf")
        return whole(case)

    monkeypatch.setattr(waves, "checked", red)
    monkeypatch.setattr(waves, "REPEATS", 2)
    path = tmp_path / "waves.json"
    assert waves.main(["--device", "cpu", "--only", ", batch 16", "--out", str(path)]) == 1
    report = json.loads(path.read_text())
    (wrong,) = [point for point in report["points"] if "problem" in point]
    assert (wrong["key"], wrong["problem"]) == ("channels_last, batch 16", "GateError: relative error inf")
    assert "ms" not in wrong
    assert "1 without a time" in capsys.readouterr().out
    assert "- channels_last, batch 16: GateError" in page.section(stage_report(report))


def stage_report(found: dict[str, Any]) -> dict[str, Any]:
    return {"when": "now", "revision": "abc", "gpu": found["gpu"], "tool": "", "waves": found}


def test_waves_beside_what_was_predicted() -> None:
    def point(batch: int, ms: float) -> dict[str, Any]:
        times = {"median": ms, "p10": ms, "p90": ms}
        key = f"forward, batch {batch}"
        found = {"key": key, "group": "batch", "value": batch, "base": "forward, batch 1", "ms": times}
        return found | {"relative_error": 1e-3, "timing": "graph"}

    clusters = [{"blocks": 8, "shared_bytes": 154624, "clusters_at_once": 16}]
    found = {"gpu": "A GPU", "points": [point(16, 0.4), point(1, 0.2)], "driver": {"clusters": clusters}}
    lines = page.section(stage_report(found)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| forward, batch 1 |"))
    assert lines[first + 1] == (
        "| forward, batch 16 | 400.0 | 400.0 to 400.0 | 2.00x | forward, batch 1 | "
        "2x of batch 1 (380 us measured before) | 1.0e-03 |"
    )
    assert "| 8 | 154624 | 16 | 14 or 15 |" in lines
    assert page.section({}) == ""


class StandIn:
    """The driver's types, and functions that only note what they are asked."""

    def __init__(self, types: Any, answer: Any) -> None:
        self.types, self.answer, self.configs = types, answer, list[Any]()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(self.types, name)

        def call(*given: Any) -> tuple[Any, ...]:
            if name == "cuOccupancyMaxActiveClusters":
                self.configs.append(given[1])
            return self.answer, 15

        return call


def test_clusters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    types = pytest.importorskip("cuda.bindings.driver")
    stand_in = StandIn(types, types.CUresult.CUDA_SUCCESS)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", stand_in)
    found = occupancy.clusters()
    assert found[0] == {"blocks": 8, "shared_bytes": 154624, "clusters_at_once": 15}
    assert len(found) == len(occupancy.ASKED)
    config = stand_in.configs[1]
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (256, 256, 154624)
    assert (config.numAttrs, config.attrs[0].value.clusterDim.x) == (1, 4)
    stand_in.answer = types.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        occupancy.clusters()
