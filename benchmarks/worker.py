"""One side of `frd bench --against`: a process that builds, checks and times the cases on its own `frd_kernels`.

It answers each line of JSON on its input with one on its output:
{"do": "list", "only", "short"} -> {"cases"}; {"do": "build", "name"} -> {"seconds" of one call};
{"do": "time", "calls"} -> {"seconds": [...]}; anything that goes wrong -> {"error"}.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from .cases import Call
from .gate import gate, one_line
from .harness import keep_memory
from .registry import cases
from .timing import timed, warm_up

PAUSE_S = 0.01  # after its turn, in which the threads of a parallel loop stop spinning


class Worker:
    """Holds our call of the case that is being measured."""

    def __init__(self) -> None:
        self.call: Call | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "list": self.list,
            "build": self.build,
            "time": self.time,
        }
        try:
            return actions[do](**request)
        except Exception as error:  # of another revision: whatever its kernels raise
            return {"error": one_line(error)}
        finally:
            time.sleep(PAUSE_S)

    def list(self, only: str, short: bool) -> dict[str, Any]:
        return {"cases": [case.name for case in cases("cpu", only, short)]}

    def build(self, name: str) -> dict[str, Any]:
        """Gate first; the rivals are not timed, so the compiler's form need not be built for it."""
        self.call = None
        (case,) = (case for case in cases("cpu") if case.name == name)
        case = dataclasses.replace(case, compiled=())
        sides = case.build(case)
        gate(case, sides)
        self.call = next(iter(sides.ours.values()))
        del sides
        gc.collect()
        warm_up(self.call, 5)
        return {"seconds": timed(self.call)}

    def time(self, calls: int) -> dict[str, Any]:
        """The first call finds what the other process has left in the caches, and is not counted."""
        assert self.call is not None
        self.call()
        return {"seconds": [timed(self.call) for _ in range(calls)]}


def serve(source: TextIO, target: TextIO) -> None:
    worker = Worker()
    for line in source:
        print(json.dumps(worker.answer(json.loads(line))), file=target, flush=True)


def main() -> int:
    """`python -m benchmarks.worker THREADS`; returns the exit status."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what else is printed must not get between the answers
        gc.disable()  # between the cases alone
        torch.set_num_threads(int(sys.argv[1]))
        keep_memory()
        serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
