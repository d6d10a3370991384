"""CPO: the step's pieces (curvature, conjugate gradients, the dual, the line search) against NumPy and brute force, the
step and the update as wholes, an environment whose best policy under a cost limit is known, real runs."""
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from test_ppo_lagrangian import (ACTIONS, E, FLAGS, OBS, PROBE, SMALL, T, buffer_of, check_evaluated,
                                 check_every_update_draws_anew, check_resumed, check_run, copy, np_mlp, np_tally,
                                 practise, random_agent, random_rows, trained)
from test_train import ROOT

from baselines import cpo
from baselines.cpo import Args, parse_args

SMALL = SMALL | dict(target_kl=0.01, epochs=2)


def small_args(**changes):
    return Args(**(SMALL | changes))


ARGS = small_args()
agent_of = partial(random_agent, cpo, ARGS)


def one_batch(seed=7, size=40):
    """An agent, and a batch whose actions its policy has drawn, with advantages to learn from."""
    agent, rng = agent_of(), np.random.default_rng(seed)
    policy = agent.networks["policy"]
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    obs = f32(size, OBS)
    action = cpo.mlp(policy["mean"], obs) + jnp.exp(policy["log_std"]) * f32(size, ACTIONS)
    advantage, cost_advantage = f32(size), f32(size)
    return agent, cpo.Batch(obs, action, cpo.log_prob(policy, obs, action), advantage - advantage.mean(),
                            cost_advantage - cost_advantage.mean(), f32(size), f32(size))


def old_of(policy, batch):
    """The Gaussian that acted: mean (N, A), log_std (A,)."""
    return cpo.mlp(policy["mean"], batch.obs), policy["log_std"]


# ----------------------------------------------------------------------------------------------------------------------
# Surrogate, divergence, curvature
# ----------------------------------------------------------------------------------------------------------------------
def test_surrogate_is_not_clipped():
    """Ratios 3, 1/2 and 1 under advantages 1, -2, 5: (3 - 1 + 5) / 3; its gradient at ratio 1 is mean A grad log pi."""
    agent, batch = one_batch(size=3)
    policy = agent.networks["policy"]
    shifted = batch._replace(log_prob=batch.log_prob - np.log([3.0, 0.5, 1.0]).astype(np.float32))
    assert float(cpo.surrogate(policy, shifted, jnp.array([1.0, -2.0, 5.0]))) == pytest.approx(7.0 / 3.0, rel=1e-4)
    grad = gradient(policy, batch, batch.advantage)["log_std"]
    mean, std = np_mlp(policy["mean"], np.asarray(batch.obs)), np.exp(np.asarray(policy["log_std"]))
    slopes = (np.asarray(batch.action) - mean) ** 2 / std**2 - 1.0  # d log N / d log std
    np.testing.assert_allclose(grad, np.mean(np.asarray(batch.advantage)[:, None] * slopes, 0), rtol=1e-3)


def test_divergence_is_a_mean_over_action_dimensions_too():
    """By numerical integration, over states and over dimensions."""
    agent, batch = one_batch(size=3)
    policy, rng = agent.networks["policy"], np.random.default_rng(0)
    mean, std = np_mlp(policy["mean"], np.asarray(batch.obs)), np.exp(np.asarray(policy["log_std"], np.float64))
    old_mean, old_std = mean + rng.normal(size=mean.shape), std * np.exp(rng.normal(size=ACTIONS))

    def integral(n, a):
        old, new = scipy.stats.norm(old_mean[n, a], old_std[a]), scipy.stats.norm(mean[n, a], std[a])
        inside = lambda x: old.pdf(x) * (old.logpdf(x) - new.logpdf(x))
        return scipy.integrate.quad(inside, old.mean() - 10 * old.std(), old.mean() + 10 * old.std(), limit=200)[0]

    expected = np.mean([integral(*index) for index in np.ndindex(3, ACTIONS)])
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    got = cpo.divergence(policy, f32(old_mean), f32(np.log(old_std)), batch.obs)
    assert float(got) == pytest.approx(expected, rel=1e-3) and expected > 0.3


