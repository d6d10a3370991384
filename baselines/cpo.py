# /// script
# requires-python = ">=3.11,<3.14"
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
#     "mujoco==3.2.7 ; python_version >= '3.13'",
#     "gymnasium-robotics ; sys_platform == 'never'",
#     "pygame ; sys_platform == 'never'",
# ]
# ///
"""CPO: constrained policy optimisation (arXiv 1705.10528) on Safety-Gymnasium.

One file, pure functions. On-policy: a Gaussian policy and two critics, V for reward and V_c for cost, learn from the
steps just taken. The policy makes one step per rollout: the best one, to first order, within a trust region and under
the cost limit, found by conjugate gradients and the dual of that problem.

    for every 20,000 simulator steps:
        for every agent step, all environments at once:
            step the simulator with a ~ pi(s) = N(mean(s), std), add the transition to the rollout
        c = J_c - d, J_c = mean cost of the last 100 finished episodes
        A, A_c = generalised advantage estimates of reward and of cost
        g, b = gradients of mean ratio A and of mean ratio A_c;  H = second derivative of KL(old pi, pi)
        step = argmax g step  subject to  c + b step <= 0  and  step H step / 2 <= delta, from H^-1 g and H^-1 b;
               where no step in the trust region can meet the limit, the one that lowers cost the most
        shorten it until KL <= delta, A does not fall (where the limit is kept already) and A_c does not rise above it
        10 passes over the rollout: for every minibatch
            one step of V and of V_c towards the returns A + V, A_c + V_c
        mean and std of what was observed, by which the networks see the next rollout

Shapes: E environments, T agent steps of a rollout, N = T E transitions, B minibatch, W finished episodes,
O observation, A action. "Steps" are simulator steps unless called agent steps (one = `action_repeat` of them).

Differs from baselines/ppo_lagrangian.py in
    removed: Multiplier, init_multiplier, next_multiplier, balanced - no multiplier is kept, no advantages are mixed
    added: excess - c, of an episode or of its mean agent step
    changed: surrogate, divergence - of one advantage, without a clip; mean over action dimensions too
    added: curvature, conjugate_gradient, dual, judge, line_search, policy_step - the step and its length
    removed: policy_loss - the passes are the critics' alone
    changed: LOSSES, improve - likewise
    changed: AgentState, init_agent, update - lengths of episodes beside their costs
    flags: epochs, batch_size, target_kl, learning_rate, grad_clip - other values, or of the critics alone
    flags: damping, cg_iterations, line_search_factor, line_search_tries, constraint_scale - new
    flags: clip, multiplier, lambda_init, lambda_lr, pid_kp, pid_ki, pid_kd, pid_smoothing, pid_delay - removed
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints
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
    obs_transform: Literal["raw", "log"] = "raw"
    """observations as the networks see them: raw, or log, which spreads the near end of a lidar (see transform_obs)"""
    env_timeout: Positive = 60.0
    """seconds after which an environment's process that gives no answer counts as dead"""
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
    epochs: Count = 10
    """passes of the critics over a rollout"""
    batch_size: Count = 128
    """transitions per minibatch, of the critics"""
    target_kl: Positive = 0.01
    """trust region delta: the KL divergence from the policy that acted, mean over states and action dimensions"""
    damping: NotNegative = 0.1
    """multiple of the identity that is added to H"""
    cg_iterations: Count = 15
    """most steps of a conjugate gradient"""
    line_search_factor: Annotated[float, (1 / LARGE, 1.0)] = 0.8
    """what a step is shortened by as long as it is not accepted"""
    line_search_tries: Count = 20
    """lengths that are tried; if none is accepted the policy stays as it is"""
    learning_rate: Positive = 1e-3
    """step size of Adam, of the critics"""
    grad_clip: Positive = 40.0
    """largest norm of a gradient, each critic on its own"""
    critic_l2: NotNegative = 0.001
    """weight of the sum of squared parameters in a critic's loss"""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Cost limit"""

    cost_limit: float = 25.0
    """cost d that an episode may have, undiscounted"""
    cost_window: Count = 100
    """latest finished episodes W whose mean cost J_c is held against the limit"""
    constraint_scale: Literal["episode", "step"] = "episode"
    """what c = J_c - d counts: the cost of an episode, or that of its mean agent step, the unit of A_c"""


@dataclasses.dataclass(frozen=True)
class Args(Constraint, Learning, Protocol, Experiment):
    """CPO on Safety-Gymnasium: on-policy, one step per rollout, in a trust region and under the cost limit."""


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


def normalise(stats, obs):
    """(..., O) -> (..., O): (obs - mean) / std, the std at least 0.01."""
    return (obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 0.01)


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
    sizes = obs_dim, args.hidden, args.hidden
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
    """KL of the policy from a Gaussian, mean over the states (N, O) and over action dimensions:
    log(std_pi / std) + (std^2 + (mean - mean_pi)^2) / (2 std_pi^2) - 1/2."""
    apart, wider = mean - mlp(policy["mean"], obs), policy["log_std"] - log_std
    each = wider + 0.5 * (jnp.exp(-2.0 * wider) + apart**2 * jnp.exp(-2.0 * policy["log_std"]) - 1.0)
    return jnp.mean(each)


def curvature(args, policy, old, obs):
    """v -> (H + damping) v: H is the second derivative of the divergence at the policy that acted, with the mean and
    log_std `old`, and its product the derivative of a gradient along v."""
    _, product = jax.linearize(lambda policy: jax.grad(divergence)(policy, *old, obs), policy)
    return lambda v: optax.tree.add_scale(product(v), args.damping, v)


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
    newest = buffer.rows.done[buffer.head - 1]
    done = buffer.rows.done.at[buffer.head - 1].set(jnp.where(cut, 1.0, newest))
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


@partial(jax.jit, static_argnames="args", donate_argnames="actor")
def act(args, agent, actor, obs, is_first, explore):
    """a ~ pi(s) for all environments at once: obs (E, O) -> action (E, A), next actor; the mean without `explore`.

    What leaves [-1, 1] is clipped by the environment; the transition keeps it as it was drawn."""
    policy = agent.networks["policy"]
    mean = mlp(policy["mean"], normalise(agent.stats, obs))
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
    return so_far, every[jnp.argsort(~jnp.isnan(every))[-finished.size:]]  # the sort is stable


def excess(args, cost, length):
    """c = J_c - d, in units of an episode's cost or of its mean agent step's, those of A_c and of b.

    Before any episode has ended (NaN) none has cost anything, and their length counts as 1."""
    unit = jnp.where(jnp.isnan(length), 1.0, length) if args.constraint_scale == "step" else 1.0
    return (jnp.nan_to_num(cost) - args.cost_limit) / unit


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
    obs, next_obs = normalise(stats, rows.obs), normalise(stats, rows.next_obs)
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


def surrogate(policy, batch, advantage):
    """mean ratio A, ratio = pi(a | s) / old pi(a | s), of an advantage (N,) of reward or of cost."""
    return jnp.mean(jnp.exp(log_prob(policy, batch.obs, batch.action) - batch.log_prob) * advantage)


def conjugate_gradient(args, product, b):
    """x with H x = b, from H's products with a vector, all of them trees like the policy."""
    def step(carry):
        x, residual, direction, square, count = carry
        image = product(direction)
        share = square / (optax.tree.vdot(direction, image) + 1e-6)
        x, residual = optax.tree.add_scale(x, share, direction), optax.tree.add_scale(residual, -share, image)
        following = optax.tree.vdot(residual, residual)
        return x, residual, optax.tree.add_scale(residual, following / (square + 1e-6), direction), following, count + 1

    start = optax.tree.zeros_like(b), b, b, optax.tree.vdot(b, b), jnp.int32(0)
    return jax.lax.while_loop(lambda carry: (carry[-1] < args.cg_iterations) & (jnp.sqrt(carry[-2]) > 1e-10),
                              step, start)[0]


