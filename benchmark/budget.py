"""Cost asked for with --cost-budget against cost got, and return above it: a picture and a table from kept runs.

    python benchmark/keep.py runs/RUN ... --to benchmark/results/budget
    python benchmark/budget.py

Every task and budget in --results is a row: what --evaluate played last, or the last evaluation in training where it
was not called, and the cost of the last 100 training episodes by then."""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from kept import played, read_kept
from plot import CELLS, RESULTS, STYLE, WIDTH, by_rule, markdown, save, task_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spowl_continuous import interval


@dataclass(frozen=True)
class Options:
    results: Path = RESULTS / "budget"
    """what benchmark/keep.py kept"""
    picture: Path | None = None
    """picture to draw (default: the name of --results with .png); the table is printed"""


def read_runs(folder):
    """A dict for each kept run with a budget, in the order of task, budget and seed."""
    found = []
    for run in read_kept(folder):
        if run.args.get("cost_budget") is None:
            continue
        last = run.numbers[run.last]
        found.append({
            "task": task_name(run.args["env_id"]), "name": run.args["exp_name"], "budget": run.args["cost_budget"],
            "seed": run.args["seed"], "step": run.last, "training": float(last["train/cost"] or "nan"),
            "lambda": float(last["lagrangian/lambda"] or "nan"), "return": played(run, run.last, "return"),
            "cost": played(run, run.last, "cost")})
    return sorted(found, key=lambda run: (run["task"], run["budget"], run["seed"]))


def by_budget(runs):
    """{(task, budget): its runs}, in their order. SystemExit where they are of different names."""
    found = defaultdict(list)
    for run in runs:
        here = found[run["task"], run["budget"]]
        here.append(run)
        if run["name"] != here[0]["name"]:
            raise SystemExit(f"{here[0]['name']} and {run['name']} both have a budget of {run['budget']:g} on "
                             f"{run['task']}: keep them in folders of their own")
    return found


def with_interval(episodes):
    """Their mean and its interval, as in the line that a run prints."""
    low, high = interval(episodes)
    return f"{np.mean(episodes):.1f} [{low:.1f}, {high:.1f}]"


def table_of_budgets(runs):
    """A line per task and budget, in Markdown."""
    lines = []
    for (task, asked), here in by_budget(runs).items():
        training, multiplier = ([run[name] for run in here] for name in ("training", "lambda"))
        evaluated = [", ".join(with_interval(run[name]) for run in here) if len(here) < 3 else
                     by_rule([np.mean(run[name]) for run in here], "{:.1f}") for name in ("cost", "return")]
        lines.append([task, f"{asked:g}", str(len(here)), by_rule(training, "{:.1f}"), *evaluated,
                      ", ".join(str(len(run["cost"])) for run in here), by_rule(multiplier, "{:.2g}")])
    at = " or ".join(f"{step:,}" for step in sorted({run["step"] for run in runs}))
    head = ["task", "budget", "seeds", "cost of the last 100 training episodes", "cost", "return", "episodes", "last λ"]
    return markdown(head, lines) + f"\nAt {at} steps. In brackets: 95% intervals of means over episodes. {CELLS}\n"


@plt.rc_context(STYLE)
def draw(path, runs):
    """A row per task: return on the left, cost on the right; on the grey line a run costs what it was asked to."""
    tasks, budgets = list(dict.fromkeys(run["task"] for run in runs)), sorted({run["budget"] for run in runs})
    figure, axes = plt.subplots(len(tasks), 2, figsize=(WIDTH, 0.6 + 2.6 * len(tasks)), squeeze=False,
                                layout="constrained")
    for (left, right), task in zip(axes, tasks):
        here = [run for run in runs if run["task"] == task]
        asked = [run["budget"] for run in here]
        for axis, name in ((left, "return"), (right, "cost")):
            axis.plot(asked, [np.mean(run[name]) for run in here], "o", color="tab:blue",
                      label="evaluation at the end")
            for (of, budget), same in by_budget(here).items():
                if len(same) >= 3:
                    axis.plot(budget, np.mean([np.mean(run[name]) for run in same]), "_", color="tab:blue",
                              markersize=22, markeredgewidth=2.2)
            axis.set(xscale="log", xlim=(budgets[0] / 1.5, budgets[-1] * 1.5), xlabel="cost asked for (--cost-budget)",
                     title=f"{task}: evaluation {name}")
            axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        left.set_ylim(0, 1.1 * max(np.mean(run["return"]) for run in here))
        right.plot(asked, [run["training"] for run in here], "s", markerfacecolor="none", color="tab:orange",
                   markersize=8, label="last 100 training episodes")
        right.plot(*2 * [np.geomspace(*right.get_xlim(), 100)], color="0.6", linewidth=1, label="as asked")
        right.set_yscale("symlog", linthresh=1)
        right.set(ylim=(0, max(60, right.get_ylim()[1])), title=f"{task}: cost of an episode")
        right.set_yticks([0, 1, 2, 5, 10, 25, 50], ["0", "1", "2", "5", "10", "25", "50"])
        right.minorticks_off()
        right.legend(loc="upper left")
    save(figure, path, "Each mark: one seed. A thick dash: the mean, where there are three seeds or more. Costs "
         "got are logarithmic above 1.")


def main(options):
    picture, runs = options.picture or options.results.with_suffix(".png"), read_runs(options.results)
    if not picture.parent.is_dir():
        raise SystemExit(f"--picture {picture}: there is no directory {picture.parent}")
    if not runs:
        raise SystemExit(f"{options.results} has no run with a --cost-budget: keep some with benchmark/keep.py")
    draw(picture, runs)
    print(table_of_budgets(runs), end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