@jax.jit
def hessian(policy, batch):
    """The whole second derivative of the divergence at the policy that acted, (P, P)."""
    flat, tree = ravel_pytree(policy)
    return jax.hessian(lambda x: cpo.divergence(tree(x), *old_of(policy, batch), batch.obs))(flat)


def test_products_with_the_curvature():
    """`curvature` times three directions is the full Hessian times them, plus damping times the direction. Its block of
    log std is 2 / A, its rank at most N A + A."""
    agent, batch = one_batch(size=4)
    policy = agent.networks["policy"]
    flat, tree = ravel_pytree(policy)
    full = np.asarray(hessian(policy, batch), np.float64)
    product = jax.jit(lambda v: cpo.curvature(small_args(damping=0.3), policy, old_of(policy, batch), batch.obs)(v))
    for seed in range(3):
        v = np.random.default_rng(seed).normal(size=flat.size).astype(np.float32)
        found = ravel_pytree(product(tree(jnp.asarray(v))))[0]
        np.testing.assert_allclose(found, full @ v + 0.3 * v, rtol=1e-3, atol=1e-4)
    block = np.asarray(ravel_pytree(policy | {"log_std": jnp.ones(ACTIONS), "mean": jax.tree.map(
        jnp.zeros_like, policy["mean"])})[0]) > 0
    np.testing.assert_allclose(full[np.ix_(block, block)], np.eye(ACTIONS) * 2.0 / ACTIONS, atol=1e-4)
    assert np.linalg.eigvalsh(full).min() > -1e-4 and np.linalg.matrix_rank(full, tol=1e-3) <= 4 * ACTIONS + ACTIONS


# ----------------------------------------------------------------------------------------------------------------------
# Conjugate gradients
# ----------------------------------------------------------------------------------------------------------------------
def positive(size, seed, spread=2.0):
    """A symmetric matrix with eigenvalues from 1 to e^spread."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (axes * np.exp(np.linspace(0.0, spread, size))) @ axes.T


@pytest.mark.parametrize("size", [1, 4, 15])
def test_conjugate_gradients_against_a_solver(size):
    """As many steps as there are dimensions solve it; a tree of two parts is one vector."""
    matrix, b = positive(size + 2, size), np.random.default_rng(size).normal(size=size + 2) * 100
    cut = lambda x: {"one": jnp.asarray(x[:2], jnp.float32), "other": jnp.asarray(x[2:].reshape(1, -1), jnp.float32)}
    join = lambda tree: jnp.concatenate([tree["one"], tree["other"][0]])
    x = cpo.conjugate_gradient(small_args(cg_iterations=size + 2), lambda v: cut(jnp.float32(matrix) @ join(v)), cut(b))
    np.testing.assert_allclose(join(x), np.linalg.solve(matrix, b), rtol=2e-3, atol=2e-3 * np.abs(b).max())


def test_conjugate_gradients_by_hand():
    """H = diag(1, 3), b = (4, 4): the first step is 32 / 64 b = (2, 2), the second reaches (4, 4/3). From no gradient
    comes nothing, and no NaN. A right-hand side that is solved in one step stays solved."""
    product = lambda v: jnp.array([1.0, 3.0]) * v
    solve = lambda count, b: np.asarray(cpo.conjugate_gradient(small_args(cg_iterations=count), product, jnp.array(b)))
    np.testing.assert_allclose(solve(1, [4.0, 4.0]), [2.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose(solve(2, [4.0, 4.0]), [4.0, 4.0 / 3.0], rtol=1e-5)
    np.testing.assert_array_equal(solve(5, [0.0, 0.0]), [0.0, 0.0])
    np.testing.assert_allclose(solve(15, [0.0, 6.0]), [0.0, 2.0], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The dual
# ----------------------------------------------------------------------------------------------------------------------
dual = jax.jit(cpo.dual, static_argnums=0)


def solved(h, g, b, c, delta):
    """The step that `dual` gives for those (D, D), (D,), (D,) and numbers -> case, nu, step."""
    x, p = np.linalg.solve(h, g), np.linalg.solve(h, b)
    case, nu, along_x, along_p = map(float, dual(small_args(target_kl=delta), g @ x, g @ p, b @ p, c, b @ b))
    return int(case), nu, along_x * x + along_p * p


def best_by_search(h, g, b, c, delta):
    """The largest g d over a fine grid of the plane's steps d with c + b d <= 0 and d H d / 2 <= delta."""
    root = np.linalg.inv(np.linalg.cholesky(h)).T * math.sqrt(2 * delta)  # maps the unit disc on the trust region
    angle, radius = np.meshgrid(np.linspace(0, 2 * math.pi, 1441), np.linspace(0, 1, 201))
    steps = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2) @ root.T
    kept = steps[c + steps @ b <= 1e-12]
    return (kept @ g).max()


