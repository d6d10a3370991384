"""METHOD §3-§4: one update of the agent, the two optimisers, and the scan over many updates."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_numpy, leaves_equal, np_latent, random_agent, small_args
from test_losses import ALIVE, dead_data_changed, make_batch

import spowl_continuous as spowl
from spowl_continuous import (Args, Transition, add, init_buffer, model_optimizer, policy_optimizer, sample, update,
                              update_many)

OBS, ACTIONS, H, B = 5, 2, 3, 6
ARGS = small_args(horizon=H, batch_size=B, num_bins=11, latent_dim=16, num_q=2, num_qc=3, num_c=2,
                  grad_clip=0.05, learning_rate=1e-3, enc_lr_scale=0.3, tau=0.07, dropout=0.25, mu_init=1e-3,
                  mu_growth=0.01, lambda_init=0.2, entropy_coef=1e-3, buffer_size=40, num_envs=2)
UPDATES = 5
LOSSES = "consistency", "reward", "cost", "value", "cost_value", "policy", "psi", "total"
LOGGED = [f"losses/{name}" for name in LOSSES] + [f"lagrangian/{name}" for name in ("lambda", "mu", "violation")]


def copy(tree):
    """Arrays that an update may take over."""
    return jax.tree.map(jnp.copy, tree)


def new_agent(**changes):
    return random_agent(dataclasses.replace(ARGS, **changes), OBS, ACTIONS, seed=11, spread=0.2)


def dataset(steps=20):
    """A ring with a little to learn: reward and cost follow from the action, episodes end now and then."""
    rng, buffer = np.random.default_rng(0), init_buffer(ARGS, OBS, ACTIONS)
    obs = rng.normal(size=(steps + 1, 2, OBS))
    for t in range(steps):
        action = rng.uniform(-1, 1, (2, ACTIONS))
        terminated, truncated = float(t % 7 == 6), float(t % 5 == 4)
        f32 = lambda x: jnp.asarray(x, jnp.float32)
        flat = lambda x: f32(np.broadcast_to(x, 2))
        reward, cost = np.sign(action[:, 0]), action[:, 1] > 0.3
        row = Transition(f32(obs[t]), f32(action), flat(reward), flat(cost), f32(obs[t + 1]), flat(terminated),
                         flat(max(terminated, truncated)))
        buffer = add(buffer, row)
    return buffer


def adam_moment(state):
    """The first moment of Adam: a tenth of the clipped gradient after one step from 0."""
    return optax.tree_utils.tree_get(state, "mu")


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


@pytest.fixture(scope="module")
def spied_update():
    """`update`, compiled, that also tells with what it called the two losses."""
    original_world, original_policy = spowl.world_model_loss, spowl.policy_loss

    def spy_world(model, args, batch, next_z, q_target, qc_target, keep_q, keep_qc):
        loss, (metrics, zs) = original_world(model, args, batch, next_z, q_target, qc_target, keep_q, keep_qc)
        return loss, (metrics | {"spy/world": {"next_z": next_z, "keep_q": keep_q, "keep_qc": keep_qc,
                                               "q_target": q_target, "qc_target": qc_target}}, zs)

    def spy_policy(policy, args, model, zs, mask, *numbers_and_key):
        loss, (*numbers, metrics) = original_policy(policy, args, model, zs, mask, *numbers_and_key)
        return loss, (*numbers, metrics | {"spy/policy": {"q": model["q"], "qc": model["qc"], "zs": zs, "mask": mask}})

    run = jax.jit(update, static_argnums=0)
    with pytest.MonkeyPatch.context() as patch:  # compiled here, in force nowhere else
        patch.setattr(spowl, "world_model_loss", spy_world)
        patch.setattr(spowl, "policy_loss", spy_policy)
        run(ARGS, new_agent(), make_batch()[0], jax.random.key(0))
    return run


@pytest.fixture(scope="module")
def one_update(spied_update):
    """An agent, a batch, the agent after one update on it, the metrics."""
    agent, batch = new_agent(), make_batch()[0]
    return agent, batch, *spied_update(ARGS, agent, batch, jax.random.key(0))


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------------------
def np_adam(grads, learning_rate, eps, clip):
    """Updates of Adam on a list of flat gradients, each clipped to that norm."""
    first, second, updates = 0.0, 0.0, []
    for step, grad in enumerate(grads, start=1):
        grad = grad * min(1.0, clip / np.linalg.norm(grad))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        updates.append(-learning_rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + eps))
    return updates


@pytest.mark.parametrize("is_model", [True, False])
def test_optimizers_against_numpy(is_model):
    """§3-§4: Adam at 3e-4 under a global norm of 20, eps 1e-8 for the model and 1e-5 for the policy; encoder x 0.3.
    Some gradients are so small that eps shows, one is so large that it is clipped."""
    optimizer, eps = (model_optimizer(Args()), 1e-8) if is_model else (policy_optimizer(Args()), 1e-5)
    flats = [np.array([1e-6, -3e-6, 2e-8, 4e-5]), np.array([0.3, -2.0, 0.1, 5.0]), np.array([300.0, -40.0, 9.0, 1e-3])]
    tree = lambda flat: {"encoder": jnp.array(flat[:2], jnp.float32), "reward": {"w": jnp.array(flat[2:], jnp.float32)}}
    state = optimizer.init(tree(np.zeros(4)))
    scale = np.array([0.3, 0.3, 1.0, 1.0]) if is_model else np.ones(4)
    for flat, expected in zip(flats, np_adam(flats, 3e-4, eps, 20.0), strict=True):
        updates, state = optimizer.update(tree(flat), state, tree(np.zeros(4)))
        got = np.concatenate([updates["encoder"], updates["reward"]["w"]])
        np.testing.assert_allclose(got, expected * scale, rtol=1e-4)


def test_gradients_are_clipped_each_on_their_own(one_update):
    """§3: both norms exceed the clip (0.05 here); what enters Adam has that norm, in the model and in the policy."""
    _, _, after, metrics = one_update
    assert metrics["losses/model_grad_norm"] > 0.05 and metrics["losses/policy_grad_norm"] > 0.05
    assert norm(adam_moment(after.model_opt)) == pytest.approx(0.1 * 0.05, rel=1e-3)
    assert norm(adam_moment(after.policy_opt)) == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_first_step_of_every_network(one_update):
    """§3: Adam's first step is the learning rate times g / (|g| + eps), for the encoder 0.3 of it."""
    agent, _, after, _ = one_update
    moments = adam_moment(after.model_opt)
    parts = {name: (agent.model[name], after.model[name], moments[name], 1e-8) for name in agent.model}
    parts["policy"] = agent.policy, after.policy, adam_moment(after.policy_opt), 1e-5
    for name, (old, new, moment, eps) in parts.items():
        rate = 1e-3 * (0.3 if name == "encoder" else 1.0)
        largest = 0.0
        for before, now, m in zip(*(jax.tree.leaves(x) for x in (old, new, moment)), strict=True):
            grad, moved = 10.0 * np.asarray(m, np.float64), np.asarray(now) - np.asarray(before)
            np.testing.assert_allclose(moved, -rate * grad / (np.abs(grad) + eps), atol=3e-7)
            largest = max(largest, np.abs(moved).max())
        assert largest == pytest.approx(rate, rel=0.05), name


