"""What lets the constraint act in a short run (METHOD §11): observations, costs read as expectations, the multiplier's
pace, presets; and what the critic knew."""
import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64, np_layer_norm, np_mlp, np_simnorm, random_agent, small_args
from hypothesis import given
from hypothesis import strategies as st

import spowl_continuous as spowl
from spowl_continuous import (PRESETS, Args, Transition, auc, augmented_lagrangian, cost_bins, cost_heads,
                              cost_read_out, cost_to_go, cost_two_hot, critic_metrics, cross_entropy, encode,
                              init_actor, init_agent, pace, parse_args, problems, spread_obs, transform_obs, two_hot,
                              update_many)

EXPECTATION = small_args(cost_read_out="expectation", cost_gamma=0.95, num_bins=101)


# ----------------------------------------------------------------------------------------------------------------------
# Observations
# ----------------------------------------------------------------------------------------------------------------------
def test_transform_by_hand():
    """METHOD §11: [0, 1] is -log(1.02 - x), unbounded is symlog, what is bounded otherwise stays."""
    low = np.array([0.0, 0.0, 0.0, -np.inf, -np.inf, -1.0, 0.0, -np.inf])
    high = np.array([1.0, 1.0, 1.0, np.inf, np.inf, 1.0, np.inf, 5.0])
    obs = np.array([0.0, 1.0, 0.92, math.e - 1, 1 - math.e, 0.7, 5.0, 3.0])
    expected = [-math.log(1.02), -math.log(0.02), -math.log(0.1), 1.0, -1.0, 0.7, 5.0, 3.0]
    np.testing.assert_allclose(transform_obs(obs, low, high), expected, rtol=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2))
def test_transform_keeps_order_and_is_finite(pair):
    """Monotonic, whatever the bounds; a lidar that overshoots its bounds by a rounding error does not become nan."""
    pair = np.sort(np.array(pair))[:, None]
    for low, high in ((0.0, 1.0), (-np.inf, np.inf), (-2.0, 2.0)):
        first, second = transform_obs(pair, np.array([low]), np.array([high]))
        assert np.isfinite(first) and np.isfinite(second) and first <= second


def test_transform_tells_a_hazards_edge_from_a_safe_distance():
    """Lidar 0.933 at 0.2 m, 0.900 at 0.3 m: a thirtieth of the raw scale, a twelfth of the transformed one."""
    edge, safe, zero, one = transform_obs(np.array([0.9333, 0.9, 0.0, 1.0]), np.zeros(4), np.ones(4))
    assert (edge - safe) / (one - zero) > 2.4 * (0.9333 - 0.9)


def test_lidar_and_sensors_of_a_task_are_told_apart():
    """PointGoal1: 12 sensor readings, then three lidars of 16 bins, by the bounds of its observation space alone."""
    space = spowl.import_safety_gymnasium().make("SafetyPointGoal1-v0").observation_space
    lidar = (space.low == 0) & (space.high == 1)
    assert lidar.tolist() == [False] * 12 + [True] * 48
    assert np.isinf(space.low[~lidar]).all() and np.isinf(space.high[~lidar]).all()


def test_environments_answer_with_transformed_observations():
    """Both what is acted on and what a step led to, the transform of what a raw environment answers."""
    space, seen = spowl.import_safety_gymnasium().make("SafetyPointGoal1-v0").observation_space, {}
    for how in ("raw", "log", "bins"):
        ask, *_ = spowl.start_envs(small_args(num_envs=1, obs_transform=how), 0, 1, start_method="spawn")
        try:
            first, _ = ask("reset", [(0, [])])
            obs, _, row, _ = ask("step", np.full((1, 2), 0.4, np.float32))
        finally:
            ask("close")
        seen[how] = np.stack([first, row.obs, row.next_obs, obs])
    np.testing.assert_allclose(seen["log"], transform_obs(seen["raw"], space.low, space.high), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen["bins"], seen["log"])
    assert np.array_equal(seen["raw"][0], seen["raw"][1]) and not np.array_equal(seen["raw"][1], seen["raw"][2])


BINS = small_args(obs_transform="bins")