numbers = st.floats(-2.0, 2.0).map(lambda x: round(x, 2))


@given(st.integers(0, 2**20), numbers, numbers, numbers, numbers, st.floats(-1.5, 1.5))
def test_the_step_against_a_search_of_the_plane(seed, g0, g1, b0, b1, share):
    """In all cases: within the trust region and, where a step can be, under the limit; as good as the best step found.
    Where none can be under the limit, it is the one of lowest cost. c is a share of what a step can change b d by."""
    g, b, delta, h = np.array([g0, g1]), np.array([b0, b1]), 0.02, positive(2, seed)
    assume(min(map(np.linalg.norm, (g, b))) >= 0.05 and abs(abs(share) - 1) >= 0.02 and abs(share) >= 0.01)
    reach = math.sqrt(2 * delta * (b @ np.linalg.solve(h, b)))
    c = share * reach
    case, nu, step = solved(h, g, b, c, delta)
    assert case == (3 if share < -1 else 2 if share < 0 else 1 if share < 1 else 0) and nu >= 0
    assert 0.5 * step @ h @ step <= delta * 1.001
    if share > 1:
        assert b @ step == pytest.approx(-reach, rel=1e-3)
        return
    assert c + b @ step <= 2e-3 * reach
    size = math.sqrt(2 * delta * (g @ np.linalg.solve(h, g)))
    assert g @ step == pytest.approx(best_by_search(h, g, b, c, delta), abs=0.03 * size)


@given(st.integers(0, 2**20), st.integers(1, 6), st.floats(-0.95, 0.95))
def test_the_multipliers_against_a_minimisation(seed, size, share):
    """More dimensions: g d equals the dual function's minimum over a grid of lambda, nu in closed form for each
    (D = (q - 2 nu r + nu^2 s) / (2 lambda) + lambda delta - nu c, convex in nu), to which the step's nu belongs."""
    rng = np.random.default_rng(seed)
    g, b, delta, h = rng.normal(size=size), rng.normal(size=size), 0.01, positive(size, seed)
    x, p = np.linalg.solve(h, g), np.linalg.solve(h, b)
    q, r, s = g @ x, g @ p, b @ p
    reach = math.sqrt(2 * delta * s)
    c = share * reach
    assume(abs(share) >= 0.02)
    case, nu, step = solved(h, g, b, c, delta)
    each = np.geomspace(1e-4, 1e4, 200_001) * math.sqrt(q / (2 * delta))  # of lambda
    nus = np.maximum(0.0, (each * c + r) / s)
    values = (q - 2 * nus * r + nus**2 * s) / (2 * each) + each * delta - nus * c
    lowest = values.argmin()
    assert case == (2 if share < 0 else 1)
    assert g @ step == pytest.approx(values[lowest], abs=2e-3 * math.sqrt(2 * delta * q))
    if nus[lowest] * s > 1e-3 * math.sqrt(q * s):
        assert c + b @ step == pytest.approx(0.0, abs=2e-4 * reach) and (size == 1 or nu == pytest.approx(
            nus[lowest], rel=0.02, abs=1e-3 * math.sqrt(q / s)))