LOSSES = {"value": value_loss, "cost_value": cost_value_loss}


def dual(args, q, r, s, c, b_squared):
    """max g d subject to c + b d <= 0 and d H d / 2 <= delta: q = g H^-1 g, r = g H^-1 b, s = b H^-1 b, |b|^2
    -> case, nu, and the weights of x = H^-1 g and p = H^-1 b in d.

    d = (x - nu p) / lambda, nu = max(0, lambda c + r) / s. Where the plain step, nu = 0 and lambda^2 = q / (2 delta),
    keeps the limit, it is the best; else the best is on the limit, lambda^2 = (q - r^2 / s) / (2 delta - c^2 / s).
    Cases: 4 b is 0, 3 all of the trust region keeps the limit, 2 and 1 a part of it does, with and without d = 0,
    0 nothing does: d = -sqrt(2 delta / s) p.
    differs from OmniSafe and SafePO: they have -r for r, which belongs to a g that points down."""
    guard, room = 1e-8, 2.0 * args.target_kl - c**2 / (s + 1e-8)
    case = jnp.where(c < 0, jnp.where(b_squared <= 1e-6, 4, jnp.where(room < 0, 3, 2)), jnp.where(room >= 0, 1, 0))
    plain = jnp.sqrt(q / (2.0 * args.target_kl))
    across = jnp.maximum(q - r**2 / (s + guard), 1e-6 * q)  # what rounding leaves where g and b are parallel
    on_limit = jnp.sqrt(across / (jnp.maximum(room, 0.0) + guard))
    trust = jnp.where((case >= 3) | (plain * c + r <= 0), plain, on_limit)  # lambda
    nu = jnp.where(case >= 3, 0.0, jnp.maximum(trust * c + r, 0.0) / (s + guard))
    nu = jnp.where(case == 0, jnp.sqrt(2.0 * args.target_kl / (s + guard)), nu)
    along_x = jnp.where(case == 0, 0.0, 1.0 / (trust + guard))
    return case, nu, along_x, -nu * jnp.where(case == 0, 1.0, along_x)


# ----------------------------------------------------------------------------------------------------------------------
# Update
# ----------------------------------------------------------------------------------------------------------------------
class AgentState(NamedTuple):
    """Everything that learning changes."""

    networks: dict  # policy, value, cost_value
    optimizers: dict  # the critics' states
    stats: Stats
    so_far: jax.Array  # (E,): cost of the unfinished episodes
    finished: jax.Array  # (W,): cost of the latest finished ones, NaN where there were fewer
    steps: jax.Array  # (E,): agent steps of the unfinished episodes
    lengths: jax.Array  # (W,): agent steps of the latest finished ones
    key: jax.Array
    num_updates: jax.Array  # rollouts learned from; each one's key is folded from it


def init_agent(args, key, obs_dim, action_dim):
    """A fresh agent for observations and actions of those sizes; `key` is a typed key (jax.random.key)."""
    key_networks, key_updates = jax.random.split(key)
    networks = init_networks(args, key_networks, obs_dim, action_dim)
    states = {name: optimizer(args).init(networks[name]) for name in ("value", "cost_value")}
    none, nothing = jnp.zeros(args.num_envs), jnp.full(args.cost_window, jnp.nan, jnp.float32)
    return AgentState(networks, states, Stats(jnp.float32(0.0), jnp.zeros(obs_dim), jnp.ones(obs_dim)), none, nothing,
                      steps=jnp.copy(none), lengths=jnp.copy(nothing), key=key_updates, num_updates=jnp.int32(0))


def judge(args, new, old, batch, case, c):
    """Whether the policy `new` may follow the Gaussian `old` (mean, log_std), and its metrics: KL <= delta, the mean of
    ratio A_c rises by at most max(-c, 0), and that of ratio A does not fall unless the limit has to be met first."""
    kl = divergence(new, *old, batch.obs)
    gain = surrogate(new, batch, batch.advantage) - batch.advantage.mean()
    rise = surrogate(new, batch, batch.cost_advantage) - batch.cost_advantage.mean()
    accepted = (kl <= args.target_kl) & (rise <= jnp.maximum(-c, 0.0)) & ((gain >= 0) | (case < 2))
    return accepted, {"losses/kl": kl, "losses/policy": -gain, "losses/cost_policy": rise}


def optimizer(args):
    """Adam under a clipped norm; a network's parameters are one vector to it, which saves most of its time."""
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.learning_rate)))


def line_search(args, policy, step, old, batch, case, c):
    """The policy after the longest of the steps 1, 0.8, 0.8^2, ... times `step` that is accepted, or as it was
    -> policy, metrics."""
    moved = lambda share: optax.tree.add_scale(policy, share, step)
    tries = jax.lax.while_loop(
        lambda count: (count < args.line_search_tries)
        & ~judge(args, moved(args.line_search_factor**count), old, batch, case, c)[0],
        lambda count: count + 1, jnp.int32(0))
    share = jnp.where(tries < args.line_search_tries, args.line_search_factor**tries, 0.0)
    return moved(share), judge(args, moved(share), old, batch, case, c)[1] | {"losses/step": share}


def fit(args, loss, network, state, parts, pace):
    """A pass of one network over minibatches (N // B, B, ...), with a step of Adam, times `pace`, for each of them
    -> network, optimizer state, metrics averaged over them."""
    def step(carry, part):
        grad, metrics = jax.grad(loss, has_aux=True)(carry[0], args, part)
        change, state = optimizer(args).update(grad, carry[1])
        return (jax.tree.map(lambda x, by: x + pace * by, carry[0], change), state), metrics

    (network, state), metrics = jax.lax.scan(step, (network, state), parts)
    return network, state, jax.tree.map(jnp.mean, metrics)


def policy_step(args, policy, batch, c):
    """One step in the trust region, under the limit -> policy, metrics."""
    old = mlp(policy["mean"], batch.obs), policy["log_std"]
    g, b = (jax.grad(surrogate)(policy, batch, advantage) for advantage in (batch.advantage, batch.cost_advantage))
    product = curvature(args, policy, old, batch.obs)
    x, p = conjugate_gradient(args, product, g), conjugate_gradient(args, product, b)
    dots = (optax.tree.vdot(*each) for each in ((g, x), (g, p), (b, p)))
    case, nu, along_x, along_p = dual(args, *dots, c, optax.tree.vdot(b, b))
    step = jax.tree.map(lambda x, p: along_x * x + along_p * p, x, p)
    policy, metrics = line_search(args, policy, step, old, batch, case, c)
    return policy, metrics | {"lagrangian/case": case, "lagrangian/nu": nu}


