"""METHOD §5: the score of a sequence (Eq. 11), the choice of elites (Algorithm 1), the refinement of the plan."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import certain, np_heads, np_latent, np_mlp, np_policy, np_read_out, np_softmax, random_agent, small_args
from hypothesis import given, settings
from hypothesis import strategies as st

import spowl_continuous as spowl
from spowl_continuous import evaluate_plans, plan, policy_rollout, select_elites

OBS, ACTIONS, H = 5, 2, 3
ARGS = small_args(horizon=H, gamma=0.9, cost_gamma=0.8, num_q=3, num_qc=4, num_c=3, num_bins=11, bin_limit=5.0)


@pytest.fixture(scope="module")
def agent():
    agent = random_agent(ARGS, OBS, ACTIONS, seed=5)
    return agent._replace(policy=certain(agent.policy))


@pytest.fixture(scope="module")
def z():
    return jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(8), 2).reshape(16), jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------
def np_scores(args, agent, z, actions):
    """Eq. 11 for one sequence (H, A), step by step, at the policy's mean action in the end -> J, J_c."""
    z, total, total_cost = np.asarray(z, np.float64), 0.0, 0.0
    for i, action in enumerate(np.asarray(actions, np.float64)):
        heads = np_heads(args, agent.model["cost"], z, action)
        total += 0.9**i * np_read_out(np_mlp(agent.model["reward"], z, action), args.bin_limit)
        total_cost += 0.8**i * (heads.max() if args.plan_cost_agg == "max" else heads.mean())
        z = np_latent(args, agent.model["dynamics"], z, action)
    action = np.tanh(np_policy(args, agent.policy, z)[0])
    total += 0.9 ** len(actions) * np_heads(args, agent.model["q"], z, action).mean()
    total_cost += 0.8 ** len(actions) * np_heads(args, agent.model["qc"], z, action).mean()
    return total, total_cost


@pytest.mark.parametrize("agg, horizon, depth", [("max", 3, 3), ("mean", 3, 2), ("max", 2, 4), ("max", 1, 1)])
def test_scores_against_numpy(agent, z, agg, horizon, depth):
    """Eq. 11: discounted rewards, discounted maximum (or mean) of the cost heads, then the mean of all online heads,
    discounted by the plan's own length."""
    args = dataclasses.replace(ARGS, plan_cost_agg=agg, horizon=horizon, plan_horizon=depth)
    actions = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (depth, 4, ACTIONS)), jnp.float32)
    score = jax.jit(evaluate_plans, static_argnums=0)
    returns, costs = score(args, agent.model, agent.policy, z, actions, jax.random.key(0))
    assert returns.shape == costs.shape == (4,)
    expected = np.array([np_scores(args, agent, z, actions[:, n]) for n in range(4)])
    np.testing.assert_allclose(np.stack([returns, costs], -1), expected, rtol=5e-3, atol=5e-3)
    assert expected.std(0).min() > 0.05


