"""PPO-Lagrangian: statistics, networks, episodes' costs, multiplier, advantages, losses and passes against numbers
worked out by hand or in NumPy; an environment whose best policy under a cost limit is known; real runs."""
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats
from conftest import leaves_equal, random_weights
from hypothesis import given
from hypothesis import strategies as st
from test_train import (HEED_SIGNALS, ROOT, SUMMARY, checkpoint, command, environment, one_line, rows_of, run, same_end,
                        scalars)

from baselines import ppo_lagrangian as ppo
from baselines.ppo_lagrangian import Args, Transition, parse_args

OBS, ACTIONS, E, T = 3, 2, 2, 6
SMALL = dict(num_envs=E, train_every=E * T, total_timesteps=4 * E * T, eval_every=0, hidden=8, batch_size=5, epochs=3,
             gamma=0.9, cost_gamma=0.8, gae_lambda=0.7, cost_limit=1.5, cost_window=4)


def small_args(**changes):
    return Args(**(SMALL | changes))


ARGS = small_args()


def random_agent(module=ppo, args=ARGS, seed=0):
    """An agent before its first update with random weights and statistics, none of them at their start."""
    agent, rng = module.init_agent(args, jax.random.key(seed), OBS, ACTIONS), np.random.default_rng(seed)
    stats = module.Stats(jnp.float32(50.0), jnp.asarray(rng.normal(size=OBS), jnp.float32),
                         jnp.asarray(rng.uniform(0.5, 2.0, OBS), jnp.float32))
    return agent._replace(networks=random_weights(agent.networks, seed + 1), stats=stats)


def random_rows(seed=0, steps=T, ends=0.25):
    """A rollout (T, E, ...) whose episodes end now and then, by termination and by truncation."""
    rng = np.random.default_rng(seed)
    done = rng.random((steps, E)) < ends
    terminated = done & (rng.random((steps, E)) < 0.5)
    columns = (rng.normal(size=(steps, E, OBS)), rng.normal(size=(steps, E, ACTIONS)), rng.normal(size=(steps, E)),
               rng.integers(0, 3, (steps, E)), rng.normal(size=(steps, E, OBS)), terminated, done)
    return Transition(*(jnp.asarray(column, jnp.float32) for column in columns))


def np_mlp(layers, x):
    """[Linear, tanh]*, Linear in float64."""
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["w"], np.float64) + np.asarray(layer["b"], np.float64)
        x = np.tanh(x) if i < len(layers) - 1 else x
    return x


def np_normalise(stats, obs):
    scaled = (np.asarray(obs, np.float64) - np.asarray(stats.mean)) / np.maximum(np.sqrt(np.asarray(stats.var)), 0.01)
    return np.clip(scaled, -5.0, 5.0)


def buffer_of(module, args, rows, head=0):
    """A full ring that holds those rows, the oldest at `head`."""
    return module.Buffer(jax.tree.map(lambda x: jnp.roll(x, head, axis=0), rows), jnp.int32(head), jnp.int32(T))


def copy(tree):
    """Arrays that an update may take over."""
    return jax.tree.map(jnp.copy, tree)


# ----------------------------------------------------------------------------------------------------------------------
# Observations, networks, acting
# ----------------------------------------------------------------------------------------------------------------------
def test_statistics_are_those_of_all_observations_so_far():
    """After three batches of different sizes and places: count, mean and variance of everything joined."""
    rng, stats = np.random.default_rng(0), ppo.Stats(jnp.float32(0.0), jnp.zeros(OBS), jnp.ones(OBS))
    batches = [rng.normal(2.0 * i, 1.0 + i, (7 + 5 * i, 4, OBS)) for i in range(3)]
    for n, batch in enumerate(batches):
        stats = ppo.add_to_stats(stats, jnp.asarray(batch, jnp.float32))
        seen = np.concatenate([each.reshape(-1, OBS) for each in batches[:n + 1]])
        assert stats.count == len(seen)
        np.testing.assert_allclose(stats.mean, seen.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats.var, seen.var(0), rtol=1e-5)


def test_observations_are_normalised_within_bounds():
    """A fresh agent sees them as they are; later (obs - mean) / std, where a std below 0.01 counts as 0.01, and what
    lies beyond five of them at five."""
    fresh = ppo.init_agent(ARGS, jax.random.key(0), 3, 1).stats
    np.testing.assert_array_equal(ppo.normalise(ARGS, fresh, np.array([5.0, -2.0, 0.0])), [5.0, -2.0, 0.0])
    stats = ppo.Stats(jnp.float32(9.0), jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 0.0, 1e-6]))
    for obs, seen in (([5.0, 2.04, 3.001], [2.0, 4.0, 0.1]), ([-11.0, 2.06, 2.9], [-5.0, 5.0, -5.0])):
        np.testing.assert_allclose(ppo.normalise(ARGS, stats, jnp.array(obs)), seen, rtol=1e-3)


def test_weights_on_bins_follow_the_normalised_observation():
    """Of the observation as it is: 0, 4 and 2 lie on bin 0, on bin 7, and half way from bin 3 to bin 4."""
    args, stats = small_args(obs_transform="bins"), ppo.Stats(jnp.float32(9.0), jnp.full(3, 1.0), jnp.full(3, 4.0))
    weights = np.zeros((3, 8))
    weights[0, 0] = weights[1, 7] = 1.0
    weights[2, 3] = weights[2, 4] = 0.5
    seen = np.concatenate([[-0.5, 1.5, 0.5], weights.ravel()])
    np.testing.assert_allclose(ppo.normalise(args, stats, jnp.array([0.0, 4.0, 2.0])), seen, atol=1e-6)
    networks = ppo.init_networks(args, jax.random.key(0), 3, 1)
    assert all(network[0]["w"].shape[0] == seen.size for network in (
        networks["policy"]["mean"], networks["value"], networks["cost_value"]))


