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
"""SPOWL without its planner: the policy acts (arXiv 2506.04828, §5.2, Fig. 6).

World model and policy are learned as in the full agent; what is executed is the policy's action, a sample in training
and the mean in evaluation.

Differs from spowl_continuous.py in
    changed: act - the policy's action in all environments
    changed: Actor, init_actor - no plan is carried to the next step, no planner's metrics
    removed: policy_rollout, evaluate_plans, select_elites, Plan, plan - the planner (Eq. 11-12, Algorithm 1)
    removed: bootstrap_bounds, prefer_plan, decide - nothing is compared (Algorithm 2)
    flags: plan_horizon, num_samples, num_pi_trajs, num_elites, iterations, temperature, min_std, max_std,
        plan_cost_agg, switch_rule, bootstrap_samples - accepted, so that one command line runs every script, but
        without effect

    for every 5,000 simulator steps:
        for every agent step, all environments at once:
            a = pi(h(s));  step the simulator, add the transition to the replay ring
        for every agent step just collected:
            sample sequences, update the world model (Eq. 5 with the targets of Eq. 6), then the policy (Eq. 7-10),
            then the multiplier and penalty, then the target networks

Shapes: E environments, B batch, H horizon, K ensemble heads, O observation, A action, Z latent, M bins. "Steps" are
simulator steps unless called agent steps (one = `action_repeat` of them).
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
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
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
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
@dataclasses.dataclass(frozen=True)
class Args:
    """SPOWL, policy only: a latent world model and a Lagrangian policy that acts without a planner."""

    # --- Run
    env_id: str = "SafetyPointGoal1-v0"
    """task of Safety-Gymnasium"""
    preset: Literal["paper", "laptop"] = "paper"
    """values of all flags that are not given: the paper's, or PRESETS["laptop"], for two cores and within the hour"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's directory"""
    seed: int = 1
    """seed of every random stream: networks, exploration, batches, environments"""
    total_timesteps: int = 5_000_000
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

    # --- Environment protocol
    num_envs: int = 10
    """environments stepped in parallel, each in its own process"""
    action_repeat: int = 5
    """simulator steps per agent step; reward and cost are summed over them"""
    learning_starts: int = 5_000
    """simulator steps with uniformly random actions before the first update"""
    train_every: int = 5_000
    """simulator steps between two blocks of updates"""
    updates_per_step: float = 1.0
    """updates per agent step collected"""
    obs_transform: Literal["raw", "log"] = "raw"
    """observations as the networks see them: raw, or log, which spreads the near end of a lidar (see transform_obs)"""
    env_timeout: float = 60.0
    """seconds after which an environment's process that gives no answer is replaced"""
    eval_every: int = 50_000
    """simulator steps between evaluations, each followed by a checkpoint (0: only at the end)"""
    eval_episodes: int = 10
    """whole episodes per evaluation, on environments and seeds of their own"""
    buffer_size: int = 1_000_000
    """transitions kept for replay, all environments together; the oldest are overwritten"""

    # --- World model (Eq. 5-6)
    latent_dim: int = 512
    """size Z of the latent; a multiple of simnorm_dim"""
    enc_dim: int = 256
    """width of the encoder's hidden layer"""
    mlp_dim: int = 512
    """width of the two hidden layers of every other network"""
    simnorm_dim: int = 8
    """size of the groups in which a latent is normalised by softmax"""
    num_bins: int = 101
    """bins M of the discrete regression"""
    bin_limit: float = 10.0
    """the bins span [-bin_limit, bin_limit] in symlog space"""
    num_q: int = 5
    """heads of the value ensemble Q"""
    num_c: int = 5
    """heads K of the cost-value ensemble Qc (Fig. 8)"""
    num_cost_heads: int = 5
    """heads of the one-step cost ensemble"""
    dropout: float = 0.01
    """dropout after the first layer of Q and Qc, in their cross-entropies alone"""
    batch_size: int = 256
    """sequences per update"""
    learning_rate: float = 3e-4
    """step size of Adam, for model and policy"""
    enc_lr_scale: float = 0.3
    """the encoder's step size is learning_rate times this"""
    grad_clip: float = 20.0
    """largest global norm of a gradient, model and policy each on their own"""
    rho: float = 0.5
    """weight rho^t of step t of the rollout in every loss (the paper's lambda)"""
    consistency_coef: float = 20.0
    """weight of the latent consistency loss"""
    reward_coef: float = 0.1
    """weight of the reward cross-entropy"""
    value_coef: float = 0.1
    """weight of the Q cross-entropy"""
    cost_coef: float = 0.1
    """weight of the cost cross-entropy"""
    cost_value_coef: float = 0.1
    """weight of the Qc cross-entropy"""
    cost_positive_weight: float = 10.0
    """factor on the cost cross-entropy of transitions with cost > 0, which are rare"""
    gamma: float = 0.975
    """discount of reward per agent step"""
    cost_gamma: float = 0.997
    """discount of cost per agent step"""
    tau: float = 0.01
    """share by which the target networks move after every update"""
    cost_read_out: Literal["symlog", "expectation"] = "symlog"
    """how logits stand for a cost: as for rewards, which reads rare costs low, or as the expectation over [0, C], C the
    largest possible discounted cost (see cost_bins)"""
    cost_target_agg: Literal["min", "mean", "max"] = "mean"
    """how the heads of the target Qc are joined into one cost target (Fig. 7)"""

    # --- Safe policy (Eq. 7-10)
    entropy_coef: float = 1e-4
    """weight of the entropy bonus, multiplied by the action dimension"""
    log_std_min: float = -10.0
    """lower bound of the policy's log standard deviation"""
    log_std_max: float = 2.0
    """upper bound of the policy's log standard deviation"""
    cost_limit: float = 0.1
    """budget b on Qc(z, pi(z))"""
    lagrangian_heads: int = 5
    """random heads X <= num_c of Qc that enter the constraint at each update (Fig. 8)"""
    lagrangian_agg: Literal["mean", "max"] = "mean"
    """how those heads are joined (Fig. 8)"""
    lambda_init: float = 1e-6
    """first Lagrange multiplier"""
    lambda_max: float = 10.0
    """cap on the Lagrange multiplier"""
    mu_init: float = 5e-9
    """first penalty mu of a run of 1,000,000 updates; a shorter run's is as much larger as its updates are fewer"""
    mu_growth: float = 5e-6
    """nu: the penalty grows by the factor 1 + nu at every update of such a run, by more at every one of a shorter run:
    at the same share of its way every run has the same multiplier under the same violation"""
    mu_max: float = 1.0
    """cap on the penalty"""

    # --- Safe improvement planning (Eq. 11-12, Algorithms 1-2)
    horizon: int = 3
    """agent steps H that a training sequence spans"""
    plan_horizon: int | None = None
    """without effect: there is no planner"""
    num_samples: int = 512
    """without effect: there is no planner"""
    num_pi_trajs: int = 24
    """without effect: there is no planner"""
    num_elites: int = 64
    """without effect: there is no planner"""
    iterations: int = 6
    """without effect: there is no planner"""
    temperature: float = 0.5
    """without effect: there is no planner"""
    min_std: float = 0.05
    """without effect: there is no planner"""
    max_std: float = 2.0
    """without effect: there is no planner"""
    plan_cost_agg: Literal["max", "mean"] = "max"
    """without effect: there is no planner"""
    switch_rule: Literal["bootstrap", "means"] = "bootstrap"
    """without effect: there is no planner"""
    bootstrap_samples: int = 1000
    """without effect: there is no planner"""


PRESETS = {
    "paper": {},
    "laptop": dict(
        total_timesteps=300_000, eval_every=20_000, buffer_size=300_000, updates_per_step=0.5, obs_transform="log",
        latent_dim=128, enc_dim=128, mlp_dim=128, num_q=3, num_c=3, num_cost_heads=3, lagrangian_heads=3,
        batch_size=128, cost_read_out="expectation", cost_gamma=0.95, lambda_max=0.2, mu_init=4.8e-8, mu_growth=5e-6,
        plan_horizon=6, num_samples=128, num_pi_trajs=12, num_elites=16, iterations=4),
}


# ----------------------------------------------------------------------------------------------------------------------
# Maths
# ----------------------------------------------------------------------------------------------------------------------
def symlog(x):
    """sign(x) log(1 + |x|)"""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    """Inverse of symlog."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot(x, num_bins, limit):
    """(...) -> (..., M): symlog(x), clipped to the bins' range, as weights on its two neighbouring bins."""
    position = (jnp.clip(symlog(x), -limit, limit) + limit) * ((num_bins - 1) / (2 * limit))
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(num_bins)))


def read_out(logits, limit):
    """(..., M) -> (...): the number that logits stand for, symexp(sum softmax(logits) bins)."""
    bins = jnp.linspace(-limit, limit, logits.shape[-1])
    return symexp(jnp.matmul(jax.nn.softmax(logits), bins, precision="highest"))  # a GPU would round to 10 bits


def cost_bins(args):
    """(M,): bins from 0 to C = action_repeat / (1 - cost_gamma), the largest discounted cost at 1 per simulator step,
    evenly spaced in log(1 + c)."""
    largest = args.action_repeat / (1.0 - args.cost_gamma)
    return np.expm1(np.linspace(0.0, np.log1p(largest), args.num_bins)).astype(np.float32)