def one_pass(args, networks, states, batch, key, pace):
    """A pass of all networks that have a loss over the same minibatches, the policy's steps times `pace` -> networks,
    optimizer states, metrics. Each has a scan of its own."""
    parts, networks, states, metrics = minibatches(args, batch, key), dict(networks), dict(states), {}
    for name, loss in LOSSES.items():
        networks[name], states[name], told = fit(
            args, loss, networks[name], states[name], parts, pace if name == "policy" else 1.0)
        metrics |= told
    return networks, states, metrics


def improve(args, agent, batch, c, key):
    """One step of the policy, then passes of the critics over the batch -> networks, optimizer states, metrics."""
    policy, metrics = policy_step(args, agent.networks["policy"], batch, c)

    def again(trained, key):
        *trained, metrics = one_pass(args, *trained, batch, key, 1.0)
        return tuple(trained), metrics

    start = agent.networks | {"policy": policy}, agent.optimizers
    (networks, states), each = jax.lax.scan(again, start, jax.random.split(key, args.epochs))
    return networks, states, metrics | jax.tree.map(lambda x: x[-1], each)


def update(args, agent, rows, key):
    """All that is learned from one rollout, (T, E, ...) -> agent, metrics."""
    so_far, finished = tally(agent.so_far, agent.finished, rows.cost, rows.done)
    steps, lengths = tally(agent.steps, agent.lengths, jnp.ones_like(rows.cost), rows.done)
    cost = jnp.nanmean(finished)
    c = excess(args, cost, jnp.nanmean(lengths))
    batch = prepare(args, agent.networks, agent.stats, rows)
    networks, states, metrics = improve(args, agent, batch, c, key)
    log_std = networks["policy"]["log_std"]
    metrics |= {"lagrangian/cost": jnp.nan_to_num(cost), "lagrangian/violation": c,
                "losses/entropy": jnp.sum(log_std + 0.5 * math.log(2.0 * math.pi * math.e)),
                "losses/param_norm": optax.tree.norm(networks)}
    return AgentState(networks, states, add_to_stats(agent.stats, rows.obs), so_far, finished, steps, lengths,
                      agent.key, agent.num_updates + 1), metrics


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

    critic/read_..., critic/followed_... in states inside a hazard (the step before cost), outside, and before_k: k = 1
    to 5 agent steps before a hazard is entered (before_1 is the step that enters); none for what did not occur."""
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


def critic_metrics(args, agent, episodes):
    """What V_c knew of the costs in evaluation episodes: numbers by tag (see read_and_followed)."""
    obs = normalise(agent.stats, np.concatenate([episode["played"].obs for episode in episodes]))
    return read_and_followed(args, episodes, np.asarray(value(agent.networks["cost_value"], obs)))


# ----------------------------------------------------------------------------------------------------------------------
# From here on, what surrounds the method: the same text in every script (benchmark/sync.py writes it).
# Environments: a few processes, each with several of them and the action repeat inside
# ----------------------------------------------------------------------------------------------------------------------
def import_safety_gymnasium(cheap_sky: bool = True):
    """safety_gymnasium 1.0.0 on Python >= 3.11, NumPy 2 and MuJoCo 3; a gradient sky speeds reset() up 80 times."""
    plain_dataclass = dataclasses.dataclass

    def dataclass(cls=None, **options):
        arrays = {name: value for name, value in getattr(cls, "__dict__", {}).items() if isinstance(value, np.ndarray)}
        for name, value in arrays.items():
            setattr(cls, name, dataclasses.field(default_factory=value.copy))
        return plain_dataclass(cls, **options)

    def add_marker(viewer, marker):
        geom = viewer.scn.geoms[viewer.scn.ngeom]
        size, position, rgba = (np.asarray(marker[key], np.float64).ravel() for key in ("size", "pos", "rgba"))
        mujoco.mjv_initGeom(geom, marker["type"], size, position, np.eye(3).ravel(), rgba.astype(np.float32))
        geom.category = mujoco.mjtCatBit.mjCAT_DECOR
        viewer.scn.ngeom += 1

    def make_current(viewer):
        atexit.register(viewer.opengl_context.free)
        viewer.opengl_context.make_current()

    # Its multi-agent tasks, which nobody makes here, import a class of a package that needs NumPy 1.
    robotics = types.ModuleType("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi")
    robotics.MultiAgentMujocoEnv = object
    if importlib.util.find_spec("gymnasium_robotics") is None:
        sys.modules.setdefault(robotics.__name__, robotics)

    # Its dataclasses have arrays as defaults, which Python >= 3.11 refuses: every instance gets a copy instead.
    with mock.patch.object(dataclasses, "dataclass", dataclass):
        import safety_gymnasium
    import mujoco
    import yaml
    from gymnasium.envs.mujoco import mujoco_rendering

    # MuJoCo 3.2 renamed the fields by which gymnasium 0.28 draws the lidar and the cost indicator.
    mujoco_rendering.BaseRender._add_marker_to_scene = add_marker
    # Contexts that outlive MuJoCo's own exit handler, and viewers that never got one, would each print a traceback.
    mujoco_rendering.OffScreenViewer.make_context_current = make_current
    mujoco_rendering.OffScreenViewer.__del__ = lambda viewer: hasattr(viewer, "opengl_context") and viewer.free()
    # Every reset decodes six images of 4 MB for the sky, which the agent never sees: a gradient takes their place.
    with open(f"{safety_gymnasium.__path__[0]}/configs/assets.yaml", encoding="utf-8") as file:
        assets = yaml.safe_load(file)
    sky = {"type": "skybox", "builtin": "gradient", "rgb1": ".3 .5 .7", "rgb2": "0 0 0", "width": "32", "height": "192"}
    assets["textures"]["skybox"] = {f"@{key}": value for key, value in sky.items()}
    cheap = types.SimpleNamespace(load=lambda file, Loader: copy.deepcopy(assets), FullLoader=None)
    safety_gymnasium.world.yaml = cheap if cheap_sky else yaml
    return safety_gymnasium


def episode_seed(seed, stream, env, episode):
    """Seed of one episode, a function of the run's seed, the stream (0 training, 1 evaluation) and two counters."""
    return int(np.random.SeedSequence((seed, stream, env, episode)).generate_state(1)[0])


def make_env(args, drawn):
    """One environment of the task, able to draw if `drawn`."""
    if drawn:
        os.environ.setdefault("MUJOCO_GL", "egl")
    options = {"render_mode": "rgb_array", "camera_name": "fixedfar", "width": 512, "height": 512} if drawn else {}
    env = import_safety_gymnasium().make(args.env_id, **options)
    if len(env.observation_space.shape or ()) != 1:
        raise ValueError("its observations are not a flat vector")
    env.reset(seed=0)  # all resets but the first depend on the seed alone (Car differs in the 17th digit)
    if drawn:
        env.render()  # now, not at the first evaluation, is the time to fail
    return env


def see(args, env, obs):
    """An environment's observation (O,) as the networks see it."""
    low, high = env.observation_space.low, env.observation_space.high
    return np.asarray(transform_obs(obs, low, high) if args.obs_transform != "raw" else obs, np.float32)


def within(actions, low, high):
    """Actions (..., A) in [-1, 1] -> in [low, high]."""
    return np.clip(low + 0.5 * (actions + 1.0) * (high - low), low, high)