def test_networks_at_the_start():
    """Weights and biases uniform within 1 / sqrt(inputs), standard deviation 1, three networks of their own."""
    networks = ppo.init_networks(Args(), jax.random.key(0), 60, 2)
    assert networks["policy"]["log_std"].tolist() == [0.0, 0.0]
    for name, last in (("policy", 2), ("value", 1), ("cost_value", 1)):
        layers = networks[name]["mean"] if name == "policy" else networks[name]
        assert [layer["w"].shape for layer in layers] == [(60, 64), (64, 64), (64, last)]
        for layer in layers:
            bound = 1.0 / math.sqrt(len(layer["w"]))
            for x in (layer["w"], layer["b"]):
                assert 0.5 * bound < np.abs(x).max() <= bound or x.size < 3
            assert layer["w"].std() == pytest.approx(bound / math.sqrt(3.0), rel=0.15)
    hidden = [networks["policy"]["mean"], networks["value"], networks["cost_value"]]
    assert len({layers[0]["w"].tobytes() for layers in hidden} | {layers[1]["b"].tobytes() for layers in hidden}) == 6


def test_acting_against_numpy():
    """The mean without exploration. With it: noise of the policy's std, another draw for every step and environment,
    not clipped. The actor counts steps, its balance stays 0."""
    args = small_args(num_envs=500)
    agent = random_agent(args=args)
    obs = np.tile(np.random.default_rng(1).normal(size=OBS), (500, 1)).astype(np.float32)
    actor, first = ppo.init_actor(args, jax.random.key(2), ACTIONS), np.zeros(500, bool)
    mean, actor = ppo.act(args, agent, actor, obs, first, False)
    policy = agent.networks["policy"]
    np.testing.assert_allclose(mean, np_mlp(policy["mean"], np_normalise(agent.stats, obs)), atol=1e-5)
    one, actor = ppo.act(args, agent, actor, obs, first, True)
    two, actor = ppo.act(args, agent, actor, obs, ~first, True)
    drawn = (np.concatenate([one, two]) - mean[0]) / np.exp(policy["log_std"])
    assert np.abs(drawn.mean(0)).max() < 0.15 and np.abs(drawn.std(0) - 1.0).max() < 0.1
    assert len(np.unique(drawn, axis=0)) == 1000 and np.abs(np.asarray(one)).max() > 1.0
    assert int(actor.step) == 3 and not np.any(actor.metrics["charts/balance"]) and ppo.action_size(agent) == ACTIONS


def test_log_probabilities_and_divergence_against_scipy():
    """log N(a; mean, std) summed over actions; KL(old, pi) by numerical integration, summed over actions, mean over
    states, in that order of the two."""
    agent, rng = random_agent(), np.random.default_rng(3)
    policy, obs, action = agent.networks["policy"], rng.normal(size=(4, OBS)), rng.normal(size=(4, ACTIONS))
    mean, std = np_mlp(policy["mean"], obs), np.exp(np.asarray(policy["log_std"], np.float64))
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    np.testing.assert_allclose(ppo.log_prob(policy, f32(obs), f32(action)),
                               scipy.stats.norm.logpdf(action, mean, std).sum(-1), rtol=1e-4)
    old_mean, old_std = mean + rng.normal(size=mean.shape), std * np.exp(rng.normal(size=ACTIONS))

    def integral(m0, s0, m1, s1):
        old, new = scipy.stats.norm(m0, s0), scipy.stats.norm(m1, s1)
        inside = lambda x: old.pdf(x) * (old.logpdf(x) - new.logpdf(x))
        return scipy.integrate.quad(inside, m0 - 10 * s0, m0 + 10 * s0, limit=200)[0]

    expected = np.mean([sum(integral(old_mean[n, a], old_std[a], mean[n, a], std[a]) for a in range(ACTIONS))
                        for n in range(4)])
    got = ppo.divergence(policy, f32(old_mean), f32(np.log(old_std)), f32(obs))
    assert float(got) == pytest.approx(expected, rel=1e-3) and expected > 0.5
    assert float(ppo.divergence(policy, f32(mean), policy["log_std"], f32(obs))) == pytest.approx(0.0, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Costs of episodes, the multiplier
# ----------------------------------------------------------------------------------------------------------------------
tally = jax.jit(ppo.tally)


def np_tally(amounts, dones, window):
    """Both results of `tally` over several rollouts, transition by transition."""
    total, ended = np.zeros(amounts[0].shape[1]), []
    for amount, done in zip(amounts, dones):
        for t, e in np.ndindex(amount.shape):
            total[e] += amount[t, e]
            if done[t, e]:
                ended.append(total[e])
                total[e] = 0.0
    kept = ended[-window:]
    return total, [math.nan] * (window - len(kept)) + kept


@given(st.sampled_from([(1, 1, 1), (3, 4, 5), (2, 7, 40), (4, 5, 2)]), st.floats(0.0, 1.0), st.integers(0, 2**20))
def test_costs_of_episodes_by_brute_force(sizes, ends, seed):
    """Sums that go on across rollouts, and the newest finished ones, in time, then by environment; NaN before.
    Environments, steps and window have those sizes."""
    (environments, steps, window), rng = sizes, np.random.default_rng(seed)
    amounts = [rng.integers(-3, 9, (steps, environments)).astype(np.float32) for _ in range(3)]
    dones = [(rng.random((steps, environments)) < ends).astype(np.float32) for _ in range(3)]
    so_far, finished = jnp.zeros(environments), jnp.full(window, jnp.nan)
    for n in range(3):
        so_far, finished = tally(so_far, finished, amounts[n], dones[n])
        expected_so_far, expected = np_tally(amounts[:n + 1], dones[:n + 1], window)
        np.testing.assert_array_equal(so_far, expected_so_far)
        np.testing.assert_array_equal(finished, expected)


def lambdas(costs, **flags):
    """lambda after each of those J_c, from a new multiplier."""
    args = small_args(cost_limit=25.0, **flags)
    multiplier, found = ppo.init_multiplier(args), []
    for cost in costs:
        multiplier = ppo.next_multiplier(args, multiplier, jnp.float32(cost))
        found.append(float(multiplier.value))
    return found


def test_multiplier_by_adam():
    """From 0.001 by 0.035 at the first steps, whatever the violation's size, and never below 0."""
    assert lambdas([45.0, 45.0]) == pytest.approx([0.036, 0.071], rel=1e-4)
    assert lambdas([25.1]) == pytest.approx([0.036], rel=1e-3)
    assert lambdas([24.0, 0.0, 10.0]) == [0.0, 0.0, 0.0]
    costs, first, second, value, expected = [60.0, 30.0, 5.0, 80.0, 20.0, 20.0, 20.0], 0.0, 0.0, 0.5, []
    for t, cost in enumerate(costs, start=1):
        grad = 25.0 - cost
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        value = max(value - 0.2 * first / (1 - 0.9**t) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8), 0.0)
        expected.append(value)
    assert lambdas(costs, lambda_init=0.5, lambda_lr=0.2) == pytest.approx(expected, rel=1e-4)


