"""benchmark/plot.py: from runs to rows, means and intervals over seeds, tables, what is drawn of how many seeds."""
import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from tensorboard.summary import Writer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import plot
from grid import Grid, read_grid

PAPER = ROOT / "benchmark" / "paper_table1.csv"


def row(exp_name, seed, step, reward, cost, rate=0.05, balance=0.6, env_id="SafetyPointGoal1-v0"):
    return {"exp_name": exp_name, "env_id": env_id, "seed": seed, "step": step, "episodes": 10, "return": reward,
            "return_std": 0.0, "cost": cost, "cost_std": 0.0, "cost_rate": rate, "balance": balance,
            "no_improvement": 0.25, "hours": 0.5 * step}


ROWS = [row("full", 1, 50, 10.0, 60.0), row("full", 1, 100, 20.0, 40.0, 0.04, 0.5),
        row("full", 2, 50, 14.0, 50.0), row("full", 2, 100, 23.0, 50.0, 0.05, 0.7),
        row("full", 3, 50, 99.0, 99.0), row("other", 1, 100, -0.04, 0.0, 0.0133, 1.0)]
GRID = Grid("a title", ("return", "cost", "cost_rate", "balance"), ("SafetyPointGoal1-v0",), (1, 2, 3),
            {"total-timesteps": 100},
            {name: {"label": label, "script": script, "flags": flags} for name, label, script, flags in (
                ("full", "full agent", "spowl_continuous.py", {"preset": "laptop"}),
                ("absent", "nobody ran it", "baselines/cpo.py", {}), ("other", "other", "baselines/cpo.py", {}))})


# ----------------------------------------------------------------------------------------------------------------------
# Over seeds
# ----------------------------------------------------------------------------------------------------------------------
def test_a_mean_is_of_the_same_runs_at_every_step():
    """Seeds evaluated at other steps too, one of them stopped early: only where all that came so far have a value."""
    seeds = {1: {60: 0.0, 120: 0.0, 180: 0.0}, 2: {20: 0.0, 60: 0.0, 120: 0.0, 160: 0.0, 180: 0.0},
             3: {60: 0.0, 120: 0.0, 180: 0.0}, 4: {60: 0.0}}
    assert plot.shared_steps(seeds) == [60, 120, 180]
    assert plot.shared_steps({seed: seeds[seed] for seed in (1, 2)}) == []  # two seeds have no mean


def test_interval_of_five_seeds_by_hand():
    """Mean 5, squares of 4, 1, 0, 1, 4 over 4 degrees of freedom: 5 +- 2.776 sqrt(2.5 / 5)."""
    assert plot.interval(np.array([3.0, 4.0, 5.0, 6.0, 7.0])) == pytest.approx((5 - 1.963, 5 + 1.963), abs=1e-3)
    assert plot.interval(np.zeros(5)) == (0.0, 0.0)