def env_worker(pipe, args, stream, indices, drawn):
    """Body of a process that holds the environments `indices`. It answers
    ("reset", [(episode, actions), ...]) with obs (n, O), after taking those actions in that episode;
    ("step", actions (n, A) in [-1, 1]) with obs (n, O) to act on next, rows as a Transition, and (n, 4): simulator
    steps taken, then return, cost and length of the episode so far. Where one ended the next one has begun;
    ("draw", ...) with a picture of the first one, or None. Whatever goes wrong is sent as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent, episodes, seen, so_far = os.getppid(), {}, {}, {}

    def reset(index, episode):
        obs, _ = envs[index].reset(seed=episode_seed(args.seed, stream, index, episode))
        episodes[index], seen[index], so_far[index] = episode, see(args, envs[index], obs), (0.0, 0.0, 0)

    def step(index, action):
        env, total_reward, total_cost = envs[index], 0.0, 0.0
        for steps in range(1, args.action_repeat + 1):
            obs, reward, cost, terminated, truncated, _ = env.step(action)
            total_reward, total_cost = total_reward + float(reward), total_cost + float(cost)
            if terminated or truncated:
                break
        seen[index] = next_obs = see(args, env, obs)
        amounts = float(np.float32(total_reward)), float(np.float32(total_cost)), steps
        stats = so_far[index] = tuple(before + amount for before, amount in zip(so_far[index], amounts))
        if terminated or truncated:
            reset(index, episodes[index] + 1)
        return next_obs, (total_reward, total_cost, terminated, terminated or truncated, steps, *stats)

    try:
        envs = {index: make_env(args, drawn and index == 0) for index in indices}
        bounds = np.stack([(env.action_space.low, env.action_space.high) for env in envs.values()], 1)
        pipe.send((envs[indices[0]].observation_space.shape[0], bounds.shape[2]))
        while True:
            while not pipe.poll(5.0):
                if os.getppid() != parent:
                    return
            command, values = pipe.recv()
            if command == "step":
                obs = np.stack(list(seen.values()))
                next_obs, numbers = zip(*map(step, indices, within(values, *bounds)))
                numbers = np.array(numbers)
                reward, cost, terminated, done = numbers.T[:4].astype(np.float32)
                rows = Transition(obs, values, reward, cost, np.stack(next_obs), terminated, done)
                answer = np.stack(list(seen.values())), rows, numbers[:, 4:]
            elif command == "reset":
                for index, (episode, actions), low, high in zip(indices, values, *bounds):
                    reset(index, episode)
                    for action in actions:
                        step(index, within(action, low, high))
                answer = np.stack(list(seen.values()))
            else:
                answer = None
                with contextlib.suppress(Exception):
                    answer = envs[0].render() if drawn else None  # KeyError in the processes that do not hold it
            pipe.send(answer)
    except EOFError:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(f"{type(error).__name__}: {error}".partition("\n")[0])


class EnvFailure(Exception):
    """An environment's process died, hung or raised."""


class Envs(NamedTuple):
    """Handles of the environment processes. The last two lists change where processes are started anew."""

    args: Args
    stream: int  # 0 training, 1 evaluation
    drawn: bool
    groups: list  # of the environments that each process holds
    workers: list  # (process, pipe)
    failures: list  # one text for each time that they were started anew


START_TIMEOUT = 300.0  # seconds; importing the simulator takes long where many do it at once
MAX_FAILURES = 10
DRAWING_HINT = ("; --capture-video needs EGL or OSMesa (Debian: apt-get install libegl1 libgl1-mesa-dri), and a "
                "MUJOCO_GL that names it or is not set")


def receive(envs, number, timeout=None):
    """The answer of one process; EnvFailure if it failed, died or gave none in time."""
    (process, pipe), timeout = envs.workers[number], timeout or envs.args.env_timeout
    try:
        answer = pipe.recv() if pipe.poll(timeout) else f"no answer for {timeout:g} seconds"
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        process.join(timeout=5)
        answer = f"its process ended with exit code {process.exitcode}"
    if isinstance(answer, str):
        which = ", ".join(map(str, envs.groups[number]))
        raise EnvFailure(f"{('training', 'evaluation')[envs.stream]} environment {which} of {envs.args.env_id} (seed "
                         f"{envs.args.seed}): {answer}")
    return answer


def ask(envs, command, values, timeout=None):
    """One command to every process, with its part of `values`, one for each -> their answers."""
    for part, (_, pipe) in zip(values, envs.workers):
        with contextlib.suppress(OSError):  # it is dead: `receive` says so
            pipe.send((command, part))
    return [receive(envs, number, timeout) for number in range(len(envs.workers))]


def start_envs(args, stream, num_envs, drawn=False, start_method="fork"):
    """That many environments, in as many processes as there are cores -> envs, O, A. EnvFailure if one cannot be made.

    Call it before JAX is used (fork copies no threads), or with start_method "spawn"."""
    groups = np.array_split(np.arange(num_envs), min(num_envs, len(os.sched_getaffinity(0))))
    envs = Envs(args, stream, drawn, [group.tolist() for group in groups], [], [])
    return envs, *start_workers(envs, start_method)


def start_workers(envs, start_method):
    context = multiprocessing.get_context(start_method)
    atexit.register(close_envs, envs)  # Python's own end would wait for them: they ignore SIGTERM
    for group in envs.groups:
        ours, theirs = context.Pipe()
        process = context.Process(target=env_worker, daemon=True,
                                  args=(theirs, envs.args, envs.stream, group, envs.drawn))
        process.start()
        theirs.close()
        envs.workers.append((process, ours))
    try:
        return [receive(envs, number, START_TIMEOUT) for number in range(len(envs.workers))][0]
    except EnvFailure as failure:
        close_envs(envs)
        raise EnvFailure(f"{failure}{DRAWING_HINT * envs.drawn}")


def close_envs(envs):
    """End the environment processes."""
    for process, pipe in envs.workers:
        process.kill()
        process.join()
        pipe.close()
    envs.workers.clear()


def reset_envs(envs, episodes, taken=None):
    """Begin episode `episodes[i]` in environment i and take the actions `taken[i]` (T_i, A) in it -> obs (E, O).

    The simulator is deterministic: on the same machine and versions this gives the same state to the last bit."""
    begins = list(zip(episodes, taken or [[]] * len(episodes)))
    return np.concatenate(ask(envs, "reset", [[begins[i] for i in group] for group in envs.groups], START_TIMEOUT))


def step_envs(envs, action):
    """One agent step of every environment, action (E, A) -> obs to act on next (E, O), Transition, and (E, 4):
    simulator steps taken, then return, cost and length of the episode so far."""
    obs, rows, stats = zip(*ask(envs, "step", [np.asarray(action, np.float32)[group] for group in envs.groups]))
    return np.concatenate(obs), Transition(*map(np.concatenate, zip(*rows))), np.concatenate(stats)


