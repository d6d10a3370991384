"""METHOD §3: initialisation, MLPs and ensembles, latents, the policy's distribution."""
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (certain, fixed_policy, leaves_equal, np_heads, np_latent, np_mlp, np_policy, one_head,
                      random_agent, random_weights, small_args)
from hypothesis import given, settings
from hypothesis import strategies as st

from spowl_continuous import (Args, dropout_mask, encode, ensemble, heads, init_agent, init_mlp, mlp, next_latent,
                              policy_sample)

ARGS = small_args()
OBS, ACTIONS = 7, 3


compiled = partial(jax.jit, static_argnums=0)
draw_action, read_heads, step_latent = compiled(policy_sample), compiled(heads), compiled(next_latent)
run_mlp = jax.jit(mlp)


@pytest.fixture(scope="module")
def model():
    return random_agent(ARGS, OBS, ACTIONS, seed=0).model


@pytest.fixture(scope="module")
def policy():
    return random_agent(ARGS, OBS, ACTIONS, seed=0).policy


@pytest.fixture(scope="module")
def fresh():
    """All networks as they start, a little wider."""
    args = small_args(latent_dim=64, enc_dim=48, mlp_dim=64)
    agent = jax.jit(init_agent, static_argnums=(0, 2, 3))(args, jax.random.key(0), 30, 8)
    return {**agent.model, "policy": agent.policy, "target": agent.target}


