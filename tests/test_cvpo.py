"""CVPO: windows and targets, the E-step's dual and weights, the M-step's fit and trust region, blocks of updates; then
an environment whose best policy is known, and real runs."""
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from conftest import as_numpy, leaves_equal, random_weights, run_of
from hypothesis import given
from hypothesis import strategies as st
from test_train import (HEED_SIGNALS, SUMMARY, checkpoint, command, environment, one_line, rows_of, run, scalars,
                        train)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "baselines"))

import cvpo
from cvpo import Args, Transition, act, add, cost_threshold, init_actor, init_agent, init_buffer, parse_args

OBS, ACTIONS, B, K = 4, 2, 6, 5
SMALL = dict(num_envs=2, train_every=20, updates_per_step=0.3, eval_every=0, hidden=8, batch_size=B, num_samples=K,
             buffer_size=40, gamma=0.9, cost_gamma=0.8, cost_limit=2.0, episode_length=10)  # 6 updates to a block
BLOCK = 6


def small_args(**changes):
    return Args(**(SMALL | changes))


ARGS = small_args()


new_agent = jax.jit(init_agent, static_argnums=(0, 2, 3))


def random_agent(args=ARGS, seed=0):
    """An agent before its first update whose five networks, old policy and targets included, are all different."""
    shapes = jax.eval_shape(partial(init_agent, args, obs_dim=OBS, action_dim=ACTIONS), jax.random.key(0))
    fresh = new_agent(args, jax.random.key(seed), OBS, ACTIONS)
    parts = "critics", "policy", "target", "old_policy"
    return fresh._replace(**{name: random_weights(getattr(shapes, name), seed + i, 0.5)
                             for i, name in enumerate(parts)})


def random_columns(rng, *lead, obs_dim=OBS):
    """A Transition of random numbers with those leading axes; episodes end now and then, some by termination."""
    done = rng.random(lead) < 0.3
    columns = (rng.normal(size=(*lead, obs_dim)), rng.uniform(-1, 1, (*lead, ACTIONS)), rng.normal(size=lead),
               rng.random(lead), rng.normal(size=(*lead, obs_dim)), done & (rng.random(lead) < 0.5), done)
    return Transition(*(np.asarray(column, np.float32) for column in columns))


# ----------------------------------------------------------------------------------------------------------------------
# The networks in NumPy
# ----------------------------------------------------------------------------------------------------------------------
def np_mlp(layers, x):
    """Linear, ReLU, Linear, ReLU, Linear in float64; an action is part of x."""
    for i, layer in enumerate(layers):
        weights = [np.asarray(layer[name], np.float64) for name in ("w", "w_action") if name in layer]
        x = (np.maximum(x, 0.0) if i else x) @ np.concatenate(weights) + np.asarray(layer["b"], np.float64)
    return x


def np_read(layers, obs, action):
    obs = np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1]))
    return np_mlp(layers, np.concatenate([obs, np.clip(action, -1, 1)], -1).astype(np.float64))[..., 0]


def np_gaussian(policy, obs):
    mean, log_std = np.split(np_mlp(policy, np.asarray(obs, np.float64)), 2, -1)
    return mean, np.exp(np.clip(log_std, -20.0, 2.0))


def np_softmax(x):
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def certain(policy):
    """The same policy with a standard deviation of e^-20: its actions are its means."""
    *hidden, last = policy
    return (*hidden, {"w": last["w"].at[:, ACTIONS:].set(0.0), "b": last["b"].at[ACTIONS:].set(-30.0)})