def test_interval_of_many_seeds_is_the_normal_one():
    """Of 400 values the t distribution is all but normal."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = plot.interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert np.allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------
def test_numbers_over_seeds():
    """None, one, two: as they are, in the order of the seeds; three: (20.04 + 24.8 + 25) / 3 = 23.28, and the range."""
    values = np.array([20.04, 24.8, 25.0])
    assert [plot.by_rule(values[:count], "{:.1f}") for count in range(4)] == [
        "—", "20.0", "20.0, 24.8", "23.3 (20.0 to 25.0)"]
    assert plot.cell(np.array([0.0123, 0.02, 0.0177]), "cost_rate") == "167 (123 to 200)"  # 0.05 / 3 = 0.016667
    assert plot.cell(np.array([1.0, 1.0, 1.0]), "balance") == "100%"


def test_table_of_settings_by_hand():
    """Seed 3 did not reach the last step and does not count; what is missing stands in one line at the end."""
    lines = plot.table_of_settings(ROWS, GRID).splitlines()
    assert lines[2:] == ["| full agent | 2 | 20.0, 23.0 | 40.0, 50.0 | 400, 500 | 50%, 70% |",
                         "| other | 1 | -0.0 | 0.0 | 133 | 100% |", "", "Not run: nobody ran it.", "",
                         f"At 100 steps. {plot.CELLS}"]


def test_settings_that_ended_elsewhere():
    """Each at its own last step; all were run."""
    lines = plot.table_of_settings([*ROWS, row("absent", 1, 250, 7.0, 8.0)], GRID).splitlines()
    assert lines[3] == "| nobody ran it | 1 | 7.0 | 8.0 | 500 | 60% |" and lines[-1].startswith("At 100 or 250 steps.")
    assert not any("Not run" in line for line in lines)


def test_what_was_not_run_by_task():
    """Tasks that lack the same stand together; what is not meant for a task does not lack there."""
    elsewhere = {"label": "elsewhere", "tasks": ["SafetyDoggoGoal1-v0"]}
    grid = GRID._replace(tasks=(*GRID.tasks, "SafetyCarGoal1-v0", "SafetyPointPush1-v0"),
                         settings=GRID.settings | {"elsewhere": elsewhere})
    assert plot.not_run(ROWS, grid) == (
        "\nNot run: PointGoal1 (nobody ran it); CarGoal1, PointPush1 (full agent; nobody ran it; other).\n")


def test_table_beside_the_paper():
    """The paper's figures by a label up to its comma; what an agent sees and repeats, by its script and flags."""
    labels = {"full": "SPOWL, ours", "absent": "CPO(25)", "other": "nobody's"}
    grid = GRID._replace(settings={name: GRID.settings[name] | {"label": label} for name, label in labels.items()})
    lines = plot.table_beside_paper(ROWS, grid, plot.read_paper(PAPER)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-4]]
    assert cells[0] == ["task", "", "paper: return", "ours: return", "paper: cost", "ours: cost",
                        "paper: cost rate ×10⁴", "ours: cost rate ×10⁴", "observations", "action repeat", "steps",
                        "hours", "seeds"]
    assert cells[2:] == [
        ["PointGoal1", "SPOWL, ours", "26.9 ± 0.4", "20.0, 23.0", "1.5 ± 1.1", "40.0, 50.0", "133 ± 2", "400, 500",
         "bins", "5", "100", "50.0, 50.0", "2"],
        ["PointGoal1", "nobody's", "—", "-0.0", "—", "0.0", "—", "133", "raw lidar", "1", "100", "50.0", "1"]]
    assert lines[-3:] == ["Not run: CPO(25).", "", f"The paper's are after 5,000,000 steps. {plot.CELLS}"]


@pytest.mark.parametrize("scale", ["two_cores", "paper"])
def test_what_agents_see_and_repeat_is_what_their_scripts_do(scale):
    """Table 1's columns against the scripts' own defaults and presets."""
    grid = read_grid(ROOT / "benchmark" / "grids" / "table1.yaml", scale)
    rows = [row(name, 1, 100, 0.0, 0.0) for name in grid.settings]
    table = plot.table_beside_paper(rows, grid._replace(tasks=("SafetyPointGoal1-v0",)), {}).splitlines()[2:]
    for (_, entry), line in zip(grid.settings.items(), table):
        script = importlib.import_module(entry["script"].removesuffix(".py").replace("/", "."))
        flags = vars(script.Args()) | getattr(script, "PRESETS", {}).get(entry["flags"].get("preset"), {})
        transform = entry["flags"].get("obs-transform", flags["obs_transform"])
        sees = {"bins": "bins", "raw": "raw lidar"}[transform]
        assert f"| {sees} | {flags['action_repeat']} |" in line


def test_cost_of_all_training():
    """The cost rate times the steps."""
    assert plot.by_seed(ROWS, GRID.tasks[0], "full", "total_cost") == {1: {50: 2.5, 100: 4.0}, 2: {50: 2.5, 100: 5.0},
                                                                       3: {50: 2.5}}


def drawn_by(monkeypatch, draw, *arguments):
    """The figure that a function drew."""
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    draw(*arguments)
    return figures[0]


