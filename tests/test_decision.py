"""METHOD §6: plan or policy, the two switch rules, exploration, and acting for all environments at once."""
import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal, np_heads, random_agent, small_args

import spowl_continuous as spowl
from spowl_continuous import Plan, act, bootstrap_bounds, decide, init_actor, policy_sample, prefer_plan

OBS, ACTIONS = 5, 2
ARGS = small_args(horizon=2, num_envs=3, num_q=3, num_qc=3, num_bins=11, num_samples=14, num_pi_trajs=4, num_elites=3,
                  iterations=2, bootstrap_samples=50, min_std=0.06)  # flags that no other test compiles
MEANS = dataclasses.replace(ARGS, switch_rule="means")


# ----------------------------------------------------------------------------------------------------------------------
# The switch rules
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("q_plan, qc_plan, expected", [
    ([3.0, 1.0], [0.0, 4.0], True),  # both equal
    ([3.1, 1.0], [0.0, 3.9], True), ([2.9, 1.0], [0.0, 3.9], False), ([3.1, 1.0], [0.0, 4.1], False),
    ([2.9, 1.0], [0.0, 4.1], False), ([9.0, -4.0], [1.0, 2.0], True)])
def test_means_rule(q_plan, qc_plan, expected):
    """§6, means: Q_avg of the plan >= 2 and Qc_avg <= 2, the policy's."""
    q_policy, qc_policy = jnp.array([0.0, 4.0]), jnp.array([2.0, 2.0])
    assert prefer_plan(MEANS, jnp.array(q_plan), q_policy, jnp.array(qc_plan), qc_policy, jax.random.key(0)) == expected


bounds = jax.jit(bootstrap_bounds, static_argnums=0)


@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [3.0, -1.0, 2.0, 9.0], [0.0, 1.0, 2.0, 3.0, 4.0],
                                    [-5.0, 0.3, 0.4, 0.5, 20.0]])
def test_bootstrap_bounds_against_all_resamples(values):
    """§6: the mean of K heads drawn with replacement has K^K equally likely outcomes; the bounds cut 2.5% off each end.
    20,000 resamples put the percentiles' own error at 0.11%, so 0.6% is more than five times that."""
    args = dataclasses.replace(ARGS, bootstrap_samples=20_000)
    low, high = (float(x) for x in bounds(args, jnp.array(values), jax.random.key(1)))
    means = np.array([np.mean(pick) for pick in itertools.product(values, repeat=len(values))])
    slack = 1e-5 * np.ptp(values)
    assert np.mean(means < low - slack) <= 0.031 and np.mean(means <= low + slack) >= 0.019
    assert np.mean(means > high + slack) <= 0.031 and np.mean(means >= high - slack) >= 0.019


def test_bootstrap_bounds_where_the_heads_agree():
    """§6: no spread, no interval."""
    np.testing.assert_allclose(bounds(ARGS, jnp.full(5, 7.3), jax.random.key(0)), [7.3, 7.3], rtol=1e-6)


@pytest.mark.parametrize("q_plan, qc_plan, expected", [
    (2.0, 2.0, True), (1.3, 2.0, True), (2.0, 2.7, True), (1.3, 2.7, True), (9.0, -9.0, True),
    (0.3, 2.0, False), (2.0, 3.7, False), (0.3, -9.0, False), (9.0, 3.7, False)])
def test_bootstrap_rule(q_plan, qc_plan, expected):
    """§6, bootstrap: heads 0..4 have mean 2 and a 95% interval of about [0.8, 3.2]: the plan need only reach its near
    end. The plan's own heads enter by their mean alone."""
    args, heads = dataclasses.replace(ARGS, bootstrap_samples=1000), jnp.arange(5.0)
    spread = jnp.array([-20.0, -5.0, 0.0, 10.0, 15.0])
    run = partial(prefer_plan, args, q_plan + spread, heads, qc_plan - spread, heads)
    assert {bool(run(jax.random.key(seed))) for seed in range(3)} == {expected}


