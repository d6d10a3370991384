"""METHOD §3-§4: world-model loss (Eq. 5), its targets (Eq. 6), policy loss (Eq. 7), Lagrangian (Eq. 8-10)."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (certain, float64, leaves_equal, np_cross_entropy, np_heads, np_latent, np_mlp, np_policy,
                      np_two_hot, one_head, random_agent, small_args)
from hypothesis import given
from hypothesis import strategies as st

import spowl_continuous as spowl
from spowl_continuous import (Transition, alive_mask, augmented_lagrangian, policy_loss, random_heads, td_targets,
                              update_scale, world_model_loss)

OBS, ACTIONS, H, B = 5, 2, 3, 6
ARGS = small_args(num_bins=11, horizon=H, consistency_coef=3.0, reward_coef=0.7, value_coef=0.4, cost_coef=0.3,
                  cost_value_coef=0.2, rho=0.6, cost_positive_weight=7.0, gamma=0.9, cost_gamma=0.8, num_q=2, num_qc=3)
# one column per sequence: untouched, ends at its first, second, third step, twice, and at its second and third
DONE = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]], np.float32)
TERMINATED = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0]], np.float32)
ALIVE = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]], np.float32)


@pytest.fixture(scope="module")
def agent():
    return random_agent(ARGS, OBS, ACTIONS, seed=3)


def make_batch(seed=0):
    """A batch, next latents and targets; half of the transitions have a cost."""
    rng = np.random.default_rng(seed)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    cost = rng.choice([0.0, 0.0, 1.0, 3.0], (H, B))
    batch = Transition(f32(rng.normal(size=(H, B, OBS))), f32(rng.uniform(-1, 1, (H, B, ACTIONS))),
                       f32(3 * rng.normal(size=(H, B))), f32(cost), f32(rng.normal(size=(H, B, OBS))), f32(TERMINATED),
                       f32(DONE))
    next_z = f32(rng.dirichlet(np.ones(8), (H, B, 2)).reshape(H, B, 16))
    return batch, next_z, f32(10 * rng.normal(size=(H, B))), f32(5 * rng.random((H, B)))


def dropout_masks(seed=1):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.choice([0.0, 1.25], (k, H * B, ARGS.mlp_dim), p=[0.2, 0.8]), jnp.float32)
                 for k in (ARGS.num_q, ARGS.num_qc))


# ----------------------------------------------------------------------------------------------------------------------
# Which steps count
# ----------------------------------------------------------------------------------------------------------------------
def test_alive_mask_by_hand():
    """§2: a step counts until the first end of its sequence, the ending step included, whatever ended it."""
    np.testing.assert_array_equal(alive_mask(jnp.asarray(DONE)), ALIVE)


@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_alive_mask_is_no_end_before(done):
    mask = np.asarray(alive_mask(jnp.array(done, jnp.float32)[:, None]))[:, 0]
    assert mask.tolist() == [float(not any(done[:t])) for t in range(5)]


# ----------------------------------------------------------------------------------------------------------------------
# World model
# ----------------------------------------------------------------------------------------------------------------------
model_loss = jax.jit(jax.value_and_grad(world_model_loss, has_aux=True), static_argnums=1)


def np_world_model_loss(model, batch, next_z, q_target, qc_target, keep_q, keep_qc):
    """Eq. 5, transition by transition -> the five terms, the latents."""
    model, batch = float64(model), float64(batch)
    latents = [np_latent(ARGS, model["encoder"], batch.obs[0])]
    for t in range(H):
        latents.append(np_latent(ARGS, model["dynamics"], latents[t], batch.action[t]))
    keeps = {name: np.asarray(keep).reshape(-1, H, B, ARGS.mlp_dim) for name, keep in (("q", keep_q), ("qc", keep_qc))}
    terms = dict.fromkeys(("consistency", "reward", "value", "cost", "cost_value"), 0.0)

    def entropy(layers, t, b, target, keep=None):
        logits = np_mlp(layers, latents[t][b], batch.action[t, b], keep)
        return np_cross_entropy(logits, np_two_hot(target, ARGS.num_bins, ARGS.bin_limit))

    def ensemble_entropy(name, t, b, target):
        keep = [keeps[name][k, t, b] if name in keeps else None for k in range(len(model[name][0]["b"]))]
        return np.mean([entropy(one_head(model[name], k), t, b, target, keep[k]) for k in range(len(keep))])

    for t in range(H):
        valid = [b for b in range(B) if not np.any(DONE[:t, b])]
        for b in valid:
            share = 0.6**t / len(valid) / H
            terms["consistency"] += share * np.mean((latents[t + 1][b] - np.asarray(next_z)[t, b]) ** 2)
            terms["reward"] += share * entropy(model["reward"], t, b, batch.reward[t, b])
            terms["value"] += share * ensemble_entropy("q", t, b, q_target[t, b])
            weight = 7.0 if batch.cost[t, b] > 0 else 1.0
            terms["cost"] += share * weight * ensemble_entropy("cost", t, b, batch.cost[t, b])
            terms["cost_value"] += share * ensemble_entropy("qc", t, b, qc_target[t, b])
    return terms, np.stack(latents)


def np_total(*inputs):
    terms, _ = np_world_model_loss(*inputs)
    return (3.0 * terms["consistency"] + 0.7 * terms["reward"] + 0.4 * terms["value"] + 0.3 * terms["cost"]
            + 0.2 * terms["cost_value"])


def test_world_model_loss_against_numpy(agent):
    """Eq. 5: every term, the weighted total and the latents of the rollout."""
    inputs = make_batch() + dropout_masks()
    (total, (metrics, latents)), _ = model_loss(agent.model, ARGS, *inputs)
    terms, expected = np_world_model_loss(agent.model, *inputs)
    for name, value in terms.items():
        assert metrics[f"losses/{name}"] == pytest.approx(value, rel=1e-3), name
    assert total == metrics["losses/total"] == pytest.approx(np_total(agent.model, *inputs), rel=1e-3)
    np.testing.assert_allclose(latents, expected, atol=1e-5)


def test_world_model_gradient_against_finite_differences(agent):
    """Eq. 5: the gradient by every network's weights, with targets and next latents held fixed (sg)."""
    inputs = make_batch() + dropout_masks()
    _, grads = model_loss(agent.model, ARGS, *inputs)
    rng, step = np.random.default_rng(0), 1e-5
    for part in agent.model:
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), agent.model[part])
        shift = lambda by: jax.tree.map(lambda x, d: np.float64(x) + by * d, agent.model[part], direction)
        moved = lambda by: agent.model | {part: shift(by)}
        numeric = (np_total(moved(step), *inputs) - np_total(moved(-step), *inputs)) / (2 * step)
        ours = sum(np.sum(np.asarray(g) * d) for g, d in zip(jax.tree.leaves(grads[part]), jax.tree.leaves(direction)))
        assert abs(numeric) > 1e-4 and ours == pytest.approx(numeric, rel=2e-3), part