def test_multiplier_by_pid():
    """J_c = 45, 35, 20 and a limit of 25, worked out: e = 20, 10, -5; smoothed (1/2) 10, 10, 2.5; integral 0.001 + 0.2,
    + 0.1, - 0.05; smoothed J_c 22.5, 28.75, 24.375, which rises over two updates, at first from 0, by 22.5, 28.75 and
    1.875."""
    flags = dict(multiplier="pid", pid_kp=0.1, pid_ki=0.01, pid_kd=0.02, pid_smoothing=0.5, pid_delay=2)
    by_hand = [1.0 + 0.201 + 0.45, 1.0 + 0.301 + 0.575, 0.25 + 0.251 + 0.0375]
    assert lambdas([45.0, 35.0, 20.0], **flags) == pytest.approx(by_hand, rel=1e-5)


def test_multiplier_by_pid_has_three_floors():
    """The integral, which does not go into debt; the rise, where the cost falls; and lambda itself."""
    only = lambda **gain: dict(multiplier="pid", pid_kp=0.0, pid_ki=0.0, pid_kd=0.0, lambda_init=0.0) | gain
    assert lambdas([0.0, 0.0, 26.0], **only(pid_ki=0.1)) == pytest.approx([0.0, 0.0, 0.1], rel=1e-5)
    falling = lambdas([90.0, 30.0], **only(pid_kp=1.0, pid_kd=1.0, pid_smoothing=0.0, pid_delay=1))
    assert falling == pytest.approx([65.0 + 90.0, 5.0 + 0.0])
    assert lambdas([0.0], **only(pid_kp=1.0)) == [0.0]


def test_multiplier_by_pid_measures_the_rise_over_the_delay():
    """Without smoothing, J_c = 1, 2, 4, 8, ... and a delay of 10: minus 0 for ten updates, then minus the first."""
    costs = [2.0**k for k in range(13)]
    expected = costs[:10] + [costs[10] - 1.0, costs[11] - 2.0, costs[12] - 4.0]
    found = lambdas(costs, multiplier="pid", pid_kp=0.0, pid_ki=0.0, pid_kd=1.0, lambda_init=0.0, pid_smoothing=0.0)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["adam", "pid"])
def test_multiplier_stays_until_an_episode_has_ended(kind):
    args = small_args(multiplier=kind, lambda_init=0.3)
    before = ppo.next_multiplier(args, ppo.init_multiplier(args), jnp.float32(9.0))
    assert leaves_equal(ppo.next_multiplier(args, before, jnp.float32(math.nan)), before)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages
# ----------------------------------------------------------------------------------------------------------------------
def test_advantages_by_hand():
    """gamma = lambda = 1/2. Row 1 is terminated: V(s') = 5 does not count. Row 2 is truncated: its V(s') = 5 does, what
    comes after does not. The last row is cut: its V(s') = 4 stands for the rest.

    delta = 1 + 1 - 1, 3 - 2, 3 + 2.5 - 1, 4 + 1 - 3, 5 + 2 - 2 = 1, 1, 4.5, 2, 5; within episodes A = delta + A' / 4,
    so 1 + 1/4, 1, 4.5, 2 + 5/4, 5. The second environment is one unbroken episode with values of 0 and rewards of 1."""
    columns = dict(terminated=[0, 1, 0, 0, 0], done=[0, 1, 1, 0, 0])
    rows = Transition(None, None, None, None, None, *(
        jnp.stack([jnp.array(column, jnp.float32), jnp.zeros(5)], -1) for column in columns.values()))
    pair = lambda column, other: jnp.stack([jnp.array(column, jnp.float32), jnp.full(5, other)], -1)
    reward, now, following = pair([1, 3, 3, 4, 5], 1.0), pair([1, 2, 1, 3, 2], 0.0), pair([2, 5, 5, 2, 4], 0.0)
    found = ppo.advantages(small_args(gae_lambda=0.5), 0.5, reward, rows, now, following)
    np.testing.assert_allclose(found[:, 0], [1.25, 1.0, 4.5, 3.25, 5.0], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], np.cumsum(0.25 ** np.arange(5))[::-1], rtol=1e-6)


def np_advantages(gamma, mix, amount, rows, now, following):
    """The same from its definition: sum over later steps of one episode of (gamma lambda)^k delta."""
    terminated, done = np.asarray(rows.terminated), np.asarray(rows.done)
    delta = amount + gamma * (1 - terminated) * following - now
    found = np.zeros_like(delta)
    for t, e in np.ndindex(delta.shape):
        for k in range(t, len(delta)):
            found[t, e] += (gamma * mix) ** (k - t) * delta[k, e]
            if done[k, e]:
                break
    return found


