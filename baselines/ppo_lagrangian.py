# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "safety-gymnasium==1.0.0",
#     "gymnasium==0.28.1",
#     "mujoco",
#     "numpy==2.3.5",
#     "pyyaml==6.0.3",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.6.0",
#     "pillow==12.3.0",
#     "jax==0.10.2",
#     "jaxlib==0.10.2",
#     "scipy==1.17.1",
#     "optax==0.2.8",
#     "tyro==1.0.16",
#     "tqdm==4.70.1",
#     "tensorboard==2.21.0",
# ]
# [tool.uv]
# override-dependencies = [  # safety-gymnasium asks for a MuJoCo and a pygame that have no wheels for these Pythons
#     "mujoco==3.1.6 ; python_version < '3.13'",
#     "mujoco==3.2.7 ; python_version == '3.13'",
#     "mujoco==3.8.0 ; python_version >= '3.14'",
#     "gymnasium-robotics ; sys_platform == 'never'",
#     "pygame ; sys_platform == 'never'",
# ]
# ///
"""PPO-Lagrangian: proximal policy optimisation (arXiv 1707.06347) under a cost limit, on Safety-Gymnasium.

One file, pure functions. On-policy: a Gaussian policy and two critics, V for reward and V_c for cost, learn from the
steps just taken. A Lagrange multiplier weighs cost against reward; it follows the mean cost of the last episodes by
Adam, or by a PID controller (arXiv 2007.03964).

    for every 20,000 simulator steps:
        for every agent step, all environments at once:
            step the simulator with a ~ pi(s) = N(mean(s), std), add the transition to the rollout
        J_c = mean cost of the last 100 finished episodes;  lambda rises where J_c > d, else falls
        A, A_c = generalised advantage estimates of reward and of cost
        up to 40 passes over the rollout, until KL(old pi, pi) > 0.02: for every minibatch
            one step of pi up the mean of min(ratio M, clip(ratio) M), M = (A - lambda A_c) / (1 + lambda)
            one step of V and of V_c towards the returns A + V, A_c + V_c
        mean and std of what was observed, by which the networks see the next rollout

Shapes: E environments, T agent steps of a rollout, N = T E transitions, B minibatch, W finished episodes,
O observation, A action. "Steps" are simulator steps unless called agent steps (one = `action_repeat` of them).

Shares with spowl_continuous.py what surrounds the method, and
    same: whole, Whole, LARGE, Count, Natural, Positive, NotNegative, Share - numbers on the command line
    same: transform_obs, bin_weights, OBS_BINS, OBS_LIMIT, spread_obs - observations
    same: Transition, Buffer, add, cut_episodes - the ring that holds a rollout
    same: cost_to_go, read_and_followed, in_chunks - what a cost critic knew
"""

import atexit
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
import zipfile
from collections import Counter
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------------------
def whole(words):
    """An integer, also written as 1e5."""
    if float(words[0]) % 1:
        raise ValueError("must be a whole number")
    return int(float(words[0]))


Whole = tyro.constructors.PrimitiveConstructorSpec(
    1, "INT", whole, lambda value: isinstance(value, int), lambda value: [str(value)])
LARGE = 1e300
Count = Annotated[int, Whole, (1, LARGE)]  # the range that a value must lie in
Natural = Annotated[int, Whole, (0, LARGE)]
Positive = Annotated[float, (1 / LARGE, LARGE)]
NotNegative = Annotated[float, (0.0, LARGE)]
Share = Annotated[float, (0.0, 1.0)]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is run, and what is written"""

    env_id: str = "SafetyPointGoal1-v0"
    """task of Safety-Gymnasium"""
    preset: Literal["paper"] = "paper"
    """values of all flags that are not given: there is one set"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's directory"""
    seed: Annotated[int, Whole, (0, 2**32 - 1)] = 1
    """seed of every random stream: networks, exploration, batches, environments"""
    total_timesteps: Count = 5_000_000
    """simulator steps of the whole run, all environments together"""
    runs_dir: str = "runs"
    """directory that receives the run's own directory"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "spowl"
    """project on Weights & Biases"""
    wandb_entity: str | None = None
    """team on Weights & Biases"""
    capture_video: bool = False
    """write an mp4 of one episode at every evaluation, seen by the camera that shows the whole scene"""
    resume: str | None = None
    """run directory to go on with: its flags are taken over, its newest checkpoint loaded"""
    evaluate: str | None = None
    """run directory whose newest checkpoint is evaluated, without training"""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Steps and environments"""

    num_envs: Count = 20
    """environments stepped in parallel, in as many processes as there are cores"""
    action_repeat: Count = 1
    """simulator steps per agent step; reward and cost are summed over them"""
    learning_starts: Natural = 0
    """always 0: the policy learns from its own actions alone, so there are no random ones at the start"""
    train_every: Count = 20_000
    """simulator steps of a rollout, all environments together; each rollout is learned from once"""
    obs_transform: Literal["raw", "log", "bins"] = "raw"
    """observations as the networks see them: raw; log, which spreads the near end of a lidar (see transform_obs); or
    bins: log, and each entry's weights on eight bins too (see spread_obs)"""
    env_timeout: Annotated[float, (1 / LARGE, 1e6)] = 60.0
    """seconds after which an environments' process without an answer counts as dead (at least 300 to start)"""
    eval_every: Natural = 500_000
    """simulator steps between evaluations, each followed by a checkpoint (0: only at the end)"""
    eval_episodes: Count = 10
    """whole episodes per evaluation, on environments and seeds of their own"""


@dataclasses.dataclass(frozen=True)
class Learning:
    """Policy and critics"""

    hidden: Count = 64
    """width of the two hidden layers of every network"""
    gamma: Share = 0.99
    """discount of reward per agent step"""
    cost_gamma: Share = 0.99
    """discount of cost per agent step"""
    gae_lambda: Share = 0.95
    """how far advantages trust what followed rather than the critics, for reward and cost alike"""
    epochs: Count = 40
    """most passes over a rollout"""
    batch_size: Count = 64
    """transitions per minibatch"""
    target_kl: Positive = 0.02
    """no further pass once the KL divergence from the policy that acted, summed over actions, exceeds this"""
    clip: Positive = 0.2
    """how far a ratio may leave 1 before it gains nothing more"""
    learning_rate: Positive = 3e-4
    """step size of Adam; the critics' stays, the policy's falls linearly to 0 over --total-timesteps"""
    grad_clip: Positive = 40.0
    """largest norm of a gradient, each network on its own"""
    critic_l2: NotNegative = 0.001
    """weight of the sum of squared parameters in a critic's loss"""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Cost limit"""

    cost_limit: float = 25.0
    """cost d that an episode may have, undiscounted"""
    cost_window: Count = 100
    """latest finished episodes W whose mean cost J_c is held against the limit"""
    multiplier: Literal["adam", "pid"] = "adam"
    """how lambda follows J_c - d: by Adam, or by a PID controller"""
    lambda_init: NotNegative = 0.001
    """first Lagrange multiplier; the PID controller's first integral"""
    lambda_lr: Positive = 0.035
    """step size of lambda's Adam"""
    pid_kp: NotNegative = 0.1
    """gain on the violation J_c - d, smoothed"""
    pid_ki: NotNegative = 0.01
    """gain on the sum of all violations, which is kept from falling below 0"""
    pid_kd: NotNegative = 0.01
    """gain on the rise of the smoothed J_c"""
    pid_smoothing: Share = 0.95
    """weight of what was before in the two smoothed values"""
    pid_delay: Count = 10
    """updates over which that rise is measured"""


@dataclasses.dataclass(frozen=True)
class Args(Constraint, Learning, Protocol, Experiment):
    """PPO-Lagrangian on Safety-Gymnasium: on-policy, a clipped policy gradient, a multiplier that follows the cost."""


GROUPS = (Experiment, Protocol, Learning, Constraint)


PRESETS = {"paper": {}}


def advice(args):
    """A line to begin a run on a CPU with, or ""."""
    return ""


