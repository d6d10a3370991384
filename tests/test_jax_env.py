"""docs/jax_environment.md: the environment by hand and by brute force; training in one compiled function, as the page
has it but for sizes. That it learns: python -m pytest -q -m long tests/test_jax_env.py"""
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import ROOT, example

sys.path.insert(0, str(ROOT / "benchmark"))

from hazards import Hazards

ENVIRONMENT = example("docs/jax_environment.md", "an environment in JAX")
TRAINING = example("docs/jax_environment.md", "training in JAX").partition("\ncycles = 40\n")[0]
SMALLER = {"num_envs=20": "num_envs=3", "buffer_size=100_000": "buffer_size=60", "latent_dim=64": "latent_dim=16",
           "enc_dim=64": "enc_dim=8", "mlp_dim=64": "mlp_dim=8", "batch_size=128": "batch_size=4",
           "num_samples=32": "num_samples=6, num_bins=21, bootstrap_samples=20", "num_pi_trajs=8": "num_pi_trajs=2",
           "num_elites=8": "num_elites=2", "iterations=3": "iterations=1"}


def page(changes):
    """The page's names, with these changes of its text."""
    code = ENVIRONMENT + TRAINING
    for given, less in changes.items():
        assert code.count(given) == 1, given
        code = code.replace(given, less)
    names = {}
    exec(compile(code, "docs/jax_environment.md", "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def no_check_of_keys():
    """JAX's check takes a key that `where` chooses for one used twice."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture(scope="module")
def small():
    return page(SMALLER)


def state_at(small, place, goal=(0.9, 0.9), hazards=((0.0, 0.0),) * 6, time=0):
    places = map(jnp.float32, (place, goal, hazards))
    return small["State"](*places, jnp.int32(time), jax.random.key(3))


# ----------------------------------------------------------------------------------------------------------------------
# The environment
# ----------------------------------------------------------------------------------------------------------------------
def test_a_reset_is_within_the_square(small):
    states = jax.vmap(small["reset"])(jax.random.split(jax.random.key(0), 200))
    places = np.concatenate([np.asarray(x).reshape(-1, 2) for x in (states.place, states.goal, states.hazards)])
    assert places.shape == (200 * 8, 2) and np.abs(places).max() <= 1.0 and len(np.unique(places, axis=0)) == 1600
    assert -0.95 > places.min() and places.max() > 0.95 and not states.time.any()


def test_the_lidar_by_brute_force(small):
    """A hazard is seen by the directions less than an eighth of a half turn away from it, the nearer the more."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        place, goal, hazards = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, (6, 2))
        expected = np.zeros(16)
        for hazard in hazards:
            x, y = hazard - place
            for k in range(16):
                apart = abs((np.degrees(np.arctan2(y, x)) - 22.5 * k + 180) % 360 - 180)
                if apart < 22.5:
                    expected[k] = max(expected[k], 1 - np.hypot(x, y))
        seen = small["observe"](state_at(small, place, goal, hazards))
        assert np.allclose(seen, [*place, *(goal - place), *expected], atol=1e-5)


def test_an_agent_step_by_hand(small):
    """Five moves of 0.02 to the right, straight to the goal and away from the hazard at the centre."""
    state, reward, cost, done = small["step"](state_at(small, (0.15, 0.0), (0.9, 0.0)), jnp.array([1.0, 0.0]))
    assert np.allclose(state.place, [0.25, 0.0]) and reward == pytest.approx(0.1, abs=1e-6)
    assert cost == 2.0  # at 0.17 and 0.19; 0.21 is outside
    assert int(state.time) == 5 and not done and np.array_equal(state.goal, np.float32([0.9, 0.0]))


def test_a_goal_that_is_reached_pays_1_and_moves(small):
    """At the third move of five, after 0.06 of way; the other two are 0.02 each, towards the next goal or away."""
    state, reward, _, _ = small["step"](state_at(small, (-0.15, 0.9), (0.0, 0.9)), jnp.array([1.0, 0.0]))
    assert not np.array_equal(state.goal, np.float32([0.0, 0.9])) and np.allclose(state.place, [-0.05, 0.9])
    assert abs(float(reward) - 1.06) < 0.041


def test_walls_and_the_end(small):
    state, _, _, done = small["step"](state_at(small, (0.99, -0.99), time=240), jnp.array([1.0, -1.0]))
    assert state.place.tolist() == [1.0, -1.0] and not done
    assert small["step"](state._replace(time=jnp.int32(245)), jnp.zeros(2))[3]


def test_the_twin_in_numpy_is_the_same_environment(small):
    """benchmark/hazards.py along 25 agent steps, each of five of its steps."""
    twin, rng, step, costs = Hazards(), np.random.default_rng(1), jax.jit(small["step"]), 0.0
    seen, _ = twin.reset(seed=3)
    state = state_at(small, twin.place, twin.goal, twin.hazards)
    for action in np.repeat(rng.uniform(-1, 1, (5, 2)), 5, 0):
        assert np.allclose(small["observe"](state), seen, atol=1e-5)
        state, reward, cost, _ = step(state, jnp.float32(action))
        answers = [twin.step(action) for _ in range(5)]
        seen, costs = answers[-1][0], costs + float(cost)
        assert reward == pytest.approx(sum(answer[1] for answer in answers), abs=1e-5)
        assert cost == sum(answer[2] for answer in answers)
    assert costs > 0


def test_the_twin_pays_1_for_a_goal():
    twin = Hazards()
    twin.reset(seed=0)
    twin.place, twin.goal = np.array([0.0, 0.9]), np.array([0.1, 0.9])
    _, reward, *_ = twin.step(np.array([1.0, 0.0]))
    assert reward == pytest.approx(1.02) and not np.array_equal(twin.goal, [0.1, 0.9])


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
CYCLES, LENGTH, KEY = 2, 60, jax.random.key(5)


@pytest.fixture(scope="module")
def trained(small):
    """Agent, returns and costs of cycles of 60 agent steps, in which one episode ends and one begins."""
    return jax.jit(partial(small["train"], cycles=CYCLES, length=LENGTH))(KEY)


def test_training_is_one_function_of_one_seed_or_several(small):
    one = jax.eval_shape(partial(small["train"], cycles=CYCLES), KEY)
    assert one[1].shape == one[2].shape == (CYCLES,)
    many = jax.eval_shape(jax.vmap(partial(small["train"], cycles=CYCLES)), jax.random.split(KEY, 4))
    assert many[1].shape == (4, CYCLES) and all(x.shape[:1] == (4,) for x in jax.tree.leaves(many[0]))


@pytest.mark.long
def test_one_function_does_what_a_loop_does(small, trained):
    """The same functions called one after another."""
    assert int(trained[0].num_updates) == CYCLES * int(LENGTH * 3 * 0.2)
    assert np.isfinite(trained[1]).all() and (np.asarray(trained[2]) >= 0).all()
    args, (key, agent, actor, env) = small["args"], jax.random.split(KEY, 4)
    carry = (small["init_actor"](args, actor, 2), small["init_buffer"](args, 20, 2),
             jax.vmap(small["reset"])(jax.random.split(env, 3)), jnp.ones(3, bool))
    agent, sums = small["init_agent"](args, agent, 20, 2), []
    one_step = jax.jit(small["agent_step"])
    for number in range(CYCLES):
        pay, dones = [], 0
        for each in jax.random.split(jax.random.fold_in(key, number), LENGTH):
            carry, paid = one_step(agent, number == 0, carry, each)
            pay.append(paid)
            dones += int(carry[-1].sum())
        sums.append([np.sum(x, 0).mean() for x in zip(*pay)])
        assert dones == 3
        agent, _ = small["update_many"](args, agent, carry[1], int(LENGTH * 3 * 0.2))
    assert np.allclose(sums[0], [x[0] for x in trained[1:]], rtol=1e-4)  # at random: no rounding is blown up
    assert np.allclose(agent.multiplier, trained[0].multiplier, rtol=1e-3)


@pytest.mark.long
def test_it_learns():
    """As written: goals are reached, and the cost comes down to the budget of 10 (at random: 40 and more)."""
    names = page({})
    _, returns, costs = jax.jit(names["train"], static_argnames="cycles")(jax.random.key(0), 40)
    assert np.mean(returns[-10:]) > 4 and np.mean(costs[-10:]) < 14