@pytest.mark.parametrize("cost", [0.0, 0.25, 2.0])  # a step may cost less than 1
def test_positive_cost_weighs_more_and_is_not_renormalised(agent, cost):
    """§3: a cross-entropy with cost > 0 counts x7 here, also where all have one."""
    batch, *rest = make_batch()
    inputs = (batch._replace(cost=jnp.full((H, B), cost, jnp.float32)), *rest, *dropout_masks())
    (_, (metrics, _)), _ = model_loss(agent.model, ARGS, *inputs)
    assert metrics["losses/cost"] == pytest.approx(np_world_model_loss(agent.model, *inputs)[0]["cost"], rel=1e-3)


def dead_data_changed(batch, next_z, q_target, qc_target, seed=7):
    """The same batch with other data in every step past the end of its sequence's first episode."""
    other, other_z, other_q, other_qc = make_batch(seed)
    other = other._replace(terminated=1.0 - batch.terminated, done=1.0 - batch.done)
    alive = jnp.asarray(ALIVE[:-1])
    pick = lambda x, y: jnp.where(alive.reshape(H, B, *[1] * (x.ndim - 2)) == 1.0, x, y)
    return jax.tree.map(pick, batch, other), pick(next_z, other_z), pick(q_target, other_q), pick(qc_target, other_qc)