def test_last_action_is_sampled(agent, z):
    """§5: pi(z_H) is sampled: with a loose policy the scores differ with the key, the step terms do not."""
    actions, loose = jnp.zeros((H, 3, ACTIONS)), certain(agent.policy, raw=0.9)
    score = jax.jit(evaluate_plans, static_argnums=0)
    scores = [np.stack(score(ARGS, agent.model, loose, z, actions, jax.random.key(k))) for k in (0, 1)]
    assert np.all(np.abs(scores[0] - scores[1]) > 1e-4)
    assert np.abs(scores[0][:, 0] - scores[0][:, 1]).min() > 1e-4  # and from sequence to sequence
    silent = agent.model | {name: jax.tree.map(jnp.zeros_like, agent.model[name]) for name in ("q", "qc")}
    scores = [np.stack(score(ARGS, silent, loose, z, actions, jax.random.key(k))) for k in (0, 1)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_policy_rollout(agent, z):
    """§5: A_pi follows the policy through the latent dynamics, each sequence with its own noise."""
    roll = jax.jit(policy_rollout, static_argnums=0)
    actions, latent = roll(ARGS, agent.model, agent.policy, z, jax.random.key(0)), np.asarray(z, np.float64)
    assert actions.shape == (H, ARGS.num_pi_trajs, ACTIONS)
    for t in range(H):
        action = np.tanh(np_policy(ARGS, agent.policy, latent)[0])
        np.testing.assert_allclose(actions[t], np.tile(action, (ARGS.num_pi_trajs, 1)), atol=2e-3)
        latent = np_latent(ARGS, agent.model["dynamics"], latent, action)
    loose = np.asarray(roll(ARGS, agent.model, certain(agent.policy, raw=0.5), z, jax.random.key(0)))
    assert len(np.unique(loose.reshape(-1, ACTIONS), axis=0)) == H * ARGS.num_pi_trajs


# ----------------------------------------------------------------------------------------------------------------------
# Elites
# ----------------------------------------------------------------------------------------------------------------------
N, PRIOR, MOST = 13, 4, 5
choose = jax.jit(partial(select_elites, small_args(num_samples=N, num_pi_trajs=PRIOR, num_elites=MOST)))
NONE_OF_PRIOR = [9.0, 1.0, 9.0, 1.0]  # as J and as J_c: both thresholds are 5, and no sequence of A_pi meets both


def check_elites(returns, costs):
    """Algorithm 1 by sorting; among equal returns at the cut any choice is right."""
    elites, metrics = choose(jnp.array(returns, jnp.float32), jnp.array(costs, jnp.float32))
    chosen = np.flatnonzero(elites)
    thresholds = np.mean(returns[:PRIOR]), np.mean(costs[:PRIOR])  # Eq. 12
    improving = [n for n in range(N) if returns[n] >= thresholds[0] and costs[n] <= thresholds[1]]
    assert elites.dtype == bool and float(metrics["planner/num_improving"]) == len(improving)
    assert float(metrics["planner/no_improvement"]) == (not improving)
    assert (metrics["planner/reward_threshold"], metrics["planner/cost_threshold"]) == pytest.approx(thresholds)
    if not improving:
        assert chosen.tolist() == list(range(PRIOR))
    else:
        best = sorted((returns[n] for n in improving), reverse=True)[:MOST]
        assert set(chosen) <= set(improving)
        assert sorted((returns[n] for n in chosen), reverse=True) == best
    return set(chosen.tolist())


small_numbers = st.lists(st.integers(-2, 3).map(float), min_size=N, max_size=N)


@settings(max_examples=150)
@given(small_numbers, small_numbers)
def test_elites_against_sorting(returns, costs):
    """Algorithm 1 on numbers with many ties."""
    check_elites(returns, costs)


@pytest.mark.parametrize("count", [0, 1, MOST - 1, MOST, MOST + 1, N - PRIOR])
def test_elites_by_number_of_improving_sequences(count):
    """Algorithm 1: none -> A_pi; up to k -> all of them; more -> the k of highest J, whatever their cost."""
    returns = NONE_OF_PRIOR + list(range(20, 20 - (N - PRIOR), -1))
    costs = NONE_OF_PRIOR + [4.0 if n >= N - count else 6.0 for n in range(PRIOR, N)]
    expected = {0: set(range(PRIOR))}.get(count, set(range(N - count, min(N, N - count + MOST))))
    assert check_elites(returns, costs) == expected


def test_elites_when_all_are_equal():
    """Algorithm 1: meeting both thresholds exactly is an improvement; k of the equals are taken."""
    equal, rest = [2.0] * N, N - PRIOR
    assert len(check_elites(equal, equal)) == MOST
    assert check_elites(equal, equal[:PRIOR] + [2.001] * rest) == set(range(PRIOR))
    assert check_elites(equal[:PRIOR] + [1.999] * rest, equal) == set(range(PRIOR))


def test_elites_need_both():
    """Algorithm 1: a high return at too high a cost is not chosen, nor a low cost at too low a return."""
    returns, costs = [9.0] * 4 + [1.0] * 4 + [6.0], [9.0] * 4 + [0.0] * 4 + [4.0]
    assert check_elites(NONE_OF_PRIOR + returns, NONE_OF_PRIOR + costs) == {N - 1}


# ----------------------------------------------------------------------------------------------------------------------
# The plan, with stand-ins for the model: A_pi is given, scores are plain functions of a sequence's first action
# ----------------------------------------------------------------------------------------------------------------------
def stand_in_model(monkeypatch, prior, score=lambda first: (first, jnp.zeros_like(first))):
    """prior (H, P, A); score: first action's first component (N,) -> J, J_c. Returns `plan` compiled with these."""
    monkeypatch.setattr(spowl, "policy_rollout", lambda args, model, policy, z, key: jnp.asarray(prior, jnp.float32))
    monkeypatch.setattr(spowl, "evaluate_plans", lambda args, model, policy, z, actions, key: score(actions[0, :, 0]))
    return jax.jit(lambda args, last_mean, key: plan(args, None, None, None, last_mean, key), static_argnums=0)


def thresholds_of(metrics):
    return metrics["planner/reward_threshold"], metrics["planner/cost_threshold"]


def plan_args(**changes):
    sizes = dict(horizon=3, num_samples=40, num_pi_trajs=3, num_elites=6, iterations=1)
    return dataclasses.replace(ARGS, **(sizes | changes))


LAST = np.array([[0.1, -0.2], [0.3, -0.4], [0.5, -0.6]], np.float32)
SHIFTED = np.array([[0.3, -0.4], [0.5, -0.6], [0.0, 0.0]])


def test_first_mean_is_the_last_one_shifted(monkeypatch):
    """§5: one step on, 0 at its end: with almost no std all samples, and so the next mean, are that first mean."""
    run = stand_in_model(monkeypatch, -np.ones((3, 3, 2)))  # samples improve on A_pi
    args = plan_args(min_std=1e-6, max_std=1e-6, num_elites=37)
    final, metrics = run(args, LAST, jax.random.key(0))
    np.testing.assert_allclose(final.mean, SHIFTED, atol=1e-5)
    assert metrics["planner/num_improving"] == 40  # A_pi, all equal, meets its own thresholds; the samples are better
    np.testing.assert_allclose(final.action, SHIFTED[0], atol=1e-5)


def test_a_gpu_does_not_round_the_plan(monkeypatch):
    """Its mean and deviation are products, which TF32 would round to 10 bits."""
    run = stand_in_model(monkeypatch, -np.ones((3, 3, 2)))
    with jax.default_matmul_precision("default"):
        traced = str(run.trace(plan_args(), jnp.asarray(LAST), jax.random.key(0)).jaxpr)
    assert traced.count("= dot_general[") == traced.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


def test_first_samples(monkeypatch):
    """§5: the first samples are N(first mean, max_std) for every step and action, clipped to [-1, 1]."""
    samples = []
    monkeypatch.setattr(spowl, "policy_rollout", lambda *_: -jnp.ones((3, 2, 2)))
    monkeypatch.setattr(spowl, "evaluate_plans", lambda args, model, policy, z, actions, key: (
        samples.append(actions) or actions[0, :, 0], actions[0, :, 0] * 0.0))
    with jax.disable_jit():
        args = plan_args(num_samples=2002, num_pi_trajs=2, max_std=0.15)
        plan(args, None, None, None, jnp.asarray(LAST), jax.random.key(0))
        wide = dataclasses.replace(args, max_std=2.0)
        plan(wide, None, None, None, jnp.asarray(LAST), jax.random.key(0))
    assert [x.shape for x in samples] == [(3, n, 2) for n in (2, 2000, 2, 2000)]
    np.testing.assert_allclose(samples[1].mean(1), SHIFTED, atol=5 * 0.15 / np.sqrt(2000))
    np.testing.assert_allclose(samples[1].std(1), 0.15, atol=5 * 0.15 / np.sqrt(4000))
    flat = np.asarray(samples[1]).transpose(0, 2, 1).reshape(6, -1)
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(6), atol=5 / np.sqrt(2000))  # all noise is apart
    assert np.abs(samples[3]).max() == 1.0
    np.testing.assert_allclose(np.mean(np.abs(samples[3][-1]) == 1.0), 0.617, atol=0.04)  # P(|N(0, 2)| > 1)