def test_networks_against_numpy():
    """Critics read states once and actions of any number of leading axes; those out of range as their bounds."""
    agent, rng = random_agent(), np.random.default_rng(0)
    obs, actions = rng.normal(size=(B, OBS)), 1.5 * rng.normal(size=(K, B, ACTIONS))
    read = jax.jit(cvpo.q_value)
    for layers in agent.critics.values():
        np.testing.assert_allclose(read(layers, obs, actions), np_read(layers, obs, actions), rtol=1e-4, atol=1e-4)
    assert np.any(np.abs(actions) > 1)
    inside, outside = (read(agent.critics["q"], obs[0], jnp.array([x, -0.5])) for x in (1.0, 7.0))
    assert inside == outside
    for ours, expected in zip(jax.jit(cvpo.gaussian, static_argnums=0)(ARGS, agent.policy, obs),
                              np_gaussian(agent.policy, obs)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_standard_deviation_has_bounds():
    agent, obs = random_agent(), np.zeros((1, OBS))
    *hidden, last = agent.policy
    for head, log_std in ((-50.0, -20.0), (9.0, 2.0)):
        policy = (*hidden, {"w": 0.0 * last["w"], "b": jnp.full(2 * ACTIONS, head)})
        np.testing.assert_allclose(cvpo.gaussian(ARGS, policy, obs)[1], math.exp(log_std), rtol=1e-5)


def test_networks_begin_orthogonal():
    """Weights of state and action together have orthonormal rows or columns, whichever are fewer; biases are 0."""
    agent = new_agent(Args(), jax.random.key(0), 60, 2)
    for layers in (agent.critics["q"], agent.critics["qc"], agent.policy):
        shapes = [(62 if "w_action" in layers[0] else 60, 128), (128, 128), (128, layers[-1]["b"].size)]
        for layer, shape in zip(layers, shapes, strict=True):
            w = np.concatenate([layer[name] for name in ("w", "w_action") if name in layer])
            square = w @ w.T if shape[0] <= shape[1] else w.T @ w
            assert w.shape == shape and not np.any(layer["b"])
            np.testing.assert_allclose(square, np.eye(len(square)), atol=1e-5)
    assert leaves_equal(agent.target, agent.critics) and leaves_equal(agent.old_policy, agent.policy)
    assert not np.allclose(agent.critics["q"][0]["w"], agent.critics["qc"][0]["w"])
    assert (float(agent.dual["eta"]), float(agent.dual["lambda"]), agent.alpha.tolist()) == (1.0, 0.0, [0.0, 0.0])


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------
BAD = [(f"--{name} 0", "must be at least 1") for name in (
    "hidden", "batch-size", "n-step", "episode-length", "num-samples", "num-envs", "action-repeat", "train-every")]
BAD += [(f"--{name} 0", "must be positive") for name in (
    "critic-lr", "policy-lr", "dual-lr", "alpha-lr", "e-step-kl", "kl-mean", "kl-std", "eta-init", "dual-min",
    "weights-lambda", "dual-max", "updates-per-step", "tau")]
BAD += [(f"--{name} -0.1", "must be at least 0") for name in ("cost-limit", "lambda-init", "alpha-max", "gamma")]
BAD += [(f"--{field.name.replace('_', '-')} nan", "must be a finite number")
        for field in dataclasses.fields(Args) if type(field.default) is float]
BAD += [
    ("--gamma 1.1", "at most 1"), ("--cost-gamma 2", "at most 1"), ("--learning-starts -1", "must be at least 0"),
    ("--train-every 10005", "multiple of --num-envs x --action-repeat = 10, for example 10000"),
    ("--learning-starts 15000", "--learning-starts must be at most --train-every, or a multiple of it"),
    ("--updates-per-step 0.00015", "a whole number of updates of 10000 / 1"),
    ("--eval-every 15000", "multiple of --train-every"), ("--buffer-size 9", "--buffer-size must hold at least one"),
    ("--dual-min 30", "--dual-min must be at most --dual-max"), ("--eta-init 21", "--eta-init must be at most"),
    ("--lambda-init 21", "--lambda-init must be at most"), ("--log-std-min 3", "smaller than --log-std-max"),
    ("--exp-name a/b", "must not hold a slash"), ("--resume /nowhere", "is not a run directory of this script"),
]


@pytest.mark.parametrize("words, advice", BAD)
def test_flags_that_cannot_be(words, advice):
    """A line with the flag and what it should be; a flag that spoils two rules gets two lines."""
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    lines = str(stop.value.code).splitlines()
    assert sum(advice in line for line in lines) == 1, lines
    assert all(words.split()[0] in line or "is not a run directory" in line for line in lines), lines


def test_the_defaults_are_allowed():
    args = parse_args([])
    assert args == Args() and cvpo.advice(args) == ""
    assert cvpo.updates_due(args, 10_000) == 2000 and cvpo.updates_due(args, 5_000_000) == 1_000_000
    assert parse_args("--learning-starts 5000".split()).learning_starts == 5000
    assert parse_args("--learning-starts 20000".split()).learning_starts == 20_000


def test_defaults():
    """The reference's numbers, with the length and the limit of SPOWL's Table 1."""
    expected = dict(
        num_envs=10, action_repeat=1, train_every=10_000, updates_per_step=0.2, learning_starts=0, hidden=128,
        buffer_size=200_000, batch_size=256, critic_lr=1e-3, policy_lr=5e-4, gamma=0.995, cost_gamma=0.995, n_step=3,
        tau=0.05, cost_limit=25.0, episode_length=1000, num_samples=16, e_step_kl=0.02, dual_lr=0.02, eta_init=1.0,
        lambda_init=0.0, weights_lambda=1.0, dual_min=1e-6, dual_max=20.0, kl_mean=0.005, kl_std=0.0005, alpha_lr=0.1,
        alpha_max=0.5)
    assert {name: getattr(Args(), name) for name in expected} == expected


def test_threshold_by_hand():
    """25 an episode of 1000 steps is 4.97 discounted; in general the mean of gamma^t times the limit."""
    assert cost_threshold(Args()) == pytest.approx(4.97, abs=0.005)
    assert cost_threshold(Args(cost_limit=10.0, cost_gamma=0.99, episode_length=400)) == pytest.approx(2.455, abs=0.001)
    assert cost_threshold(Args(action_repeat=5)) == pytest.approx(25 * np.mean(0.995 ** np.arange(200)))
    assert cost_threshold(Args(cost_gamma=1.0)) == 25.0 and cost_threshold(Args(cost_gamma=0.0)) == 0.025
    assert cost_threshold(Args(gamma=0.5)) == cost_threshold(Args())  # it is the cost's discount that counts


# ----------------------------------------------------------------------------------------------------------------------
# Windows of the ring, and n-step targets
# ----------------------------------------------------------------------------------------------------------------------
ENVS, CAPACITY = 3, 7
RING = small_args(num_envs=ENVS, buffer_size=23, batch_size=500, train_every=30)  # 23 // 3 = 7 rows
draw, targets_of = jax.jit(cvpo.sample, static_argnums=0), jax.jit(cvpo.n_step_targets, static_argnums=0)
AROUND = [1, 2, 3, 6, 7, 8, 10, 14, 20]  # fill levels: fewer rows than a window, full, wrapped once and twice


def ring(steps, seed=0):
    """A history of that many agent steps, (T, E, ...), each named by its first observation, and the ring with it."""
    history, buffer = random_columns(np.random.default_rng(seed), steps, ENVS), init_buffer(RING, OBS, ACTIONS)
    history.obs[..., 0] = np.arange(steps)[:, None] + 1000 * np.arange(ENVS)
    for t in range(steps):
        buffer = add(buffer, jax.tree.map(lambda x: x[t], history))
    return history, buffer


def as_arrays(tree):
    return jax.tree.map(np.asarray, tree)


def starts(batch):
    """(env, t) of each window's first step."""
    return np.stack(np.divmod(np.asarray(batch.obs[0, :, 0]).astype(int), 1000), -1)


@pytest.mark.parametrize("steps", AROUND)
def test_windows_of_the_ring(steps):
    """Consecutive steps of one environment, the newest marked as an end; every stored step begins some window."""
    history, buffer = ring(steps)
    batch, oldest = as_arrays(draw(RING, buffer, jax.random.key(steps))), max(0, steps - CAPACITY)
    assert batch.obs.shape == (3, 500, OBS) and batch.done.shape == (3, 500)
    env, first = starts(batch).T
    for k in range(3):
        stored = first + k < steps
        for name, got, expected in zip(Transition._fields, batch, history):
            expected = expected[(first + k)[stored], env[stored]]
            if name == "done":
                expected = np.maximum(expected, (first + k)[stored] == steps - 1)
            np.testing.assert_array_equal(got[k, stored], expected, name)
    assert set(zip(env.tolist(), first.tolist())) == {(e, t) for e in range(ENVS) for t in range(oldest, steps)}


def test_windows_are_drawn_uniformly():
    """3 environments x 7 rows: 500 x 20 / 21 = 476 each, standard deviation 21."""
    _, buffer = ring(11)
    drawn = np.concatenate([starts(draw(RING, buffer, key)) for key in jax.random.split(jax.random.key(0), 20)])
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 21 and abs(counts - 476).max() < 5 * 21
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 5 / np.sqrt(10_000)


def np_target(history, env, first, gamma, paid, layers, policy):
    """The n-step return by looking at one step after the other."""
    total = 0.0
    for k in range(3):
        t = first + k
        total += gamma**k * float(paid[t, env])
        if history.done[t, env] or k == 2 or t == len(paid) - 1:
            mean, _ = np_gaussian(policy, history.next_obs[t, env])
            bootstrapped = gamma ** (k + 1) * np_read(layers, history.next_obs[t, env], mean)
            return total + (0.0 if history.terminated[t, env] else bootstrapped)


@pytest.mark.parametrize("steps", AROUND)
def test_targets_against_a_loop(steps):
    """Up to an end inside the window or the newest step; after a termination no bootstrap, after a truncation one."""
    history, buffer = ring(steps, seed=steps)
    agent = random_agent(RING, seed=1)
    policy, batch = certain(agent.policy), draw(RING, buffer, jax.random.key(steps))
    q, qc = map(np.asarray, targets_of(RING, policy, agent.target, batch, jax.random.key(0)))
    assert q.shape == qc.shape == (500,)
    for b, (env, first) in enumerate(starts(batch)[:100]):
        expected = (np_target(history, env, first, gamma, paid, agent.target[name], policy) for gamma, paid, name in
                    ((0.9, history.reward, "q"), (0.8, history.cost, "qc")))
        np.testing.assert_allclose([q[b], qc[b]], list(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("done, terminated, reward, cost", [
    ([0, 0, 0], [0, 0, 0], 1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 30, 10 + 0.1 * 20 + 0.01 * 40 + 0.001 * 300),
    ([0, 1, 0], [0, 0, 0], 1 + 0.5 * 2 + 0.25 * 20, 10 + 0.1 * 20 + 0.01 * 200),
    ([0, 1, 0], [0, 1, 0], 1 + 0.5 * 2, 10 + 0.1 * 20),
    ([1, 0, 1], [0, 0, 1], 1 + 0.5 * 10, 10 + 0.1 * 100),
    ([1, 1, 1], [1, 1, 1], 1, 10),
    ([0, 0, 1], [0, 0, 1], 1 + 0.5 * 2 + 0.25 * 4, 10 + 0.1 * 20 + 0.01 * 40),
    ([0, 1, 1], [0, 0, 1], 1 + 0.5 * 2 + 0.25 * 20, 10 + 0.1 * 20 + 0.01 * 200),
])
def test_targets_by_hand(monkeypatch, done, terminated, reward, cost):
    """Rewards 1, 2, 4, costs ten times as high, gamma 0.5 and 0.1; Q reads what it is told of s', Qc ten times that."""
    monkeypatch.setattr(cvpo, "q_value", lambda factor, obs, action: factor * obs[..., 0])
    monkeypatch.setattr(cvpo, "gaussian", lambda args, policy, obs: (0.0 * obs, 1.0 + 0.0 * obs))
    args, column = small_args(gamma=0.5, cost_gamma=0.1), lambda values: jnp.asarray(values, jnp.float32)[:, None]
    batch = Transition(jnp.zeros((3, 1, 1)), jnp.zeros((3, 1, 1)), column([1, 2, 4]), column([10, 20, 40]),
                       column([10, 20, 30])[..., None], column(terminated), column(done))
    q, qc = cvpo.n_step_targets(args, None, {"q": 1.0, "qc": 10.0}, batch, jax.random.key(0))
    np.testing.assert_allclose([q[0], qc[0]], [reward, cost], rtol=1e-6)
    args = small_args(gamma=0.0, cost_gamma=0.0)  # nothing follows
    np.testing.assert_array_equal(cvpo.n_step_targets(args, None, {"q": 1.0, "qc": 10.0}, batch, jax.random.key(0)),
                                  [[1.0], [10.0]])


def test_the_next_action_is_a_sample_of_the_policy():
    """Its standard deviation is the policy's own; what is out of range counts as its bound."""
    agent, n = random_agent(), 4000
    batch = Transition(*(jnp.zeros((1, n, *size)) for size in ((OBS,), (ACTIONS,), (), (), (OBS,), (), ())))
    args = small_args(n_step=1, batch_size=n)
    targets, _ = targets_of(args, agent.policy, agent.target, batch, jax.random.key(1))
    mean, std = np_gaussian(agent.policy, np.zeros(OBS))
    actions = mean + std * np.random.default_rng(0).normal(size=(n, ACTIONS))
    expected = 0.9 * np_read(agent.target["q"], np.zeros(OBS), actions)
    assert expected.std() > 0.05
    assert np.mean(targets) == pytest.approx(expected.mean(), abs=6 * expected.std() / np.sqrt(n))
    assert np.std(targets) == pytest.approx(expected.std(), rel=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# E-step
# ----------------------------------------------------------------------------------------------------------------------
STATES = small_args(episode_length=1)  # the threshold is the limit itself


def dual_of(eta, multiplier):
    return {"eta": jnp.float32(eta), "lambda": jnp.float32(multiplier)}


def np_dual(dual, args, q, qc):
    """g(eta, lambda) with plain exponentials."""
    eta, multiplier = dual
    scores = (q - multiplier * qc) / eta
    top = scores.max(0)
    inner = top + np.log(np.mean(np.exp(scores - top), 0))
    return eta * args.e_step_kl + multiplier * cost_threshold(args) + eta * inner.mean()


def critics_read(seed, k=16, b=32):
    """(K, B) each: what two critics may read; where there is reward there is cost."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(k, b)) + 3.0 * rng.normal(size=b)
    return q, 0.7 * q + 0.5 * rng.normal(size=(k, b)) + 2.0


@pytest.mark.parametrize("eta, multiplier", [(1.0, 0.0), (0.3, 0.7), (5.0, 2.0), (0.05, 0.1)])
def test_dual_and_its_gradient(eta, multiplier):
    """Against plain exponentials and central differences; the gradient by lambda is the slack of the weighted Qc, that
    by eta the slack of the weights' divergence from equal ones."""
    q, qc = critics_read(0)
    loss, grads = jax.value_and_grad(cvpo.dual_loss)(dual_of(eta, multiplier), STATES, q, qc)
    assert loss == pytest.approx(np_dual((eta, multiplier), STATES, q, qc), rel=1e-4, abs=1e-4)
    differences = scipy.optimize.approx_fprime(np.array([eta, multiplier]), np_dual, 1e-6, STATES, q, qc)
    np.testing.assert_allclose([grads["eta"], grads["lambda"]], differences, rtol=2e-3, atol=1e-3)
    w = np_softmax((q - multiplier * qc) / eta)
    assert grads["lambda"] == pytest.approx(2.0 - np.mean(np.sum(w * qc, 0)), abs=1e-3)
    assert grads["eta"] == pytest.approx(0.02 - np.mean(np.sum(w * np.log(16 * w + 1e-300), 0)), abs=1e-3)


@pytest.mark.parametrize("limit, bound", [(1.9, 0.1), (1.8, 0.3), (50.0, 0.1), (-9.0, 0.1)])
def test_steps_lead_to_scipys_minimum(fast, limit, bound):
    """Adam on (eta, lambda), repeated: the minimum within the bounds; there, where the limit can be kept, the weights
    keep both bounds: with slack lambda is at its least, with too low a limit at its most."""
    args = small_args(episode_length=1, cost_limit=limit, e_step_kl=bound)
    q, qc = critics_read(1)
    best = scipy.optimize.minimize(np_dual, [1.0, 0.5], (args, q, qc), bounds=[(1e-6, 20.0)] * 2, tol=1e-10)
    dual = dual_of(1.0, 0.0)
    opt = cvpo.optax.adam(args.dual_lr).init(dual)

    def step(carry, _):
        dual, opt, weights, metrics = cvpo.e_step(args, *carry, jnp.float32(q), jnp.float32(qc))
        return (dual, opt), (weights, metrics)

    (dual, _), (weights, metrics) = jax.jit(lambda: jax.lax.scan(step, (dual, opt), length=6000))()
    last = {name: float(values[-1]) for name, values in metrics.items()}
    found = float(dual["eta"]), float(dual["lambda"])
    assert np_dual(found, args, q, qc) <= best.fun + 1e-3 * abs(best.fun)
    np.testing.assert_allclose(found, best.x, rtol=0.02, atol=2e-3)
    assert last["cvpo/eta"] == found[0] and last["lagrangian/lambda"] == found[1]
    if limit > 0:
        assert last["cvpo/kl_weights"] == pytest.approx(bound, rel=0.05)
    if limit < 2.0:
        assert found[1] > 0.1
    if 0 < limit < 2.0:
        assert last["lagrangian/violation"] == pytest.approx(0.0, abs=0.01)
    elif limit > 0:
        assert found[1] == pytest.approx(1e-6) and last["lagrangian/violation"] < -40
    else:
        assert found[1] == 20.0


def test_one_step_of_the_dual():
    """From (1, 0) both move by the learning rate at most and stay within their bounds; the weights use the new ones."""
    q, qc = critics_read(2)
    start = dual_of(1.0, 0.0)
    for limit, expected in ((0.0, 0.02), (90.0, 1e-6)):
        args = small_args(episode_length=1, cost_limit=limit)
        dual, opt, weights, metrics = cvpo.e_step(args, start, cvpo.optax.adam(0.02).init(start), q, qc)
        assert dual["lambda"] == pytest.approx(expected, rel=1e-4) and abs(dual["eta"] - 1.0) < 0.0201
        eta, multiplier = float(dual["eta"]), float(dual["lambda"])
        np.testing.assert_allclose(weights, np_softmax((q - multiplier * qc) / eta), rtol=1e-3)
        assert metrics["cvpo/dual"] == pytest.approx(np_dual((1.0, 0.0), args, q, qc), rel=1e-4)
        followed = np.mean(np.sum(np.asarray(weights) * qc, 0))
        assert metrics["lagrangian/violation"] == pytest.approx(followed - limit, abs=1e-3)


def test_weights_by_hand():
    """lambda Qc is subtracted once: Q 1, 0 and Qc 2, 0 at lambda 0.5 are equal actions; twice as in FSRL: e^-2 to 1."""
    q, qc = jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [0.0]])
    np.testing.assert_allclose(cvpo.action_weights(dual_of(0.5, 0.5), ARGS, q, qc), 0.5)
    (first,), (second,) = cvpo.action_weights(dual_of(0.5, 0.25), ARGS, q, qc).tolist()
    assert first / second == pytest.approx(math.e) and first + second == pytest.approx(1.0)
    (first,), (second,) = cvpo.action_weights(dual_of(0.5, 0.5), small_args(weights_lambda=2.0), q, qc).tolist()
    assert first / second == pytest.approx(math.exp(-2.0))


@given(st.floats(0.05, 20.0), st.floats(0.0, 5.0), st.integers(0, 1000), st.floats(-3.0, 3.0))
def test_weights_are_shares_and_ignore_a_states_own_level(eta, multiplier, seed, level):
    """They sum to 1 for every state, and Q higher by a constant in one state changes none of them."""
    q, qc = critics_read(seed, k=4, b=3)
    weights = cvpo.action_weights(dual_of(eta, multiplier), ARGS, q, qc)
    np.testing.assert_allclose(np.sum(weights, 0), 1.0, rtol=1e-5)
    higher = cvpo.action_weights(dual_of(eta, multiplier), ARGS, q + level * np.arange(3), qc)
    np.testing.assert_allclose(higher, weights, atol=1e-4)


def test_the_sharpest_weights_are_finite():
    """eta at its least, Q far apart."""
    dual, q = dual_of(1e-6, 20.0), 100.0 * np.eye(3)
    loss, grads = jax.value_and_grad(cvpo.dual_loss)(dual, STATES, q, 0.0 * q)
    assert np.isfinite([loss, grads["eta"], grads["lambda"]]).all()
    _, _, weights, metrics = cvpo.e_step(STATES, dual, cvpo.optax.adam(0.02).init(dual), q, 0.0 * q)
    assert all(np.isfinite(value) for value in metrics.values())
    sharp = cvpo.action_weights(dual, STATES, q, 0.0 * q)
    np.testing.assert_array_equal(sharp, np.eye(3))


# ----------------------------------------------------------------------------------------------------------------------
# M-step
# ----------------------------------------------------------------------------------------------------------------------
def test_log_prob_against_scipy():
    rng = np.random.default_rng(0)
    x, mean, std = rng.normal(size=(K, B, 2)), rng.normal(size=(B, 2)), np.exp(rng.normal(size=(B, 2)))
    np.testing.assert_allclose(cvpo.log_prob(x, mean, std), scipy.stats.norm.logpdf(x, mean, std).sum(-1), rtol=1e-4)


def integrated_kl(mean, std, other_mean, other_std):
    """KL of one Gaussian from another by quadrature."""
    p, q = scipy.stats.norm(mean, std), scipy.stats.norm(other_mean, other_std)
    inside = lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x))
    return scipy.integrate.quad(inside, mean - 12 * std, mean + 12 * std, points=[mean], limit=200)[0]


