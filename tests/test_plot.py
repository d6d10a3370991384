"""benchmark/plot.py: from runs to rows, means and intervals over seeds, tables; the committed pictures and tables."""
import csv
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

RESULTS = ROOT / "benchmark" / "results"
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
            {"full": {"label": "full agent"}, "absent": {"label": "nobody ran it"}, "other": {"label": "other"}})


# ----------------------------------------------------------------------------------------------------------------------
# Over seeds
# ----------------------------------------------------------------------------------------------------------------------
def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert plot.interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == (2 + 3 + 4 + 5) / 4


def test_interval_of_two_seeds_by_enumeration():
    """Resampled means of (a, b) are a, (a + b) / 2, b with probability 1/4, 1/2, 1/4: the 95% interval is [a, b]."""
    assert plot.interval(np.array([3.0, 7.0])) == (3.0, 7.0)
    assert plot.interval(np.array([3.0])) == (3.0, 3.0) and plot.interval(np.array([2.0, 2.0])) == (2.0, 2.0)


def test_interval_of_many_seeds_is_the_normal_one():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = plot.interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert np.allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------
def test_table_of_settings_by_hand():
    """Seed 3 did not reach the last step and does not count; what is missing says so."""
    lines = plot.table_of_settings(ROWS, GRID).splitlines()
    assert lines[2:5] == ["| full agent | 2 | 21.5 ± 1.5 | 45.0 ± 5.0 | 450 ± 50 | 60% ± 10% |",
                          "| nobody ran it | 0 | not run | not run | not run | not run |",
                          "| other | 1 | -0.0 | 0.0 | 133 | 100% |"]
    assert lines[-1] == "At 100 steps; mean ± population standard deviation over seeds."


def test_settings_that_ended_elsewhere():
    """Each at its own last step."""
    lines = plot.table_of_settings([*ROWS, row("absent", 1, 250, 7.0, 8.0)], GRID).splitlines()
    assert lines[3] == "| nobody ran it | 1 | 7.0 | 8.0 | 500 | 60% |" and lines[-1].startswith("At 100 or 250 steps;")


def test_table_beside_the_paper():
    """The paper's figures by a label up to its comma; what it has not, and what was not run, says so."""
    labels = {"full": "SPOWL, ours", "absent": "CPO(25)", "other": "nobody's"}
    grid = GRID._replace(settings={name: {"label": label} for name, label in labels.items()})
    lines = plot.table_beside_paper(ROWS, grid, plot.read_paper(PAPER)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines[:-2]]
    assert cells[0] == ["", "paper: return", "paper: cost", "paper: cost rate ×10⁴", "ours: return", "ours: cost",
                        "ours: cost rate ×10⁴", "steps", "hours", "seeds"]
    assert cells[2:] == [
        ["SPOWL, ours", "26.9 ± 0.4", "1.5 ± 1.1", "133 ± 2", "21.5 ± 1.5", "45.0 ± 5.0", "450 ± 50", "100",
         "50.0 ± 0.0", "2"],
        ["CPO(25)", "19.2 ± 3.0", "31.0 ± 5.8", "275 ± 21", "not run", "not run", "not run", "—", "—", "0"],
        ["nobody's", "—", "—", "—", "-0.0", "0.0", "133", "100", "50.0", "1"]]


def test_cost_of_all_training():
    """The cost rate times the steps."""
    assert plot.by_seed(ROWS, GRID.tasks[0], "full", "total_cost") == {1: {50: 2.5, 100: 4.0}, 2: {50: 2.5, 100: 5.0},
                                                                       3: {50: 2.5}}


def test_tradeoffs(tmp_path, monkeypatch):
    """A point at the mean of the seeds, a hollow one for the paper's figures, none for what is not there."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    grid = GRID._replace(settings={"full": {"label": "SPOWL"}, "absent": {"label": "CPO(25)"}, "other": {"label": "x"}})
    plot.draw_tradeoff(ROWS, grid, tmp_path / "p.png", plot.read_paper(PAPER))
    lines = [[line.get_xydata().tolist() for line in drawn[0].axes[0].lines if line.get_fillstyle() == style
              and line.get_marker() == "o"] for style in ("full", "none")]
    assert lines == [[[[45.0, 21.5]], [], [[0.0, -0.04]]], [[[1.5, 26.9]], [[31.0, 19.2]]]]


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
    """--evaluate's episodes stand for those of the same step; the hours are those of the last checkpoint."""
    run_dir = make_run(tmp_path / "run")
    with open(run_dir / "evaluation.csv", "w", newline="") as file:
        csv.writer(file).writerows([("split", "step", "environment", "return", "cost", "length", "balance"),
                                    ("eval", 200, 0, 6.0, 1.0, 1000, 0.5), ("eval", 200, 1, 7.0, 4.0, 1000, 0.5)])
    np.savez(run_dir / "checkpoint_200.npz", counters=np.array(json.dumps({"wall_time": 5400.0})))
    first, second = plot.evaluations(run_dir)
    assert (first["return"], first["episodes"]) == (4.0, 2) and np.isnan(first["hours"])
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
    runs = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    with pytest.raises(SystemExit, match="two runs of full on task with seed 1"):
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
    assert "| full | 2 | 8.0 ± 0.0 | 0.0 ± 0.0 | 625 ± 0 | 75% ± 0% |" in options.table.read_text()
    assert "| 1 | 0 | not run |" in options.table.read_text()
    assert plt.imread(options.picture).ndim == 3


# ----------------------------------------------------------------------------------------------------------------------
# What is committed
# ----------------------------------------------------------------------------------------------------------------------
FIGURES = sorted(path for path in RESULTS.glob("*.csv") if path.with_suffix(".md").exists())


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_committed_results_come_from_the_committed_csv(path, tmp_path):
    """Pictures to the pixel, table to the letter, the table also on its page."""
    name, scale = path.stem.split("_", 1)
    grid = ROOT / "benchmark" / "grids" / f"{name}.yaml"
    paper, tradeoff = PAPER if name == "table1" else None, path.with_name(f"{path.stem}_tradeoff.png")
    plot.main(plot.Options(csv=path, grid=grid, scale=scale, picture=tmp_path / "p.png", table=tmp_path / "t.md",
                           paper=paper, tradeoff=tmp_path / "o.png" if tradeoff.exists() else None))
    assert (tmp_path / "t.md").read_text() == path.with_suffix(".md").read_text()
    pictures = {path.with_suffix(".png"): tmp_path / "p.png", tradeoff: tmp_path / "o.png"}
    assert all(np.array_equal(plt.imread(made), plt.imread(kept)) for kept, made in pictures.items() if kept.exists())
    names = read_grid(grid, scale).settings
    assert {line["exp_name"] for line in plot.read_rows(path)} <= set(names)
    assert path.with_suffix(".md").read_text() in (ROOT / "docs" / "results" / f"{name}.md").read_text()
