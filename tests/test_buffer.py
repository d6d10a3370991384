"""METHOD §2: the replay ring, on transitions that carry their own number."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_args
from hypothesis import given, settings
from hypothesis import strategies as st

from spowl_continuous import Args, Transition, add, cut_episodes, init_buffer, sample

ENVS, CAPACITY = 3, 7
ARGS = small_args(num_envs=ENVS, buffer_size=23, batch_size=600, horizon=3)  # 23 // 3 = 7 rows
OFFSETS = {"obs": 0.1, "action": 0.2, "reward": 0.3, "cost": 0.4, "next_obs": 0.5, "terminated": 0.6}
draw = jax.jit(sample, static_argnums=0)


def numbered(t):
    """Agent step t of every environment; each field tells step and environment."""
    name = 1000.0 * np.arange(ENVS) + t
    wide = lambda field: jnp.asarray(np.stack([name + OFFSETS[field], -name], -1), jnp.float32)
    flat = lambda field: jnp.asarray(name + OFFSETS[field], jnp.float32)
    return Transition(wide("obs"), wide("action"), flat("reward"), flat("cost"), wide("next_obs"), flat("terminated"),
                      jnp.zeros(ENVS))


def filled(steps):
    buffer = init_buffer(ARGS, obs_dim=2, action_dim=2)
    for t in range(steps):
        buffer = add(buffer, numbered(t))
    return buffer


def test_empty_ring():
    """§2: capacity counts the transitions of all environments, rounded down to whole rows."""
    buffer = init_buffer(ARGS, obs_dim=5, action_dim=4)
    assert buffer.rows.obs.shape == buffer.rows.next_obs.shape == (CAPACITY, ENVS, 5)
    assert buffer.rows.action.shape == (CAPACITY, ENVS, 4)
    assert {x.shape for x in buffer.rows if x.ndim == 2} == {(CAPACITY, ENVS)}
    assert (int(buffer.head), int(buffer.size)) == (0, 0)
    shapes = jax.eval_shape(partial(init_buffer, Args(), obs_dim=60, action_dim=2))
    assert shapes.rows.obs.shape == (100_000, 10, 60)


@pytest.mark.parametrize("steps", [1, 6, 7, 8, 14, 25])
def test_add_overwrites_the_oldest(steps):
    """§2: a ring: row t modulo capacity holds the newest step written there, every field of it."""
    buffer = filled(steps)
    assert int(buffer.size) == min(steps, CAPACITY) and int(buffer.head) == steps % CAPACITY
    for t in range(max(0, steps - CAPACITY), steps):
        for rows, expected in zip(buffer.rows, numbered(t)):
            np.testing.assert_array_equal(rows[t % CAPACITY], expected)
    for row in range(steps, CAPACITY):
        assert not any(np.any(rows[row]) for rows in buffer.rows)


def test_add_is_in_place():
    """The old buffer is given up and its memory used again: no copy of a million transitions per step."""
    old = filled(2)
    places = [x.unsafe_buffer_pointer() for x in old.rows]
    new = add(old, numbered(2))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert [x.unsafe_buffer_pointer() for x in new.rows] == places


def check_sequences(batch, steps):
    """Every sequence is H consecutive steps of one environment, all fields agreeing; returns its (env, start)."""
    env, first = np.divmod(np.floor(np.asarray(batch.reward[0])).astype(int), 1000)
    for i in range(ARGS.horizon):
        for name, got in batch._asdict().items():
            got = np.asarray(got)[i, :, 0] if got.ndim == 3 else np.asarray(got)[i]
            expected = 1000 * env + first + i + OFFSETS[name] if name in OFFSETS else 0.0 * env
            np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert first.min() >= max(0, steps - CAPACITY) and first.max() + ARGS.horizon <= steps
    return set(zip(env.tolist(), first.tolist()))


@pytest.mark.parametrize("steps", [3, 4, 6, 7, 8, 10, 14, 20])
def test_sequences_never_straddle_the_write_head(steps):
    """§2: sequences are contiguous, of one environment, within what is stored; every legal start occurs."""
    batch = draw(ARGS, filled(steps), jax.random.key(steps))
    assert batch.obs.shape == (3, 600, 2) and batch.done.shape == (3, 600)
    starts = range(max(0, steps - CAPACITY), steps - ARGS.horizon + 1)
    assert check_sequences(batch, steps) == {(env, first) for env in range(ENVS) for first in starts}


@settings(max_examples=25)
@given(st.integers(3, 40), st.integers(0, 2**31 - 1))
def test_sequences_at_any_fill_level(steps, seed):
    check_sequences(draw(ARGS, filled(steps), jax.random.key(seed)), steps)


def test_sampling_is_uniform():
    """§2: each of 3 environments x 5 starts is drawn equally often: 3000 / 15 = 200, std 13.7."""
    buffer, counts = filled(11), {}
    for seed in range(5):
        reward = np.asarray(draw(ARGS, buffer, jax.random.key(seed)).reward[0])
        for value, count in zip(*np.unique(reward, return_counts=True)):
            counts[value] = counts.get(value, 0) + count
    assert len(counts) == 15
    assert min(counts.values()) > 200 - 5 * 13.7 and max(counts.values()) < 200 + 5 * 13.7


def test_environment_and_start_are_drawn_apart():
    """§2: neither tells the other."""
    batch = draw(ARGS, filled(7), jax.random.key(0))
    env, first = np.divmod(np.floor(np.asarray(batch.reward[0])), 1000)
    assert abs(np.corrcoef(env, first)[0, 1]) < 5 / np.sqrt(600)


@pytest.mark.parametrize("steps", [1, 5, 7, 8, 14, 15])
def test_cut_episodes_marks_the_newest_row_only(steps):
    """§2: what is added after a cut is not joined to what came before, in the environments that were cut; also right
    after the ring wrapped."""
    before = [np.asarray(x).copy() for x in filled(steps).rows]
    old = filled(steps)
    if ended := steps > 1:  # an end that is there already, in the environment that is not cut
        old = old._replace(rows=old.rows._replace(done=old.rows.done.at[(steps - 1) % CAPACITY, 1].set(1.0)))
    cut = np.arange(ENVS) != 1
    buffer = cut_episodes(old, cut)
    assert old.rows.done.is_deleted()
    assert (int(buffer.head), int(buffer.size)) == (steps % CAPACITY, min(steps, CAPACITY))
    expected = np.zeros((CAPACITY, ENVS))
    expected[(steps - 1) % CAPACITY, cut] = 1.0
    expected[(steps - 1) % CAPACITY, 1] = ended
    np.testing.assert_array_equal(buffer.rows.done, expected)
    for name, x, y in zip(Transition._fields, buffer.rows, before):
        assert name == "done" or np.array_equal(x, y)
    after = add(buffer, numbered(steps))
    np.testing.assert_array_equal(after.rows.done[steps % CAPACITY], np.zeros(ENVS))
