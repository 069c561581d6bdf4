"""Whether our training agrees with the reference's: its loss curve, and its first gradients. Imports no torch.

Training is chaotic: the least difference grows, so that two correct runs part. How far is what a reference run shows
that begins from weights moved by the rounding error of bf16. All runs see the same batches, so their losses are
compared step by step: what makes a batch hard or easy cancels, and each batch looks at the difference of two nets in
another direction, which says more than smoothed curves, whose few independent values differ by chance. The distance of
two runs in a window is the root mean square of these differences. It grows with the steps, hence windows, each divided
by the perturbed run's distance in it, and their geometric mean: no phase of the training outweighs the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FACTOR = 2.0
WINDOW = 10  # steps
LEAST_STEPS = 40
BEYOND = 1e30
TINY = 1e-300  # instead of a division by 0
NOTHING = 1e-9  # of the whole gradient's norm: exact arithmetic gives 0 here (attention over a single key)


def curves_agree(losses: Mapping[str, Sequence[float]], cycle: int) -> dict[str, Any]:
    """Whether `ours` keeps within twice the distance that `perturbed` has from `reference`, and all of them fall; None
    before there are LEAST_STEPS. Batches come again after `cycle` steps, so that the first and the last `cycle` losses
    are of the same images, seen for the first time and again."""
    steps = len(losses["reference"])
    found: dict[str, Any] = {"steps": steps, "least_steps": LEAST_STEPS, "limit": FACTOR}
    if steps < LEAST_STEPS:
        return found | {"agrees": None}
    ours, perturbed = (_distances(losses[run], losses["reference"]) for run in ("ours", "perturbed"))
    factor = _geometric_mean([_factor(mine, other) for mine, other in zip(ours, perturbed, strict=True)])
    means = {
        run: [statistics.fmean(part) for part in (of[:cycle], of[-cycle:])] for run, of in losses.items()
    }
    falls = all(last < first for first, last in means.values())
    return found | {
        "distances": {"ours": ours, "perturbed": perturbed},
        "factor": factor,
        "first_and_last": means,
        "falls": falls,
        "agrees": factor <= FACTOR and falls,
    }


def _distances(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Of each whole window."""
    squares = [(a - b) ** 2 for a, b in zip(first, second, strict=True)]
    starts = range(0, len(squares) - WINDOW + 1, WINDOW)
    return [math.sqrt(statistics.fmean(squares[start : start + WINDOW])) for start in starts]


def _finite(error: float) -> float:
    """NaN and infinity as a number that a file can hold and no limit lets through."""
    return error if math.isfinite(error) else BEYOND


def _factor(mine: float, other: float) -> float:
    return max(mine, TINY) / max(other, TINY)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def gradients_agree(
    names: Sequence[str], exact: Sequence[float], errors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Whether our error of no parameter's gradient is over twice that of its peers, the larger of `reference` and
    `perturbed`: either is one draw of how bf16 happens to round, an arg-max in a near tie included.

    `exact` are the norms of the gradients, `errors` those of the differences from them, one for each of `names`.
    """
    least = NOTHING * math.hypot(*exact)
    relative = {
        name: {run: _finite(norms[index] / exact[index]) for run, norms in errors.items()}
        for index, name in enumerate(names)
        if exact[index] > least
    }
    peers = {
        name: max(error for run, error in found.items() if run != "ours") for name, found in relative.items()
    }
    factors = {name: _factor(found["ours"], peers[name]) for name, found in relative.items()}
    over = [name for name, factor in factors.items() if factor > FACTOR]
    return {
        "limit": FACTOR,
        "parameters": len(names),
        "compared": len(relative),
        "median_error": {run: statistics.median(found[run] for found in relative.values()) for run in errors},
        "worst": sorted(factors.items(), key=lambda item: -item[1])[:5],
        "over": over,
        "agrees": bool(relative) and not over,
    }