def cost_two_hot(args, x):
    """(...) -> (..., M): the distribution that stands for a cost. Under --cost-read-out expectation its mean is x:
    were the weights taken in log space, it would be up to 0.5% more, and bootstrapping would multiply that."""
    if args.cost_read_out == "symlog":
        return two_hot(x, args.num_bins, args.bin_limit)
    bins = cost_bins(args)
    below, above = np.append(np.float32(-1.0), bins[:-1]), np.append(bins[1:], bins[-1] + 1)
    x = jnp.clip(x, 0.0, bins[-1])[..., None]
    return jnp.maximum(0.0, jnp.where(x < bins, (x - below) / (bins - below), (above - x) / (above - bins)))


def cost_read_out(args, logits):
    """(..., M) -> (...): the cost that logits stand for, under --cost-read-out expectation sum softmax(logits) bins."""
    if args.cost_read_out == "symlog":
        return read_out(logits, args.bin_limit)
    return jnp.matmul(jax.nn.softmax(logits), cost_bins(args), precision="highest")


def cross_entropy(logits, target):
    """(..., M), (..., M) -> (...)"""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(target * logits, axis=-1)


def layer_norm(x, scale, shift):
    """Normalise the last axis to mean 0 and variance 1 (eps 1e-5), then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * scale + shift


def sim_norm(x, group):
    """(..., Z) -> (..., Z): softmax within groups of the given size."""
    return jax.nn.softmax(x.reshape(*x.shape[:-1], -1, group)).reshape(x.shape)


@jax.custom_vjp
def norm_mish(x, scale, shift):
    """Mish(layer_norm(x)), Mish(y) = y tanh(softplus(y)): the activation of every hidden layer.

    Its derivative is written out because it needs one exponential, where XLA's would recompute several."""
    return norm_mish_forward(x, scale, shift)[0]


def norm_mish_forward(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    inv_std = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    normed = centred * inv_std
    y = normed * scale + shift
    e = jnp.exp(jnp.minimum(y, 20.0))  # tanh(softplus(y)) = n / (n + 2), which is 1 in float32 from y = 20 on
    n = e * (e + 2.0)
    slope = (n + 4.0 * e * (e + 1.0) * y / (n + 2.0)) / (n + 2.0)
    # the barrier keeps XLA from fusing, and so repeating, this work in the backward pass
    return y * n / (n + 2.0), jax.lax.optimization_barrier((normed, inv_std, slope, scale))


def norm_mish_backward(residuals, grad):
    normed, inv_std, slope, scale = residuals
    grad_y = grad * slope
    weighted = grad_y * normed
    mean = lambda x: jnp.matmul(x, scale, precision="highest")[..., None] / scale.size  # of x * scale, never in memory
    grad_x = (grad_y * scale - mean(grad_y) - normed * mean(weighted)) * inv_std
    rows = tuple(range(grad.ndim - 1))
    return grad_x, jnp.sum(weighted, rows), jnp.sum(grad_y, rows)


norm_mish.defvjp(norm_mish_forward, norm_mish_backward)


def masked_mean(x, mask):
    """Mean of x over its last axis where mask is 1; 0 where nothing is."""
    return jnp.sum(x * mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Networks: an MLP is a tuple of layers, each a dict of arrays; an ensemble has one more leading axis
# ----------------------------------------------------------------------------------------------------------------------
def init_mlp(key, sizes, action_dim=0, norm_last=False, zero_last=False):
    """Layers for `sizes` = (input, hidden..., output): truncated normal x 0.02, biases 0.

    Where an action enters, the first layer keeps its rows apart (`w_action`): [z, a] W = z W_z + a W_a."""
    layers = []
    for i, (key, n_in, n_out) in enumerate(zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:])):
        last = i == len(sizes) - 2
        key_w, key_action = jax.random.split(key)
        w = jax.random.truncated_normal(key_w, -2.0, 2.0, (n_in, n_out))
        layer = {"w": w * (0.0 if last and zero_last else 0.02), "b": jnp.zeros(n_out)}
        if i == 0 and action_dim:
            layer["w_action"] = 0.02 * jax.random.truncated_normal(key_action, -2.0, 2.0, (action_dim, n_out))
        if not last or norm_last:
            layer |= {"scale": jnp.ones(n_out), "shift": jnp.zeros(n_out)}
        layers.append(layer)
    return tuple(layers)


def mlp(layers, x, action=None, keep=None):
    """(..., in), (..., A) -> (..., out): Linear, dropout by the mask `keep`, LayerNorm, Mish, ..., Linear."""
    lead = jnp.broadcast_shapes(x.shape[:-1], x.shape[:-1] if action is None else action.shape[:-1])
    x = x.reshape(-1, x.shape[-1])  # plain rows: products over several leading axes are slower
    for i, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        if i == 0 and action is not None:
            x = x + action.reshape(-1, action.shape[-1]) @ layer["w_action"]
        if i == 0 and keep is not None:
            x = x * keep
        if i < len(layers) - 1:
            x = norm_mish(x, layer["scale"], layer["shift"])
    return x.reshape(*lead, -1)


def ensemble(layers, z, action, keep=None):
    """(..., Z), (..., A) -> (K, ..., M): every head's logits."""
    if jax.default_backend() == "cpu":  # one head at a time stays in the cache: an update takes 15% less than by vmap
        each = [jax.tree.map(lambda x: x[k], (layers, keep)) for k in range(layers[0]["b"].shape[0])]
        return jnp.stack([mlp(head, z, action, kept) for head, kept in each])
    return jax.vmap(mlp, in_axes=(0, None, None, None if keep is None else 0))(layers, z, action, keep)


def latent_mlp(args, layers, x, action=None):
    """An MLP whose output is a latent: ... Linear, LayerNorm, SimNorm."""
    out = layer_norm(mlp(layers, x, action), layers[-1]["scale"], layers[-1]["shift"])
    return sim_norm(out, args.simnorm_dim)


# ----------------------------------------------------------------------------------------------------------------------
# World model and policy
# ----------------------------------------------------------------------------------------------------------------------
def init_model(args, key, obs_dim, action_dim):
    """Encoder h, dynamics f, and the heads for reward, cost, Q and Qc, as a dict of parameters."""
    key_h, key_f, key_r, key_c, key_q, key_qc = jax.random.split(key, 6)
    head = partial(init_mlp, sizes=(args.latent_dim, args.mlp_dim, args.mlp_dim, args.num_bins), action_dim=action_dim,
                   zero_last=True)
    return {
        "encoder": init_mlp(key_h, (obs_dim, args.enc_dim, args.latent_dim), norm_last=True),
        "dynamics": init_mlp(key_f, (args.latent_dim, args.mlp_dim, args.mlp_dim, args.latent_dim), action_dim,
                             norm_last=True),
        "reward": head(key_r),
        "cost": free_of_cost(args, jax.vmap(head)(jax.random.split(key_c, args.num_cost_heads))),
        "q": jax.vmap(head)(jax.random.split(key_q, args.num_q)),
        "qc": free_of_cost(args, jax.vmap(head)(jax.random.split(key_qc, args.num_c))),
    }


def free_of_cost(args, layers):
    """The same heads (K, ...) with biases that let them read 0 at first where costs are expectations: each bin but the
    first has a probability of e^-10 / (1 + its cost)."""
    if args.cost_read_out == "symlog":
        return layers
    biases = -(10.0 + np.log1p(cost_bins(args))) * (np.arange(args.num_bins) > 0)
    return (*layers[:-1], layers[-1] | {"b": layers[-1]["b"] + biases.astype(np.float32)})


def init_policy(args, key, action_dim):
    """Z -> 2A: mean and log standard deviation of a squashed Gaussian."""
    return init_mlp(key, (args.latent_dim, args.mlp_dim, args.mlp_dim, 2 * action_dim))


def encode(args, model, obs):
    """(..., O) -> (..., Z): z = h(s)."""
    return latent_mlp(args, model["encoder"], obs)


def next_latent(args, model, z, action):
    """(..., Z), (..., A) -> (..., Z): f(z, a)."""
    return latent_mlp(args, model["dynamics"], z, action)


def heads(args, layers, z, action):
    """(..., Z), (..., A) -> (K, ...): the values that the heads of Q read out."""
    return read_out(ensemble(layers, z, action), args.bin_limit)


def cost_heads(args, layers, z, action):
    """(..., Z), (..., A) -> (K, ...): the costs that the heads of Qc, or of the one-step cost, read out."""
    return cost_read_out(args, ensemble(layers, z, action))