def rules(args):
    """What must hold between flags: pairs of whether it does and what to say where it does not."""
    block, rollout = args.num_envs * args.action_repeat, args.train_every // args.action_repeat
    near = max(round(args.train_every / block), 1) * block
    return [
        ("/" not in args.exp_name, "--exp-name must not hold a slash: it becomes part of a directory's name"),
        (args.learning_starts == 0, "--learning-starts must be 0: the policy learns from its own actions alone"),
        (args.train_every % block == 0,
         f"--train-every must be a multiple of --num-envs x --action-repeat = {block}, for example {near}"),
        (args.total_timesteps % block == 0,
         f"--total-timesteps must be a multiple of --num-envs x --action-repeat = {block}"),
        (args.batch_size <= rollout,
         f"--batch-size must not exceed the {rollout} transitions of --train-every / --action-repeat"),
        (args.eval_every % args.train_every == 0, "--eval-every must be a multiple of --train-every"),
        (not (args.resume and args.evaluate), "--resume and --evaluate exclude each other"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Observations and networks: an MLP is a tuple of layers, each a dict of arrays
# ----------------------------------------------------------------------------------------------------------------------
def transform_obs(obs, low, high):
    """(..., O) and the bounds (O,) of the observation space -> what the networks see unless --obs-transform is raw.

    Entries in [0, 1], a lidar's 1 - distance / range, become -log(1.02 - x): the last tenth, where a hazard begins,
    gets half of the scale. Unbounded entries become symlog(x); others stay."""
    near = -np.log(1.02 - np.clip(obs, 0.0, 1.0))
    unbounded = np.sign(obs) * np.log1p(np.abs(obs))
    return np.where((low == 0.0) & (high == 1.0), near, np.where(np.isinf(low) & np.isinf(high), unbounded, obs))


def bin_weights(position, num_bins):
    """(...) -> (..., M): a position from 0 to M - 1 as weights on its two neighbouring bins."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(num_bins)))


OBS_BINS = 8
OBS_LIMIT = 4.0  # the bins span [0, 4], a lidar's range under --obs-transform log


def spread_obs(args, obs):
    """(..., O) -> what the encoder gets: (..., O), or under --obs-transform bins (..., 9 O), where the entries are
    followed by each one's weights on its two neighbouring bins.

    What begins at a distance is linear in these; from the one number a small network learns it far more slowly."""
    if args.obs_transform != "bins":
        return obs
    weights = bin_weights(jnp.clip(obs, 0.0, OBS_LIMIT) * ((OBS_BINS - 1) / OBS_LIMIT), OBS_BINS)
    return jnp.concatenate([obs, weights.reshape(*obs.shape[:-1], -1)], -1)


class Stats(NamedTuple):
    """Of all observations that were learned from."""

    count: jax.Array
    mean: jax.Array  # (O,)
    var: jax.Array  # (O,)


def add_to_stats(stats, obs):
    """The statistics with observations (..., O) joined to them."""
    obs = obs.reshape(-1, obs.shape[-1])
    mean, count = obs.mean(0), stats.count + len(obs)
    apart, share = mean - stats.mean, len(obs) / count
    var = stats.var + share * (obs.var(0) - stats.var + (1.0 - share) * apart**2)
    return Stats(count, stats.mean + share * apart, var)


def normalise(args, stats, obs):
    """(..., O) -> (..., I), what the networks get: (obs - mean) / std, the std at least 0.01, within [-5, 5]. Under
    --obs-transform bins the weights of the observation as it is follow, I = 9 O."""
    within = jnp.clip((obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 0.01), -5.0, 5.0)
    return jnp.concatenate([within, spread_obs(args, obs)[..., obs.shape[-1]:]], -1)


def init_mlp(key, sizes):
    """Layers for `sizes` = (input, hidden..., output): weights and biases uniform within 1 / sqrt(input)."""
    layers = []
    for key, n_in, n_out in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:]):
        drawn = jax.random.uniform(key, (n_in + 1, n_out), minval=-1.0, maxval=1.0) / math.sqrt(n_in)
        layers.append({"w": drawn[:-1], "b": drawn[-1]})
    return tuple(layers)


def mlp(layers, x):
    """(..., in) -> (..., out): Linear, tanh, ..., Linear."""
    linear = lambda layer, x: jnp.matmul(x, layer["w"], precision="highest") + layer["b"]  # a GPU rounds to 10 bits
    for layer in layers[:-1]:
        x = jnp.tanh(linear(layer, x))
    return linear(layers[-1], x)


def init_networks(args, key, obs_dim, action_dim):
    """The policy, the mean of a Gaussian by an MLP and one log_std (A,) for all states, and the critics V and V_c."""
    key_policy, key_value, key_cost_value = jax.random.split(key, 3)
    sizes = spread_obs(args, jnp.zeros(obs_dim)).size, args.hidden, args.hidden
    return {
        "policy": {"mean": init_mlp(key_policy, (*sizes, action_dim)), "log_std": jnp.zeros(action_dim)},
        "value": init_mlp(key_value, (*sizes, 1)),
        "cost_value": init_mlp(key_cost_value, (*sizes, 1)),
    }


def value(critic, obs):
    """(..., O) -> (...): V(s) or V_c(s) of a normalised observation."""
    return mlp(critic, obs)[..., 0]


def log_prob(policy, obs, action):
    """(..., O), (..., A) -> (...): log pi(a | s), of the action before the environment clips it."""
    scaled = (action - mlp(policy["mean"], obs)) * jnp.exp(-policy["log_std"])
    return jnp.sum(-0.5 * scaled**2 - policy["log_std"] - 0.5 * math.log(2.0 * math.pi), -1)


def divergence(policy, mean, log_std, obs):
    """KL of the policy from a Gaussian, mean over the states (N, O) and summed over actions:
    log(std_pi / std) + (std^2 + (mean - mean_pi)^2) / (2 std_pi^2) - 1/2."""
    apart, wider = mean - mlp(policy["mean"], obs), policy["log_std"] - log_std
    each = wider + 0.5 * (jnp.exp(-2.0 * wider) + apart**2 * jnp.exp(-2.0 * policy["log_std"]) - 1.0)
    return jnp.mean(jnp.sum(each, -1))


# ----------------------------------------------------------------------------------------------------------------------
# Rollout: a ring on the device, full when it is learned from
# ----------------------------------------------------------------------------------------------------------------------
class Transition(NamedTuple):
    """One agent step of every environment, or arrays of them with more leading axes."""

    obs: jax.Array  # (E, O)
    action: jax.Array  # (E, A)
    reward: jax.Array  # (E,)
    cost: jax.Array  # (E,)
    next_obs: jax.Array  # (E, O): the episode's own last observation where it ends, not the next episode's first
    terminated: jax.Array  # (E,): 1 where the task ended: nothing is bootstrapped
    done: jax.Array  # (E,): 1 where the episode ended, by termination or truncation


class Buffer(NamedTuple):
    """`rows` holds T agent steps of E environments; the next one is written at `head`, `size` of them are filled."""

    rows: Transition  # (T, E, ...)
    head: jax.Array
    size: jax.Array


def init_buffer(args, obs_dim, action_dim):
    """An empty ring for one rollout."""
    sizes = Transition((obs_dim,), (action_dim,), (), (), (obs_dim,), (), ())
    steps = args.train_every // (args.num_envs * args.action_repeat)
    return Buffer(Transition(*(jnp.zeros((steps, args.num_envs, *size)) for size in sizes)), jnp.int32(0), jnp.int32(0))


@partial(jax.jit, donate_argnames="buffer")
def add(buffer, transition):
    """Write one agent step of every environment, in place, over the oldest if the ring is full."""
    capacity = buffer.rows.reward.shape[0]
    rows = jax.tree.map(lambda rows, new: rows.at[buffer.head].set(new), buffer.rows, transition)
    return Buffer(rows, (buffer.head + 1) % capacity, jnp.minimum(buffer.size + 1, capacity))


@partial(jax.jit, donate_argnames="buffer")
def cut_episodes(buffer, cut):
    """Mark the newest row as an episode's end (a truncation) where `cut` (E,): what is added next cannot join it."""
    done = buffer.rows.done.at[buffer.head - 1].max(cut)
    return buffer._replace(rows=buffer.rows._replace(done=done))


# ----------------------------------------------------------------------------------------------------------------------
# Acting
# ----------------------------------------------------------------------------------------------------------------------
class Actor(NamedTuple):
    """What acting carries from one agent step to the next."""

    key: jax.Array
    step: jax.Array  # agent steps taken; the step's own key is folded from it
    metrics: dict  # name -> (E,): sums over agent steps since they were last set to zero


def init_actor(args, key, action_dim):
    """An actor at the start of a run."""
    return Actor(jnp.copy(key), jnp.int32(0), {"charts/balance": jnp.zeros(args.num_envs)})  # nothing is ever planned


@partial(jax.jit, static_argnames="args")
def act(args, agent, actor, obs, is_first, explore):
    """a ~ pi(s) for all environments at once: obs (E, O) -> action (E, A), next actor; the mean without `explore`.

    What leaves [-1, 1] is clipped by the environment; the transition keeps it as it was drawn."""
    policy = agent.networks["policy"]
    mean = mlp(policy["mean"], normalise(args, agent.stats, obs))
    noise = jnp.where(explore, jax.random.normal(jax.random.fold_in(actor.key, actor.step), mean.shape), 0.0)
    return mean + jnp.exp(policy["log_std"]) * noise, actor._replace(step=actor.step + 1)


# ----------------------------------------------------------------------------------------------------------------------
# What a rollout says: the cost of its episodes, the multiplier, advantages and returns
# ----------------------------------------------------------------------------------------------------------------------
def tally(so_far, finished, amount, done):
    """Sums over episodes: `so_far` (E,) of the unfinished ones, `finished` (W,) of the latest finished ones, the newest
    last and NaN where there were fewer -> both after the rows `amount`, `done` (T, E). Of the episodes that end at one
    step the first environment's is the oldest."""
    def step(total, row):
        total = total + row[0]
        return jnp.where(row[1] > 0, 0.0, total), total

    so_far, totals = jax.lax.scan(step, so_far, (amount, done))
    every = jnp.concatenate([finished, jnp.where(done > 0, totals, jnp.nan).ravel()])
    return so_far, every[jnp.argsort(~jnp.isnan(every))[-finished.size:]]  # finished ones last, in their order


class Multiplier(NamedTuple):
    value: jax.Array  # lambda
    adam: tuple  # state of its Adam
    integral: jax.Array  # of the PID controller
    violation: jax.Array  # J_c - d, smoothed
    cost: jax.Array  # (delay + 1,): J_c, smoothed, at the latest updates, the newest last


def init_multiplier(args):
    """lambda at the start of a run."""
    first, zero = jnp.float32(args.lambda_init), jnp.float32(0.0)
    costs = jnp.zeros(args.pid_delay + 1)
    return Multiplier(first, optax.adam(args.lambda_lr).init(first), jnp.copy(first), zero, costs)


def next_multiplier(args, multiplier, cost):
    """lambda after one look at J_c = `cost`; with NaN, before any episode has ended, it stays.

    Adam: one step up lambda (J_c - d). PID: kp P + ki I + kd D, P = J_c - d smoothed, I = the sum of J_c - d, kept at
    or above 0, D = the rise of the smoothed J_c, none where it falls. Both are kept at or above 0."""
    violation = cost - args.cost_limit
    if args.multiplier == "adam":
        step, adam = optax.adam(args.lambda_lr).update(-violation, multiplier.adam)
        following = multiplier._replace(value=jnp.maximum(multiplier.value + step, 0.0), adam=adam)
    else:
        smooth = lambda before, now: args.pid_smoothing * before + (1.0 - args.pid_smoothing) * now
        integral = jnp.maximum(multiplier.integral + args.pid_ki * violation, 0.0)
        smoothed = smooth(multiplier.violation, violation)
        costs = jnp.append(multiplier.cost[1:], smooth(multiplier.cost[-1], cost))
        rise = jnp.maximum(costs[-1] - costs[0], 0.0)
        following = Multiplier(jnp.maximum(args.pid_kp * smoothed + integral + args.pid_kd * rise, 0.0),
                               multiplier.adam, integral, smoothed, costs)
    return jax.tree.map(lambda new, old: jnp.where(jnp.isnan(cost), old, new), following, multiplier)


def advantages(args, gamma, amount, rows, now, following):
    """Generalised advantage estimates (T, E) of a reward or cost, from values (T, E) of states and of what they led to:
    A = delta + gamma lambda (1 - done) A', delta = r + gamma (1 - terminated) V(s') - V(s).

    Nothing is known of what follows the last row: there A' = 0, and V(s') stands for all of it."""
    delta = amount + gamma * (1.0 - rows.terminated) * following - now

    def step(later, row):
        advantage = row[0] + row[1] * later
        return advantage, advantage

    weight = gamma * args.gae_lambda * (1.0 - rows.done)
    return jax.lax.scan(step, jnp.zeros_like(delta[0]), (delta, weight), reverse=True)[1]


class Batch(NamedTuple):
    """What is learned from: N transitions, or arrays of them with more leading axes."""

    obs: jax.Array  # (N, O), normalised
    action: jax.Array  # (N, A)
    log_prob: jax.Array  # (N,): under the policy that acted
    advantage: jax.Array  # (N,): of reward, standardised
    cost_advantage: jax.Array  # (N,): of cost, centred
    target: jax.Array  # (N,): return that V is fitted to
    cost_target: jax.Array  # (N,)


def prepare(args, networks, stats, rows):
    """A rollout (T, E, ...), with the networks and statistics that acted -> Batch of its N transitions."""
    obs, next_obs = normalise(args, stats, rows.obs), normalise(args, stats, rows.next_obs)
    now, following, cost_now, cost_following = (
        value(networks[name], x) for name in ("value", "cost_value") for x in (obs, next_obs))
    advantage = advantages(args, args.gamma, rows.reward, rows, now, following)
    cost_advantage = advantages(args, args.cost_gamma, rows.cost, rows, cost_now, cost_following)
    batch = Batch(obs, rows.action, log_prob(networks["policy"], obs, rows.action),
                  (advantage - advantage.mean()) / (advantage.std() + 1e-8), cost_advantage - cost_advantage.mean(),
                  advantage + now, cost_advantage + cost_now)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def minibatches(args, batch, key):
    """A pass over the batch in random order, (N, ...) -> (N // B, B, ...); the few that are left over are left out."""
    count = batch.log_prob.size // args.batch_size
    order = jnp.argsort(jax.random.bits(key, batch.log_prob.shape))[:count * args.batch_size]  # sorts once
    return jax.tree.map(lambda x: x[order.reshape(count, args.batch_size)], batch)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------
def critic_loss(critic, args, obs, target):
    """mean (V(s) - return)^2 + critic_l2 times the sum of squared parameters."""
    squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(critic))
    return jnp.mean((value(critic, obs) - target) ** 2) + args.critic_l2 * squares


def value_loss(critic, args, batch):
    """V on the reward's returns -> loss, metrics."""
    loss = critic_loss(critic, args, batch.obs, batch.target)
    return loss, {"losses/value": loss}


def cost_value_loss(critic, args, batch):
    """V_c on the cost's returns -> loss, metrics."""
    loss = critic_loss(critic, args, batch.obs, batch.cost_target)
    return loss, {"losses/cost_value": loss}


def balanced(batch, multiplier):
    """The batch with the advantage of reward and cost together, (A - lambda A_c) / (1 + lambda)."""
    return batch._replace(advantage=(batch.advantage - multiplier * batch.cost_advantage) / (1.0 + multiplier))


def surrogate(policy, args, batch):
    """mean min(ratio A, clip(ratio) A), ratio = pi(a | s) / old pi(a | s) -> what the policy raises, share clipped."""
    ratio = jnp.exp(log_prob(policy, batch.obs, batch.action) - batch.log_prob)
    clipped = jnp.clip(ratio, 1.0 - args.clip, 1.0 + args.clip)
    return jnp.mean(jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)), jnp.mean(ratio != clipped)


