"""The stages that look for what a GPU may get wrong: they find it in stand-ins for one, and run on the CPU."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import frd_kernels as fk

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
checks, checks_report, proof_page, small_calls, small_data, cuda = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in (
        "gpu.proof.checks",
        "gpu.proof.checks_report",
        "gpu.proof.page",
        "gpu.proof.small_calls",
        "gpu.proof.small_data",
        "cuda",
    )
)
Tensor = torch.Tensor


def built(call: Callable[[], list[Tensor]], x: Tensor | None = None) -> Any:
    inputs = [] if x is None else [x]
    return small_data.Built(inputs, call, call, lambda seed: [torch.full_like(t, 7.0) for t in inputs])


def floats(source: Any) -> list[Tensor]:
    return [source.normal(4)]


def call_of(function: Callable[..., Any], backward: bool = False) -> Any:
    """A small call of `function` over four numbers."""
    return small_data.SmallCall("stand-in", "4", ("pdc2d",), floats, function, backward)


class Gpu:
    """A stand-in for a GPU with a default stream that can be busy: what is launched there meanwhile runs late."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], object]] | None = None
        self.late: list[Callable[[], object]] = []
        self.busy = False
        self.kept = 0

    def launch(self, kernel: Callable[[], object], default_stream: bool = False) -> None:
        if self.captured is not None:
            self.captured.append(kernel)
        elif default_stream and self.busy:
            self.late.append(kernel)
        else:
            kernel()

    def synchronize(self) -> None:
        for kernel in self.late:
            kernel()
        self.late, self.busy = [], False

    def sleep(self, cycles: int) -> None:
        self.busy = True

    def doubles(self, x: Tensor, **options: Any) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            out = torch.zeros_like(x)
            self.launch(lambda: out.copy_(2 * x), **options)
            return [out]

        return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()

    class Graph:
        def capture_begin(self, pool: Any = None) -> None:
            gpu.captured = []

        def capture_end(self) -> None:
            self.kernels, gpu.captured = gpu.captured or [], None

        def replay(self) -> None:
            for kernel in self.kernels:
                kernel()

        def reset(self) -> None:
            self.kernels = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return not gpu.busy

    fakes = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": gpu.synchronize,
        "_sleep": gpu.sleep,
        "mem_get_info": lambda: (1000 - gpu.kept, 1000),
        "memory_allocated": lambda: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda.side_stream.cache_clear()
    yield gpu
    cuda.side_stream.cache_clear()


def test_equal_bits() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(2)
    assert checks.same_bits([nan, zero], [nan.clone(), zero.clone()]) == "ok"
    assert checks.same_bits([zero], [-zero]) == "result 0 of 1 has other bits in 2 of 2 elements"
    assert "result 0 is [2] torch.float32, not [2] torch.float64" in checks.same_bits([zero], [zero.double()])


def test_a_call_that_is_not_deterministic_is_found() -> None:
    values = iter([1.0] * checks.REPEATS + [2.0])
    assert "other bits" in checks.repeats(built(lambda: [torch.full((3,), next(values))]))
    assert checks.repeats(built(lambda: [torch.ones(3)])) == "ok"


def squares(module: Any, x: Tensor) -> Tensor:
    return x * x


def off(module: Any, x: Tensor) -> Tensor:
    return x * x * (1.0 if module is fk.reference else 1.001)


def not_written(module: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[1:] = x[1:]
    return x.clone() if module is fk.reference else out


def raises(module: Any, x: Tensor) -> Tensor:
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("backward", [False, True])
def test_results_are_compared_with_float64(backward: bool) -> None:
    def outcomes(function: Callable[..., Any]) -> dict[str, str]:
        found = checks.examine(("cpu", call_of(function, backward), torch.float32), "cpu")
        return dict(found["checks"])

    assert outcomes(squares) == {"accuracy": "ok", "repeats": "ok"}
    assert outcomes(off)["accuracy"].endswith("e-03, at most 1e-05 is allowed")
    assert outcomes(raises) == {"call": "RuntimeError: no kernel"}
    if not backward:
        assert outcomes(not_written)["accuracy"] == "relative error inf, at most 1e-05 is allowed"


def test_graphs_of_a_right_call(gpu: Gpu) -> None:
    x = torch.arange(3.0)
    call = built(gpu.doubles(x), x)
    assert checks.in_a_graph(call) == {"graph": "ok", "new data": "ok", "memory": "ok"}
    assert x.tolist() == [7.0] * 3
    assert checks.another_stream(call) == "ok"


def test_all_checks_of_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0)
    call = built(gpu.doubles(x), x)
    monkeypatch.setattr(small_data.SmallCall, "build", lambda self, device, dtype: call)
    found = checks.examine(("cpu", call_of(squares), torch.float32), "cuda")
    assert found["checks"] == dict.fromkeys(proof_page.CHECKS, "ok")
    assert found["relative_error"] == 0.0