def test_bootstrap_of_q_and_qc_use_their_own_heads_and_draws(monkeypatch):
    """§6: drawn separately; the lower end counts for Q, the upper end for Qc."""
    calls = []

    def spy(args, values, key):
        calls.append((np.asarray(values).tolist(), np.asarray(jax.random.key_data(key)).tolist()))
        return values.mean() + jnp.array([-1.0, 0.5])

    monkeypatch.setattr(spowl, "bootstrap_bounds", spy)
    q, qc, key = jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0]), jax.random.key(0)
    verdicts = [bool(prefer_plan(ARGS, jnp.full(2, a), q, jnp.full(2, b), qc, jax.random.clone(key)))
                for a, b in ((1.0, 6.5), (0.9, 6.5), (1.0, 6.6))]
    assert verdicts == [True, False, False]
    assert calls[0][0] == [1.0, 3.0] and calls[1][0] == [5.0, 7.0] and calls[0][1] != calls[1][1]


# ----------------------------------------------------------------------------------------------------------------------
# One environment's decision, with a given plan
# ----------------------------------------------------------------------------------------------------------------------
PLANNED = np.array([0.2, -0.7], np.float32)
STD = np.array([[0.1, 0.4], [1.9, 1.9]], np.float32)


@pytest.fixture(scope="module")
def agent():
    return random_agent(ARGS, OBS, ACTIONS, seed=8)


def decide_with_stand_ins(monkeypatch, agent, take_plan, planned=PLANNED):
    """`decide` with a fixed plan and a fixed verdict, for many keys -> action, mean, metrics, what was compared."""
    final = Plan(jnp.asarray(STD) * 0.5, jnp.asarray(STD), jnp.asarray(planned))
    told = {}

    def verdict(args, *values_and_key):
        told["values"] = values_and_key[:4]
        return jnp.array(take_plan)

    def run(key, explore):
        action, mean, metrics = decide(ARGS, agent.model, agent.policy, Z, jnp.zeros((2, 2)), key, explore)
        return action, mean, metrics, told["values"]

    monkeypatch.setattr(spowl, "plan", lambda *_: (final, {"planner/some": jnp.float32(1.5)}))
    monkeypatch.setattr(spowl, "prefer_plan", verdict)
    return jax.jit(jax.vmap(run, in_axes=(0, None)))


Z = jnp.asarray(np.random.default_rng(4).dirichlet(np.ones(8), 2).reshape(16), jnp.float32)


def test_plan_without_exploration(monkeypatch, agent):
    """§6, evaluation: the plan's action as it is."""
    run = decide_with_stand_ins(monkeypatch, agent, True)
    action, mean, metrics, _ = run(jax.random.split(jax.random.key(0), 5), False)
    np.testing.assert_array_equal(action, np.tile(PLANNED, (5, 1)))
    np.testing.assert_allclose(mean, np.tile(STD * 0.5, (5, 1, 1)))
    assert {name: np.unique(value).tolist() for name, value in metrics.items()} == {
        "charts/balance": [1.0], "planner/some": [1.5]}


@pytest.mark.parametrize("take_plan", [True, False])
def test_a_plan_goes_on_from_the_last_one(monkeypatch, agent, take_plan):
    """§5: the last mean reaches the planner, and its new one is kept whether or not the plan is executed."""
    monkeypatch.setattr(spowl, "plan", lambda args, model, policy, z, last_mean, key: (
        Plan(last_mean + 1.0, 0.0 * last_mean, last_mean[0]), {}))
    monkeypatch.setattr(spowl, "prefer_plan", lambda *_: jnp.array(take_plan))
    last = jnp.array([[0.25, -0.5], [0.75, 0.0]])
    run = jax.jit(lambda key: decide(ARGS, agent.model, agent.policy, Z, last, key, False))
    action, mean, _ = run(jax.random.key(0))
    np.testing.assert_array_equal(mean, last + 1.0)
    assert (action.tolist() == [0.25, -0.5]) == take_plan