def test_a_rollout_is_prepared_for_both_critics():
    """Every column in NumPy: gammas and critics of their own, rewards' advantages standardised, costs' only centred,
    returns A + V, and N = T E transitions in one order."""
    agent, rows = random_agent(), random_rows(4)
    batch = ppo.prepare(ARGS, agent.networks, agent.stats, rows)
    obs, next_obs = np_normalise(agent.stats, rows.obs), np_normalise(agent.stats, rows.next_obs)
    for name, gamma, amount, target in (("value", 0.9, rows.reward, batch.target),
                                        ("cost_value", 0.8, rows.cost, batch.cost_target)):
        now, following = (np_mlp(agent.networks[name], x)[..., 0] for x in (obs, next_obs))
        expected = np_advantages(gamma, 0.7, np.asarray(amount, np.float64), rows, now, following)
        np.testing.assert_allclose(target, (expected + now).ravel(), rtol=1e-4, atol=1e-5)
        centred = (expected - expected.mean()).ravel()
        if name == "value":
            np.testing.assert_allclose(batch.advantage, centred / expected.std(), rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(batch.cost_advantage, centred, rtol=1e-4, atol=1e-5)
            assert expected.std() > 1.2 or expected.std() < 0.8  # standardised would be something else
    np.testing.assert_allclose(batch.obs, obs.reshape(-1, OBS), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.action, np.reshape(rows.action, (-1, ACTIONS)))


def test_a_pass_takes_every_transition_once():
    """In a random order that another key changes; 12 = 2 x 5 transitions and 2 that are left over; columns together."""
    n = E * T
    numbers = jnp.arange(n, dtype=jnp.float32)
    batch = ppo.Batch(*(jnp.stack([numbers + 100 * i] * 2, -1) if i < 2 else numbers + 100 * i for i in range(7)))
    one, two = (ppo.minibatches(ARGS, batch, key) for key in jax.random.split(jax.random.key(0)))
    for i, column in enumerate(one):
        first = column[..., 0] if i < 2 else column
        assert first.shape == (2, 5)
        np.testing.assert_array_equal(first - 100 * i, one.log_prob - 200)
    chosen = np.asarray(one.log_prob - 200).ravel()
    assert len(set(chosen)) == 10 and set(chosen) <= set(range(n)) and chosen.tolist() != sorted(chosen)
    assert not np.array_equal(one.log_prob, two.log_prob)
    left = [set(range(n)) - set(np.asarray(ppo.minibatches(ARGS, batch, key).log_prob - 200).ravel())
            for key in jax.random.split(jax.random.key(1), 40)]
    assert set().union(*left) == set(range(n))  # not always the same ones


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------
def one_batch(seed=5, size=12):
    """A batch with ratios on both sides of the clip."""
    agent, rng = random_agent(), np.random.default_rng(seed)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch = ppo.Batch(f32(size, OBS), f32(size, ACTIONS), f32(size), f32(size), f32(size), f32(size), f32(size))
    policy = agent.networks["policy"]
    return agent, batch._replace(log_prob=ppo.log_prob(policy, batch.obs, batch.action) - 0.3 * batch.log_prob)


def test_surrogate_by_hand():
    """ratio 1.5 and 0.5 under advantages of both signs, clip 0.2: min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8),
    min(-0.5, -0.8) -> 1.2, -1.5, 0.5, -0.8; a ratio of 1.1 is not clipped."""
    agent, batch = one_batch(size=5)
    policy, ratios = agent.networks["policy"], np.array([1.5, 1.5, 0.5, 0.5, 1.1])
    log_prob = ppo.log_prob(policy, batch.obs, batch.action)
    batch = batch._replace(log_prob=log_prob - np.log(ratios).astype(np.float32),
                           advantage=jnp.array([1.0, -1.0, 1.0, -1.0, 2.0]))
    raised, clipped = ppo.surrogate(policy, Args(), batch)
    assert float(raised) == pytest.approx((1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5, rel=1e-4)
    assert float(clipped) == pytest.approx(0.8)


def test_advantages_are_mixed_by_the_multiplier():
    """(A - lambda A_c) / (1 + lambda): A = 2, A_c = 4 give 2, 0, -2 at lambda = 0, 1/2, 2."""
    _, batch = one_batch()
    batch = batch._replace(advantage=jnp.full(12, 2.0), cost_advantage=jnp.full(12, 4.0))
    mixed = [float(ppo.balanced(batch, multiplier).advantage[3]) for multiplier in (0.0, 0.5, 2.0)]
    assert mixed == pytest.approx([2.0, 0.0, -2.0])


def test_losses_against_numpy():
    """Squared error of V on the reward's returns, of V_c on the cost's, each plus 0.3 times its squared parameters; for
    the policy minus the surrogate."""
    agent, batch = one_batch()
    args = small_args(critic_l2=0.3)
    raised, clipped = map(float, ppo.surrogate(agent.networks["policy"], args, batch))
    expected = {"policy": {"losses/policy": -raised, "losses/clip_fraction": clipped}}
    for name, target in (("value", batch.target), ("cost_value", batch.cost_target)):
        error = np.mean((np_mlp(agent.networks[name], np.asarray(batch.obs))[:, 0] - np.asarray(target)) ** 2)
        squares = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(agent.networks[name]))
        expected[name] = {f"losses/{name}": error + 0.3 * squares}
    assert ppo.LOSSES.keys() == expected.keys()
    for name, metrics in expected.items():
        loss, told = ppo.LOSSES[name](agent.networks[name], args, batch)
        assert float(loss) == pytest.approx(metrics[f"losses/{name}"], rel=1e-4)
        assert {tag: float(value) for tag, value in told.items()} == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("size, pace", [(10.0, 0.25), (0.001, 1.0), (3.0, 1.0)])
def test_a_pass_takes_adams_step_for_every_minibatch(size, pace):
    """Three minibatches in NumPy: gradients clipped to norm 0.5 where they are longer, steps times `pace`; metrics are
    means over them."""
    rng, args = np.random.default_rng(6), small_args(grad_clip=0.5, learning_rate=0.01)
    network = random_agent().networks["value"]
    grads = jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=(3, *x.shape)), jnp.float32), network)
    along = lambda network, args, grad: (optax.tree.vdot(grad, network), {"first": grad[0]["b"][0]})
    after, state, metrics = ppo.fit(args, along, network, ppo.optimizer(args).init(network), grads, pace)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
    first, second, expected = 0.0, 0.0, flat(network)
    for t in (1, 2, 3):
        grad = flat(jax.tree.map(lambda x: x[t - 1], grads))
        grad = grad * min(1.0, 0.5 / np.linalg.norm(grad))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        expected -= 0.01 * pace * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(flat(after), expected, atol=2e-6)
    assert float(metrics["first"]) == pytest.approx(float(grads[0]["b"][:, 0].mean()), rel=1e-5)
    assert (np.linalg.norm(grad) < 0.49) == (size == 0.001)  # that one is not clipped


