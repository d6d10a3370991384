"""baselines/tdmpc2.py: shared parts give the full agent's numbers, changed ones those of NumPy and of sorting."""
import dataclasses
import inspect
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (certain, leaves_equal, np_heads, np_latent, np_mlp, np_policy, np_read_out, random_agent,
                      small_args)
from hypothesis import given
from hypothesis import strategies as st
from test_losses import ARGS as LOSS_ARGS
from test_losses import ALIVE, B, H, dropout_masks, make_batch
from test_train import POINT, ROOT, SUMMARY, checkpoint, rows_of, run, scalars, train

import spowl_continuous as full
import spowl_plan_only as plan_only
from baselines import tdmpc2

OBS, ACTIONS, N, K = 5, 2, 13, 4
FLAGS = {field.name for field in dataclasses.fields(tdmpc2.Args)}


def args_of(full_args, **changes):
    """The same flags as far as TD-MPC2 has them."""
    return tdmpc2.Args(**{name: value for name, value in vars(full_args).items() if name in FLAGS} | changes)


def without_costs(agent):
    """The full agent's networks that TD-MPC2 has, as its agent."""
    kept = {name: value for name, value in agent._asdict().items() if name in tdmpc2.AgentState._fields}
    pick = lambda layers: {name: value for name, value in layers.items() if name not in ("cost", "qc")}
    return tdmpc2.AgentState(**kept)._replace(model=pick(agent.model), target=pick(agent.target))


@pytest.fixture(scope="module")
def agent():
    return random_agent(small_args(num_bins=11, bin_limit=5.0), OBS, ACTIONS, seed=5)


@pytest.fixture(scope="module")
def z():
    return jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(8), 2).reshape(16), jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Planner
# ----------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(-3, 3).map(float), min_size=N, max_size=N))
def test_elites_are_the_best(returns):
    """Among equals at the cut any choice is right."""
    args = args_of(small_args(), num_samples=N, num_pi_trajs=3, num_elites=K)
    elites, metrics = jax.jit(tdmpc2.select_elites, static_argnums=0)(args, jnp.array(returns, jnp.float32))
    chosen = [value for value, elite in zip(returns, elites) if elite]
    assert sorted(chosen) == sorted(returns)[-K:] and elites.dtype == bool
    assert metrics["planner/elite_return"] == pytest.approx(np.mean(chosen))


def test_scores_against_numpy(agent, z):
    args = args_of(small_args(num_bins=11, bin_limit=5.0, gamma=0.9, horizon=2, plan_horizon=3))
    policy, model = certain(agent.policy), agent.model
    actions = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (3, 6, ACTIONS)), jnp.float32)
    returns = jax.jit(tdmpc2.evaluate_plans, static_argnums=0)(args, model, policy, z, actions, jax.random.key(0))
    expected = []
    for n in range(6):
        latent, total = np.asarray(z, np.float64), 0.0
        for i, action in enumerate(np.asarray(actions[:, n], np.float64)):
            total += 0.9**i * np_read_out(np_mlp(model["reward"], latent, action), 5.0)
            latent = np_latent(args, model["dynamics"], latent, action)
        total += 0.9**3 * np_heads(args, model["q"], latent, np.tanh(np_policy(args, policy, latent)[0])).mean()
        expected.append(total)
    np.testing.assert_allclose(returns, expected, rtol=5e-3, atol=5e-3)


def test_the_plan_finds_the_best_first_action(monkeypatch):
    """Where the return is -(a - 0.3)^2 of the first action, whatever the policy does; with a policy that is better than
    any sample its own sequences are the elites."""
    args = args_of(small_args(), num_samples=64, num_pi_trajs=4, num_elites=8, iterations=6)
    score = lambda args, model, policy, z, actions, key: -jnp.sum((actions[0] - 0.3) ** 2, -1)
    monkeypatch.setattr(tdmpc2, "evaluate_plans", score)
    monkeypatch.setattr(tdmpc2, "policy_rollout", lambda *_: jnp.full((3, 4, ACTIONS), -0.9))
    final, _ = tdmpc2.plan(args, None, None, jnp.zeros(16), jnp.zeros((3, ACTIONS)), jax.random.key(0))
    assert np.abs(final.mean[0] - 0.3).max() < 0.1
    monkeypatch.setattr(tdmpc2, "policy_rollout", lambda *_: jnp.full((3, 8, ACTIONS), 0.3))
    args = dataclasses.replace(args, num_pi_trajs=8)
    final, metrics = tdmpc2.plan(args, None, None, jnp.zeros(16), jnp.zeros((3, ACTIONS)), jax.random.key(1))
    np.testing.assert_allclose(final.mean, 0.3, atol=1e-6)
    assert metrics["planner/elite_return"] == pytest.approx(0.0, abs=1e-6) and np.all(final.std == np.float32(0.05))


