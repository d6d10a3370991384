"""Every picture of benchmark/results/ again, and every table of docs/results/ into its page, from the csv files there.

    python benchmark/pictures.py                              # all
    python benchmark/pictures.py fig6_two_cores.png fig6.md   # some

PICTURES and TABLES say what is made of what; NOT_MADE which pictures are not made here, and why."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import budget
import inside
import latency
import plot
import speed
import tyro
from grid import read_grid
from kept import read_kept
from plot import RESULTS

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "results"
FIGURES = ("fig3", "fig4", "fig6", "fig7", "fig8", "fig9")
THREE = ("return", "cost", "cost_rate")  # for agents that never plan, or always
LEARNING = {  # csv of learning curves: title, panels, names for people of the runs to draw; a cost limit other than 25
    "laptop": ("The laptop preset", plot.PANELS[:4], {
        "laptop": "the preset", "larger planner": "the preset with twice the planner"}),
    **{f"laptop_{task}": ("With and without the multiplier", plot.PANELS[:4], {
        "laptop": "SPOWL", "lambda0": "without the multiplier (λ = 0)"})
       for task in ("CarGoal1", "PointGoal2", "PointButton1", "PointPush1")},
    "laptop_ablation": ("What matters in the preset", plot.PANELS[:4], {
        "laptop": "the preset", "larger planner": "twice the planner",
        "larger planner 3 steps deep": "twice the planner's samples",
        "larger planner with paper's cost discount": "twice the planner, paper's cost discount",
        "larger planner with symlog read-out": "twice the planner, symlog read-out",
        "larger planner with log lidar": "twice the planner, log lidar",
        "larger planner with raw lidar": "twice the planner, raw lidar", **{
            name: name for name in ("7 steps deep", "10 steps deep", "raw lidar", "paper's cost discount")}}),
    "laptop_controller": ("A controller in the place of the ramp", plot.PANELS[:4], {
        "laptop": "the ramp", "controller": "the controller"}),
    "laptop_default_lagrangian": ("The recipe before", plot.PANELS[:4], {
        "laptop_default_lagrangian": "the paper's schedule"}),
    "laptop_lagrangian_trials": ("Three faster multipliers", plot.PANELS[:4], {
        "slow_ramp": "slow ramp", "steep_ramp": "steep ramp", "max_targets": "max targets"}),
    "laptop_trials": ("Trials with log lidar", plot.PANELS[:4], {
        "annealed_step_sizes": "step sizes that fall to 0", "cost_gamma_0.9": "a cost horizon of 10 steps",
        "cost_weights_1": "cost losses ten times as heavy",
        "cost_weights_1_plans_of_6": "heavy cost losses, plans of 6 steps",
        "cost_weights_1_update_per_step": "heavy cost losses, an update per step",
        "early_ramp": "the ramp twice as early",
        "more_updates_smaller_planner": "an update per step, smaller planner", "plan_horizon_3": "plans of 3 steps"}),
    "tdmpc2_laptop": ("TD-MPC2", THREE, {"TD-MPC2 laptop": "laptop preset"}),
    "safedreamer_laptop": ("SafeDreamer", THREE, {
        "laptop_safedreamer": "BSRP-Lag", "laptop_safedreamer_osrp": "OSRP-Lag",
        "laptop preset": "BSRP-Lag before, with half the updates",
        "osrp_lag": "OSRP-Lag before, with half the updates",
        "osrp_lag, pid-max 0.1": "the same with the paper's cap on λ"}),
    "cpo_25": ("CPO, cost limit 25", THREE, {
        "cpo_25": "5M steps", "cpo_25_bins": "5M steps, from bins", "cpo_25_5M": "5M steps, observations not clipped",
        "short_cpo_25": "2M steps, one on to 5M, not clipped"}),
    "cvpo_25": ("CVPO, cost limit 25", THREE, {
        "cvpo_25": "5M steps", "cvpo_25_bins": "5M steps, from bins", "short_cvpo_25": "2M steps"}),
    "ppo_lagrangian_2": ("PPO-Lagrangian, cost limit 2", THREE, {
        "ppo_lagrangian_2": "5M steps", "ppo_lagrangian_2_fast": "5M steps, a multiplier three times as fast",
        "ppo_lagrangian_2_fast_bins": "5M steps, as fast, from bins",
        "short_ppo_lagrangian_2": "2M steps, observations not clipped"}, 2),
    "ppo_lagrangian_25": ("PPO-Lagrangian, cost limit 25", THREE, {
        "ppo_lagrangian_25": "5M steps", "ppo_lagrangian_25_bins": "5M steps, from bins",
        "ppo_lagrangian_25_5M": "5M steps, observations not clipped",
        "short_ppo_lagrangian_25": "2M steps, not clipped"}),
}
RIVALS = {  # methods without a model: names of runs, but for "_bins" at the end
    "ppo_lagrangian_25": "PPOLag(25)", "cpo_25": "CPO(25)", "cvpo_25": "CVPO(25)",
    "ppo_lagrangian_2": "PPOLag(2)", "ppo_lagrangian_2_fast": "PPOLag(2), faster multiplier"}
POINT_GOAL = "SafetyPointGoal1-v0"  # the task of the rivals and of the lengths
LENGTHS = {  # the preset on PointGoal1: names of runs, and for how long they were trained
    "laptop": "300,000 steps", "laptop_500k": "500,000 steps", "spowl": "1,000,000 steps"}
NOT_MADE = {"safedreamer_vision.png": "camera images of a simulator and what a trained agent makes of them"}


@dataclass(frozen=True)
class Options:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """pictures to draw and pages to give their table (default: all)"""


def rows_of(name):
    """The rows of the kept runs of other methods, and those of a csv."""
    return plot.read_rows(RESULTS / "rivals") + plot.read_rows(RESULTS / f"{name}.csv")


def two_cores(name):
    """A grid and its rows."""
    return rows_of(f"{name}_two_cores"), read_grid(HERE / "grids" / f"{name}.yaml", "two_cores")


def million(name):
    """Kept runs of a million steps and that grid of those tasks that have some."""
    rows, grid = plot.read_rows(RESULTS / "million"), read_grid(HERE / "grids" / f"{name}.yaml", "million")
    ran = {row["env_id"] for row in rows}
    tasks = tuple(task for task in grid.tasks if task in ran)
    return rows, grid._replace(title=f"{grid.title}: a million steps", tasks=tasks)


def spowl_million():
    """SPOWL's runs of a million steps, in the order of Table 1's tasks."""
    tasks = million("table1")[1].tasks
    runs = [run for run in read_kept(RESULTS / "million") if run.args["exp_name"] == "spowl"]
    return sorted(runs, key=lambda run: tasks.index(run.args["env_id"]))


def lengths():
    """The preset on PointGoal1, trained for longer and longer: rows and grid."""
    rows = [row for name in ("laptop.csv", "length", "million") for row in plot.read_rows(RESULTS / name)
            if row["env_id"] == POINT_GOAL and row["exp_name"] in LENGTHS]
    return rows, plot.grid_of(rows, "The preset over three lengths", plot.PANELS[:4], LENGTHS)


def rivals():
    """Methods without a model on PointGoal1: rows and grid in which a method stands for a task, what it sees for a
    setting; those that have seen both. And the cost limit of each."""
    rows = []
    for row in plot.read_rows(RESULTS / "rivals"):
        name, bins, _ = row["exp_name"].partition("_bins")
        if name in RIVALS and row["env_id"] == POINT_GOAL:
            rows.append(row | {"env_id": RIVALS[name], "exp_name": "bins" if bins else "raw"})
    seen = {(row["env_id"], row["exp_name"]) for row in rows}
    methods = tuple(method for method in RIVALS.values() if {(method, "raw"), (method, "bins")} <= seen)
    grid = plot.grid_of(rows, "What a method sees: PointGoal1", THREE, {"raw": "raw lidar", "bins": "bins, as SPOWL"})
    return rows, grid._replace(tasks=methods), {method: 2 if "(2)" in method else 25 for method in methods}


def draw_grid(name, path):
    """Learning curves of a grid."""
    plot.draw(*two_cores(name), path, 25)


def draw_rivals(path):
    """Learning curves of what `rivals` has."""
    rows, grid, limits = rivals()
    plot.draw(rows, grid, path, limits)


def draw_learning(name, path):
    """Learning curves of an entry of LEARNING."""
    title, panels, labels, limit = (*LEARNING[name], 25)[:4]
    rows = [row for row in rows_of(name) if row["exp_name"] in labels]
    plot.draw(rows, plot.grid_of(rows, title, panels, labels), path, limit)


def training_costs():
    """(label, {seed: {step: cost of all training so far}}) on each task, with and without a constraint."""
    rows, grid = two_cores("table1")
    for task in grid.tasks:
        name = plot.task_name(task)
        yield f"{name}: SPOWL", plot.by_seed(rows, task, "laptop", "total_cost")
        if name == "PointGoal1":
            yield f"{name}: TD-MPC2, no constraint", plot.by_seed(rows, task, "laptop_tdmpc2", "total_cost")
        else:
            without = plot.read_rows(RESULTS / f"laptop_{name}.csv")
            yield f"{name}: SPOWL, λ = 0", plot.by_seed(without, task, "lambda0", "total_cost")


def paper():
    """The paper's Table 1."""
    return plot.read_paper(HERE / "paper_table1.csv")