def policy_sample(args, policy, z, key):
    """(..., Z) -> action, mean action (..., A), log pi (...): a ~ pi(z), reparameterised, with the tanh correction."""
    mean, log_std = jnp.split(mlp(policy, z), 2, axis=-1)
    log_std = args.log_std_min + 0.5 * (args.log_std_max - args.log_std_min) * (jnp.tanh(log_std) + 1.0)
    noise = jax.random.normal(key, mean.shape)
    pre_tanh = mean + jnp.exp(log_std) * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
    log_det = 2.0 * (math.log(2.0) - pre_tanh - jax.nn.softplus(-2.0 * pre_tanh))  # log(1 - tanh^2), without overflow
    return jnp.tanh(pre_tanh), jnp.tanh(mean), jnp.sum(gaussian - log_det, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Replay buffer: a ring on the device
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
    """An empty ring of args.buffer_size transitions."""
    sizes = Transition((obs_dim,), (action_dim,), (), (), (obs_dim,), (), ())
    rows = Transition(*(jnp.zeros((args.buffer_size // args.num_envs, args.num_envs, *size)) for size in sizes))
    return Buffer(rows, jnp.int32(0), jnp.int32(0))


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


def sample(args, buffer, key):
    """B sequences of H transitions, (H, B, ...), uniform over environments and starts, none across the write head."""
    capacity, num_envs = buffer.rows.reward.shape
    key_env, key_start = jax.random.split(key)
    env = jax.random.randint(key_env, (args.batch_size,), 0, num_envs)
    age = jax.random.randint(key_start, (args.batch_size,), 0, buffer.size - args.horizon + 1)  # 0: the oldest row
    row = (buffer.head - buffer.size + age + jnp.arange(args.horizon)[:, None]) % capacity
    return jax.tree.map(lambda rows: rows[row, env], buffer.rows)


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
    return Actor(jnp.copy(key), jnp.int32(0), {"charts/balance": jnp.zeros(args.num_envs)})


@partial(jax.jit, static_argnames="args", donate_argnames="actor")
def act(args, agent, actor, obs, is_first, explore):
    """The policy for all environments at once: obs (E, O) -> action (E, A) in [-1, 1], next actor.

    `is_first` has no meaning here; without `explore` the action is the policy's mean."""
    key = jax.random.fold_in(actor.key, actor.step)
    sampled, mean, _ = policy_sample(args, agent.policy, encode(args, agent.model, obs), key)
    return jnp.where(explore, sampled, mean), Actor(actor.key, actor.step + 1, actor.metrics)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------
def random_heads(layers, num_heads, key):
    """The parameters of `num_heads` different heads of an ensemble, drawn at random."""
    total = layers[0]["b"].shape[0]
    if num_heads >= total:
        return layers
    chosen = jax.random.choice(key, total, (num_heads,), replace=False)
    return jax.tree.map(lambda x: x[chosen], layers)


def td_targets(args, policy, target, batch, next_z, key):
    """Targets (H, B) for Q and Qc (Eq. 6), a' ~ pi(z'): r + gamma (1 - terminated) min of two random target heads,
    c + gamma_c (1 - terminated) min, mean or max of all target heads."""
    key_action, key_heads = jax.random.split(key)
    next_action, _, _ = policy_sample(args, policy, next_z, key_action)
    next_q = heads(args, random_heads(target["q"], 2, key_heads), next_z, next_action).min(0)
    join = {"min": jnp.min, "mean": jnp.mean, "max": jnp.max}[args.cost_target_agg]
    next_qc = join(cost_heads(args, target["qc"], next_z, next_action), axis=0)
    proceed = 1.0 - batch.terminated
    return batch.reward + args.gamma * proceed * next_q, batch.cost + args.cost_gamma * proceed * next_qc


def alive_mask(done):
    """(H, B) -> (H + 1, B): 1 until the first episode end of a sequence, its step included; 0 after it."""
    return jnp.concatenate([jnp.ones_like(done[:1]), jnp.cumprod(1.0 - done, axis=0)])


def dropout_mask(args, key, shape):
    """0 with probability args.dropout, else 1 / (1 - args.dropout)."""
    return jax.random.bernoulli(key, 1.0 - args.dropout, shape) / (1.0 - args.dropout)


def world_model_loss(model, args, batch, next_z, q_target, qc_target, keep_q, keep_qc):
    """Eq. 5 on a latent rollout -> loss, (metrics, latents (H+1, B, Z)).

    batch (H, B, ...); next_z = sg h(s') (H, B, Z); keep_q, keep_qc (K, H*B, mlp_dim): dropout masks of the two value
    ensembles. Means are over the sequences still in their first episode: past an episode's end nothing counts."""
    zs = [encode(args, model, batch.obs[0])]
    for action in batch.action:
        zs.append(next_latent(args, model, zs[-1], action))
    zs = jnp.stack(zs)
    z, action, limit, bins = zs[:-1], batch.action, args.bin_limit, args.num_bins
    reward, cost = two_hot(batch.reward, bins, limit), cost_two_hot(args, batch.cost)
    q_target, qc_target = two_hot(q_target, bins, limit), cost_two_hot(args, qc_target)
    cost_weight = jnp.where(batch.cost > 0, args.cost_positive_weight, 1.0)
    terms = {  # (H, B) each
        "consistency": jnp.mean((zs[1:] - next_z) ** 2, -1),
        "reward": cross_entropy(mlp(model["reward"], z, action), reward),
        "value": cross_entropy(ensemble(model["q"], z, action, keep_q), q_target).mean(0),
        "cost": cross_entropy(ensemble(model["cost"], z, action), cost).mean(0) * cost_weight,
        "cost_value": cross_entropy(ensemble(model["qc"], z, action, keep_qc), qc_target).mean(0),
    }
    discount = args.rho ** jnp.arange(args.horizon)
    mask = alive_mask(batch.done)[:-1]
    losses = {name: jnp.sum(discount * masked_mean(term, mask)) / args.horizon for name, term in terms.items()}
    total = (args.consistency_coef * losses["consistency"] + args.reward_coef * losses["reward"]
             + args.value_coef * losses["value"] + args.cost_coef * losses["cost"]
             + args.cost_value_coef * losses["cost_value"])
    metrics = {f"losses/{name}": loss for name, loss in losses.items()}
    return total, (metrics | {"losses/total": total}, zs)


def pace(args):
    """How many times faster than in a run of 1,000,000 updates, the paper's, the penalty goes its way."""
    return 1e6 * args.action_repeat / (args.total_timesteps * args.updates_per_step)


def augmented_lagrangian(args, violation, multiplier, penalty):
    """Psi and the next multiplier and penalty (Eq. 8-10), from Delta = `violation` and the current lambda and mu.

    If lambda + mu Delta >= 0, Psi = lambda Delta + mu Delta^2 / 2 and the next lambda is lambda + mu Delta; otherwise
    Psi = -lambda^2 / (2 mu) and the next lambda is 0. It is capped at lambda_max.
    differs from the paper: mu grows by 1 + nu up to its cap, where the paper prints a maximum (the release clips)."""
    shifted = multiplier + penalty * violation
    psi = jnp.where(shifted >= 0, multiplier * violation + 0.5 * penalty * violation**2, -0.5 * multiplier**2 / penalty)
    next_multiplier = jnp.clip(shifted, 0.0, args.lambda_max)
    return psi, next_multiplier, jnp.minimum(penalty * (1.0 + args.mu_growth) ** pace(args), args.mu_max)


def update_scale(scale, q):
    """Running scale S of Q, (B,): an average of the 5-95 percentile range, at least 1, at the rate 0.01."""
    low, high = jnp.percentile(q, jnp.array([5.0, 95.0]))
    return scale + 0.01 * (jnp.maximum(high - low, 1.0) - scale)


def policy_loss(policy, args, model, zs, mask, multiplier, penalty, scale, key):
    """Eq. 7 plus Psi, on the model's latents zs (H+1, B, Z), no gradient into them -> loss, what the update needs.

    mean_t rho^t mean_B [ beta A log pi - Q / S ] + Psi, with Q the mean of two random online heads.
    differs from the release: no gradient flows through the scale S (as in TD-MPC2)."""
    key_action, key_q, key_qc = jax.random.split(key, 3)
    action, _, log_prob = policy_sample(args, policy, zs, key_action)
    q = heads(args, random_heads(model["q"], 2, key_q), zs, action).mean(0)
    scale = update_scale(scale, jax.lax.stop_gradient(q[0]))
    join = {"mean": jnp.mean, "max": jnp.max}[args.lagrangian_agg]
    qc = join(cost_heads(args, random_heads(model["qc"], args.lagrangian_heads, key_qc), zs, action), axis=0)
    violation = masked_mean(qc.ravel(), mask.ravel()) - args.cost_limit
    psi, multiplier, penalty = augmented_lagrangian(args, violation, multiplier, penalty)
    per_step = masked_mean(args.entropy_coef * action.shape[-1] * log_prob - q / scale, mask)
    loss = jnp.mean(args.rho ** jnp.arange(args.horizon + 1) * per_step)
    metrics = {"losses/policy": loss, "losses/psi": psi, "lagrangian/lambda": multiplier, "lagrangian/mu": penalty,
               "lagrangian/violation": violation, "losses/q_scale": scale, "losses/entropy": -jnp.mean(log_prob[0])}
    return loss + psi, (multiplier, penalty, scale, metrics)


# ----------------------------------------------------------------------------------------------------------------------
# Update
# ----------------------------------------------------------------------------------------------------------------------
class AgentState(NamedTuple):
    """Everything that learning changes."""

    model: dict
    policy: tuple
    target: dict  # the heads of Q and Qc that targets are read from
    model_opt: tuple
    policy_opt: tuple
    multiplier: jax.Array  # lambda
    penalty: jax.Array  # mu
    scale: jax.Array  # S
    key: jax.Array
    num_updates: jax.Array  # gradient updates done; each one's key is folded from it


def model_optimizer(args):
    """Adam under a clipped global norm; the encoder's step is smaller."""
    slower = optax.masked(optax.scale(args.enc_lr_scale), lambda model: {name: name == "encoder" for name in model})
    return optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.learning_rate, eps=1e-8), slower)


def policy_optimizer(args):
    return optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.learning_rate, eps=1e-5))


def init_agent(args, key, obs_dim, action_dim):
    """A fresh agent for observations and actions of those sizes; `key` is a typed key (jax.random.key)."""
    key_model, key_policy, key_updates = jax.random.split(key, 3)
    model, policy = init_model(args, key_model, obs_dim, action_dim), init_policy(args, key_policy, action_dim)
    target = jax.tree.map(jnp.copy, {"q": model["q"], "qc": model["qc"]})  # copies: both are donated to the update
    return AgentState(model, policy, target, model_optimizer(args).init(model), policy_optimizer(args).init(policy),
                      multiplier=jnp.float32(args.lambda_init), penalty=jnp.float32(args.mu_init * pace(args)),
                      scale=jnp.float32(1.0), key=key_updates, num_updates=jnp.int32(0))


def update(args, agent, batch, key):
    """One gradient step of the world model, then of the policy, multiplier and target networks -> agent, metrics.

    `batch` is a Transition of sequences, (H, B, ...)."""
    key_target, key_keep_q, key_keep_qc, key_policy = jax.random.split(key, 4)
    next_z = encode(args, agent.model, batch.next_obs)
    q_target, qc_target = td_targets(args, agent.policy, agent.target, batch, next_z, key_target)
    shape = (batch.reward.size, args.mlp_dim)
    keep_q = dropout_mask(args, key_keep_q, (args.num_q, *shape))
    keep_qc = dropout_mask(args, key_keep_qc, (args.num_c, *shape))
    model_grads, (metrics, zs) = jax.grad(world_model_loss, has_aux=True)(
        agent.model, args, batch, next_z, q_target, qc_target, keep_q, keep_qc)
    model_updates, model_opt = model_optimizer(args).update(model_grads, agent.model_opt, agent.model)
    model = optax.apply_updates(agent.model, model_updates)

    policy_grads, (multiplier, penalty, scale, policy_metrics) = jax.grad(policy_loss, has_aux=True)(
        agent.policy, args, model, zs, alive_mask(batch.done), agent.multiplier, agent.penalty, agent.scale, key_policy)
    policy_updates, policy_opt = policy_optimizer(args).update(policy_grads, agent.policy_opt, agent.policy)
    policy = optax.apply_updates(agent.policy, policy_updates)

    online = {name: model[name] for name in agent.target}
    target = jax.tree.map(lambda old, new: old + args.tau * (new - old), agent.target, online)
    metrics |= policy_metrics | {"losses/model_grad_norm": optax.tree.norm(model_grads),
                                 "losses/policy_grad_norm": optax.tree.norm(policy_grads)}
    return AgentState(model, policy, target, model_opt, policy_opt, multiplier, penalty, scale, agent.key,
                      agent.num_updates + 1), metrics


@partial(jax.jit, static_argnames=("args", "num_updates"), donate_argnames="agent")
def update_many(args, agent, buffer, num_updates):
    """`num_updates` updates, each on sequences sampled from the buffer -> agent, metrics averaged over them."""

    def step(agent, _):
        key_sample, key_update = jax.random.split(jax.random.fold_in(agent.key, agent.num_updates))
        return update(args, agent, sample(args, buffer, key_sample), key_update)

    agent, metrics = jax.lax.scan(step, agent, length=num_updates)
    metrics["losses/param_norm"] = optax.tree.norm((agent.model, agent.policy))
    return agent, jax.tree.map(jnp.mean, metrics)


# ----------------------------------------------------------------------------------------------------------------------
# Environments: one process each, with the action repeat inside
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


def transform_obs(obs, low, high):
    """(..., O) and the bounds (O,) of the observation space -> what the networks see under --obs-transform log.

    Entries in [0, 1], a lidar's 1 - distance / range, become -log(1.02 - x): the last tenth, where a hazard begins,
    gets half of the scale. Unbounded entries become symlog(x); others stay."""
    near = -np.log(1.02 - np.clip(obs, 0.0, 1.0))
    unbounded = np.sign(obs) * np.log1p(np.abs(obs))
    return np.where((low == 0.0) & (high == 1.0), near, np.where(np.isinf(low) & np.isinf(high), unbounded, obs))


def episode_seed(seed, stream, env, episode):
    """Seed of one episode, a function of the run's seed, the stream (0 training, 1 evaluation) and two counters."""
    return int(np.random.SeedSequence((seed, stream, env, episode)).generate_state(1)[0])


def env_worker(pipe, env_id, action_repeat, seed, stream, index, render, obs_transform="raw"):
    """Body of an environment's process: answers ("reset", episode), ("step", action in [-1, 1]) and ("render", None).

    An episode that ends is followed by the next one at once: a step's answer holds both the observation to act on and
    the one that the step itself led to. Whatever goes wrong is sent back as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent, episode = os.getppid(), 0
    try:
        options = {"render_mode": "rgb_array", "camera_name": "fixedfar", "width": 256, "height": 256} if render else {}
        if render and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")
        env = import_safety_gymnasium().make(env_id, **options)
        if len(env.observation_space.shape or ()) != 1:
            raise ValueError("its observations are not a flat vector")
        low, high, bounds = env.action_space.low, env.action_space.high, env.observation_space
        seen = lambda obs: (transform_obs(obs, bounds.low, bounds.high) if obs_transform == "log" else obs).astype(
            np.float32)
        env.reset(seed=0)  # all resets but a process's first depend on the seed alone (Car differs in the 17th digit)
        pipe.send((env.observation_space.shape[0], low.size))
        while True:
            while not pipe.poll(5.0):
                if os.getppid() != parent:
                    return
            command, value = pipe.recv()
            if command == "reset":
                episode = value
                obs, _ = env.reset(seed=episode_seed(seed, stream, index, episode))
                pipe.send(seen(obs))
            elif command == "step":
                action = np.clip(low + 0.5 * (value + 1.0) * (high - low), low, high)
                reward = cost = 0.0
                for steps in range(1, action_repeat + 1):
                    obs, step_reward, step_cost, terminated, truncated, _ = env.step(action)
                    reward, cost = reward + step_reward, cost + step_cost
                    if terminated or truncated:
                        break
                next_obs = obs
                if terminated or truncated:
                    episode += 1
                    obs, _ = env.reset(seed=episode_seed(seed, stream, index, episode))
                pipe.send((seen(obs), seen(next_obs), reward, cost, terminated, truncated, steps))
            elif command == "render":
                pipe.send(env.render())
            else:
                return
    except EOFError:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(f"{type(error).__name__}: {error}")


class EnvFailure(Exception):
    """An environment's process died, hung or raised."""


class Envs(NamedTuple):
    """Handles of the environment processes, and their sizes. The three lists change where a process is replaced."""

    args: Args
    stream: int  # 0 training, 1 evaluation
    render: bool
    processes: list
    pipes: list
    failures: list  # one text per process that was replaced
    obs_dim: int
    action_dim: int


class EnvStep(NamedTuple):
    """What one agent step of every environment gave, as NumPy arrays."""

    obs: np.ndarray  # (E, O): what to act on next
    transition: Transition
    steps: np.ndarray  # (E,): simulator steps taken, fewer than the action repeat where an episode ended
    restarted: np.ndarray  # (E,): how often the process failed and was replaced; the step is then a new episode's first


def warn(message):
    """A line of its own on stderr, also while there is a progress bar."""
    tqdm.write(message, file=sys.stderr)


def send(envs, index, command, value):
    """A command to one environment process; if that is dead, `receive` says so."""
    try:
        envs.pipes[index].send((command, value))
    except OSError:
        pass


def receive(envs, index, timeout=None):
    """The answer of one environment process; EnvFailure if it failed, died or gave none in time."""
    timeout = timeout or envs.args.env_timeout
    try:
        if envs.pipes[index].poll(timeout):
            answer = envs.pipes[index].recv()
        else:
            answer = f"no answer for {timeout:g} seconds"
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        envs.processes[index].join(timeout=5)
        answer = f"its process ended with exit code {envs.processes[index].exitcode}"
    if isinstance(answer, str):
        raise EnvFailure(f"{('training', 'evaluation')[envs.stream]} environment {index} of {envs.args.env_id} "
                         f"(seed {envs.args.seed}): {answer}")
    return answer


def start_env(args, stream, index, render, start_method):
    """Start the process of one environment -> process, pipe."""
    context = multiprocessing.get_context(start_method)
    ours, theirs = context.Pipe()
    process = context.Process(target=env_worker, daemon=True, args=(
        theirs, args.env_id, args.action_repeat, args.seed, stream, index, render and index == 0, args.obs_transform))
    process.start()
    theirs.close()
    return process, ours


START_TIMEOUT = 300.0  # seconds; importing the simulator takes long where many do it at once


def start_envs(args, stream, num_envs, render=False, start_method="fork"):
    """Start that many environments; with `render` the first one can draw. Call it before JAX is used (fork copies no
    threads), or with start_method "spawn". EnvFailure if one cannot be made."""
    started = [start_env(args, stream, index, render, start_method) for index in range(num_envs)]
    envs = Envs(args, stream, render, *map(list, zip(*started)), [], 0, 0)
    try:
        sizes = [receive(envs, index, START_TIMEOUT) for index in range(num_envs)]
    except EnvFailure:
        close_envs(envs)
        raise
    return envs._replace(obs_dim=sizes[0][0], action_dim=sizes[0][1])


MAX_RESTARTS = 10


def restart_env(envs, index, episode, failure):
    """A new process in the place of one that failed, at the start of that episode -> its observation (O,).

    EnvFailure after MAX_RESTARTS since `envs.failures` was last emptied."""
    while True:
        envs.failures.append(str(failure))
        if len(envs.failures) > MAX_RESTARTS:
            raise EnvFailure(f"{failure} (after {MAX_RESTARTS} restarts)")
        warn(f"{failure}; restarted in episode {episode}")
        envs.processes[index].kill()
        envs.pipes[index].close()
        # spawned: by now JAX has threads, which a fork would copy in whatever state they are
        envs.processes[index], envs.pipes[index] = start_env(envs.args, envs.stream, index, envs.render, "spawn")
        try:
            receive(envs, index, START_TIMEOUT)
            send(envs, index, "reset", int(episode))
            return receive(envs, index)
        except EnvFailure as again:
            failure = again


def reset_envs(envs, episodes):
    """Begin episode number `episodes[i]` in environment i -> observations (E, O)."""
    for index, episode in enumerate(episodes):
        send(envs, index, "reset", int(episode))
    obs = []
    for index, episode in enumerate(episodes):
        try:
            obs.append(receive(envs, index))
        except EnvFailure as failure:
            obs.append(restart_env(envs, index, episode, failure))
    return np.stack(obs)


def step_envs(envs, obs, action, episodes):
    """One agent step of every environment from obs (E, O) with action (E, A) in [-1, 1] -> EnvStep.

    A process that fails in episode `episodes[i]` is replaced: the action is the first of the next episode there."""
    obs, restarted, answers = np.array(obs), np.zeros(len(envs.pipes), int), []
    for index in range(len(envs.pipes)):
        send(envs, index, "step", action[index])
    for index in range(len(envs.pipes)):
        while len(answers) == index:
            try:
                answers.append(receive(envs, index))
            except EnvFailure as failure:
                restarted[index] += 1
                obs[index] = restart_env(envs, index, episodes[index] + restarted[index], failure)
                send(envs, index, "step", action[index])
    new_obs, next_obs, reward, cost, terminated, truncated, steps = zip(*answers)
    flat = lambda values: np.asarray(values, np.float32)
    transition = Transition(obs, np.asarray(action), flat(reward), flat(cost), np.stack(next_obs), flat(terminated),
                            flat(np.logical_or(terminated, truncated)))
    return EnvStep(np.stack(new_obs), transition, np.asarray(steps), restarted)


def replay_envs(envs, episodes, actions):
    """Bring environment i to where it was: episode `episodes[i]` and the actions (T_i, A) taken in it -> obs (E, O).

    The simulator is deterministic: on the same machine and versions this gives the same state to the last bit."""
    obs = reset_envs(envs, episodes)
    for t in range(max(map(len, actions))):
        active = [index for index in range(len(actions)) if t < len(actions[index])]
        for index in active:
            send(envs, index, "step", np.asarray(actions[index][t], np.float32))
        for index in active:
            obs[index] = receive(envs, index)[0]
    return obs


def render_env(envs):
    """A picture (256, 256, 3) of the first environment, which was started with `render`."""
    send(envs, 0, "render", None)
    return receive(envs, 0)


def close_envs(envs):
    """End the environment processes."""
    for index in range(len(envs.pipes)):
        send(envs, index, "close", None)
    for process in envs.processes:
        process.join(timeout=2)
        process.kill()


@contextlib.contextmanager
def open_envs(*arguments):
    """start_envs, and close_envs however the block is left."""
    envs = start_envs(*arguments)
    try:
        yield envs
    finally:
        close_envs(envs)


def evaluate(args, agent, envs, num_episodes, stopping=()):
    """Play that many whole episodes without exploration noise -> one dict per episode, each with its own `played`, a
    Transition of arrays (T, ...), and pictures of the first one.

    Episode i always has the same seed. The batch is padded to args.num_envs, so that `act` is compiled only once. It is
    played again if a process fails; nothing is returned once `stopping` is no longer empty."""
    episodes, frames, num_envs = [], [], len(envs.pipes)
    for first in range(0, num_episodes, num_envs):
        running = begin = True
        while begin or running.any():
            if stopping:
                return [], []
            if begin:
                actor = init_actor(args, jax.random.key(episode_seed(args.seed, 2, 0, first)), envs.action_dim)
                obs, is_first = reset_envs(envs, [first] * num_envs), np.ones(args.num_envs, bool)
                totals, running, ended = np.zeros((num_envs, 3)), np.arange(num_envs) < num_episodes - first, []
                played = []
                frames = frames if first else []
            padded = np.zeros((args.num_envs, envs.obs_dim), np.float32)
            padded[:num_envs] = obs
            action, actor = act(args, agent, actor, padded, is_first, False)
            step = step_envs(envs, obs, np.asarray(action)[:num_envs], [first] * num_envs)
            if begin := bool(np.any(step.restarted)):
                continue
            played.append(step.transition)
            totals += np.stack([step.transition.reward, step.transition.cost, step.steps], -1) * running[:, None]
            if args.capture_video and first == 0 and running[0] and not step.transition.done[0]:
                frames.append(render_env(envs))
            for index in np.flatnonzero(running & (step.transition.done > 0)):
                plans = float(actor.metrics["charts/balance"][index]) / int(actor.step)
                ended.append({"environment": first + int(index), "return": totals[index, 0], "cost": totals[index, 1],
                              "length": int(totals[index, 2]), "balance": plans,
                              "played": Transition(*(np.stack(x)[:, index] for x in zip(*played)))})
                running[index] = False
            obs, is_first = step.obs, np.zeros(args.num_envs, bool)
        episodes += ended
    return sorted(episodes, key=lambda episode: episode["environment"]), frames


def auc(score, positive):
    """Area under the ROC curve, (N,) each: how often a positive's score is above another's (a tie is half a time)."""
    others, positives = np.sort(score[~positive]), score[positive]
    if not len(others) or not len(positives):
        return math.nan
    below = np.searchsorted(others, positives, "left") + np.searchsorted(others, positives, "right")
    return float(below.mean() / (2 * len(others)))


def cost_to_go(cost, terminated, last, gamma):
    """(T,) -> (T,): the discounted cost that followed each step of an episode; `last` stands for that of the last step
    unless it terminated."""
    following = np.array(cost, np.float64)
    following[-1] = cost[-1] if terminated[-1] else last
    for t in reversed(range(len(cost) - 1)):
        following[t] += gamma * following[t + 1]
    return following


def critic_metrics(args, model, episodes):
    """What the cost heads and Qc knew of the costs in evaluation episodes: numbers by tag, none for what did not occur.

    critic/cost_auc: of the one-step cost heads for "this agent step costs". critic/read_..., critic/followed_...: mean
    Qc(s, a) and mean discounted cost that followed, in states inside a hazard (the step before cost), outside, and
    before_k: k = 1 to 5 agent steps before a hazard is entered (before_1 is the step that enters)."""
    rows = jax.tree.map(lambda *each: np.concatenate(each), *(episode["played"] for episode in episodes))
    z = encode(args, model, rows.obs)
    one_step, qc = (np.asarray(cost_heads(args, model[name], z, rows.action).mean(0)) for name in ("cost", "qc"))
    read = np.split(qc, np.cumsum([len(episode["played"].cost) for episode in episodes])[:-1])
    groups = {name: ([], []) for name in ("inside", "outside", *(f"before_{k}" for k in range(1, 6)))}
    for qc, played in zip(read, (episode["played"] for episode in episodes)):
        followed = cost_to_go(played.cost, played.terminated, qc[-1], args.cost_gamma)
        costly = played.cost > 0
        inside = np.concatenate([[False], costly[:-1]])
        entered = np.flatnonzero(costly & ~inside)
        chosen = {"inside": inside, "outside": ~inside}
        for k in range(1, 6):  # k steps ahead nothing but the way to this entry
            chosen[f"before_{k}"] = [t - k + 1 for t in entered if t >= k - 1 and not inside[t - k + 1:t].any()]
        for name, where in chosen.items():
            groups[name][0].extend(qc[where])
            groups[name][1].extend(followed[where])
    metrics = {"critic/cost_auc": auc(one_step, rows.cost > 0)}
    for name, (read, followed) in groups.items():
        if read:
            metrics |= {f"critic/read_{name}": np.mean(read), f"critic/followed_{name}": np.mean(followed)}
    return {tag: value for tag, value in metrics.items() if not math.isnan(value)}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, logs, flags
# ----------------------------------------------------------------------------------------------------------------------
def flatten(tree):
    """A pytree as {path: NumPy array}; typed keys as their data."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return {jax.tree_util.keystr(path): np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            for path, leaf in leaves}


CHECKPOINT_FORMAT = 1


def save_checkpoint(run_dir, agent, actor, buffer, counters):
    """Write checkpoint_STEP.npz with everything that training needs to go on, and keep the one before it. No pickle.

    It is written beside and then renamed, so a file of that name is whole. OSError if there is no room; then the older
    ones stay."""
    filled = buffer._replace(rows=jax.tree.map(lambda rows: rows[:int(buffer.size)], buffer.rows))
    arrays = flatten({"agent": agent, "actor": actor, "buffer": filled})
    path, beside = run_dir / f"checkpoint_{counters['step']}.npz", run_dir / "checkpoint.tmp"
    try:
        with open(beside, "wb") as file:
            np.savez(file, counters=np.array(json.dumps(counters | {"format": CHECKPOINT_FORMAT})), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(run_dir, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    for old in checkpoints(run_dir)[:-2]:
        old.unlink()


def checkpoints(run_dir):
    """The checkpoints of a run, the newest last."""
    found = [path for path in Path(run_dir).glob("checkpoint_*.npz") if path.stem.split("_")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.stem.split("_")[1]))


def load_checkpoint(run_dir, templates):
    """Read the trees named in `templates` ({"agent": ..., ...}, arrays of the right shapes) from the newest checkpoint
    -> trees, counters. SystemExit with one line if there is none, or it is damaged, newer or made with other sizes."""
    def restore(leaf_path, leaf):
        name = jax.tree_util.keystr(leaf_path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(file[name]))
        saved = file[name]
        if name.startswith("['buffer'].rows") and saved.shape[1:] == leaf.shape[1:] and len(saved) <= len(leaf):
            saved = np.concatenate([saved, np.zeros((len(leaf) - len(saved), *saved.shape[1:]), saved.dtype)])
        if saved.shape != leaf.shape:
            raise ValueError(f"{name} has shape {saved.shape}, expected {leaf.shape}")
        return jnp.asarray(saved, leaf.dtype)

    found = checkpoints(run_dir)
    if not found:
        raise SystemExit(f"{run_dir} has no checkpoint: the run was killed before its first evaluation, start it anew")
    try:
        with np.load(found[-1], allow_pickle=False) as file:
            counters = json.loads(str(file["counters"]))
            if counters["format"] > CHECKPOINT_FORMAT:
                raise ValueError(f"format {counters['format']} of a newer version")
            return jax.tree_util.tree_map_with_path(restore, templates), counters
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        hint = f"; remove it to go on from {found[-2].name}" if len(found) > 1 else ""
        raise SystemExit(f"{found[-1]} is damaged or not a checkpoint of this script: {error}{hint}")


def make_run_dir(args, run_dir):
    """Create the run's directory with args.json: all flags, package versions and the git commit."""
    packages = ("jax", "jaxlib", "optax", "numpy", "safety-gymnasium", "gymnasium", "mujoco")
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                         stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or a copied script
    info = {"script": Path(__file__).stem, "args": dataclasses.asdict(args), "git_commit": commit,
            "python": sys.version.split()[0], "packages": {name: importlib.metadata.version(name) for name in packages}}
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(info, indent=2) + "\n")
    except OSError as error:
        raise SystemExit(f"--runs-dir {args.runs_dir}: {error.strerror}: {error.filename}")


