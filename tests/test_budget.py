"""--cost-budget: costs of whole episodes in the ring, the controller that follows them, what an update does with it."""
import csv
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_args
from test_update import ARGS, UPDATES, copy, dataset, new_agent

import spowl_continuous
from spowl_continuous import (Transition, add, augmented_lagrangian, episode_costs, init_agent, init_buffer, steer,
                              summary, update_many)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import budget

ENVS, CAPACITY = 3, 12
RING = small_args(num_envs=ENVS, buffer_size=ENVS * CAPACITY, cost_budget=4.0, updates_per_step=0.5, action_repeat=5)
BUDGET = dataclasses.replace(ARGS, cost_budget=0.7)


def ring(done, cost):
    """A ring to which those rows, (T, E) each, were added one after another."""
    buffer, nothing = init_buffer(RING, 1, 1), jnp.zeros((ENVS, 1))
    for ends, paid in zip(np.float32(done), np.float32(cost)):
        buffer = add(buffer, Transition(nothing, nothing, jnp.zeros(ENVS), paid, nothing, ends, ends))
    return buffer


def brute_force(done, cost):
    """Step by step: what an episode has cost is settled when it ends; the ring has forgotten all but its last rows."""
    so_far, latest = np.zeros(ENVS), np.full(ENVS, np.nan)
    for ends, paid in zip(done[-CAPACITY:], cost[-CAPACITY:]):
        so_far = so_far + paid
        latest, so_far = np.where(ends, so_far, latest), np.where(ends, 0.0, so_far)
    return latest


@pytest.mark.parametrize("steps", [0, 1, 5, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 5])
def test_cost_of_the_latest_whole_episode(steps):
    """Each environment's own, also where the ring is empty, full, or has lost an episode's beginning."""
    rng = np.random.default_rng(steps)
    for share in (0.0, 0.1, 0.4, 1.0):
        done, cost = rng.random((steps, ENVS)) < share, rng.integers(0, 9, (steps, ENVS))
        np.testing.assert_array_equal(episode_costs(ring(done, cost)), brute_force(done, cost))


def steered(costs, num_updates=100, multiplier=0.1):
    """lambda after `steer` has seen episodes of those costs, None for an environment in its first episode."""
    buffer = ring([[cost is not None for cost in costs]], [[cost or 0.0 for cost in costs]])
    return float(steer(RING, jnp.float32(multiplier), buffer, num_updates))


@pytest.mark.parametrize("costs, error", [
    ((4, 4, 4), 0.0), ((6, 6, 6), 0.5), ((0, 8, 4), 0.0), ((0, 0, 0), -1.0), ((2, None, 2), -0.5),
    ((8, 8, 8), 1.0), ((400, 0, 0), 1.0), ((None, None, None), 0.0)])
def test_the_controller_by_hand(costs, error):
    """100 updates belong to 100 x 5 / 0.5 = 1,000 simulator steps: lambda grows by e^(0.02 error)."""
    assert steered(costs) == pytest.approx(0.1 * np.exp(0.02 * error), rel=1e-5)


def test_the_controller_counts_simulator_steps():
    """100 updates of 2 steps each at half an update a step are 400: e = 0.5 gives 0.1 e^0.004, whatever the default."""
    args = dataclasses.replace(RING, action_repeat=2)
    found = steer(args, jnp.float32(0.1), ring([[True] * 3], [[6.0] * 3]), 100)
    assert found == pytest.approx(0.1004008, rel=1e-6)


def test_blocks_of_updates_add_up():
    """However a cycle's updates are cut into blocks, lambda ends at the same place."""
    assert steered((8, 8, 8), 70, steered((8, 8, 8), 30)) == pytest.approx(steered((8, 8, 8)), rel=1e-5)


def test_the_multiplier_stays_within_its_bounds_and_comes_back():
    """A budget that cannot be kept and one that never binds leave lambda where it can turn around at once."""
    assert steered((900, 900, 900), 10**6) == pytest.approx(10.0)
    assert steered((0, 0, 0), 10**6) == pytest.approx(0.001)
    assert steered((0, 0, 0), multiplier=10.0) == pytest.approx(10.0 * np.exp(-0.02))


@pytest.mark.parametrize("violation", [-3.0, 0.0, 2.0])
def test_the_cost_is_weighed_by_lambda(violation):
    """Psi = lambda Delta, of that slope whatever Delta's sign, and neither number moves within the updates."""
    psi = lambda x: augmented_lagrangian(BUDGET, x, jnp.float32(0.2), jnp.float32(0.5))
    assert [float(x) for x in psi(violation)] == pytest.approx([0.2 * violation, 0.2, 0.5])
    assert jax.grad(lambda x: psi(x)[0])(violation) == pytest.approx(0.2)


def test_updates_use_the_steered_multiplier(monkeypatch):
    """The latest episodes of `dataset` cost more than 0.7: the multiplier rises before the updates, not in them."""
    told = lambda agent: {"lagrangian/lambda": agent.multiplier}  # `update` takes long to compile
    monkeypatch.setattr(spowl_continuous, "update", lambda args, agent, batch, key: (agent, told(agent)))
    buffer, agent = dataset(), new_agent()
    expected = steer(BUDGET, agent.multiplier, buffer, UPDATES)
    after, metrics = update_many(BUDGET, copy(agent), buffer, UPDATES)
    assert float(after.multiplier) == float(expected) > float(agent.multiplier)
    assert float(metrics["lagrangian/lambda"]) == pytest.approx(float(expected), rel=1e-6)
    assert metrics["charts/cost_budget"] == np.float32(0.7)