def policy_loss(policy, args, batch):
    """Minus what the policy raises -> loss, metrics."""
    raised, clipped = surrogate(policy, args, batch)
    return -raised, {"losses/policy": -raised, "losses/clip_fraction": clipped}


LOSSES = {"policy": policy_loss, "value": value_loss, "cost_value": cost_value_loss}


# ----------------------------------------------------------------------------------------------------------------------
# Update
# ----------------------------------------------------------------------------------------------------------------------
class AgentState(NamedTuple):
    """Everything that learning changes."""

    networks: dict  # policy, value, cost_value
    optimizers: dict  # their states
    stats: Stats
    multiplier: Multiplier
    so_far: jax.Array  # (E,): cost of the unfinished episodes
    finished: jax.Array  # (W,): cost of the latest finished ones, NaN where there were fewer
    key: jax.Array
    num_updates: jax.Array  # rollouts learned from; each one's key is folded from it


def init_agent(args, key, obs_dim, action_dim):
    """A fresh agent for observations and actions of those sizes; `key` is a typed key (jax.random.key)."""
    key_networks, key_updates = jax.random.split(key)
    networks = init_networks(args, key_networks, obs_dim, action_dim)
    states = {name: optimizer(args).init(network) for name, network in networks.items()}
    return AgentState(networks, states, Stats(jnp.float32(0.0), jnp.zeros(obs_dim), jnp.ones(obs_dim)),
                      init_multiplier(args), jnp.zeros(args.num_envs), jnp.full(args.cost_window, jnp.nan, jnp.float32),
                      key=key_updates, num_updates=jnp.int32(0))


def optimizer(args):
    """Adam under a clipped norm; a network's parameters are one vector to it, which saves most of its time."""
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.learning_rate)))


def fit(args, loss, network, state, parts, pace):
    """A pass of one network over minibatches (N // B, B, ...), with a step of Adam, times `pace`, for each of them
    -> network, optimizer state, metrics averaged over them."""
    def step(carry, part):
        grad, metrics = jax.grad(loss, has_aux=True)(carry[0], args, part)
        change, state = optimizer(args).update(grad, carry[1])
        return (jax.tree.map(lambda x, by: x + pace * by, carry[0], change), state), metrics

    (network, state), metrics = jax.lax.scan(step, (network, state), parts)
    return network, state, jax.tree.map(jnp.mean, metrics)