# ----------------------------------------------------------------------------------------------------------------------
# One update
# ----------------------------------------------------------------------------------------------------------------------
def test_targets_move_by_tau(one_update):
    """§3: after the update, target <- target + tau (online - target), towards the new weights."""
    agent, _, after, _ = one_update
    for name in ("q", "qc"):
        leaves = (jax.tree.leaves(part[name]) for part in (agent.target, after.model, after.target))
        for old, online, new in zip(*leaves, strict=True):
            np.testing.assert_allclose(new, 0.93 * np.asarray(old) + 0.07 * np.asarray(online), atol=1e-6)
            assert not np.array_equal(old, new)


def test_targets_are_read_from_the_target_heads(spied_update):
    """Eq. 6: not from the online ones. Target heads that are sure of bin 6 of -10, -8, ..., 10 read e^2 - 1 = 6.38906,
    times gamma 6.22933; of bin 7 e^4 - 1 = 53.59815, times gamma_c 53.43736."""
    agent, batch = new_agent(), make_batch()[0]
    sure = lambda layers, k: (*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1]) | {
        "b": jnp.zeros_like(layers[-1]["b"]) + 50.0 * jnp.eye(11)[k]})
    agent = agent._replace(target={"q": sure(agent.target["q"], 6), "qc": sure(agent.target["qc"], 7)})
    spy = spied_update(ARGS, agent, batch, jax.random.key(0))[1]["spy/world"]
    going = 1.0 - np.asarray(batch.terminated)
    np.testing.assert_allclose(spy["q_target"], batch.reward + 6.22933 * going, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(spy["qc_target"], batch.cost + 53.43736 * going, rtol=1e-4, atol=1e-4)


def test_policy_is_trained_on_the_rollout_against_the_new_heads(one_update):
    """§4: the latents are those of the model's own step, Q and Qc are read after it; latents past an end are masked."""
    agent, batch, after, metrics = one_update
    spy = metrics["spy/policy"]
    assert leaves_equal({name: spy[name] for name in ("q", "qc")}, {name: after.model[name] for name in ("q", "qc")})
    latents = [np_latent(ARGS, agent.model["encoder"], np.asarray(batch.obs[0]))]
    for action in np.asarray(batch.action):
        latents.append(np_latent(ARGS, agent.model["dynamics"], latents[-1], action))
    np.testing.assert_allclose(spy["zs"], np.stack(latents), atol=1e-5)
    np.testing.assert_array_equal(spy["mask"], ALIVE)


def test_next_latents_come_from_the_online_encoder(one_update):
    """Eq. 5: h(s') with the current encoder, of the observation that the step led to."""
    agent, batch, _, metrics = one_update
    expected = np_latent(ARGS, agent.model["encoder"], np.asarray(batch.next_obs))
    np.testing.assert_allclose(metrics["spy/world"]["next_z"], expected, atol=1e-5)


def test_dropout_of_an_update(one_update):
    """§3: masks of Q and Qc are drawn apart, for every head and transition, 0 with the probability of the flag."""
    _, _, _, metrics = one_update
    q, qc = (np.asarray(metrics["spy/world"][name]) for name in ("keep_q", "keep_qc"))
    assert q.shape == (2, H * B, 16) and qc.shape == (3, H * B, 16)
    assert set(np.unique(q)) == set(np.unique(qc)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert len({mask.tobytes() for mask in (*q, *qc)}) == 5
    assert np.mean(np.concatenate([q, qc]) == 0) == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / (5 * H * B * 16)))