def test_graphs_of_wrong_calls(gpu: Gpu) -> None:
    x, state = torch.arange(3.0), torch.zeros(3)

    def reads_on_the_host() -> list[Tensor]:
        out, values = torch.zeros(3), x.tolist()
        gpu.launch(lambda: out.copy_(torch.tensor(values)))
        return [out]

    def counts() -> list[Tensor]:
        out = torch.zeros(3)
        gpu.launch(lambda: out.copy_(state.add_(1)))
        return [out]

    def allocates() -> list[Tensor]:
        out = torch.ones(3)
        gpu.launch(lambda: setattr(gpu, "kept", gpu.kept + 8))
        return [out]

    def waits() -> list[Tensor]:
        if gpu.captured is not None:
            raise RuntimeError("waits for the GPU")
        return [torch.ones(3)]

    found = checks.in_a_graph(built(reads_on_the_host, x))
    assert found["graph"] == "ok" and "other bits in 3 of 3" in found["new data"]
    assert "other bits" in checks.in_a_graph(built(counts))["graph"]
    assert checks.in_a_graph(built(allocates))["memory"] == "20 replays keep 160 bytes"
    assert checks.in_a_graph(built(waits)) == {"graph": "cannot be captured: RuntimeError: waits for the GPU"}
    # A replay that writes nothing.
    assert "other bits" in checks.in_a_graph(built(lambda: [torch.zeros(3)]))["graph"]


def test_streams_of_wrong_calls(gpu: Gpu) -> None:
    x = torch.arange(1.0, 4.0)
    assert "other bits" in checks.another_stream(built(gpu.doubles(x, default_stream=True)))

    def waits() -> list[Tensor]:
        gpu.synchronize()
        return [torch.ones(3)]

    assert checks.another_stream(built(waits)) == "the call has waited for the default stream"


def options_of(path: pathlib.Path, **changes: Any) -> argparse.Namespace:
    given = {"out": path, "device": "cpu", "only": "", "limit": 100.0, "go_on": False} | changes
    return argparse.Namespace(**given)


