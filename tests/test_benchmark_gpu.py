"""The benchmark's rivals, floors and calibration, and what needs a GPU with a stand-in for one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
from typing import Any

import pytest
import torch

import frd_kernels as fk

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
MODULES = (
    "calibrate",
    "clock",
    "cuda",
    "floors",
    "gate",
    "gpu.page",
    "measure",
    "providers",
    "registry",
)
calibrate, clock, cuda, floors, gate, gpu_page, measure, providers, registry = (
    importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES
)
cases = importlib.import_module(f"{PACKAGE}.cases")
timing = importlib.import_module(f"{PACKAGE}.timing")


def small(name: str, **changes: Any) -> Any:
    """The GPU's case of that name, on a little data and the CPU."""
    (case,) = [case for case in registry.cases("cuda") if case.name == name]
    given = {"shape": (1, 16, 8, 8), "device": "cpu", "compiled": (), "dtype": torch.float32} | changes
    return dataclasses.replace(case, **given)


@pytest.fixture
def case() -> Any:
    return small("pdc angular depthwise [8x256x64x64] bfloat16 channels_last forward")


def test_the_compiled_rival_is_checked_and_timed(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and not handed to a compiler, which takes long."""
    whole = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, mode, **options: whole(call, backend="eager", **options)
    )
    (record,) = measure.measure(dataclasses.replace(case, compiled=("default",)), repeats=2)
    assert record["relative_errors"]["compiled, default"] < 1e-6
    assert record["rivals"]["compiled, default"]["turns"] == 2


def test_a_compiler_that_fails_is_left_out(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    (record,) = measure.measure(dataclasses.replace(case, compiled=("default",)), repeats=2)
    assert record["left_out"] == {"compiled, default": "RuntimeError: no compiler"}


def test_the_search_comes_in_two_forms_on_a_gpu(case: Any) -> None:
    built = case.build(case)
    on_gpu = dataclasses.replace(case, device="cuda", compiled=("max-autotune",))
    providers.add_compiled(on_gpu, built, torch.neg, (torch.ones(1),), None)
    assert built.timings == {
        "compiled, max-autotune": ("wall",),
        "compiled, max-autotune-no-cudagraphs": ("graph", "graph, cold L2"),
    }


def test_a_side_keeps_to_its_timings_and_settings(case: Any) -> None:
    built = case.build(case)
    seen = []
    built.contexts["eager"] = providers.cudnn_benchmark
    built.rivals["eager"] = lambda: (seen.append(torch.backends.cudnn.benchmark), torch.ones(1))[1:]
    built.timings["folded"] = ("graph",)
    samples = measure._samples(built, timing.Wall(case, built), {})
    samples["eager"]()
    assert (seen, torch.backends.cudnn.benchmark) == ([True], False)
    assert "folded" not in samples


def provider(name: str, *ops: str) -> Any:
    return fk.backend.PROVIDERS[name]._replace(device="cpu", problem="", ops=frozenset(ops))


def test_own_backends_of_a_gpu(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image, on_gpu = torch.ones(1, 1, 4, 4), dataclasses.replace(case, device="cuda")
    monkeypatch.setitem(fk.backend.PROVIDERS, "cuda", provider("cuda", "pdc2d"))
    monkeypatch.setitem(fk.backend.PROVIDERS, "triton", provider("triton", "pdc2d", "icm"))

    def backends(op: str, chosen: str) -> tuple[list[str], dict[str, str]]:
        namespace = getattr(torch.ops, chosen) if chosen else None
        monkeypatch.setattr(fk.backend, "select", lambda op, tensor: namespace)
        names, contexts, left_out = providers.own_backends(on_gpu, (op,), image)
        assert set(contexts) == set(names) - {"auto"}
        return names, left_out

    names, left_out = backends("pdc2d", "")
    assert names == ["cuda", "triton"]
    assert "nothing of this is proven" in left_out["auto"]
    assert backends("pdc2d", "frd_triton") == (["triton", "cuda"], {"auto": "the same as triton"})
    names, left_out = backends("icm", "frd_triton")
    assert names == ["triton"]
    assert "has no kernel for it" in left_out["cuda"]


@pytest.mark.parametrize(
    ("name", "images", "flops"),
    [
        ("pdc angular depthwise [8x256x64x64] bfloat16 channels_last forward", 2, 0),
        ("pdc angular depthwise [8x256x64x64] bfloat16 channels_last forward+backward", 5, 0),
        ("pdc_block angular dense [8x256x64x64] bfloat16 channels_last forward", 2, 9 * 2 * 64 * 16 * 16),
        ("dpm [8x256x64x64] bfloat16 channels_last forward", 4, 2 * 2 * 64 * 16 * 16),
        ("dpm [8x256x64x64] bfloat16 channels_last forward+backward", 10, 6 * 2 * 64 * 16 * 16),
        ("icm paper [8x256x64x64] bfloat16 nchw forward", 2, 2 * 64 * 16 * 16 + 4 * 64 * 16 * 64),
        ("cluster [8x64x64x64] bfloat16 nchw forward", 3, 0),
    ],
)
def test_floors(name: str, images: int, flops: int) -> None:
    case = small(name)
    rates = calibrate.Rates(copy_bytes_per_s=4e9, matrix_flops_per_s={"float32": 1e9})
    found = floors.numbers(case, rates, ours_ms=0.5)
    milliseconds = images * 16 * 64 * 4 / 4e6
    memory = {
        "ms": milliseconds,
        "of_ours": milliseconds / 0.5,
        "ratio": milliseconds / 0.5,
        "kind": "memory",
    }
    assert found.pop("memory floor") == pytest.approx(memory)
    assert floors.least_flops(case) == flops
    assert [entry["ms"] for entry in found.values()] == ([flops / 1e6] if flops else [])


def test_calibration() -> None:
    found = calibrate.calibrate("cpu", scale=1 / 256, repeats=3)
    assert json.loads(json.dumps(found)) == found
    assert found["copy"]["bytes"] == 2 * (1 << 20)
    rates = calibrate.rates(found)
    assert rates.copy_bytes_per_s > 0
    assert rates.matrix_flops_per_s["float32"] == 1e3 * 2 * 16**3 / found["matrix"]["float32"]["ms"]["median"]
    assert found["before"]["versions"]["torch"] == torch.__version__.partition("+")[0]


class StandIn:
    """A GPU whose clock moves by what is launched; a graph replays what was launched while it was captured."""

    def __init__(self) -> None:
        self.now = 0.0  # milliseconds
        self.captured: list[float] | None = None
        gpu = self

        class Graph:
            def capture_begin(self, pool: Any = None) -> None:
                gpu.captured = []

            def capture_end(self) -> None:
                assert gpu.captured is not None
                self.launched, gpu.captured = gpu.captured, None

            def replay(self) -> None:
                gpu.now += sum(self.launched)

            def reset(self) -> None:
                self.launched = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                assert gpu.captured is None

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        self.graph, self.event = Graph, Event

    def launch(self, milliseconds: float) -> None:
        if self.captured is None:
            self.now += milliseconds
        else:
            self.captured.append(milliseconds)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    gpu = StandIn()
    fakes = {
        "CUDAGraph": gpu.graph,
        "Event": gpu.event,
        "Stream": Stream,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 4096}),
        "graph_pool_handle": lambda: (0, 1),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: gpu.launch(cycles / 1e6),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda.ColdGraph, "flush", lambda self: gpu.launch(0.5))
    cuda.side_stream.cache_clear()
    yield gpu
    cuda.side_stream.cache_clear()


def costs(gpu: Any, milliseconds: float, value: float = 1.0) -> Any:
    def call() -> tuple[torch.Tensor, ...]:
        gpu.launch(milliseconds)
        return (torch.full((3,), value),)

    return call


def test_times_of_a_gpu(case: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = cases.Providers(
        {"cuda": costs(stand_in, 2.0)}, {"eager": costs(stand_in, 6.0)}, costs(stand_in, 0.0)
    )
    sides.rivals["wrong"] = costs(stand_in, 1.0, value=float("nan"))
    monkeypatch.setattr(measure, "timings_of", lambda device: cuda.TIMINGS)
    records = measure.measure(dataclasses.replace(case, build=lambda _case: sides), repeats=6)
    assert [record["timing"] for record in records] == ["wall", "graph", "graph, cold L2"]
    for record in records[1:]:
        assert record["ours_ms"]["median"] == pytest.approx(2)
        assert record["rival_ms"]["p90"] == pytest.approx(6)
        assert (record["ratio"], record["aa_spread"]) == (pytest.approx(3), pytest.approx(0))
        assert record["graph_calls"] == 20
    assert records[2]["flush_ms"] == pytest.approx(0.5)
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_a_call_that_no_graph_can_hold(case: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits() -> tuple[torch.Tensor, ...]:
        if stand_in.captured is not None:
            raise RuntimeError("waits for the GPU")
        return (torch.ones(3),)

    changing = iter(range(1, 1000))
    rivals = {
        "eager": costs(stand_in, 6.0),
        "waits": waits,
        "changing": lambda: (torch.full((3,), 1.0 * next(changing)),),
    }
    sides = cases.Providers({"cuda": costs(stand_in, 2.0)}, rivals, costs(stand_in, 0.0))
    monkeypatch.setattr(measure, "timings_of", lambda device: cuda.TIMINGS)
    wall, graph, _cold = measure.measure(dataclasses.replace(case, build=lambda _case: sides), repeats=2)
    assert set(wall["rivals"]) == {"eager", "waits", "changing"}
    assert set(graph["rivals"]) == {"eager"}
    assert graph["left_out"]["waits"] == "no CUDA graph: RuntimeError: waits for the GPU"
    assert "gives another result" in graph["left_out"]["changing"]


def test_the_gpus_state_without_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.shutil, "which", lambda name: None)
    assert clock._nvidia_smi("1") == {}
    answer = "1980, 2619, 1980, 35, 80.5, 700, 3, 570.1\n"
    finished = clock.subprocess.CompletedProcess([], 0, answer, "")
    monkeypatch.setattr(clock.shutil, "which", lambda name: name)
    monkeypatch.setattr(clock.subprocess, "run", lambda *_, **__: finished)
    found = clock._nvidia_smi("1")
    assert (found["sm_clock_mhz"], found["power_w"], found["driver"]) == (1980, 80.5, 570.1)


def test_page_shows_the_nets(case: Any) -> None:
    (record,) = measure.measure(case, repeats=2)
    net = record | {
        "variant": "lite",
        "batch": 8,
        "size": 512,
        "execution": "eager",
        "images_per_s": {"ours": 100.0},
        "peak_bytes": {"ours": 1 << 20, "rival": 3 << 20},
    }
    report = {"when": "now", "revision": "abc", "stages": {}, "state_before": {}, "state_after": {}}
    report |= {"machine": {}, "cases": [], "problems": {}}
    page = gpu_page.page("A GPU", report, {"model": {"records": [net], "left_out": {"paper": "no time"}}})
    assert "| lite, batch 8, 512, eager | float32 | forward | wall |" in page
    assert "| 100.0 | 1 / 3 |" in page
    assert "- paper: no time" in page


def test_why_a_capture_failed() -> None:
    """Ending it fails as well, and hides the reason."""

    class Graph:
        def capture_begin(self, pool: Any = None) -> None:
            pass

        def capture_end(self) -> None:
            raise RuntimeError("the capture is not valid")

    with pytest.raises(RuntimeError, match="not valid") as failure, cuda.capturing(Graph()):
        raise ValueError("waits for the GPU")
    assert str(failure.value.__context__) == "waits for the GPU"
    assert gc.isenabled()