def test_counters_and_multiplier(one_update):
    """§4: num_updates counts, mu grows by 1 + nu, lambda moves by mu Delta, S from 1 stays near it; the key is kept."""
    agent, _, after, metrics = one_update
    assert (int(agent.num_updates), int(after.num_updates)) == (0, 1)
    assert after.penalty == pytest.approx(1e-3 * 1.01, rel=1e-5)
    assert after.multiplier == pytest.approx(0.2 + 1e-3 * float(metrics["lagrangian/violation"]), rel=1e-5)
    assert metrics["losses/q_scale"] == after.scale and leaves_equal(after.key, agent.key)
    assert 1.0 <= after.scale < 2.0 and metrics["losses/policy_grad_norm"] != metrics["losses/model_grad_norm"]


def test_policy_side_leaves_the_model_alone(spied_update, one_update):
    """§4: no gradient of the policy's loss reaches the model: with another lambda, mu and S its step is the same."""
    agent, batch, after, _ = one_update
    other = agent._replace(multiplier=jnp.float32(5.0), penalty=jnp.float32(0.3), scale=jnp.float32(40.0))
    changed, _ = spied_update(ARGS, other, batch, jax.random.key(0))
    for part in ("model", "target", "model_opt"):
        assert leaves_equal(getattr(changed, part), getattr(after, part))
    assert not leaves_equal(changed.policy, after.policy)
    assert changed.scale - after.scale == pytest.approx(0.99 * 39, abs=0.005)  # S goes on from where it was


def test_update_ignores_what_lies_past_an_end(spied_update, one_update):
    """§2: other data past the ends of the batch's episodes gives the same agent to the last bit."""
    agent, batch, after, metrics = one_update
    changed = dead_data_changed(*make_batch())[0]
    assert not leaves_equal(batch, changed)
    same, same_metrics = spied_update(ARGS, agent, changed, jax.random.key(0))
    assert leaves_equal(same, after)
    assert leaves_equal({name: metrics[name] for name in LOGGED}, {name: same_metrics[name] for name in LOGGED})
    alive = batch._replace(reward=batch.reward.at[0, 1].add(1.0))
    assert not leaves_equal(spied_update(ARGS, agent, alive, jax.random.key(0))[0].model, after.model)