def test_divergences_against_quadrature():
    """KL(old || mean moved) under the old standard deviation, KL(old || std changed) at the old mean, summed over the
    action's dimensions, mean over states."""
    rng = np.random.default_rng(1)
    old_mean, mean = rng.normal(size=(2, 3, 2))
    old_std, std = np.exp(0.5 * rng.normal(size=(2, 3, 2)))
    by_mean, by_std = np.zeros((2, 3, 2))
    for i in np.ndindex(3, 2):
        by_mean[i] = integrated_kl(old_mean[i], old_std[i], mean[i], old_std[i])
        by_std[i] = integrated_kl(old_mean[i], old_std[i], old_mean[i], std[i])
    kl = cvpo.kl_parts(old_mean, old_std, mean, std)
    np.testing.assert_allclose(kl, [by_mean.sum(-1).mean(), by_std.sum(-1).mean()], rtol=1e-4)
    assert not np.any(cvpo.kl_parts(old_mean, old_std, old_mean, old_std))


def m_step_inputs(seed=0, b=B, k=K):
    """Observations, an old policy's Gaussian and actions, and weights."""
    rng = np.random.default_rng(seed)
    obs, mean, std = rng.normal(size=(b, OBS)), rng.normal(size=(b, ACTIONS)), np.exp(rng.normal(size=(b, ACTIONS)))
    actions = mean + std * rng.normal(size=(k, b, ACTIONS))
    return tuple(np.float32(x) for x in (obs, actions, np_softmax(2.0 * rng.normal(size=(k, b))))), tuple(
        np.float32(x) for x in (mean, std))


