"""SafeDreamer: the recurrent model against NumPy, its losses, returns and multipliers by hand, the planner's elites by
brute force; then a problem that needs memory and one with a cost limit, pictures, and real runs."""
import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64, leaves_equal, np_read_out, np_softmax, np_symlog, np_two_hot, random_weights
from hypothesis import given
from hypothesis import strategies as st
from test_train import (HEED_SIGNALS, SUMMARY, checkpoint, command, environment, one_line, rows_of, run, scalars,
                        train)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "baselines"))

import safedreamer as sd
from safedreamer import Args, Latent, Transition

OBS, ACTIONS, L, B = 3, 2, 6, 4
SMALL = dict(num_envs=2, action_repeat=5, train_every=100, learning_starts=100, updates_per_step=0.2, buffer_size=80,
             deter=7, stoch=2, classes=3, units=8, enc_layers=2, num_bins=21, bin_limit=4.0, batch_size=B, window=L,
             horizon=4, gamma=0.9, cost_gamma=0.8, plan_horizon=3, num_samples=12, num_elites=3, iterations=2,
             episode_length=40)  # 4 updates to a block of 10 rows, 8 rows to an episode


def small_args(**changes):
    return Args(**(SMALL | changes))


ARGS = small_args()


new_agent = jax.jit(sd.init_agent, static_argnums=(0, 2, 3))


def random_agent(args=ARGS, seed=0, obs=OBS, actions=ACTIONS):
    """An agent with noise on every weight, slow critics of their own included."""
    agent = new_agent(args, jax.random.key(seed), obs, actions)
    parts = {name: random_weights(getattr(agent, name), seed + i) for i, name in enumerate(
        ("model", "policy", "critics", "slow"))}
    return agent._replace(**parts)