# ----------------------------------------------------------------------------------------------------------------------
# Many updates
# ----------------------------------------------------------------------------------------------------------------------
def test_scan_equals_a_loop(spied_update):
    """The scan is a loop of single updates, each with keys folded from the agent's key and its number."""
    agent, buffer, losses = new_agent(), dataset(), []
    scanned, metrics = update_many(ARGS, copy(agent), buffer, UPDATES)
    for number in range(UPDATES):
        key_sample, key_update = jax.random.split(jax.random.fold_in(agent.key, number))
        agent, one = spied_update(ARGS, agent, sample(ARGS, buffer, key_sample), key_update)
        losses.append({name: float(one[name]) for name in LOGGED})
    for ours, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(agent), strict=True):
        np.testing.assert_allclose(as_numpy(ours), as_numpy(expected), rtol=1e-3, atol=3e-5)
    for name in LOGGED:
        assert metrics[name] == pytest.approx(np.mean([one[name] for one in losses]), rel=1e-3, abs=1e-5)
    assert metrics["losses/param_norm"] == pytest.approx(norm((scanned.model, scanned.policy)), rel=1e-5)
    assert norm(scanned.policy) > 0.05 * norm(scanned.model)  # it would show if it were left out


def test_losses_fall_on_a_fixed_dataset_and_nothing_is_compiled_twice():
    """§3: what 40 transitions can teach is learned; metrics are finite and bear their tags; one compilation."""
    agent, buffer, history, compiled = new_agent(), dataset(), [], set()
    for _ in range(40):
        agent, metrics = update_many(ARGS, agent, buffer, UPDATES)
        history.append({name: float(value) for name, value in metrics.items()})
        compiled.add(update_many._cache_size())
    assert len(compiled) == 1  # the first call's compilation, if no other test made it, serves all
    assert set(LOGGED) <= set(metrics) and np.all(np.isfinite([list(one.values()) for one in history]))
    assert all(np.all(np.isfinite(as_numpy(x))) for x in jax.tree.leaves(agent))
    first, last = history[0], {name: np.mean([one[name] for one in history[-5:]]) for name in LOGGED}
    for name, factor in (("reward", 0.5), ("cost", 0.5), ("consistency", 0.7), ("total", 0.7), ("cost_value", 0.9)):
        assert last[f"losses/{name}"] < factor * first[f"losses/{name}"], name
    assert int(agent.num_updates) == 40 * UPDATES
    assert agent.penalty == pytest.approx(1e-3 * 1.01 ** (40 * UPDATES), rel=1e-3)


def test_update_many_takes_the_agent_over():
    """The old agent is given up, its memory reused; the buffer is not."""
    agent, buffer = new_agent(), dataset()
    update_many(ARGS, agent, buffer, UPDATES)
    assert all(x.is_deleted() for x in jax.tree.leaves(agent.model) + jax.tree.leaves(agent.model_opt))
    assert not any(x.is_deleted() for x in jax.tree.leaves(buffer))


def test_an_update_keeps_the_types_of_a_fresh_agent():
    """So that the first call's compilation serves the second: shapes, dtypes and weak types do not change."""
    fresh = jax.eval_shape(partial(spowl.init_agent, ARGS, obs_dim=OBS, action_dim=ACTIONS), jax.random.key(0))
    after, _ = jax.eval_shape(partial(update, ARGS), fresh, make_batch()[0], jax.random.key(0))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), tree)
    assert kinds(after) == kinds(fresh)


def test_updates_use_different_batches():
    """Each update has keys of its own: the second call of one agent does not repeat the first."""
    agent, buffer = new_agent(), dataset()
    first, _ = update_many(ARGS, copy(agent), buffer, UPDATES)
    again, _ = update_many(ARGS, copy(agent), buffer, UPDATES)
    later, _ = update_many(ARGS, copy(agent._replace(num_updates=jnp.int32(5))), buffer, UPDATES)
    assert leaves_equal(first, again)
    assert not leaves_equal(first.model, later.model)