EPISODE_COLUMNS = ("split", "step", "environment", "return", "cost", "length")


def append_episodes(path, rows):
    """Add finished episodes to a csv, which begins with its header: all of them, or none and OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", newline="") as file:
            csv.writer(file).writerows(([] if size else [EPISODE_COLUMNS]) + rows)
    except OSError:
        os.truncate(path, size)
        raise


def trim_episodes(path, step, completed):
    """Drop what a resumed run plays again: episodes after `step`, evaluations after `completed`, half a last line
    -> the training episodes of the cycle that it goes on with."""
    limit = {"train": step, "eval": completed}
    if not path.exists():
        return []  # the disk was full all the time
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(EPISODE_COLUMNS) and row[0] in limit]
    rows = [[*row[:1], int(row[1]), int(row[2]), float(row[3]), float(row[4]), int(row[5])] for row in rows
            if int(row[1]) <= limit[row[0]]]
    beside = path.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    append_episodes(beside, rows)
    os.replace(beside, path)
    return [row for row in rows if row[0] == "train" and row[1] > completed]


def attempt(write, *arguments):
    """Whether `write` found room on the disk; if not, a warning."""
    try:
        write(*arguments)
        return True
    except OSError as error:
        warn(f"warning: {error.strerror or error}: {error.filename or 'the run directory'}; training goes on")
        return False


def log(writer, wandb_run, values, step):
    """Numbers by tag, to TensorBoard and, where tracked, to Weights & Biases."""
    for tag, value in values.items():
        writer.add_scalar(tag, float(value), step)
    writer.flush()
    if wandb_run is not None:
        wandb_run.log({tag: float(value) for tag, value in values.items()}, step=step)


def problems(args):
    """What is wrong with the flags, one sentence each."""
    block = args.num_envs * args.action_repeat
    updates = args.train_every / max(args.action_repeat, 1) * args.updates_per_step
    at_least_one = ("num_envs", "action_repeat", "total_timesteps", "train_every", "eval_episodes", "batch_size",
                    "latent_dim", "enc_dim", "mlp_dim", "simnorm_dim", "num_q", "num_c", "num_cost_heads", "horizon",
                    "num_samples", "num_pi_trajs", "num_elites", "iterations", "lagrangian_heads", "bootstrap_samples")
    not_negative = ("eval_every", "entropy_coef", "consistency_coef", "reward_coef", "value_coef", "cost_coef",
                    "cost_value_coef", "temperature", "mu_growth")
    positive = ("env_timeout", "learning_rate", "enc_lr_scale", "grad_clip", "bin_limit", "cost_positive_weight",
                "min_std", "mu_init", "updates_per_step")
    flag = lambda name: "--" + name.replace("_", "-")
    found = [f"{flag(name)} must be a finite number" for name, value in vars(args).items()
             if isinstance(value, float) and not math.isfinite(value)]
    found += [f"{flag(name)} must be at least 1" for name in at_least_one if getattr(args, name) < 1]
    found += [f"{flag(name)} must not be negative" for name in not_negative if getattr(args, name) < 0]
    found += [f"{flag(name)} must be positive" for name in positive if getattr(args, name) <= 0]
    rules = [
        (0 <= args.seed < 2**32, "--seed must lie in 0 .. 2^32 - 1"),
        ("/" not in args.exp_name, "--exp-name must not hold a slash: it becomes part of a directory's name"),
        (args.num_bins >= 2, "--num-bins must be at least 2"),
        (args.latent_dim % max(args.simnorm_dim, 1) == 0, "--latent-dim must be a multiple of --simnorm-dim"),
        (args.train_every % max(block, 1) == 0,
         f"--train-every must be a multiple of --num-envs x --action-repeat = {block}"),
        (args.learning_starts >= block * args.horizon,
         f"--learning-starts must be at least --num-envs x --action-repeat x --horizon = {block * args.horizon}"),
        (not math.isfinite(updates) or updates % 1 == 0,
         f"--updates-per-step must make a whole number of updates of {args.train_every} / {args.action_repeat} agent "
         "steps"),
        (args.eval_every % max(args.train_every, 1) == 0, "--eval-every must be a multiple of --train-every"),
        (args.buffer_size // max(args.num_envs, 1) > args.horizon,
         "--buffer-size must hold more than --horizon transitions per environment"),
        (args.plan_horizon is None or args.plan_horizon >= 1, "--plan-horizon must be at least 1"),
        (args.cost_read_out == "symlog" or args.cost_gamma < 1,
         "--cost-gamma must be smaller than 1 with --cost-read-out expectation, whose bins end at the largest cost"),
        (args.num_pi_trajs < args.num_samples, "--num-pi-trajs must be smaller than --num-samples"),
        (args.num_elites <= args.num_samples, "--num-elites must not exceed --num-samples"),
        (args.lagrangian_heads <= args.num_c, "--lagrangian-heads must not exceed --num-c"),
        (args.min_std <= args.max_std, "--min-std must be at most --max-std"),
        (0 <= args.gamma <= 1, "--gamma must lie in 0 .. 1"),
        (0 <= args.cost_gamma <= 1, "--cost-gamma must lie in 0 .. 1"),
        (0 < args.tau <= 1, "--tau must lie in (0, 1]"),
        (0 < args.rho <= 1, "--rho must lie in (0, 1]"),
        (0 <= args.dropout < 1, "--dropout must lie in [0, 1)"),
        (0 <= args.lambda_init <= args.lambda_max, "--lambda-init must lie in 0 .. --lambda-max"),
        (args.mu_init <= args.mu_max, "--mu-init must be at most --mu-max"),
        (args.log_std_min < args.log_std_max, "--log-std-min must be smaller than --log-std-max"),
        (not args.track or importlib.util.find_spec("wandb"),
         "--track needs Weights & Biases: python -m pip install wandb"),
        (not (args.resume and args.evaluate), "--resume and --evaluate exclude each other"),
    ]
    return found + [message for holds, message in rules if not holds]


FREE_ON_RESUME = ("total_timesteps", "eval_every", "eval_episodes", "capture_video", "track", "wandb_project_name",
                  "wandb_entity", "runs_dir", "resume", "evaluate")


def read_flags(argv, default=None):
    """Args from the command line; SystemExit with one line, the heart of tyro's message, if it cannot be read."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Args, args=argv, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        lines = [line.strip("│ ") for line in errors.getvalue().splitlines()]
        lines = ["" if line[:1] in "╭╰" or not line.strip("─-") else line for line in lines]  # a box or a rule
        texts = [" ".join(block.split()) for block in "\n".join(lines).split("\n\n")]
        texts = [text for text in texts if text and "helptext" not in text]
        titled = "╭" in errors.getvalue()  # there the title went with the box
        raise SystemExit("; ".join(texts if titled else texts[1:]) + " (--help explains every flag)")


