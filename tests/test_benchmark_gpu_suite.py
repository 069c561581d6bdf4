"""The stage that runs the kernels' tests on a GPU: on a made-up folder of tests, without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import textwrap
import types
from typing import Any

import pytest

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
suite, plugin, suite_page = (
    importlib.import_module(f"{PACKAGE}.gpu.proof.{name}") for name in ("suite", "suite_plugin", "suite_page")
)
CUDA = "cuda (emulated)"
OLD = {"revision": "d7ddab5", "what": "racecheck", "hazards": 0}

TESTS = """
import os, sys, types
import pytest

OP = "pdc2d"
broken = False

def lose_the_gpu():
    global broken
    broken = True

@pytest.mark.parametrize("backend", ["cpu", "cuda (emulated)", "triton"])
def test_passes(backend):
    assert backend != "cpu" and not broken

@pytest.mark.parametrize("backend", ["cuda (emulated)"])
@pytest.mark.parametrize("kind", ["error", "fault", "crash", "right", "wrong", "left out"])
def test_kinds(backend, kind):
    assert not broken
    if kind == "error":
        lose_the_gpu()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if kind == "fault":
        lose_the_gpu()
        def synchronize():
            raise RuntimeError("unspecified launch failure")
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    if kind == "crash":
        os._exit(9)
    if kind == "wrong":
        assert "CUDA error" == "right"
    if kind == "left out":
        pytest.skip("there is one GPU")

@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("number", range(3))
def test_numbers(backend, number):
    assert not broken

def test_without_a_backend():
    raise AssertionError("uses no GPU")
"""


@pytest.fixture(autouse=True)
def outside_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def made_up(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_made_up.py").write_text(TESTS)
    (folder / "test_icm_cuda.py").write_text("def test_file():\n    pass\n")
    (folder / "test_broken.py").write_text("import no_such_module\n")
    (folder / "test_cuda_build.py").write_text("import another_module\n")
    return folder


def run(folder: pathlib.Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = folder.parent / "suite.json"
    words = ["--out", str(out), "--tests", str(folder), "--device", "cpu", "--limit", "120", *arguments]
    return suite.main(words), json.loads(out.read_text())


def starts(folder: pathlib.Path) -> list[str]:
    """Names of the cases of the only process, in the order in which they began."""
    (path,) = (folder.parent / "logs" / "suite").glob("*.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return [line["start"].partition("::")[2] for line in lines if "start" in line]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_outcome_is_kept(
    made_up: pathlib.Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind a CUDA error and behind a crash there is another process: no case finds the GPU lost."""
    (made_up.parent / "suite.json").write_text(json.dumps({"gpu": "old", "runs": [OLD]}))
    status, report = run(made_up, "--workers", workers, "--triton-share", "1/2")
    assert status == 1
    assert report["gpu"] == "cpu" and report["runs"][0] == OLD
    (found,) = report["runs"][1:]
    assert found["counts"] == {
        CUDA: {
            "pdc2d": {"passed": 2, "failed": 4, "skipped": 1, "not_reached": 0},
            "icm": {"passed": 1, "failed": 0, "skipped": 0, "not_reached": 0},
        },
        "triton": {"pdc2d": {"passed": 2, "failed": 0, "skipped": 0, "not_reached": 0}},
        "collection": {"": {"passed": 0, "failed": 1, "skipped": 0, "not_reached": 0}},
    }
    messages = {case.partition("::")[2]: message for case, message in found["failures"].items()}
    assert "No module named 'no_such_module'" in messages.pop("")
    for kind, text in {
        "error": "CUDA error: an illegal memory access was encountered (test_made_up.py:",
        "fault": "RuntimeError: unspecified launch failure",
        "crash": "its process ended",
        "wrong": "assert 'CUDA error' == 'right'",
    }.items():
        assert text in messages.pop(f"test_kinds[{kind}-{CUDA}]")
    assert not messages
    assert found["running"] == [] and len(found["slowest"]) == 11
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{CUDA}: 3 passed, 4 failed, 1 skipped, 0 not reached; triton (1/2): 2 passed, 0 failed" in last


