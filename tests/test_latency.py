"""benchmark/latency.py: the planners that are compared, and a short comparison on the committed agent."""
import csv
import dataclasses

import pytest
from conftest import small_args
from test_train import ROOT, run

import spowl_plan_only as plan_only
import spowl_policy_only as policy_only
from benchmark import latency

ARGS = small_args(num_samples=128, num_pi_trajs=12, num_elites=16, plan_horizon=6)


@pytest.mark.parametrize("samples, trajs, elites", [(128, 12, 16), (256, 24, 32), (64, 6, 8), (4, 1, 1)])
def test_shares_stay_the_runs(samples, trajs, elites):
    expected = dataclasses.replace(ARGS, num_samples=samples, num_pi_trajs=trajs, num_elites=elites, plan_horizon=3)
    assert latency.planner_of(ARGS, samples, 3) == expected


@pytest.mark.parametrize("samples, depth, says", [(1, 3, "--num-pi-trajs must be smaller"), (8, 0, "--plan-horizon")])
def test_planners_that_cannot_be(samples, depth, says):
    with pytest.raises(SystemExit, match=f"^--samples {samples}, --depths {depth}: {says}"):
        latency.planner_of(ARGS, samples, depth)


@pytest.mark.parametrize("script", [policy_only, plan_only])
def test_who_acts_alone_has_the_same_flags(script):
    args = latency.of_script(script, ARGS)
    assert isinstance(args, script.Args)
    assert {name: getattr(ARGS, name) for name in vars(args)} == vars(args)


@pytest.mark.parametrize("name", ["t.csv", "none/t.csv"])
def test_a_table_that_is_there_is_not_written_over(tmp_path, name):
    """Nor is one begun for which there is no directory: both before anything is timed."""
    (tmp_path / "t.csv").touch()
    with pytest.raises(SystemExit, match="name a new file in a directory that is there"):
        latency.main(latency.Options((tmp_path,), csv=tmp_path / name))


@pytest.mark.parametrize("runs, flags, says", [
    (1, {"repeats": 0}, "not both 0"), (1, {"repeats": -1}, "at least 0"), (0, {}, "name a run directory"),
    (2, {}, "is not a run directory of this script")])
def test_what_cannot_be_done_is_said_first(runs, flags, says, tmp_path):
    """Of several runs too: the first is an agent, and is not timed before the second is found not to be one."""
    there = (ROOT / "benchmark" / "pretrained" / "laptop_PointGoal1", tmp_path)[:runs]
    with pytest.raises(SystemExit, match=says):
        latency.main(latency.Options(there, **flags))


def test_a_picture(tmp_path, monkeypatch):
    """Rows without episodes by depth on the left, those with on the right; who plans alone is not drawn."""
    (tmp_path / "t.csv").write_text("acts,samples,depth,times_policy,episodes,return,return_std,cost,cost_std,balance\n"
                                    "policy,,,1.0,0,,,,,\nplan or policy,8,3,20,0,,,,,\nplan or policy,8,6,40,0,,,,,\n"
                                    "plan,8,6,44,0,,,,,\nplan or policy,16,6,80,0,,,,,\npolicy,,,1.0,2,22,1,5,2,0\n"
                                    "plan or policy,16,6,80,2,23,1,4,2,0.5\n")
    figures = []
    monkeypatch.setattr(latency.plt, "close", figures.append)
    latency.draw(tmp_path / "t.csv", tmp_path / "p.png")
    left, right = figures[0].axes
    assert [line.get_xydata().tolist() for line in left.lines[:2]] == [[[8, 20]], [[8, 40], [16, 80]]]
    assert [bar.get_width() for bar in right.patches] == [22, 23, 5, 4]


@pytest.mark.long
def test_a_comparison(tmp_path):
    """The policy first, by which the others are measured; who acts is seen from the balance. Several runs have one
    table, and times only where they are asked for."""
    agent, table = ROOT / "benchmark" / "pretrained" / "laptop_PointGoal1", tmp_path / "t.csv"
    table2 = tmp_path / "t2.csv"
    run(tmp_path, agent, "--samples", 16, "--depths", 2, "--repeats", 3, "--alone", "--episodes",
        1, "--csv", table, script=latency.__file__)
    with open(table, newline="") as file:
        policy, either, plan = csv.DictReader(file)
    assert [row["acts"] for row in (policy, either, plan)] == ["policy", "plan or policy", "plan"]
    assert (policy["times_policy"], policy["samples"], plan["samples"], plan["depth"]) == ("1.0", "", "16", "2")
    assert float(either["times_policy"]) > 1.0
    assert float(policy["balance"]) == 0.0 < float(either["balance"]) < float(plan["balance"]) == 1.0
    run(tmp_path, agent, agent, "--samples", 16, "--depths", 2, "--repeats", 0, "--episodes", 1, "--csv", table2,
        script=latency.__file__)
    with open(table2, newline="") as file:
        again = [*csv.DictReader(file)]
    assert [(row["env_id"], row["seed"], row["acts"], row["times_policy"]) for row in again] == 2 * [
        ("SafetyPointGoal1-v0", "3", acts, "") for acts in ("policy", "plan or policy")]
    assert [row["return"] for row in again] == 2 * [policy["return"], either["return"]]
