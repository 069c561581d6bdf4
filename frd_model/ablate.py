"""The ablation of the paper's Table 3: six nets that differ in configuration alone, trained and evaluated alike."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frd_model.config import BASELINE_PREFIX, NAME_PREFIX, model_config
from frd_model.evaluate_presets import eval_preset
from frd_model.evaluate_table import paper_column, paper_tables
from frd_model.train.config import TrainConfig, flatten, from_dict
from frd_model.train.state import FREE

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table.

    title: the paper's name of the row.
    options: fields of `FRDNetConfig` that it changes.
    baseline: the net without FRD blocks, ``segformer_ENCODER``.
    one_round: one round of clustering in the place of all.
    """

    title: str
    options: dict[str, Any]
    baseline: bool = False
    one_round: bool = False


VARIANTS: dict[str, Variant] = {
    # Blocks again, as options of the configuration come after the name's.
    "baseline": Variant("Segformer-b2", {"blocks": 0}, baseline=True),
    "icm-one-round": Variant("+ ICM(w/o iteration)", {"dpm": False}, one_round=True),
    "icm": Variant("+ ICM", {"dpm": False}),
    "dpm-central": Variant("+ DPM(w/o progress)", {"icm": False, "angular": False}),
    "dpm": Variant("+ DPM", {"icm": False}),
    "full": Variant("FRD-Net", {}),
}


def row_config(base: TrainConfig, row: str, seed: int, output: Path) -> TrainConfig:
    """The training configuration of a row: `base` with another net, seed and output.

    Raises ValueError for an unknown row, and for a base that is no ``frdnet_ENCODER`` or starts from a whole net's
    weights, which the other rows could not take.
    """
    if row not in VARIANTS:
        raise ValueError(f"row must be one of {', '.join(VARIANTS)}, got {row!r}")
    if not base.model.name.startswith(NAME_PREFIX):
        raise ValueError(f"model.name must be {NAME_PREFIX}ENCODER, got {base.model.name!r}")
    if base.model.pretrained is not None:
        raise ValueError(
            f"model.pretrained must be left out, got {base.model.pretrained!r}; encoder weights go with "
            "--set model.encoder_weights=FILE"
        )
    variant = VARIANTS[row]
    name, options = base.model.name, dict(base.model.options)
    if variant.baseline:
        name = BASELINE_PREFIX + name.removeprefix(NAME_PREFIX)
    if variant.one_round:
        # "divergent" chooses from a round's centres, so that one more stands for the choice.
        net = net_config(base)
        options["grids"] = [net.grids[-1]] if net.icm_centres == "last" else [net.grids[0], net.grids[-1]]
        options["grids"] = [list(grid) for grid in options["grids"]]
    values = base.to_dict()
    values["model"] |= {"name": name, "options": {**options, **variant.options}}
    return from_dict(values | {"seed": seed, "output": str(output)})


def net_config(config: TrainConfig) -> Any:
    """The `FRDNetConfig` of a training run."""
    return model_config(config.model.name, config.model.preset, **config.model.options)


def run_row(
    config: TrainConfig,
    row: str,
    *,
    sources: Callable[[], dict[str, Any]],
    preset: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a row and evaluate its best weights by validation (the last ones where none could be chosen).

    What is done already in config.output is kept: a finished row of the same configuration is read, an interrupted
    training run resumes, and only the evaluation is made again where it was another one.

    Args:
        sources: opens the sets to evaluate on, by name.
        preset: of `frd_model.evaluate.evaluate`.

    Raises:
        TrainingError: the output holds a run of another configuration, or the training failed.
    """
    from frd_model.data.images import write_json
    from frd_model.train import Trainer

    output = Path(config.output)
    file = output / RESULT
    found = _read(file) if is_done(config) and not overwrite else None
    if found is None:
        trainer = Trainer(config)
        resumes = (output / "last.pt").exists() and not overwrite
        if resumes:
            trainer.resume()
        trainer.fit(overwrite=not resumes)
        found = _describe(config, row) | {"evaluation": None}
    best = output / "best.safetensors"
    weights = best if best.exists() else output / "last.safetensors"
    opened = sources()
    evaluation = {
        "preset": eval_preset(preset).to_dict(),
        "data": {name: f"{source.label}, {source.length} photos" for name, source in opened.items()},
        "weights": weights.name,
    }
    if found["evaluation"] != evaluation:
        found |= {"evaluation": evaluation, "sets": _evaluate(weights, opened, preset, config.device)}
        write_json(file, found)
    return found


def is_done(config: TrainConfig) -> bool:
    """Whether config.output holds the result of this configuration, trained to its end."""
    found = _read(Path(config.output) / RESULT)
    return found is not None and _essence(found["config"]) == _essence(config.to_dict())


def _essence(config: dict[str, Any]) -> dict[str, Any]:
    """What a trained net depends on, with lists for tuples, as JSON has them."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return {k: v for k, v in flatten(plain).items() if k == "epochs" or k not in FREE}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not {"row", "config", "evaluation", "sets"} <= found.keys():
            raise ValueError("another kind of file")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} must be a result of `frd ablate`, got: {error}") from None
    return found