def test_the_first_multiplier():
    """Under a budget it does not depend on --lambda-init, which is made for Eq. 9."""
    first = jax.jit(lambda key, args: init_agent(args, key, 1, 1).multiplier, static_argnums=1)
    assert first(jax.random.key(0), RING) == pytest.approx(0.02)
    assert first(jax.random.key(0), small_args(lambda_init=0.3)) == pytest.approx(0.3)


def test_the_line_of_an_evaluation():
    """Of two episodes the interval is their range; of many that of the normal distribution, in which 90% instead of 95%
    would be 16% narrower."""
    episodes = [{"return": reward, "cost": cost, "balance": 0.5} for reward, cost in ((1.0, 3.0), (3.0, 7.0))]
    assert summary(small_args(), episodes, 1000, 0.1, 3725.9) == (
        "step 1,000: return 2.00 ± 1.00 [1.0, 3.0], cost 5.0 ± 2.0 [3.0, 7.0] over 2 episodes, cost rate 0.1000, "
        "balance 50%, wall time 1:02:05")
    values = np.random.default_rng(1).normal(size=400)
    low, high = spowl_continuous.interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_a_run_prints_its_budget():
    episodes = [{"return": 1.0, "cost": cost, "balance": 0.5} for cost in (3.0, 5.0)]
    assert "cost 4.0 ± 1.0 [3.0, 5.0] (budget 4) over 2 episodes" in summary(RING, episodes, 10, 0.1, 1.0)
    assert "cost 4.0 ± 1.0 [3.0, 5.0] over 2 episodes" in summary(small_args(), episodes, 10, 0.1, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# benchmark/budget.py
# ----------------------------------------------------------------------------------------------------------------------
def kept(folder, task, asked, seed, episodes, exp_name="budget"):
    """What benchmark/keep.py keeps of a run: evaluation episodes (split, step, return, cost), two rows of numbers."""
    name = f"Safety{task}-v0__budget__{seed}_{asked}"
    args = {"env_id": f"Safety{task}-v0", "exp_name": exp_name, "seed": seed, "cost_budget": asked}
    (folder / f"{name}_args.json").write_text(json.dumps({"args": args}))
    numbers = [("step", "lagrangian/lambda", "train/cost"), (50, 0.01, 60), (100, 0.125, 4.5)]
    for what, rows in {"episodes": [("split", "step", "return", "cost"), *episodes], "numbers": numbers}.items():
        with open(folder / f"{name}_{what}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


def test_table_and_picture_of_budgets(tmp_path, capsys):
    """By task, budget and seed; the episodes of --evaluate if it was run, else the last evaluation's; no other runs."""
    kept(tmp_path, "PointGoal1", 25.0, 1, [("eval", 50, 9, 9), ("eval", 100, 9, 9), ("final", 100, 3, 20),
                                           ("final", 100, 3, 20)])
    kept(tmp_path, "PointGoal1", 5.0, 1, [("eval", 50, 9, 9), ("eval", 100, 7, 4)])
    kept(tmp_path, "PointPush1", 5.0, 1, [("eval", 100, 9, 9), ("final", 50, 1, 2)])  # judged, then resumed
    kept(tmp_path, "PointGoal1", 5.0, 2, [("eval", 100, 6, 8), ("eval", 100, 6, 10)])
    kept(tmp_path, "CarGoal1", None, 1, [("eval", 100, 7, 4)])
    budget.main(budget.Options(tmp_path, tmp_path / "picture.png"))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| PointGoal1 | 5 | 2 | 4.5, 4.5 | 4.0 [4.0, 4.0], 9.0 [8.0, 10.0] | 7.0 [7.0, 7.0], 6.0 [6.0, 6.0] | 1, 2 | "
        "0.12, 0.12 |",
        "| PointGoal1 | 25 | 1 | 4.5 | 20.0 [20.0, 20.0] | 3.0 [3.0, 3.0] | 2 | 0.12 |",
        "| PointPush1 | 5 | 1 | 60.0 | 2.0 [2.0, 2.0] | 1.0 [1.0, 1.0] | 1 | 0.01 |", "", "At 50 or 100 steps. "
        f"In brackets: 95% intervals of means over episodes. {budget.CELLS}"]
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_run_judged_between_evaluations_is_told(tmp_path):
    kept(tmp_path, "PointPush1", 5.0, 1, [("eval", 50, 9, 9), ("final", 70, 1, 2)])
    with pytest.raises(SystemExit, match="judged at step 70, at which training evaluated nothing"):
        budget.read_runs(tmp_path)


def test_runs_of_two_names_are_not_seeds_of_one(tmp_path):
    for exp_name, seed in (("full", 1), ("plan only", 2)):
        kept(tmp_path, "PointPush1", 5.0, seed, [("eval", 50, 9, 9)], exp_name)
    with pytest.raises(SystemExit, match="full and plan only both have a budget of 5 on PointPush1"):
        budget.main(budget.Options(tmp_path))


def test_no_runs_with_a_budget(tmp_path):
    with pytest.raises(SystemExit, match="no run with a --cost-budget"):
        budget.main(budget.Options(tmp_path))