def test_nothing_past_an_end_counts(agent):
    """§2: whatever lies past an episode's end, loss and gradients are the same to the last bit."""
    inputs, masks = make_batch(), dropout_masks()
    changed = dead_data_changed(*inputs)
    assert not leaves_equal(inputs, changed)
    assert np.asarray(alive_mask(changed[0].done)).tolist() == ALIVE.tolist()
    (loss, (metrics, _)), grads = model_loss(agent.model, ARGS, *inputs, *masks)
    (same_loss, (same_metrics, _)), same_grads = model_loss(agent.model, ARGS, *changed, *masks)
    assert loss == same_loss and leaves_equal(metrics, same_metrics) and leaves_equal(grads, same_grads)
    alive = [inputs[0]._replace(reward=inputs[0].reward.at[t, b].add(1.0)) for t, b in ((0, 1), (1, 2), (2, 3), (2, 0))]
    for batch in alive:  # the ending step itself counts
        assert model_loss(agent.model, ARGS, batch, *inputs[1:], *masks)[0][0] != loss


# ----------------------------------------------------------------------------------------------------------------------
# Targets
# ----------------------------------------------------------------------------------------------------------------------
targets = jax.jit(td_targets, static_argnums=0)


def np_next_values(args, agent, policy, next_z):
    """Read-outs (K, H, B) of all target heads at the policy's mean action."""
    z = np.asarray(next_z, np.float64)
    action = np.tanh(np_policy(args, policy, z)[0])
    return np_heads(args, agent.target["q"], z, action), np_heads(args, agent.target["qc"], z, action)


@pytest.mark.parametrize("agg", ["min", "mean", "max"])
def test_targets_by_aggregation(agent, agg):
    """Eq. 6: r + gamma (1 - terminated) min Q, c + gamma_c (1 - terminated) min/mean/max Qc, of read-outs; a truncated
    step is bootstrapped, a terminated one is not; the heads are the target networks'."""
    args, (batch, next_z, _, _) = spowl.dataclasses.replace(ARGS, cost_target_agg=agg), make_batch()
    policy = certain(agent.policy)
    q, qc = targets(args, policy, agent.target, batch, next_z, jax.random.key(0))
    next_q, next_qc = np_next_values(args, agent, policy, next_z)
    expected_q, expected_qc = np.array(batch.reward), np.array(batch.cost)
    for t, b in itertools.product(range(H), range(B)):
        if TERMINATED[t, b] == 0:
            expected_q[t, b] += 0.9 * min(next_q[0, t, b], next_q[1, t, b])
            expected_qc[t, b] += 0.8 * {"min": min, "max": max, "mean": np.mean}[agg](next_qc[:, t, b])
    assert np.std(next_q) > 0.1 and np.std(next_qc, 0).max() > 0.1
    np.testing.assert_allclose(q, expected_q, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(qc, expected_qc, rtol=5e-3, atol=5e-3)
    np.testing.assert_array_equal(q[TERMINATED == 1], batch.reward[TERMINATED == 1])


def test_target_q_is_the_min_of_two_different_heads():
    """Eq. 6: one pair of heads per update, any pair, both different."""
    args = spowl.dataclasses.replace(ARGS, num_q=4)
    agent, (batch, next_z, _, _) = random_agent(args, OBS, ACTIONS, seed=3), make_batch()
    first, second, last = agent.target["q"]  # without biases no head is the lowest everywhere
    agent.target["q"] = first, second, last | {"b": 0.0 * last["b"]}
    policy, seen = certain(agent.policy), set()
    next_q, _ = np_next_values(args, agent, policy, next_z)
    pairs = {pair: np.asarray(batch.reward) + 0.9 * (1 - TERMINATED) * next_q[list(pair)].min(0)
             for pair in itertools.combinations(range(4), 2)}
    for seed in range(60):
        q = np.asarray(targets(args, policy, agent.target, batch, next_z, jax.random.key(seed))[0])
        close = [pair for pair, expected in pairs.items() if np.allclose(q, expected, rtol=5e-3, atol=5e-3)]
        assert len(close) == 1
        seen.add(close[0])
    assert seen == set(pairs)


def test_next_action_is_sampled(agent):
    """Eq. 6: a' ~ pi(z'), not its mean: targets differ with the key, where not terminated."""
    batch, next_z, _, _ = make_batch()
    loose = certain(agent.policy, raw=0.8)
    draws = [targets(ARGS, loose, agent.target, batch, next_z, jax.random.key(k)) for k in (0, 1)]
    for values in np.stack(draws, axis=1):  # of Q, of Qc
        assert np.array_equal(values[0] == values[1], TERMINATED == 1)


def test_random_heads():
    """§3-§4: different heads, every subset occurs, a head's layers stay together; all heads where enough are asked."""
    numbered = lambda *shape: jnp.arange(4.0).reshape(4, *[1] * len(shape)) * jnp.ones((4, *shape))
    layers = {"w": numbered(2, 3), "b": numbered(3)}, {"w": numbered(3, 1), "b": numbered(1)}
    pick, seen = jax.jit(random_heads, static_argnums=1), set()
    for seed in range(80):
        chosen = pick(layers, 2, jax.random.key(seed))
        numbers = {tuple(np.asarray(x).reshape(2, -1)[:, 0].tolist()) for x in jax.tree.leaves(chosen)}
        assert len(numbers) == 1 and all(x.shape[0] == 2 for x in jax.tree.leaves(chosen))
        seen.add(frozenset(numbers.pop()))
    assert seen == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}
    for num_heads in (4, 9):
        assert leaves_equal(random_heads(layers, num_heads, jax.random.key(0)), layers)