def test_all_networks_learn_from_the_same_minibatches():
    """`one_pass` is `fit` for each of them, the policy's steps at a quarter; a state for each."""
    agent, batch = one_batch()
    key, args = jax.random.key(2), small_args(learning_rate=0.01)
    networks, states, metrics = ppo.one_pass(args, agent.networks, agent.optimizers, batch, jax.random.clone(key), 0.25)
    parts, told = ppo.minibatches(args, batch, key), {}
    for name in agent.networks:
        network, state, each = ppo.fit(args, ppo.LOSSES[name], agent.networks[name], agent.optimizers[name], parts,
                                       0.25 if name == "policy" else 1.0)
        assert leaves_equal((network, state), (networks[name], states[name]))
        assert not leaves_equal(network, agent.networks[name])
        told |= each
    assert metrics == told
    assert set(told) == {f"losses/{name}" for name in ("policy", "clip_fraction", "value", "cost_value")}


# ----------------------------------------------------------------------------------------------------------------------
# Updates
# ----------------------------------------------------------------------------------------------------------------------
improve = jax.jit(ppo.improve, static_argnums=0)


def prepared(args, agent, seed=7):
    return ppo.balanced(ppo.prepare(args, agent.networks, agent.stats, random_rows(seed)), 0.5)


def test_passes_stop_once_the_policy_has_moved_far_enough():
    """KL after one, two and three passes is recorded; a target between the first two ends after the second, with the
    very networks of two passes."""
    agent, key, by_passes = random_agent(), jax.random.key(1), {}
    for passes in (1, 2, 3):
        args = small_args(epochs=passes, target_kl=1e9, learning_rate=1e-3)
        by_passes[passes] = improve(args, agent, prepared(args, agent), jax.random.clone(key))
    kls = [float(by_passes[passes][2]["losses/kl"]) for passes in by_passes]
    assert all(np.diff(kls) > 0), kls
    assert [int(by_passes[passes][2]["losses/epochs"]) for passes in by_passes] == [1, 2, 3]
    args = small_args(epochs=3, target_kl=0.5 * (kls[0] + kls[1]), learning_rate=1e-3)
    networks, states, metrics = improve(args, agent, prepared(args, agent), jax.random.clone(key))
    assert int(metrics["losses/epochs"]) == 2 and leaves_equal((networks, states, metrics), by_passes[2])
    old, obs = agent.networks["policy"], prepared(args, agent).obs
    kl = ppo.divergence(networks["policy"], ppo.mlp(old["mean"], obs), old["log_std"], obs)
    assert float(metrics["losses/kl"]) == pytest.approx(float(kl), rel=1e-5)


def test_nothing_has_moved_at_the_first_minibatch():
    """One pass of one minibatch of all: every ratio is 1, so none is clipped and the loss is minus the mean advantage,
    although the policy is no longer the one that acted first and the statistics have changed."""
    args = small_args(epochs=1, batch_size=E * T)
    agent = random_agent(args=args)
    for seed in range(2):
        agent, _ = ppo.update_many(args, agent, buffer_of(ppo, args, random_rows(seed)), 1)
    rows = random_rows(9)
    batch = ppo.prepare(args, agent.networks, agent.stats, rows)
    acted, _ = ppo.act(args, agent, ppo.init_actor(args, jax.random.key(0), ACTIONS), rows.obs[2], None, False)
    std = np.exp(np.asarray(agent.networks["policy"]["log_std"]))
    expected = scipy.stats.norm.logpdf(rows.action[2], acted, std).sum(-1)
    np.testing.assert_allclose(batch.log_prob.reshape(T, E)[2], expected, rtol=1e-4)
    policy = agent.networks["policy"]
    assert np.array_equal(jnp.exp(ppo.log_prob(policy, batch.obs, batch.action) - batch.log_prob), np.ones(E * T))
    _, _, metrics = improve(args, agent, batch, jax.random.key(3))
    assert float(metrics["losses/clip_fraction"]) == 0.0
    assert float(metrics["losses/policy"]) == pytest.approx(-float(batch.advantage.mean()), abs=1e-6)


def test_the_policys_step_size_falls_to_zero_over_the_run():
    """Four updates in all: at the start, half-way and at the last, Adam's first step is 1, 1/2, 1/4 of 1e-3; beyond the
    run 0; the critics' always 1e-3."""
    args = small_args(epochs=1, batch_size=E * T, learning_rate=1e-3)
    agent = random_agent(args=args)
    largest = lambda new, old: max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (new, old))))
    for done, share in ((0, 1.0), (2, 0.5), (3, 0.25), (4, 0.0), (9, 0.0)):
        now = agent._replace(num_updates=jnp.int32(done))
        networks, _, _ = improve(args, now, prepared(args, now), jax.random.key(0))
        moved = {name: largest(networks[name], agent.networks[name]) for name in networks}
        assert moved["policy"] == pytest.approx(1e-3 * share, rel=2e-3, abs=1e-7)
        assert moved["value"] == pytest.approx(1e-3, rel=2e-3) == moved["cost_value"]


