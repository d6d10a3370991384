"""From run directories to one csv, and from that csv to a picture and a table of evaluations.

    python benchmark/plot.py --csv NAME.csv --picture NAME.png runs/*NAME*
    python benchmark/plot.py --grid benchmark/grids/fig6.yaml runs/two_cores/Safety*

Without run directories picture and table are made again from the csv that is there. With a grid its runs alone are
taken, in its order and with its labels, what is missing is called "not run", and all three files are {grid}_{scale}.*
beside the first run, without runs in benchmark/results, unless they are named. What a line, a band and a mark mean
stands under each picture (RULE), what a table's cell means under each table (CELLS). Where a run was judged by
--evaluate, these episodes stand for its last evaluation. --paper puts those of the paper's Table 1 beside ours."""

import csv
import dataclasses
import itertools
import json
import math
import textwrap
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from grid import PANELS, Grid, read_grid, settings_on
from kept import rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

RESULTS = Path(__file__).resolve().parent / "results"
COLORS = plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2]  # the usual ten, then lighter ones
COLUMNS = ("exp_name", "env_id", "seed", "step", "episodes", "return", "return_std", "cost", "cost_std", "cost_rate",
           "balance", "no_improvement", "hours")
LATER = COLUMNS[-2:]  # older tables lack them
TITLES = {"return": "evaluation return", "cost": "evaluation cost", "cost_rate": "training cost per step",
          "total_cost": "cost of all training", "balance": "share of plans executed",
          "no_improvement": "too few feasible plans"}
MARKERS = "osD^vPXp"
WIDTH, DPI = 8, 130  # inches; a page shows a picture about 800 pixels wide, so that a point is 1.4 of its pixels
STYLE = {"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False}
MANY = 50  # episodes from which on an evaluation is marked by a ring
LIMIT = "Dashed at 25: the cost limit that OmniSafe's baselines use."
RULE = ("Thin line: one seed. Thick line: the mean, where there are three seeds or more. Band, from five seeds on: 95% "
        "t interval of the mean. Small dot: an evaluation of fewer than 50 episodes (10 or 20). Ring: of 50 or "
        "more.")
CELLS = "One or two seeds: their values; three or more: their mean (and range)."
WITHOUT_REPEAT = ("baselines/ppo_lagrangian.py", "baselines/cpo.py", "baselines/cvpo.py")  # the others: 5 times


@dataclasses.dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """run directories"""
    csv: Path | None = None
    """table to write from the run directories, or to read where none is given; also a folder of benchmark/keep.py"""
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
def scalars_by_step(run_dir):
    """{tag: {step: value}} of TensorBoard; what a resumed run played again counts once."""
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()
    return {tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}
            for tag in events.Tags()["tensors"] if not tag.startswith("_")}


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{run_dir} is not a run directory: {error}")
    if grid and not (args["exp_name"] in settings_on(grid, args["env_id"]) and args["env_id"] in grid.tasks
                     and args["seed"] in grid.seeds):
        return
    by_step = defaultdict(list)
    for row in episodes:
        by_step[int(row["step"])].append([float(row.get(name, "nan")) for name in ("return", "cost", "balance")])
    logged = scalars_by_step(run_dir)
    balance, cost_rate, no_improvement = (
        logged.get(tag, {}) for tag in ("eval/balance", "charts/cost_rate", "planner/no_improvement"))
    for step, values in sorted(by_step.items()):
        returns, costs, balances = np.array(values).T  # of single episodes --evaluate alone writes a balance
        yield {"exp_name": args["exp_name"], "env_id": args["env_id"], "seed": args["seed"], "step": step,
               "episodes": len(values), "return": returns.mean(), "return_std": returns.std(), "cost": costs.mean(),
               "cost_std": costs.std(), "cost_rate": cost_rate.get(step, math.nan),
               "balance": balance.get(step, math.nan) if np.isnan(balances).any() else balances.mean(),
               "no_improvement": no_improvement.get(step, math.nan),  # nan: policy-only has none, or the disk was full
               "hours": wall_time(run_dir, step) if step == max(by_step) else math.nan}


