"""Cost asked for with --cost-budget against cost got, and return above it: a picture and a table from kept runs.

    python benchmark/keep.py runs/RUN ... --to benchmark/results/budget
    python benchmark/budget.py

Every run in --results is a row: budget, seed, cost of its last 100 training episodes, and what --evaluate played at its
end, or its last evaluation where that was not run."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from plot import RESULTS, interval


@dataclass(frozen=True)
class Options:
    results: Path = RESULTS / "budget"
    """what benchmark/keep.py kept"""
    picture: Path = RESULTS / "budget.png"
    """picture to draw"""
    table: Path = RESULTS / "budget.md"
    """table to write, in Markdown"""


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_runs(folder):
    """A dict for each kept run with a budget, in the order of task, budget and seed."""
    found = []
    for path in sorted(folder.glob("*_args.json")):
        args, stem = json.loads(path.read_text())["args"], path.name.removesuffix("_args.json")
        if args.get("cost_budget") is None:
            continue
        episodes, last = rows(folder / f"{stem}_episodes.csv"), rows(folder / f"{stem}_numbers.csv")[-1]
        split, step = episodes[-1]["split"], episodes[-1]["step"]
        played = [row for row in episodes if (row["split"], row["step"]) == (split, step)]
        found.append({
            "task": args["env_id"].removeprefix("Safety").removesuffix("-v0"), "budget": args["cost_budget"],
            "seed": args["seed"], "step": int(step), "training": float(last["train/cost"]),
            "lambda": float(last["lagrangian/lambda"]),
            "return": [float(row["return"]) for row in played], "cost": [float(row["cost"]) for row in played]})
    return sorted(found, key=lambda run: (run["task"], run["budget"], run["seed"]))


def write_table(path, runs):
    lines = ["| task | budget | seed | cost of the last 100 training episodes | cost | return | episodes | last λ |",
             "|---|---|---|---|---|---|---|---|"]
    for run in runs:
        cost, reward = (f"{np.mean(run[name]):.1f} [{low:.1f}, {high:.1f}]" for name in ("cost", "return")
                        for low, high in [interval(run[name])])
        lines.append(f"| {run['task']} | {run['budget']:g} | {run['seed']} | {run['training']:.1f} | {cost} | {reward} "
                     f"| {len(run['cost'])} | {run['lambda']:.2g} |")
    path.write_text("\n".join(lines) + "\n")


def draw(path, runs):
    """A column per task: return above, cost below, each run at its budget; on the line got is what was asked for."""
    by_task, budgets = defaultdict(list), sorted({run["budget"] for run in runs})
    for run in runs:
        by_task[run["task"]].append(run)
    figure, axes = plt.subplots(2, len(by_task), figsize=(0.8 + 2.6 * len(by_task), 5.2), sharex=True, squeeze=False)
    for (above, below), (task, here) in zip(axes.T, by_task.items()):
        asked = [run["budget"] for run in here]
        for axis, name in ((above, "return"), (below, "cost")):
            bars = [abs(interval(run[name]) - np.mean(run[name])) for run in here]
            axis.errorbar(asked, [np.mean(run[name]) for run in here], np.transpose(bars), fmt="o", color="tab:blue",
                          capsize=3, label="evaluation episodes at the end")
        below.plot(asked, [run["training"] for run in here], "s", mfc="none", color="tab:orange",
                   label="last 100 training episodes")
        below.plot([1.5, 40], [1.5, 40], "-", color="0.6", lw=1, label="as asked")
        below.set(xscale="log", yscale="log", xlabel="--cost-budget", ylim=(0.5, 80))
        below.set_xticks(budgets, [f"{x:g}" for x in budgets])
        below.set_yticks([1, 2, 5, 10, 25, 50], ["1", "2", "5", "10", "25", "50"])
        below.minorticks_off()
        above.set_title(task, fontsize=10)
    axes[0, 0].set_ylabel("return")
    axes[1, 0].set_ylabel("cost per episode")
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options):
    runs = read_runs(options.results)
    if not runs:
        raise SystemExit(f"{options.results} has no run with a --cost-budget: keep some with benchmark/keep.py")
    write_table(options.table, runs)
    draw(options.picture, runs)
    print(options.table.read_text(), end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