def parse_args(argv=None):
    """Flags from the command line; with --resume or --evaluate on top of those the run was started with.

    SystemExit with one line for each flag that cannot be."""
    args = read_flags(argv)
    args = read_flags(argv, dataclasses.replace(args, **PRESETS[args.preset]))
    run_dir = args.resume or args.evaluate
    if run_dir:
        try:
            info = json.loads((Path(run_dir) / "args.json").read_text())
            if info["script"] != Path(__file__).stem:
                raise SystemExit(f"{run_dir} was made by {info['script']}.py: use that script")
            saved = Args(**info["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{run_dir} is not a run directory of this script: {error}")
        args = read_flags(argv, saved)
        free = FREE_ON_RESUME + (("seed",) if args.evaluate else ())
        changed = [field.name for field in dataclasses.fields(Args)
                   if field.name not in free and getattr(args, field.name) != getattr(saved, field.name)]
        if changed:
            raise SystemExit(f"--{changed[0].replace('_', '-')} cannot differ from the run in {run_dir}")
    if found := problems(args):
        raise SystemExit("\n".join(found))
    return args


def check_env_id(env_id):
    """SystemExit with the nearest names if Safety-Gymnasium has no such task."""
    import_safety_gymnasium()
    import gymnasium

    # its copies with Gymnasium's interface put the cost into info
    names = [name for name in gymnasium.registry if name.startswith("Safety") and "Gymnasium" not in name]
    if env_id not in names:
        near = ", ".join(difflib.get_close_matches(env_id, names)) or "for example SafetyPointGoal1-v0"
        raise SystemExit(f"--env-id {env_id} is not a task of Safety-Gymnasium; did you mean {near}?")


def check_memory(args, buffer):
    """SystemExit if a replay buffer of these shapes cannot fit in the memory of JAX's device."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))
    statistics = jax.devices()[0].memory_stats() or {}  # a CPU has none
    there = statistics.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > there:
        raise SystemExit(f"--buffer-size {args.buffer_size} needs {needed / 2**30:.1f} GiB, {jax.devices()[0]} has "
                         f"{there / 2**30:.1f}: lower it")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def summary(episodes, step, cost_rate, wall_time):
    """One line on an evaluation."""
    returns, costs, balance = ([episode[name] for episode in episodes] for name in ("return", "cost", "balance"))
    minutes, seconds = divmod(int(wall_time), 60)
    return (f"step {step:,}: return {np.mean(returns):.2f} ± {np.std(returns):.2f}, cost {np.mean(costs):.1f} ± "
            f"{np.std(costs):.1f} over {len(episodes)} episodes, cost rate {cost_rate:.4f}, "
            f"balance {np.mean(balance):.0%}, wall time {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")


def episode_rows(step, episodes):
    """Evaluation episodes as rows of a csv."""
    return [["eval", step, *(episode[name] for name in EPISODE_COLUMNS[2:])] for episode in episodes]


def start_wandb(args, run_dir):
    """A run on Weights & Biases."""
    wandb = importlib.import_module("wandb")
    return wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name,
                      config=dataclasses.asdict(args), dir=str(run_dir))


def write_video(path, frames):
    """An episode as mp4, one frame per agent step."""
    import imageio

    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, frames, fps=20, macro_block_size=1)


def evaluate_run(args):
    """Evaluate the newest checkpoint of a run -> its episodes, also written to evaluation.csv."""
    run_dir = Path(args.evaluate)
    check_env_id(args.env_id)
    with open_envs(args, 1, min(args.num_envs, args.eval_episodes), args.capture_video) as envs:
        template = {"agent": init_agent(args, jax.random.key(args.seed), envs.obs_dim, envs.action_dim)}
        trees, counters = load_checkpoint(run_dir, template)
        began = time.time()
        episodes, frames = evaluate(args, trees["agent"], envs, args.eval_episodes)
    (run_dir / "evaluation.csv").unlink(missing_ok=True)
    append_episodes(run_dir / "evaluation.csv", episode_rows(counters["step"], episodes))
    if frames:
        write_video(run_dir / "videos" / f"evaluation_{counters['step']}.mp4", frames)
    print(summary(episodes, counters["step"], counters["cost"] / counters["simulated"], time.time() - began))
    known = critic_metrics(args, trees["agent"].model, episodes)
    print("  ".join(f"{tag} {value:.2f}" for tag, value in known.items()))
    return episodes


class Progress(NamedTuple):
    """Where a run is, on the host's side: a checkpoint holds it beside agent, actor and buffer."""

    step: int  # simulator steps, all environments together, were no episode ever shorter
    completed: int  # the step up to which cycles of collecting, updating and evaluating are complete
    simulated: int  # simulator steps really taken
    cost: float  # of all training so far
    acts: int  # agent steps that the sums in actor.metrics are over
    episodes: np.ndarray  # (E,): number of the episode that each environment is in
    totals: np.ndarray  # (E, 3): its return, cost and length so far
    actions: list  # E lists of the actions taken in it
    obs: np.ndarray  # (E, O): what to act on next
    wall_time: float  # seconds, until the run was last started


def cycle_end(args, completed):
    """The step at which the cycle that begins at `completed` ends: after the random start, then every train_every."""
    following = (completed // args.train_every + 1) * args.train_every
    return min(max(following, args.learning_starts), args.total_timesteps)


def require_finite(name, values, step):
    """SystemExit if a number of an environment, in values (E, ...), is not finite."""
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(-1))
    if len(bad):
        raise SystemExit(f"{name} of environment {bad[0]} is not finite at step {step:,}; the last checkpoint stays as "
                         "it is")


def collect(args, envs, agent, actor, buffer, progress):
    """One agent step of every environment -> actor, buffer, progress, rows of ended episodes, seconds spent in act."""
    began = time.time()
    if progress.step < args.learning_starts:
        random = np.random.default_rng((args.seed, 3, progress.step))
        action, acts = random.uniform(-1.0, 1.0, (args.num_envs, envs.action_dim)).astype(np.float32), 0
    else:
        is_first = np.array([not taken for taken in progress.actions])
        action, actor = act(args, agent, actor, progress.obs, is_first, True)
        action, acts = np.asarray(action), progress.acts + 1
    require_finite("action", action, progress.step)
    seconds, step = time.time() - began, progress.step + args.num_envs * args.action_repeat
    result = step_envs(envs, progress.obs, action, progress.episodes)
    transition = result.transition
    for name, values in (("observation", result.obs), ("observation", transition.next_obs),
                         ("reward", transition.reward), ("cost", transition.cost)):
        require_finite(name, values, step)
    if result.restarted.any():
        buffer = cut_episodes(buffer, result.restarted > 0)
    buffer = add(buffer, transition)
    episodes, totals = progress.episodes + result.restarted, progress.totals * (result.restarted == 0)[:, None]
    totals = totals + np.stack([transition.reward, transition.cost, result.steps], axis=-1)
    actions = [[*([] if restarted else taken), new] for restarted, taken, new in zip(
        result.restarted, progress.actions, action)]
    rows = []
    for index in np.flatnonzero(transition.done):
        rows.append(["train", step, int(index), *totals[index, :2].tolist(), int(totals[index, 2])])
        episodes[index], totals[index], actions[index] = episodes[index] + 1, 0.0, []
    return actor, buffer, progress._replace(
        step=step, simulated=progress.simulated + int(result.steps.sum()), acts=acts, episodes=episodes, totals=totals,
        cost=progress.cost + float(transition.cost.sum()), actions=actions, obs=result.obs), rows, seconds


def resume_envs(envs, buffer, saved):
    """Bring the environments to where a checkpoint left them -> buffer, progress.

    On the same machine and versions they are there to the last bit. Where they are not, their episodes are cut: marked
    in the buffer as ended by truncation, and new ones begin."""
    progress = Progress(**{name: saved[name] for name in Progress._fields})._replace(
        episodes=np.array(saved["episodes"]), totals=np.array(saved["totals"]), obs=np.array(saved["obs"], np.float32),
        actions=[[np.array(action, np.float32) for action in taken] for taken in saved["actions"]])
    if np.array_equal(replay_envs(envs, progress.episodes, progress.actions), progress.obs):
        return buffer, progress
    warn("the simulator does not repeat the unfinished episodes to the last bit (another machine, version?): they end")
    unfinished = np.array([len(taken) > 0 for taken in progress.actions])
    episodes = progress.episodes + unfinished
    return cut_episodes(buffer, unfinished), progress._replace(
        episodes=episodes, totals=np.zeros_like(progress.totals), actions=[[] for _ in episodes],
        obs=reset_envs(envs, episodes))


def train(args, stopping=()):
    """Train on args.env_id (or go on with args.resume) -> the last evaluation's episodes.

    As soon as the sequence `stopping` is not empty (a signal fills it), the step is finished, a checkpoint written and
    the run left. SystemExit with one line for what cannot go on; EnvFailure if an environment cannot be made."""
    check_env_id(args.env_id)
    eval_sizes = min(args.num_envs, args.eval_episodes), args.capture_video
    with open_envs(args, 0, args.num_envs) as envs, open_envs(args, 1, *eval_sizes) as eval_envs:
        return learn(args, envs, eval_envs, stopping)  # from here on JAX takes threads


def learn(args, envs, eval_envs, stopping):
    """What `train` does once its environments have started."""
    from tensorboard.summary import Writer

    # --- Agent, actor, buffer, progress
    key_agent, key_actor = jax.random.split(jax.random.key(args.seed))
    agent = init_agent(args, key_agent, envs.obs_dim, envs.action_dim)
    actor = init_actor(args, key_actor, envs.action_dim)
    check_memory(args, jax.eval_shape(partial(init_buffer, args, envs.obs_dim, envs.action_dim)))
    buffer = init_buffer(args, envs.obs_dim, envs.action_dim)
    if args.resume:
        run_dir = Path(args.resume)
        trees, counters = load_checkpoint(run_dir, {"agent": agent, "actor": actor, "buffer": buffer})
        if counters["completed"] >= args.total_timesteps:
            raise SystemExit(f"{run_dir} is at step {counters['step']:,} already: raise --total-timesteps to go on")
        agent, actor = trees["agent"], trees["actor"]
        buffer, progress = resume_envs(envs, trees["buffer"], counters)
        rows = trim_episodes(run_dir / "episodes.csv", progress.step, progress.completed)
    else:
        run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        make_run_dir(args, run_dir)
        first, totals, rows = np.zeros(args.num_envs, int), np.zeros((args.num_envs, 3)), []
        progress = Progress(0, 0, 0, 0.0, 0, first, totals, [[] for _ in first], reset_envs(envs, first), 0.0)

    # --- Logs
    wandb_run = start_wandb(args, run_dir) if args.track else None
    writer = Writer(str(run_dir))
    print(f"{run_dir}: {envs.obs_dim} observations, {envs.action_dim} actions, on {jax.devices()[0]}", flush=True)
    if args.preset == "paper" and jax.default_backend() == "cpu":
        days = args.total_timesteps * args.mlp_dim**2 / (5e6 * 512**2) * 7  # measured on two cores, to a factor of two
        print(f"the paper's preset on a CPU takes about {days:.2g} days: --preset laptop is made for one", flush=True)
    updates_at_once = math.gcd(int(args.train_every // args.action_repeat * args.updates_per_step), 100)
    num_updates, first_step, began = int(agent.num_updates), progress.step, time.time()
    shown, unwritten, episodes = {}, [], []  # rows: training episodes of this cycle; unwritten: the disk was full
    bar = tqdm(total=args.total_timesteps, initial=progress.step, unit="step", unit_scale=True,
               mininterval=1.0 if sys.stderr.isatty() else 60.0)

    def save():
        """A checkpoint of this moment, unless the disk is full."""
        saved = progress._asdict() | {name: getattr(progress, name).tolist() for name in ("episodes", "totals", "obs")}
        saved["actions"] = [[action.tolist() for action in taken] for taken in progress.actions]
        saved["wall_time"] += time.time() - began
        attempt(save_checkpoint, run_dir, agent, actor, buffer, saved)

    try:
        while progress.completed < args.total_timesteps:
            cycle_began, acting, values = time.time(), 0.0, {}

            # --- Collect: one agent step of all environments at a time, until the next block of updates
            while progress.step < cycle_end(args, progress.completed) and not stopping:
                if progress.step >= args.learning_starts and act._cache_size() == 0:
                    bar.set_description("compiling the actor")
                before = progress.step
                actor, buffer, progress, ended, seconds = collect(args, envs, agent, actor, buffer, progress)
                rows, unwritten, acting = rows + ended, unwritten + ended, acting + seconds
                if unwritten and attempt(append_episodes, run_dir / "episodes.csv", unwritten):
                    unwritten = []
                bar.update(progress.step - before)
            collected = time.time()

            # --- Update: in blocks few enough for the bar to move
            due = int(progress.step // args.action_repeat * args.updates_per_step)
            due = due if progress.step >= args.learning_starts else 0
            while num_updates + updates_at_once <= due and not stopping:
                bar.set_description("updating" if update_many._cache_size() else "compiling the update")
                agent, metrics = update_many(args, agent, buffer, updates_at_once)
                values, num_updates = jax.device_get(metrics), num_updates + updates_at_once
                bar.refresh()
                if bad := [tag for tag, value in values.items() if not math.isfinite(value)]:
                    raise SystemExit(f"{', '.join(bad)} not finite at step {progress.step:,}; the last checkpoint "
                                     "stays as it is")
            if progress.step < cycle_end(args, progress.completed) or num_updates + updates_at_once <= due:
                break  # stopped
            updated, step = time.time(), progress.step
            envs.failures.clear()
            eval_envs.failures.clear()

            # --- Log
            if progress.acts:
                values |= {tag: np.mean(total) / progress.acts for tag, total in jax.device_get(actor.metrics).items()}
                actor = actor._replace(metrics=jax.tree.map(jnp.zeros_like, actor.metrics))
                shown["balance"], progress = f"{values['charts/balance']:.0%}", progress._replace(acts=0)
            if rows:
                tags = ("charts/episodic_return", "charts/episodic_cost", "charts/episodic_length")
                values |= dict(zip(tags, np.mean([row[3:] for row in rows], axis=0)))
                shown |= {"return": f"{values[tags[0]]:.1f}", "cost": f"{values[tags[1]]:.0f}"}
            cycle, cost_rate = time.time() - cycle_began, progress.cost / progress.simulated
            values |= {"time/act": acting / cycle, "time/env": (collected - cycle_began - acting) / cycle,
                       "time/update": (updated - collected) / cycle, "charts/cost_rate": cost_rate,
                       "charts/SPS": (step - first_step) / (time.time() - began)}
            attempt(log, writer, wandb_run, values, step)
            bar.set_description("")
            bar.set_postfix(shown | {"cost_rate": f"{cost_rate:.4f}"})

            # --- Evaluate and save
            if step < args.total_timesteps and not (args.eval_every and step % args.eval_every == 0):
                progress, rows = progress._replace(completed=step), []
                continue
            bar.set_description("evaluating")
            episodes, frames = evaluate(args, agent, eval_envs, args.eval_episodes, stopping)
            if stopping:
                break
            progress, rows, unwritten = progress._replace(completed=step), [], unwritten + episode_rows(step, episodes)
            if attempt(append_episodes, run_dir / "episodes.csv", unwritten):
                unwritten = []
            tags = {"eval/episodic_return": "return", "eval/episodic_cost": "cost", "eval/balance": "balance"}
            values = {tag: np.mean([episode[name] for episode in episodes]) for tag, name in tags.items()}
            values |= critic_metrics(args, agent.model, episodes)
            attempt(log, writer, wandb_run, values, step)
            if frames:
                attempt(write_video, run_dir / "videos" / f"{step}.mp4", frames)
            save()
            bar.write(summary(episodes, step, cost_rate, progress.wall_time + time.time() - began))
            sys.stdout.flush()  # at once, into a file too
            bar.set_description("")
        if stopping:
            save()
            warn(f"stopped at step {progress.step:,}; go on with --resume {run_dir}")
        attempt(writer.close)
    except EnvFailure as failure:
        save()
        raise SystemExit(f"{failure}; stopped at step {progress.step:,}, go on with --resume {run_dir}")
    finally:
        bar.close()
    return episodes


def heed_signals(stopping, at_once):
    """Ctrl-C and SIGTERM fill the list `stopping`; a second Ctrl-C ends the process, with `at_once` any signal does.

    A thread reads what the C handlers write: Python's own would wait until JAX gives control back."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while True:
            for number in os.read(reading, 16):
                if at_once or stopping and number == signal.SIGINT:
                    os._exit(128 + number)
                stopping.append(number)
                print("\nstopping after this step; Ctrl-C once more stops without saving", file=sys.stderr, flush=True)

    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=watch, daemon=True).start()


def main(argv=None):
    """The command line. Exit status 130 after Ctrl-C, 143 after SIGTERM, once the run is in a checkpoint."""
    args, stopping = parse_args(argv), []
    heed_signals(stopping, at_once=bool(args.evaluate))
    if not jax.config.jax_compilation_cache_dir:  # the variable JAX_COMPILATION_CACHE_DIR names another place
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/spowl"))
    try:
        evaluate_run(args) if args.evaluate else train(args, stopping)
    except EnvFailure as failure:
        raise SystemExit(str(failure))
    if stopping:
        sys.stdout.flush()
        os._exit(128 + stopping[0])  # at once: Python's own exit has crashed under XLA's threads, still computing


if __name__ == "__main__":
    main()
