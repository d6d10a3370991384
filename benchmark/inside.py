"""Inside runs: what their last episodes cost, the multiplier and the critic on the way, when training was paid for.

Pictures of what benchmark/keep.py kept of runs, and of the totals of benchmark/plot.py; benchmark/pictures.py makes
them."""

import matplotlib.pyplot as plt
import numpy as np
from budget import with_interval
from kept import played
from plot import (CELLS, LIMIT, STYLE, WIDTH, algorithm, by_rule, last_values, markdown, save, step_axis, step_text,
                  task_name)

EDGES = (0, 1, 5, 10, 25, 50, np.inf)
BINS = ("0", "1 to 4", "5 to 9", "10 to 24", "25 to 49", "50 up")
SHADES = ("tab:blue", "#7fb3d9", "#c3dcef")  # of a task's runs, three at most
LINES = ("-", "--", ":")
STRETCHES = (60_000, 120_000, 180_000, 240_000, 300_000)  # where each ends; every run was evaluated there


def by_task(runs):
    """{task: its runs, in the order of their seeds}, tasks in the order in which they come."""
    tasks = dict.fromkeys(run.args["env_id"] for run in runs)
    return {task: sorted((run for run in runs if run.args["env_id"] == task), key=lambda run: run.args["seed"])
            for task in tasks}


def share_of_episodes(costs):
    """Percent of episodes in each of BINS."""
    return 100 * np.histogram(costs, EDGES)[0] / len(costs)


def table_of_kept(runs, grid, before, grid_before, printed):
    """A line per kept run, in a grid's order: its last evaluation, beside rows of shorter runs of the same system, and
    the paper's Table 1."""
    pair = lambda values: " / ".join(values)
    lines = []
    for task in grid.tasks:
        for setting, entry in grid.settings.items():
            shorter = next((name for name, other in grid_before.settings.items()
                            if other["label"] == entry["label"]), None)
            at_first = [by_rule(last_values(before, task, shorter, name), "{:.1f}") for name in ("return", "cost")]
            theirs = [" ± ".join(printed.get((task, name, algorithm(entry)), "—")) for name in ("return", "cost")]
            for run in runs:
                if (run.args["env_id"], run.args["exp_name"]) == (task, setting):
                    returns, costs = (played(run, run.last, name) for name in ("return", "cost"))
                    rate = 1e4 * float(run.numbers[run.last]["charts/cost_rate"])
                    lines.append([task_name(task), entry["label"], str(run.args["seed"]), with_interval(returns),
                                  with_interval(costs), f"{rate:.0f}", str(len(costs)), pair(at_first), pair(theirs)])
    head = ["task", "", "seed", "return", "cost", "cost rate ×10⁴", "episodes", "300,000 steps: return / cost",
            "paper, 5,000,000 steps"]
    return markdown(head, lines) + f"\nIn brackets: 95% intervals of means over episodes. At 300,000 steps: {CELLS}\n"


def table_of_rivals(runs, labels):
    """A line per kept run of a method without a model, in the order of `labels` ({name, but for _bins: method}): its
    last evaluation by the policy's mean, and the same episodes with actions drawn."""
    lines, names = [], list(labels)
    method = lambda run: run.args["exp_name"].removesuffix("_bins")
    told = lambda episodes: [with_interval(np.array([float(row[name]) for row in episodes])) if episodes else "—"
                             for name in ("return", "cost")]
    for run in sorted((run for run in runs if method(run) in labels), key=lambda run: (
            names.index(method(run)), run.args["obs_transform"] == "bins", run.args["seed"])):
        rate = 1e4 * float(run.numbers[run.last]["charts/cost_rate"])
        lines.append([labels[method(run)], run.args["obs_transform"], str(run.args["seed"]),
                      *told(run.evaluations[run.last]), *told(run.drawn), f"{rate:.0f}"])
    head = ["", "sees", "seed", "return", "cost", "return, drawn", "cost, drawn", "training cost rate ×10⁴"]
    return markdown(head, lines) + "\nIn brackets: 95% intervals of means over episodes.\n"