def write_rows(path, rows):
    """The csv."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        short = lambda value: f"{value:.6g}" if isinstance(value, float) else value
        writer.writerows({name: short(value) for name, value in row.items()} for row in rows)


def read_rows(path):
    """The rows of a csv, or of a folder of kept runs, numbers as numbers; nan where something was not written."""
    if path.is_dir():
        return rows_of(path)
    try:
        with open(path, newline="") as file:
            kinds = {"exp_name": str, "env_id": str, "seed": int, "step": int, "episodes": int}
            reader = csv.DictReader(file)
            if set(COLUMNS) - set(LATER) - set(reader.fieldnames or ()):
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            return [{name: kinds.get(name, float)(row.get(name, "nan")) for name in COLUMNS} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise SystemExit(f"--csv {path} is not a table that this program wrote: {error}")


def grid_of(rows, title="", panels=PANELS[:4], labels=None):
    """The rows themselves as a grid: every name a setting, with its label where there is one, every task."""
    names, tasks = (tuple(dict.fromkeys(row[name] for row in rows)) for name in ("exp_name", "env_id"))
    return Grid(title, panels, tasks, tuple(sorted({row["seed"] for row in rows})), {},
                {name: {"label": (labels or {}).get(name, name)} for name in names})


def task_name(env_id):
    """A task's name on a page: SafetyPointGoal1-v0 is PointGoal1."""
    return env_id.removeprefix("Safety").removesuffix("-v0")


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
    """95% t interval of the mean; of so few seeds a percentile bootstrap holds the mean in four of five cases."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return np.mean(values) - half, np.mean(values) + half


def shared_steps(seeds):
    """Steps at which every seed that came so far has a value, three at least: there a mean is of the same runs."""
    steps = sorted({step for values in seeds.values() for step in values})
    running = {step: [values for values in seeds.values() if max(values) >= step] for step in steps}
    return [step for step in steps if len(running[step]) >= 3 and all(step in values for values in running[step])]


# ----------------------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------------------
def save(figure, path, rule):
    """The picture with small text under it that says what its lines and marks mean."""
    figure.supxlabel(textwrap.fill(rule, 155), x=0.01, ha="left", fontsize=7, color="0.25")
    figure.savefig(path, dpi=DPI, metadata={"Software": None} if Path(path).suffix == ".png" else None)
    plt.close(figure)


def step_text(step):
    """300k, 2M."""
    return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1000:g}k" if step else "0"


def step_axis(axis, first, last, spread):
    """Simulator steps from first to last; logarithmic where short runs stand beside long ones."""
    if spread:
        axis.set_xscale("log")
        axis.set_xticks([step for step in (1e4, 1e5, 1e6, 1e7) if first <= step <= last])
        axis.xaxis.set_minor_formatter("")  # their ticks alone: names of 2, 3, ... would run into each other
        axis.set_xlim(first / 1.2, last * 1.2)
    else:
        axis.set_xlim(0, 1.03 * last)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(lambda step, _: step_text(step))
    axis.grid(alpha=0.3)


@plt.rc_context(STYLE)
def draw(rows, grid, path, cost_line):
    """Learning curves: panels for each task, a colour per setting, above them who it is and how many seeds. The dashed
    line stands at one cost for all tasks, or at each task's own of a dict; at none for 0."""
    cost_lines = cost_line if isinstance(cost_line, dict) else dict.fromkeys(grid.tasks, cost_line)
    columns = 2 if len(grid.tasks) == 1 and len(grid.panels) == 4 else len(grid.panels)
    lines, height = math.ceil(len(grid.panels) / columns), 1.9 if columns < 4 else 1.25  # inches, as all that follows
    width, longest = (WIDTH - 0.1) / columns, max(len(entry["label"]) for entry in grid.settings.values())
    entries = [[setting for setting in grid.settings if last_step(rows, task, setting)] for task in grid.tasks]
    heads = [0.35 + 0.17 * math.ceil(len(each) / (2 if longest > 24 else 3)) for each in entries]
    total = 0.3 + sum(heads) + len(grid.tasks) * lines * (height + 0.5) + 0.6
    figure, top = plt.figure(figsize=(WIDTH, total)), total - 0.3  # places by hand: automatic ones take seconds
    figure.text(0.5, 1 - 0.12 / total, grid.title, ha="center", va="center", fontsize=10, fontweight="bold")
    for task, head in zip(grid.tasks, heads):
        places = [(0.45 + column * width, top - head - line * (height + 0.5) - 0.2 - height)
                  for line in range(lines) for column in range(columns)]
        axes = [figure.add_axes((x / WIDTH, y / total, (width - 0.5) / WIDTH, height / total)) for x, y in places]
        draw_task(axes[:len(grid.panels)], rows, grid, task, cost_lines[task])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, title=task_name(task), title_fontproperties={"weight": "bold", "size": 9},
                      alignment="left", loc="upper left", bbox_to_anchor=(0, top / total),
                      ncols=2 if longest > 24 else 3)
        top -= head + lines * (height + 0.5)
    figure.text(0.5, (top - 0.02) / total, "simulator steps", ha="center", va="top")
    told = LIMIT if set(cost_lines.values()) == {25} else "Dashed: the cost limit." if any(cost_lines.values()) else ""
    save(figure, path, f"{RULE} {told}" if told and "cost" in grid.panels else RULE)