def run_checks(path: pathlib.Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = checks.main(["--out", str(path), "--device", "cpu", *arguments])
    return status, json.loads(path.read_text())


def test_checks_run_on_the_cpu(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "REPEATS", 1)
    status, report = run_checks(tmp_path / "checks.json", "--only", "dispatch [")
    assert status == 0
    assert report["not_reached"] == []
    assert "they need a GPU" in report["left_out"].values()
    on_cpu = [call for call in report["calls"] if call["backend"] == "cpu"]
    assert {call["dtype"] for call in on_cpu} == {"bfloat16", "float32", "float16"}
    assert all(call["checks"] == {"accuracy": "ok", "repeats": "ok"} for call in report["calls"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 wrong, 0 not reached")
    section = proof_page.checks_section(report)
    assert section.startswith("## ")
    assert f"| cpu | cluster_dispatch | {len(on_cpu)} of {len(on_cpu)} |" in section
    assert "Nothing was wrong" in section


def test_what_is_wrong_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "all_calls", lambda only: [call_of(off)])
    monkeypatch.setitem(
        fk.backend.PROVIDERS, "triton", fk.backend.PROVIDERS["triton"]._replace(problem="none")
    )
    status, report = run_checks(tmp_path / "checks.json")
    assert status == 1
    assert report["left_out"]["triton"] == "none"
    assert "1 wrong (cpu stand-in [4] forward), 0 not reached" in capsys.readouterr().out.splitlines()[-1]
    assert "- cpu, float32, stand-in [4] forward: accuracy: relative error" in proof_page.checks_section(
        report
    )


def test_a_lost_gpu_is_left_to_a_new_process(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str]) -> int:
        started.append(command)
        return 5

    monkeypatch.setattr(checks, "all_calls", lambda only: [call_of(squares)])
    monkeypatch.setattr(checks, "usable", lambda device: False)
    monkeypatch.setattr(checks.subprocess, "call", start)
    status, report = run_checks(tmp_path / "checks.json")
    assert status == 5
    assert started[0][-1] == "--go-on"
    assert report["calls"][0]["checks"]["state"] == "the GPU's state is lost to the process"
    missing = report["not_reached"]
    monkeypatch.undo()
    monkeypatch.setattr(checks, "all_calls", lambda only: [call_of(squares)])
    status, report = run_checks(tmp_path / "checks.json", "--go-on")
    assert status == 1  # what was found before counts
    assert len(report["calls"]) == 1 + len(missing)


@pytest.mark.parametrize(
    ("backend", "status", "outcome"), [("cuda", 1, "no answer in 30 s"), ("triton", 0, "")]
)
def test_a_call_that_does_not_return(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, backend: str, status: int, outcome: str
) -> None:
    keys = [(backend, "float32", name) for name in ("done", "running", "next")]
    report = checks_report.Report(options_of(tmp_path / "checks.json"), keys, {})
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    report.start(keys[0])
    report.take(report.running() | {"op": "", "checks": {"repeats": "ok"}})
    report.start(keys[1])
    report.began -= 30
    report.cut()
    assert ended == [status]
    found = json.loads((tmp_path / "checks.json").read_text())
    assert found["not_reached"][-1] == f"{backend} float32 next"
    assert len(found["calls"]) == 1 + bool(outcome)
    assert not outcome or found["calls"][1]["checks"] == {"call": outcome}
    assert f"Not reached, {3 - len(found['calls'])} calls: " in proof_page.checks_section(found)


def test_every_operation_is_among_the_small_calls() -> None:
    calls = small_calls.all_calls()
    assert {op for call in calls for op in call.ops} == fk.backend.PROVIDERS["cuda"].ops
    assert len({call.name for call in calls}) == len(calls)
    first = small_calls.firsts(calls)
    assert len({call.family for call in first}) == len(first) == len({call.family for call in calls})
    assert not any(call.paper for call in first)


def test_every_call_returns_new_tensors() -> None:
    """`checks` overwrites them before a graph writes them again."""
    with fk.use_backend("cpu"):
        for call in small_calls.firsts(small_calls.all_calls()):
            made = call.build("cpu", torch.float32)
            first, second = list(made.call()), list(made.call())
            kept = {x.untyped_storage().data_ptr() for x in [*made.inputs, *first]}
            assert all(x.untyped_storage().data_ptr() not in kept for x in second), call.name


def test_data_keep_their_layout_on_the_device() -> None:
    source = small_data.Source(torch.Generator().manual_seed(0), torch.float32)
    for layout in ("nchw", "channels_last", small_data.UNALIGNED):
        drawn = source.normal(2, 3, 4, 5, layout=layout)
        found = small_data.placed(drawn, "cpu")
        assert torch.equal(found, drawn)
        assert (found.stride(), found.storage_offset()) == (drawn.stride(), drawn.storage_offset())
    assert drawn.data_ptr() % 16 == 4


@pytest.mark.parametrize("name", ["cluster count, masked", "icm released, tokens [2x35x10]"])
def test_fresh_data_differ_and_have_clear_labels(name: str) -> None:
    (call,) = small_calls.all_calls(name)
    with fk.use_backend("cpu"):
        made = call.build("cpu", torch.float32)
        first, second = made.fresh(1), made.fresh(2)
        assert [x.shape for x in first] == [x.shape for x in made.inputs]
        assert not torch.equal(first[0], second[0])
        for x, fresh in zip(made.inputs, first, strict=True):
            x.copy_(fresh)
        exact = [tensor.double() for tensor in made.exact()]
        assert checks.relative_error(made.call(), exact) < 1e-5


def test_sections_of_nothing() -> None:
    assert proof_page.checks_section({}) == proof_page.sanitize_section({}) == ""