def one_pass(args, networks, states, batch, key, pace):
    """A pass of all networks that have a loss over the same minibatches, the policy's steps times `pace` -> networks,
    optimizer states, metrics. Each has a scan of its own."""
    parts, networks, states, metrics = minibatches(args, batch, key), dict(networks), dict(states), {}
    for name, loss in LOSSES.items():
        networks[name], states[name], told = fit(
            args, loss, networks[name], states[name], parts, pace if name == "policy" else 1.0)
        metrics |= told
    return networks, states, metrics


def improve(args, agent, batch, key):
    """Passes over the batch until the policy has moved far enough -> networks, optimizer states, the last's metrics.

    The metrics say when to stop: how many passes there were, and the KL from the policy that acted."""
    pace = jnp.maximum(1.0 - agent.num_updates / max(updates_due(args, args.total_timesteps), 1), 0.0)
    policy = agent.networks["policy"]
    mean = mlp(policy["mean"], batch.obs)

    def again(carry):
        networks, states, metrics = carry
        passes = metrics["losses/epochs"]
        networks, states, metrics = one_pass(args, networks, states, batch, jax.random.fold_in(key, passes), pace)
        kl = divergence(networks["policy"], mean, policy["log_std"], batch.obs)
        return networks, states, metrics | {"losses/kl": kl, "losses/epochs": passes + 1}

    names = "policy", "value", "cost_value", "clip_fraction", "kl"
    metrics = {f"losses/{name}": jnp.float32(0.0) for name in names} | {"losses/epochs": jnp.int32(0)}
    return jax.lax.while_loop(
        lambda carry: (carry[2]["losses/epochs"] < args.epochs) & (carry[2]["losses/kl"] <= args.target_kl),
        again, (agent.networks, agent.optimizers, metrics))


def update(args, agent, rows, key):
    """All that is learned from one rollout, (T, E, ...) -> agent, metrics."""
    so_far, finished = tally(agent.so_far, agent.finished, rows.cost, rows.done)
    cost = jnp.nanmean(finished)
    multiplier = next_multiplier(args, agent.multiplier, cost)
    batch = balanced(prepare(args, agent.networks, agent.stats, rows), multiplier.value)
    networks, states, metrics = improve(args, agent, batch, key)
    log_std = networks["policy"]["log_std"]
    metrics |= {"lagrangian/lambda": multiplier.value, "lagrangian/cost": jnp.nan_to_num(cost),
                "lagrangian/violation": jnp.nan_to_num(cost - args.cost_limit),
                "losses/entropy": jnp.sum(log_std + 0.5 * math.log(2.0 * math.pi * math.e)),
                "losses/param_norm": optax.tree.norm(networks)}
    return AgentState(networks, states, add_to_stats(agent.stats, rows.obs), multiplier, so_far, finished, agent.key,
                      agent.num_updates + 1), metrics


@partial(jax.jit, static_argnames=("args", "num_updates"), donate_argnames="agent")
def update_many(args, agent, buffer, num_updates):
    """`num_updates` updates on the rollout in the buffer, its oldest row first -> agent, metrics averaged over them."""
    rows = jax.tree.map(lambda x: jnp.roll(x, -buffer.head, axis=0), buffer.rows)

    def step(agent, _):
        return update(args, agent, rows, jax.random.fold_in(agent.key, agent.num_updates))

    agent, metrics = jax.lax.scan(step, agent, length=num_updates)
    return agent, jax.tree.map(jnp.mean, metrics)


def updates_due(args, step):
    """Updates that belong to the first `step` simulator steps: one for every whole rollout."""
    return step // args.train_every


def action_size(agent):
    """A"""
    return agent.networks["policy"]["log_std"].size


# ----------------------------------------------------------------------------------------------------------------------
# Diagnostics: what was known of the costs
# ----------------------------------------------------------------------------------------------------------------------
def cost_to_go(cost, terminated, last, gamma):
    """(T,) -> (T,): the discounted cost that followed each step of an episode; `last` stands for that of the last step
    unless it terminated."""
    following = np.array(cost, np.float64)
    following[-1] = cost[-1] if terminated[-1] else last
    for t in reversed(range(len(cost) - 1)):
        following[t] += gamma * following[t + 1]
    return following


def read_and_followed(args, episodes, read):
    """Mean cost value read, (T,) of all episodes' steps, and mean discounted cost that followed: numbers by tag.

    critic/read_..., critic/followed_... in states inside what costs (the last step cost), outside, and before_k: k = 1
    to 5 agent steps before costs begin (before_1 is the first step that costs); none for what did not occur."""
    each = np.split(read, np.cumsum([len(episode["played"].cost) for episode in episodes])[:-1])
    groups = {name: ([], []) for name in ("inside", "outside", *(f"before_{k}" for k in range(1, 6)))}
    for values, played in zip(each, (episode["played"] for episode in episodes)):
        followed = cost_to_go(played.cost, played.terminated, values[-1], args.cost_gamma)
        costly = played.cost > 0
        inside = np.concatenate([[False], costly[:-1]])
        entered = np.flatnonzero(costly & ~inside)
        chosen = {"inside": inside, "outside": ~inside}
        for k in range(1, 6):  # k steps ahead nothing but the way to this entry
            chosen[f"before_{k}"] = [t - k + 1 for t in entered if t >= k - 1 and not inside[t - k + 1:t].any()]
        for name, where in chosen.items():
            groups[name][0].extend(values[where])
            groups[name][1].extend(followed[where])
    return {tag: np.mean(values) for name, both in groups.items()
            for tag, values in zip((f"critic/read_{name}", f"critic/followed_{name}"), both) if values}