def restart_envs(envs, episodes, failure):
    """All processes anew after a failure, at the start of those episodes -> obs (E, O).

    EnvFailure after MAX_FAILURES since `envs.failures` was last emptied."""
    while len(envs.failures) < MAX_FAILURES:
        envs.failures.append(str(failure))
        warn(f"{failure}; all are started anew")
        close_envs(envs)
        try:
            start_workers(envs, "spawn")  # by now JAX has threads, which a fork would copy in whatever state they are
            return reset_envs(envs, episodes)
        except EnvFailure as again:
            failure = again
    raise EnvFailure(f"{failure} (after {MAX_FAILURES} new starts)")


def warn(message):
    """A line of its own on stderr, also while there is a progress bar."""
    tqdm.write(message, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------
def evaluate(args, agent, envs, num_episodes, stopping=(), bar=None):
    """Play that many whole episodes without exploration noise -> one dict each (return, cost, length, balance, and
    `played`, a Transition of arrays (T, ...)), and frames of the first one for `write_video`.

    Episode i always has the same seed. Where a process fails, a batch of episodes is played again. Nothing is returned
    once `stopping` is no longer empty."""
    episodes, frames, num_envs = [], [], sum(map(len, envs.groups))
    while len(episodes) < num_episodes:
        first = len(episodes)
        try:
            batch, pictures = play(args, agent, envs, first, min(num_envs, num_episodes - first), stopping)
        except EnvFailure as failure:
            restart_envs(envs, [first] * num_envs, failure)
            continue
        if stopping:
            return [], []
        episodes, frames = episodes + batch, frames or pictures
        if bar is not None:
            bar.update(len(batch))
    return episodes, frames


def play(args, agent, envs, episode, count, stopping):
    """What `evaluate` does with one batch: that episode of the first `count` environments, to its end in each."""
    obs, rows, frames, ends = reset_envs(envs, [episode] * sum(map(len, envs.groups))), [], [], {}
    actor = init_actor(args, jax.random.key(episode_seed(args.seed, 2, 0, episode)), action_size(agent))
    padded = np.zeros((args.num_envs, obs.shape[1]), np.float32)  # so that `act` is compiled only once
    while len(ends) < count and not stopping:
        padded[:len(obs)] = obs
        action, actor = act(args, agent, actor, padded, np.full(args.num_envs, not rows), False)
        obs, row, stats = step_envs(envs, np.asarray(action)[:len(obs)])
        rows.append(row)
        for index in set(np.flatnonzero(row.done[:count]).tolist()) - set(ends):
            played = Transition(*(np.stack(x)[:, index] for x in zip(*rows)))
            plans = float(actor.metrics["charts/balance"][index]) / len(rows)
            ends[index] = dict(zip(("environment", "return", "cost", "length", "balance", "played"), (
                episode + index, *stats[index, 1:3].tolist(), int(stats[index, 3]), plans, played)))
        if envs.drawn and episode == 0 and 0 not in ends and (picture := ask(envs, "draw", envs.groups)[0]) is not None:
            frames.append((picture, *stats[0, 1:3]))
    return [ends[index] for index in sorted(ends)], frames


def interval(values):
    """Bounds of the mean: its 95% bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.asarray(values, float), (2000, len(values)))
    return np.percentile(drawn.mean(1), [2.5, 97.5])


def summary(episodes, step, cost_rate, wall_time):
    """One line on an evaluation: mean ± standard deviation [95% interval of the mean]."""
    returns, costs, balance = ([episode[name] for episode in episodes] for name in ("return", "cost", "balance"))
    (low, high), (least, most), wall_time = interval(returns), interval(costs), int(wall_time)
    return (f"step {step:,}: return {np.mean(returns):.2f} ± {np.std(returns):.2f} [{low:.1f}, {high:.1f}], cost "
            f"{np.mean(costs):.1f} ± {np.std(costs):.1f} [{least:.1f}, {most:.1f}] over {len(episodes)} episodes, "
            f"cost rate {cost_rate:.4f}, balance {np.mean(balance):.0%}, wall time "
            f"{wall_time // 3600}:{wall_time // 60 % 60:02d}:{wall_time % 60:02d}")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------
class Progress(NamedTuple):
    """Where a run is, on the host's side."""

    step: int  # simulator steps, all environments together, were no episode ever shorter
    completed: int  # the step up to which cycles of collecting, updating and evaluating are complete
    simulated: int  # simulator steps really taken
    cost: float  # of all training so far
    acts: int  # agent steps that the sums in actor.metrics are over
    episodes: np.ndarray  # (E,): number of the episode that each environment is in
    is_first: np.ndarray  # (E,): whether nothing was done in it yet
    obs: np.ndarray  # (E, O): what to act on next
    rows: list  # of episodes.csv: every episode that has ended
    wall_time: float  # seconds, until the run was last started


class Run(NamedTuple):
    """All that a run changes, and all that a checkpoint holds."""

    agent: AgentState
    actor: Actor
    buffer: Buffer
    progress: Progress


CHECKPOINT_FORMAT = 2
COLUMNS = ("split", "step", "environment", "return", "cost", "length")


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which takes the place of `path` once it is whole. OSError if there is no room."""
    beside = path.with_name(path.stem.partition("_")[0] + ".tmp")  # all checkpoints' is one: a kill leaves no more
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_csv(path, columns, rows):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def flatten(tree):
    """A pytree as {path: NumPy array}; typed keys as their data."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return {jax.tree_util.keystr(path): np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_checkpoint(run_dir, run, wall_time):
    """Write checkpoint_STEP.npz with everything that training needs to go on, without pickle; keep the one before."""
    buffer = run.buffer._replace(rows=jax.tree.map(lambda rows: rows[:int(run.buffer.size)], run.buffer.rows))
    counters = run.progress._asdict() | {"wall_time": wall_time, "format": CHECKPOINT_FORMAT}
    with replacing(run_dir / f"checkpoint_{run.progress.step}.npz") as file:
        np.savez(file, counters=np.array(json.dumps(counters, default=lambda array: array.tolist())),
                 **flatten({"agent": run.agent, "actor": run.actor, "buffer": buffer}))
    for old in checkpoints(run_dir)[:-2]:
        old.unlink()


def checkpoints(run_dir):
    """The checkpoints of a run, the newest last."""
    found = [path for path in Path(run_dir).glob("checkpoint_*.npz") if path.stem.split("_")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.stem.split("_")[1]))


def load_checkpoint(run_dir, templates):
    """The trees named in `templates` ({"agent": ..., ...}, arrays or their shapes) in the newest checkpoint; counters.

    SystemExit with one line if there is none, or it is damaged, foreign or made with other sizes."""
    def restore(leaf_path, leaf):
        name = jax.tree_util.keystr(leaf_path)
        saved = file[name]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(saved))
        if name.startswith("['buffer'].rows") and saved.shape[1:] == leaf.shape[1:] and len(saved) <= len(leaf):
            saved = np.concatenate([saved, np.zeros((len(leaf) - len(saved), *saved.shape[1:]), saved.dtype)])
        if saved.shape != leaf.shape:
            raise ValueError(f"{name} has shape {saved.shape}, expected {leaf.shape}")
        return jnp.asarray(saved, leaf.dtype)

    if not (found := checkpoints(run_dir)):
        raise SystemExit(f"{run_dir} has no checkpoint: the run was killed before its first evaluation, start it anew")
    try:
        with np.load(found[-1], allow_pickle=False) as file:
            counters = json.loads(str(file["counters"]))
            if counters["format"] != CHECKPOINT_FORMAT:
                raise ValueError(f"format {counters['format']} of another version")
            return jax.tree_util.tree_map_with_path(restore, templates), counters
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        hint = f"; remove it to go on from {found[-2].name}" if len(found) > 1 else ""
        raise SystemExit(f"{found[-1]} is damaged or not a checkpoint of this script: {error}{hint}")