def test_tradeoffs(tmp_path, monkeypatch):
    """A mark for each of two seeds, of three their mean too; hollow the paper's; none for what is not there. The legend
    says all numbers of steps. A system's second setting has no hollow mark, and where it was not run no entry."""
    labels = {"full": "SPOWL", "absent": "CPO(25)", "other": "x", "again": "CPO(25), bins", "more": "SPOWL, more"}
    grid = GRID._replace(
        settings={name: GRID.settings.get(name, {}) | {"label": label} for name, label in labels.items()},
        tasks=(*GRID.tasks, "SafetyCarGoal1-v0"))
    rows = [*ROWS, row("other", 2, 100, 3.0, 6.0), row("other", 3, 100, 6.04, 3.0),  # means 3.0 and 3.0
            row("full", 1, 60, 1.0, 1.0, env_id="SafetyCarGoal1-v0"), row("more", 1, 100, 5.0, 2.0)]
    figure = drawn_by(monkeypatch, plot.draw_tradeoff, rows, grid, tmp_path / "p.png", plot.read_paper(PAPER))
    marks = [line for line in figure.axes[0].lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    points = [[line.get_xydata().tolist() for line in marks if (line.get_fillstyle() == "none") == hollow]
              for hollow in (False, True)]
    assert points[0][0] == [[40.0, 20.0], [50.0, 23.0]]
    assert np.allclose(points[0][1], [[3.0, 3.0]]) and points[0][2] == [[0.0, -0.04], [6.0, 3.0], [3.0, 6.04]]
    assert points[0][3:] == [[[2.0, 5.0]]] and points[1] == [[[1.5, 26.9]], [[31.0, 19.2]]]
    texts = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert texts[:3] == ["SPOWL: 100 or 60 steps", "CPO(25): not run", "x: 100 steps"]
    assert texts[3:] == ["SPOWL, more: 100 steps", "hollow: the paper's, 5,000,000 steps"]


@pytest.mark.parametrize("seeds, thick, band", [(1, 0, 0), (2, 0, 0), (3, 1, 0), (4, 1, 0), (5, 1, 1)])
def test_what_is_drawn_of_how_many_seeds(seeds, thick, band, tmp_path, monkeypatch):
    """Thin lines always, a mean from three seeds on, a band from five on; ten and fifty episodes differ."""
    rows = [row("full", seed, step, seed + step, 1.0) | {"episodes": 50 if step == 100 else 10}
            for seed in range(seeds) for step in (50, 100)]
    figure = drawn_by(monkeypatch, plot.draw, rows, GRID, tmp_path / "p.png", 25)
    axis = figure.axes[0]
    plain = [line for line in axis.lines if line.get_marker() == "None"]
    widths = [line.get_linewidth() for line in plain if line.get_linestyle() == "-"]
    assert sorted(widths) == [1.0] * seeds + [2.2] * thick and len(axis.collections) == band
    marks = {line.get_marker(): line.get_xdata() for line in axis.lines if line.get_marker() != "None"}
    assert marks == {".": [50], "o": [100]}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"full agent: {seeds} seed" + "s" * (seeds > 1)]
    assert figure.legends[0].get_title().get_text() == "PointGoal1"
    assert "25: the cost limit that OmniSafe" in " ".join(figure.get_supxlabel().split())


def test_short_runs_beside_long_ones(tmp_path, monkeypatch):
    """Logarithmic where one setting ends after more than four times the steps of another."""
    for last, scale in ((1_200_000, "linear"), (2_000_000, "log")):
        rows = [row("full", 1, 300_000, 1.0, 1.0), row("other", 1, last, 1.0, 1.0)]
        figure = drawn_by(monkeypatch, plot.draw, rows, GRID, tmp_path / "p.png", 25)
        assert {axis.get_xscale() for axis in figure.axes} == {scale}


@pytest.mark.parametrize("cost_line, drawn, told", [
    (25, ([25], [25]), "Dashed at 25: the cost limit that OmniSafe's baselines use."), (0, ([], []), ""),
    (2, ([2], [2]), "Dashed: the cost limit."), ({"a": 25, "b": 2}, ([25], [2]), "Dashed: the cost limit.")])