def draw_task(axes, rows, grid, task, cost_line):
    """A task's panels."""
    drawn = [row["step"] for row in rows if row["exp_name"] in grid.settings and row["env_id"] == task]
    ends = {last_step(rows, task, setting) for setting in grid.settings} - {0}
    for name, axis in zip(grid.panels, axes):
        for color, (setting, entry) in zip(itertools.cycle(COLORS), grid.settings.items()):
            episodes = by_seed(rows, task, setting, "episodes") if name in ("return", "cost") else {}
            draw_setting(axis, by_seed(rows, task, setting, name), color, entry["label"], episodes)
        if name == "cost" and cost_line > 0:
            axis.axhline(cost_line, color="black", linestyle="--", linewidth=1)
        is_share = name in ("balance", "no_improvement")
        axis.set_ylim(min(0, axis.get_ylim()[0]) if name == "return" else 0, 1.03 if is_share else None)
        axis.set_title(TITLES[name])
        if name == "total_cost":
            axis.yaxis.set_major_formatter(lambda cost, _: step_text(cost))
        step_axis(axis, min(drawn, default=1), max(drawn, default=1), max(ends, default=1) > 4 * min(ends, default=1))


def draw_setting(axis, seeds, color, label, episodes):
    """One setting's seeds, from three on their mean, from five on its interval; marks tell short evaluations from long
    ones. Nothing where it was not run."""
    if not seeds:
        return
    many, lines = len(seeds) >= 3, []
    for seed, values in seeds.items():
        steps = sorted(values)
        at = lambda chosen: (chosen, [values[step] for step in chosen])
        lines += axis.plot(*at(steps), color=color, alpha=0.5 if many else 0.9, linewidth=1.0)
        short = [step for step in steps if 0 < episodes.get(seed, {}).get(step, 0) < MANY]
        long = [step for step in steps if episodes.get(seed, {}).get(step, 0) >= MANY]
        axis.plot(*at(short), ".", color=color, markersize=2.8, alpha=0.5 if many else 0.9)
        axis.plot(*at(long), "o", color=color, markersize=4.5, markerfacecolor="none", clip_on=False)
    steps = shared_steps(seeds)
    there = [np.array([values[step] for values in seeds.values() if step in values]) for step in steps]
    if there:
        lines = axis.plot(steps, [values.mean() for values in there], color=color, linewidth=2.2)
    if banded := [(step, *interval(values)) for step, values in zip(steps, there) if len(values) >= 5]:
        axis.fill_between(*zip(*banded), color=color, alpha=0.15, linewidth=0)
    lines[0].set_label(f"{label}: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")