@pytest.mark.parametrize("case, c, b, step", [
    (4, -1.0, [0.0, 5e-4], [0.2, 0.0]),     # no cost gradient to speak of: the plain step along g
    (3, -0.3, [0.0, 1.0], [0.2, 0.0]),      # no step of length 0.2 costs 0.3
    (2, -0.1, [1.0, 0.0], [0.1, 0.0]),      # the plain step would cost 0.2: stopped half-way, the rest is across
    (2, -0.1, [-1.0, 0.0], [0.2, 0.0]),     # the plain step lowers the cost
    (1, 0.1, [1.0, 0.0], [-0.1, 0.0]),      # a tenth of cost has to go: along -g as far as that needs
    (1, 0.1, [-1.0, 0.0], [0.2, 0.0]),      # the plain step already does it
    (1, 0.12, [0.0, 1.0], [0.16, -0.12]),   # 3-4-5: down by 0.12, the rest of the trust region along g
    (2, -0.12, [0.8, 0.6], [0.0, 0.2]),     # see below
    (0, 0.3, [0.0, 1.0], [0.0, -0.2]),      # out of reach: as much as can be
])
def test_the_five_cases_by_hand(case, c, b, step):
    """H = 1, g = (2, 0), delta = 0.02, so steps have length 0.2 at most."""
    if b == [0.8, 0.6]:  # on the line 0.8 x + 0.6 y = 0.12 the largest x within 0.2: x = 0.192, y = -0.056
        step = [0.192, -0.056]
    found, nu, d = solved(np.eye(2), np.array([2.0, 0.0]), np.array(b), c, 0.02)
    assert found == case and nu >= 0
    if abs(b[0]) == 1.0 and step[0] not in (0.2,):  # g and b are parallel: what is across them has no direction
        np.testing.assert_allclose(d[0], step[0], atol=1e-3)
        assert d @ d <= 0.04 * 1.001
    else:
        np.testing.assert_allclose(d, step, atol=1e-3)


@pytest.mark.parametrize("q, r, s, c", [(0, 0, 0, -25), (0, 0, 0, 25), (0, 0, 0, 0), (1, 1, 1, 0), (1, -1, 1, 0),
                                        (1, 1, 1, -1e-9), (1e-12, 0, 1e-12, 1e-9), (4, 0, 0, 0), (0, 0, 3, 1)])
def test_no_division_is_by_zero(q, r, s, c):
    assert all(np.isfinite(float(x)) for x in dual(ARGS, *map(jnp.float32, (q, r, s, c, s))))


@pytest.mark.parametrize("scale, cost, length, expected", [
    ("episode", 30.0, 500.0, 5.0), ("step", 30.0, 500.0, 0.01), ("episode", math.nan, math.nan, -25.0),
    ("step", math.nan, math.nan, -25.0)])
def test_the_excess_and_its_unit(scale, cost, length, expected):
    """J_c - 25, per episode or per agent step; before any episode has ended nothing has cost anything."""
    args = small_args(cost_limit=25.0, constraint_scale=scale)
    assert float(cpo.excess(args, jnp.float32(cost), jnp.float32(length))) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Line search
# ----------------------------------------------------------------------------------------------------------------------
def judged(monkeypatch, kl, gain, rise, case, c, **flags):
    """What `judge` says where a new policy has that divergence, and raises the two surrogates so."""
    monkeypatch.setattr(cpo, "divergence", lambda *_: kl)
    batch = cpo.Batch(None, None, None, jnp.full(3, 2.0), jnp.full(3, 3.0), None, None)
    monkeypatch.setattr(cpo, "surrogate", lambda policy, batch, advantage: jnp.float32(
        2.0 + gain if advantage is batch.advantage else 3.0 + rise))
    return cpo.judge(small_args(**flags), None, (None, None), batch, case, c)


