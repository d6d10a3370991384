"""From run directories to one csv, and from that csv to one picture: evaluation return, cost, cost rate and balance.

    python benchmark/plot.py --csv benchmark/results/NAME.csv --picture benchmark/results/NAME.png runs/*NAME*

Without run directories the picture is drawn again from the csv that is there. A thin line is a seed, the thick one the
mean over those seeds that reached the step."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

COLUMNS = ("exp_name", "env_id", "seed", "step", "episodes", "return", "return_std", "cost", "cost_std", "cost_rate",
           "balance")
PANELS = {"return": "evaluation return", "cost": "evaluation cost", "cost_rate": "training cost rate",
          "balance": "balance (share of plans executed)"}


@dataclass(frozen=True)
class Options:
    csv: Path
    """table to write from the run directories, or to read where none is given"""
    picture: Path
    """picture to write"""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run directories"""
    cost_line: float = 25.0
    """dashed line in the cost panel"""


def scalar_by_step(run_dir, tag):
    """{step: value} of one TensorBoard tag; what a resumed run played again counts once."""
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    events.Reload()
    if tag not in events.Tags()["tensors"]:
        return {}
    return {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}


def evaluations(run_dir):
    """One row per evaluation of a run; standard deviations are over its episodes."""
    args = json.loads((run_dir / "args.json").read_text())["args"]
    by_step = defaultdict(list)
    with open(run_dir / "episodes.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "eval":
                by_step[int(row["step"])].append((float(row["return"]), float(row["cost"])))
    balance, cost_rate = scalar_by_step(run_dir, "eval/balance"), scalar_by_step(run_dir, "charts/cost_rate")
    for step, episodes in sorted(by_step.items()):
        returns, costs = np.array(episodes).T
        yield {"exp_name": args["exp_name"], "env_id": args["env_id"], "seed": args["seed"], "step": step,
               "episodes": len(episodes), "return": returns.mean(), "return_std": returns.std(), "cost": costs.mean(),
               "cost_std": costs.std(), "cost_rate": cost_rate[step], "balance": balance[step]}


def draw(rows, path, cost_line):
    """Four panels over simulator steps."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items()):
        for color, exp_name in enumerate(dict.fromkeys(row["exp_name"] for row in rows)):
            chosen = [row for row in rows if row["exp_name"] == exp_name]
            seeds = sorted({int(row["seed"]) for row in chosen})
            by_step = defaultdict(list)
            for seed in seeds:
                points = [(int(row["step"]), float(row[name])) for row in chosen if int(row["seed"]) == seed]
                axis.plot(*zip(*points), color=f"C{color}", alpha=0.35, linewidth=1)
                for step, value in points:
                    by_step[step].append(value)
            full = [(step, np.mean(values)) for step, values in sorted(by_step.items())]
            axis.plot(*zip(*full), color=f"C{color}", linewidth=2.2, label=f"{exp_name} ({len(seeds)} seeds)")
        if name == "cost" and cost_line > 0:
            axis.axhline(cost_line, color="black", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="simulator steps")
        axis.set_ylim(0, None) if name != "return" else None
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(", ".join(dict.fromkeys(row["env_id"] for row in rows)))
    figure.savefig(path, dpi=110)


def main(options):
    if options.runs:
        rows = [row for run_dir in options.runs for row in evaluations(run_dir)]
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            short = lambda value: f"{value:.6g}" if isinstance(value, float) else value
            writer.writerows({name: short(value) for name, value in row.items()} for row in rows)
    with open(options.csv, newline="") as file:
        draw(list(csv.DictReader(file)), options.picture, options.cost_line)


if __name__ == "__main__":
    main(tyro.cli(Options))