def test_spread_by_hand():
    """The entries first, then eight weights of each, on bins 4/7 apart; outside the nearest end counts."""
    spread = spread_obs(BINS, jnp.array([[1 / 7, 24 / 7], [-7.0, 99.0]]))
    np.testing.assert_allclose(spread, [[1 / 7, 24 / 7, 0.75, 0.25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
                                        [-7.0, 99.0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]], atol=1e-5)


@pytest.mark.parametrize("how", ["raw", "log"])
def test_nothing_is_spread_unless_asked(how):
    obs = jnp.ones((3, 2))
    assert spread_obs(small_args(obs_transform=how), obs) is obs


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5))
def test_spread_keeps_the_number(obs):
    """The weights of an entry sum to 1, at most two are not 0, and their mean bin is the entry, clipped."""
    spread = np.asarray(spread_obs(BINS, jnp.array(obs, jnp.float32)))
    weights = spread[len(obs):].reshape(len(obs), 8)
    assert weights.min() >= 0 and ((weights > 0).sum(-1) <= 2).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(weights @ np.linspace(0.0, 4.0, 8), np.clip(obs, 0.0, 4.0), atol=1e-5)
    np.testing.assert_array_equal(spread[:len(obs)], np.array(obs, np.float32))


def test_spread_holds_a_lidars_whole_range():
    """Nothing seen lies on the first bin, a hazard at distance 0 between the last two, nearer to the last."""
    ends = transform_obs(np.array([0.0, 1.0]), np.zeros(2), np.ones(2))
    far, near = np.asarray(spread_obs(BINS, jnp.asarray(ends, jnp.float32)))[2:].reshape(2, 8)
    assert far[0] == 1.0 and 0.5 < near[-1] < 1.0


def test_the_encoder_gets_the_spread_observations():
    """Against the NumPy networks, which are given what `spread_obs` makes of an observation."""
    model = random_agent(BINS, 3, 2).model
    assert model["encoder"][0]["w"].shape == (27, BINS.enc_dim)
    obs = np.array([[0.4, 2.2, -1.0], [3.9, 0.0, 1.5]], np.float32)
    out, last = np_mlp(model["encoder"], np.asarray(spread_obs(BINS, obs))), float64(model["encoder"][-1])
    expected = np_simnorm(np_layer_norm(out, last["scale"], last["shift"]), BINS.simnorm_dim)
    np.testing.assert_allclose(encode(BINS, model, obs), expected, rtol=2e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Costs as expectations
# ----------------------------------------------------------------------------------------------------------------------
def test_bins_by_hand():
    """From 0 to action_repeat / (1 - gamma_c), evenly spaced in log(1 + c)."""
    bins = cost_bins(small_args(num_bins=3, action_repeat=4, cost_gamma=0.5))
    np.testing.assert_allclose(bins, [0.0, 2.0, 8.0], atol=1e-12)
    weights = cost_two_hot(small_args(num_bins=3, action_repeat=4, cost_gamma=0.5, cost_read_out="expectation"),
                           jnp.array([0.0, 0.5, 2.0, 3.5, 8.0, 11.0, -1.0]))
    np.testing.assert_allclose(weights, [[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1], [0, 0, 1],
                                         [1, 0, 0]], atol=1e-7)


@pytest.mark.parametrize("cost_gamma", [0.0, 0.95, 0.997])
def test_the_expectation_of_two_hot_weights_is_the_number(cost_gamma):
    """To 1e-6 relative over the whole range, the smallest numbers and both ends included."""
    args = small_args(cost_read_out="expectation", cost_gamma=cost_gamma, num_bins=101)
    largest = args.action_repeat / (1 - cost_gamma)
    numbers = np.concatenate([[0.0, largest], np.geomspace(1e-6, largest, 3001), cost_bins(args)]).astype(np.float32)
    weights = np.asarray(cost_two_hot(args, jnp.asarray(numbers)), np.float64)
    assert weights.min() >= 0 and ((weights > 0).sum(-1) <= 2).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights @ cost_bins(args), np.minimum(numbers, largest), rtol=1e-6)
    np.testing.assert_allclose(cost_read_out(args, jnp.log(jnp.asarray(weights, jnp.float32))), numbers, rtol=3e-6)


def test_symlog_is_as_for_rewards():
    args, numbers = small_args(), jnp.array([0.0, 0.7, 25.0])
    np.testing.assert_array_equal(cost_two_hot(args, numbers), two_hot(numbers, args.num_bins, args.bin_limit))
    logits = jax.random.normal(jax.random.key(0), (4, args.num_bins))
    np.testing.assert_array_equal(cost_read_out(args, logits), spowl.read_out(logits, args.bin_limit))


