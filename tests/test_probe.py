"""Environments whose best policy and values are known: does the agent as a whole find them?

All tests here share one set of flags and sizes, so that each jitted function is compiled once."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spowl_continuous import (Args, Transition, act, add, encode, heads, init_actor, init_agent, init_buffer,
                              policy_sample, update_many)

E = 16
ARGS = Args(num_envs=E, buffer_size=500 * E, latent_dim=16, enc_dim=32, mlp_dim=32, num_bins=41, bin_limit=2.0, num_q=3,
            num_qc=3, num_c=2, lagrangian_heads=3, batch_size=64, num_samples=48, num_pi_trajs=12, num_elites=8,
            iterations=3, bootstrap_samples=100, horizon=2, gamma=0.6, cost_gamma=0.4, learning_rate=3e-3, tau=0.1,
            lambda_init=0.01, lambda_max=2.0, mu_init=0.02, cost_limit=0.02)
UPDATES = 50  # per call of update_many
pytestmark = pytest.mark.usefixtures("fast_file")


def batched(*columns):
    """Columns of a Transition as float32 arrays with one row for each environment."""
    return Transition(*(np.asarray(column, np.float32).reshape(shape)
                        for column, shape in zip(columns, ((E, 1), (E, 1), E, E, (E, 1), E, E))))


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------
def learned_values(rows, states):
    """Learn from those rows alone -> Q and Qc (K, S) of states (S,) under actions of the policy's range."""
    agent, buffer = init_agent(ARGS, jax.random.key(0), 1, 1), init_buffer(ARGS, 1, 1)
    for row in rows:
        buffer = add(buffer, row)
    for _ in range(10):
        agent, _ = update_many(ARGS, agent, buffer, UPDATES)
    z = encode(ARGS, agent.model, np.asarray(states, np.float32)[:, None])
    action = np.linspace(-0.5, 0.5, len(states), dtype=np.float32)[:, None]
    return heads(ARGS, agent.model["q"], z, action), heads(ARGS, agent.model["qc"], z, action)


def random_columns(seed, num_rows):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (num_rows, E)), rng.uniform(-1, 1, (num_rows, E))


@pytest.mark.long
def test_constant_reward_with_termination():
    """METHOD §3, Eq. 6: nothing is bootstrapped from a terminated state, so Q = r and Qc = c."""
    states, actions = random_columns(0, 60)
    ones = np.ones(E)
    rows = [batched(s, a, ones, 0.5 * ones, -s, ones, ones) for s, a in zip(states, actions)]
    q, qc = learned_values(rows, [-0.8, 0.0, 0.8])
    assert np.allclose(q, 1.0, atol=0.05) and np.allclose(qc, 0.5, atol=0.03)


@pytest.mark.long  # td_targets has it by hand
def test_constant_reward_with_truncation():
    """Bootstrapping goes on from a truncated state: Q = r / (1 - gamma) = 2.5, Qc = c / (1 - gamma_c) = 0.8333."""
    states, actions = random_columns(1, 61)
    ones = np.ones(E)
    rows = [batched(states[t], actions[t], ones, 0.5 * ones, states[t + 1], 0 * ones, ones * (t % 3 == 2))
            for t in range(60)]
    q, qc = learned_values(rows, [-0.8, 0.0, 0.8])
    assert np.allclose(q, 2.5, atol=0.15) and np.allclose(qc, 0.8333, atol=0.06)


@pytest.mark.long
def test_reward_and_cost_that_depend_on_the_observation():
    """One step each: reward is the sign of the state, its cost is 1 where the state is positive."""
    states, actions = random_columns(2, 120)
    states = np.sign(states)
    ones = np.ones(E)
    rows = [batched(s, a, s, s > 0, 0 * s, ones, ones) for s, a in zip(states, actions)]
    q, qc = learned_values(rows, [-1.0, 1.0])
    assert np.allclose(q, [-1.0, 1.0], atol=0.1) and np.allclose(qc, [0.0, 1.0], atol=0.1)


@pytest.mark.long  # td_targets has it by hand, the policy under a limit below shows that values are learned
def test_discounting_over_two_steps():
    """-1 -> 0 for nothing, 0 -> end for reward 1 and cost 1: Q = (gamma, 1), Qc = (gamma_c, 1)."""
    _, actions = random_columns(3, 120)
    ones = np.ones(E)
    rows = [batched(-ones, a, 0 * ones, 0 * ones, 0 * ones, 0 * ones, 0 * ones) if t % 2 == 0 else
            batched(0 * ones, a, ones, ones, ones, ones, ones) for t, a in enumerate(actions)]
    q, qc = learned_values(rows, [-1.0, 0.0])
    assert np.allclose(q, [0.6, 1.0], atol=0.06) and np.allclose(qc, [0.4, 1.0], atol=0.06)