def test_an_update_does_all_of_it_in_order():
    """Multiplier first, from this rollout's episodes; advantages mixed by it; statistics after the networks."""
    agent, rows, key = random_agent(), random_rows(2, ends=0.4), jax.random.key(4)
    after, metrics = jax.jit(ppo.update, static_argnums=0)(ARGS, agent, rows, jax.random.clone(key))
    total, ended = np_tally([np.asarray(rows.cost)], [np.asarray(rows.done)], 4)
    np.testing.assert_array_equal(after.so_far, total)
    np.testing.assert_array_equal(after.finished, ended)
    cost = np.nanmean(ended)
    multiplier = ppo.next_multiplier(ARGS, agent.multiplier, jnp.float32(cost))
    assert float(after.multiplier.value) == pytest.approx(float(multiplier.value)) and multiplier.value != 0.001
    batch = ppo.balanced(ppo.prepare(ARGS, agent.networks, agent.stats, rows), multiplier.value)
    networks, states, inner = improve(ARGS, agent, batch, jax.random.clone(key))
    close = lambda one, other: all(np.allclose(a, b, rtol=1e-4, atol=1e-6)
                                   for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    assert close((after.networks, after.optimizers), (networks, states))
    assert close(after.stats, ppo.add_to_stats(agent.stats, rows.obs)) and after.stats.count == 50 + E * T
    assert int(after.num_updates) == 1 and leaves_equal(after.key, agent.key)
    told = {tag: float(value) for tag, value in metrics.items()}
    assert told["lagrangian/cost"] == pytest.approx(cost, rel=1e-6)
    assert told["lagrangian/violation"] == pytest.approx(cost - 1.5, rel=1e-5)
    assert told["lagrangian/lambda"] == pytest.approx(float(multiplier.value), rel=1e-6)
    std = np.exp(np.asarray(networks["policy"]["log_std"]))
    assert told["losses/entropy"] == pytest.approx(scipy.stats.norm(0, std).entropy().sum(), rel=1e-5)
    squares = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(networks))
    assert told["losses/param_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert {tag: told[tag] for tag in inner} == pytest.approx({tag: float(x) for tag, x in inner.items()}, rel=1e-3)


def test_without_a_finished_episode_numbers_are_finite():
    """The multiplier stays; cost and violation are told as 0."""
    args, agent = small_args(), random_agent()
    after, metrics = ppo.update_many(args, copy(agent), buffer_of(ppo, args, random_rows(2, ends=0.0)), 1)
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert leaves_equal(after.multiplier, agent.multiplier) and np.isnan(after.finished).all()
    assert metrics["lagrangian/cost"] == metrics["lagrangian/violation"] == 0.0


def test_the_oldest_row_comes_first():
    """Whatever place of the ring it stands in."""
    args, agent, rows = small_args(), random_agent(), random_rows(3)
    ends = [ppo.update_many(args, copy(agent), buffer_of(ppo, args, rows, head), 1) for head in (0, 4)]
    assert leaves_equal(*ends)


def test_another_update_is_compiled_no_more():
    """After the first, whose agent is fresh."""
    args = small_args(epochs=2)
    agent, rows = ppo.init_agent(args, jax.random.key(0), OBS, ACTIONS), random_rows(3)
    count = ppo.update_many._cache_size()
    for _ in range(3):
        agent, _ = ppo.update_many(args, agent, buffer_of(ppo, args, rows), 1)
    assert ppo.update_many._cache_size() == count + 1 and int(agent.num_updates) == 3


def check_every_update_draws_anew(module, args, agent, monkeypatch):
    """The key of the third update is not that of the fourth."""
    monkeypatch.setattr(module, "update", lambda args, agent, rows, key: (agent, {"noise": jax.random.uniform(key)}))
    buffer = buffer_of(module, args, random_rows())
    told = jax.jit(lambda done: module.update_many.__wrapped__(args, agent._replace(num_updates=done), buffer, 1)[1])
    assert told(2)["noise"] != told(3)["noise"]


def test_every_update_draws_anew(monkeypatch):
    check_every_update_draws_anew(ppo, ARGS, random_agent(), monkeypatch)


def test_every_pass_draws_anew(monkeypatch):
    """The keys of three passes, which a pass here does nothing but note."""
    told = {f"losses/{name}": jnp.float32(0.0) for name in ("policy", "value", "cost_value", "clip_fraction")}
    monkeypatch.setattr(ppo, "one_pass", lambda args, networks, states, batch, key, pace: (
        networks, jnp.append(states[1:], jax.random.uniform(key)), told))
    agent = random_agent()._replace(optimizers=jnp.zeros(3))
    _, noted, metrics = ppo.improve(small_args(epochs=3), agent, random_rows(), jax.random.key(0))
    assert metrics["losses/epochs"] == 3 and len({0.0, *noted.tolist()}) == 4


@pytest.mark.parametrize("step, due", [(0, 0), (19_999, 0), (20_000, 1), (39_980, 1), (40_000, 2), (5_000_000, 250)])
def test_an_update_is_due_for_every_whole_rollout(step, due):
    assert ppo.updates_due(Args(), step) == due


def test_the_ring_holds_one_rollout():
    """1000 rows of 20 environments; fewer where an agent step is several simulator steps."""
    for args, steps in ((Args(), 1000), (Args(num_envs=10, action_repeat=5), 400)):
        shapes = jax.eval_shape(partial(ppo.init_buffer, args, 60, 2)).rows
        assert shapes.obs.shape == (steps, args.num_envs, 60) and shapes.done.shape == (steps, args.num_envs)


def test_critic_metrics_read_the_cost_critic():
    """V_c of the normalised observations, beside the discounted cost that followed: two episodes of four and three
    steps, cost at the third of the first and at the second of the other, gamma_c = 0.8."""
    agent, rng = random_agent(), np.random.default_rng(8)
    episodes = []
    for cost in ([0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0]):
        n = len(cost)
        rows = Transition(rng.normal(size=(n, OBS)).astype(np.float32), np.zeros((n, ACTIONS)), np.zeros(n),
                          np.array(cost), np.zeros((n, OBS)), np.zeros(n), np.eye(n)[-1])
        episodes.append({"played": rows})
    a, b = (np_mlp(agent.networks["cost_value"], np_normalise(agent.stats, episode["played"].obs))[:, 0]
            for episode in episodes)
    found = ppo.critic_metrics(ARGS, agent, episodes)
    assert found["critic/read_inside"] == pytest.approx(np.mean([a[3], b[2]]), rel=1e-4)
    assert found["critic/followed_inside"] == pytest.approx(np.mean([a[3], b[2]]), rel=1e-4)  # their last steps
    assert found["critic/read_before_2"] == pytest.approx(np.mean([a[1], b[0]]), rel=1e-4)
    assert found["critic/followed_before_2"] == pytest.approx(
        np.mean([0.8 + 0.8**2 * a[3], 0.8 + 0.8**2 * b[2]]), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# An environment whose best policy is known
# ----------------------------------------------------------------------------------------------------------------------
PROBE = dict(num_envs=8, train_every=800, batch_size=100, hidden=16, gamma=0.5, cost_gamma=0.5, cost_window=80,
             eval_every=0)


def practise(module, args, updates, price=5.0, seed=0):
    """Learn where the state s is -1 or 1, the reward -(x - 0.8)^2 and noise, the cost price (x + 1), with x = s a, and
    episodes have ten steps -> x of the mean action in both states after each of the last ten updates, agent, metrics.

    At a price of 1 x = 0.8 is best, for a cost of 18. At 5 that costs 90, and under a limit of 60 the best is 0.2: the
    cost is linear in x, so that a mean x costs the same with any noise."""
    rng, envs, steps = np.random.default_rng(seed), args.num_envs, args.train_every // args.num_envs
    agent, buffer = module.init_agent(args, jax.random.key(seed), 1, 1), module.init_buffer(args, 1, 1)
    actor, found = module.init_actor(args, jax.random.key(seed + 1), 1), []
    draw = lambda: rng.choice([-1.0, 1.0], (envs, 1)).astype(np.float32)
    state, zeros = draw(), np.zeros(envs, np.float32)
    for update in range(updates):
        for t in range(steps):
            action, actor = module.act(args, agent, actor, state, None, True)
            x, following = (np.asarray(action) * state)[:, 0], draw()
            reward = -(x - 0.8) ** 2 + 0.5 * rng.normal(size=envs)
            columns = state, action, reward, price * (x + 1), following, zeros, zeros + (t % 10 == 9)
            buffer = module.add(buffer, module.Transition(*(np.asarray(column, np.float32) for column in columns)))
            state = following
        agent, metrics = module.update_many(args, agent, buffer, 1)
        both = np.array([[-1.0], [1.0]], np.float32)
        means = module.mlp(agent.networks["policy"]["mean"], module.normalise(args, agent.stats, both))
        found.append((np.asarray(means) * both)[:, 0])
    return np.array(found[-10:]), agent, metrics


LIMITED = dict(**PROBE, learning_rate=1e-3, total_timesteps=800 * 110, cost_limit=60.0)


@pytest.mark.long
@pytest.mark.parametrize("flags", [dict(multiplier="pid", pid_kp=0.01, pid_ki=0.001), dict(lambda_lr=0.01)],
                         ids=["pid", "adam"])
def test_the_best_under_a_limit_is_found(fast, flags):
    """Both multipliers: x = 0.2 at a cost of 60, held by a lambda well above 0."""
    x, agent, metrics = practise(ppo, Args(**LIMITED, **flags), 110)
    assert np.abs(x.mean(0) - 0.2).max() < 0.1, x
    assert 55.0 < float(metrics["lagrangian/cost"]) < 65.0 and 0.3 < float(agent.multiplier.value) < 0.8


def test_the_unconstrained_optimum_is_found(fast):
    """A limit that is not reached: lambda is 0 and both states' actions are the best."""
    x, agent, metrics = practise(ppo, Args(**LIMITED, lambda_lr=0.01), 50, price=1.0)
    assert np.abs(x.mean(0) - 0.8).max() < 0.1, x
    assert 16.0 < float(metrics["lagrangian/cost"]) < 20.0 and agent.multiplier.value == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------
def test_defaults():
    """Those of OmniSafe and SafePO, with the length and the limit of SPOWL's Table 1."""
    expected = dict(num_envs=20, action_repeat=1, train_every=20_000, learning_starts=0, total_timesteps=5_000_000,
                    eval_every=500_000, eval_episodes=10, cost_limit=25.0, obs_transform="raw", hidden=64, gamma=0.99,
                    cost_gamma=0.99, gae_lambda=0.95, epochs=40, batch_size=64, target_kl=0.02, clip=0.2,
                    learning_rate=3e-4, grad_clip=40.0, critic_l2=0.001, lambda_init=0.001, lambda_lr=0.035,
                    multiplier="adam", pid_kp=0.1, pid_ki=0.01, pid_kd=0.01, pid_smoothing=0.95, pid_delay=10,
                    cost_window=100, preset="paper", exp_name="ppo_lagrangian")
    args = dataclasses.asdict(parse_args([]))
    assert {name: args[name] for name in expected} == expected and ppo.advice(Args()) == ""


@pytest.mark.parametrize("words, told", [
    ("--train-every 1010 --eval-every 0", "--train-every must be a multiple of --num-envs x --action-repeat = 20, for "
     "example 1000"),
    ("--num-envs 7 --total-timesteps 70", "--train-every must be a multiple of --num-envs x --action-repeat = 7, for "
     "example 19999"),
    ("--total-timesteps 50", "--total-timesteps must be a multiple of --num-envs x --action-repeat = 20"),
    ("--learning-starts 20000", "--learning-starts must be 0: the policy learns from its own actions alone"),
    ("--batch-size 20001", "--batch-size must not exceed the 20000 transitions of --train-every / --action-repeat"),
    ("--batch-size 4001 --action-repeat 5", "--batch-size must not exceed the 4000 transitions of"),
    ("--eval-every 30000", "--eval-every must be a multiple of --train-every"),
    ("--exp-name a/b", "--exp-name must not hold a slash"),
    ("--epochs 0", "--epochs must be at least 1"), ("--hidden 0", "--hidden must be at least 1"),
    ("--clip 0", "--clip must be positive"), ("--target-kl 0", "--target-kl must be positive"),
    ("--gae-lambda 1.1", "--gae-lambda must be at least 0 and at most 1"),
    ("--pid-smoothing 2", "--pid-smoothing must be at least 0 and at most 1"),
    ("--lambda-init -1", "--lambda-init must be at least 0"), ("--lambda-lr 0", "--lambda-lr must be positive"),
    ("--cost-window 0", "--cost-window must be at least 1"), ("--pid-delay 0", "--pid-delay must be at least 1"),
    ("--cost-limit nan", "--cost-limit must be a finite number"), ("--critic-l2 -1", "--critic-l2 must be at least 0"),
    ("--resume /nowhere", "/nowhere is not a run directory"),
])
def test_flags_that_cannot_be(words, told):
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    assert stop.value.code.startswith(told) and "\n" not in stop.value.code


def test_a_rollout_that_cannot_fit_is_refused():
    args = parse_args("--train-every 2e10 --total-timesteps 2e10 --eval-every 0".split())
    with pytest.raises(SystemExit, match=r"^the replay buffer needs .*: lower --buffer-size \(--train-every, where"):
        ppo.begin(args, None, (60, 2))


SCRIPT = ROOT / "baselines" / "ppo_lagrangian.py"
FLAGS = ("--num-envs 2 --action-repeat 25 --train-every 2000 --total-timesteps 5000 --eval-every 2000 --hidden 8 "
         "--eval-episodes 2 --batch-size 16 --epochs 3").split()  # a rollout is one episode of each
LOGGED = """charts/episodic_return charts/episodic_cost charts/episodic_length charts/cost_rate charts/SPS
charts/balance eval/episodic_return eval/episodic_cost eval/balance losses/policy losses/value losses/cost_value
losses/entropy losses/kl losses/param_norm lagrangian/cost lagrangian/violation time/env time/act time/update""".split()


def trained(place, script, *flags):
    """A run into a directory of its own -> its directory, what it printed."""
    runs = place / f"runs{len(list(place.iterdir()))}"
    finished = run(place, "--runs-dir", runs, *flags, script=script)
    (directory,) = runs.iterdir()
    return directory, finished.stdout


def check_run(directory, stdout, own):
    """What a real run wrote: two updates, none of the last, shorter part; every tag; costs of its episodes as
    episodes.csv has them."""
    lines = [match[1] for match in map(SUMMARY.fullmatch, stdout.splitlines()) if match]
    assert lines == ["2,000", "4,000", "5,000"]
    logged, (counters, arrays) = scalars(directory), checkpoint(directory)
    assert {tag for tag in logged if not tag.startswith("critic/")} == {
        *LOGGED, *own}
    assert {"critic/read_outside", "critic/followed_outside"} <= logged.keys()
    assert all(math.isfinite(value) for points in logged.values() for _, value in points)
    assert [step for step, _ in logged["lagrangian/cost"]] == [2000, 4000]
    assert {value for tag in ("charts/balance", "eval/balance") for _, value in logged[tag]} == {0.0}
    costs = [float(row["cost"]) for row in rows_of(directory / "episodes.csv") if row["split"] == "train"]
    window = arrays["['agent'].finished"]
    assert len(costs) == 4 and window[-4:].tolist() == costs and np.isnan(window[:-4]).all()
    assert [value for _, value in logged["lagrangian/cost"]] == pytest.approx([np.mean(costs[:n]) for n in (2, 4)])
    assert arrays["['agent'].num_updates"] == 2 and counters["step"] == 5000
    assert arrays["['agent'].stats.count"] == 160 and arrays["['buffer'].rows.obs"].shape[:2] == (40, 2)


def check_resumed(place, script, straight):
    """Ctrl-C to the whole group in the first rollouts, then --resume: the end of the uninterrupted run."""
    runs = place / f"interrupted{len(list(place.iterdir()))}"
    words = [sys.executable, "-c", HEED_SIGNALS, sys.executable, str(script), "--runs-dir", str(runs), *FLAGS]
    process = subprocess.Popen(words, cwd=place, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    assert str(runs) in "".join(process.stdout.readline() for _ in range(2))
    time.sleep(0.5)  # it compiles, collects or learns: seconds are left
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    (directory,) = runs.iterdir()
    assert process.returncode == 130 and "Traceback" not in stderr and f"--resume {directory}" in stderr
    assert checkpoint(directory)[0]["step"] < 5000
    run(place, "--resume", directory, script=script)
    same_end(directory, straight)


def check_evaluated(place, script, straight):
    """--evaluate plays the last evaluation's episodes again; another script is refused in one line."""
    run(place, "--evaluate", straight, script=script)
    again, last = rows_of(straight / "evaluation.csv"), rows_of(straight / "episodes.csv")[-2:]
    assert [{column: row[column] for column in last[0]} for row in again] == last
    one_line(command(place, ROOT / "spowl_continuous.py", "--resume", straight), f"{script.stem}.py: use that script")


@pytest.fixture(scope="module")
def straight(place):
    return trained(place, SCRIPT, *FLAGS)


def test_a_real_run(straight):
    check_run(*straight, ["losses/epochs", "losses/clip_fraction", "lagrangian/lambda"])


def test_an_interrupted_run_goes_on_to_the_same_end(place, straight):
    check_resumed(place, SCRIPT, straight[0])


@pytest.mark.long
def test_a_run_is_evaluated_again(place, straight):
    check_evaluated(place, SCRIPT, straight[0])
