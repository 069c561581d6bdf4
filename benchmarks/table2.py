"""Parameters and multiply-accumulates of FRD-Net beside what was published: `python -m benchmarks.table2`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from frd_model import create_model
from frd_model.complexity import count_macs, count_parameters

from .model_sides import VARIANTS

SIZE = 512


@dataclasses.dataclass(frozen=True)
class Quoted:
    """A row as its source gives it: the text of its figures, not a number that we computed."""

    model: str
    parameters: str
    macs: str
    source: str


TABLE2 = "FRD-Net's paper (AAAI 2026), Table 2, where multiply-accumulates are called FLOPs"
QUOTED = (Quoted("FRD-Net, as published", "39 M", "25.6 G", TABLE2),)


def counted_rows(size: int = SIZE, variants: Sequence[str] = tuple(VARIANTS)) -> list[dict[str, Any]]:
    """Of each preset: variant, parameters, multiply-accumulates of one image in whole and by part."""
    rows = []
    for variant in variants:
        model = create_model(VARIANTS[variant], preset=variant)
        rows.append(
            {"variant": variant, "parameters": count_parameters(model), "macs": count_macs(model, size, size)}
        )
    return rows


def table(rows: list[dict[str, Any]], size: int = SIZE, quoted: tuple[Quoted, ...] = QUOTED) -> str:
    """Markdown."""
    lines = [
        "| model | parameters | multiply-accumulates | of which encoder, FRD blocks, decoder | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        macs = row["macs"]
        parts = ", ".join(f"{macs[part] / 1e9:.2f} G" for part in ("encoder", "blocks", "decoder"))
        lines.append(
            f"| FRD-Net `{row['variant']}` | {row['parameters'] / 1e6:.2f} M | {macs['total'] / 1e9:.2f} G | {parts} | "
            f"counted here, {size} x {size} |"
        )
    for entry in quoted:
        lines.append(f"| {entry.model} | {entry.parameters} | {entry.macs} | - | quoted: {entry.source} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.table2", description="parameters and multiply-accumulates"
    )
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a side (default 512)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    rows = counted_rows(options.size)
    quoted = [dataclasses.asdict(entry) for entry in QUOTED]
    text = json.dumps({"size": options.size, "counted": rows, "quoted": quoted}, indent=1)
    print(text if options.json else table(rows, options.size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