@pytest.mark.parametrize("how, expected", [("expectation", 0.25), ("symlog", math.expm1(0.05 * math.log(6.0)))])
def test_a_rare_cost_is_learned_as_its_mean(how, expected):
    """A cost of 5 at 5%: the cross-entropy's minimum reads 0.25, and 0.09 where the mean is taken in symlog space."""
    args = dataclasses.replace(EXPECTATION, cost_read_out=how)
    target = cost_two_hot(args, jnp.array([5.0] + [0.0] * 19))
    logits, optimizer = jnp.where(target.sum(0) > 0, 0.0, -20.0), optax.adam(0.05)  # bins that no cost ever touches

    def step(state, _):
        grads = jax.grad(lambda logits: cross_entropy(logits, target).mean())(state[0])
        updates, opt = optimizer.update(grads, state[1])
        return (state[0] + updates, opt), None

    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), length=1000)
    assert cost_read_out(args, logits) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("cost_gamma", [0.95, 0.997])
def test_costs_start_at_zero(cost_gamma):
    """Whatever the latent and the action, every head of cost and Qc reads nearly 0; the targets too."""
    args = dataclasses.replace(EXPECTATION, cost_gamma=cost_gamma)
    agent = jax.jit(init_agent, static_argnums=(0, 2, 3))(args, jax.random.key(0), 6, 2)
    z = encode(args, agent.model, np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32))
    for layers in (agent.model["cost"], agent.model["qc"], agent.target["qc"]):
        read = cost_heads(args, layers, z, jnp.ones((20, 2)))
        assert read.shape == (layers[0]["b"].shape[0], 20) and float(read.max()) < 0.01
        bins = np.asarray(cost_bins(args), float)
        weights = np.where(bins > 0, math.exp(-10) / (1 + bins), 1.0)
        np.testing.assert_allclose(read, weights @ bins / weights.sum(), rtol=2e-3)


def says(layers, probabilities):
    """An ensemble that answers anything with these."""
    last = jax.tree.map(jnp.zeros_like, layers[-1])
    return *layers[:-1], last | {"b": last["b"] + jnp.log(jnp.array(probabilities))}