def alpha_state(alpha):
    alpha = jnp.asarray(alpha, jnp.float32)
    return alpha, cvpo.optax.adam(0.1).init(alpha)


def test_policy_loss_against_numpy():
    """Both Gaussians' weighted log-likelihoods, mean over states and samples, plus alpha after its own step, within its
    cap, times each KL's excess."""
    agent, ((obs, actions, weights), old) = random_agent(), m_step_inputs()
    mean, std = np_gaussian(agent.policy, obs)
    logpdf = scipy.stats.norm.logpdf
    fit = -np.mean(weights * (logpdf(actions, mean, old[1]) + logpdf(actions, old[0], std)).sum(-1))
    kl = np.array([(0.5 * ((mean - old[0]) / old[1]) ** 2).sum(-1).mean(),
                   (np.log(std / old[1]) + 0.5 * (old[1] / std) ** 2 - 0.5).sum(-1).mean()])
    for kl_mean, kl_std, start, used in (
            (0.005, 0.0005, [0.0, 0.2], [0.1, 0.3]), (1e3, 0.0005, [0.0, 0.45], [0.0, 0.5]),
            (0.005, 1e3, [0.6, 0.2], [0.5, 0.1])):
        args = small_args(kl_mean=kl_mean, kl_std=kl_std)
        loss, (alpha, _, metrics) = cvpo.policy_loss(agent.policy, args, obs, actions, weights, old,
                                                     *alpha_state(start))
        signs = [1 if kl[0] > kl_mean else -1, 1 if kl[1] > kl_std else -1]
        np.testing.assert_allclose(alpha, np.add(start, 0.1 * np.array(signs)), rtol=1e-4)
        expected = fit + np.sum(np.array(used) * (kl - [kl_mean, kl_std]))
        assert loss == pytest.approx(expected, rel=1e-3) and metrics["losses/policy"] == pytest.approx(fit, rel=1e-3)
        got = [metrics[f"cvpo/{name}"] for name in ("kl_mean", "kl_std", "alpha_mean", "alpha_std")]
        np.testing.assert_allclose(got, [*kl, *used], rtol=1e-3, atol=1e-6)
    assert metrics["losses/entropy"] == pytest.approx(scipy.stats.norm(mean, std).entropy().sum(-1).mean(), rel=1e-3)