def _describe(config: TrainConfig, row: str) -> dict[str, Any]:
    from frd_model.complexity import count_macs, count_parameters
    from frd_model.frdnet import FRDNet

    net = FRDNet(net_config(config))
    return {
        "row": row,
        "seed": config.seed,
        "model": f"{config.model.name}, {config.model.preset}",
        "config": config.to_dict(),
        "parameters": count_parameters(net),
        "macs_at_512": count_macs(net, 512, 512)["total"],
    }


def _evaluate(weights: Path, opened: dict[str, Any], preset: str, device: str) -> dict[str, Any]:
    from tqdm import tqdm

    from frd_model.evaluate import PIXEL_METRICS, evaluate
    from frd_model.weights import load_model

    model = load_model(weights, device)
    sets = {}
    for name, source in opened.items():
        samples = tqdm(source.samples, total=source.length, desc=f"evaluate {name}", disable=None)
        report = evaluate(samples, model, preset=preset, device=device)
        summary = report.summary()
        forged = summary["forged"]
        if not forged["images"]:
            raise ValueError(f"set {name!r} must hold a forged photo that can be scored, got none")
        means = {m: None if math.isnan(forged[m]) else forged[m] for m in PIXEL_METRICS}
        sets[name] = {"images": forged["images"], "failed": report.failed, "means": means}
    return sets


def metric_of(preset: str) -> str:
    """The metric that a protocol gives to the table: permute-F1 at the fixed threshold, where it has one."""
    rules = eval_preset(preset)
    return rules.table.get("fixed", rules.main)


def table3(results: Sequence[dict[str, Any]], preset: str) -> str:
    """The paper's Table 3 in Markdown: its rows, marked as quoted, each above ours of the same kind.

    Ours are means over the seeds, with their standard deviation where there are two or more.
    """
    table, metric = paper_tables()["table3"], metric_of(preset)
    quoted = table["columns"][:-1]
    names = list(dict.fromkeys(paper_column(name) for r in results for name in r["sets"]))
    columns = [*quoted, *(name for name in names if name not in quoted)]
    lines = [
        f"# Table 3: {table['caption']}",
        "",
        _line(["Method", *columns, "avg", "Parameters", "GMAC at 512x512", "seeds"]),
        _line(["---"] * (len(columns) + 5)),
    ]
    for key, variant in VARIANTS.items():
        cells = dict(zip(table["columns"], table["rows"][variant.title], strict=True))
        paper = [f"{cells[c]:.4f}" if c in cells else "-" for c in (*columns, "avg")]
        lines.append(_line([f"{variant.title} (quoted)", *paper, "-", "-", "-"]))
        own = [result for result in results if result["row"] == key]
        if own:
            lines.append(_line(_own_cells(key, own, columns, metric)))
    lines += ["", f"Rows marked (quoted) are the paper's numbers.{_wrong_averages(table)}"]
    if results:
        rules = dataclasses.replace(eval_preset(preset), main=metric)
        lines.append(
            f"Ours: {rules.describe()}. avg is over the sets that a row was evaluated on; "
            "with several seeds, mean and standard deviation."
        )
        data = {f"{name}: {text}" for r in results for name, text in r["evaluation"]["data"].items()}
        lines += [f"- {text}" for text in sorted(data)]
        failed = sum(len(s["failed"]) for r in results for s in r["sets"].values())
        lines += [f"- {failed} photos could not be scored, see the results"] if failed else []
    return "\n".join(lines) + "\n"


def _own_cells(row: str, results: Sequence[dict[str, Any]], columns: Sequence[str], metric: str) -> list[str]:
    means = [{paper_column(n): s["means"][metric] for n, s in r["sets"].items()} for r in results]
    averages = [None if None in m.values() else statistics.fmean(m.values()) for m in means]
    label = results[0]["model"] if row == "baseline" else VARIANTS[row].title
    return [
        f"{label} (ours)",
        *(_over_seeds([m.get(column) for m in means]) for column in columns),
        _over_seeds(averages),
        f"{results[0]['parameters'] / 1e6:.2f} M",
        f"{results[0]['macs_at_512'] / 1e9:.2f}",
        ", ".join(str(r["seed"]) for r in results),
    ]


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.fmean(known):.4f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.4f}"


def _wrong_averages(table: dict[str, Any]) -> str:
    """A remark on printed averages that are not those of their cells."""
    found = []
    for title, values in table["rows"].items():
        own = statistics.fmean(values[:-1])
        if abs(own - values[-1]) > 0.0001:
            found.append(f" The average of {title} is {own:.4f} by its own cells, printed {values[-1]:.4f}.")
    return "".join(found)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