def in_chunks(function, *arrays, size=1000):
    """function((N, X), ...) -> (N,), ..., called with `size` rows at a time: compiled once, whatever N is."""
    count, pad = len(arrays[0]), -len(arrays[0]) % size
    chunks = zip(*(np.split(np.pad(x, [(0, pad), (0, 0)]), (count + pad) // size) for x in arrays))
    return [np.concatenate(parts)[:count] for parts in zip(*(function(*chunk) for chunk in chunks))]


def critic_metrics(args, agent, episodes):
    """What V_c knew of the costs in evaluation episodes: numbers by tag (see read_and_followed)."""
    read = lambda obs: [value(agent.networks["cost_value"], normalise(args, agent.stats, obs))]
    (values,) = in_chunks(read, np.concatenate([episode["played"].obs for episode in episodes]))
    return read_and_followed(args, episodes, values)


# ----------------------------------------------------------------------------------------------------------------------
# From here on, what surrounds the method: the same text in every script (tools/sync.py writes it).
# Environments: a few processes, each with several of them
# ----------------------------------------------------------------------------------------------------------------------
def import_safety_gymnasium():
    """safety_gymnasium 1.0.0 on Python >= 3.11, NumPy 2 and MuJoCo 3; a gradient sky speeds reset() up 80 times."""
    plain_dataclass = dataclasses.dataclass

    def dataclass(cls=None, **options):  # Python >= 3.11 refuses arrays as defaults: every instance gets a copy instead
        for name, value in list(getattr(cls, "__dict__", {}).items()):
            if isinstance(value, np.ndarray):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        return plain_dataclass(cls, **options)

    robotics = types.ModuleType("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi")  # of a package for NumPy 1
    robotics.MultiAgentMujocoEnv = object
    sys.modules.setdefault(robotics.__name__, robotics)
    with mock.patch.object(dataclasses, "dataclass", dataclass):
        import safety_gymnasium
    import mujoco
    import yaml
    for name in {"texid", "texuniform", "texrepeat"} - {*dir(mujoco.MjvGeom)}:  # gymnasium 0.28 draws lidars with these
        setattr(mujoco.MjvGeom, name, property(lambda geom: [0, 0], lambda geom, value: None))
    # Every reset decodes six images of 4 MB for the sky, which the agent never sees: a gradient takes their place.
    assets = yaml.safe_load(Path(safety_gymnasium.__path__[0], "configs", "assets.yaml").read_text())
    sky = {"type": "skybox", "builtin": "gradient", "rgb1": ".3 .5 .7", "rgb2": "0 0 0", "width": "32", "height": "192"}
    assets["textures"]["skybox"] = {f"@{key}": value for key, value in sky.items()}
    safety_gymnasium.world.yaml = types.SimpleNamespace(load=lambda *_, **__: copy.deepcopy(assets), FullLoader=None)
    return safety_gymnasium


def episode_seed(seed, stream, env, episode):
    """Seed of one episode, a function of the run's seed, the stream (0 training, 1 evaluation) and two counters."""
    return int(np.random.SeedSequence((seed, stream, env, episode)).generate_state(1)[0])


def make_env(args, drawn):
    """One environment of the task, able to draw if `drawn`."""
    if drawn:
        os.environ.setdefault("MUJOCO_GL", "egl")
    options = {"render_mode": "rgb_array", "camera_name": "fixedfar", "width": 512, "height": 512} if drawn else {}
    return import_safety_gymnasium().make(args.env_id, **options)


def play(args, env, stream, index, episode):
    """An environment's episodes from that number on: a generator that is sent actions (A,) in [-1, 1] and yields the
    observation to act on (O,), its episode's number and, from the second time on, the agent step just taken as a
    Transition without leading axes, and its simulator steps. An episode that cannot begin counts as used."""
    (low, high), bounds = ((space.low, space.high) for space in (env.action_space, env.observation_space))
    see = lambda obs: np.array(obs if args.obs_transform == "raw" else transform_obs(obs, *bounds), np.float32)
    row, steps, failed = None, 0, 0
    while True:
        try:
            obs, done = see(env.reset(seed=episode_seed(args.seed, stream, index, episode))[0]), False
        except Exception as error:
            failed, done = failed + 1, True
            if failed == 10:
                raise
            print(f"episode {episode} of environment {index} left out:", str(error).partition("\n")[0], file=sys.stderr)
        while not done:
            action = yield obs, episode, row, steps
            bounded, reward, cost, failed = np.clip(low + 0.5 * (action + 1.0) * (high - low), low, high), 0.0, 0.0, 0
            for steps in range(1, args.action_repeat + 1):
                answer = env.step(bounded)
                if len(answer) != 6 or any(number is None for number in answer[1:3]):
                    raise ValueError("its step must return observation, reward, cost, terminated, truncated, info, not "
                                     + ", ".join(type(value).__name__ for value in answer))
                raw, more_reward, more_cost, terminated, truncated, _ = answer
                reward, cost, done = reward + float(more_reward), cost + float(more_cost), terminated or truncated
                if done:
                    break
            before, obs = obs, see(raw)
            if obs.shape != before.shape:
                raise ValueError(f"its observations must be of one shape, {before.shape}, not {obs.shape}")
            row = Transition(before, action, reward, cost, obs, terminated, done)
        episode += 1


def env_worker(pipe, args, stream, indices, drawn):
    """Body of a process that answers for the environments `indices` as `start_envs` says; what goes wrong, as text."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the parent decides when to stop
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whatever it is doing, it dies with its parent
    sys.unraisablehook = lambda _: None  # a viewer without a screen would print a traceback when it is deleted
    try:
        envs, playing = [make_env(args, drawn and index == 0) for index in indices], []
        shape, space = envs[0].observation_space.shape, envs[0].action_space
        bounds = [getattr(space, name, math.nan) for name in ("low", "high")]
        if np.ndim(bounds[0]) != 1 or not np.isfinite(bounds).all():
            raise ValueError(f"its actions must be flat vectors within finite bounds: {space}")
        seen = [env.reset(seed=0)[0] for env in envs if len(shape or ()) == 1]  # later ones depend on the seed alone
        if not seen or np.shape(seen[0]) != shape:
            raise ValueError(f"its observations must be flat vectors: {np.shape(seen[:1])[1:]} in a space of {shape}")
        if drawn and 0 in indices:
            envs[0].render()  # now, not at the first evaluation, is the time to fail
        pipe.send((shape[0], space.shape[0]))
        while True:
            command, values = pipe.recv()
            if command == "step":
                obs, episodes, rows, steps = zip(*(each.send(x) for each, x in zip(playing, np.float32(values))))
                rows = Transition(*(np.array(x, np.float32) for x in zip(*rows)))
                pipe.send((np.stack(obs), np.array(episodes), rows, np.array(steps)))
            elif command == "reset":
                playing = [play(args, env, stream, index, value[0]) for env, index, value in zip(envs, indices, values)]
                begun = [[next(each), *map(each.send, taken)][-1] for each, (_, taken) in zip(playing, values)]
                pipe.send(tuple(map(np.array, list(zip(*begun))[:2])))
            else:
                pipe.send(envs[0].render())
    except Exception as error:
        frames, here = traceback.extract_tb(error.__traceback__), env_worker.__code__.co_filename
        place = [f" ({frame.filename}, line {frame.lineno})" for frame in frames if frame.filename != here][-1:]
        pipe.send(f"{type(error).__name__}: {error}".partition("\n")[0] + "".join(place))


def start_envs(args, stream, num_envs, drawn=False, start_method="fork"):
    """That many environments in as many processes as there are cores -> ask, O, A. ChildProcessError if one cannot be
    made or, from `ask`, died, raised or gave no answer in time. Call it before JAX is used: fork copies no threads.

    ask("reset", [(episode, actions), ...]) begins each environment's episode and takes those actions (T_i, A) in it ->
    obs (E, O), episodes (E,); on the same machine and versions always the same, to the last bit.
    ask("step", actions (E, A)) -> obs to act on next, episodes, a Transition, simulator steps taken (E,).
    ask("draw") -> a picture of the first one. ask("close") ends the processes."""
    if args.env_id not in (tasks := import_safety_gymnasium().utils.registration.safe_registry):
        flat = [name for name in tasks if not name[:-3].endswith(("Vision", "Debug", "Gymnasium"))]
        near = difflib.get_close_matches(args.env_id, flat) or [Args.env_id]
        raise SystemExit(f"--env-id {args.env_id} is not a task of Safety-Gymnasium; did you mean {', '.join(near)}?")
    context, workers = multiprocessing.get_context(start_method), []

    def receive(process, pipe, group, least=300.0):  # importing the simulator takes long where many do it at once
        timeout = max(args.env_timeout, least)
        try:
            there = any(pipe.poll(timeout / 60) for _ in range(60))  # a stop of all (Ctrl-Z) uses up one of them
            answer = pipe.recv() if there else f"no answer for {timeout:g} seconds"
        except Exception:  # it has ended, perhaps in the middle of an answer
            process.join(timeout=5)
            answer = f"its process ended with exit code {process.exitcode}"
        if isinstance(answer, str):
            ask("close")
            who = f"{('training', 'evaluation')[stream]} environment {', '.join(map(str, group))} of {args.env_id}"
            hint = "; drawing needs EGL or OSMesa (MUJOCO_GL=osmesa): apt-get install libegl1 libgl1-mesa-dri"
            found = bool(re.search("egl|osmesa|opengl|glfw" + "|mujoco_gl" * drawn, answer, re.IGNORECASE))
            raise ChildProcessError(f"{who} (seed {args.seed}): {answer}" + hint * found)
        return answer

    def ask(command, values=(None,) * num_envs):
        if command == "close":
            for process, *_ in workers:
                process.kill()
                process.join()
            return workers.clear()
        asked = workers[:1] if command == "draw" else workers
        for _, pipe, group in asked:
            with contextlib.suppress(OSError):  # it is dead: `receive` says so
                pipe.send((command, values[group[0]:group[-1] + 1]))
        answers = [receive(*worker, 0.0 if command == "step" else 300.0) for worker in asked]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *answers)
    atexit.register(ask, "close")  # Python's own end would wait for them: they ignore SIGTERM
    for group in map(list, np.array_split(range(num_envs), min(num_envs, len(os.sched_getaffinity(0))))):
        ours, theirs = context.Pipe()
        process = context.Process(target=env_worker, args=(theirs, args, stream, group, drawn), daemon=True)
        process.start()
        theirs.close()
        workers.append((process, ours, group))
    return ask, *[receive(*worker) for worker in workers][0]


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """All that a run changes, and all that a checkpoint holds; what follows the buffer lies on the host."""

    agent: AgentState
    actor: Actor
    buffer: Buffer
    step: int  # simulator steps, all environments together, were no episode ever shorter
    completed: int  # the step up to which cycles of collecting, updating and evaluating are complete
    simulated: int  # simulator steps really taken
    cost: float  # of all training so far
    episodes: np.ndarray  # (E,): number of the episode that each environment is in
    so_far: np.ndarray  # (E, 3): its return, cost and length so far
    obs: np.ndarray  # (E, O): what to act on next
    rows: list  # of episodes.csv: every episode that has ended
    wall_time: float  # seconds


COLUMNS = ("split", "step", "environment", "return", "cost", "length")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def check_finite(when, obs, action, row):
    """SystemExit with a line where an action, an observation, a reward or a cost of some environment is not finite."""
    for name, values in {"action": action, "observation": np.concatenate([obs, row.next_obs], -1),
                         "reward": row.reward, "cost": row.cost}.items():
        if len(bad := np.flatnonzero(~np.isfinite(values).reshape(len(obs), -1).all(1))):
            raise SystemExit(f"{name} of environment {bad[0]} not finite {when}; the last checkpoint stays")


@cache
def tell(line):
    """Print a line to stderr, once."""
    print(line, file=sys.stderr)


def evaluate(args, agent, ask, stopping=()):
    """Play args.eval_episodes whole episodes without noise, the same ones every time -> a dict each (return, cost, ...,
    `played`: a Transition (T, ...)), frames of the first for `write_video`. Nothing once `stopping` is not empty."""
    episodes, frames, num_envs = [], [], min(args.num_envs, args.eval_episodes)
    for first in tqdm(range(0, args.eval_episodes, num_envs), "evaluating", leave=False, disable=None):
        (obs, _), rows, so_far, ends = ask("reset", [(first, [])] * num_envs), [], np.zeros((num_envs, 3)), {}
        actor = init_actor(args, jax.random.key(episode_seed(args.seed, 2, 0, first)), action_size(agent))
        count, padded = min(num_envs, args.eval_episodes - first), np.zeros((args.num_envs, obs.shape[1]), np.float32)
        while len(ends) < count:
            if stopping:
                return [], []
            if len(rows) * args.action_repeat >= 100_000:
                raise ChildProcessError(f"an episode of {args.env_id} does not end: register it with max_episode_steps")
            padded[:num_envs] = obs  # so that `act` is compiled only once
            action, actor = act(args, agent, actor, padded, np.full(args.num_envs, not rows), False)
            obs, _, row, steps = ask("step", action := np.asarray(action)[:num_envs])
            check_finite("in evaluation", obs, action, row)
            rows, so_far = rows + [row], so_far + np.stack([row.reward, row.cost, steps], 1)
            for index in set(np.flatnonzero(row.done[:count]).tolist()) - ends.keys():
                played = Transition(*(np.stack([one[index] for one in x]) for x in zip(*rows)))
                plans = float(actor.metrics["charts/balance"][index]) / len(rows)
                ends[index] = dict(zip((*COLUMNS[2:], "balance", "played"), (
                    first + index, *so_far[index, :2].tolist(), int(so_far[index, 2]), plans, played)))
            if args.capture_video and first == 0 and 0 not in ends:
                frames.append((ask("draw"), *so_far[0, :2]))
        episodes += [ends[index] for index in sorted(ends)]
    return episodes, frames


def interval(values):
    """Bounds of the mean: its 95% bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.asarray(values, float), (2000, len(values)))
    return np.percentile(drawn.mean(1), [2.5, 97.5])


def summary(args, episodes, step, cost_rate, wall_time):
    """One line on an evaluation: mean ± standard deviation [95% interval of the mean]."""
    returns, costs, balance = ([episode[name] for episode in episodes] for name in ("return", "cost", "balance"))
    (low, high), (least, most), wall_time = interval(returns), interval(costs), int(wall_time)
    plans = f", balance {np.mean(balance):.0%}" if any(balance) else ""
    budget = f" (budget {args.cost_budget:g})" if getattr(args, "cost_budget", None) else ""
    return (f"step {step:,}: return {np.mean(returns):.2f} ± {np.std(returns):.2f} [{low:.1f}, {high:.1f}], cost "
            f"{np.mean(costs):.1f} ± {np.std(costs):.1f} [{least:.1f}, {most:.1f}]{budget} over {len(episodes)} "
            f"episodes, cost rate {cost_rate:.4f}{plans}, wall time "
            f"{wall_time // 3600}:{wall_time // 60 % 60:02d}:{wall_time % 60:02d}")


def write_csv(path, columns, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (columns, *rows)), newline="\r\n")


def save_checkpoint(run_dir, run):
    """Write checkpoint_STEP.npz, all that training needs to go on, whole or not at all; keep the one before."""
    rows = jax.tree.map(lambda rows: rows[:int(run.buffer.size)], run.buffer.rows)
    trees = {"agent": run.agent, "actor": run.actor, "buffer": run.buffer._replace(rows=rows)}
    counters = json.dumps({name: getattr(run, name) for name in Run._fields[3:]}, default=np.ndarray.tolist)
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    arrays = {jax.tree_util.keystr(path): plain(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        np.savez(file, counters=counters, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, run_dir / f"checkpoint_{run.step}.npz")
    for old in checkpoints(run_dir)[:-2]:
        old.unlink()


def checkpoints(run_dir):
    """The checkpoints of a run, the newest last."""
    step = lambda path: path.stem.removeprefix("checkpoint_")
    return sorted(filter(lambda path: step(path).isdigit(), Path(run_dir).glob("checkpoint_*.npz")),
                  key=lambda path: int(step(path)))


def load_checkpoint(run_dir, templates, names=("step", "simulated", "cost")):
    """The trees named in `templates` ({"agent": ..., ...}, arrays or their shapes) and the counters `names` in the
    newest checkpoint. SystemExit with one line if there is none, or it is damaged, foreign or made with other sizes."""
    def restore(path, leaf):
        saved = file[jax.tree_util.keystr(path)]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(saved))
        if "['buffer'].rows" in jax.tree_util.keystr(path) and len(saved) < len(leaf):
            saved = np.concatenate([saved, np.zeros((len(leaf) - len(saved), *saved.shape[1:]), saved.dtype)])
        if saved.shape != leaf.shape:
            raise ValueError(f"{jax.tree_util.keystr(path)} has shape {saved.shape}, expected {leaf.shape}")
        return jnp.asarray(saved, leaf.dtype)

    if not (found := checkpoints(run_dir)):
        raise SystemExit(f"{run_dir} has no checkpoint: the run was killed before its first evaluation, start it anew")
    try:
        with zipfile.ZipFile(found[-1]) as file:  # NumPy does not reach an array's checksum where its header is damaged
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is not what was written")
        with np.load(found[-1], allow_pickle=False) as file:
            counters = json.loads(str(file["counters"]))
            return jax.tree_util.tree_map_with_path(restore, templates), {name: counters[name] for name in names}
    except (MemoryError, jax.errors.JaxRuntimeError):  # it is full
        raise
    except Exception as error:
        hint = f"; remove it to go on from {found[-2].name}" if len(found) > 1 else ""
        raise SystemExit(f"{found[-1]} is damaged or not a checkpoint of this script: {error}{hint}")


def hold(run_dir, stack):
    """Until the stack closes no other process may train there. SystemExit if one does."""
    lock = stack.enter_context(open(run_dir / "args.json", "r+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process trains in {run_dir}")
    except OSError:
        pass  # a file system without locks


def open_run_dir(args, stack):
    """The run's directory, new with args.json (flags, versions, git commit) unless it is resumed, and a TensorBoard
    writer, which Weights & Biases follows with --track."""
    from tensorboard.summary import Writer
    wandb = import_module("wandb") if args.track else None  # or its line, before anything is written
    run_dir, now = Path(args.resume or ""), int(time.time())
    if not args.resume:
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True).stdout
        versions = {x: metadata.version(x) for x in "jax jaxlib optax numpy safety-gymnasium gymnasium mujoco".split()}
        info = {"script": Path(__file__).stem, "args": vars(args), "git_commit": git.decode().strip() or None,
                "python": sys.version.split()[0], "packages": versions}
        for second in range(now, now + 1000):  # others of the name may begin in the same one
            with contextlib.suppress(FileExistsError):
                run_dir = Path(args.runs_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{second}")
                run_dir.mkdir(parents=True)
                break
        (run_dir / "args.json").write_text(json.dumps(info, indent=2) + "\n")
        hold(run_dir, stack)
    if wandb:
        try:
            tracked = wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, resume="allow",
                dir=run_dir, config=vars(args), group=f"{args.env_id}__{args.exp_name}", sync_tensorboard=True)
        except wandb.Error as error:  # nobody is logged in, or it cannot be reached
            raise SystemExit(f"--track: {' '.join(str(error).split())}")
        stack.callback(tracked.finish)
    return run_dir, stack.enter_context(contextlib.closing(Writer(str(run_dir))))


def write_video(path, frames):
    """An episode as mp4, one frame (picture, return and cost so far) per agent step."""
    import imageio
    from PIL import Image, ImageDraw
    pictures = [Image.fromarray(picture) for picture, _, _ in frames]
    for picture, (_, total, cost) in zip(pictures, frames):
        ImageDraw.Draw(picture).text((12, 8), f"return {total:.1f}  cost {cost:.0f}", "white", font_size=24)
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # of os.fork(), by which imageio starts ffmpeg
        imageio.mimwrite(path, list(map(np.asarray, pictures)), fps=20, macro_block_size=1)


def cycle_end(args, completed):
    """The step at which the cycle that begins at `completed` ends: after the random start, then every train_every."""
    following = (completed // args.train_every + 1) * args.train_every
    return min(args.learning_starts if completed < args.learning_starts else following, args.total_timesteps)


def next_updates(args, step, done):
    """How many updates come next at a cycle's end, after `done` of them: at most 100, so that signals are heeded, in
    blocks of nearly one size, as each is compiled; none crosses a multiple of a cycle's updates. 0 if none are due."""
    per_cycle, due = max(updates_due(args, args.train_every), 1), updates_due(args, step)
    left = min(due - done, per_cycle - done % per_cycle) if step >= args.learning_starts else 0
    return math.ceil(left / math.ceil(left / 100)) if left > 0 else 0


def device():
    """What JAX computes on. SystemExit if it finds nothing."""
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # one says which platforms there are, the other nothing
        told = str(error).partition("\n")[0] or "JAX_PLATFORMS=" + os.getenv("JAX_PLATFORMS", "")
        raise SystemExit(f"JAX finds no device: {told}")


def fresh(args, sizes, key):
    """Agent, actor and buffer at a run's first moment, by name."""
    key_agent, key_actor = jax.random.split(key)
    return {"agent": init_agent(args, key_agent, *sizes), "actor": init_actor(args, key_actor, sizes[1]),
            "buffer": init_buffer(args, *sizes)}


def begin(args, ask, sizes):
    """A run at its first moment, or with --resume at that of its newest checkpoint: on the same machine and versions
    with its environments as they were, to the last bit; elsewhere unfinished episodes end by truncation."""
    where, nothing = device(), np.zeros((args.num_envs, 3))
    make, key = partial(fresh, args, sizes), jax.random.key(args.seed)
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make, key)["buffer"])) / 2**30
    needed *= 2 if where.platform == "cpu" else 1  # a checkpoint copies what it saves
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > (there := (where.memory_stats() or {}).get("bytes_limit", there) / 2**30):
        raise SystemExit(f"the replay buffer needs {needed:.1f} GiB (on a CPU with a checkpoint's copy), {where} has "
                         f"{there:.1f}: lower --buffer-size (--train-every, where one rollout is kept)")
    if not args.resume:
        obs, episodes = ask("reset", [(0, [])] * args.num_envs)
        return Run(**jax.jit(make)(key), step=0, completed=0, simulated=0, cost=0.0, episodes=episodes, so_far=nothing,
                   obs=obs, rows=[], wall_time=0.0)
    trees, counters = load_checkpoint(args.resume, jax.eval_shape(make, key), Run._fields[3:])
    run = Run(**trees, **counters)
    if run.completed >= args.total_timesteps:
        raise SystemExit(f"{args.resume} is at step {run.step:,} already: raise --total-timesteps to go on")
    order = np.arange(int(run.buffer.head) - int(run.buffer.size), int(run.buffer.head))  # the oldest row first
    done, actions = np.asarray(run.buffer.rows.done)[order], np.asarray(run.buffer.rows.action)[order]
    taken = [actions[np.flatnonzero([1, *ends])[-1]:, index] for index, ends in enumerate(done.T)]  # since the last end
    obs, episodes = ask("reset", list(zip(run.episodes, taken)))
    if np.array_equal(obs, np.float32(run.obs)) and np.array_equal(episodes, run.episodes):
        return run._replace(episodes=episodes, so_far=np.array(run.so_far), obs=obs)
    print("the simulator does not repeat unfinished episodes (another machine, version?): they end", file=sys.stderr)
    obs, episodes = ask("reset", [(episode + 1, []) for episode in run.episodes])
    buffer = cut_episodes(run.buffer, np.ones(args.num_envs, bool))
    return run._replace(buffer=buffer, episodes=episodes, so_far=nothing, obs=obs)