def test_alpha_is_a_number_to_the_policys_gradient():
    """After two steps at other excesses, so that Adam's own derivative is not 0."""
    agent, ((obs, actions, weights), old) = random_agent(), m_step_inputs()
    args, state = small_args(alpha_max=10.0), alpha_state([0.2, 0.2])
    slope = jax.jit(lambda policy, *state: jax.grad(cvpo.policy_loss, has_aux=True)(
        policy, args, obs, actions, weights, old, *state))
    for seed in (1, 2):
        _, (*state, _) = slope(random_agent(seed=seed).policy, *state)
    grads, (_, _, metrics) = slope(agent.policy, *state)
    used = jnp.stack([metrics["cvpo/alpha_mean"], metrics["cvpo/alpha_std"]])

    def held(policy):
        mean, std = cvpo.gaussian(args, policy, obs)
        likely = cvpo.log_prob(actions, mean, old[1]) + cvpo.log_prob(actions, old[0], std)
        return -jnp.mean(weights * likely) + jnp.sum(used * cvpo.kl_parts(*old, mean, std))

    assert np.all(used > 0) and np.all(used < 10)
    for one, other in zip(*map(jax.tree.leaves, (grads, jax.jit(jax.grad(held))(agent.policy)))):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@partial(jax.jit, static_argnums=(0, 6))