def inputs(*lead, seed=0):
    """Latents and actions."""
    rng = np.random.default_rng(seed)
    z, action = rng.dirichlet(np.ones(8), (*lead, 2)).reshape(*lead, 16), rng.uniform(-1, 1, (*lead, ACTIONS))
    return jnp.asarray(z, jnp.float32), jnp.asarray(action, jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation
# ----------------------------------------------------------------------------------------------------------------------
def test_number_of_parameters():
    """§3: about 16.5 M at default sizes with the two target ensembles; counted by hand from the table of parts."""
    shapes = jax.eval_shape(partial(init_agent, Args(), obs_dim=60, action_dim=2), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves((shapes.model, shapes.policy, shapes.target)))

    def network(*sizes, norm_last=False):
        normed = sizes[1:] if norm_last else sizes[1:-1]
        return sum(i * o + o for i, o in zip(sizes[:-1], sizes[1:])) + 2 * sum(normed)

    head = network(514, 512, 512, 101)
    expected = (network(60, 256, 512, norm_last=True) + network(514, 512, 512, 512, norm_last=True) + head
                + 5 * (head + 2 * head + 2 * head) + network(512, 512, 512, 4))
    assert count == expected
    assert 16.4e6 < count < 16.6e6


def named_leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_initial_weights(fresh):
    """§3: truncated normal (+-2 sigma) x 0.02, biases 0; the last layers of reward, cost, Q and Qc 0."""
    for name, leaf in named_leaves(fresh).items():
        zero_last = any(f"['{part}'][2]" in name for part in ("reward", "cost", "q", "qc"))
        if zero_last or "'b'" in name or "'shift'" in name:
            assert np.all(leaf == 0.0), name
        elif "'scale'" in name:
            assert np.all(leaf == 1.0), name
        else:
            assert 0.038 < np.abs(leaf).max() <= 0.04, name
            error = 0.0176 * 4 / math.sqrt(leaf.size)  # 0.0176 = 0.02 x the std of a normal cut at 2 sigma
            assert abs(leaf.mean()) < error and abs(leaf.std() - 0.02 * 0.87963) < error, name


def test_which_layers_are_normed(fresh):
    """§3: every hidden layer, and the last one where the output is a latent."""
    for name in ("encoder", "dynamics", "reward", "cost", "q", "qc", "policy"):
        layers = fresh[name]
        assert len(layers) == (2 if name == "encoder" else 3)
        assert all("scale" in layer for layer in layers[:-1])
        assert ("scale" in layers[-1]) == (name in ("encoder", "dynamics"))
        assert ("w_action" in layers[0]) == (name not in ("encoder", "policy"))


def test_heads_start_apart_and_networks_too(fresh):
    """§3: no two heads and no two layers of one shape start with the same weights; the targets start as copies."""
    weights = [w for name, leaf in named_leaves(fresh).items() if "'w" in name and "target" not in name
               for w in (leaf if leaf.ndim == 3 else leaf[None]) if np.any(w)]
    assert len(weights) == 2 + 4 + 3 + 3 * (1 + 2 + 3 + 4)  # encoder, dynamics, policy, heads of reward, cost, Q, Qc
    assert len({w[:3, :3].tobytes() for w in weights}) == len(weights)
    assert leaves_equal(fresh["target"], {name: fresh[name] for name in ("q", "qc")})


def test_predictions_start_at_zero(fresh):
    """§3: zero last layers read out as 0 reward, cost, Q and Qc."""
    z, action = jnp.ones((5, 64)) / 8, jnp.ones((5, 8))
    for name, count in (("cost", 2), ("q", 3), ("qc", 4)):
        values = read_heads(ARGS, fresh[name], z, action)
        assert values.shape == (count, 5)
        np.testing.assert_allclose(values, 0.0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# MLPs and ensembles
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_mlp_equals_numpy_on_the_concatenation(model, lead):
    """§3: Linear -> LayerNorm -> Mish, the first layer on [z, a], no activation at the end."""
    z, action = inputs(*lead)
    out = run_mlp(model["reward"], z, action)
    assert out.shape == (*lead, ARGS.num_bins)
    np.testing.assert_allclose(out, np_mlp(model["reward"], np.asarray(z), np.asarray(action)), rtol=1e-4, atol=1e-5)


def test_mlp_without_action(policy):
    z, _ = inputs(2, 4)
    np.testing.assert_allclose(run_mlp(policy, z), np_mlp(policy, np.asarray(z)), rtol=1e-4, atol=1e-5)


def test_one_latent_against_many_actions(model):
    """§5: one row of z stands for all sequences at the first step."""
    z, action = inputs(6)
    repeated = jnp.tile(z[:1], (6, 1))
    step = partial(step_latent, ARGS, model)
    for function in (partial(run_mlp, model["reward"]), partial(read_heads, ARGS, model["q"]), step):
        one, many = (function(rows, action) for rows in (z[:1], repeated))
        assert one.shape == many.shape
        np.testing.assert_allclose(one, many, atol=1e-5)


@pytest.fixture(params=["cpu", "gpu"])
def run_ensemble(request, monkeypatch):
    """The ensemble as it is computed on either kind of device, head by head or all at once."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return jax.jit(lambda *inputs: ensemble(*inputs))


def test_ensemble_is_a_loop_over_heads(run_ensemble, model):
    """§3: K heads of the same input; their read-outs head by head."""
    z, action = inputs(2, 5)
    logits = run_ensemble(model["qc"], z, action)
    assert logits.shape == (4, 2, 5, ARGS.num_bins)
    for k in range(4):
        np.testing.assert_allclose(logits[k], run_mlp(one_head(model["qc"], k), z, action), atol=1e-5)
    expected = np_heads(ARGS, model["qc"], np.asarray(z), np.asarray(action))
    np.testing.assert_allclose(read_heads(ARGS, model["qc"], z, action), expected, rtol=1e-3, atol=1e-4)


def test_dropout_acts_on_the_first_linear_output_alone(run_ensemble, model):
    """§3: dropout after the first Linear, before its LayerNorm; each head has its own mask."""
    z, action = inputs(2, 5)
    keep = np.random.default_rng(0).choice([0.0, 1.5], (3, 10, ARGS.mlp_dim))
    logits = run_ensemble(model["q"], z, action, jnp.asarray(keep, jnp.float32))
    for k in range(3):
        expected = np_mlp(one_head(model["q"], k), np.asarray(z), np.asarray(action), keep[k])
        np.testing.assert_allclose(logits[k], expected, rtol=1e-4, atol=1e-5)
    plain = run_ensemble(model["q"], z, action)
    np.testing.assert_array_equal(run_ensemble(model["q"], z, action, jnp.ones(keep.shape)), plain)
    assert not np.allclose(logits, plain, atol=1e-2)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_dropout_mask(share):
    """§3: 0 with the given probability, else 1 / (1 - p), so that the mean is 1."""
    mask = np.asarray(dropout_mask(small_args(dropout=share), jax.random.key(0), (2, 200, 100)))
    assert set(np.unique(mask)) == {np.float32(0.0), np.float32(1.0 / (1.0 - share))}
    assert np.mean(mask == 0.0) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / mask.size))
    assert not np.array_equal(mask[0], mask[1])


# ----------------------------------------------------------------------------------------------------------------------
# Latents
# ----------------------------------------------------------------------------------------------------------------------
def test_latents_are_simplices_by_groups(model):
    """§3: encoder and dynamics end in Linear -> LayerNorm -> SimNorm with groups of 8."""
    obs = np.random.default_rng(0).normal(size=(2, 5, OBS)) * 3
    z, action = inputs(2, 5)
    latents = {"encoder": compiled(encode)(ARGS, model, jnp.asarray(obs)),
               "dynamics": step_latent(ARGS, model, z, action)}
    expected = {"encoder": np_latent(ARGS, model["encoder"], obs),
                "dynamics": np_latent(ARGS, model["dynamics"], np.asarray(z), np.asarray(action))}
    for name, latent in latents.items():
        assert latent.shape == (2, 5, 16) and np.asarray(latent).min() >= 0.0
        np.testing.assert_allclose(np.asarray(latent).reshape(2, 5, 2, 8).sum(-1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(latent, expected[name], atol=1e-5)
        assert np.asarray(latent).std() > 0.02


@settings(max_examples=4)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 4))
def test_latents_of_random_configurations(group, groups, obs_dim):
    args = small_args(latent_dim=group * groups, simnorm_dim=group, enc_dim=5)
    shapes = jax.eval_shape(partial(init_mlp, sizes=(obs_dim, 5, group * groups), norm_last=True), jax.random.key(0))
    model = {"encoder": random_weights(shapes, seed=2)}
    obs = np.random.default_rng(0).normal(size=(3, obs_dim))
    latent = compiled(encode)(args, model, jnp.asarray(obs))
    np.testing.assert_allclose(latent, np_latent(args, model["encoder"], obs), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Policy
# ----------------------------------------------------------------------------------------------------------------------
def log_density(action_before_tanh, mean, log_std):
    """log pi by change of variables in float64: a = tanh(u), log p(a) = log N(u) - log(1 - tanh(u)^2)."""
    u = np.asarray(action_before_tanh, np.float64)
    log_normal = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    log_slope = -2 * (np.abs(u) + np.log1p(np.exp(-2 * np.abs(u))) - np.log(2))  # -2 log cosh(u)
    return np.sum(log_normal - log_slope, -1)


def test_log_prob_from_the_action(policy):
    """§4: log pi with the tanh correction, recomputed from nothing but the action."""
    z, _ = inputs(1000)
    action, mean_action, log_prob = draw_action(ARGS, policy, z, jax.random.key(5))
    mean, log_std = np_policy(ARGS, policy, np.asarray(z))
    np.testing.assert_allclose(mean_action, np.tanh(mean), atol=1e-5)
    action = np.asarray(action, np.float64)
    assert action.shape == (1000, ACTIONS) and log_prob.shape == (1000,) and np.all(np.abs(action) <= 1.0)
    inner = np.all((np.abs(action) < 0.99), -1) & np.all(log_std > -5, -1)
    assert inner.sum() > 20
    expected = log_density(np.arctanh(action[inner]), mean[inner], log_std[inner])
    np.testing.assert_allclose(np.asarray(log_prob)[inner], expected, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("mean", [[0.0, 0.3], [12.0, -15.0], [60.0, -200.0]])
def test_log_prob_of_saturated_actions(mean):
    """§4: far out in tanh the log-prob stays finite and exact."""
    policy = fixed_policy(mean, [0.0, 0.5])
    action, mean_action, log_prob = draw_action(ARGS, policy, jnp.ones((9, 16)), jax.random.key(3))
    log_std = -10.0 + 6.0 * (np.tanh([0.0, 0.5]) + 1.0)
    noise = np.asarray(jax.random.normal(jax.random.key(3), (9, 2)), np.float64)
    before_tanh = np.array(mean) + np.exp(log_std) * noise
    np.testing.assert_allclose(action, np.tanh(before_tanh), atol=1e-6)
    np.testing.assert_allclose(mean_action, np.tile(np.tanh(mean), (9, 1)), atol=1e-6)
    assert np.all(np.isfinite(log_prob))
    np.testing.assert_allclose(log_prob, log_density(before_tanh, np.array(mean), log_std), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("low, high", [(-10.0, 2.0), (-3.0, -1.0)])
def test_log_std_bounds(low, high):
    """§3: log-std = low + (high - low) (tanh(x) + 1) / 2: low, middle and high for x = -inf, 0, inf."""
    args = small_args(log_std_min=low, log_std_max=high)
    raw = jnp.array([-1e4, 0.0, 1e4])
    noise = np.asarray(jax.random.normal(jax.random.key(2), (3000, 3)))
    mean = jnp.zeros(3)
    action, _, _ = draw_action(args, fixed_policy(mean, raw), jnp.ones((3000, 16)), jax.random.key(2))
    expected = np.exp([low, (low + high) / 2, high])
    np.testing.assert_allclose(action, np.tanh(noise * expected), atol=1e-6)
    np.testing.assert_allclose(np.std(np.arctanh(np.asarray(action, np.float64)[:, :2]), 0), expected[:2], rtol=0.06)


def test_samples_follow_the_policy():
    """§3: a = tanh(mean + std noise): the noise is standard normal, differs by row and by action."""
    policy = fixed_policy([0.2, -0.4], [0.5, 0.6])
    action, _, _ = draw_action(ARGS, policy, jnp.ones((4000, 16)), jax.random.key(4))
    log_std = -10.0 + 6.0 * (np.tanh([0.5, 0.6]) + 1.0)
    noise = (np.arctanh(np.asarray(action, np.float64)) - [0.2, -0.4]) / np.exp(log_std)
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=5 / math.sqrt(4000))
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=5 * math.sqrt(2 / 4000))


def test_certain_policy_acts_on_its_mean(policy):
    """§3: at the lower bound of the log-std sample and mean agree to e^-10."""
    action, mean_action, _ = draw_action(ARGS, certain(policy), inputs(7)[0], jax.random.key(6))
    np.testing.assert_allclose(action, mean_action, atol=3e-4)


def test_policy_gradient_is_reparameterised():
    """§4: at fixed noise d a / d mean = 1 - a^2 and d a / d log-std = (1 - a^2) std noise; log pi has one too."""
    @jax.jit
    def outputs(mean, raw):
        action, _, log_prob = draw_action(ARGS, fixed_policy([mean], [raw]), jnp.ones(16), jax.random.key(7))
        return jnp.stack([action[0], log_prob])

    noise = float(jax.random.normal(jax.random.key(7), (1,))[0])

    def expected(mean, raw):
        log_std = -10.0 + 6.0 * (np.tanh(raw) + 1.0)
        before_tanh = np.array([mean + np.exp(log_std) * noise])
        return np.array([np.tanh(before_tanh)[0], log_density(before_tanh, mean, log_std)])

    point, step = (0.4, 0.5), 1e-6
    np.testing.assert_allclose(outputs(*point), expected(*point), rtol=1e-5)
    by_mean, by_raw = jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(*point)
    numeric = (expected(0.4 + step, 0.5) - expected(0.4 - step, 0.5)) / (2 * step)
    np.testing.assert_allclose(by_mean, numeric, rtol=1e-4, atol=1e-6)
    numeric = (expected(0.4, 0.5 + step) - expected(0.4, 0.5 - step)) / (2 * step)
    np.testing.assert_allclose(by_raw, numeric, rtol=1e-4, atol=1e-6)