# ----------------------------------------------------------------------------------------------------------------------
# Augmented Lagrangian
# ----------------------------------------------------------------------------------------------------------------------
def lagrangian(violation, multiplier, penalty, **changes):
    args = small_args(**({"mu_growth": 0.5, "mu_max": 1.0, "lambda_max": 10.0} | changes))
    return [float(x) for x in augmented_lagrangian(args, *map(jnp.float32, (violation, multiplier, penalty)))]


@pytest.mark.parametrize("violation, multiplier, penalty, expected", [
    (3.0, 2.0, 0.5, (2 * 3 + 0.5 * 0.5 * 9, 3.5, 0.75)),  # lambda + mu D = 3.5
    (-2.0, 2.0, 0.5, (-2 * 2 + 0.5 * 0.5 * 4, 1.0, 0.75)),  # 1, still positive
    (-4.0, 2.0, 0.5, (-4.0, 0.0, 0.75)),  # 0: both branches give -lambda^2 / (2 mu)
    (-9.0, 2.0, 0.5, (-4.0, 0.0, 0.75)),  # -2.5
    (-1.0, 0.0, 0.2, (0.0, 0.0, 0.3)), (0.0, 0.0, 0.2, (0.0, 0.0, 0.3)), (5.0, 0.0, 0.2, (2.5, 1.0, 0.3))])
def test_lagrangian_by_hand(violation, multiplier, penalty, expected):
    """Eq. 8-10: Psi, the next lambda, the next mu."""
    assert lagrangian(violation, multiplier, penalty) == pytest.approx(expected, rel=1e-6)


def test_lagrangian_is_continuous_at_the_switch():
    """Eq. 8: at lambda + mu Delta = 0 both branches meet, in value and in slope."""
    below, above = (lagrangian(-4.0 + by, 2.0, 0.5) for by in (-1e-3, 1e-3))
    assert below[0] == pytest.approx(above[0], abs=1e-5) and below[1] == 0.0 < above[1] < 1e-3


@pytest.mark.parametrize("violation", [-9.0, -4.5, -3.5, 0.0, 2.0])
def test_lagrangian_slope(violation):
    """Eq. 8: d Psi / d Delta = max(0, lambda + mu Delta), the next multiplier before its cap."""
    slope = jax.grad(lambda x: augmented_lagrangian(small_args(), x, jnp.float32(2.0), jnp.float32(0.5))[0])(violation)
    assert slope == pytest.approx(max(0.0, 2.0 + 0.5 * violation))


def test_multiplier_and_penalty_are_capped():
    """§4: lambda within [0, lambda_max], mu up to mu_max; Psi is not."""
    assert lagrangian(30.0, 2.0, 0.5) == pytest.approx([60 + 225, 10.0, 0.75])
    assert lagrangian(30.0, 2.0, 0.9, lambda_max=0.5) == pytest.approx([60 + 405, 0.5, 1.0])
    assert lagrangian(0.0, 0.0, 1.0)[2] == 1.0
    assert lagrangian(-1e6, 3.0, 1e-6)[1] >= 0.0


def test_schedule_of_the_defaults():
    """§4: from mu = 5e-9 it takes 1 / 5e-6 updates to grow e-fold; the first multiplier grows by mu Delta."""
    args, multiplier, penalty = spowl.Args(), jnp.float32(1e-6), jnp.float32(5e-9)
    _, multiplier, penalty = augmented_lagrangian(args, jnp.float32(40.0), multiplier, penalty)
    assert multiplier == pytest.approx(1.2e-6, rel=1e-5) and penalty == pytest.approx(5e-9 * (1 + 5e-6), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Policy
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale, q, expected", [
    (1.0, np.arange(101.0), 1.89),  # the range is 90
    (2.0, np.arange(101.0) / 1000, 1.99),  # a range below 1 counts as 1
    (4.0, np.arange(101.0)[::-1] / 90 * 4, 4.0), (1.0, np.full(7, 30.0), 1.0)])