def fit(args, policy, obs, actions, weights, old, steps):
    """Repeated M-steps on the same weighted actions -> the policy, the metrics' means over the second half."""
    optimizer = cvpo.optax.adam(args.policy_lr)

    def step(carry, _):
        policy, opt, alpha, alpha_opt = carry
        grads, (alpha, alpha_opt, metrics) = jax.grad(cvpo.policy_loss, has_aux=True)(
            policy, args, obs, actions, weights, old, alpha, alpha_opt)
        updates, opt = optimizer.update(grads, opt)
        return (cvpo.optax.apply_updates(policy, updates), opt, alpha, alpha_opt), metrics

    carry, metrics = jax.lax.scan(step, (policy, optimizer.init(policy), *alpha_state(jnp.zeros(2))), length=steps)
    return carry[0], jax.tree.map(lambda values: values[steps // 2:].mean(), metrics)


def test_without_a_trust_region_the_fit_is_the_weighted_moments(fast):
    """The mean becomes that of the weighted actions; the variance theirs about the OLD mean: it has its own term."""
    args, ((obs, actions, weights), old) = small_args(hidden=32, alpha_max=0.0, policy_lr=3e-3), m_step_inputs(3, b=3)
    policy, _ = fit(args, cvpo.init_policy(args, jax.random.key(0), OBS, ACTIONS), obs, actions, weights, old, 4000)
    mean, std = cvpo.gaussian(args, policy, obs)
    np.testing.assert_allclose(mean, np.sum(weights[..., None] * actions, 0), atol=0.02)
    np.testing.assert_allclose(std, np.sqrt(np.sum(weights[..., None] * (actions - old[0]) ** 2, 0)), atol=0.02)


def test_within_a_trust_region_both_divergences_are_at_their_bounds(fast):
    """On average, with a cap that does not bind: the ascent of alpha lets neither be above or below for long. Without
    bounds the same weights would lead to 0.47 and 4.9."""
    args = small_args(hidden=32, alpha_max=1e3, policy_lr=1e-3, kl_mean=0.02, kl_std=0.01)
    (obs, _, _), _ = m_step_inputs(3, b=3)
    policy = cvpo.init_policy(args, jax.random.key(0), OBS, ACTIONS)
    old = cvpo.gaussian(args, policy, obs)
    rng = np.random.default_rng(0)
    actions = old[0] + old[1] * rng.normal(size=(K, 3, ACTIONS)).astype(np.float32)
    weights = np_softmax(4.0 * actions[..., 0])
    _, metrics = fit(args, policy, obs, actions, weights, old, 6000)
    assert metrics["cvpo/kl_mean"] == pytest.approx(0.02, rel=0.1)
    assert metrics["cvpo/kl_std"] == pytest.approx(0.01, rel=0.1)
    assert metrics["cvpo/alpha_mean"] > 0 and metrics["cvpo/alpha_std"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# One update
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one_update():
    """An agent in the middle of a block, windows, the agent after one update on them, the metrics."""
    agent = random_agent()._replace(num_updates=jnp.int32(2), alpha=jnp.array([0.3, 0.2]), dual=dual_of(0.7, 0.4))
    batch = random_columns(np.random.default_rng(5), 3, B)
    return agent, batch, *jax.jit(cvpo.update, static_argnums=0)(ARGS, agent, batch, jax.random.key(3))


def test_bins_are_wider_observations():
    """--obs-transform bins acts, learns and judges as raw does on observations that hold the weights already."""
    bins = small_args(obs_transform="bins")
    batch = random_columns(np.random.default_rng(5), 3, B)
    wide = batch._replace(obs=cvpo.spread_obs(bins, batch.obs), next_obs=cvpo.spread_obs(bins, batch.next_obs))
    assert wide.obs.shape[-1] == 9 * OBS
    agents = [init_agent(args, jax.random.key(0), dim, ACTIONS) for args, dim in ((bins, OBS), (ARGS, 9 * OBS))]
    assert leaves_equal(*agents)
    update, told = jax.jit(cvpo.update, static_argnums=0), []
    for args, agent, seen in zip((bins, ARGS), agents, (batch, wide)):
        actor = init_actor(args, jax.random.key(1), ACTIONS)
        action, _ = act(args, agent, actor, seen.obs[0, :2], np.zeros(2, bool), True)
        after, metrics = update(args, agent, seen, jax.random.key(3))
        told.append((action, after.critics, after.policy, metrics, cvpo.critic_metrics(
            args, agent, [{"played": jax.tree.map(lambda x: np.asarray(x[:, 0]), seen)}])))
    for left, right in zip(*map(jax.tree.leaves, told)):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_one_update_against_numpy(one_update):
    """Targets from the target critics and the online policy; the E-step on the old policy's actions, read by the
    critics just updated; the M-step on those, unclipped, with the weights of the new (eta, lambda)."""
    agent, batch, after, metrics = one_update
    key_target, key_actions = jax.random.split(jax.random.key(3))
    obs = batch.obs[0]
    q_target, qc_target = targets_of(ARGS, agent.policy, agent.target, batch, key_target)
    for tag, name, target in (("value", "q", q_target), ("cost_value", "qc", qc_target)):
        error = np.mean((np_read(agent.critics[name], obs, batch.action[0]) - np.asarray(target)) ** 2)
        assert metrics[f"losses/{tag}"] == pytest.approx(error, rel=1e-3)
    mean, std = np_gaussian(agent.old_policy, obs)
    actions = mean + std * np.asarray(jax.random.normal(key_actions, (K, B, ACTIONS)))
    assert np.any(np.abs(actions) > 1)
    q, qc = (np_read(after.critics[name], obs, actions) for name in ("q", "qc"))
    assert metrics["cvpo/dual"] == pytest.approx(np_dual((0.7, 0.4), ARGS, q, qc), rel=1e-3)
    eta, multiplier = float(after.dual["eta"]), float(after.dual["lambda"])
    assert eta != pytest.approx(0.7) and multiplier != pytest.approx(0.4)
    weights = np_softmax((q - multiplier * qc) / eta)
    threshold = 2.0 * np.mean(0.8 ** np.arange(10))
    assert metrics["lagrangian/violation"] == pytest.approx(np.mean(np.sum(weights * qc, 0)) - threshold, rel=1e-3)
    new_mean, new_std = np_gaussian(agent.policy, obs)
    logpdf = scipy.stats.norm.logpdf
    fit = -np.mean(weights * (logpdf(actions, new_mean, std) + logpdf(actions, mean, new_std)).sum(-1))
    assert metrics["losses/policy"] == pytest.approx(fit, rel=1e-3)
    assert metrics["cvpo/kl_mean"] == pytest.approx((0.5 * ((new_mean - mean) / std) ** 2).sum(-1).mean(), rel=1e-3)


def test_what_an_update_moves(one_update):
    """Every network by at most Adam's first step, critics 1e-3 and policy 5e-4; the targets by tau towards the new
    critics; the old policy not at all."""
    agent, _, after, _ = one_update
    for name, rate in (("critics", 1e-3), ("policy", 5e-4)):
        moved = [np.abs(np.subtract(new, old)).max() for new, old in
                 zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(agent, name)), strict=True)]
        assert min(moved) > 0.5 * rate and max(moved) < 1.01 * rate, name
    for old, online, new in zip(*(jax.tree.leaves(part) for part in (agent.target, after.critics, after.target))):
        np.testing.assert_allclose(new, 0.95 * np.asarray(old) + 0.05 * np.asarray(online), atol=1e-6)
    assert leaves_equal(after.old_policy, agent.old_policy) and leaves_equal(after.key, agent.key)
    assert int(after.num_updates) == 3
    np.testing.assert_allclose(np.abs(after.alpha - agent.alpha), 0.1, rtol=1e-3)


def test_the_policy_leaves_the_critics_alone(one_update):
    """No gradient of the M-step reaches a critic, nor of the E-step a network."""
    agent, batch, after, _ = one_update
    other = agent._replace(dual=dual_of(3.0, 9.0), alpha=jnp.array([0.0, 0.5]), old_policy=agent.policy)
    changed, _ = jax.jit(cvpo.update, static_argnums=0)(ARGS, other, batch, jax.random.key(3))
    assert leaves_equal((changed.critics, changed.target), (after.critics, after.target))
    assert not leaves_equal(changed.policy, after.policy)


def test_an_update_keeps_the_types_of_a_fresh_agent():
    """So that the first call's compilation serves the second: shapes, dtypes and weak types do not change."""
    fresh = jax.eval_shape(partial(init_agent, ARGS, obs_dim=OBS, action_dim=ACTIONS), jax.random.key(0))
    after, _ = jax.eval_shape(partial(cvpo.update, ARGS), fresh, random_columns(np.random.default_rng(0), 3, B),
                              jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks of updates
# ----------------------------------------------------------------------------------------------------------------------
def filled_buffer(args=ARGS, steps=15):
    rng, buffer = np.random.default_rng(9), init_buffer(args, OBS, ACTIONS)
    for _ in range(steps):
        buffer = add(buffer, random_columns(rng, args.num_envs))
    return buffer


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture(scope="module")
def singly():
    """The agent before each of thirteen updates, more than two blocks, done one at a time, and after the last."""
    agent, buffer = random_agent(), filled_buffer()
    agents = [copy(agent)]
    for _ in range(13):
        agent, _ = cvpo.update_many(ARGS, agent, buffer, 1)
        agents.append(copy(agent))
    return agents


def test_old_policy_and_alpha_begin_anew_with_each_block(singly):
    """The old policy is the online one at updates 0, 6 and 12, and stays in between; there alpha and its Adam start at
    0: the first step is the whole learning rate, and alpha keeps on moving from there."""
    for number in range(13):
        before, after, first = singly[number], singly[number + 1], singly[number // BLOCK * BLOCK]
        assert leaves_equal(after.old_policy, first.policy), number
        assert int(after.alpha_opt[0].count) == number % BLOCK + 1
        start = 0.0 if number % BLOCK == 0 else np.asarray(before.alpha)
        assert np.all(np.abs(after.alpha - start) < 0.1001) and np.all(after.alpha != start)
        if number % BLOCK == 0:
            np.testing.assert_allclose(np.abs(after.alpha), 0.1, rtol=1e-3)
    assert not leaves_equal(singly[6].policy, singly[0].policy)
    assert np.abs(singly[6].alpha).max() > 0.3  # so that there was something to begin anew


@pytest.mark.parametrize("start, begins", [(0, {0, 6, 12}), (10, {0, 3, 6, 12}), (20, {0, 6, 12}), (40, {0, 6, 12})])
def test_a_block_begins_after_the_updates_of_a_random_start_too(start, begins):
    """After 10 of the 20 steps of a cycle, with the 3 updates that are due then."""
    args, agent = small_args(learning_starts=start), random_agent()
    begun = jax.jit(lambda done: cvpo.begin_block(args, agent._replace(num_updates=done)).old_policy[-1]["b"])
    assert {done for done in range(13) if np.array_equal(begun(done), agent.policy[-1]["b"])} == begins


def test_every_update_draws_anew(monkeypatch):
    """Windows and noise of the third update are not those of the fourth."""
    monkeypatch.setattr(cvpo, "update", lambda args, agent, batch, key: (agent, {
        "windows": batch.reward.sum(), "noise": jax.random.uniform(key)}))
    agent, buffer = random_agent(), filled_buffer()
    told = jax.jit(lambda done: cvpo.update_many.__wrapped__(ARGS, agent._replace(num_updates=done), buffer, 1)[1])
    third, fourth = told(2), told(3)
    assert all(third[name] != fourth[name] for name in ("windows", "noise"))


def test_chunks_make_no_difference(singly):
    """Blocks are counted by updates done, wherever a call of update_many begins or ends: here a block of 6 begins
    within the second of four calls."""
    agent, buffer = copy(singly[0]), filled_buffer()
    for chunk in (4, 4, 4, 1):
        agent, metrics = cvpo.update_many(ARGS, agent, buffer, chunk)
    assert int(agent.num_updates) == 13
    for ours, expected in zip(jax.tree.leaves(agent), jax.tree.leaves(singly[-1]), strict=True):
        np.testing.assert_allclose(as_numpy(ours), as_numpy(expected), rtol=1e-3, atol=1e-5)


def test_dual_and_critics_go_on_across_blocks(singly):
    """What persists: Adam's counts of eta, lambda, the critics and the policy."""
    for name in ("dual_opt", "critics_opt", "policy_opt"):
        assert int(getattr(singly[-1], name)[0].count) == 13


def test_update_many_takes_the_agent_over():
    """The old agent is given up, its memory reused; the buffer is not."""
    agent, buffer = new_agent(ARGS, jax.random.key(0), OBS, ACTIONS), filled_buffer()
    cvpo.update_many(ARGS, agent, buffer, 1)
    networks = agent.critics, agent.policy, agent.target, agent.old_policy
    assert all(x.is_deleted() for x in jax.tree.leaves(networks))
    assert not any(x.is_deleted() for x in jax.tree.leaves(buffer))


def test_a_checkpoint_within_a_block_goes_on_to_the_last_bit(tmp_path):
    """Nothing that an update reads is missing in it: four updates, saved, loaded, four more."""
    buffer, agent = filled_buffer(), new_agent(ARGS, jax.random.key(4), OBS, ACTIONS)
    agent, _ = cvpo.update_many(ARGS, agent, buffer, 4)
    actor = init_actor(ARGS, jax.random.key(5), ACTIONS)
    action, actor = act(ARGS, agent, actor, np.zeros((2, OBS), np.float32), np.zeros(2, bool), True)
    cvpo.save_checkpoint(tmp_path, run_of(cvpo, ARGS, agent, actor, buffer, 4))
    templates = {"agent": new_agent(ARGS, jax.random.key(0), OBS, ACTIONS),
                 "actor": init_actor(ARGS, jax.random.key(0), ACTIONS), "buffer": init_buffer(ARGS, OBS, ACTIONS)}
    trees, _ = cvpo.load_checkpoint(tmp_path, templates)
    assert leaves_equal((trees["agent"], trees["actor"], trees["buffer"]), (agent, actor, buffer))
    ours, theirs = (cvpo.update_many(ARGS, *pair, 4)[0] for pair in ((agent, buffer),
                                                                     (trees["agent"], trees["buffer"])))
    assert leaves_equal(ours, theirs) and int(ours.num_updates) == 8


# ----------------------------------------------------------------------------------------------------------------------
# Acting
# ----------------------------------------------------------------------------------------------------------------------
def test_the_policy_acts():
    """Its mean in evaluation; in training its samples, apart from environment to environment and step to step; either
    clipped, so that what is stored is what was executed."""
    args, agent = small_args(num_envs=2000, train_every=2000), random_agent()
    obs = np.tile(np.random.default_rng(3).normal(size=OBS), (2000, 1)).astype(np.float32)
    step = partial(act, args, agent, obs=obs, is_first=np.zeros(2000, bool))
    mean, std = (x[0] for x in np_gaussian(agent.policy, obs))
    action, actor = step(actor=init_actor(args, jax.random.key(2), ACTIONS), explore=False)
    np.testing.assert_allclose(action, np.broadcast_to(np.clip(mean, -1, 1), action.shape), atol=1e-5)
    first, actor = step(actor=actor, explore=True)
    second, actor = step(actor=actor, explore=True)
    first, second = np.asarray(first), np.asarray(second)
    assert int(actor.step) == 3 and not np.any(actor.metrics["charts/balance"])
    inside = np.abs(first) < 1.0
    assert np.abs(first).max() == 1.0 and inside.any() and not np.any((first == second) & inside)
    assert len(np.unique(first[inside])) == inside.sum()
    for i in range(ACTIONS):
        for bound, share in ((-1.0, scipy.stats.norm.cdf(-1, mean[i], std[i])),
                             (1.0, scipy.stats.norm.sf(1, mean[i], std[i]))):
            assert np.mean(first[:, i] == bound) == pytest.approx(share, abs=5 * np.sqrt(0.25 / 2000))
        below = scipy.stats.norm.cdf(0.2, mean[i], std[i])
        assert np.mean(first[:, i] < 0.2) == pytest.approx(below, abs=5 * np.sqrt(0.25 / 2000))


def test_critic_metrics_by_hand(monkeypatch):
    """One episode: steps 3, 4 and 6 cost. Qc is made to read ten times the step's number."""
    cost, steps = np.array([0, 0, 0, 1, 1, 0, 1, 0], np.float32), np.arange(8, dtype=np.float32)
    played = Transition(steps[:, None], np.zeros((8, 1), np.float32), cost, cost, steps[:, None], 0 * cost,
                        np.eye(8, dtype=np.float32)[7])
    monkeypatch.setattr(cvpo, "q_value", lambda factor, obs, action: factor * obs[:, 0])
    metrics = cvpo.critic_metrics(small_args(cost_gamma=0.5), SimpleNamespace(critics={"q": 0.0, "qc": 10.0}),
                                  [{"played": played}])
    assert metrics["critic/cost_auc"] == pytest.approx(np.mean([c > o for c in (3, 4, 6) for o in (0, 1, 2, 5, 7)]))
    assert metrics["critic/read_inside"] == pytest.approx(10 * np.mean([4, 5, 7]))
    followed = {7: 70.0, 5: 0.5 * (1 + 0.5 * 70), 4: 1 + 0.25 * (1 + 0.5 * 70)}
    assert metrics["critic/followed_inside"] == pytest.approx(np.mean(list(followed.values())))


# ----------------------------------------------------------------------------------------------------------------------
# An environment whose best policy is known
# ----------------------------------------------------------------------------------------------------------------------
STEPS = 20  # agent steps of an episode
PROBE = dict(num_envs=16, train_every=320, updates_per_step=0.25, buffer_size=6400, hidden=32, batch_size=64,
             gamma=0.8, cost_gamma=0.8, n_step=3, episode_length=STEPS, policy_lr=3e-3, critic_lr=3e-3, dual_lr=0.05,
             e_step_kl=0.1, kl_mean=0.02, kl_std=0.005)


def pay(action):
    """Reward -(a - 0.4)^2: best at 0.4. Cost (a + 1) / 2."""
    return -((action[:, 0] - 0.4) ** 2), (action[:, 0] + 1.0) / 2.0


def learn(args, blocks=40):
    """Act and learn in turns; episodes of twenty steps are truncated. -> the mean action, the training cost of the last
    ten blocks, metrics."""
    agent, buffer = new_agent(args, jax.random.key(1), 1, 1), init_buffer(args, 1, 1)
    actor, costs = init_actor(args, jax.random.key(2), 1), []
    obs, zeros = np.ones((args.num_envs, 1), np.float32), np.zeros(args.num_envs, np.float32)
    for _ in range(blocks):
        for step in range(STEPS):
            action, actor = act(args, agent, actor, obs, zeros > 0, True)
            reward, cost = pay(np.asarray(action))
            costs.append(cost.mean())
            buffer = add(buffer, Transition(obs, action, reward, cost, obs, zeros, zeros + (step == STEPS - 1)))
        agent, metrics = cvpo.update_many(args, agent, buffer, 80)
    action, _ = act(args, agent, actor, obs, zeros > 0, False)
    return float(action[0, 0]), np.mean(costs[-10 * STEPS:]), metrics


@pytest.mark.parametrize("limit", [6.0, pytest.param(11.0, marks=pytest.mark.long)])
def test_the_best_policy_within_the_limit(fast, limit):
    """The critics look past the time limit, so Qc = cost / (1 - gamma) and the bound d (1 - gamma^T) / ((1 - gamma) T)
    allows the cost d (1 - gamma^T) / T per step: the best action is a = 2 cost - 1, short of 0.4."""
    action, cost, metrics = learn(Args(**PROBE, cost_limit=limit))
    allowed = limit / STEPS * (1 - 0.8**STEPS)
    assert action == pytest.approx(2 * allowed - 1, abs=0.08)
    assert cost == pytest.approx(allowed, abs=0.05)
    assert metrics["lagrangian/lambda"] > 0.1 and abs(metrics["lagrangian/violation"]) < 0.1


@pytest.mark.long
def test_without_a_limit_the_best_policy_of_all(fast):
    action, _, metrics = learn(Args(**PROBE, cost_limit=100.0))
    assert action == pytest.approx(0.4, abs=0.08)
    assert metrics["lagrangian/lambda"] == pytest.approx(1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Real runs
# ----------------------------------------------------------------------------------------------------------------------
SCRIPT = ROOT / "baselines" / "cvpo.py"
POINT = ("--num-envs 2 --train-every 500 --action-repeat 25 --updates-per-step 0.5 --hidden 16 --batch-size 8 "
         "--buffer-size 120 --total-timesteps 2500 --eval-every 1000 --eval-episodes 2").split()
TAGS = """charts/episodic_return charts/episodic_cost charts/episodic_length charts/cost_rate charts/SPS charts/balance
eval/episodic_return eval/episodic_cost eval/balance losses/value losses/cost_value losses/policy losses/entropy
losses/critic_grad_norm losses/policy_grad_norm losses/param_norm lagrangian/lambda lagrangian/violation cvpo/dual
cvpo/eta cvpo/kl_weights cvpo/kl_mean cvpo/kl_std cvpo/alpha_mean cvpo/alpha_std critic/read_outside
critic/followed_outside time/env time/act time/update""".split()


@pytest.fixture(scope="session")
def small_run(place):
    return train(place, *POINT, script=SCRIPT)


def test_a_small_run(small_run):
    """The files, tags and summary lines of every script; 10 updates to a block of 500 steps."""
    assert re.fullmatch(r"SafetyPointGoal1-v0__cvpo__1__\d+", small_run.dir.name)
    lines = [line for line in small_run.stdout.splitlines() if SUMMARY.fullmatch(line)]
    assert [line.split(":")[0] for line in lines] == ["step 1,000", "step 2,000", "step 2,500"]
    logged = scalars(small_run.dir)
    assert set(TAGS) <= logged.keys() and all(np.isfinite(value) for values in logged.values() for _, value in values)
    assert {value for tag in ("charts/balance", "eval/balance") for _, value in logged[tag]} == {0.0}
    counters, arrays = checkpoint(small_run.dir)
    assert counters["step"] == 2500 and arrays["['agent'].num_updates"] == 50
    assert np.abs(arrays["['buffer'].rows.action"]).max() <= 1.0
    page = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("cvpo", "spowl_continuous"))
    assert {tag for tag in logged if f"`{tag}`" not in page} == set()


@pytest.mark.long
def test_evaluation_plays_the_same_episodes_again(small_run, place):
    run(place, "--evaluate", small_run.dir, script=SCRIPT)
    again, last = rows_of(small_run.dir / "evaluation.csv"), rows_of(small_run.dir / "episodes.csv")[-2:]
    assert [{column: row[column] for column in last[0]} for row in again] == last
    one_line(command(place, ROOT / "spowl_continuous.py", "--evaluate", small_run.dir), "was made by cvpo.py")


@pytest.mark.long
def test_interrupted_and_resumed_to_the_last_bit(small_run, place):
    """Ctrl-C after the first evaluation: exit status 130 and a checkpoint; it goes on to the same end."""
    runs = place / "cvpo_interrupted"
    words = [sys.executable, "-c", HEED_SIGNALS, sys.executable, str(SCRIPT), "--runs-dir", str(runs), *POINT]
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
    (counters, arrays), (others, expected) = checkpoint(directory), checkpoint(small_run.dir)
    assert {name for name in expected if not np.array_equal(arrays[name], expected[name])} == set()
    assert {**counters, "wall_time": 0} == {**others, "wall_time": 0}
    assert (directory / "episodes.csv").read_text() == (small_run.dir / "episodes.csv").read_text()