@plt.rc_context(STYLE)
def draw_tradeoff(rows, grid, path, printed):
    """Return against cost at the end, a panel per task: ours filled, the paper's hollow, once per system."""
    lines = max(2, math.ceil((len(grid.tasks) + 4) / 3))  # the first task's panel takes four places, the legend one
    figure = plt.figure(layout="constrained", figsize=(WIDTH, 0.5 + 2.4 * lines))
    places = figure.add_gridspec(lines, 3)
    small = [places[line, column] for line in range(lines) for column in range(3) if line > 1 or column > 1]
    axes, handles = [figure.add_subplot(place) for place in (places[:2, :2], *small[:len(grid.tasks)])], {}
    first = {algorithm(entry): setting for setting, entry in reversed(grid.settings.items())}  # has the paper's mark
    for task, axis in zip(grid.tasks, axes):
        for color, marker, (setting, entry) in zip(itertools.cycle(COLORS), itertools.cycle(MARKERS),
                                                   grid.settings.items()):
            points = np.array([last_values(rows, task, setting, name) for name in ("cost", "return")])  # (2, seeds)
            look = dict(marker=marker, linestyle="none", color=color, markeredgecolor="white", markeredgewidth=0.6)
            many = points.shape[1] >= 3
            if many:
                axis.plot(*points.mean(1, keepdims=True), **look, markersize=9, zorder=3)
            axis.plot(*points, **look, markersize=4.5 if many else 6.5, zorder=4)  # last: nothing hides behind a mean
            theirs = [printed.get((task, name, algorithm(entry))) for name in ("cost", "return")]
            if all(theirs) and setting in first.values():
                axis.plot(*([float(figures[0])] for figures in theirs), marker=marker, linestyle="none", color=color,
                          fillstyle="none", markersize=8.5, markeredgewidth=1.3, zorder=2)
            steps = sorted({last_step(rows, each, setting) for each in grid.tasks} - {0}, reverse=True)
            ran = " or ".join(f"{step:,}" for step in steps) + " steps" if steps else "not run"
            if steps or setting in first.values():
                handles[f"{entry['label']}: {ran}"] = plt.Line2D([], [], **look, markersize=7)
        axis.axvline(25, color="black", linestyle="--", linewidth=1, zorder=1)
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)
        axis.set_xticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set(xlim=(-0.4, 260), ylim=(min(0, low) - 1, high + 1.5))  # marks lie whole inside
        axis.set_title(task_name(task), fontweight="bold")
        axis.set(xlabel="evaluation cost", ylabel="evaluation return")
        axis.grid(alpha=0.3)
    if printed:
        handles["hollow: the paper's, 5,000,000 steps"] = plt.Line2D([], [], marker="o", linestyle="none", color="0.3",
                                                                     fillstyle="none", markersize=8.5)
    axes[-1].axis("off")
    axes[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=7.5, labelspacing=0.7)
    save(figure, path, "Filled: ours. One seed or two: a mark for each. Three or more: a large mark is the mean, a "
         f"small one a seed. Better is up and to the left. Cost is logarithmic above 1. In brackets: "
         f"a system's own cost limit. {LIMIT}")


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


def by_rule(values, form, factor=1):
    """CELLS as text, each number in that format: one value or two themselves, of more mean and range; none: a dash."""
    show = lambda value: form.format(factor * value)
    if len(values) < 3:
        return ", ".join(map(show, values)) or "—"
    mean, low, high = map(show, (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def cell(values, name):
    """A column's values over seeds, in the table's unit."""
    return by_rule(values, FORMATS[name], FACTORS.get(name, 1))


def not_run(rows, grid):
    """What of the grid has no rows, in one line: tasks that lack the same settings together."""
    lacking = defaultdict(list)
    for task in grid.tasks:
        lacks = [entry["label"] for setting, entry in settings_on(grid, task).items()
                 if not last_step(rows, task, setting)]
        lacking["; ".join(lacks)].append(task_name(task))
    parts = [f"{', '.join(tasks)} ({labels})" if len(grid.tasks) > 1 else labels
             for labels, tasks in lacking.items() if labels]
    return f"\nNot run: {'; '.join(parts)}.\n" if parts else ""


def markdown(header, lines):
    """A table in Markdown."""
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *lines])


