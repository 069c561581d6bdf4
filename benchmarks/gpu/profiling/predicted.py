"""What docs/icm-gpu-analysis.md says the counters and times will be, of the kernel as it was at 4d5ee14 on an H100, and
what they are. Imports neither torch nor frd_kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Launch = dict[str, Any]
FORWARD_US = 193.0  # measured, at batch 1
WAVES = {
    **{f"{{}}, batch {batch}": "1x of batch 1" for batch in (2, 4, 8, 12, 14)},
    "{}, batch 15": "1x or 2x of batch 1",
    **{f"{{}}, batch {batch}": "2x of batch 1" for batch in (16, 17, 24)},
    "{}, batch 32": "3x of batch 1",
}
POINTS = {
    **{key.format(mode): text for mode in ("forward", "forward+backward") for key, text in WAVES.items()},
    "forward, batch 1": "193 us (measured before)",
    "forward, batch 16": "2x of batch 1 (380 us measured before)",
    "forward+backward, batch 16": "2x of batch 1 (924 us measured before)",
    "channels_last, batch 1": "178 to 184 us",
    # Of the phases by round, the dispatch, and the syncs' 10 to 19 us by their number.
    "rounds 1": "76 to 98 us, without what was not modelled",
    "rounds 2": "115 to 147 us, without what was not modelled",
}
CLUSTERS = {8: "14 or 15"}  # blocks of a cluster -> at once


def figure(launch: Launch, name: str, unit: str = "") -> str:
    """A counter in three figures, large ones to the last."""
    value = launch.get(name)
    return "-" if value is None else f"{value:.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def _field(name: str, unit: str = "") -> Callable[[Launch], str]:
    return lambda launch: figure(launch, name, unit)


def _waiting(*reasons: str) -> Callable[[Launch], str]:
    """The share of the samples that these reasons have."""

    def share(launch: Launch) -> str:
        total = sum(launch.get("sampled", {}).values())
        found = sum(launch["sampled"].get(reason, 0.0) for reason in reasons) if total else 0.0
        return f"{100 * found / total:.1f} %" if total else "-"

    return share


def _in_file(name: str) -> Callable[[Launch], str]:
    def share(launch: Launch) -> str:
        files = launch.get("hot", {}).get("files", [])
        found = sum(entry["percent"] for entry in files if entry["name"].endswith(name))
        return f"{found:.1f} %" if files else "-"

    return share


def _local(launch: Launch) -> str:
    if "local_loads" not in launch:
        return "-"
    return f"{launch['local_loads'] + launch.get('local_stores', 0.0):.0f}"


def _of_time(low: float, high: float) -> str:
    return f"{100 * low / FORWARD_US:.0f} to {100 * high / FORWARD_US:.0f} %"


def _code(launch: Launch) -> str:
    return str(launch.get("hot", {}).get("instructions_of_code", "-"))


def _run(launch: Launch) -> str:
    return str(launch.get("hot", {}).get("instructions_run", "-"))


COUNTERS: tuple[tuple[str, str, Callable[[Launch], str]], ...] = (
    ("registers of a thread", "255", _field("registers")),
    ("shared bytes of a block", "154624", _field("dynamic_shared_bytes")),
    ("clusters at once", CLUSTERS[8], _field("clusters_at_once")),
    ("instructions of code", "22872", _code),
    ("of which run at all", "6000 to 8000", _run),
    ("local memory instructions", "0", _local),
    ("waits for instructions, of the samples", _of_time(10, 30), _waiting("no_instruction")),
    ("waits for memory to be seen by others, of the samples", _of_time(10, 19), _waiting("membar")),
    ("products with Wk and Wv, of the samples", _of_time(29, 36), _in_file("team_product_mma.cuh")),
    ("cosines and arg-max, of the samples", _of_time(14, 16), _in_file("team_scores.cuh")),
)
L2 = {1: "1 %", 16: "16 %"}  # of its throughput, by batch: 7 B/ns for each processor at work, 0.9 of 5.5 TB/s


def rows(case: str, launch: Launch) -> Iterator[tuple[str, str, str]]:
    """What, predicted, seen: of the forward kernel of the paper's ICM at 256 tokens, of others nothing."""
    batch = {f"icm paper [{size}x256x16x16] bfloat16 nchw forward": size for size in L2}.get(case)
    if batch is None or not launch["kernel"].startswith("icm_kernel"):
        return
    yield "L2 throughput", L2[batch], _field("l2_percent", " %")(launch)
    for what, text, seen in COUNTERS:
        yield what, text, seen(launch)