def test_cost_limit_of_each_task(cost_line, drawn, told, tmp_path, monkeypatch):
    """A dashed line in the costs' panel alone, at one limit for all tasks or at each one's; what it is said to be."""
    rows = [row("full", 1, step, 1.0, 1.0, env_id=task) for task in "ab" for step in (50, 100)]
    grid = GRID._replace(tasks=("a", "b"), panels=("return", "cost"))
    figure = drawn_by(monkeypatch, plot.draw, rows, grid, tmp_path / "p.png", cost_line)
    dashed = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert dashed == [[], drawn[0], [], drawn[1]]
    assert " ".join(figure.get_supxlabel().split()).partition("Dashed")[1:] == told.partition("Dashed")[1:]


def test_the_papers_table_is_whole():
    """Seven tasks, three metrics, seven algorithms, each once."""
    with open(PAPER, newline="") as file:
        rows = list(csv.DictReader(file))
    for name, number in (("env_id", 7), ("metric", 3), ("algorithm", 7)):
        assert len({line[name] for line in rows}) == number
    assert len({(line["env_id"], line["metric"], line["algorithm"]) for line in rows}) == len(rows) == 147
    assert all(float(line["std"]) >= 0 and np.isfinite(float(line["mean"])) for line in rows)


# ----------------------------------------------------------------------------------------------------------------------
# From runs to rows
# ----------------------------------------------------------------------------------------------------------------------
def make_run(path, seed=1):
    """A run directory with two evaluations, the first of them logged twice, as after a kill."""
    path.mkdir()
    (path / "args.json").write_text(json.dumps({"args": {"exp_name": "full", "env_id": "task", "seed": seed}}))
    with open(path / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("split", "step", "environment", "return", "cost", "length"),
                                    ("train", 90, 0, 1.0, 2.0, 1000), ("eval", 100, 0, 3.0, 10.0, 1000),
                                    ("eval", 100, 1, 5.0, 30.0, 1000), ("eval", 200, 0, 8.0, 0.0, 1000)])
    writer = Writer(str(path))
    for step, balance, rate in ((100, 0.9, 0.5), (100, 0.25, 0.125), (200, 0.75, 0.0625)):
        writer.add_scalar("eval/balance", balance, step)
        writer.add_scalar("charts/cost_rate", rate, step)
        writer.add_scalar("planner/no_improvement", 2 * balance, step)
    writer.close()
    return path


def test_rows_of_a_run(tmp_path):
    first, second = plot.evaluations(make_run(tmp_path / "run"))
    assert first == {"exp_name": "full", "env_id": "task", "seed": 1, "step": 100, "episodes": 2, "return": 4.0,
                     "return_std": 1.0, "cost": 20.0, "cost_std": 10.0, "cost_rate": 0.125, "balance": 0.25,
                     "no_improvement": 0.5, "hours": pytest.approx(float("nan"), nan_ok=True)}
    assert (second["step"], second["episodes"], second["return"], second["balance"]) == (200, 1, 8.0, 0.75)
    first["hours"] = second["hours"] = 0.5
    plot.write_rows(tmp_path / "rows.csv", [first, second])
    assert plot.read_rows(tmp_path / "rows.csv") == [first, second]


def test_a_judged_run_and_its_hours(tmp_path):
    """--evaluate's episodes stand for those of the same step, in balance too; hours are of the last checkpoint."""
    run_dir = make_run(tmp_path / "run")
    with open(run_dir / "evaluation.csv", "w", newline="") as file:
        csv.writer(file).writerows([("split", "step", "environment", "return", "cost", "length", "balance"),
                                    ("eval", 200, 0, 6.0, 1.0, 1000, 0.5), ("eval", 200, 1, 7.0, 4.0, 1000, 0.25)])
    np.savez(run_dir / "checkpoint_200.npz", counters=np.array(json.dumps({"wall_time": 5400.0})))
    first, second = plot.evaluations(run_dir)
    assert (first["return"], first["episodes"], first["balance"]) == (4.0, 2, 0.25) and np.isnan(first["hours"])
    assert second["balance"] == 0.375  # of the two; TensorBoard's 0.75 is of the evaluation in training
    assert (second["return"], second["cost"], second["episodes"], second["hours"]) == (6.5, 2.5, 2, 1.5)
    (run_dir / "checkpoint_200.npz").write_bytes(b"PK")
    assert np.isnan(list(plot.evaluations(run_dir))[1]["hours"])