# ----------------------------------------------------------------------------------------------------------------------
# A policy under a cost limit
# ----------------------------------------------------------------------------------------------------------------------
def pay(state, action):
    """Reward 2 s a: best at a = sign(s), where it averages 1. Cost 1 beyond |a| = 0.5: the best safe average is 0.5."""
    return 2.0 * state * action, np.abs(action) > 0.5


def pay_smoothly(state, action):
    """The same reward; cost a^2. Of all that cost c a step on average, a = sqrt(3 c) s earns most: sqrt(4 c / 3)."""
    return 2.0 * state * action, action**2


def learn(seed, agent, blocks=30, args=ARGS, pay=pay):
    """Act and learn in turns; episodes of five steps are truncated, every state is drawn anew."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.uniform(-1, 1, (E, 1)).astype(np.float32)
    actor, buffer = init_actor(ARGS, jax.random.key(seed + 100), 1), init_buffer(ARGS, 1, 1)
    state, is_first, zeros = draw(), np.ones(E, bool), np.zeros(E)
    for block in range(blocks):
        for step in range(10):
            action = draw()
            if block >= 2:
                action, actor = act(ARGS, agent, actor, state, is_first, True)
                action = np.asarray(action)
            next_state, is_first = draw(), np.full(E, step % 5 == 4)
            buffer = add(buffer, batched(state, action, *pay(state, action), next_state, zeros, is_first))
            state = draw() if step % 5 == 4 else next_state
        agent, _ = update_many(args, agent, buffer, UPDATES)
    return agent


def judge(agent, pay=pay):
    """Mean reward and mean cost of what is executed, of the policy's mean action and of the plan's mean, by name."""
    rng, actor = np.random.default_rng(7), init_actor(ARGS, jax.random.key(7), 1)
    paid = {"executed": [], "policy": [], "plan": []}
    for key in jax.random.split(jax.random.key(8), 20):
        state = rng.uniform(-1, 1, (E, 1)).astype(np.float32)
        executed, actor = act(ARGS, agent, actor, state, np.ones(E, bool), False)
        for name, action in (("executed", executed), ("policy", policy_mean(agent.model, agent.policy, state, key)),
                             ("plan", actor.plan_mean[:, 0])):
            paid[name].append(np.mean(pay(state, np.asarray(action)), axis=(1, 2)))
    return {name: np.mean(values, axis=0) for name, values in paid.items()}


@jax.jit
def policy_mean(model, policy, state, key):
    """The policy's mean action."""
    return policy_sample(ARGS, policy, encode(ARGS, model, state), key)[1]


def test_the_limit_is_kept_at_most_of_the_safe_reward():
    """METHOD §4-6: with a multiplier that grows fast, policy, plan and their choice stay where nothing costs and take
    most of what can be had there: 0.5."""
    paid = judge(learn(3, init_agent(ARGS, jax.random.key(3), 1, 1), 15))
    for reward, cost in paid.values():
        assert 0.36 < reward <= 0.52 and cost < 0.1, paid


@pytest.mark.long
def test_without_a_multiplier_the_unsafe_best_is_found():
    """The same agent whose multiplier stays near 0 takes the best action at its cost."""
    agent = init_agent(ARGS, jax.random.key(3), 1, 1)
    paid = judge(learn(3, agent._replace(multiplier=jnp.float32(0.0), penalty=jnp.float32(1e-9))))
    for reward, cost in paid.values():
        assert reward > 0.85 and cost > 0.85, paid


@pytest.mark.long  # test_the_limit_is_kept shows as much of the learning, test_budget of the controller
def test_a_budget_is_met_and_used():
    """--cost-budget: an episode of five steps may cost 1, so a step 0.2, and nearly all is earned that this cost can
    earn. (Under the cost above one seed of three was still at |a| = 1 after as long: beyond its jump nothing tells
    which way is cheaper.)"""
    args = dataclasses.replace(ARGS, cost_budget=1.0, updates_per_step=0.05)  # a block counts as 5,000 simulator steps
    agent = init_agent(args, jax.random.key(3), 1, 1)._replace(multiplier=jnp.float32(0.4))
    paid = judge(learn(3, agent, 30, args, pay_smoothly), pay_smoothly)
    for reward, cost in paid.values():
        assert 0.15 < cost < 0.25 and reward > 0.93 * np.sqrt(4 / 3 * cost), paid
