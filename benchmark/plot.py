"""From run directories to one csv, and from that csv to a picture and a table of evaluations.

    python benchmark/plot.py --csv NAME.csv --picture NAME.png runs/*NAME*
    python benchmark/plot.py --grid benchmark/grids/fig6.yaml runs/two_cores/Safety*

Without run directories picture and table are made again from the csv that is there. With a grid its runs alone are
taken, in its order and with its labels, what is missing is called "not run", and all three files are
benchmark/results/{grid}_{scale}.* unless they are named. A thin line is a seed, the thick one the mean
over those seeds that reached the step, the band its 95% bootstrap interval, dotted (from five seeds on) the
interquartile mean. Where a run was judged by --evaluate, these episodes stand for its last evaluation. --paper puts the
figures of the paper's Table 1 beside ours."""

import csv
import dataclasses
import itertools
import json
import math
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from grid import PANELS, Grid, read_grid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

RESULTS = Path(__file__).resolve().parent / "results"
COLORS = plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2]  # the usual ten, then lighter ones
COLUMNS = ("exp_name", "env_id", "seed", "step", "episodes", "return", "return_std", "cost", "cost_std", "cost_rate",
           "balance", "no_improvement", "hours")
LATER = COLUMNS[-2:]  # older tables lack them
TITLES = {"return": "evaluation return", "cost": "evaluation cost", "cost_rate": "training cost rate",
          "total_cost": "cost of all training so far", "balance": "balance (share of plans executed)",
          "no_improvement": "steps with too few feasible plans"}


@dataclasses.dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run directories"""
    csv: Path | None = None
    """table to write from the run directories, or to read where none is given"""
    add: bool = False
    """keep the rows of all other runs (name, task, seed) in a table that is there: they may be of another machine"""
    picture: Path | None = None
    """learning curves to draw"""
    table: Path | None = None
    """table of the last evaluations to write, in Markdown"""
    grid: Path | None = None
    """grid of the runs (default: every run given, by its name)"""
    scale: str = "two_cores"
    """which of the grid's scales"""
    paper: Path | None = None
    """csv of the paper's Table 1, to stand beside ours in the table and in the picture of trade-offs"""
    tradeoff: Path | None = None
    """picture of return against cost at the end to draw, a point for each task and setting"""
    cost_line: float = 25.0
    """dashed line in the cost panels (0: none)"""


# ----------------------------------------------------------------------------------------------------------------------
# From run directories to rows
# ----------------------------------------------------------------------------------------------------------------------
def scalars_by_step(run_dir, *tags):
    """{step: value} for each TensorBoard tag; what a resumed run played again counts once."""
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    events.Reload()
    logged = events.Tags()["tensors"]
    return [{event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}
            if tag in logged else {} for tag in tags]


def wall_time(run_dir, step):
    """Hours that a run had taken at its newest checkpoint; not a number if there is none of that step."""
    try:
        with np.load(run_dir / f"checkpoint_{step}.npz") as file:
            return json.loads(str(file["counters"]))["wall_time"] / 3600
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return math.nan


def evaluations(run_dir, grid=None):
    """One row per evaluation of a run, none if it is not of the grid; standard deviations are over its episodes."""
    def evaluated(name):
        table = run_dir / name  # not there before the first episode has ended, or --evaluate was called
        lines = table.read_text().splitlines() if table.exists() else []
        return [row for row in csv.DictReader(lines) if row["split"] == "eval"]

    try:
        args = json.loads((run_dir / "args.json").read_text())["args"]
        episodes, judged = evaluated("episodes.csv"), evaluated("evaluation.csv")
        episodes = [row for row in episodes if row["step"] not in {row["step"] for row in judged}] + judged
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{run_dir} is not a run directory: {error}")
    if grid and not (args["exp_name"] in grid.settings and args["env_id"] in grid.tasks and args["seed"] in grid.seeds):
        return
    by_step = defaultdict(list)
    for row in episodes:
        by_step[int(row["step"])].append((float(row["return"]), float(row["cost"])))
    balance, cost_rate, no_improvement = scalars_by_step(
        run_dir, "eval/balance", "charts/cost_rate", "planner/no_improvement")
    for step, values in sorted(by_step.items()):
        returns, costs = np.array(values).T
        yield {"exp_name": args["exp_name"], "env_id": args["env_id"], "seed": args["seed"], "step": step,
               "episodes": len(values), "return": returns.mean(), "return_std": returns.std(), "cost": costs.mean(),
               "cost_std": costs.std(), "cost_rate": cost_rate.get(step, math.nan),
               "balance": balance.get(step, math.nan),  # nan: the disk was full
               "no_improvement": no_improvement.get(step, math.nan),  # policy-only has none
               "hours": wall_time(run_dir, step) if step == max(by_step) else math.nan}