def make_run_dir(args):
    """The run's directory, new, with args.json: all flags, package versions, the git commit."""
    run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    packages = ("jax", "jaxlib", "optax", "numpy", "safety-gymnasium", "gymnasium", "mujoco")
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    info = {"script": Path(__file__).stem, "args": dataclasses.asdict(args), "git_commit": git.stdout.strip() or None,
            "python": sys.version.split()[0], "packages": {name: importlib.metadata.version(name) for name in packages}}
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(info, indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"--runs-dir {args.runs_dir}: {error.strerror}: {error.filename}")
    return run_dir


def reason(error):
    """An OSError in one line; some libraries' own have nothing but a text."""
    return error.strerror or str(error).partition("\n")[0]


def attempt(write, *arguments):
    """Write, or warn that there is no room on the disk -> whether it was written."""
    try:
        write(*arguments)
    except OSError as error:
        warn(f"warning: {reason(error)}: {error.filename or 'the run directory'} was not written")
        return False
    return True


class Logs(NamedTuple):
    run_dir: Path
    lock: io.IOBase  # held while the process lives
    writer: object  # TensorBoard
    wandb_run: object  # Weights & Biases, or None


def open_logs(args, run_dir):
    """TensorBoard and, with --track, Weights & Biases, where a resumed run goes on -> Logs.

    SystemExit if another process trains in that directory."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary import Writer
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    file = open(run_dir / "args.json", "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process trains in {run_dir}")
    except OSError:
        pass  # a file system without locks
    flags, wandb_run = {name: "" if value is None else value for name, value in vars(args).items()}, None
    if args.track:
        try:
            wandb_run = importlib.import_module("wandb").init(
                project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, resume="allow",
                config=flags, group=f"{args.env_id}__{args.exp_name}", dir=str(run_dir))
        except Exception as error:  # a project's name that cannot be, no network, ...
            raise SystemExit(f"--track: {error}".partition("\n")[0])
    if not args.resume:
        hparams = EventFileWriter(str(run_dir), filename_suffix=".flags")
        hparams.add_event(Event(wall_time=time.time(), summary=hparams_pb(flags)))
        hparams.close()
    return Logs(run_dir, file, Writer(str(run_dir)), wandb_run)


def write_logs(logs, values, step):
    """Numbers by tag."""
    for tag, value in values.items():
        logs.writer.add_scalar(tag, float(value), step)
    logs.writer.flush()
    if logs.wandb_run is not None:
        logs.wandb_run.log({tag: float(value) for tag, value in values.items()} | {"step": step})


def write_video(path, frames, wandb_run=None):
    """An episode as mp4, one frame (picture, return and cost so far) per agent step."""
    import imageio
    from PIL import Image, ImageDraw

    pictures = [Image.fromarray(picture) for picture, _, _ in frames]
    for picture, (_, total, cost) in zip(pictures, frames):
        ImageDraw.Draw(picture).text((12, 8), f"return {total:.1f}  cost {cost:.0f}", "white", font_size=24)
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # of os.fork(), by which imageio starts ffmpeg
        imageio.mimwrite(path, list(map(np.asarray, pictures)), fps=20, macro_block_size=1)
    if wandb_run is not None:
        wandb_run.log({"video": importlib.import_module("wandb").Video(str(path))})


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
    return found or [message for holds, message in rules(args) if not holds]


def parse_args(argv=None):
    """Flags from the command line; with --resume or --evaluate on top of those the run was started with.

    SystemExit with one line for each flag that cannot be."""
    args = read_flags(argv, Args())
    args = read_flags(argv, dataclasses.replace(args, **PRESETS[args.preset]))
    if run_dir := args.resume or args.evaluate:
        try:
            info = json.loads((Path(run_dir) / "args.json").read_text())
            if info["script"] != Path(__file__).stem:
                raise SystemExit(f"{run_dir} was made by {info['script']}.py: use that script")
            saved = Args(**info["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{run_dir} is not a run directory of this script: {error}")
        args = read_flags(argv, saved)
        free = FREE_ON_RESUME + (("seed",) if args.evaluate else ())
        changed = [name for name in vars(saved) if name not in free and getattr(args, name) != getattr(saved, name)]
        if changed:
            raise SystemExit(f"--{changed[0].replace('_', '-')} cannot differ from the run in {run_dir}")
    if found := problems(args):
        raise SystemExit("\n".join(found))
    return args


def check_env_id(env_id):
    """SystemExit with the nearest names if Safety-Gymnasium has no such task."""
    try:
        import_safety_gymnasium()
        from safety_gymnasium.utils.registration import safe_registry
    except Exception as error:
        raise SystemExit(f"Safety-Gymnasium cannot be imported: {error} (MUJOCO_GL={os.environ.get('MUJOCO_GL')})")
    if env_id not in safe_registry:
        flat = [name for name in safe_registry if "Vision" not in name and "Debug" not in name]
        near = ", ".join(difflib.get_close_matches(env_id, flat)) or "for example SafetyPointGoal1-v0"
        raise SystemExit(f"--env-id {env_id} is not a task of Safety-Gymnasium; did you mean {near}?")


def check_machine(args):
    """SystemExit if the task, the place for runs or the login for --track is not there."""
    check_env_id(args.env_id)
    flag, value = ("--resume", args.resume) if args.resume else ("--runs-dir", args.runs_dir)
    place = next(path for path in (Path(value).absolute(), *Path(value).absolute().parents) if os.path.exists(path))
    if not args.evaluate and not (place.is_dir() and os.access(place, os.W_OK)):
        raise SystemExit(f"{flag} {value}: {place} is not a directory that can be written to")
    if args.track and not args.evaluate:
        try:
            wandb, sent = importlib.import_module("wandb"), os.environ.get("WANDB_MODE") not in ("offline", "disabled")
            if sent and not wandb.login():
                raise OSError("nobody is logged in: wandb login, or WANDB_MODE=offline")
        except Exception as error:  # a broken installation raises anything
            raise SystemExit(f"--track: Weights & Biases cannot be used: {error}")


def check_device(args, sizes):
    """SystemExit if JAX has no device, or too small a one for the replay buffer."""
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS asks for what is not there
        why = str(error).partition("\n")[0]
        raise SystemExit(f"JAX finds no device: {why} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')})")
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(partial(init_buffer, args, *sizes))))
    memory = device.memory_stats() or {}  # a CPU has none
    there = memory.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > there and not args.evaluate:
        flag = "--buffer-size" if hasattr(args, "buffer_size") else "--train-every"  # of those that keep one rollout
        raise SystemExit(f"the replay buffer needs {needed / 2**30:.1f} GiB, {device} has {there / 2**30:.1f}: lower "
                         f"{flag}")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def cycle_end(args, completed):
    """The step at which the cycle that begins at `completed` ends: after the random start, then every train_every."""
    following = (completed // args.train_every + 1) * args.train_every
    return min(args.learning_starts if completed < args.learning_starts else following, args.total_timesteps)


def require_finite(name, values, step):
    """SystemExit if a number of an environment, in values (E, ...), is not finite."""
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(-1))
    if len(bad):
        raise SystemExit(f"{name} of environment {bad[0]} is not finite at step {step:,}; the last checkpoint stays as "
                         "it is")


def fresh(args, sizes, key):
    """Agent, actor and buffer at a run's first moment, by name."""
    key_agent, key_actor = jax.random.split(key)
    return {"agent": init_agent(args, key_agent, *sizes), "actor": init_actor(args, key_actor, sizes[1]),
            "buffer": init_buffer(args, *sizes)}