def random_batch(seed=0, done=0.3, lead=(L, B)):
    rng = np.random.default_rng(seed)
    ended = rng.random(lead) < done
    normal = lambda *size: rng.normal(size=(*lead, *size)).astype(np.float32)
    return Transition(normal(OBS), normal(ACTIONS), normal(), np.round(4 * np.abs(normal())) / 2, normal(OBS),
                      (ended & (rng.random(lead) < 0.5)).astype(np.float32), ended.astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# The recurrent model in NumPy
# ----------------------------------------------------------------------------------------------------------------------
def np_normed(layer, x):
    x = x @ layer["w"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * layer["scale"] + layer["shift"]


def np_silu(x):
    return x / (1.0 + np.exp(-x))


def np_sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def np_mlp(layers, x):
    for layer in layers:
        x = x @ layer["w"] + layer["b"] if "b" in layer else np_silu(np_normed(layer, x))
    return x


def np_log_probs(args, logits):
    logits = logits.reshape(*logits.shape[:-1], args.stoch, args.classes)
    return np.log((1 - args.unimix) * np_softmax(logits) + args.unimix / args.classes)


def np_deter(model, deter, stoch, action):
    action = np.clip(action, -1.0, 1.0)
    x = np_silu(np_normed(model["input"], np.concatenate([stoch, action], -1)))
    reset, candidate, update = np.split(np_normed(model["gru"], np.concatenate([deter, x], -1)), 3, -1)
    update = np_sigmoid(update - 1.0)
    return update * np.tanh(np_sigmoid(reset) * candidate) + (1.0 - update) * deter


def test_one_step_against_numpy():
    model, rng = random_agent().model, np.random.default_rng(1)
    deter, stoch = rng.normal(size=(5, 7)), np.eye(6)[rng.integers(6, size=5)]
    action = 2 * rng.normal(size=(5, ACTIONS))
    assert np.abs(action).max() > 1.0
    latent = Latent(*(jnp.asarray(x, jnp.float32) for x in (deter, stoch)))
    got = sd.next_deter(model, latent, jnp.asarray(action, jnp.float32))
    expected = np_deter(float64(model), deter, stoch, action)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    logits = np_mlp(float64(model["prior"]), expected)
    np.testing.assert_allclose(sd.prior(ARGS, model, got), np_log_probs(ARGS, logits), atol=1e-5)
    np.testing.assert_allclose(np.exp(sd.prior(ARGS, model, got)).sum(-1), 1.0, atol=1e-6)
    assert np.exp(sd.prior(ARGS, model, got)).min() >= ARGS.unimix / ARGS.classes
    one = Latent(*(x[0] for x in latent))
    slope = jax.jit(jax.grad(lambda action: sd.next_deter(model, one, action).sum()))  # at 2 half of that at 1
    at_two = slope(jnp.array([2.0, 0.5]))
    np.testing.assert_allclose(at_two, slope(jnp.array([1.0, 0.5])) * np.array([0.5, 1.0]), rtol=1e-4)
    assert np.all(np.abs(at_two) > 1e-4)


def test_imagining_against_numpy(monkeypatch):
    """The next state, and what is drawn from: the prior given the new h, not the old one."""
    monkeypatch.setattr(sd, "sample_stoch", lambda logits, key: logits.reshape(*logits.shape[:-2], -1))
    model, rng = random_agent().model, np.random.default_rng(1)
    deter, stoch, action = rng.normal(size=(5, 7)), np.eye(6)[rng.integers(6, size=5)], rng.uniform(-1, 1, (5, ACTIONS))
    got = sd.imagine(ARGS, model, Latent(jnp.float32(deter), jnp.float32(stoch)), jnp.float32(action), None)
    expected = np_deter(float64(model), deter, stoch, action)
    np.testing.assert_allclose(got.deter, expected, atol=1e-5)
    logits = np_mlp(float64(model["prior"]), expected)
    np.testing.assert_allclose(got.stoch.reshape(5, 2, 3), np_log_probs(ARGS, logits), atol=1e-5)


@pytest.mark.parametrize("transform", ["raw", "bins"])
def test_the_filter_against_a_loop(transform):
    """`observe`, given what it drew, is the NumPy model step by step; an episode that ends inside a window is followed
    by one that begins from the first state and its own first observation."""
    args = small_args(obs_transform=transform)
    model, batch = random_agent(args).model, random_batch()
    (latents, logits), (first, first_logits) = sd.observe(args, model, batch, jax.random.key(3))
    m = float64(model)
    see = np_symlog if transform == "raw" else lambda x: np.asarray(sd.spread_obs(args, jnp.asarray(x)), np.float64)
    embed = lambda x: np_mlp(m["encoder"], see(x.astype(np.float64)))
    posterior = lambda x: np_log_probs(args, np_mlp(m["posterior"], x))
    zero = np.tanh(m["first"])
    likeliest = np.eye(3)[np_log_probs(args, np_mlp(m["prior"], zero)).argmax(-1)].ravel()
    begin = np_deter(m, zero, likeliest, np.zeros(ACTIONS))
    assert batch.done[:-1].any() and not batch.done[:-1].all()
    for b in range(B):
        for t in range(L):
            if t == 0 or batch.done[t - 1, b]:
                expected = posterior(np.concatenate([begin, embed(batch.obs[t, b])]))
                np.testing.assert_allclose(first_logits[t, b], expected, atol=1e-4)
                deter, stoch = begin, np.asarray(first.stoch[t, b], np.float64)
            deter = np_deter(m, deter, stoch, batch.action[t, b])
            np.testing.assert_allclose(latents.deter[t, b], deter, atol=1e-4)
            expected = posterior(np.concatenate([deter, embed(batch.next_obs[t, b])]))
            np.testing.assert_allclose(logits[t, b], expected, atol=1e-4)
            stoch = np.asarray(latents.stoch[t, b], np.float64)
    ones = np.asarray(latents.stoch).reshape(L, B, args.stoch, args.classes)
    np.testing.assert_allclose(ones.max(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(ones.sum(-1), 1.0, atol=1e-6)


def test_nothing_passes_an_episodes_end():
    model, batch = random_agent().model, random_batch(done=0.0)
    batch.done[2] = 1.0
    other = batch._replace(obs=batch.obs.copy(), next_obs=batch.next_obs.copy(), action=batch.action.copy())
    for name in ("obs", "next_obs", "action"):
        getattr(other, name)[:3] += 1.0
    (one, _), _ = sd.observe(ARGS, model, batch, jax.random.key(0))
    (two, _), _ = sd.observe(ARGS, model, other, jax.random.key(0))
    assert leaves_equal(*(jax.tree.map(lambda x: x[3:], latents) for latents in (one, two)))
    assert not np.array_equal(one.deter[2], two.deter[2])


def test_acting_filters_as_learning_does(monkeypatch):
    """`act` one observation at a time reaches the latents that `observe` has of the same episode, where both draw the
    likeliest; it begins anew where an episode does, and at its first step whatever it is told."""
    likeliest = lambda logits, key: jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]).reshape(*logits.shape[:-2], -1)
    monkeypatch.setattr(sd, "sample_stoch", likeliest)
    args = small_args(num_envs=B, unimix=0.02)  # flags of its own: compiled with the likeliest
    agent, batch = random_agent(args), random_batch(done=0.0)
    batch.done[2, 1] = 1.0
    for t in range(L - 1):
        batch.obs[t + 1] = np.where(batch.done[t, :, None] > 0, batch.obs[t + 1], batch.next_obs[t])
    (latents, _), (first, _) = sd.observe(args, agent.model, batch, jax.random.key(0))
    actor = sd.init_actor(args, jax.random.key(1), ACTIONS)
    for t in range(L):
        is_first = (batch.done[t - 1] > 0) if t else np.zeros(B, bool)
        _, actor = sd.act(args, agent, actor, batch.obs[t], is_first, True)
        begins = is_first[:, None] | (t == 0)
        expected = jax.tree.map(lambda new, old: np.where(begins, new[t], old[t - 1]), first, latents)
        np.testing.assert_allclose(actor.latent.deter, expected.deter, atol=1e-5)
        np.testing.assert_allclose(actor.latent.stoch, expected.stoch, atol=1e-5)
        actor = actor._replace(action=batch.action[t])  # as though that one had been taken
    assert int(actor.step) == L


def test_straight_through():
    """A draw is one-hot; its gradient is that of the probabilities."""
    logits, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32), jnp.arange(6.0)
    drawn = lambda x: sd.sample_stoch(sd.log_probs(ARGS, x), jax.random.key(0)) @ weight
    probs = lambda x: jnp.exp(sd.log_probs(ARGS, x)).ravel() @ weight
    np.testing.assert_allclose(jax.grad(drawn)(logits.ravel()), jax.grad(probs)(logits.ravel()), atol=1e-6)
    assert float(drawn(logits.ravel())) == pytest.approx(round(float(drawn(logits.ravel()))), abs=1e-5)
    many = sd.sample_stoch(jnp.broadcast_to(jnp.log(jnp.array([[0.7, 0.2, 0.1]])), (4000, 1, 3)), jax.random.key(1))
    np.testing.assert_allclose(many.mean(0), [0.7, 0.2, 0.1], atol=0.04)


# ----------------------------------------------------------------------------------------------------------------------
# The model's loss
# ----------------------------------------------------------------------------------------------------------------------
def test_kl_by_hand():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    assert float(sd.kl(jnp.log(p), jnp.log(q))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("free_bits", [0.0, 0.2])
def test_model_loss_against_numpy(free_bits):
    args = small_args(free_bits=free_bits)
    model, batch = random_agent(args).model, random_batch()
    loss, (metrics, latents) = sd.world_model_loss(model, args, batch, jax.random.key(4))
    (_, after), (first, first_logits) = sd.observe(args, model, batch, jax.random.key(4))
    m = float64(model)
    deter = np.concatenate([first.deter[:1], latents.deter]).astype(np.float64)
    stoch = np.concatenate([first.stoch[:1], latents.stoch])
    posterior = np.concatenate([first_logits[:1], after]).astype(np.float64)
    before = np_log_probs(args, np_mlp(m["prior"], deter))
    divergence = (np.exp(posterior) * (posterior - before)).sum((-1, -2))
    x = np.concatenate([deter, stoch], -1)
    error = ((np_mlp(m["decoder"], x) - np.concatenate([batch.obs[:1], batch.next_obs])) ** 2).sum(-1).mean()
    cross = {}
    for name, values in (("reward", batch.reward), ("cost", batch.cost)):
        log_softmax = np.log(np_softmax(np_mlp(m[name], x[1:])))
        each = [-(log_softmax[t, b] * np_two_hot(values[t, b], 21, 4.0)).sum() for t in range(L) for b in range(B)]
        weigh = np.where(batch.cost.ravel() >= 1.0, 10.0, 1.0) if name == "cost" else 1.0
        cross[name] = np.mean(weigh * np.array(each))
    proceed = np_sigmoid(np_mlp(m["continue"], x[1:])[..., 0])
    ends = -np.where(batch.terminated > 0, np.log(1 - proceed), np.log(proceed)).mean()
    assert {0.5, 1.0} <= set(batch.cost.ravel()) and (batch.terminated != batch.done).any()
    expected = 5 * error + cross["reward"] + cross["cost"] + ends + 0.6 * np.maximum(divergence, free_bits).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert metrics["losses/kl"] == pytest.approx(divergence.mean(), rel=1e-4)


def test_what_each_term_of_the_models_loss_moves():
    """Of encoder, posterior and prior: the KL's first weight the prior alone, its second one, the reconstruction and
    the heads the other two; below its free bits the KL nothing. The recurrent state is made blind to what was drawn,
    through which all of them would reach one another."""
    model, batch = random_agent().model, random_batch(lead=(1, B))
    model["input"]["w"] = model["input"]["w"].at[:6].set(0.0)
    names = "dynamics_coef", "representation_coef", "reconstruction_coef", "free_bits"
    grad = jax.jit(lambda values: jax.grad(sd.world_model_loss, has_aux=True)(
        model, small_args(**dict(zip(names, values))), batch, jax.random.key(0))[0])  # one compilation for all values
    heads = grad(jnp.zeros(4))

    def moved(*values):
        grads = grad(jnp.array(values))
        return {name for name in ("encoder", "posterior", "prior") if not all(
            np.allclose(x, y, atol=1e-6) for x, y in zip(*map(jax.tree.leaves, (grads[name], heads[name]))))}

    assert np.any(heads["encoder"][0]["w"]) and np.any(heads["posterior"][0]["w"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(heads["prior"]))
    assert moved(1.0, 0.0, 0.0, 0.0) == {"prior"}
    assert moved(0.0, 1.0, 0.0, 0.0) == moved(0.0, 0.0, 1.0, 0.0) == {"encoder", "posterior"}
    assert moved(1.0, 1.0, 0.0, 50.0) == set()


# ----------------------------------------------------------------------------------------------------------------------
# Returns, actor, critics
# ----------------------------------------------------------------------------------------------------------------------
def test_lambda_returns_by_hand():
    """Two steps, gamma 0.5, the second one may end: R_1 = 2 + 0.25 * 8 = 4, R_0 = 1 + 0.5 (0.25 * 6 + 0.75 * 4)."""
    args = small_args(return_lambda=0.75)
    paid, values = jnp.array([1.0, 2.0]), jnp.array([6.0, 8.0])
    got = sd.lambda_returns(args, paid, jnp.array([0.5, 0.25]), values)
    np.testing.assert_allclose(got, [1 + 0.5 * (1.5 + 3.0), 4.0])
    one_step = sd.lambda_returns(small_args(return_lambda=0.0), paid, jnp.full(2, 0.5), values)
    np.testing.assert_allclose(one_step, [4.0, 6.0])
    whole = sd.lambda_returns(small_args(return_lambda=1.0), paid, jnp.full(2, 0.5), values)
    np.testing.assert_allclose(whole, [1 + 0.5 * 2 + 0.25 * 8, 6.0])


def test_predictions_against_numpy():
    agent, x = random_agent(), np.random.default_rng(2).normal(size=(4, 5, 13)).astype(np.float32)
    seen = sd.predict(ARGS, agent.model, agent.critics, jnp.asarray(x))
    value = lambda head: np_read_out(np_mlp(float64(head), x.astype(np.float64)), ARGS.bin_limit)
    proceed = np_sigmoid(np_mlp(float64(agent.model["continue"]), x[1:])[..., 0])
    both = ("reward", "value", 0.9, seen.returns), ("cost", "cost_value", 0.8, seen.cost_returns)
    for name, critic, gamma, got in both:
        paid, values = value(agent.model[name])[1:], value(agent.critics[critic])
        following = values[-1]
        for t in (2, 1, 0):
            following = paid[t] + gamma * proceed[t] * (0.05 * values[t + 1] + 0.95 * following)
            np.testing.assert_allclose(got[t], following, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(seen.values, value(agent.critics["value"]), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(seen.cost, value(agent.model["cost"])[1:], rtol=2e-3, atol=1e-3)


def start_of_rollouts(args, seed):
    """Six latents, and that nothing has ended there."""
    deter = np.random.default_rng(seed).normal(size=(6, args.deter))
    stoch = jax.nn.one_hot(jnp.arange(6) % 3, 3).repeat(2, 0).reshape(6, -1)
    return Latent(jnp.asarray(deter, jnp.float32), stoch), jnp.ones(6)


def actor_loss(args, agent, seed=5, alive=None):
    start, going_on = start_of_rollouts(args, seed)
    alive = going_on if alive is None else alive
    grad = jax.jit(jax.grad(sd.policy_loss, has_aux=True), static_argnums=1)
    return grad(agent.policy, args, agent, agent.model, start, alive, jax.random.key(6))


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_the_multiplier_by_hand(over):
    args = small_args(constraint_over=over, cost_limit=0.5)
    agent = random_agent(args)._replace(multiplier=jnp.float32(0.2), penalty=jnp.float32(0.01))
    _, (seen, discounted, multiplier, penalty, scale, metrics) = actor_loss(args, agent)
    costs = np.asarray(seen.cost_returns).sum(0) if over == "sum" else np.asarray(seen.cost_returns).mean(0)
    violation = costs.mean() - 0.5
    assert metrics["lagrangian/violation"] == pytest.approx(violation, rel=1e-5)
    shifted = 0.2 + 0.01 * violation
    assert multiplier == pytest.approx(max(0.0, shifted), rel=1e-5) and penalty == pytest.approx(0.01 * (1 + 1e-5))
    psi = 0.2 * violation + 0.005 * violation**2 if shifted > 0 else -0.5 * 0.04 / 0.01
    assert metrics["losses/psi"] == pytest.approx(psi, rel=1e-4)
    gained = np.asarray(seen.returns)
    assert scale == pytest.approx(0.01 * (np.percentile(gained, 95) - np.percentile(gained, 5)), rel=1e-4)
    through = np.concatenate([np.ones((1, 6)), 0.9 * np.asarray(seen.proceed)[:-1]])
    np.testing.assert_allclose(discounted, np.cumprod(through, 0), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_actor_loss_by_hand(scale):
    """Mean of w (-(R - V) / max(1, S) - 0.01 entropy), V of the state an action is taken in, and Psi on top."""
    args = small_args(entropy_coef=0.01, cost_limit=0.5)
    numbers = {"multiplier": 0.2, "penalty": 0.01, "scale": scale}
    agent = random_agent(args)._replace(**{name: jnp.float32(x) for name, x in numbers.items()})
    loss, (seen, discounted, *_, after, metrics) = jax.jit(sd.policy_loss, static_argnums=1)(
        agent.policy, args, agent, agent.model, *start_of_rollouts(args, 5), jax.random.key(6))
    seen = float64(seen)
    _, raw = np.split(np_mlp(float64(agent.policy), seen.features[:-1]), 2, -1)
    std = (args.max_std - args.min_std) * np_sigmoid(raw + 2.0) + args.min_std
    entropy = (np.log(std) + 0.5 * np.log(2.0 * np.pi * np.e)).sum(-1)
    advantage = (seen.returns - seen.values[:-1]) / max(1.0, float(after))
    expected = np.mean(np.asarray(discounted) * (-advantage - 0.01 * entropy))
    assert metrics["losses/policy"] == pytest.approx(expected, rel=1e-3)
    low, high = np.percentile(seen.returns, [5, 95])
    assert after == pytest.approx(0.99 * scale + 0.01 * (high - low), rel=1e-4)
    assert (after < 1.0) == (scale < 1.0) and abs(metrics["losses/psi"]) > 0.01
    assert loss == pytest.approx(expected + float(metrics["losses/psi"]), rel=1e-3)


@pytest.mark.parametrize("multiplier, violation, psi, following", [
    (0.5, 2.0, 0.5 * 2 + 0.05 * 4, 0.7), (0.1, -2.0, -0.5 * 0.01 / 0.1, 0.0), (0.0, -1.0, 0.0, 0.0),
    (0.3, -1.0, -0.3 + 0.05, 0.2)])
def test_augmented_lagrangian(multiplier, violation, psi, following):
    got = sd.augmented_lagrangian(small_args(mu_growth=0.5, mu_max=0.12), violation, multiplier, 0.1)
    np.testing.assert_allclose(got, [psi, following, 0.12], atol=1e-6)


def test_only_bsrp_lag_constrains_the_actor():
    agent = random_agent()._replace(multiplier=jnp.float32(0.5), penalty=jnp.float32(0.1))
    plain, (*_, metrics) = actor_loss(small_args(method="osrp"), agent)
    other, _ = actor_loss(small_args(method="osrp"), agent._replace(multiplier=jnp.float32(0.0)))
    held, _ = actor_loss(ARGS, agent)
    assert leaves_equal(plain, other) and not leaves_equal(plain, held) and "losses/psi" not in metrics


def test_no_gradient_through_what_the_actor_sees(monkeypatch):
    """Stopping it where the actor reads its features changes nothing; stopping the model's own state does."""
    agent = random_agent()._replace(multiplier=jnp.float32(0.2), penalty=jnp.float32(0.01))
    grads, _ = actor_loss(ARGS, agent)
    stop, act, imagine = jax.lax.stop_gradient, sd.sample_action, sd.imagine
    for name, stopped, same in (("sample_action", lambda args, policy, x, key: act(args, policy, stop(x), key), True),
                                ("imagine", lambda args, model, z, *rest: imagine(args, model, stop(z), *rest), False)):
        with monkeypatch.context() as patch:
            patch.setattr(sd, name, stopped)
            jax.clear_caches()
            assert leaves_equal(actor_loss(ARGS, agent)[0], grads) == same
    jax.clear_caches()


def test_the_actors_gradient_against_a_loop():
    """That of the loss written out along a rollout that is imagined step by step: weights, S and the features that the
    entropy is taken at are numbers, taken from what the loss tells."""
    args, stop = small_args(method="osrp", entropy_coef=1.0, horizon=2), jax.lax.stop_gradient
    agent = random_agent(args)._replace(scale=jnp.float32(1.5))
    grads, (seen, discounted, *_, scale, _) = actor_loss(args, agent)
    start, _ = start_of_rollouts(args, 5)

    def loss(policy):
        latent, x = start, [sd.features(start)]
        for key in jax.random.split(jax.random.key(6), 2):
            key_action, key_next = jax.random.split(key)
            action = sd.sample_action(args, policy, stop(x[-1]), key_action)
            latent = sd.imagine(args, agent.model, latent, action, key_next)
            x.append(sd.features(latent))
        again = sd.predict(args, agent.model, agent.critics, jnp.stack(x))
        _, std = sd.gaussian(args, policy, seen.features[:-1])
        entropy = jnp.sum(jnp.log(std) + 0.5 * math.log(2.0 * math.pi * math.e), -1)
        return jnp.mean(discounted * (-(again.returns - again.values[:-1]) / scale - entropy))

    for one, other in zip(*map(jax.tree.leaves, (grads, jax.jit(jax.grad(loss))(agent.policy)))):
        np.testing.assert_allclose(one, other, rtol=3e-4, atol=1e-7)
    assert scale > 1.0


def test_the_actors_gaussian_by_hand():
    """std = 0.1 + 0.9 sigmoid(s + 2), sigmoid(2) = 0.880797; the mean is tanh of what the network says."""
    policy = ({"w": jnp.zeros((13, 4)), "b": jnp.array([0.5, -3.0, 0.0, -2.0])},)
    mean, std = sd.gaussian(Args(), policy, jnp.ones(13))
    np.testing.assert_allclose(mean, [0.462117, -0.995055], atol=1e-5)
    np.testing.assert_allclose(std, [0.892717, 0.55], atol=1e-5)


def test_where_an_episode_ended_nothing_is_learned_from():
    agent, args = random_agent(), small_args(method="osrp")
    grads, (_, discounted, *_) = actor_loss(args, agent, alive=jnp.zeros(6))
    assert not np.any(discounted) and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_critic_loss_against_numpy():
    agent, rng = random_agent(), np.random.default_rng(7)
    x, returns, weigh = rng.normal(size=(2, 3, 13)), rng.normal(size=(2, 3)), rng.random((2, 3))
    got = sd.critic_loss(agent.critics["value"], ARGS, agent.slow["value"],
                         *(jnp.asarray(y, jnp.float32) for y in (x, returns, weigh)))
    log_softmax = np.log(np_softmax(np_mlp(float64(agent.critics["value"]), x)))
    slow = np_read_out(np_mlp(float64(agent.slow["value"]), x), ARGS.bin_limit)
    each = [-(log_softmax[i] * (np_two_hot(returns[i], 21, 4.0) + np_two_hot(slow[i], 21, 4.0))).sum() * weigh[i]
            for i in np.ndindex(2, 3)]
    assert float(got) == pytest.approx(np.mean(each), rel=1e-3)


def test_costs_as_expectations(monkeypatch):
    """--cost-read-out expectation: cost head and cost critic read the mean of bins up to 5 / (1 - 0.9), nothing at
    first; what they learn from is worth the cost between its two neighbouring bins. Rewards and values stay."""
    args, rng = small_args(cost_read_out="expectation", cost_gamma=0.9), np.random.default_rng(11)
    bins = np.expm1(np.linspace(0.0, np.log1p(50.0), args.num_bins))
    x, fresh, agent = rng.normal(size=(4, 3, 13)).astype(np.float32), new_agent(
        args, jax.random.key(0), OBS, ACTIONS), random_agent(args)
    for head in (fresh.model["cost"], fresh.critics["cost_value"], fresh.slow["cost_value"]):
        assert np.all((np.asarray(sd.read_cost(args, head, x)) >= 0) & (np.asarray(sd.read_cost(args, head, x)) < 0.05))
    expected = lambda head: np_softmax(np_mlp(float64(head), x)) @ bins
    seen = sd.predict(args, agent.model, agent.critics, jnp.asarray(x))
    np.testing.assert_allclose(seen.cost, expected(agent.model["cost"])[1:], rtol=1e-4)
    np.testing.assert_allclose(seen.values, np_read_out(np_mlp(float64(agent.critics["value"]), x), args.bin_limit),
                               rtol=1e-3, atol=1e-3)
    proceed = np_sigmoid(np_mlp(float64(agent.model["continue"]), x[1:])[..., 0])
    cost_values = expected(agent.critics["cost_value"])
    np.testing.assert_allclose(  # the last return: its cost, and what the critic reads of the rest
        seen.cost_returns[-1], expected(agent.model["cost"])[-1] + 0.9 * proceed[-1] * cost_values[-1], rtol=1e-3)

    def loss_at(logits, cost):
        k = min(np.searchsorted(bins, cost, side="right") - 1, len(bins) - 2)
        share = (cost - bins[k]) / (bins[k + 1] - bins[k])
        return -np.log(np_softmax(logits)) @ (np.eye(len(bins))[k] * (1 - share) + np.eye(len(bins))[k + 1] * share)

    returns, weigh = rng.uniform(0, 50, (4, 3)), rng.random((4, 3))
    got = sd.critic_loss(agent.critics["cost_value"], args, agent.slow["cost_value"],
                         *(jnp.asarray(y, jnp.float32) for y in (x, returns, weigh)), True)
    logits, slow = np_mlp(float64(agent.critics["cost_value"]), x), expected(agent.slow["cost_value"])
    each = [weigh[i] * (loss_at(logits[i], returns[i]) + loss_at(logits[i], slow[i])) for i in np.ndindex(4, 3)]
    assert float(got) == pytest.approx(np.mean(each), rel=1e-3)

    batch = jax.tree.map(jnp.asarray, random_batch())
    _, (metrics, latents) = jax.jit(sd.world_model_loss, static_argnums=1)(agent.model, args, batch, jax.random.key(1))
    logits, cost = np_mlp(float64(agent.model["cost"]), np.asarray(sd.features(latents), float)), np.asarray(batch.cost)
    each = [(10.0 if cost[i] >= 1 else 1.0) * loss_at(logits[i], cost[i]) for i in np.ndindex(L, B)]
    assert float(metrics["losses/cost"]) == pytest.approx(np.mean(each), rel=1e-3)

    asked, loss = [], sd.critic_loss
    monkeypatch.setattr(sd, "critic_loss", lambda *args: asked.append(args[6]) or loss(*args))
    jax.eval_shape(partial(sd.update, args), agent, batch, jax.random.key(2))
    assert asked == [False, True]


def test_one_update_moves_what_it_should():
    """Each part by its own loss: slow critics by 2%, the model not by the actor's, the actor not by the critics', each
    by Adam's first step, the gradient's sign; lambda, mu and S are what the actor's loss makes of them."""
    agent, batch = random_agent(), jax.tree.map(jnp.asarray, random_batch())
    numbers = {"multiplier": 0.2, "penalty": 0.01, "scale": 5.0}
    agent = agent._replace(**{name: jnp.float32(x) for name, x in numbers.items()})
    after, metrics = jax.jit(sd.update, static_argnums=0)(ARGS, agent, batch, jax.random.key(8))
    expected = jax.tree.map(lambda old, new: old + 0.02 * (new - old), agent.slow, after.critics)
    assert all(np.allclose(x, y, atol=1e-6) for x, y in zip(jax.tree.leaves(after.slow), jax.tree.leaves(expected)))
    key_model, key_imagine = jax.random.split(jax.random.key(8))

    def follows(new, old, grads, rate, least):
        new, old, grads = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (new, old, grads))
        large = np.abs(grads) > least
        assert large.sum() > 20
        np.testing.assert_allclose((new - old)[large], -rate * np.sign(grads[large]), rtol=0.1)

    grad = jax.jit(jax.grad(sd.world_model_loss, has_aux=True), static_argnums=1)
    grads, (_, latents) = grad(agent.model, ARGS, batch, key_model)
    follows(after.model, agent.model, grads, 1e-4, 1e-4)
    start = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), latents)
    grads, (seen, discounted, *_) = jax.jit(jax.grad(sd.policy_loss, has_aux=True), static_argnums=1)(
        agent.policy, ARGS, agent, after.model, start, 1.0 - batch.terminated.ravel(), key_imagine)
    follows(after.policy, agent.policy, grads, 3e-5, 1e-3)
    for name, returns in {"value": seen.returns, "cost_value": seen.cost_returns}.items():
        grads = jax.jit(jax.grad(sd.critic_loss), static_argnums=1)(  # of what is to come where the actor then acts
            agent.critics[name], ARGS, agent.slow[name], seen.features[:-1], returns, discounted)
        follows(after.critics[name], agent.critics[name], grads, 3e-5, 1e-2)
    violation = float(metrics["lagrangian/violation"])
    assert after.multiplier == pytest.approx(max(0.0, 0.2 + 0.01 * violation), rel=1e-5) and abs(violation) > 0.01
    assert after.penalty == pytest.approx(0.0100001, rel=1e-6)
    assert after.scale == metrics["losses/scale"] and after.scale != 5.0
    for state in (after.model_opt, after.policy_opt, *after.critics_opt.values()):
        assert int(sd.optax.tree_utils.tree_get(state, "count")) == 1
    assert int(after.num_updates) == 1 and all(np.isfinite(value) for value in metrics.values())


def test_optimisers_by_hand():
    """Adam's second step after gradients of norm 50 and 3000, of which the latter is clipped to 1000 or to 100; and a
    first one so small that eps, 1e-8 or 1e-5, counts: 1e-4 g / (|g| + eps)."""
    for optimizer, second, small in ((sd.model_optimizer, 7.7665e-5, [-9.9010e-5, 9.9668e-5]),
                                     (sd.behaviour_optimizer, 2.8955e-5, [-2.7273e-6, 6.9231e-6])):
        optimizer = optimizer(Args())
        steps = lambda *grads: optimizer.update(jnp.array(grads), state)
        state = optimizer.init(jnp.zeros(2))
        np.testing.assert_allclose(steps(1e-6, -3e-6)[0], small, rtol=1e-3)
        _, state = steps(30.0, -40.0)
        np.testing.assert_allclose(steps(1800.0, -2400.0)[0], [-second, second], rtol=1e-3)


def test_networks_at_the_start():
    """Reward and values read 0, the slow critics are the critics; weights have the variance 2 / (fan-in + fan-out)."""
    agent = new_agent(ARGS, jax.random.key(0), OBS, ACTIONS)
    zero = lambda layers: not np.any(layers[-1]["w"]) and not np.any(layers[-1]["b"])
    assert zero(agent.model["reward"]) and all(map(zero, agent.critics.values())) and not zero(agent.model["cost"])
    assert not zero(agent.policy) and not zero(agent.model["continue"]) and leaves_equal(agent.slow, agent.critics)
    w = np.asarray(sd.weights(jax.random.key(0), (60, 240)))
    assert w.std() == pytest.approx(math.sqrt(2 / 300), rel=0.02)
    assert (float(agent.multiplier), float(agent.penalty), float(agent.scale)) == pytest.approx((1e-6, 5e-9, 0.0))


def test_every_update_draws_anew(monkeypatch):
    """Windows and noise of the third update are not those of the fourth."""
    monkeypatch.setattr(sd, "update", lambda args, agent, batch, key: (agent, {
        "windows": jnp.vdot(batch.cost, jnp.arange(float(L * B))), "noise": jax.random.uniform(key)}))
    (buffer, _), agent = filled(ARGS, 30), random_agent()
    told = jax.jit(lambda done: sd.update_many.__wrapped__(ARGS, agent._replace(num_updates=done), buffer, 1)[1])
    third, fourth = told(2), told(3)
    assert all(third[name] != fourth[name] for name in ("windows", "noise"))


# ----------------------------------------------------------------------------------------------------------------------
# PID controller
# ----------------------------------------------------------------------------------------------------------------------
def test_controller_by_hand():
    args, pid, state = small_args(cost_limit=2.0, pid_max=5.0), sd.init_pid(), dict(c=0.0, e=0.0, i=0.001, s=0.0)
    history = [0.0] * 10
    for cost in [30.0, 100.0, 0.0, 50.0] * 10:
        pid = sd.control(args, pid, cost, True)
        state["c"] = 0.99 * state["c"] + 0.01 * cost
        error = state["c"] - 2.0
        state["i"] = max(0.0, state["i"] + 0.01 * error)
        state["e"] = 0.95 * state["e"] + 0.05 * error
        state["s"] = 0.95 * state["s"] + 0.05 * state["c"]
        expected = 0.1 * state["e"] + state["i"] + 0.01 * max(0.0, state["s"] - history[0])
        history = history[1:] + [state["s"]]
        assert float(pid.multiplier) == pytest.approx(min(max(expected, 0.0), 5.0), abs=1e-5)
    assert float(pid.multiplier) > 0.5
    assert float(sd.control(small_args(), pid, 50.0, True).multiplier) == pytest.approx(0.1)
    early = sd.control(args, sd.init_pid(), 50.0, False)  # before its start the costs are averaged, nothing else
    assert leaves_equal(early, sd.init_pid()._replace(cost=jnp.float32(0.5)))


def filled(args, rows, seed=0):
    """A ring after that many rows: every environment's episodes end at row numbers of its own; the costs are 1 to 3."""
    rng, buffer, running, ended = np.random.default_rng(seed), sd.init_buffer(args, OBS, ACTIONS), np.zeros(2), []
    zeros, stops = np.zeros(2, np.float32), (5, 8)
    for row in range(rows):
        cost = rng.integers(0, 4, 2).astype(np.float32)
        done = np.array([(row + 1) % stop == 0 for stop in stops])
        running = running + cost
        ended += [(row, env, running[env]) for env in range(2) if done[env]]
        running = np.where(done, 0.0, running)
        obs, action = np.zeros((2, OBS)), np.zeros((2, ACTIONS))
        buffer = sd.add(buffer, Transition(obs, action, zeros, cost, obs, zeros, done.astype(np.float32)))
    return buffer, ended


@pytest.mark.parametrize("rows", [10, 20, 40, 70])
@pytest.mark.parametrize("length", [1, 40])
def test_costs_of_the_episodes_that_ended(rows, length):
    """Those of the last block's ten rows alone, whole, also from a ring of forty rows that has gone round; whatever
    --episode-length is, which is the planner's."""
    buffer, ended = filled(ARGS, rows)
    costs, where = sd.finished_costs(dataclasses.replace(ARGS, episode_length=length), buffer)
    got = [(rows - 10 + row, env, float(costs[row, env])) for row, env in np.argwhere(np.asarray(where))]
    assert got == [each for each in ended if each[0] >= rows - 10] and len(got) >= 2


def test_the_controller_runs_once_a_block_and_not_before_its_start():
    args = small_args(method="osrp_lag", pid_starts=40, pid_max=9.0)  # 40 agent steps are 8 updates
    buffer, ended = filled(args, 30)
    agent = random_agent(args)
    block = jax.jit(partial(sd.control_block, args))
    for updates, counts, moves in ((0, True, False), (4, True, False), (8, True, True), (9, False, False),
                                   (11, False, False), (12, True, True)):
        pid = block(agent._replace(num_updates=jnp.int32(updates)), buffer)
        assert (pid.cost > 0, pid.integral != agent.pid.integral) == (counts, moves), updates
    expected = agent.pid
    for row, _, cost in ended:
        if row >= 20:
            expected = sd.control(args, expected, cost, True)
    assert all(np.allclose(x, y, atol=1e-6) for x, y in zip(pid, expected))


def test_the_controller_moves_before_a_blocks_updates(monkeypatch):
    """They are made with the multiplier that it has after the latest episodes, which is told in the end."""
    monkeypatch.setattr(sd, "update", lambda args, agent, batch, key: (agent, {"used": agent.pid.multiplier}))
    args = small_args(method="osrp_lag", pid_starts=0, pid_max=9.0, cost_limit=0.0)
    (buffer, _), agent = filled(args, 30), random_agent(args)
    expected = sd.control_block(args, agent, buffer)
    after, metrics = sd.update_many.__wrapped__(args, agent, buffer, 1)
    assert expected.cost > 0 and expected.multiplier > 0 and leaves_equal(after.pid, expected)
    assert metrics["lagrangian/lambda"] == metrics["used"] == expected.multiplier
    assert metrics["lagrangian/violation"] == expected.cost


# ----------------------------------------------------------------------------------------------------------------------
# Replay
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [6, 25, 40, 65])
def test_windows_are_consecutive_and_never_cross_the_write_head(rows):
    args = small_args(batch_size=500)
    buffer = sd.init_buffer(args, OBS, ACTIONS)
    for row in range(rows):
        number = np.full(2, row, np.float32)
        buffer = sd.add(buffer, Transition(np.zeros((2, OBS)), np.zeros((2, ACTIONS)), number, number + [0, 100],
                                           np.zeros((2, OBS)), 0 * number, 0 * number))
    batch = sd.sample(args, buffer, jax.random.key(0))
    assert np.array_equal(np.diff(batch.reward, axis=0), np.ones((L - 1, 500)))
    assert set(np.asarray(batch.reward[0]).astype(int)) == set(range(max(0, rows - 40), rows - L + 1))
    assert set(np.asarray(batch.cost - batch.reward).ravel()) == {0.0, 100.0}


def test_pictures_are_kept_in_whole_numbers():
    args = small_args(inputs="vision", batch_size=3, window=2)
    buffer = sd.init_buffer(args, OBS, ACTIONS)
    assert buffer.rows.obs.dtype == buffer.rows.next_obs.dtype == jnp.uint8
    obs = np.array([[0, 128, 255], [1, 2, 254]], np.float32) / 255.0
    for _ in range(3):
        zeros = np.zeros(2, np.float32)
        buffer = sd.add(buffer, Transition(obs, np.full((2, ACTIONS), 0.3), zeros, zeros, 1 - obs, zeros, zeros))
    batch = sd.sample(args, buffer, jax.random.key(0))
    for got, next_obs in zip(batch.obs.reshape(-1, OBS), batch.next_obs.reshape(-1, OBS)):
        assert min(np.abs(got - each).max() for each in obs) < 1e-6
        np.testing.assert_allclose(got + next_obs, 1.0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Planner
# ----------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 6)), min_size=12, max_size=12, unique=True))
def test_elites_against_brute_force(pairs):
    scores, costs = (np.array(x, np.float32) for x in zip(*pairs))
    scores, costs = scores + 0.01 * np.arange(12), costs + 0.01 * np.arange(12)[::-1]  # no ties
    elites, count = sd.select_elites(ARGS, jnp.asarray(scores), jnp.asarray(costs))
    feasible = [i for i in range(12) if costs[i] < 2.0]
    expected = (sorted(feasible, key=lambda i: -scores[i]) if len(feasible) >= 3
                else sorted(range(12), key=lambda i: costs[i]))[:3]
    assert set(np.flatnonzero(elites)) == set(expected) and count == len(feasible)


def test_a_cost_at_the_limit_is_not_feasible():
    _, count = sd.select_elites(ARGS, jnp.zeros(12), jnp.full(12, 2.0))
    assert count == 0


@pytest.mark.parametrize("method", ["osrp", "osrp_lag"])
def test_scores_of_plans_against_a_loop(method):
    args = small_args(method=method)
    agent = random_agent(args)
    agent = agent._replace(pid=agent.pid._replace(multiplier=jnp.float32(0.3)))
    rng = np.random.default_rng(0)
    latent = Latent(jnp.asarray(rng.normal(size=7), jnp.float32), jnp.asarray([1.0, 0, 0, 0, 1, 0]))
    actions = jnp.asarray(rng.uniform(-1, 1, (3, 12, ACTIONS)), jnp.float32)
    scores, costs = sd.evaluate_plans(args, agent, latent, actions, jax.random.key(1))
    current = jax.tree.map(lambda x: jnp.broadcast_to(x, (12, x.size)), latent)
    x = [sd.features(current)]
    for action, each in zip(actions, jax.random.split(jax.random.key(1), 3)):
        current = sd.imagine(args, agent.model, current, action, each)
        x.append(sd.features(current))
    seen = sd.predict(args, agent.model, agent.critics, jnp.stack(x))
    np.testing.assert_allclose(costs, np.asarray(seen.cost).sum(0) * 40 / 3, rtol=1e-4)
    expected = np.asarray(seen.returns[0]) - (0.3 * np.asarray(seen.cost_returns[0]) if method == "osrp_lag" else 0.0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_by_hand(monkeypatch):
    """Score minus squared distance to 0.5, cost 3 where the first action is above 0.6: two refinements in NumPy."""
    args = small_args(method="osrp", plan_std=0.7)
    drawn = []

    def scored(args, agent, latent, actions, key):
        jax.debug.callback(lambda x: drawn.append(np.asarray(x)), actions, ordered=True)
        return -jnp.sum((actions - 0.5) ** 2, (0, 2)), jnp.where(actions[0, :, 0] > 0.6, 3.0, 0.0)

    monkeypatch.setattr(sd, "evaluate_plans", scored)
    last = jnp.asarray([[0.1, 0.2], [0.3, 0.4], [-0.5, 0.6]])
    mean, metrics = sd.plan(args, None, None, last, jax.random.key(0))
    jax.effects_barrier()
    expected, std = np.array([[0.3, 0.4], [-0.5, 0.6], [-0.5, 0.6]]), np.full((3, 2), 0.7)
    for actions, least, key in zip(drawn, (11, 12), jax.random.split(jax.random.key(0), 2), strict=True):
        noise = np.asarray(jax.random.normal(jax.random.split(key)[0], actions.shape))
        np.testing.assert_allclose(actions, np.clip(expected[:, None] + std[:, None] * noise, -1, 1), atol=1e-5)
        feasible = [i for i in range(12) if actions[0, i, 0] <= 0.6]
        assert 3 <= len(feasible) <= least
        elites = sorted(feasible, key=lambda i: ((actions[:, i] - 0.5) ** 2).sum())[:3]
        expected, std = 0.1 * expected + 0.9 * actions[:, elites].mean(1), actions[:, elites].std(1)
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    assert metrics["planner/num_feasible"] == len(feasible)


def test_planners_execute_the_first_action_of_the_mean(monkeypatch):
    args = small_args(method="osrp")
    metrics = dict.fromkeys(("planner/num_feasible", "planner/too_few_feasible"), 1.0)
    monkeypatch.setattr(sd, "plan", lambda args, agent, latent, last_mean, key: (
        last_mean + jnp.arange(3.0)[:, None], metrics))
    agent, actor = random_agent(args), sd.init_actor(args, jax.random.key(0), ACTIONS)
    obs = np.zeros((2, OBS), np.float32)
    for is_first in ([True, True], [False, False], [True, False]):
        actor = actor._replace(plan_mean=actor.plan_mean + 0.25)
        began = np.array(is_first) | (int(actor.step) == 0)
        before = np.asarray(actor.plan_mean)
        action, actor = sd.act(args, agent, actor, obs, np.array(is_first), True)
        np.testing.assert_allclose(action, np.where(began[:, None], 0.0, before[:, 0]))
    np.testing.assert_allclose(actor.metrics["charts/balance"], 3.0)


@pytest.mark.parametrize("method", ["osrp", "osrp_lag"])
def test_acting_fits_together_with_the_planner(method):
    """By shapes alone: -m long lets it act."""
    args = small_args(method=method)
    actor, obs = sd.init_actor(args, jax.random.key(0), ACTIONS), np.zeros((2, OBS), np.float32)
    action, after = jax.eval_shape(
        lambda agent, actor: sd.act(args, agent, actor, obs, np.ones(2, bool), True), random_agent(args), actor)
    assert action.shape == (2, ACTIONS)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, actor)


def test_the_actor_draws_in_evaluation_too():
    args = small_args(num_envs=2000)
    agent, actor = random_agent(args), sd.init_actor(args, jax.random.key(0), ACTIONS)
    obs = np.zeros((2000, OBS), np.float32)
    action, actor = sd.act(args, agent, actor, obs, np.ones(2000, bool), False)
    assert np.asarray(action).std(0).min() > 0.09 and np.abs(action).max() <= 1.0
    assert np.array_equal(action, actor.action) and not np.any(actor.metrics["charts/balance"])
    action, again = (np.asarray(x) for x in (action, sd.act(args, agent, actor, obs, np.ones(2000, bool), False)[0]))
    assert not np.any((again == action) & (np.abs(again) < 1.0))  # a step's noise is its own


# ----------------------------------------------------------------------------------------------------------------------
# What was known of the costs
# ----------------------------------------------------------------------------------------------------------------------
def test_critic_metrics_of_episodes_of_unequal_length():
    """Read as one by one: what is padded changes nothing."""
    episodes = [{"played": jax.tree.map(lambda x: x[:length, 0], random_batch(seed, 0.0, (8, 1)))} for seed, length in
                ((0, 8), (1, 5))]
    for episode in episodes:
        episode["played"].cost[:] = episode["played"].cost > 1.0
    # with one class there is nothing to draw, which would depend on the shapes
    args = small_args(stoch=1, classes=1)
    agent = random_agent(args)
    metrics, values = sd.critic_metrics(args, agent, episodes), []
    for episode in episodes:
        _, value = sd.read_costs(args, agent, jax.tree.map(lambda x: x[:, None], episode["played"]), jax.random.key(0))
        inside = np.concatenate([[False], episode["played"].cost[:-1] > 0])
        values.extend(np.asarray(value)[~inside, 0])
    assert metrics["critic/read_outside"] == pytest.approx(np.mean(values), rel=1e-4)


def test_costs_are_read_before_their_outcome_is_seen():
    """What the third step leads to is not known of up to and with it, and is after it: twenty environments, so that
    some draw differs."""
    agent, batch = random_agent(), random_batch(done=0.0, lead=(5, 20))
    other = batch._replace(next_obs=batch.next_obs.copy())
    other.next_obs[2] += 3.0
    one, two = (sd.read_costs(ARGS, agent, x, jax.random.key(0)) for x in (batch, other))
    for x, y in zip(one, two):
        np.testing.assert_allclose(x[:3], y[:3], atol=1e-6)
        assert not np.allclose(x[3:], y[3:])


# ----------------------------------------------------------------------------------------------------------------------
# Problems whose answer is known
# ----------------------------------------------------------------------------------------------------------------------
STEPS = 4
PROBE = dict(num_envs=16, action_repeat=1, train_every=128, learning_starts=128, buffer_size=6400, deter=32,
             stoch=4, classes=4, units=32, enc_layers=1, head_layers=1, num_bins=41, bin_limit=2.0,
             reconstruction_coef=1.0, batch_size=16, window=8, horizon=4, gamma=0.9, cost_gamma=0.9, model_lr=3e-3,
             behaviour_lr=1e-3, plan_horizon=3, num_samples=48, num_elites=8, iterations=3, episode_length=STEPS,
             free_bits=0.1)


def learn(args, pay, blocks):
    """Act and learn in turns; an episode's first observation is its cue, -1 or 1, the other three are 0. -> the mean
    reward and cost of the last twenty episodes of every environment."""
    rng = np.random.default_rng(0)
    agent, buffer = new_agent(args, jax.random.key(1), 1, 1), sd.init_buffer(args, 1, 1)
    actor, paid = sd.init_actor(args, jax.random.key(2), 1), []
    zeros = np.zeros(args.num_envs, np.float32)
    for block in range(blocks):
        cue = rng.choice([-1.0, 1.0], args.num_envs).astype(np.float32)
        obs = cue
        for step in range(STEPS):
            if block < 20:
                action = rng.uniform(-1, 1, (args.num_envs, 1)).astype(np.float32)
            else:
                action, actor = sd.act(args, agent, actor, obs[:, None], zeros + (step == 0) > 0, True)
            reward, cost = pay(cue, np.asarray(action)[:, 0], step)
            paid.append((reward.mean(), cost.mean()))
            end = zeros + (step == STEPS - 1)
            buffer = sd.add(buffer, Transition(obs[:, None], action, reward, cost, zeros[:, None], end, end))
            obs = zeros
        if block >= 20:
            agent, _ = sd.update_many(args, agent, buffer, 10)
    return np.mean(paid[-20 * STEPS:], 0)


@pytest.mark.long
def test_what_was_seen_first_is_remembered(fast):
    """After the cue is gone every step pays cue times action: without memory nothing is better than 0."""
    reward, _ = learn(Args(**PROBE, cost_limit=100.0), lambda cue, action, step: (
        cue * action * (step > 0), 0 * action), 130)
    assert reward * STEPS / (STEPS - 1) > 0.8


def is_up(cue, action, step):
    """The reward is the action, and it costs 1 beyond 0."""
    return action, (action > 0).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("method", ["bsrp_lag", "osrp"])
def test_the_constraint_acts(fast, method):
    faster = dict(lambda_init=0.0, mu_init=1e-3, mu_growth=1e-2) if method == "bsrp_lag" else {}
    _, cost = learn(Args(**PROBE, method=method, cost_limit=0.3, **faster), is_up, 100)
    assert cost < 0.25


@pytest.mark.long
def test_without_a_limit_the_best_of_all(fast):
    reward, cost = learn(Args(**PROBE, cost_limit=100.0), is_up, 80)
    assert cost > 0.8 and reward > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [2, 6])
def test_a_convolution_and_its_transpose_by_loops(side):
    """halve: y[i, j] = sum of x[2 i + k - 1, 2 j + l - 1] w[k, l]; double is its transpose."""
    rng = np.random.default_rng(side)
    x, y = rng.normal(size=(2, side, side, 3)), rng.normal(size=(2, side // 2, side // 2, 5))
    w = rng.normal(size=(4, 4, 3, 5))
    halved, doubled = np.zeros_like(y), np.zeros_like(x)
    for i, j, k, m in itertools.product(range(side // 2), range(side // 2), range(4), range(4)):
        row, column = 2 * i + k - 1, 2 * j + m - 1
        if 0 <= row < side and 0 <= column < side:
            halved[:, i, j] += x[:, row, column] @ w[k, m]
            doubled[:, row, column] += y[:, i, j] @ w[k, m].T
    to_float32 = lambda x: jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(sd.halve(to_float32(x), to_float32(w)), halved, atol=1e-4)
    np.testing.assert_allclose(sd.double(to_float32(y), to_float32(w.swapaxes(2, 3))), doubled, atol=1e-4)


def test_convolutions_by_hand():
    """One output of the first layer, and the sizes there and back."""
    args = small_args(inputs="vision", channels=2)
    encoder, decoder = sd.init_pictures(args, jax.random.key(0), 13)
    pictures = np.random.default_rng(0).random((2, 3, 64 * 64 * 6)).astype(np.float32)
    assert sd.encode_pictures(encoder, jnp.asarray(pictures)).shape == (2, 3, 4 * 4 * 16)
    assert sd.decode_pictures(decoder, jnp.zeros((2, 3, 13))).shape == (2, 3, 64 * 64 * 6)
    one = sd.encode_pictures((encoder[0],), jnp.asarray(pictures[0, :1])).reshape(32, 32, 2)
    x = pictures[0, 0].reshape(64, 64, 6).astype(np.float64) - 0.5
    window = x[2 * 5 - 1:2 * 5 + 3, 2 * 7 - 1:2 * 7 + 3]  # padded by one at each side
    out = np.einsum("hwc,hwco->o", window, np.asarray(encoder[0]["w"], np.float64))
    np.testing.assert_allclose(one[5, 7], np_silu((out - out.mean()) / np.sqrt(out.var() + 1e-3)), atol=1e-4)


def test_decoding_against_numpy(monkeypatch):
    """A product, after each doubling but the last LayerNorm and SiLU, at the end 0.5 on top; doubling, which has its
    own test, is a product here."""
    monkeypatch.setattr(sd, "double", lambda x, w: x @ w)
    zeros, norm = np.zeros, {"scale": np.zeros(3), "shift": np.zeros(3)}
    layers = random_weights(({"w": zeros((13, 32)), "b": zeros(32)}, {"w": zeros((2, 3))} | norm,
                             {"w": zeros((3, 3))} | norm, {"w": zeros((3, 6)), "b": zeros(6)}), 1)
    x = np.random.default_rng(0).normal(size=(5, 13))
    first, *between, last = float64(layers)
    y = (x @ first["w"] + first["b"]).reshape(5, 4, 4, 2)
    for layer in between:
        y = np_silu(np_normed(layer, y))
    expected = (y @ last["w"] + last["b"]).reshape(5, -1) + 0.5
    np.testing.assert_allclose(sd.decode_pictures(layers, jnp.float32(x)), expected, atol=1e-4)


CAMERAS = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.environ.setdefault("MUJOCO_GL", "egl")
import numpy as np, safedreamer as sd
from gymnasium.envs.mujoco import mujoco_rendering
args = sd.Args(inputs="vision")
one, two = sd.make_env(args, False), sd.make_env(args, True)
assert one.observation_space.shape == (64 * 64 * 6,)
take = lambda env, *action: np.asarray((env.step(*action) if action else env.reset(seed=3))[0])
start, same = take(one), take(two)
assert np.array_equal(start, same) and 0 <= start.min() and start.max() <= 1 and start.std() > 0.05
views = start.reshape(64, 64, 6)
assert np.abs(views[..., :3] - views[..., 3:]).mean() > 0.01
assert two.render().shape == (512, 512, 3)
for _ in range(5):
    moved, again = take(one, np.array([1.0, 1.0])), take(two, np.array([1.0, 1.0]))
    assert np.array_equal(moved, again)
    two.render()
assert np.abs(moved - start).mean() > 1e-3
other, fresh = (np.asarray(env.reset(seed=4)[0], np.float32) for env in (one, sd.make_env(args, False)))
assert other.dtype == np.float32
drawn, render = [], mujoco_rendering.OffScreenViewer.render
mujoco_rendering.OffScreenViewer.render = lambda *args: drawn.append(1) or render(*args)
steps = [one.step(np.zeros(2)) for _ in range(5)]
assert not drawn and len(np.asarray(steps[-1][0])) == 64 * 64 * 6 and len(drawn) == 2
assert np.array_equal(other, fresh) and np.abs(other - start).mean() > 0.01
"""


def test_the_cameras_see(place):
    """Front and back differ, pictures repeat, several environments and the video's camera draw in one process."""
    finished = command(place, "-c", CAMERAS, ROOT / "baselines")
    if "egl" in finished.stderr.lower() and "importerror" in finished.stderr.lower():
        pytest.skip("this machine has no EGL")
    assert finished.returncode == 0, finished.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Flags and real runs
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    ("--inputs vision --obs-transform log", "--inputs vision needs --obs-transform raw"),
    ("--num-elites 501", "--num-elites must be at most --num-samples"),
    ("--learning-starts 300", "--learning-starts must be at least --num-envs x --action-repeat x --window = 320"),
    ("--method osrp_lag --learning-starts 1000", "--learning-starts must be --train-every = 5000 with --method osrp"),
    ("--method osrp_lag --learning-starts 10000", "--learning-starts must be --train-every = 5000 with --method osrp"),
    ("--learning-starts 7500", "--learning-starts must be at most --train-every, or a multiple of it"),
    ("--buffer-size 63", "--buffer-size must hold --num-envs x --window = 64 transitions"),
    ("--updates-per-step 0.0003", "--updates-per-step must make a whole number of updates"),
    ("--unimix 0", "--unimix must be positive and at most 1"), ("--mu-init 2", "--mu-init must be at most --mu-max"),
    ("--min-std 1.5", "--min-std must be at most --max-std")])
def test_flags_that_cannot_be(flags, says):
    with pytest.raises(SystemExit, match=re.escape(says)):
        sd.parse_args(flags.split())


def test_defaults():
    """The reference's numbers."""
    expected = dict(
        num_envs=1, action_repeat=5, updates_per_step=0.5, deter=256, units=256, stoch=16, classes=16, enc_layers=3,
        head_layers=2, num_bins=255, bin_limit=20.0, cost_read_out="symlog", unimix=0.01, free_bits=1.0,
        dynamics_coef=0.5, representation_coef=0.1, reconstruction_coef=5.0, cost_weight=10.0, batch_size=16, window=64,
        model_lr=1e-4, model_clip=1000.0, horizon=15, gamma=0.997, cost_gamma=0.997, return_lambda=0.95, min_std=0.1,
        max_std=1.0, entropy_coef=3e-4, slow_tau=0.02, slow_coef=1.0, behaviour_lr=3e-5, behaviour_clip=100.0,
        cost_limit=2.0, constraint_over="sum", lambda_init=1e-6, mu_init=5e-9, mu_growth=1e-5, mu_max=1.0, pid_kp=0.1,
        pid_ki=0.01, pid_kd=0.01, pid_max=0.1, pid_starts=5000, plan_horizon=15, num_samples=500, num_elites=50,
        iterations=6, plan_std=1.0, momentum=0.1)
    assert {name: getattr(Args(), name) for name in expected} == expected


def test_presets():
    """The paper's preset is the reference's low-dimensional sizes on BASELINES' protocol; the laptop's can be run."""
    assert sd.parse_args([]) == Args()
    laptop = sd.parse_args(["--preset", "laptop", "--deter", "96"])
    assert laptop.deter == 96 and laptop.num_envs == 10 and laptop.obs_transform == "bins"
    back = {name: getattr(Args(), name) for name in (*sd.PRESETS["laptop"], "preset")}
    assert dataclasses.replace(laptop, **back) == Args()


SCRIPT = ROOT / "baselines" / "safedreamer.py"
POINT = ("--num-envs 2 --train-every 500 --learning-starts 500 --action-repeat 25 --updates-per-step 0.5 --deter 8 "
         "--stoch 2 --classes 4 --units 16 --enc-layers 1 --head-layers 1 --num-bins 21 --bin-limit 4 --batch-size 4 "
         "--window 6 --horizon 3 --plan-horizon 3 --num-samples 12 --num-elites 3 --iterations 2 --pid-starts 20 "
         "--buffer-size 120 --total-timesteps 2500 --eval-every 1000 --eval-episodes 2").split()
TAGS = """charts/episodic_return charts/episodic_cost charts/episodic_length charts/cost_rate charts/SPS charts/balance
eval/episodic_return eval/episodic_cost eval/balance losses/reconstruction losses/reward losses/cost losses/continue
losses/kl losses/total losses/policy losses/entropy losses/scale losses/value losses/cost_value losses/model_grad_norm
losses/policy_grad_norm losses/param_norm critic/read_outside critic/followed_outside time/env time/act
time/update""".split()
OWN_TAGS = {"bsrp_lag": "losses/psi lagrangian/lambda lagrangian/mu lagrangian/violation".split(),
            "osrp_lag": "lagrangian/lambda lagrangian/violation planner/num_feasible planner/too_few_feasible".split()}


@pytest.fixture(scope="session")
def small_run(place):
    made = {}

    def get(method):
        if method not in made:
            made[method] = train(place, *POINT, "--method", method, script=SCRIPT)
        return made[method]

    return get


@pytest.mark.parametrize("method", ["bsrp_lag", pytest.param("osrp_lag", marks=pytest.mark.long)])
def test_a_small_run(small_run, method):
    """The files, tags and summary lines of every script; 10 updates to a block of 500 steps."""
    made = small_run(method)
    assert re.fullmatch(r"SafetyPointGoal1-v0__safedreamer__1__\d+", made.dir.name)
    lines = [line for line in made.stdout.splitlines() if SUMMARY.fullmatch(line)]
    assert [line.split(":")[0] for line in lines] == ["step 1,000", "step 2,000", "step 2,500"]
    logged = scalars(made.dir)
    assert {*TAGS, *OWN_TAGS[method]} <= logged.keys()
    assert all(np.isfinite(value) for values in logged.values() for _, value in values)
    balance = {value for tag in ("charts/balance", "eval/balance") for _, value in logged[tag]}
    assert balance == ({0.0} if method == "bsrp_lag" else {1.0})
    counters, arrays = checkpoint(made.dir)
    assert counters["step"] == 2500 and arrays["['agent'].num_updates"] == 50
    page = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("safedreamer", "spowl_continuous"))
    assert {tag for tag in logged if f"`{tag}`" not in page} == set()


@pytest.mark.long
def test_a_small_run_from_pictures(place):
    flags = [*POINT, "--inputs", "vision", "--channels", "2", "--total-timesteps", "1000", "--capture-video"]
    made = train(place, *flags, script=SCRIPT)
    assert np.isfinite(scalars(made.dir)["losses/reconstruction"][-1][1]) and list((made.dir / "videos").glob("*.mp4"))


@pytest.mark.long
def test_evaluation_plays_the_same_episodes_again(small_run, place):
    made = small_run("bsrp_lag")
    run(place, "--evaluate", made.dir, script=SCRIPT)
    again, last = rows_of(made.dir / "evaluation.csv"), rows_of(made.dir / "episodes.csv")[-2:]
    assert [{column: row[column] for column in last[0]} for row in again] == last
    one_line(command(place, ROOT / "spowl_continuous.py", "--evaluate", made.dir), "was made by safedreamer.py")


@pytest.mark.long
@pytest.mark.parametrize("method", OWN_TAGS)
def test_interrupted_and_resumed_to_the_last_bit(small_run, place, method):
    """Ctrl-C after the first evaluation: exit status 130 and a checkpoint; it goes on to the same end."""
    expected_run, runs = small_run(method), place / f"safedreamer_{method}"
    words = [sys.executable, "-c", HEED_SIGNALS, sys.executable, str(SCRIPT), "--runs-dir", str(runs), *POINT,
             "--method", method]
    process = subprocess.Popen(words, cwd=place, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        while not (line := process.stdout.readline()).startswith("step "):
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    (directory,) = runs.iterdir()
    assert process.returncode == 130 and "Traceback" not in stderr and f"--resume {directory}" in stderr
    assert checkpoint(directory)[0]["step"] < 2500
    run(place, "--resume", directory, script=SCRIPT)
    (counters, arrays), (others, expected) = checkpoint(directory), checkpoint(expected_run.dir)
    assert {name for name in expected if not np.array_equal(arrays[name], expected[name])} == set()
    assert {**counters, "wall_time": 0} == {**others, "wall_time": 0}