PRIOR_ACTIONS = np.random.default_rng(9).uniform(-1, 1, (3, 4, 2)).astype(np.float32)
PRIOR_ACTIONS[0, :, 0] = [0.1, 0.2, 0.7, 0.9]


def hopeless(first):
    """A score by which A_pi is as it is above and no sample improves on it: the cost of every sample is too high."""
    is_prior = jnp.full(first.shape, first.shape[0] == 4)
    return 10.0 * first, jnp.where(is_prior, jnp.array([9.0, 1.0, 1.0, 1.0])[jnp.arange(first.shape[0]) % 4], 99.0)


@pytest.mark.parametrize("temperature", [0.5, 0.0, 3.0])
def test_mean_and_std_of_known_elites(monkeypatch, temperature):
    """§5: thresholds 4.75 and 3 are means over A_pi; its sequences 2 and 3 improve; weights softmax(T J), 0: plain."""
    run = stand_in_model(monkeypatch, PRIOR_ACTIONS, hopeless)
    final, metrics = run(plan_args(num_pi_trajs=4, temperature=temperature, min_std=1e-4), LAST, jax.random.key(0))
    assert thresholds_of(metrics) == pytest.approx((4.75, 3.0))
    assert metrics["planner/num_improving"] == 2
    weights = np_softmax(temperature * np.array([7.0, 9.0]))
    assert temperature != 0.0 or weights.tolist() == [0.5, 0.5]
    elites = PRIOR_ACTIONS[:, 2:].astype(np.float64)
    mean = np.einsum("n,hna->ha", weights, elites)
    variance = np.einsum("n,hna->ha", weights, (elites - mean[:, None]) ** 2)
    np.testing.assert_allclose(final.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(final.std, np.sqrt(variance), rtol=1e-3, atol=1e-6)
    if temperature == 0.0:
        np.testing.assert_allclose(final.mean, elites.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(final.std, elites.std(1), rtol=1e-3, atol=1e-6)


def test_fallback_to_the_prior(monkeypatch):
    """§5: where nothing improves, not even A_pi, its sequences are the elites, weighted like others."""
    opposed = lambda first: (10.0 * first, jnp.where(first.shape[0] == 4, 10.0 * first, 99.0))  # J up, J_c up
    prior = PRIOR_ACTIONS.copy()
    prior[0, :, 0] = [0.1, 0.2, 0.3, 0.6]  # means are 3: J >= 3 with J_c <= 3 for the third alone; so lift its cost
    score = lambda first: (opposed(first)[0], opposed(first)[1] + 5.0 * (jnp.abs(first - 0.3) < 1e-6))
    final, metrics = stand_in_model(monkeypatch, prior, score)(
        plan_args(num_pi_trajs=4, num_elites=2), LAST, jax.random.key(0))
    assert thresholds_of(metrics) == pytest.approx((3.0, 4.25))
    assert metrics["planner/num_improving"] == 0 and metrics["planner/no_improvement"] == 1
    weights = np_softmax(0.5 * np.array([1.0, 2.0, 3.0, 6.0]))
    np.testing.assert_allclose(final.mean, np.einsum("n,hna->ha", weights, prior), rtol=1e-4, atol=1e-6)
    assert np.any(np.all(np.isclose(np.asarray(final.action), prior[0]), -1))


def test_action_is_drawn_by_the_weights(monkeypatch):
    """§5: one elite drawn by the weights: 2 of A_pi, J = 7 and 9 at temperature 0.5: shares 0.27 and 0.73."""
    stand_in_model(monkeypatch, PRIOR_ACTIONS, hopeless)
    keys, args = jax.random.split(jax.random.key(0), 3000), plan_args(num_pi_trajs=4, num_samples=6)
    actions = jax.jit(jax.vmap(lambda key: plan(args, None, None, None, jnp.asarray(LAST), key)[0].action))(keys)
    picked = np.argmin(np.abs(np.asarray(actions)[:, None] - PRIOR_ACTIONS[0]).sum(-1), -1)
    np.testing.assert_allclose(actions, PRIOR_ACTIONS[0][picked], atol=1e-6)
    shares = np.bincount(picked, minlength=4) / 3000
    np.testing.assert_allclose(shares, [0.0, 0.0, *np_softmax(np.array([3.5, 4.5]))], atol=5 * 0.5 / np.sqrt(3000))


@settings(max_examples=4)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.integers(1, 3))
def test_plans_stay_in_bounds(horizon, num_prior, num_actions, more, iterations):
    """§5: whatever the sizes: actions within [-1, 1], std within [min_std, max_std], all finite."""
    with pytest.MonkeyPatch.context() as patch:
        prior = np.random.default_rng(more).uniform(-1, 1, (horizon, num_prior, num_actions))
        run = stand_in_model(patch, prior, lambda first: (50.0 * first, -first))
        num_samples = num_prior + 1 + more
        args = plan_args(horizon=horizon, num_pi_trajs=num_prior, num_samples=num_samples, min_std=0.2, max_std=0.5,
                         num_elites=min(4, num_samples), iterations=iterations)
        final, metrics = run(args, jnp.full((horizon, num_actions), 0.95), jax.random.key(more))
    assert final.mean.shape == final.std.shape == (horizon, num_actions) and final.action.shape == (num_actions,)
    assert np.all(np.abs(final.mean) <= 1.0) and np.all(np.abs(final.action) <= 1.0)
    assert np.all(final.std >= np.float32(0.2)) and np.all(final.std <= np.float32(0.5))
    assert 0 <= metrics["planner/num_improving"] <= args.num_samples


def test_refinement_finds_the_best_action(monkeypatch):
    """§5: with J = -(a - 0.6)^2 and J_c free the mean goes to 0.6, from -1 in steps of 0.3: one hardly passes 0.4."""
    score = lambda first: (-100.0 * (first - 0.6) ** 2, 0.0 * first)
    run = stand_in_model(monkeypatch, np.full((3, 3, 2), -1.0), score)
    args = plan_args(num_samples=200, iterations=6, num_elites=10, min_std=0.3, max_std=0.3)
    final, _ = run(args, np.full((3, 2), -1.0, np.float32), jax.random.key(1))
    assert final.mean[0, 0] == pytest.approx(0.6, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# The plan with the real model
# ----------------------------------------------------------------------------------------------------------------------
def np_refine(args, actions, returns, costs, reward_threshold, cost_threshold):
    """One refinement by loops -> mean, std, indices of the elites, how many improve."""
    improving = [n for n in range(len(returns)) if returns[n] >= reward_threshold and costs[n] <= cost_threshold]
    elites = sorted(improving, key=lambda n: -returns[n])[:args.num_elites] or list(range(args.num_pi_trajs))
    weights = np.exp(args.temperature * (returns[elites] - returns[elites].max()))
    weights /= weights.sum()
    mean = sum(w * actions[:, n] for w, n in zip(weights, elites))
    variance = sum(w * (actions[:, n] - mean) ** 2 for w, n in zip(weights, elites))
    return mean, np.clip(np.sqrt(variance), args.min_std, args.max_std), elites, len(improving)


def test_two_refinements_by_brute_force(agent, z, monkeypatch):
    """§5 as a whole, from the sequences that were drawn and their scores: thresholds, elites, mean, std, the action."""
    args, calls = plan_args(num_samples=30, num_pi_trajs=8, num_elites=4, iterations=2, max_std=0.6), []

    def spy(args, model, policy, z, actions, key):
        scores = evaluate_plans(args, model, policy, z, actions, key)
        tell = lambda *told: calls.append([np.asarray(x, np.float64) for x in told])
        jax.debug.callback(tell, actions, *scores, ordered=True)
        return scores

    monkeypatch.setattr(spowl, "evaluate_plans", spy)
    policy = certain(agent.policy, raw=-0.3)
    run = jax.jit(plan, static_argnums=0)
    final, metrics = run(args, agent.model, policy, z, jnp.asarray(LAST), jax.random.key(3))
    jax.effects_barrier()
    prior, *sampled = calls
    assert prior[0].shape == (3, 8, 2) and [x[0].shape for x in sampled] == [(3, 22, 2)] * 2
    thresholds = thresholds_of(metrics)
    assert thresholds == pytest.approx((prior[1].mean(), prior[2].mean()), rel=1e-4)
    refined = []
    for drawn in sampled:
        actions, returns, costs = np.concatenate([prior[0], drawn[0]], 1), *np.concatenate([prior[1:], drawn[1:]], 1)
        refined.append(np_refine(args, actions, returns, costs, *(float(x) for x in thresholds)))
    (first_mean, first_std, _, _), (mean, std, elites, improving) = refined
    assert metrics["planner/num_improving"] == improving > 4  # more than there are elites
    np.testing.assert_allclose(final.mean, mean, atol=1e-5)
    np.testing.assert_allclose(final.std, std, atol=1e-5)
    assert np.any(np.all(np.isclose(np.asarray(final.action), actions[0, elites], atol=1e-6), -1))
    noise = ((sampled[1][0] - first_mean[:, None]) / first_std[:, None])[np.abs(sampled[1][0]) < 1.0]
    assert noise.size > 60 and np.abs(noise).max() < 4.0  # the second draw is of N(mean, std)
    assert noise.std() == pytest.approx(0.9, abs=0.25)