def begin(args, envs, sizes):
    """A run at its first moment, or with --resume at that of its newest checkpoint.

    On the same machine and versions its environments are there to the last bit. Where they are not, unfinished
    episodes are cut."""
    check_device(args, sizes)
    make, key = partial(fresh, args, sizes), jax.random.key(args.seed)
    if not args.resume:
        first = np.zeros(args.num_envs, int)
        progress = Progress(0, 0, 0, 0.0, 0, first, first == 0, reset_envs(envs, first), [], 0.0)
        return Run(**jax.jit(make)(key), progress=progress)
    trees, counters = load_checkpoint(args.resume, jax.eval_shape(make, key))
    if counters["completed"] >= args.total_timesteps:
        raise SystemExit(f"{args.resume} is at step {counters['step']:,} already: raise --total-timesteps to go on")
    arrays = {"episodes": int, "is_first": bool, "obs": np.float32}
    progress = Progress(**{name: np.array(counters[name], arrays[name]) if name in arrays else counters[name]
                           for name in Progress._fields})
    run = Run(**trees, progress=progress)
    if np.array_equal(reset_envs(envs, progress.episodes, unfinished(run.buffer)), progress.obs):
        return run
    warn("the simulator does not repeat the unfinished episodes to the last bit (another machine, version?): they end")
    return cut(run, reset_envs(envs, progress.episodes + 1))


def unfinished(buffer):
    """E times (T_i, A): the actions taken in the environments' unfinished episodes, as far as the ring has them."""
    order = np.arange(int(buffer.head) - int(buffer.size), int(buffer.head))  # a negative index is an older row
    done, actions = np.asarray(buffer.rows.done)[order], np.asarray(buffer.rows.action)[order]
    return [actions[np.flatnonzero([1, *ends])[-1]:, index] for index, ends in enumerate(done.T)]


def cut(run, obs):
    """The run with all its episodes ended by truncation, before the first step, from obs (E, O), of the next ones."""
    episodes, first = run.progress.episodes + 1, np.ones(len(obs), bool)
    return run._replace(buffer=cut_episodes(run.buffer, first), progress=run.progress._replace(
        episodes=episodes, is_first=first, obs=obs))


def collect(args, envs, run):
    """One agent step of every environment -> run, seconds spent in `act`. Where a process fails, all episodes end by
    truncation; EnvFailure with the run as its `run` after too many failures."""
    began, progress, actor, acts = time.time(), run.progress, run.actor, run.progress.acts
    if progress.step < args.learning_starts:
        random = np.random.default_rng((args.seed, 3, progress.step))
        action = random.uniform(-1.0, 1.0, (args.num_envs, run.buffer.rows.action.shape[-1])).astype(np.float32)
    else:
        action, actor = act(args, run.agent, actor, progress.obs, progress.is_first, True)
        action, acts = np.asarray(action), acts + 1
    run, seconds = run._replace(actor=actor, progress=progress._replace(acts=acts)), time.time() - began
    step = progress.step + args.num_envs * args.action_repeat
    require_finite("action", action, step)
    try:
        obs, row, stats = step_envs(envs, action)
    except EnvFailure as failure:
        try:
            return cut(run, restart_envs(envs, progress.episodes + 1, failure)), seconds
        except EnvFailure as last:
            last.run = run  # the one before has given its actor away
            raise
    for name, values in {"observation": np.concatenate([obs, row.next_obs], -1), "reward": row.reward,
                         "cost": row.cost}.items():
        require_finite(name, values, step)
    ended = [["train", step, index, *stats[index, 1:3].tolist(), int(stats[index, 3])]
             for index in np.flatnonzero(row.done).tolist()]
    return run._replace(buffer=add(run.buffer, row), progress=progress._replace(
        step=step, simulated=progress.simulated + int(stats[:, 0].sum()), cost=progress.cost + float(row.cost.sum()),
        acts=acts, episodes=progress.episodes + (row.done > 0), is_first=row.done > 0, obs=obs,
        rows=progress.rows + ended if ended else progress.rows)), seconds


def show(bar, doing):
    """What takes time now, in the progress bar."""
    if bar.desc != doing + ": " * bool(doing):
        bar.set_description(doing)


def cycle(args, envs, run, bar, stopping):
    """Collect until the next block of updates, then update -> run, numbers by tag, an EnvFailure or None.

    It ends early where `stopping` fills."""
    began, acting, values, end = time.time(), 0.0, {}, cycle_end(args, run.progress.completed)
    while run.progress.step < end and not stopping:
        acted = run.progress.step - args.learning_starts
        show(bar, "compiling" if 0 <= acted < args.num_envs * args.action_repeat else "")
        try:
            run, seconds = collect(args, envs, run)
        except EnvFailure as failure:
            return failure.run, values, failure
        acting, _ = acting + seconds, bar.update(run.progress.step - bar.n)
    collected, step = time.time(), run.progress.step
    due = updates_due(args, step) if step >= args.learning_starts else 0
    at_once = math.gcd(updates_due(args, args.train_every), 100)  # the bar moves
    while int(run.agent.num_updates) + at_once <= due and not stopping:
        show(bar, "updating" if int(run.agent.num_updates) else "compiling")
        agent, metrics = update_many(args, run.agent, run.buffer, at_once)
        run, values = run._replace(agent=agent), jax.device_get(metrics)
        if bad := [tag for tag, value in values.items() if not math.isfinite(value)]:
            raise SystemExit(f"{', '.join(bad)} not finite at step {step:,}; the last checkpoint stays as it is")
    total = time.time() - began
    return run, values | {"time/act": acting / total, "time/env": (collected - began - acting) / total,
                          "time/update": 1 - (collected - began) / total}, None


def report(logs, bar, run, values):
    """Write and show a cycle's numbers -> run, its sums begun anew."""
    progress, metrics = run.progress, jax.device_get(run.actor.metrics)
    values |= {tag: np.mean(x) / progress.acts for tag, x in metrics.items() if progress.acts}
    if rows := [row[3:] for row in progress.rows if row[0] == "train" and row[1] > progress.completed]:
        tags = ("charts/episodic_return", "charts/episodic_cost", "charts/episodic_length")
        values |= dict(zip(tags, np.mean(rows, axis=0)))
    values |= {"charts/cost_rate": progress.cost / progress.simulated}
    attempt(write_logs, logs, values, progress.step)
    attempt(write_csv, logs.run_dir / "episodes.csv", COLUMNS, progress.rows)
    shown = {"balance": ("charts/balance", ".0%"), "return": ("charts/episodic_return", ".1f"),
             "cost": ("charts/episodic_cost", ".0f"), "cost_rate": ("charts/cost_rate", ".4f")}
    bar.set_postfix({name: format(values[tag], form) for name, (tag, form) in shown.items() if tag in values})
    return run._replace(actor=run.actor._replace(metrics=jax.tree.map(jnp.zeros_like, run.actor.metrics)),
                        progress=progress._replace(acts=0))


