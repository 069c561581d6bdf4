"""Our CUDA call of a case, behind the gate: what a stage begins with that looks at our side alone."""

from __future__ import annotations

import dataclasses

from ...cases import Case, Providers
from ...gate import gate
from ...timing import CannotTime


def checked(case: Case) -> tuple[Providers, str, float]:
    """The sides of a case, of which one is ours and one a rival, which the gate asks how far it is off; the name of
    ours; its relative error.

    Raises:
        CannotTime: the CUDA backend does not run this case.
        GateError: it computes another result than the oracle.
    """
    sides = case.build(dataclasses.replace(case, compiled=()))
    side = "cuda" if case.device == "cuda" else next(iter(sides.ours))
    if side not in sides.ours:
        raise CannotTime(sides.left_out.get(side, "the CUDA backend does not run it"))
    for other in [*(name for name in sides.ours if name != side), *list(sides.rivals)[1:]]:
        sides.drop(other, "not asked for")
    return sides, side, gate(case, sides)["ours"]