@plt.rc_context(STYLE)
def draw_episode_costs(runs, path):
    """How many episodes of the last evaluation cost how much: a panel per task, bars of one shade per run."""
    tasks = by_task(runs)
    lines = -(-len(tasks) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(WIDTH, 0.5 + 2.3 * lines), squeeze=False, sharey=True,
                                layout="constrained")
    for axis, (task, seeds) in zip(axes.ravel(), tasks.items()):
        width = 0.85 / len(seeds)
        for number, run in enumerate(seeds):
            costs = played(run, run.last, "cost")
            bars = axis.bar(np.arange(len(BINS)) + (number + 0.5) * width - 0.425, share_of_episodes(costs), width,
                            color=SHADES[number], label=f"seed {run.args['seed']}: mean {np.mean(costs):.1f}, worst "
                            f"{max(costs):g}, {len(costs)} episodes")
            axis.bar_label(bars, fmt="{:.0f}", fontsize=7)
        axis.axvline(3.5, ymax=0.7, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{task_name(task)}, {run.last:,} steps")
        axis.set(ylim=(0, 125), yticks=range(0, 101, 20), xlabel="cost of an episode")
        axis.set_xticks(range(len(BINS)), BINS)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(loc="upper right")
    for axis in axes.ravel()[len(tasks):]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("% of episodes")
    save(figure, path, f"Each run's last evaluation. A simulator step that costs, costs 1. {LIMIT}")


@plt.rc_context(STYLE)
def draw_multiplier_and_critic(runs, path):
    """Over runs: the multiplier, and the cost critic's value read beside the cost that followed; a column per task."""
    tasks = by_task(runs)
    figure, axes = plt.subplots(3, len(tasks), figsize=(WIDTH, 6.6), squeeze=False, sharey="row", layout="constrained")
    for column, (task, seeds) in zip(axes.T, tasks.items()):
        top, *below = column
        for run, line in zip(seeds, LINES[:len(seeds)], strict=True):
            curve = lambda tag: zip(*((step, float(row[tag])) for step, row in run.numbers.items() if row[tag]))
            look = {"linestyle": line, "linewidth": 0.9}
            top.plot(*curve("lagrangian/lambda"), color="black", marker=".", markersize=4, **look,
                     label=f"seed {run.args['seed']}")
            for axis, where in zip(below, ("before_1", "outside")):
                for what, label, color, marker in (("followed", "discounted cost that followed", "tab:orange", "s"),
                                                   ("read", "Qᶜ read there", "tab:blue", "o")):
                    axis.plot(*curve(f"critic/{what}_{where}"), color=color, marker=marker, markersize=3, **look,
                              label=label if run is seeds[0] else None)
        top.set_title(task_name(task), fontweight="bold")
        top.legend(loc="lower right")
        for axis in column:
            step_axis(axis, 0, max(run.last for run in seeds), False)
        column[-1].set_xlabel("simulator steps")
    for axis, label in zip(axes[:, 0], ("multiplier λ", "one agent step\nbefore costs begin",
                                        "agent steps\nwithout cost before")):
        axis.set_ylabel(label)
        axis.set_ylim(0, None)
    figure.legend(*axes[1, -1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    save(figure, path, "Each line: one seed. Each mark: an evaluation of 10 episodes; none where nothing cost."
         " A critic that is right has blue and orange in one place. The agent enters what it overlooks: there Qᶜ reads "
         "too little.")


def costs_by_stretch(totals):
    """What was paid in each of STRETCHES, from what all training had cost until then, {step: total}."""
    return np.diff([0, *(totals[step] for step in STRETCHES)])


@plt.rc_context(STYLE)
def draw_training_costs(agents, path):
    """What training cost, stacked by stretches of steps: of each (label, {seed: {step: total}}) a bar for each of two
    seeds, or one for the mean of more."""
    bars, place = [], 0.0  # (place, costs, label)
    for label, seeds in agents:
        costs = [costs_by_stretch(totals) for totals in seeds.values()]
        many = len(costs) >= 3
        for number, paid in enumerate([np.mean(costs, axis=0)] if many else costs):
            name = f"{label}, mean of {len(costs)} seeds" if many else label
            bars.append((place, paid, "" if number else name))
            place += 0.9
        place += 0.4
    figure, axis = plt.subplots(figsize=(WIDTH, 1.0 + 0.2 * place), layout="constrained")
    places, paid, labels = zip(*bars)
    paid = np.array(paid)  # (bars, stretches)
    left = np.zeros(len(bars))
    for costs, end, before, color in zip(paid.T, STRETCHES, (0, *STRETCHES), ("C3", "C1", "C8", "C2", "C0")):
        axis.barh(places, costs, left=left, color=color, height=0.8,
                  label=f"{step_text(before)} to {step_text(end)} steps")
        left += costs
    for place, costs in zip(places, paid):
        share = 100 * costs[0] / costs.sum()
        axis.text(costs.sum() + 300, place, f"{costs.sum():,.0f}, {share:.0f}% in the first fifth", va="center",
                  fontsize=7.5)
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.35 * left.max()), xlabel="cost of all training")
    axis.xaxis.set_major_formatter(lambda cost, _: f"{cost:,.0f}")
    axis.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=5, fontsize=7.5)
    save(figure, path, "Two seeds: a bar for each. Three or more: a bar for the mean. The number: the whole bar, and "
         "how much of it the first 60,000 of 300,000 steps cost.")