def collect(args, ask, run):
    """One agent step of every environment -> run, seconds of `act`. ChildProcessError leaves the run as it was."""
    began, actor, step = time.monotonic(), run.actor, run.step + args.num_envs * args.action_repeat
    if run.step < args.learning_starts:
        random = np.random.default_rng((args.seed, 3, run.step))
        action = random.uniform(-1.0, 1.0, (args.num_envs, run.buffer.rows.action.shape[-1])).astype(np.float32)
    else:
        action, actor = act(args, run.agent, actor, run.obs, run.so_far[:, 2] == 0, True)
        action = np.asarray(action)
    acting = time.monotonic() - began
    obs, episodes, row, steps = ask("step", action)
    check_finite(f"at step {step:,}", obs, action, row)
    if row.cost.min() < 0 or row.cost.max() > args.action_repeat:
        tell("costs below 0 or above 1 a simulator step: the agent takes no more than its bins hold (docs/your_own.md)")
    so_far, rows = run.so_far + np.stack([row.reward, row.cost, steps], 1), run.rows
    for index in np.flatnonzero(row.done).tolist():
        rows = rows + [["train", step, index, *so_far[index, :2].tolist(), int(so_far[index, 2])]]
        so_far[index] = 0.0
    return run._replace(
        actor=actor, buffer=add(run.buffer, row), step=step, simulated=run.simulated + int(steps.sum()),
        cost=run.cost + float(row.cost.sum()), episodes=episodes, so_far=so_far, obs=obs, rows=rows), acting