def test_update_scale_by_hand(scale, q, expected):
    """§4: S moves by 0.01 towards max(1, the 5-95 percentile range)."""
    assert update_scale(jnp.float32(scale), jnp.asarray(q)) == pytest.approx(expected, rel=1e-5)


def stand_in_policy_sample(args, policy, z, key):
    """A policy of one number: sampled action and log pi are plain functions of it and of z; its mean is not wanted."""
    action = jnp.tanh(policy * z[..., :ACTIONS] * 8.0)
    return action, jnp.full_like(action, jnp.nan), policy * jnp.sum(z[..., :4], -1) * 300.0


def np_policy_loss(policy, args, model, zs, mask, multiplier, penalty, scale, q_heads, qc_heads, held_scale=None):
    """Eq. 7 plus Psi for the stand-in policy, time by time."""
    zs = np.asarray(zs, np.float64)
    action, log_prob = np.tanh(policy * zs[..., :ACTIONS] * 8.0), policy * zs[..., :4].sum(-1) * 300.0
    q = np_heads(args, model["q"], zs, action)[list(q_heads)].mean(0)
    qc = np_heads(args, model["qc"], zs, action)[list(qc_heads)]
    qc = qc.max(0) if args.lagrangian_agg == "max" else qc.mean(0)
    low, high = np.percentile(q[0], [5, 95])
    scale = held_scale or scale + 0.01 * (max(1.0, high - low) - scale)
    loss = 0.0
    for t in range(H + 1):
        valid = [b for b in range(B) if mask[t, b]]
        per_sequence = args.entropy_coef * ACTIONS * log_prob[t, valid] - q[t, valid] / scale
        loss += 0.6**t / (H + 1) * np.mean(per_sequence)
    violation = np.mean(qc[np.asarray(mask) == 1]) - args.cost_limit
    shifted = multiplier + penalty * violation
    psi = multiplier * violation + penalty * violation**2 / 2 if shifted >= 0 else -(multiplier**2) / (2 * penalty)
    return loss + psi, loss, psi, violation, scale, max(0.0, shifted)


def policy_case(agent, seed=0, **changes):
    """Flags, model with spread-out Q values, latents and mask of a policy loss."""
    args = spowl.dataclasses.replace(ARGS, **({"entropy_coef": 0.02, "cost_limit": 0.3} | changes))
    zs = np.random.default_rng(seed).dirichlet(np.ones(8), (H + 1, B, 2)).reshape(H + 1, B, 16)
    return args, agent.model, jnp.asarray(zs, jnp.float32), jnp.asarray(ALIVE)


def policy_loss_and_grad():
    """Compiled anew, so that a stand-in is seen."""
    return jax.jit(jax.value_and_grad(lambda *inputs: policy_loss(*inputs), has_aux=True), static_argnums=1)


@pytest.mark.parametrize("agg, multiplier, penalty", [("mean", 0.4, 0.1), ("max", 0.2, 0.3)])
def test_policy_loss_against_numpy(agent, monkeypatch, agg, multiplier, penalty):
    """Eq. 7-8: beta A log pi - Q / S, rho^t, means over what is valid, Psi added; the gradient too, S held fixed."""
    monkeypatch.setattr(spowl, "policy_sample", stand_in_policy_sample)
    args, model, zs, mask = policy_case(agent, lagrangian_agg=agg, lagrangian_heads=3)
    numbers, loss_and_grad = (multiplier, penalty, 3.0), policy_loss_and_grad()
    heads = (0, 1), (0, 1, 2)
    (total, (next_multiplier, next_penalty, scale, metrics)), grad = loss_and_grad(
        jnp.float32(0.7), args, model, zs, mask, *map(jnp.float32, numbers), jax.random.key(0))
    expected = np_policy_loss(0.7, args, model, zs, mask, *numbers, *heads)
    logged = [metrics[name] for name in ("losses/policy", "losses/psi", "lagrangian/violation")]
    found = total, *logged, scale, next_multiplier
    assert [float(x) for x in found] == pytest.approx(expected, rel=2e-3)
    assert next_penalty == pytest.approx(penalty * (1 + args.mu_growth))
    assert (metrics["lagrangian/lambda"], metrics["lagrangian/mu"]) == (next_multiplier, next_penalty)
    log_prob = 0.7 * np.asarray(zs, np.float64)[0, :, :4].sum(-1) * 300.0  # of encoded observations alone
    assert metrics["losses/entropy"] == pytest.approx(-log_prob.mean(), rel=1e-4) and log_prob.mean() > 1.0
    up, down = (np_policy_loss(0.7 + by, args, model, zs, mask, *numbers, *heads, held_scale=expected[4])[0]
                for by in (1e-5, -1e-5))
    assert grad == pytest.approx((up - down) / 2e-5, rel=3e-3)