@pytest.mark.parametrize("kl, gain, rise, case, c, accepted", [
    (0.01, 0.1, 0.0, 2, -1.0, True), (0.0101, 0.1, 0.0, 2, -1.0, False),      # the trust region
    (0.0, 0.1, 0.99, 3, -1.0, True), (0.0, 0.1, 1.01, 3, -1.0, False),        # room for cost
    (0.0, 0.1, -0.01, 1, 0.5, True), (0.0, 0.1, 0.01, 1, 0.5, False),         # none above the limit
    (0.0, 0.1, 0.01, 0, 0.5, False),
    (0.0, -0.01, -1.0, 4, -1.0, False), (0.0, -0.01, -1.0, 3, -1.0, False), (0.0, -0.01, -1.0, 2, -1.0, False),
    (0.0, -0.01, -1.0, 1, 0.5, True), (0.0, -9.0, -1.0, 0, 0.5, True),        # reward may fall to meet the limit
    (math.nan, 0.1, 0.0, 2, -1.0, False), (0.0, math.nan, 0.0, 2, -1.0, False), (0.0, 0.1, math.nan, 2, -1.0, False),
])
def test_what_a_step_has_to_be(monkeypatch, kl, gain, rise, case, c, accepted):
    """KL <= 0.01, cost surrogate up by max(-c, 0) at most, reward surrogate not down in cases 2 to 4; nothing else."""
    got, metrics = judged(monkeypatch, kl, gain, rise, case, c)
    assert bool(got) == accepted
    assert [metrics[f"losses/{name}"] for name in ("kl", "policy", "cost_policy")] == pytest.approx(
        [kl, -gain, rise], nan_ok=True)


@pytest.mark.parametrize("largest, tries, share", [(1.0, 20, 1.0), (0.99, 20, 0.8), (0.8**4 + 1e-3, 20, 0.8**4),
                                                  (0.8**4 - 1e-3, 20, 0.8**5), (0.8**2, 3, 0.8**2), (0.5, 3, 0.0)])
def test_the_longest_acceptable_step_is_taken(monkeypatch, largest, tries, share):
    """From policy 10 along 2; a step is acceptable up to that share of it. If none of the tries is, nothing changes."""
    judge = lambda args, new, *_: (new["x"] <= 10.0 + 2.0 * largest + 1e-4, {"new": new["x"]})
    monkeypatch.setattr(cpo, "judge", judge)
    policy, metrics = cpo.line_search(small_args(line_search_tries=tries), {"x": jnp.float32(10.0)},
                                      {"x": jnp.float32(2.0)}, None, None, 2, -1.0)
    assert float(policy["x"]) == pytest.approx(10.0 + 2.0 * share, rel=1e-6)
    assert float(metrics["losses/step"]) == pytest.approx(share, rel=1e-6) and metrics["new"] == policy["x"]


# ----------------------------------------------------------------------------------------------------------------------
# The step, the update
# ----------------------------------------------------------------------------------------------------------------------
policy_step, gradient = jax.jit(cpo.policy_step, static_argnums=0), jax.jit(jax.grad(cpo.surrogate))


@pytest.mark.parametrize("c", [-25.0, -0.05, 0.02, 25.0])
def test_a_step_against_linear_algebra(c):
    """The step from the whole Hessian and a solver, for cases 3, 2, 1, 0, along which the search shortens; the new
    policy's KL is within delta, and the metrics are those of the new policy."""
    args = small_args(cg_iterations=100)
    agent, batch = one_batch()
    policy = agent.networks["policy"]
    new, metrics = policy_step(args, policy, batch, jnp.float32(c))
    flat, _ = ravel_pytree(policy)
    moved = np.asarray(ravel_pytree(new)[0] - flat, np.float64)
    h = np.asarray(hessian(policy, batch), np.float64) + 0.1 * np.eye(flat.size)
    g, b = (np.asarray(ravel_pytree(gradient(policy, batch, advantage))[0], np.float64)
            for advantage in (batch.advantage, batch.cost_advantage))
    case, nu, step = solved(h, g, b, c, 0.01)
    assert case == {-25.0: 3, -0.05: 2, 0.02: 1, 25.0: 0}[c] == int(metrics["lagrangian/case"])
    assert float(metrics["lagrangian/nu"]) == pytest.approx(nu, rel=0.02, abs=1e-3)
    share = float(metrics["losses/step"])
    assert 0.5 < share <= 1.0
    np.testing.assert_allclose(moved, share * step, atol=0.02 * np.abs(step).max())
    kl = float(cpo.divergence(new, *old_of(policy, batch), batch.obs))
    assert kl == pytest.approx(float(metrics["losses/kl"]), rel=1e-4) and 0.001 < kl <= 0.01
    gain, rise = (float(cpo.surrogate(new, batch, advantage)) for advantage in (batch.advantage, batch.cost_advantage))
    assert [float(metrics[f"losses/{name}"]) for name in ("policy", "cost_policy")] == pytest.approx(
        [-gain, rise], abs=1e-5)
    assert (gain > 0 or case < 2) and rise <= max(-c, 0.0)