def write_rows(path, rows):
    """The csv; SystemExit where two runs have the same name, task, seed and step."""
    seen = set()
    for row in rows:
        key = tuple(row[name] for name in ("exp_name", "env_id", "seed", "step"))
        if key in seen:
            raise SystemExit(f"two runs of {key[0]} on {key[1]} with seed {key[2]}: leave one of them out")
        seen.add(key)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        short = lambda value: f"{value:.6g}" if isinstance(value, float) else value
        writer.writerows({name: short(value) for name, value in row.items()} for row in rows)


def read_rows(path):
    """The csv's rows, numbers as numbers; nan in the last columns where they were not written yet."""
    try:
        with open(path, newline="") as file:
            kinds = {"exp_name": str, "env_id": str, "seed": int, "step": int, "episodes": int}
            reader = csv.DictReader(file)
            if set(COLUMNS) - set(LATER) - set(reader.fieldnames or ()):
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            return [{name: kinds.get(name, float)(row.get(name, "nan")) for name in COLUMNS} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise SystemExit(f"--csv {path} is not a table that this program wrote: {error}")


def grid_of(rows):
    """The rows themselves as a grid: every name a setting, every task."""
    names, tasks = (tuple(dict.fromkeys(row[name] for row in rows)) for name in ("exp_name", "env_id"))
    return Grid("", PANELS[:4], tasks, tuple(sorted({row["seed"] for row in rows})), {},
                {name: {"label": name} for name in names})


# ----------------------------------------------------------------------------------------------------------------------
# Over seeds
# ----------------------------------------------------------------------------------------------------------------------
def by_seed(rows, task, setting, name):
    """{seed: {step: value}} of one column, where there is a value."""
    found = defaultdict(dict)
    for row in rows:
        value = row["cost_rate"] * row["step"] if name == "total_cost" else row[name]
        if row["env_id"] == task and row["exp_name"] == setting and not math.isnan(value):
            found[row["seed"]][row["step"]] = value
    return dict(sorted(found.items()))


def interval(values):
    """95% percentile bootstrap interval of the mean; no width for a single value."""
    if len(values) < 2 or np.ptp(values) == 0:
        return values[0], values[0]
    result = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0)
    return tuple(map(float, result.confidence_interval))


def interquartile_mean(values):
    """Mean of the middle half."""
    return float(scipy.stats.trim_mean(values, 0.25))


# ----------------------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------------------
def draw(rows, grid, path, cost_line):
    """Learning curves: a row of panels per task, a colour per setting."""
    figure, axes = plt.subplots(len(grid.tasks), len(grid.panels), squeeze=False, sharex=True, layout="constrained",
                                figsize=(4 * len(grid.panels), 0.5 + 2.9 * len(grid.tasks)))
    for task, line in zip(grid.tasks, axes):
        for name, axis in zip(grid.panels, line):
            for color, (setting, entry) in zip(itertools.cycle(COLORS), grid.settings.items()):
                draw_setting(axis, by_seed(rows, task, setting, name), color, entry["label"])
            if name == "cost" and cost_line > 0:
                axis.axhline(cost_line, color="black", linestyle="--", linewidth=1)
            is_share = name in ("balance", "no_improvement")
            axis.set_ylim(min(0, axis.get_ylim()[0]) if name == "return" else 0, 1.03 if is_share else None)
            axis.set(title=TITLES[name] if task == grid.tasks[0] else "")
            axis.set(xlabel="simulator steps" if task == grid.tasks[-1] else "")
            axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1000:g}k")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(task if len(grid.tasks) > 1 else "")
        if len(grid.settings) <= 5:  # more would hide the curves
            line[0].legend(frameon=False, fontsize="small")
    if len(grid.settings) > 5:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    tasks = ", ".join(grid.tasks) if len(grid.tasks) == 1 else ""
    figure.align_ylabels()
    figure.suptitle(": ".join(text for text in (grid.title, tasks) if text))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_setting(axis, seeds, color, label):
    """One setting's seeds, their mean, its interval and, where there are enough, the interquartile mean."""
    if not seeds:
        axis.plot([], [], color=color, alpha=0.35, label=f"{label} (not run)")
        return
    steps = sorted({step for values in seeds.values() for step in values})
    there = [np.array([values[step] for values in seeds.values() if step in values]) for step in steps]
    for values in seeds.values():
        axis.plot(*zip(*sorted(values.items())), color=color, alpha=0.3, linewidth=0.8)
    axis.plot(steps, [values.mean() for values in there], color=color, linewidth=2.2,
              label=f"{label} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})")
    axis.fill_between(steps, *zip(*map(interval, there)), color=color, alpha=0.12, linewidth=0)
    if len(seeds) >= 5:
        axis.plot(steps, list(map(interquartile_mean, there)), color=color, linewidth=1.2, linestyle=":")