def test_no_gradient_through_the_scale(agent, monkeypatch):
    """§4: where S follows Q closely, its own gradient would show."""
    monkeypatch.setattr(spowl, "policy_sample", stand_in_policy_sample)
    monkeypatch.setattr(spowl, "update_scale", lambda scale, q: 0.5 * jnp.mean(q**2))
    args, model, zs, mask = policy_case(agent, entropy_coef=0.0)
    numbers = (0.0, 1e-6, 3.0)
    _, grad = policy_loss_and_grad()(
        jnp.float32(0.7), args, model, zs, mask, *map(jnp.float32, numbers), jax.random.key(0))
    action = np.tanh(0.7 * np.asarray(zs, np.float64)[..., :ACTIONS] * 8.0)
    held = 0.5 * np.mean(np_heads(args, model["q"], np.asarray(zs), action).mean(0)[0] ** 2)
    up, down = (np_policy_loss(0.7 + by, args, model, zs, mask, *numbers, (0, 1), (0, 1, 2), held_scale=held)[1]
                for by in (1e-5, -1e-5))
    assert abs(grad) > 1e-4
    assert grad == pytest.approx((up - down) / 2e-5, rel=3e-3)


def test_policy_loss_draws_two_heads_of_q_and_x_of_qc(monkeypatch):
    """§4: Q of two random heads, Qc of a random subset of X of K: every combination occurs, none else."""
    agent = random_agent(spowl.dataclasses.replace(ARGS, num_q=3, num_qc=3), OBS, ACTIONS, seed=3)
    monkeypatch.setattr(spowl, "policy_sample", stand_in_policy_sample)
    args, model, zs, mask = policy_case(agent, num_q=3, num_qc=3, lagrangian_heads=2, lagrangian_agg="mean")
    run, numbers = jax.jit(lambda *inputs: policy_loss(*inputs), static_argnums=1), (0.4, 0.1, 3.0)
    pairs = list(itertools.combinations(range(3), 2))
    by_pair = {pair: np_policy_loss(0.7, args, model, zs, mask, *numbers, pair, pair) for pair in pairs}
    seen = set()
    for seed in range(60):
        inputs = jnp.float32(0.7), args, model, zs, mask, *map(jnp.float32, numbers), jax.random.key(seed)
        _, (_, _, _, metrics) = run(*inputs)
        q_pair = [p for p in pairs if metrics["losses/policy"] == pytest.approx(by_pair[p][1], rel=2e-3)]
        qc_pair = [p for p in pairs if metrics["lagrangian/violation"] == pytest.approx(by_pair[p][3], rel=2e-3)]
        assert len(q_pair) == len(qc_pair) == 1
        seen.add((q_pair[0], qc_pair[0]))
    assert seen == set(itertools.product(pairs, pairs))


def test_policy_loss_ignores_what_lies_past_an_end(agent):
    """§2: latents past an episode's end change neither loss nor gradient of the real policy, to the last bit."""
    args, model, zs, mask = policy_case(agent)
    other = jnp.where(mask[..., None] == 1.0, zs, policy_case(agent, seed=5)[2])
    assert np.any(other != zs)
    run, numbers = policy_loss_and_grad(), (jnp.float32(0.4), jnp.float32(0.1), jnp.float32(2.0))
    results = [run(agent.policy, args, model, latents, mask, *numbers, jax.random.key(4)) for latents in (zs, other)]
    assert leaves_equal(*results)
    assert all(np.any(x) for x in jax.tree.leaves(results[0][1]))
    alive = zs.at[1, 2].set(zs[0, 0])
    assert not leaves_equal(results[0], run(agent.policy, args, model, alive, mask, *numbers, jax.random.key(4)))