def test_every_reader_takes_costs_as_expectations(monkeypatch):
    """Bins 0, 2, 8: cost heads that say 1/2, 1/4, 1/4 read 2.5, Qc of 1/4, 1/2, 1/4 reads 3. A plan of two steps at a
    discount of 1/2 costs 2.5 + 1.25 + 0.75 = 4.5; the violation is 3 - 0.1. (By symlog: less than 0.)"""
    args = small_args(cost_read_out="expectation", num_bins=3, action_repeat=4, cost_gamma=0.5, horizon=2)
    agent = random_agent(args, 3, 2)
    model = agent.model | {"cost": says(agent.model["cost"], [0.5, 0.25, 0.25]),
                           "qc": says(agent.model["qc"], [0.25, 0.5, 0.25])}
    zs, mask, number, compared = jnp.full((3, 8, 16), 0.125), jnp.ones((3, 8)), jnp.float32(0.1), []
    monkeypatch.setattr(spowl, "prefer_plan", lambda *values: compared.extend(values[3:5]) or jnp.array(True))

    @jax.jit
    def read(keys):
        _, costs = spowl.evaluate_plans(args, model, agent.policy, zs[0, 0], jnp.zeros((2, 4, 2)), keys[0])
        *_, metrics = spowl.policy_loss(agent.policy, args, model, zs, mask, number, number, number, keys[1])[1]
        spowl.decide(args, model, agent.policy, zs[0, 0], jnp.zeros((2, 2)), keys[2], False)
        return costs, metrics["lagrangian/violation"], jnp.stack(compared)

    costs, violation, compared = read(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_allclose(costs, 4.5, rtol=1e-5)
    assert violation == pytest.approx(2.9, rel=1e-5)
    np.testing.assert_allclose(compared, 3.0, rtol=1e-5)  # the plan's and the policy's Qc
    one_step, qc = spowl.read_costs(args, model, np.ones((5, 3), np.float32), np.zeros((5, 2), np.float32))
    np.testing.assert_allclose([one_step, qc], [[2.5] * 5, [3.0] * 5], rtol=1e-5)


def test_bootstrapping_does_not_drift():
    """Iterating c + gamma_c x (read-out of the target) at gamma_c = 0.997 ends at c / (1 - gamma_c): a step of two-hot
    and read-out is exact, where weights taken in log space would add up to 4% each time and diverge."""
    args = dataclasses.replace(EXPECTATION, cost_gamma=0.997)
    step = jax.jit(lambda x: cost_read_out(args, jnp.log(cost_two_hot(args, jnp.array([0.3, 0.0, 1.0]) + 0.997 * x))))
    value = jnp.zeros(3)
    for _ in range(6000):
        value = step(value)
    np.testing.assert_allclose(value, [100.0, 0.0, 333.333], rtol=1e-3, atol=1e-6)


def test_a_constant_cost_is_learned_as_its_sum():
    """The whole update on states that always cost 2 of at most 5: Qc = 2 / (1 - 0.6) = 5, of at most 12.5."""
    args = small_args(cost_read_out="expectation", cost_gamma=0.6, num_bins=41, learning_rate=1e-2, enc_lr_scale=1.0,
                      tau=0.2, batch_size=32, horizon=1, num_q=1, num_qc=2, lagrangian_heads=2, buffer_size=200)
    rng, ones = np.random.default_rng(0), np.ones(2, np.float32)
    buffer, obs = spowl.init_buffer(args, 3, 2), rng.normal(size=(2, 3)).astype(np.float32)
    for _ in range(100):
        following, action = rng.normal(size=(2, 3)).astype(np.float32), rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        buffer = spowl.add(buffer, Transition(obs, action, 0 * ones, 2.0 * ones, following, 0 * ones, 0 * ones))
        obs = following
    agent = jax.jit(init_agent, static_argnums=(0, 2, 3))(args, jax.random.key(0), 3, 2)
    for _ in range(6):
        agent, _ = update_many(args, agent, buffer, 100)
    z = encode(args, agent.model, rng.normal(size=(30, 3)).astype(np.float32))
    np.testing.assert_allclose(cost_heads(args, agent.model["qc"], z, jnp.zeros((30, 2))), 5.0, atol=0.05)
    np.testing.assert_allclose(cost_heads(args, agent.model["cost"], z, jnp.zeros((30, 2))), 2.0, atol=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# The multiplier's pace
# ----------------------------------------------------------------------------------------------------------------------
def schedule(**flags):
    """Multiplier and penalty at each twentieth of a run under a constant violation of 3."""
    args = Args(**flags)
    updates = round(args.total_timesteps / args.action_repeat * args.updates_per_step)
    step = lambda state, _: (augmented_lagrangian(args, 3.0, *state)[1:], state)
    state = jnp.float32(args.lambda_init), jnp.float32(args.mu_init * pace(args))
    multiplier = jax.lax.scan(step, state, length=updates)[1][0]
    return np.asarray(multiplier)[::updates // 20][1:]


def test_runs_of_any_length_trace_the_same_multiplier():
    whole, flags = schedule(total_timesteps=500_000), dict(mu_init=5e-9, mu_growth=5e-6)
    for shorter in (dict(total_timesteps=50_000), dict(total_timesteps=100_000, updates_per_step=0.25)):
        np.testing.assert_allclose(schedule(**shorter, **flags), whole, rtol=0.01)
    growth = 5e-9 * 1e6 * np.expm1(5.0 * np.arange(1, 20) / 20) / 5.0  # of mu = mu_0 e^(5 t), integrated
    np.testing.assert_allclose(whole, 1e-6 + 3.0 * growth, rtol=0.01)


def test_the_pace_of_the_defaults_is_one():
    assert pace(Args()) == 1.0
    assert pace(Args(total_timesteps=300_000, updates_per_step=0.5)) == pytest.approx(1e6 / 30_000)
    assert [pace(Args(action_repeat=repeat)) for repeat in (1, 10)] == pytest.approx([0.2, 2.0])  # 5M, 500k updates
    args = small_args(total_timesteps=500_000)
    agent = jax.jit(lambda key: init_agent(args, key, 3, 2)._replace(model=0, policy=0))(jax.random.key(0))
    assert (float(agent.penalty), float(agent.scale)) == pytest.approx((5e-8, 1.0))
    args = small_args(total_timesteps=500, mu_init=0.5)  # a thousand times 0.5, but for its cap
    assert jax.jit(lambda key: init_agent(args, key, 3, 2).penalty)(jax.random.key(0)) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Presets, planning depth
# ----------------------------------------------------------------------------------------------------------------------
def test_a_flag_beats_the_preset_also_with_the_papers_value():
    assert parse_args(["--preset", "paper"]) == parse_args([]) == Args()
    laptop = parse_args(["--preset", "laptop"])
    assert laptop == Args(preset="laptop", **PRESETS["laptop"]) and problems(laptop) == []
    given_flags = parse_args(["--cost-gamma", "0.997", "--preset", "laptop", "--obs-transform", "raw", "--seed", "4"])
    assert given_flags == dataclasses.replace(laptop, cost_gamma=0.997, obs_transform="raw", seed=4)


@pytest.mark.parametrize("depth, expected", [(None, 3), (1, 1), (6, 6)])
def test_planning_depth(depth, expected):
    """The planner looks --plan-horizon steps ahead; what training samples still spans --horizon."""
    args = small_args(plan_horizon=depth)
    actor, buffer = init_actor(args, jax.random.key(1), 2), spowl.init_buffer(args, 5, 2)
    assert actor.plan_mean.shape == (2, expected, 2)
    agent = jax.eval_shape(lambda key: init_agent(args, key, 5, 2), jax.random.key(0))
    _, next_actor = jax.eval_shape(lambda *given: spowl.act(args, *given, True), agent, actor, jnp.ones((2, 5)),
                                   jnp.ones(2, bool))
    assert next_actor.plan_mean.shape == (2, expected, 2)
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spowl, "evaluate_plans", lambda args, model, policy, z, actions, key: (
            scored.append(actions.shape[0]), (jnp.zeros(actions.shape[1]), jnp.zeros(actions.shape[1])))[1])
        jax.eval_shape(lambda agent, z, key: spowl.plan(args, agent.model, agent.policy, z, actor.plan_mean[0], key),
                       agent, jnp.ones(args.latent_dim), jax.random.key(2))
    assert set(scored) == {expected} and spowl.sample(args, buffer._replace(size=jnp.int32(20)),
                                                      jax.random.key(3)).reward.shape == (3, args.batch_size)


# ----------------------------------------------------------------------------------------------------------------------
# What the critic knew
# ----------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_auc_by_brute_force(pairs):
    score, positive = np.array([pair[0] for pair in pairs], float), np.array([pair[1] for pair in pairs])
    wins = [float(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    if wins:
        assert auc(score, positive) == pytest.approx(np.mean(wins))
    else:
        assert math.isnan(auc(score, positive))


@pytest.mark.parametrize("terminated, expected", [(0, [1.0 + 0.5 * 0.5 * (2.0 + 0.5 * 8.0), 3.0, 6.0, 8.0]),
                                                  (1, [1.0 + 0.25 * 2.5, 1.25, 2.5, 1.0])])
def test_cost_to_go_by_hand(terminated, expected):
    """Costs 1, 0, 2, 1 at a discount of a half; a cut episode goes on with what stands for its last step (8)."""
    ended = np.array([0, 0, 0, terminated])
    np.testing.assert_allclose(cost_to_go(np.array([1.0, 0.0, 2.0, 1.0]), ended, 8.0, 0.5), expected)


def test_critic_metrics_by_hand(monkeypatch):
    """One episode: steps 3, 4 and 6 cost. Qc is made to read ten times the step's number, the cost head the step's."""
    cost = np.array([0, 0, 0, 1, 1, 0, 1, 0], np.float32)
    steps = np.arange(8, dtype=np.float32)
    played = Transition(steps[:, None], np.zeros((8, 1), np.float32), cost, cost, steps[:, None], 0 * cost,
                        np.eye(8, dtype=np.float32)[7])
    monkeypatch.setattr(spowl, "encode", lambda args, model, obs: obs)
    monkeypatch.setattr(spowl, "cost_heads", lambda args, factor, z, action: factor * z[None, :, 0])
    args = small_args(cost_gamma=0.5)
    metrics = critic_metrics(args, SimpleNamespace(model={"cost": 1.0, "qc": 10.0}), [{"played": played}])
    followed = np.array([0, 0, 0, 1, 1, 0, 1, 70.0])
    for t in reversed(range(7)):
        followed[t] += 0.5 * followed[t + 1]
    groups = {"inside": [4, 5, 7], "outside": [0, 1, 2, 3, 6], "before_1": [3, 6], "before_2": [2], "before_3": [1],
              "before_4": [0]}  # before step 6 lies step 5, which begins inside
    assert metrics.keys() == {"critic/cost_auc"} | {f"critic/{what}_{name}" for name in groups
                                                    for what in ("read", "followed")}
    assert metrics["critic/cost_auc"] == pytest.approx(np.mean([c > o for c in (3, 4, 6) for o in (0, 1, 2, 5, 7)]))
    for name, chosen in groups.items():
        assert metrics[f"critic/read_{name}"] == pytest.approx(10 * np.mean(chosen))
        assert metrics[f"critic/followed_{name}"] == pytest.approx(followed[chosen].mean())


def test_critic_metrics_of_episodes_without_cost():
    """Nothing to tell apart, no hazard: no AUC, and only what is outside."""
    args = small_args(cost_gamma=0.9)
    agent, zeros = random_agent(args, 3, 2), np.zeros(4, np.float32)
    obs, action = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    metrics = critic_metrics(args, agent, [{"played": Transition(obs, action, zeros, zeros, obs, zeros, zeros)}])
    assert metrics.keys() == {"critic/read_outside", "critic/followed_outside"}