def test_an_update_does_all_of_it_in_order():
    """Costs and lengths of episodes, c in the unit of a step, the policy's step, then the critics' passes."""
    args = small_args(constraint_scale="step", cost_limit=1.0)
    agent, rows = agent_of(), random_rows(2, ends=0.4)
    after, metrics = jax.jit(cpo.update, static_argnums=0)(args, agent, rows, jax.random.key(4))
    _, costs = np_tally([np.asarray(rows.cost)], [np.asarray(rows.done)], 4)
    steps, lengths = np_tally([np.ones((T, E))], [np.asarray(rows.done)], 4)
    np.testing.assert_array_equal(after.finished, costs)
    np.testing.assert_array_equal(after.lengths, lengths)
    np.testing.assert_array_equal(after.steps, steps)
    c = (np.nanmean(costs) - 1.0) / np.nanmean(lengths)
    assert float(metrics["lagrangian/violation"]) == pytest.approx(c, rel=1e-5) and c != 0.0
    assert float(metrics["lagrangian/cost"]) == pytest.approx(np.nanmean(costs), rel=1e-6)
    batch = cpo.prepare(args, agent.networks, agent.stats, rows)
    policy, told = policy_step(args, agent.networks["policy"], batch, jnp.float32(c))
    close = lambda one, other: all(np.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(
        *map(jax.tree.leaves, (one, other)), strict=True))
    assert close(after.networks["policy"], policy) and not close(policy, agent.networks["policy"])
    assert set(told) <= set(metrics) and int(after.num_updates) == 1 and after.stats.count == 50 + E * T
    critics, states = {name: agent.networks[name] for name in ("value", "cost_value")}, dict(agent.optimizers)
    losses = lambda critics, minibatch: sum(
        jnp.mean((cpo.value(critics[name], minibatch[0]) - minibatch[column]) ** 2)
        + 0.001 * sum(jnp.sum(x**2) for x in jax.tree.leaves(critics[name]))
        for name, column in (("value", 5), ("cost_value", 6)))

    @jax.jit
    def step(critics, states, minibatch):
        steps, grads = {}, jax.grad(losses)(critics, minibatch)
        for name in critics:
            steps[name], states[name] = cpo.optimizer(args).update(grads[name], states[name])
        return jax.tree.map(jnp.add, critics, steps), states

    for key in jax.random.split(jax.random.key(4), args.epochs):
        values = []  # of the last pass
        for minibatch in zip(*cpo.minibatches(args, batch, key)):
            values.append(float(cpo.critic_loss(critics["value"], args, minibatch[0], minibatch[5])))
            critics, states = step(critics, states, minibatch)
    assert float(metrics["losses/value"]) == pytest.approx(np.mean(values), rel=1e-4)
    assert close({name: after.networks[name] for name in critics}, critics) and close(after.optimizers, states)


def test_without_a_finished_episode_numbers_are_finite():
    agent = agent_of()
    after, metrics = cpo.update_many(ARGS, copy(agent), buffer_of(cpo, ARGS, random_rows(2, ends=0.0)), 1)
    assert all(math.isfinite(float(value)) for value in metrics.values()) and np.isnan(after.finished).all()
    assert metrics["lagrangian/cost"] == 0.0 and metrics["lagrangian/case"] == 3.0


def test_another_update_is_compiled_no_more():
    args = small_args(cost_window=5)
    agent, rows = cpo.init_agent(args, jax.random.key(0), OBS, ACTIONS), random_rows(3)
    count = cpo.update_many._cache_size()
    for _ in range(3):
        agent, _ = cpo.update_many(args, agent, buffer_of(cpo, args, rows), 1)
    assert cpo.update_many._cache_size() == count + 1 and int(agent.num_updates) == 3