def draw_tradeoff(rows, grid, path, printed):
    """Return against cost at the end: a colour per setting, a panel per task; hollow: the paper's."""
    figure, axes = plt.subplots(1, len(grid.tasks), squeeze=False, layout="constrained",
                                figsize=(2.8 + 3.2 * len(grid.tasks), 3.6))
    for task, axis in zip(grid.tasks, axes[0]):
        for color, (setting, entry) in zip(itertools.cycle(COLORS), grid.settings.items()):
            at = {name: last_values(rows, task, setting, name) for name in ("cost", "return")}
            axis.plot(at["cost"], at["return"], ".", color=color, alpha=0.4)
            axis.plot(*([values.mean()] if len(values) else [] for values in at.values()), "o", color=color,
                      label=entry["label"])
            theirs = [printed.get((task, name, algorithm(entry))) for name in ("cost", "return")]
            if all(theirs):
                axis.plot(*([float(figures[0])] for figures in theirs), "o", color=color, fillstyle="none")
        axis.set(title=task, xlabel="evaluation cost", xlim=(-2, None), ylim=(min(0, axis.get_ylim()[0]), None))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("evaluation return")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title="hollow: the paper's" if printed else None,
                  frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------
FORMATS = {"return": "{:.1f}", "cost": "{:.1f}", "cost_rate": "{:.0f}", "total_cost": "{:.0f}", "balance": "{:.0f}%",
           "no_improvement": "{:.0f}%", "hours": "{:.1f}"}
FACTORS = {"cost_rate": 1e4, "balance": 100, "no_improvement": 100}
HEADINGS = {"return": "return", "cost": "cost", "cost_rate": "cost rate ×10⁴", "total_cost": "cost of all training",
            "balance": "balance", "no_improvement": "too few feasible plans", "hours": "hours"}


def last_step(rows, task, setting):
    """The last step at which a setting was evaluated, of any seed."""
    return max((row["step"] for row in rows if (row["env_id"], row["exp_name"]) == (task, setting)), default=0)


def last_values(rows, task, setting, name):
    """A column at a setting's last step, of those seeds that reached it."""
    step = last_step(rows, task, setting)
    return np.array([values[step] for values in by_seed(rows, task, setting, name).values() if step in values])


def cell(values, name):
    """Mean ± standard deviation over seeds, in the table's unit, or "not run"."""
    if not len(values):
        return "not run"
    show = lambda value: FORMATS[name].format(FACTORS.get(name, 1) * value)
    return f"{show(values.mean())} ± {show(values.std())}" if len(values) > 1 else show(values[0])


def markdown(header, lines):
    """A table in Markdown."""
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *lines])