def test_the_last_failures_come_first(tmp_path: pathlib.Path) -> None:
    """Then CUDA, then Triton's share; a failure outside of the share as well."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("")
    names = [f"test_{letter}_{backend}" for backend in ("triton", "cuda") for letter in "abc"]
    (folder / "test_made_up.py").write_text("".join(f"def {name}():\n    pass\n" for name in names))
    failures = [f"tests/test_made_up.py::{name}" for name in ("test_c_triton", "test_b_cuda")]
    last = {"revision": "abc", "counts": {"cuda": {"pdc": {"passed": 1}}}}
    runs = [OLD, last | {"failures": dict.fromkeys(failures, "wrong")}, {"counts": {}, "failures": {}}]
    (tmp_path / "suite.json").write_text(json.dumps({"runs": runs}))
    status, report = run(folder, "--only", "made_up", "--workers", "0", "--triton-share", "1/3")
    order = ["test_c_triton", "test_b_cuda", "test_a_cuda", "test_c_cuda", "test_a_triton"]
    assert status == 0 and starts(folder) == order
    assert report["runs"][:3] == runs


def test_nothing_begins_past_the_deadline(tmp_path: pathlib.Path) -> None:
    """The rest counts neither as run nor as skipped."""
    folder = tmp_path / "tests"
    folder.mkdir()
    text = """
    import time
    def test_a_cuda():
        time.time = lambda: 1e12
    def test_b_cuda():
        raise AssertionError("too late")
    """
    (folder / "test_late.py").write_text(textwrap.dedent(text))
    outcomes = suite.Outcomes(tmp_path / "outcomes")
    plan = {"deadline": 1e11, "cuda": CUDA, "share": (1, 1), "only": "", "first": [], "done": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"outcomes": str(outcomes.folder)}))
    options = suite.arguments(["--out", "x", "--tests", str(folder), "--device", "cpu", "--workers", "0"])
    command = suite.command(options, tmp_path / "plan.json", outcomes.folder)
    assert suite.run_logged(command, tmp_path / "log", 60) == ""
    assert outcomes.read() and not outcomes.running
    counts = outcomes.counts()
    assert counts == {CUDA: {"late": {"passed": 1, "failed": 0, "skipped": 0, "not_reached": 1}}}
    assert suite_page.summary({"counts": counts}) == f"{CUDA}: 1 passed, 0 failed, 0 skipped, 1 not reached"


def test_a_case_under_way_at_the_end_is_not_reached(tmp_path: pathlib.Path) -> None:
    """Unless its process ended by itself; what that one said goes before what others say of it."""
    outcomes = suite.Outcomes(tmp_path)
    cases = dict.fromkeys("abc", ("cuda", "icm"))
    (tmp_path / plugin.COLLECTED).write_text(json.dumps(cases))
    (tmp_path / "gw0-1.jsonl").write_text('{"start": "a"}\n{"start": "b"}\n{"sta')
    assert outcomes.read() and not outcomes.read()
    assert outcomes.report()["running"] == ["a", "b"]
    assert outcomes.counts()["cuda"]["icm"]["not_reached"] == 3
    (tmp_path / "main-2.jsonl").write_text('{"lost": "a"}\n{"lost": "b"}\n')
    outcomes.read()
    said = {"id": "b", "backend": "cuda", "op": "icm", "outcome": "failed", "seconds": 1.0, "message": "why"}
    (tmp_path / "gw1-3.jsonl").write_text(json.dumps(said) + "\n")
    outcomes.read()
    assert outcomes.counts()["cuda"]["icm"] == {"passed": 0, "failed": 2, "skipped": 0, "not_reached": 1}
    failures = outcomes.report()["failures"]
    assert "its process ended" in failures["a"] and failures["b"] == "why"


def test_shares_cover_every_case_of_triton_once() -> None:
    backends = {f"t{i}": "triton" if i % 3 else "cuda" for i in range(20)}
    plan = {"first": [], "done": [], "only": ""}
    chosen = [plugin.chosen(backends, plan | {"share": [part, 4]}) for part in (1, 2, 3, 4)]
    cuda = [case for case in backends if backends[case] == "cuda"]
    assert all(order[: len(cuda)] == cuda for order in chosen)
    triton = [case for order in chosen for case in order[len(cuda) :]]
    assert sorted(triton) == sorted(set(backends) - set(cuda))
    again = plugin.chosen(backends, plan | {"share": [1, 4], "done": cuda, "first": ["t2", "gone"]})
    assert again == ["t2", *(case for case in chosen[0][len(cuda) :] if case != "t2")]


@pytest.mark.parametrize(
    ("place", "parameters", "backend"),
    [
        ("test_pdc.py test_views", {"backend": "triton", "dtype": "float32"}, "triton"),
        ("test_pdc.py test_views", {"backend": "cpu"}, ""),
        ("test_icm_cuda.py test_views", {}, "cuda"),
        ("test_icm_triton_backward.py test_views", {"dtype": "float32"}, "triton"),
        ("test_pdc_block.py test_dense_triton_kernel", {"theta": 1.0}, "triton"),
        ("test_icm_saved.py test_icm", {"forward": "cpu", "backward": "cuda"}, "cuda"),
        ("test_icm_saved.py test_icm", {"forward": "cuda", "backward": "triton"}, "triton"),
        ("test_convert.py test_reasons", {"reason": "torch.cuda.FloatTensor"}, ""),
    ],
)
def test_which_cases_use_a_gpu(place: str, parameters: dict[str, Any], backend: str) -> None:
    file, name = place.split()
    item = types.SimpleNamespace(
        path=pathlib.Path(file), originalname=name, callspec=types.SimpleNamespace(params=parameters)
    )
    assert plugin.backend_and_op(item, "cuda")[0] == backend


def test_which_errors_lose_the_gpu() -> None:
    """Those that led to the one that is raised count; running out of memory or of registers does not."""

    def spoils(error: BaseException) -> bool:
        return any(map(plugin.CUDA_ERROR.search, plugin.messages(error)))

    inner = RuntimeError("Triton Error [CUDA]: misaligned address")
    outer = ValueError("what was expected did not come")
    assert not spoils(outer)
    outer.__cause__ = inner
    assert spoils(outer) and spoils(RuntimeError("CUDA error: device-side assert triggered"))
    assert not spoils(RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB."))


def test_page() -> None:
    counts = {"cuda": {"icm": {"passed": 7, "failed": 1, "not_reached": 2}}, "triton": {"icm": {"passed": 3}}}
    last = {"revision": "abcdef0123456", "when": "today", "counts": counts, "triton_share": "2/5"}
    failures = {"tests/a.py::test_b[cuda]": "AssertionError:\n wrong"}
    page = suite_page.section({"runs": [OLD, last | {"failures": failures}, {"revision": "f", "counts": {}}]})
    assert page.startswith("## Suite\n\ntoday, revision abcdef012345, of Triton's cases the share 2/5.\n")
    assert "| cuda | icm | 7 | 1 | 0 | 2 |" in page
    assert "- `tests/a.py::test_b[cuda]`: AssertionError: wrong" in page
    assert "- revision d7ddab5, racecheck: 0 hazards\n- revision f: nothing ran" in page
    assert suite_page.section({}) == ""


def test_usage_errors(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path / "suite.json"), "--triton-share", "3/2"])
    assert "must be K/N with 1 <= K <= N, got '3/2'" in capsys.readouterr().err
    (tmp_path / "tests").mkdir()
    status, report = run(tmp_path / "tests", "--workers", "0")
    assert status == 1 and report["runs"][0]["counts"] == {}
    assert capsys.readouterr().out.startswith("nothing ran: exit status 5")