def train(args, stopping=()):
    """Train on args.env_id (or go on with args.resume) -> the last evaluation's episodes, none if it was stopped.

    What is due, the run's counters say: an agent step, a block of updates, or a cycle's end with its evaluation.
    Between any two of these it is left, with a checkpoint, once `stopping` is not empty (a signal fills it) or an
    environment fails (ChildProcessError). OSError for what cannot be written, SystemExit with a line for what else."""
    print("starting the simulators, then compiling: about a minute, mostly the first time")
    with contextlib.ExitStack() as stack:
        ask, *sizes = start_envs(args, 0, args.num_envs)
        stack.callback(ask, "close")
        ask_eval, *_ = start_envs(args, 1, min(args.num_envs, args.eval_episodes), args.capture_video)
        stack.callback(ask_eval, "close")
        if args.resume:  # now: the processes above, forked, would have held it too
            hold(Path(args.resume), stack)
        run, (run_dir, writer) = begin(args, ask, sizes), open_run_dir(args, stack)
        began, spent, values, episodes, failure = time.monotonic() - run.wall_time, Counter(), {}, [], None
        advised = advice(args) if jax.default_backend() == "cpu" else ""
        print(f"{run_dir}: {sizes[0]} observations, {sizes[1]} actions, on {device()}\n{advised}".rstrip())
        bar = stack.enter_context(tqdm(total=args.total_timesteps, initial=run.step, unit="step", unit_scale=True,
                                       dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 60.0))
        try:
            while run.completed < args.total_timesteps and not stopping:
                moment = time.monotonic()
                if run.step < cycle_end(args, run.completed):
                    compiling = 0 <= run.step - args.learning_starts < args.num_envs * args.action_repeat
                    bar.set_description("compiling" * compiling, refresh=compiling)
                    run, acting = collect(args, ask, run)
                    bar.update(run.step - bar.n)
                    spent.update(act=acting, env=time.monotonic() - moment - acting)
                elif count := next_updates(args, run.step, done := int(run.agent.num_updates)):
                    bar.set_description("updating" if done else "compiling", refresh=not bar.desc)
                    agent, metrics = update_many(args, run.agent, run.buffer, count)
                    run, values = run._replace(agent=agent), jax.device_get(metrics)
                    if bad := [tag for tag, value in values.items() if not math.isfinite(value)]:
                        raise SystemExit(f"{', '.join(bad)} not finite at step {run.step:,}; the last checkpoint stays")
                    spent.update(update=time.monotonic() - moment)
                else:
                    run = run._replace(wall_time=time.monotonic() - began)
                    values |= {f"time/{name}": spent[name] / (spent.total() or 1) for name in ("env", "act", "update")}
                    run, episodes = end_cycle(args, ask_eval, run_dir, writer, run, values, bar, stopping)
                    spent, values = Counter(), {}
        except ChildProcessError as error:
            failure = error
        if run.completed < args.total_timesteps:
            save_checkpoint(run_dir, run._replace(wall_time=time.monotonic() - began))
            again = "the same command" if args.resume else f"--resume {run_dir}"
            bar.write(f"stopped at step {run.step:,}; go on with {again}", file=sys.stderr)
        if failure:
            raise failure
        return episodes if run.completed >= args.total_timesteps else []