def test_what_a_script_does_not_log_and_older_tables_lack_is_not_a_number(tmp_path):
    """policy-only has no planner; the columns came later than the first tables."""
    rows = list(plot.evaluations(make_run(tmp_path / "run")))
    for line in rows:
        line["no_improvement"] = float("nan")
    plot.write_rows(tmp_path / "rows.csv", rows)
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "older.csv").write_text("".join(line.rsplit(",", 2)[0] + "\n" for line in text.splitlines()))
    for path in (tmp_path / "rows.csv", tmp_path / "older.csv"):
        read = plot.read_rows(path)
        assert len(read) == 2 and all(np.isnan(line.pop(name)) for line in read for name in plot.LATER)
        assert read == [{name: line[name] for name in line if name not in plot.LATER} for line in rows]


def test_a_run_that_has_just_begun_has_no_rows(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "episodes.csv").unlink()
    assert list(plot.evaluations(run_dir)) == [] and not (run_dir / "episodes.csv").exists()
    (tmp_path / "rows.csv").write_text("earlier results")
    with pytest.raises(SystemExit, match="no evaluation yet"):
        plot.main(plot.Options(csv=tmp_path / "rows.csv", runs=(run_dir,)))
    assert (tmp_path / "rows.csv").read_text() == "earlier results"


def test_an_evaluation_whose_events_found_no_room(tmp_path):
    run_dir = make_run(tmp_path / "run")
    for path in run_dir.glob("events*"):
        path.write_bytes(b"")
    rows = list(plot.evaluations(run_dir))
    assert [line["return"] for line in rows] == [4.0, 8.0]
    assert all(np.isnan([line["balance"], line["cost_rate"], line["no_improvement"]]).all() for line in rows)


def test_a_missing_directory_is_named(tmp_path):
    words = [sys.executable, ROOT / "benchmark" / "plot.py", "--csv", tmp_path / "none" / "rows.csv",
             make_run(tmp_path / "run")]
    finished = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.strip() == f"{tmp_path / 'none' / 'rows.csv'}: No such file or directory"


def test_the_same_run_twice_is_refused(tmp_path):
    """Also where they were evaluated at other steps."""
    runs = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    for line in "eval,300,0,3.0,10.0,1000", "eval,100,0,3.0,10.0,1000":
        (runs[1] / "episodes.csv").write_text(f"split,step,environment,return,cost,length\n{line}\n")
        with pytest.raises(SystemExit, match="one and .*two are two runs of full on task with seed 1"):
            plot.main(plot.Options(csv=tmp_path / "rows.csv", runs=runs))
        assert not (tmp_path / "rows.csv").exists()


def test_runs_of_several_machines_gather_in_one_table(tmp_path):
    """--add replaces a run that is in the table by the one given and leaves the others."""
    first, second, table = make_run(tmp_path / "1"), make_run(tmp_path / "2", seed=2), tmp_path / "rows.csv"
    for run_dir in (first, second):
        plot.main(plot.Options(csv=table, runs=(run_dir,), add=True))
    (first / "episodes.csv").write_text("split,step,environment,return,cost,length\neval,300,0,9.0,1.0,1000\n")
    plot.main(plot.Options(csv=table, runs=(first,), add=True))
    assert [(line["seed"], line["step"], line["return"]) for line in plot.read_rows(table)] == [
        (2, 100, 4.0), (2, 200, 8.0), (1, 300, 9.0)]
    grid = tmp_path / "grid.yaml"  # which does not know the runs that are in the table already
    grid.write_text("title: t\ntasks: [task]\nscales:\n  two_cores: {seeds: [1]}\n"
                    "settings:\n  new: {label: n, script: s}\n")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "args.json").write_text(json.dumps({"args": {"exp_name": "new", "env_id": "task", "seed": 1}}))
    (tmp_path / "3" / "episodes.csv").write_text((first / "episodes.csv").read_text())
    plot.main(plot.Options(csv=table, runs=(tmp_path / "3",), add=True, grid=grid, picture=tmp_path / "p.png",
                           table=tmp_path / "t.md"))
    assert [(line["exp_name"], line["seed"]) for line in plot.read_rows(table)] == [
        ("new", 1), ("full", 1), ("full", 2), ("full", 2)]