PICTURES = {  # file: what draws it to a path
    **{f"{name}_two_cores.png": partial(draw_grid, name) for name in (*FIGURES, "table1")},
    **{f"{name}.png": partial(draw_learning, name) for name in LEARNING},
    "table1_two_cores_tradeoff.png": lambda path: plot.draw_tradeoff(*two_cores("table1"), path, paper()),
    "budget.png": lambda path: budget.draw(path, budget.read_runs(RESULTS / "budget")),
    "million.png": lambda path: plot.draw(*million("table1"), path, 25),
    "rivals.png": draw_rivals,
    "length.png": lambda path: plot.draw(*lengths(), path, 25),
    "episode_costs.png": lambda path: inside.draw_episode_costs(spowl_million(), path),
    "lambda_and_critic.png": lambda path: inside.draw_multiplier_and_critic(spowl_million(), path),
    "training_costs.png": lambda path: inside.draw_training_costs(list(training_costs()), path),
    "latency.png": partial(latency.draw, RESULTS / "latency.csv"),
    "speed_two_cores.png": lambda path: speed.draw(speed.read_rows(RESULTS / "speed_two_cores.csv"), path),
}
TABLES = {  # page: what gives the text between its markers, which are named after it
    **{f"{name}.md": lambda name=name: plot.table_of_settings(*two_cores(name)) for name in FIGURES},
    "table1.md": lambda: plot.table_beside_paper(*two_cores("table1"), paper()),
    "million.md": lambda: inside.table_of_kept(
        read_kept(RESULTS / "million"), million("table1")[1], *two_cores("table1"), paper()),
    "laptop.md": lambda: plot.table_of_settings(*lengths()),
    "rivals.md": lambda: inside.table_of_rivals(
        [run for run in read_kept(RESULTS / "rivals") if run.args["env_id"] == POINT_GOAL], RIVALS),
    "budget.md": lambda: budget.table_of_budgets(budget.read_runs(RESULTS / "budget")),
}


def between_markers(text, name, table):
    """A page's text with the table between <!-- name --> and <!-- end -->; SystemExit where it has no such place."""
    begin = f"<!-- {name} -->\n"
    place = re.compile(re.escape(begin) + ".*?<!-- end -->", re.DOTALL)
    page, found = place.subn(lambda _: f"{begin}{table}<!-- end -->", text)
    if found != 1:
        raise SystemExit(f"a page has {found} places for the table between {begin.strip()} and <!-- end -->")
    return page


def main(options):
    """All pictures and tables, or those named."""
    for name in options.names:
        if name not in (*PICTURES, *TABLES):
            raise SystemExit(f"{name} is not made here; known are {', '.join((*PICTURES, *TABLES))}")
    chosen = options.names or (*PICTURES, *TABLES)
    for name in PICTURES:
        if name in chosen:
            PICTURES[name](RESULTS / name)
    for name in TABLES:
        if name in chosen:
            page = DOCS / name
            page.write_text(between_markers(page.read_text(), page.stem, TABLES[name]()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