def table_of_settings(rows, grid):
    """A line per task and setting: the last evaluation, mean ± population standard deviation over seeds."""
    lines, steps = [], set()
    for task in grid.tasks:
        for setting, entry in grid.settings.items():
            values = {name: last_values(rows, task, setting, name) for name in grid.panels}
            lines.append([task] * (len(grid.tasks) > 1) + [entry["label"], str(len(values[grid.panels[0]])),
                                                           *(cell(values[name], name) for name in grid.panels)])
            steps |= {last_step(rows, task, setting)} - {0}
    head = ["task"] * (len(grid.tasks) > 1) + ["setting", "seeds", *(HEADINGS[name] for name in grid.panels)]
    at = " or ".join(f"{step:,}" for step in sorted(steps)) or "no"
    return markdown(head, lines) + f"\nAt {at} steps; mean ± population standard deviation over seeds.\n"


def read_paper(path):
    """{(task, metric, algorithm): (mean, std)} of the paper's Table 1, as printed."""
    try:
        with open(path, newline="") as file:
            return {(row["env_id"], row["metric"].removesuffix("_x1e4"), row["algorithm"]): (row["mean"], row["std"])
                    for row in csv.DictReader(file)}
    except (OSError, KeyError) as error:
        raise SystemExit(f"--paper {path} is not the paper's table: {error}")


def algorithm(entry):
    """A setting's name in the paper: its label up to the comma."""
    return entry["label"].partition(",")[0]


def table_beside_paper(rows, grid, printed):
    """Table 1: a line per task and setting, the paper's figures and ours, with our steps and hours."""
    names, lines = ("return", "cost", "cost_rate"), []
    for task in grid.tasks:
        for setting, entry in grid.settings.items():
            theirs = [" ± ".join(printed.get((task, name, algorithm(entry)), "—")) for name in names]
            ours = [cell(last_values(rows, task, setting, name), name) for name in names]
            hours, step = last_values(rows, task, setting, "hours"), last_step(rows, task, setting)
            lines.append([task, entry["label"], *theirs, *ours, f"{step:,}" if step else "—",
                          cell(hours, "hours") if len(hours) else "—",
                          str(len(last_values(rows, task, setting, "return")))])
    head = ["task", "", *(f"paper: {HEADINGS[name]}" for name in names), *(f"ours: {HEADINGS[name]}" for name in names),
            "steps", "hours", "seeds"]
    return markdown(head, lines) + ("\nThe paper's figures are after 5,000,000 steps; mean ± population standard "
                                    "deviation over seeds.\n")


def main(options):
    """Rows from the runs, or from the csv; then picture and table."""
    grid = read_grid(options.grid, options.scale) if options.grid else None
    if not grid and not options.csv:
        raise SystemExit("--csv or --grid is needed: the table to write or to read")
    if grid:
        beside = RESULTS / f"{options.grid.stem}_{options.scale}"
        names = {name: getattr(options, name) or beside.with_suffix(suffix)
                 for name, suffix in (("csv", ".csv"), ("picture", ".png"), ("table", ".md"))}
        options = dataclasses.replace(options, **names)
    if options.runs:
        rows = [row for run_dir in options.runs for row in evaluations(run_dir, grid)]
        if not rows:
            raise SystemExit("these run directories have no evaluation yet" + ", or are not of the grid" * bool(grid))
        named = lambda row: (row["exp_name"], row["env_id"], row["seed"])
        again = set(map(named, rows))
        others = [row for row in read_rows(options.csv) if named(row) not in again] if options.csv.exists() else []
        if others and not options.add:
            name, task, seed = named(others[0])
            raise SystemExit(f"{options.csv} has runs that are not given, such as {name} on {task} with seed {seed}: "
                             "give them too, keep their rows with --add, or remove it")
        rows = others + rows
        if grid:
            order = {name: number for number, name in enumerate(grid.settings)}  # --add keeps names of other grids too
            rows.sort(key=lambda row: (row["env_id"], order.get(row["exp_name"], len(order)), row["seed"], row["step"]))
        write_rows(options.csv, rows)
    rows = read_rows(options.csv)
    grid = grid or grid_of(rows)
    if options.picture:
        draw(rows, grid, options.picture, options.cost_line)
    printed = read_paper(options.paper) if options.paper else {}
    if options.tradeoff:
        draw_tradeoff(rows, grid, options.tradeoff, printed)
    if options.table:
        options.table.write_text(table_beside_paper(rows, grid, printed) if printed else table_of_settings(rows, grid))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except OSError as stopped:
        raise SystemExit(f"{stopped.filename}: {stopped.strerror}")