def test_a_grids_files_stand_beside_its_runs(tmp_path):
    """Not over the committed ones, where none is named."""
    (tmp_path / "runs").mkdir()
    run_dir, grid = make_run(tmp_path / "runs" / "one"), tmp_path / "mine.v2.yaml"
    grid.write_text("title: t\ntasks: [task]\nscales:\n  two_cores: {seeds: [1]}\n"
                    "settings:\n  full: {label: n, script: s}\n")
    plot.main(plot.Options(runs=(run_dir,), grid=grid, table=tmp_path / "t.md"))
    assert {path.name for path in run_dir.parent.iterdir()} == {"one", "mine.v2_two_cores.csv", "mine.v2_two_cores.png"}
    assert (tmp_path / "t.md").exists()
    with pytest.raises(SystemExit, match="--paper and --table need --grid"):
        plot.main(plot.Options(csv=run_dir.parent / "mine.v2_two_cores.csv", paper=PAPER, table=tmp_path / "t.md"))
    with pytest.raises(SystemExit, match="has no rows"):
        plot.main(plot.Options(csv=tmp_path, picture=tmp_path / "p.png"))  # a folder in which nothing is kept


def test_no_row_is_replaced_by_nothing(tmp_path):
    """Runs that are in the table and not given, or a grid to which no run given belongs: refused, the table stays."""
    first, second, table = make_run(tmp_path / "1"), make_run(tmp_path / "2", seed=2), tmp_path / "rows.csv"
    plot.main(plot.Options(csv=table, runs=(first, second)))
    text, grid = table.read_text(), tmp_path / "grid.yaml"
    grid.write_text("title: t\ntasks: [task]\nscales:\n  two_cores: {seeds: [1]}\n"
                    "settings:\n  new: {label: n, script: s}\n")
    with pytest.raises(SystemExit, match="has runs that are not given, such as full on task with seed 1: "):
        plot.main(plot.Options(csv=table, runs=(second,)))
    with pytest.raises(SystemExit, match="no evaluation yet, or are not of the grid"):
        plot.main(plot.Options(csv=table, runs=(first, second), grid=grid, picture=tmp_path / "p.png"))
    assert table.read_text() == text and not (tmp_path / "p.png").exists()


def test_what_is_no_run_and_no_table_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not a run directory"):
        plot.main(plot.Options(csv=tmp_path / "rows.csv", runs=(tmp_path,)))
    for text in ("", "exp_name,seed\nfull,1\n", "\0"):
        (tmp_path / "rows.csv").write_text(text)
        with pytest.raises(SystemExit, match="is not a table that this program wrote"):
            plot.main(plot.Options(csv=tmp_path / "rows.csv"))


def test_a_grid_chooses_its_runs(tmp_path):
    """Of all that is given: its settings, tasks and seeds, in its order."""
    grid = tmp_path / "grid.yaml"
    grid.write_text("title: t\ntasks: [task]\nscales:\n  two_cores: {seeds: [1, 2], flags: {total-timesteps: 200}}\n"
                    "settings:\n  other: {label: 1, script: s}\n  full: {label: full, script: s}\n")
    runs = tuple(make_run(tmp_path / f"run{seed}", seed) for seed in (3, 2, 1))
    options = plot.Options(csv=tmp_path / "rows.csv", runs=runs, grid=grid, picture=tmp_path / "p.png",
                           table=tmp_path / "t.md")
    plot.main(options)
    assert [(line["seed"], line["step"]) for line in plot.read_rows(options.csv)] == [(1, 100), (1, 200), (2, 100),
                                                                                     (2, 200)]
    assert "| full | 2 | 8.0, 8.0 | 0.0, 0.0 | 625, 625 | 75%, 75% |" in options.table.read_text()
    assert "\nNot run: 1.\n" in options.table.read_text()
    assert plt.imread(options.picture).ndim == 3