def test_plan_with_exploration(monkeypatch, agent):
    """§5: in training plus std x noise, with the std of the plan's first step, clipped to [-1, 1]."""
    keys = jax.random.split(jax.random.key(0), 2000)
    action = np.asarray(decide_with_stand_ins(monkeypatch, agent, True, planned=np.zeros(2, np.float32))(keys, True)[0])
    np.testing.assert_allclose(action.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(action[:, 0].std(), 0.1, rtol=0.08)
    assert np.mean(np.abs(action[:, 1]) < 0.4) == pytest.approx(0.683, abs=0.05)
    assert np.mean(np.abs(action[:, 1]) == 1.0) == pytest.approx(0.0124, abs=0.01) and np.abs(action).max() == 1.0
    assert abs(np.corrcoef(action.T)[0, 1]) < 0.12


def test_policy_with_and_without_exploration(monkeypatch, agent):
    """§6: a_pi is the mean in evaluation, a sample in training."""
    run = decide_with_stand_ins(monkeypatch, agent, False)
    keys = jax.random.split(jax.random.key(0), 2000)
    _, mean_action, _ = policy_sample(ARGS, agent.policy, Z, jax.random.key(0))
    action, _, metrics, _ = run(keys, False)
    np.testing.assert_allclose(action, np.tile(mean_action, (2000, 1)), atol=1e-6)
    assert np.all(metrics["charts/balance"] == 0.0)
    samples = np.asarray(run(jax.random.clone(keys), True)[0])
    direct = jax.jit(jax.vmap(partial(policy_sample, ARGS, agent.policy, Z)))
    expected = np.asarray(direct(jax.random.split(jax.random.key(1), 2000))[0])
    assert len(np.unique(samples, axis=0)) > 1900
    error = 5 * expected.std(0) / np.sqrt(1000)
    assert np.all(np.abs(samples.mean(0) - expected.mean(0)) < error)
    np.testing.assert_allclose(samples.std(0), expected.std(0), rtol=0.15)


@pytest.mark.parametrize("explore", [True, False])
def test_actions_are_compared_as_executed(monkeypatch, agent, explore):
    """§6: the values compared are the online heads' at the very actions that would be executed, noise included."""
    keys = jax.random.split(jax.random.key(2), 3)
    executed, values = {}, {}
    for take_plan in (True, False):
        action, _, _, told = decide_with_stand_ins(monkeypatch, agent, take_plan)(keys, explore)
        executed[take_plan], values[take_plan] = np.asarray(action), told
        keys = jax.random.clone(keys)
    for name, plan_values, policy_values in (("q", *values[True][:2]), ("qc", *values[True][2:])):
        for got, action in ((plan_values, executed[True]), (policy_values, executed[False])):
            expected = np_heads(ARGS, agent.model[name], np.asarray(Z), action)
            np.testing.assert_allclose(got, expected.T, rtol=5e-3, atol=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Acting for all environments
# ----------------------------------------------------------------------------------------------------------------------
OBSERVED = np.tile(np.random.default_rng(6).normal(size=OBS), (3, 1)).astype(np.float32)  # the same for all
NOT_FIRST = np.zeros(3, bool)


def new_actor(step=0, mean=0.4):
    return init_actor(ARGS, jax.random.key(9), ACTIONS)._replace(
        step=jnp.int32(step), plan_mean=jnp.full((3, 2, ACTIONS), mean, jnp.float32))


def run_act(agent, actor, is_first=NOT_FIRST, explore=True, obs=OBSERVED):
    action, actor = act(ARGS, agent, actor, obs, is_first, explore)
    return np.asarray(action), actor


def test_new_actor():
    """§5: before the first step all means are 0; one metric per environment."""
    actor = init_actor(ARGS, jax.random.key(1), ACTIONS)
    assert actor.plan_mean.shape == (3, 2, 2) and not np.any(actor.plan_mean) and int(actor.step) == 0
    assert set(actor.metrics) == {"charts/balance", "planner/reward_threshold", "planner/cost_threshold",
                                  "planner/num_improving", "planner/no_improvement"}


def test_acting_is_a_function_of_key_and_step(agent):
    """Equal actors act equally; environments draw apart on equal observations, and so do later steps."""
    action, after = run_act(agent, new_actor())
    again, same = run_act(agent, new_actor())
    assert action.shape == (3, ACTIONS) and np.all(np.abs(action) <= 1.0)
    np.testing.assert_array_equal(action, again)
    assert leaves_equal(after, same) and int(after.step) == 1
    assert len({row.tobytes() for row in action}) == 3
    assert not np.any(np.all(run_act(agent, new_actor(step=1))[0] == action, -1))


def test_the_old_actor_stays_and_its_key_is_kept(agent):
    """A step that an environment fails in is not taken: what is saved then is the actor before it."""
    actor = new_actor()
    key = np.asarray(jax.random.key_data(actor.key)).tolist()
    _, after = run_act(agent, actor)
    assert not any(x.is_deleted() for x in jax.tree.leaves(actor))
    assert np.asarray(jax.random.key_data(after.key)).tolist() == key


def test_is_first_resets_the_warm_start_of_that_environment_only(agent):
    """§5: mean 0 after a reset; the neighbours go on from their own last plan."""
    (warm, after), (cold, other) = (run_act(agent, new_actor(mean=mean)) for mean in (0.4, 0.0))
    assert np.abs(after.plan_mean - other.plan_mean).max() > 0.01  # a warm start makes a difference
    mixed, _ = run_act(agent, new_actor(mean=0.4), is_first=np.array([False, True, False]))
    np.testing.assert_array_equal(mixed[[0, 2]], warm[[0, 2]])
    np.testing.assert_array_equal(mixed[1], cold[1])


def test_what_decide_is_given(monkeypatch, agent):
    """§5-§6: every environment's own latent and last mean, and whether to explore; metrics are summed one by one."""
    def stand_in(args, model, policy, z, last_mean, key, explore):
        metrics = dict.fromkeys(new_actor().metrics, last_mean[0, 0])
        return jnp.where(explore, 2.0, 1.0) * z[:2], last_mean + 1.0, metrics

    monkeypatch.setattr(spowl, "decide", stand_in)
    obs = np.random.default_rng(0).normal(size=(3, OBS)).astype(np.float32)
    actor = new_actor()._replace(plan_mean=jnp.arange(12.0).reshape(3, 2, 2))
    run = jax.jit(lambda actor, is_first, explore: act.__wrapped__(ARGS, agent, actor, obs, is_first, explore))
    action, after = run(actor, np.array([False, False, True]), False)
    z = spowl.encode(ARGS, agent.model, obs)[:, :2]
    np.testing.assert_allclose(action, z, atol=1e-5)
    np.testing.assert_array_equal(after.plan_mean.ravel(), [1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 1, 1])
    action, after = run(after, NOT_FIRST, True)
    np.testing.assert_allclose(action, 2.0 * z, atol=1e-5)
    np.testing.assert_array_equal(after.metrics["charts/balance"], [0 + 1, 4 + 5, 0 + 1])  # summed over the two steps


@pytest.mark.parametrize("backend, num_envs, at_once", [("cpu", 10, 5), ("cpu", 8, 4), ("cpu", 7, 1), ("cpu", 3, 3),
                                                       ("gpu", 10, 10)])
def test_environments_are_decided_in_equal_groups(monkeypatch, agent, backend, num_envs, at_once):
    """At most five at a time where the cache is small, all at once elsewhere; each gets what is its own."""
    def stand_in(args, model, policy, z, last_mean, key, explore):
        return z[:2], last_mean + 1.0, dict.fromkeys(new_actor().metrics, last_mean[0, 0])

    groups, lax_map = [], jax.lax.map
    monkeypatch.setattr(spowl, "decide", stand_in)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.lax, "map", lambda f, xs, batch_size: groups.append(batch_size) or lax_map(
        f, xs, batch_size=batch_size))
    obs = np.random.default_rng(0).normal(size=(num_envs, OBS)).astype(np.float32)
    args = dataclasses.replace(ARGS, num_envs=num_envs)
    actor = init_actor(args, jax.random.key(9), ACTIONS)
    actor = actor._replace(plan_mean=jnp.arange(4.0 * num_envs).reshape(num_envs, 2, 2))
    action, after = jax.jit(lambda actor: act.__wrapped__(args, agent, actor, obs, obs[:, 0] > 9, True))(actor)
    assert groups == [at_once]
    np.testing.assert_allclose(action, spowl.encode(args, agent.model, obs)[:, :2], atol=1e-5)
    np.testing.assert_array_equal(after.plan_mean, actor.plan_mean + 1.0)
    np.testing.assert_array_equal(after.metrics["charts/balance"], 4.0 * np.arange(num_envs))


def test_act_is_compiled_once(agent):
    """Exploration, resets and what an actor has become do not lead to another compilation."""
    actor, sizes = init_actor(ARGS, jax.random.key(3), ACTIONS), set()
    for explore, is_first in itertools.product((True, False), (~NOT_FIRST, NOT_FIRST)):
        action, actor = run_act(agent, actor, is_first, explore)
        sizes.add(act._cache_size())
    assert len(sizes) == 1 and int(actor.step) == 4
    assert all(np.all(np.isfinite(x)) for x in actor.metrics.values())