def table_of_settings(rows, grid):
    """A line per task and setting that was run: the last evaluation."""
    lines, steps = [], set()
    for task in grid.tasks:
        for setting, entry in grid.settings.items():
            if step := last_step(rows, task, setting):
                values = {name: last_values(rows, task, setting, name) for name in grid.panels}
                lines.append([task_name(task)] * (len(grid.tasks) > 1) + [
                    entry["label"], str(len(values[grid.panels[0]])),
                    *(cell(values[name], name) for name in grid.panels)])
                steps.add(step)
    head = ["task"] * (len(grid.tasks) > 1) + ["setting", "seeds", *(HEADINGS[name] for name in grid.panels)]
    at = " or ".join(f"{step:,}" for step in sorted(steps)) or "no"
    return markdown(head, lines) + not_run(rows, grid) + f"\nAt {at} steps. {CELLS}\n"


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
    """Table 1: a line per task and setting that was run, the paper's figures and ours, and what ours came from."""
    names, lines = ("return", "cost", "cost_rate"), []
    for task in grid.tasks:
        for setting, entry in grid.settings.items():
            if step := last_step(rows, task, setting):
                theirs = [" ± ".join(printed.get((task, name, algorithm(entry)), "—")) for name in names]
                ours = {name: last_values(rows, task, setting, name) for name in (*names, "hours")}
                flags = grid.flags | entry["flags"]
                sees = flags.get("obs-transform", "bins" if flags.get("preset") == "laptop" else "raw lidar")
                repeat = 1 if entry["script"] in WITHOUT_REPEAT else 5
                beside = [text for name, paper in zip(names, theirs) for text in (paper, cell(ours[name], name))]
                lines.append([task_name(task), entry["label"], *beside, sees, str(repeat), f"{step:,}",
                              cell(ours["hours"], "hours"), str(len(ours["return"]))])
    head = ["task", "", *(f"{who}: {HEADINGS[name]}" for name in names for who in ("paper", "ours")),
            "observations", "action repeat", "steps", "hours", "seeds"]
    return markdown(head, lines) + not_run(rows, grid) + f"\nThe paper's are after 5,000,000 steps. {CELLS}\n"


def main(options):
    """Rows from the runs, or from the csv; then picture and table."""
    grid = read_grid(options.grid, options.scale) if options.grid else None
    if not grid and not options.csv:
        raise SystemExit("--csv or --grid is needed: the table to write or to read")
    if options.paper and options.table and not grid:
        raise SystemExit("--paper and --table need --grid: it says what a run's script and flags are")
    if grid:
        beside = (options.runs[0].parent if options.runs else RESULTS) / f"{options.grid.stem}_{options.scale}"
        names = {name: getattr(options, name) or Path(f"{beside}{suffix}")
                 for name, suffix in (("csv", ".csv"), ("picture", ".png"), ("table", ".md"))}
        options = dataclasses.replace(options, **names)
    if options.runs:
        named, rows, of = lambda row: (row["exp_name"], row["env_id"], row["seed"]), [], {}
        for run_dir in options.runs:
            found = list(evaluations(run_dir, grid))
            for name, task, seed in set(map(named, found)):
                if other := of.get((name, task, seed)):
                    raise SystemExit(f"{other} and {run_dir} are two runs of {name} on {task} with seed {seed}: "
                                     "leave one of them out")
                of[name, task, seed] = run_dir
            rows += found
        if not rows:
            raise SystemExit("these run directories have no evaluation yet" + ", or are not of the grid" * bool(grid))
        others = [row for row in read_rows(options.csv) if named(row) not in of] if options.csv.exists() else []
        if others and not options.add:
            name, task, seed = named(others[0])
            raise SystemExit(f"{options.csv} has runs that are not given, such as {name} on {task} with seed {seed}: "
                             "give them too, keep their rows with --add, or remove it")
        rows = others + rows
        if grid:
            order = {name: number for number, name in enumerate(grid.settings)}  # --add keeps names of other grids too
            rows.sort(key=lambda row: (row["env_id"], order.get(row["exp_name"], len(order)), row["seed"], row["step"]))
        write_rows(options.csv, rows)
    if not (rows := read_rows(options.csv)):
        raise SystemExit(f"--csv {options.csv} has no rows")
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
        main(tyro.cli(Options, description=__doc__))
    except OSError as stopped:
        raise SystemExit(f"{stopped.filename}: {stopped.strerror}")