def end_cycle(args, ask_eval, run_dir, writer, run, values, bar, stopping):
    """Evaluate and save if that is due, write everything -> run with its cycle completed, the evaluation's episodes.
    Where `stopping` cuts the evaluation short, nothing is written or completed."""
    step, episodes, acts = run.step, [], (run.step - run.completed) // (args.num_envs * args.action_repeat)
    values |= {"charts/cost_rate": run.cost / run.simulated, "charts/SPS": step / run.wall_time}
    if run.completed >= args.learning_starts:
        values |= {tag: np.mean(x) / acts for tag, x in jax.device_get(run.actor.metrics).items()}
    if ended := [row[3:] for row in run.rows if row[0] == "train" and row[1] > run.completed]:
        values |= dict(zip((f"charts/episodic_{name}" for name in COLUMNS[3:]), np.mean(ended, axis=0)))
    due = step >= args.total_timesteps or args.eval_every and step % args.eval_every == 0
    if not run_dir.is_dir():
        raise SystemExit(f"{run_dir} is gone; if it was moved, go on with --resume and its new place")
    if due:
        episodes, frames = evaluate(args, run.agent, ask_eval, stopping)
        if not episodes:
            return run, episodes
        for tag, name in {"episodic_return": "return", "episodic_cost": "cost", "balance": "balance"}.items():
            values[f"eval/{tag}"] = np.mean([episode[name] for episode in episodes])
        values |= critic_metrics(args, run.agent, episodes)
        run = run._replace(rows=run.rows + [["eval", step, *map(each.get, COLUMNS[2:])] for each in episodes])
    for tag, value in values.items():
        writer.add_scalar(tag, float(value), step)
    writer.flush()
    write_csv(run_dir / "episodes.csv", COLUMNS, run.rows)
    bar.set_postfix({tag[7:]: f"{x:.3g}" for tag, x in sorted(values.items()) if tag[:7] == "charts/"}, refresh=False)
    zeros = jax.tree.map(jnp.zeros_like, run.actor.metrics)
    run = run._replace(completed=step, actor=run.actor._replace(metrics=zeros))
    if due:
        save_checkpoint(run_dir, run)
        bar.write(summary(args, episodes, step, values["charts/cost_rate"], run.wall_time))
        if frames:
            write_video(run_dir / "videos" / f"{step}.mp4", frames)
    return run, episodes


def evaluate_run(args):
    """Evaluate the newest checkpoint of a run, print and write what comes out -> its episodes."""
    run_dir, began = Path(args.evaluate), time.monotonic()
    with contextlib.ExitStack() as stack:
        ask, *sizes = start_envs(args, 1, min(args.num_envs, args.eval_episodes), args.capture_video)
        stack.callback(ask, "close")
        device()  # or its line, before the checkpoint is read
        shapes = jax.eval_shape(partial(fresh, args, sizes), jax.random.key(0))
        trees, counters = load_checkpoint(run_dir, {"agent": shapes["agent"]})
        episodes, frames = evaluate(args, trees["agent"], ask)
    step, cost_rate = counters["step"], counters["cost"] / max(counters["simulated"], 1)
    print(summary(args, episodes, step, cost_rate, time.monotonic() - began))
    columns = (*COLUMNS, "balance")
    write_csv(run_dir / "evaluation.csv", columns, [["eval", step, *map(each.get, columns[2:])] for each in episodes])
    print("what the cost critics knew; read is what they said, followed what came (docs/spowl_continuous.md):")
    print(*(f"{tag} {value:.3g}" for tag, value in critic_metrics(args, trees["agent"], episodes).items()), sep="\n")
    print("episodes:", run_dir / "evaluation.csv")
    if frames:
        write_video(path := run_dir / "videos" / f"evaluation_{step}.mp4", frames)
        print("the first one:", path)
    return episodes


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
FREE_ON_RESUME = ("total_timesteps", "eval_every", "eval_episodes", "env_timeout", "capture_video", "track",
                  "wandb_project_name", "wandb_entity", "runs_dir", "resume", "evaluate")


def read_flags(argv, default):
    """Args from the command line, shown in their groups; tyro says what it cannot read."""
    groups = dataclasses.make_dataclass("Groups", [(group.__name__.lower(), group) for group in GROUPS])
    take = lambda group: group(**{field.name: getattr(default, field.name) for field in dataclasses.fields(group)})
    read = tyro.cli(groups, args=argv, default=groups(*map(take, GROUPS)), description=Args.__doc__,
                    config=(tyro.conf.OmitArgPrefixes,))
    return Args(**{name: value for group in vars(read).values() for name, value in vars(group).items()})


def of_type(value, hint):
    """Whether a value that JSON gave is what a field's hint allows."""
    kinds = get_args(hint) or (hint,)
    return value in kinds or type(value) in kinds or type(value) is int and float in kinds


def problems(args):
    """What is wrong with the flags, one sentence each: values outside their fields' ranges, or else broken rules."""
    found = []
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        low, high = next((x for x in getattr(hint, "__metadata__", ()) if type(x) is tuple), (-LARGE, LARGE))
        if isinstance(value, (int, float)) and not low <= value <= high:
            least = "positive" if 0 < low < 1 else f"at least {low:g}"
            least = least if math.isfinite(value) and low > -LARGE else "a finite number"
            found.append(f"{flag} must be {least}" + (f" and at most {high:.10g}" if high < LARGE else ""))
        if isinstance(value, str) and not (value and value.isprintable()):  # bytes that are not UTF-8 are not either
            found.append(f"{flag} must be printable text" if value else f"{flag} must not be empty")
    return found or [message for holds, message in rules(args) if not holds]


def parse_args(argv=None):
    """Flags from the command line, with --resume or --evaluate on top of the run's. SystemExit for what cannot be."""
    argv = sys.argv[1:] if argv is None else argv
    preset = read_flags([word for word in argv if word not in ("-h", "--help")], Args()).preset
    args = read_flags(argv, dataclasses.replace(Args(), **PRESETS[preset]))
    if run_dir := args.resume or args.evaluate:
        try:
            info = json.loads(Path(run_dir, "args.json").read_text())
            if info["script"] != Path(__file__).stem:
                raise ValueError(f"it was made by {info['script']}.py, use that script")
            saved = Args(**info["args"])
            for name, hint in get_type_hints(Args).items():
                if not of_type(value := getattr(saved, name), hint):
                    raise ValueError(f"{name} cannot be {value!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{run_dir} is not a run directory of this script: {error}")
        args = read_flags(argv, saved)
        for name in vars(saved).keys() - {*FREE_ON_RESUME, "seed" if args.evaluate else ""}:
            if getattr(args, name) != getattr(saved, name):
                raise SystemExit(f"--{name.replace('_', '-')} cannot differ from the run in {run_dir}")
    if found := problems(args):
        raise SystemExit("\n".join(found))
    return args


def lossy(stream):
    """The stream, which from now on loses lines where nobody can read them (a closed pipe, a full disk), and no run."""
    stream = stream or open(os.devnull, "w")  # None: it was closed from the start
    for name in ("write", "flush"):
        def attempt(*arguments, do=getattr(stream, name)):
            with contextlib.suppress(OSError, ValueError):
                return do(*arguments)
        setattr(stream, name, attempt)
    with contextlib.suppress(AttributeError):  # a notebook's is no file
        stream.reconfigure(errors="replace", line_buffering=True)  # where there is no "±"; at once, into a file too
    return stream


def main(argv=None):
    """The command line. Exit status 130 after Ctrl-C, 143 after SIGTERM, 129 after a closed terminal's SIGHUP, once the
    run is in a checkpoint."""
    def heed(number, frame):
        stopping.append(number)
        if number == signal.SIGINT:
            signal.signal(number, at_once)
        with contextlib.suppress(OSError):  # not print: that may be what was interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C once more stops without saving\n")

    def heed_thread(it):  # TensorBoard's, which dies of a full disk without a word
        failed.append(it.exc_value) if issubclass(it.exc_type, OSError) else threading.__excepthook__(it)

    sys.stdout, sys.stderr, failed = lossy(sys.stdout), lossy(sys.stderr), []
    args, stopping, done, ours = parse_args(argv), [], True, __name__ == "__main__"
    at_once = signal.SIG_DFL if ours else signal.default_int_handler  # an interpreter that is not ours is not ended
    if jax.config.jax_enable_x64:
        raise SystemExit("JAX_ENABLE_X64 is set: everything here is float32, unset it")
    if not jax.config.jax_compilation_cache_dir:  # the variable JAX_COMPILATION_CACHE_DIR names another place
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/spowl"))
    with contextlib.ExitStack() as stack:  # at the end all is as it was
        stack.enter_context(mock.patch.object(threading, "excepthook", heed_thread))
        for number in STOPS * (threading.current_thread() is threading.main_thread()):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                before = signal.signal(number, at_once if args.evaluate else heed)
                stack.callback(signal.signal, number, before or signal.SIG_DFL)
        try:
            done = evaluate_run(args) if args.evaluate else train(args, stopping)
            for error in failed:
                raise error
        except (OSError, ImportError, RuntimeError, MemoryError) as error:
            told = str(error).partition("\n")[0]
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in told:
                raise SystemExit(f"the memory is full ({told or 'of this machine'}): choose smaller sizes")
            if not (isinstance(error, (OSError, ImportError)) or "MUJOCO_GL" in told):
                raise
            told = told or type(error).__name__
            raise SystemExit(told + "; the last checkpoint stays" * bool(getattr(error, "errno", 0)))
        if stopping and not done:  # at once: Python's own exit has crashed under XLA's threads, still computing
            (os._exit if ours else sys.exit)(128 + stopping[0])


if __name__ == "__main__":
    main()
