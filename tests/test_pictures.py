"""benchmark/pictures.py and inside.py: every committed picture and table is what the committed csv files give."""
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import inside
import pictures
import plot
from kept import Kept


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_committed_picture_is_what_the_command_draws(name, tmp_path):
    """To the pixel, but for one shade of 256 where processors round differently."""
    pictures.PICTURES[name](tmp_path / name)
    drawn, committed = plt.imread(tmp_path / name), plt.imread(plot.RESULTS / name)
    assert drawn.shape == committed.shape and np.abs(drawn - committed).max() < 1.5 / 255


def test_no_picture_has_another_source():
    """Each png is made by the command, or it is said why not."""
    assert {path.name for path in plot.RESULTS.glob("*.png")} == {*pictures.PICTURES, *pictures.NOT_MADE}


@pytest.mark.parametrize("name", pictures.TABLES)
def test_a_pages_table_is_what_the_command_writes(name):
    """To the letter."""
    page = (pictures.DOCS / name).read_text()
    assert pictures.between_markers(page, Path(name).stem, pictures.TABLES[name]()) == page


def test_a_page_gets_its_table():
    page = "before\n<!-- fig3 -->\n| old |\n<!-- end -->\nafter <!-- end -->\n"
    assert pictures.between_markers(page, "fig3", "| a\\1 |\n") == (
        "before\n<!-- fig3 -->\n| a\\1 |\n<!-- end -->\nafter <!-- end -->\n")
    with pytest.raises(SystemExit, match="0 places"):
        pictures.between_markers(page, "fig4", "")


def test_what_is_not_made_is_refused():
    with pytest.raises(SystemExit, match="nothing.png is not made here"):
        pictures.main(pictures.Options(("nothing.png",)))


@pytest.mark.parametrize("name", pictures.LEARNING)
def test_names_are_for_people(name):
    """No names of runs, no two settings with the same name; labels are of what is in the csv or was kept."""
    labels = pictures.LEARNING[name][2]
    shown = list(labels.values())
    assert len(set(shown)) == len(shown) and not any(re.search(r"_|lambda0", label) for label in shown)
    assert set(labels) <= {row["exp_name"] for row in pictures.rows_of(name)}


def test_one_agent_has_one_number():
    """The preset on PointGoal1: five seeds, the same rows in every table that has it."""
    of_preset = lambda name: [row for row in plot.read_rows(plot.RESULTS / f"{name}.csv")
                              if (row["exp_name"], row["env_id"]) == ("laptop", "SafetyPointGoal1-v0")]
    key = lambda row: (row["seed"], row["step"], row["return"], row["cost"], row["cost_rate"])
    expected = sorted(map(key, of_preset("laptop")))
    assert len({seed for seed, *_ in expected}) == 5
    for name in ("fig6_two_cores", "fig7_two_cores", "fig8_two_cores", "fig9_two_cores", "table1_two_cores",
                 "laptop_ablation"):
        assert sorted(map(key, of_preset(name))) == expected


def test_share_of_episodes():
    """Eight episodes by hand; an edge belongs to what begins there."""
    costs = [0, 0, 1, 5, 9, 25, 50, 300]
    assert inside.share_of_episodes(costs).tolist() == [25, 12.5, 25, 0, 12.5, 25]


def test_table_of_rivals():
    """Raw before bins, in the order of the labels; others are left out; what was not drawn is empty."""
    def run(name, seed, sees, cost, drawn=()):
        episode = {"return": "20", "cost": cost}
        return Kept({"exp_name": name, "seed": seed, "obs_transform": sees}, {5: [episode] * 2}, 5,
                    {5: {"charts/cost_rate": "0.0281"}}, [{"return": "1", "cost": each} for each in drawn])

    runs = [run("a_bins", 1, "bins", "3"), run("c", 1, "raw", "0"), run("b", 1, "raw", "7", "44"),
            run("a", 2, "raw", "9")]
    lines = inside.table_of_rivals(runs, {"b": "second", "a": "first"}).splitlines()[2:5]
    assert lines == [
        "| second | raw | 1 | 20.0 [20.0, 20.0] | 7.0 [7.0, 7.0] | 1.0 [1.0, 1.0] | 4.0 [4.0, 4.0] | 281 |",
        "| first | raw | 2 | 20.0 [20.0, 20.0] | 9.0 [9.0, 9.0] | — | — | 281 |",
        "| first | bins | 1 | 20.0 [20.0, 20.0] | 3.0 [3.0, 3.0] | — | — | 281 |"]


def test_methods_that_have_seen_both():
    """PPOLag(25)'s ends as on its page, each under what it saw; a method that saw one kind alone is not compared."""
    rows, grid, limits = pictures.rivals()
    ends = {(row["exp_name"], row["seed"]): round(row["return"], 1) for row in rows
            if (row["env_id"], row["step"]) == ("PPOLag(25)", 5_000_000)}
    assert ends == {("raw", 1): 10.6, ("raw", 2): 15.1, ("bins", 1): 25.0}
    assert grid.tasks[:2] == ("PPOLag(25)", "CPO(25)") and "PPOLag(2)" not in grid.tasks
    assert (limits["PPOLag(25)"], limits["PPOLag(2), faster multiplier"]) == (25, 2)


def test_a_tasks_runs_stand_together():
    """SPOWL's of a million steps: tasks as in Table 1, seeds in order."""
    runs = pictures.spowl_million()
    groups = inside.by_task(runs)
    order = [task for task in pictures.two_cores("table1")[1].tasks if task in groups]
    assert list(groups) == order and sum(map(len, groups.values())) == len(runs)
    seeds = {task: [run.args["seed"] for run in group] for task, group in inside.by_task(runs[::-1]).items()}
    assert seeds["SafetyPointGoal1-v0"][:2] == [1, 2]


def test_costs_by_stretch():
    """What was paid between the ends of stretches; other evaluations do not matter."""
    totals = {20_000: 9.0, 60_000: 10.0, 120_000: 13.0, 180_000: 15.0, 240_000: 15.0, 300_000: 19.0}
    assert inside.costs_by_stretch(totals).tolist() == [10, 3, 2, 0, 4]


def test_training_costs_by_hand():
    """PointGoal2, seed 1 of SPOWL: 0.126067 a step until 60,000; PointGoal1 has five seeds and TD-MPC2 beside it."""
    agents = dict(pictures.training_costs())
    assert round(inside.costs_by_stretch(agents["PointGoal2: SPOWL"][1])[0]) == round(0.126067 * 60_000)
    assert len(agents["PointGoal1: SPOWL"]) == 5 and len(agents["PointGoal1: TD-MPC2, no constraint"]) == 2
    assert len(agents) == 10