def test_every_update_draws_anew(monkeypatch):
    check_every_update_draws_anew(cpo, ARGS, agent_of(), monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# An environment whose best policy is known
# ----------------------------------------------------------------------------------------------------------------------
PRACTISE = Args(**PROBE, total_timesteps=800 * 60, cost_limit=60.0, constraint_scale="step")


def test_the_best_under_a_limit_is_found(fast):
    """x = 0.2 at a cost of 60, with the constraint in the unit of its gradient."""
    x, _, metrics = practise(cpo, PRACTISE, 60)
    assert np.abs(x.mean(0) - 0.2).max() < 0.1, x
    assert 55.0 < float(metrics["lagrangian/cost"]) < 65.0


@pytest.mark.long
def test_the_unconstrained_optimum_is_found(fast):
    """A limit that is not reached."""
    x, _, metrics = practise(cpo, PRACTISE, 60, price=1.0)
    assert np.abs(x.mean(0) - 0.8).max() < 0.1, x
    assert 16.0 < float(metrics["lagrangian/cost"]) < 20.0


@pytest.mark.long
def test_a_policy_above_the_limit_comes_down(fast):
    """With the constraint in units of an episode, as a switch between reward and cost, it hovers about the limit."""
    args = dataclasses.replace(PRACTISE, constraint_scale="episode")
    x, _, metrics = practise(cpo, args, 60)
    assert np.abs(x.mean(0) - 0.2).max() < 0.15, x
    assert 50.0 < float(metrics["lagrangian/cost"]) < 70.0


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------
def test_defaults():
    """Those of OmniSafe and SafePO, with the length and the limit of SPOWL's Table 1; no multiplier's flags."""
    expected = dict(num_envs=20, action_repeat=1, train_every=20_000, total_timesteps=5_000_000, cost_limit=25.0,
                    cost_window=100, hidden=64, gamma=0.99, cost_gamma=0.99, gae_lambda=0.95, epochs=10, batch_size=128,
                    target_kl=0.01, damping=0.1, cg_iterations=15, line_search_factor=0.8, line_search_tries=20,
                    learning_rate=1e-3, grad_clip=40.0, critic_l2=0.001, constraint_scale="episode", exp_name="cpo")
    args = dataclasses.asdict(parse_args([]))
    assert {name: args[name] for name in expected} == expected
    assert not {name for name in args if name.startswith(("lambda", "pid", "multiplier", "clip"))}


@pytest.mark.parametrize("words, told", [
    ("--damping -1", "--damping must be at least 0"), ("--cg-iterations 0", "--cg-iterations must be at least 1"),
    ("--line-search-factor 0", "--line-search-factor must be positive and at most 1"),
    ("--line-search-factor 1.5", "--line-search-factor must be positive and at most 1"),
    ("--line-search-tries 0", "--line-search-tries must be at least 1"),
    ("--target-kl 0", "--target-kl must be positive"),
    ("--learning-starts 20000", "--learning-starts must be 0: the policy learns from its own actions alone"),
])
def test_flags_that_cannot_be(words, told):
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    assert stop.value.code.startswith(told) and "\n" not in stop.value.code


@pytest.mark.parametrize("words", ["--constraint-scale rollout", "--clip 0.1", "--multiplier pid"])
def test_words_that_cannot_be_read(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    assert stop.value.code == 2 and words.split()[0] in capsys.readouterr().err


SCRIPT = ROOT / "baselines" / "cpo.py"


@pytest.fixture(scope="module")
def straight(place):
    return trained(place, SCRIPT, *FLAGS)


def test_a_real_run(straight):
    check_run(*straight, ["losses/step", "losses/cost_policy", "lagrangian/case", "lagrangian/nu"])


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_end(place, straight):
    check_resumed(place, SCRIPT, straight[0])


@pytest.mark.long
def test_a_run_is_evaluated_again(place, straight):
    check_evaluated(place, SCRIPT, straight[0])