def report_evaluation(args, logs, run, episodes, frames):
    """Write an evaluation -> run, with its episodes among the rows and its cycle completed."""
    step = run.progress.step
    tags = {"return": "eval/episodic_return", "cost": "eval/episodic_cost", "balance": "eval/balance"}
    values = {tag: np.mean([episode[name] for episode in episodes]) for name, tag in tags.items()}
    attempt(write_logs, logs, values | critic_metrics(args, run.agent, episodes), step)
    if frames:
        attempt(write_video, logs.run_dir / "videos" / f"{step}.mp4", frames, logs.wandb_run)
    rows = run.progress.rows + [["eval", step, *(episode[name] for name in COLUMNS[2:])] for episode in episodes]
    attempt(write_csv, logs.run_dir / "episodes.csv", COLUMNS, rows)
    return run._replace(progress=run.progress._replace(rows=rows, completed=step))


def train(args, stopping=()):
    """Train on args.env_id (or go on with args.resume) -> the last evaluation's episodes.

    As soon as the sequence `stopping` is not empty (a signal fills it), the step is finished, a checkpoint written and
    the run left. SystemExit with one line for what cannot go on; EnvFailure if an environment cannot be made."""
    check_machine(args)
    with contextlib.ExitStack() as stack:
        envs, *sizes = start_envs(args, 0, args.num_envs)
        stack.callback(close_envs, envs)
        eval_envs, *_ = start_envs(args, 1, min(args.num_envs, args.eval_episodes), args.capture_video)
        stack.callback(close_envs, eval_envs)
        return learn(args, envs, eval_envs, sizes, stopping)  # from here on JAX takes threads


def learn(args, envs, eval_envs, sizes, stopping):
    """What `train` does once its environments have started."""
    logs = open_logs(args, Path(args.resume)) if args.resume else None
    run = begin(args, envs, sizes)
    logs = logs or open_logs(args, make_run_dir(args))
    print(f"{logs.run_dir}: {sizes[0]} observations, {sizes[1]} actions, on {jax.devices()[0]}", flush=True)
    if jax.default_backend() == "cpu" and (line := advice(args)):
        print(line, flush=True)
    began, first, episodes = time.time() - run.progress.wall_time, (time.time(), run.progress.step), []
    bar = tqdm(total=args.total_timesteps, initial=first[1], unit="step", unit_scale=True, dynamic_ncols=True,
               mininterval=1.0 if sys.stderr.isatty() else 60.0)
    saved, failure = True, None
    with bar:
        while run.progress.completed < args.total_timesteps:
            run, values, failure = cycle(args, envs, run, bar, stopping)
            if stopping or failure:
                break
            step = run.progress.step
            values["charts/SPS"] = (step - first[1]) / (time.time() - first[0])
            run = report(logs, bar, run, values)
            if step >= args.total_timesteps or args.eval_every and step % args.eval_every == 0:
                show(bar, "evaluating")
                try:
                    episodes, frames = evaluate(args, run.agent, eval_envs, args.eval_episodes, stopping)
                except EnvFailure as error:
                    failure = error
                if stopping or failure:
                    break
                run = report_evaluation(args, logs, run, episodes, frames)
                saved = attempt(save_checkpoint, logs.run_dir, run, time.time() - began)
                bar.write(summary(episodes, step, run.progress.cost / run.progress.simulated, time.time() - began))
                sys.stdout.flush()  # at once, into a file too
            else:
                run = run._replace(progress=run.progress._replace(completed=step))
            envs.failures.clear()
            eval_envs.failures.clear()
    if stopping or failure:
        saved = attempt(save_checkpoint, logs.run_dir, run, time.time() - began)
        changed = f" --total-timesteps {args.total_timesteps} --eval-every {args.eval_every}" if args.resume else ""
        if saved:
            warn(f"stopped at step {run.progress.step:,}; go on with --resume {logs.run_dir}{changed}")
    attempt(logs.writer.close)
    if logs.wandb_run is not None:
        logs.wandb_run.finish()
    if failure:
        raise failure
    if not saved:
        raise SystemExit(f"step {run.progress.step:,} could not be saved; any checkpoint in {logs.run_dir} is older")
    return episodes


def evaluate_run(args):
    """Evaluate the newest checkpoint of a run, print and write what comes out -> its episodes."""
    check_machine(args)
    run_dir, began = Path(args.evaluate), time.time()
    envs, *sizes = start_envs(args, 1, min(args.num_envs, args.eval_episodes), args.capture_video)
    with contextlib.ExitStack() as stack:
        stack.callback(close_envs, envs)
        check_device(args, sizes)
        shapes = jax.eval_shape(partial(fresh, args, sizes), jax.random.key(0))
        trees, counters = load_checkpoint(run_dir, {"agent": shapes["agent"]})
        with tqdm(total=args.eval_episodes, unit="episode") as bar:
            episodes, frames = evaluate(args, trees["agent"], envs, args.eval_episodes, bar=bar)
    print(summary(episodes, counters["step"], counters["cost"] / max(counters["simulated"], 1), time.time() - began))
    for tag, value in critic_metrics(args, trees["agent"], episodes).items():
        print(f"{tag} {value:.3g}")
    columns = (*COLUMNS, "balance")
    try:
        write_csv(run_dir / "evaluation.csv", columns, [
            ["eval", counters["step"], *(episode[name] for name in columns[2:])] for episode in episodes])
        if frames:
            write_video(run_dir / "videos" / f"evaluation_{counters['step']}.mp4", frames)
    except OSError as error:
        raise SystemExit(f"{run_dir}: {reason(error)}: the lines above were not written to a file")
    return episodes


def heed_signals(stopping):
    """Ctrl-C and SIGTERM fill the list `stopping`; a second Ctrl-C ends the process.

    A thread reads what the C handlers write: Python's own would wait until JAX gives control back."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while True:
            for number in os.read(reading, 16):
                if stopping and number == signal.SIGINT:
                    os._exit(128 + number)
                stopping.append(number)
                print("\nstopping after this step; Ctrl-C once more stops without saving", file=sys.stderr, flush=True)

    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=watch, daemon=True).start()


def main(argv=None):
    """The command line. Exit status 130 after Ctrl-C, 143 after SIGTERM, once the run is in a checkpoint."""
    with contextlib.suppress(AttributeError):  # a notebook's is no file
        sys.stdout.reconfigure(errors="replace")  # where there is no "±"
    args, stopping = parse_args(argv), []
    if not jax.config.jax_compilation_cache_dir:  # the variable JAX_COMPILATION_CACHE_DIR names another place
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/spowl"))
    try:
        if args.evaluate:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
            evaluate_run(args)
        else:
            heed_signals(stopping)
            train(args, stopping)
    except EnvFailure as failure:
        raise SystemExit(str(failure))
    if stopping:
        sys.stdout.flush()
        os._exit(128 + stopping[0])  # at once: Python's own exit has crashed under XLA's threads, still computing


if __name__ == "__main__":
    main()