def test_a_plan_is_the_full_agents_with_other_elites(agent, z, monkeypatch):
    """Warm start, samples, weights, the drawn action: to the last digits, where both score and choose alike."""
    args = small_args(num_bins=11, bin_limit=5.0)
    both = lambda args, *given: (score := tdmpc2.evaluate_plans(args, *given), 0.0 * score)
    monkeypatch.setattr(full, "evaluate_plans", both)
    monkeypatch.setattr(full, "select_elites", lambda args, returns, costs: tdmpc2.select_elites(args, returns))
    last = jnp.asarray(np.random.default_rng(3).uniform(-0.9, 0.9, (3, ACTIONS)), jnp.float32)
    theirs, ours = (jax.jit(lambda last, key, plan=script.plan, args=args: plan(
        args, agent.model, agent.policy, z, last, key)[0])(last, jax.random.key(4))
        for script, args in ((full, args), (tdmpc2, args_of(args))))
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_it_decides_as_plan_only_does():
    """Whose tests are by numbers: the plan with its noise in training, without in evaluation."""
    assert inspect.getsource(tdmpc2.decide) == inspect.getsource(plan_only.decide)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------
def test_entropy_is_that_of_the_gaussian_before_tanh(agent, z):
    """log N(u; mean, std) summed over action dimensions, u = atanh(a); actions are the full agent's."""
    args, key = args_of(small_args()), jax.random.key(3)
    action, mean, log_density = tdmpc2.policy_sample(args, agent.policy, z, key)
    same, same_mean, _ = full.policy_sample(args, agent.policy, z, jax.random.clone(key))
    assert leaves_equal((action, mean), (same, same_mean))
    mu, log_std = np_policy(args, agent.policy, np.asarray(z, np.float64))
    before = np.arctanh(np.asarray(action, np.float64))
    expected = -0.5 * ((before - mu) / np.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    assert float(log_density) == pytest.approx(expected.sum(), abs=1e-3)


def test_model_loss_and_targets_are_the_full_agents_without_its_cost_terms(agent):
    """To the last digits, gradients of the networks that both have included."""
    batch, next_z, q_target, qc_target = make_batch()
    keep_q, keep_qc = dropout_masks()
    plain = dataclasses.replace(LOSS_ARGS, cost_coef=0.0, cost_value_coef=0.0)
    whole = random_agent(LOSS_ARGS, OBS, ACTIONS, seed=2)
    ours = without_costs(whole)
    loss = jax.jit(jax.value_and_grad(full.world_model_loss, has_aux=True), static_argnums=1)
    (total, (metrics, zs)), grads = loss(whole.model, plain, batch, next_z, q_target, qc_target, keep_q, keep_qc)
    loss = jax.jit(jax.value_and_grad(tdmpc2.world_model_loss, has_aux=True), static_argnums=1)
    (own, (own_metrics, own_zs)), own_grads = loss(ours.model, args_of(plain), batch, next_z, q_target, keep_q)
    assert own == pytest.approx(float(total), rel=1e-5) and float(own) > 0.1
    assert own_metrics.keys() == {f"losses/{name}" for name in ("consistency", "reward", "value", "total")}
    for name, value in own_metrics.items():
        assert value == pytest.approx(float(metrics[name]), rel=1e-5)
    np.testing.assert_allclose(own_zs, zs, atol=1e-6)
    for name in own_grads:
        for one, other in zip(jax.tree.leaves(own_grads[name]), jax.tree.leaves(grads[name])):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    targets = jax.jit(full.td_targets, static_argnums=0)(
        plain, whole.policy, whole.target, batch, next_z, jax.random.key(4))[0]
    own_targets = jax.jit(tdmpc2.td_targets, static_argnums=0)(
        args_of(plain), ours.policy, ours.target, batch, next_z, jax.random.key(4))
    np.testing.assert_allclose(own_targets, targets, atol=1e-5)


def test_policy_loss_by_hand(agent, monkeypatch):
    """mean_t rho^t mean_B(beta A log pi - Q / S) of two heads, S moved by 0.01 towards max(1, the 5-95% range of Q at
    t = 0). Q = q a of a policy a = 1: the gradient is that of -q a / S, S held fixed."""
    q = np.random.default_rng(5).normal(size=(H + 1, B)) * 20
    log_prob = np.random.default_rng(6).normal(size=(H + 1, B))
    mask = np.ones((H + 1, B))
    mask[2:, 1] = 0.0
    asked = []
    monkeypatch.setattr(tdmpc2, "heads", lambda args, layers, z, action: jnp.asarray(q) * action[..., 0]
                        + jnp.array([1.0, -1.0])[:, None, None])
    monkeypatch.setattr(tdmpc2, "random_heads", lambda layers, number, key: asked.append(number))
    monkeypatch.setattr(tdmpc2, "policy_sample", lambda args, policy, z, key: (
        jnp.full((H + 1, B, ACTIONS), policy), None, jnp.asarray(log_prob)))
    args = args_of(LOSS_ARGS, entropy_coef=0.01, rho=0.5, horizon=H)
    (loss, (scale, metrics)), grad = jax.value_and_grad(tdmpc2.policy_loss, has_aux=True)(
        1.0, args, {"q": None}, None, mask, 3.0, jax.random.key(0))
    low, high = np.percentile(q[0], [5, 95])
    expected_scale = 3.0 + 0.01 * (high - low - 3.0)
    each = 0.01 * ACTIONS * log_prob - q / expected_scale
    expected = np.mean([0.5**t * each[t][mask[t] > 0].mean() for t in range(H + 1)])
    assert scale == pytest.approx(expected_scale, rel=1e-5) and loss == pytest.approx(expected, rel=1e-4)
    slope = np.mean([0.5**t * -q[t][mask[t] > 0].mean() / expected_scale for t in range(H + 1)])
    assert grad == pytest.approx(slope, rel=1e-4) and asked == [2]
    assert metrics["losses/entropy"] == pytest.approx(-log_prob[0].mean(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# As a whole
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def updated(monkeypatch):
    """An agent, and what one update makes of it without and with costs: agent, metrics, with the heads and the mask
    that its policy's loss was given, and what its model's loss was: latents that follow, targets, dropout masks."""
    args, loss, batch = args_of(LOSS_ARGS, batch_size=B, tau=0.07), tdmpc2.policy_loss, make_batch()[0]

    def spy(policy, args, model, zs, mask, *rest):
        value, (scale, metrics) = loss(policy, args, model, zs, mask, *rest)
        return value, (scale, metrics | {"spy": (model["q"], mask)})

    def spy_model(*given, original=tdmpc2.world_model_loss):
        value, (metrics, zs) = original(*given)
        return value, (metrics | {"spy model": given[3:]}, zs)

    monkeypatch.setattr(tdmpc2, "policy_loss", spy)
    monkeypatch.setattr(tdmpc2, "world_model_loss", spy_model)
    agent = without_costs(random_agent(LOSS_ARGS, OBS, ACTIONS, seed=2))._replace(scale=jnp.float32(3.0))
    agent = agent._replace(model_opt=tdmpc2.model_optimizer(args).init(agent.model))
    update = jax.jit(tdmpc2.update, static_argnums=0)
    return agent, *(update(args, agent, batch._replace(cost=jnp.full_like(batch.cost, cost)), jax.random.key(1))
                    for cost in (0.0, 5.0))


def test_one_update(updated):
    """Targets are those of the target heads at what follows; the policy is trained against the new heads on what is
    valid; targets, S and the counter move; costs change nothing, to the last bit."""
    agent, (after, metrics), (same, _) = updated
    assert leaves_equal(after, same) and not leaves_equal(after.policy, agent.policy)
    seen, mask = metrics["spy"]
    assert leaves_equal(seen, after.model["q"]) and not leaves_equal(seen, agent.model["q"])
    np.testing.assert_array_equal(mask, ALIVE)
    args, batch, (next_z, targets, keep) = args_of(LOSS_ARGS), make_batch()[0], metrics["spy model"]
    np.testing.assert_allclose(next_z, np_latent(args, agent.model["encoder"], np.asarray(batch.next_obs)), atol=1e-5)
    key = jax.random.split(jax.random.key(1), 3)[0]
    expected = tdmpc2.td_targets(args, agent.policy, agent.target, batch, next_z, key)
    np.testing.assert_allclose(targets, expected, atol=1e-3)
    assert len(np.unique(keep)) == 2
    for old, online, new in zip(*map(jax.tree.leaves, (agent.target["q"], seen, after.target["q"])), strict=True):
        np.testing.assert_allclose(new, 0.93 * np.asarray(old) + 0.07 * np.asarray(online), atol=1e-6)
    assert after.scale == metrics["losses/q_scale"] != 3.0 and int(after.num_updates) == 1


def test_networks_at_the_start():
    """§3: reward and Q read 0, and the target is a copy."""
    fresh = jax.jit(tdmpc2.init_agent, static_argnums=(0, 2, 3))(args_of(LOSS_ARGS), jax.random.key(0), OBS, ACTIONS)
    assert not np.any(fresh.model["reward"][-1]["w"]) and not np.any(fresh.model["q"][-1]["w"])
    assert leaves_equal(fresh.target["q"], fresh.model["q"]) and np.any(fresh.policy[-1]["w"])


def test_nothing_of_costs_is_left():
    """No network, no flag, no state; the laptop preset is the full agent's but for what is not there."""
    args = args_of(small_args())
    shapes = jax.eval_shape(partial(tdmpc2.init_agent, args, obs_dim=OBS, action_dim=ACTIONS), jax.random.key(0))
    assert shapes.model.keys() == {"encoder", "dynamics", "reward", "q"} and shapes.target.keys() == {"q"}
    about_costs = re.compile("cost|lagrang|lambda|mu_|multiplier|penalty")
    assert not [name for name in (*FLAGS, *shapes._fields) if about_costs.search(name)]
    ours, theirs = tdmpc2.PRESETS["laptop"], full.PRESETS["laptop"]
    assert ours == {name: value for name, value in theirs.items() if name in FLAGS}
    defaults = {name: value for name, value in vars(full.Args()).items() if name in FLAGS}
    assert defaults | {"exp_name": "tdmpc2"} == vars(tdmpc2.Args())
    assert tdmpc2.critic_metrics(args, None, []) == {}


@pytest.fixture(scope="module")
def made(place):
    pairs = [(flag, value) for flag, value in zip(POINT[::2], POINT[1::2]) if flag[2:].replace("-", "_") in FLAGS]
    return train(place, *(word for pair in pairs for word in pair), script=ROOT / "baselines" / "tdmpc2.py")


def test_a_small_run(made):
    """The same files and lines as the full agent's."""
    assert re.fullmatch(r"SafetyPointGoal1-v0__tdmpc2__1__\d+", made.dir.name)
    lines = [line for line in made.stdout.splitlines() if SUMMARY.fullmatch(line)]
    assert [line.split(":")[0] for line in lines] == ["step 1,000", "step 2,000", "step 2,500"]
    logged = scalars(made.dir)
    assert {"losses/consistency", "planner/elite_return", "eval/episodic_cost", "charts/cost_rate"} <= logged.keys()
    assert not [tag for tag in logged if re.search("lagrangian|critic|losses/cost|threshold|improv", tag)]
    assert {value for tag in ("charts/balance", "eval/balance") for _, value in logged[tag]} == {1.0}


@pytest.mark.long
def test_a_small_run_goes_on(place, made):
    """--evaluate plays the same episodes again, --resume goes on."""
    run(place, "--evaluate", made.dir, script=ROOT / "baselines" / "tdmpc2.py")
    again, last = rows_of(made.dir / "evaluation.csv"), rows_of(made.dir / "episodes.csv")[-2:]
    assert [{column: row[column] for column in last[0]} for row in again] == last
    run(place, "--resume", made.dir, "--total-timesteps", 3000, script=ROOT / "baselines" / "tdmpc2.py")
    assert checkpoint(made.dir)[0]["step"] == 3000
