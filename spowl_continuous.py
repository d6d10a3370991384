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
"""SPOWL: Safe Planning and pOlicy Optimization via World model Learning (arXiv 2506.04828), the full agent.

One file, pure functions. A latent world model is learned from replayed sequences (Eq. 5-6), a policy is trained on its
latents with an augmented Lagrangian (Eq. 7-10), a constrained cross-entropy planner improves on the policy's own
trajectories (Eq. 11-12, Algorithm 1), and at every step the better of plan and policy is executed (Algorithm 2).

    for every 5,000 simulator steps:
        for every agent step, all environments at once:
            z = h(s);  A_pi = policy sequences from z;  d_R, d_c = mean return and mean cost of A_pi
            repeat: sample sequences around (mean, std), join A_pi, score all in the model,
                    elites = the best k with return >= d_R and cost <= d_c (none: A_pi), refit (mean, std)
            a = the plan's action unless it is clearly worse than the policy's in Q or in Qc, else the policy's
            step the simulator, add the transition to the replay ring
        for every agent step just collected:
            sample sequences, update the world model (Eq. 5 with the targets of Eq. 6), then the policy (Eq. 7-10),
            then the multiplier and penalty, then the target networks

Shapes: E environments, B batch, H horizon, N planner samples, P policy sequences, K ensemble heads, O observation,
A action, Z latent, M bins. "Steps" are simulator steps unless called agent steps (one = `action_repeat` of them).
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
    preset: Literal["paper", "laptop"] = "paper"
    """values of all flags that are not given: the paper's, or PRESETS["laptop"], for two cores and within the hour"""
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
    """Steps, environments and replay"""

    num_envs: Count = 10
    """environments stepped in parallel, in as many processes as there are cores"""
    action_repeat: Count = 5
    """simulator steps per agent step; reward and cost are summed over them"""
    learning_starts: Natural = 5_000
    """simulator steps with uniformly random actions before the first update"""
    train_every: Count = 5_000
    """simulator steps between two blocks of updates"""
    updates_per_step: Positive = 1.0
    """updates per agent step collected"""
    obs_transform: Literal["raw", "log", "bins"] = "raw"
    """observations as the networks see them: raw; log, which stretches the near end of a lidar (see transform_obs); or
    bins, which besides gives the encoder each entry as weights on bins (see spread_obs)"""
    env_timeout: Annotated[float, (1 / LARGE, 1e6)] = 60.0
    """seconds after which an environments' process without an answer counts as dead (at least 300 to start)"""
    eval_every: Natural = 50_000
    """simulator steps between evaluations, each followed by a checkpoint (0: only at the end)"""
    eval_episodes: Count = 10
    """whole episodes per evaluation, on environments and seeds of their own"""
    buffer_size: Count = 1_000_000
    """transitions kept for replay, all environments together; the oldest are overwritten"""


@dataclasses.dataclass(frozen=True)
class WorldModel:
    """World model (Eq. 5-6)"""

    latent_dim: Count = 512
    """size Z of the latent; a multiple of simnorm_dim"""
    enc_dim: Count = 256
    """width of the encoder's hidden layer"""
    mlp_dim: Count = 512
    """width of the two hidden layers of every other network"""
    simnorm_dim: Count = 8
    """size of the groups in which a latent is normalised by softmax"""
    num_bins: Annotated[int, Whole, (2, LARGE)] = 101
    """bins M of the discrete regression"""
    bin_limit: Positive = 10.0
    """the bins span [-bin_limit, bin_limit] in symlog space"""
    num_q: Count = 5
    """heads of the value ensemble Q"""
    num_qc: Count = 5
    """heads K of the cost-value ensemble Qc (Fig. 8)"""
    num_c: Count = 5
    """heads of the one-step cost ensemble"""
    dropout: Annotated[float, (0.0, 0.99)] = 0.01
    """dropout after the first layer of Q and Qc, in their cross-entropies alone"""
    batch_size: Count = 256
    """sequences per update"""
    learning_rate: Positive = 3e-4
    """step size of Adam, for model and policy"""
    enc_lr_scale: Positive = 0.3
    """the encoder's step size is learning_rate times this"""
    grad_clip: Positive = 20.0
    """largest global norm of a gradient, model and policy each on their own"""
    rho: Annotated[float, (1 / LARGE, 1.0)] = 0.5
    """weight rho^t of step t of the rollout in every loss (the paper's lambda)"""
    consistency_coef: NotNegative = 20.0
    """weight of the latent consistency loss"""
    reward_coef: NotNegative = 0.1
    """weight of the reward cross-entropy"""
    value_coef: NotNegative = 0.1
    """weight of the Q cross-entropy"""
    cost_coef: NotNegative = 0.1
    """weight of the cost cross-entropy"""
    cost_value_coef: NotNegative = 0.1
    """weight of the Qc cross-entropy"""
    cost_positive_weight: Positive = 10.0
    """factor on the cost cross-entropy of transitions with cost > 0, which are rare"""
    gamma: Share = 0.975
    """discount of reward per agent step"""
    cost_gamma: Share = 0.997
    """discount of cost per agent step"""
    tau: Annotated[float, (1 / LARGE, 1.0)] = 0.01
    """share by which the target networks move after every update"""
    cost_read_out: Literal["symlog", "expectation"] = "symlog"
    """how logits stand for a cost: as for rewards, which reads rare costs low, or as the expectation over [0, C], C the
    largest possible discounted cost (see cost_bins)"""
    cost_target_agg: Literal["min", "mean", "max"] = "mean"
    """how the heads of the target Qc are joined into one cost target (Fig. 7)"""


@dataclasses.dataclass(frozen=True)
class SafePolicy:
    """Policy (Eq. 7-10)"""

    entropy_coef: NotNegative = 1e-4
    """weight of the entropy bonus, multiplied by the action dimension"""
    log_std_min: float = -10.0
    """lower bound of the policy's log standard deviation"""
    log_std_max: float = 2.0
    """upper bound of the policy's log standard deviation"""
    cost_budget: Annotated[float | None, (1 / LARGE, LARGE)] = None
    """the cost_limit of OmniSafe and SafePO: what an episode may cost. The multiplier then follows what training
    episodes do cost, instead of Eq. 8-10"""
    cost_limit: float = 0.1
    """not OmniSafe's cost_limit (that is --cost-budget) but the paper's b, on Qc(z, pi(z)), a discounted sum: at a
    steady cost rate b (1 - cost_gamma) 1000 / action_repeat per episode of 1,000 steps, 0.06 with the paper's values
    and 1 with the laptop's"""
    lagrangian_heads: Count = 5
    """random heads X <= num_qc of Qc that enter the constraint at each update (Fig. 8)"""
    lagrangian_agg: Literal["mean", "max"] = "mean"
    """how those heads are joined (Fig. 8)"""
    lambda_init: NotNegative = 1e-6
    """first Lagrange multiplier; with --cost-budget it begins at 0.02"""
    lambda_max: float = 10.0
    """cap on the Lagrange multiplier; with --cost-budget it is at most 10"""
    mu_init: Positive = 5e-9
    """first penalty mu of a run of 1,000,000 updates; a shorter run's is as much larger as its updates are fewer"""
    mu_growth: NotNegative = 5e-6
    """nu: the penalty grows by the factor 1 + nu at every update of such a run, by more at every one of a shorter run:
    at the same share of its way every run has the same multiplier under the same violation"""
    mu_max: float = 1.0
    """cap on the penalty"""


@dataclasses.dataclass(frozen=True)
class Planning:
    """Planning (Eq. 11-12, Algorithms 1-2)"""

    horizon: Count = 3
    """agent steps H that a training sequence spans"""
    plan_horizon: Annotated[int | None, (1, LARGE)] = None
    """agent steps that the planner looks ahead; by default --horizon"""
    num_samples: Count = 512
    """sequences N scored per iteration, the policy's included"""
    num_pi_trajs: Count = 24
    """sequences P among them that are rolled out with the policy"""
    num_elites: Count = 64
    """most sequences k that the next mean and std are fitted to"""
    iterations: Count = 6
    """refinements of the plan per agent step"""
    temperature: NotNegative = 0.5
    """elites are weighted by softmax(temperature * return); 0 gives the paper's plain elites"""
    min_std: Positive = 0.05
    """smallest standard deviation of the sampled sequences"""
    max_std: float = 2.0
    """largest and first standard deviation of the sampled sequences"""
    plan_cost_agg: Literal["max", "mean"] = "max"
    """how the heads of the one-step cost are joined within the horizon"""
    switch_rule: Literal["bootstrap", "means"] = "bootstrap"
    """what the plan's ensemble means are compared with: the 95% bootstrap bounds of the policy's, so that the plan must
    not be clearly worse (as the authors' release), or the policy's means (the paper's text)"""
    bootstrap_samples: Count = 1000
    """resamples of the heads behind those bounds"""


@dataclasses.dataclass(frozen=True)
class Args(Planning, SafePolicy, WorldModel, Protocol, Experiment):
    """SPOWL on Safety-Gymnasium: a latent world model, a Lagrangian policy, a planner that improves on it safely."""


GROUPS = (Experiment, Protocol, WorldModel, SafePolicy, Planning)
PRESETS = {
    "paper": {},
    "laptop": dict(
        total_timesteps=300_000, eval_every=20_000, buffer_size=300_000, updates_per_step=0.5, obs_transform="bins",
        latent_dim=128, enc_dim=128, mlp_dim=128, num_q=3, num_qc=3, num_c=3, lagrangian_heads=3,
        batch_size=128, cost_read_out="expectation", cost_gamma=0.95, lambda_max=0.2, mu_init=4.8e-8, mu_growth=5e-6,
        num_samples=64, num_pi_trajs=8, num_elites=8, iterations=4),
}


def advice(args):
    """A line to begin a run on a CPU with, or ""."""
    days = args.total_timesteps * args.mlp_dim**2 / (5e6 * 512**2) * 7  # measured on two cores, to a factor of two
    line = f"the paper's preset on a CPU takes about {days:.2g} days: --preset laptop is made for one"
    return line if args.preset == "paper" else ""


def rules(args):
    """What must hold between flags: pairs of whether it does and what to say where it does not."""
    block, updates = args.num_envs * args.action_repeat, args.train_every / args.action_repeat * args.updates_per_step
    near = max(round(args.train_every / block), 1) * block
    return [
        ("/" not in args.exp_name, "--exp-name must not hold a slash: it becomes part of a directory's name"),
        (args.latent_dim % args.simnorm_dim == 0, "--latent-dim must be a multiple of --simnorm-dim"),
        (args.train_every % block == 0,
         f"--train-every must be a multiple of --num-envs x --action-repeat = {block}, for example {near}"),
        (args.learning_starts >= block * args.horizon,
         f"--learning-starts must be at least --num-envs x --action-repeat x --horizon = {block * args.horizon}"),
        (math.isclose(updates, round(updates)), "--updates-per-step must make a whole number of updates of "
         f"{args.train_every} / {args.action_repeat} agent steps"),
        (args.total_timesteps >= args.learning_starts,
         f"--total-timesteps must be at least --learning-starts = {args.learning_starts}: before, nothing is learned"),
        (args.eval_every % args.train_every == 0, "--eval-every must be a multiple of --train-every"),
        (args.buffer_size // args.num_envs > args.horizon,
         "--buffer-size must hold more than --horizon transitions per environment"),
        (args.cost_read_out == "symlog" or args.cost_gamma < 1,
         "--cost-gamma must be smaller than 1 with --cost-read-out expectation, whose bins end at the largest cost"),
        (args.num_pi_trajs < args.num_samples, "--num-pi-trajs must be smaller than --num-samples"),
        (args.num_elites <= args.num_samples, "--num-elites must not exceed --num-samples"),
        (args.lagrangian_heads <= args.num_qc, "--lagrangian-heads must not exceed --num-qc"),
        (args.min_std <= args.max_std, "--min-std must be at most --max-std"),
        (args.lambda_init <= args.lambda_max, "--lambda-init must be at most --lambda-max"),
        (args.mu_init <= args.mu_max, "--mu-init must be at most --mu-max"),
        (pace(args) * math.log1p(args.mu_growth) < 80, "--mu-growth is too large for a run of so few updates"),
        (args.log_std_min < args.log_std_max, "--log-std-min must be smaller than --log-std-max"),
        (not (args.resume and args.evaluate), "--resume and --evaluate exclude each other"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Maths
# ----------------------------------------------------------------------------------------------------------------------
def symlog(x):
    """sign(x) log(1 + |x|)"""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x):
    """Inverse of symlog."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


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


def two_hot(x, num_bins, limit):
    """(...) -> (..., M): symlog(x), clipped to the bins' range, as weights on its two neighbouring bins."""
    return bin_weights((jnp.clip(symlog(x), -limit, limit) + limit) * ((num_bins - 1) / (2 * limit)), num_bins)


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
    were the weights taken in log space, it would be up to 4% more, and bootstrapping would multiply that."""
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
    spread_dim = jax.eval_shape(partial(spread_obs, args), jnp.zeros(obs_dim)).size
    return {
        "encoder": init_mlp(key_h, (spread_dim, args.enc_dim, args.latent_dim), norm_last=True),
        "dynamics": init_mlp(key_f, (args.latent_dim, args.mlp_dim, args.mlp_dim, args.latent_dim), action_dim,
                             norm_last=True),
        "reward": head(key_r),
        "cost": free_of_cost(args, jax.vmap(head)(jax.random.split(key_c, args.num_c))),
        "q": jax.vmap(head)(jax.random.split(key_q, args.num_q)),
        "qc": free_of_cost(args, jax.vmap(head)(jax.random.split(key_qc, args.num_qc))),
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
    return latent_mlp(args, model["encoder"], spread_obs(args, obs))


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
    done = buffer.rows.done.at[buffer.head - 1].max(cut)
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
def policy_rollout(args, model, policy, z, key):
    """(Z,) -> (H, P, A): action sequences of the policy in latent space, the prior A_pi."""
    z, actions = jnp.broadcast_to(z, (args.num_pi_trajs, z.size)), []
    for key in jax.random.split(key, args.plan_horizon or args.horizon):
        action, _, _ = policy_sample(args, policy, z, key)
        z = next_latent(args, model, z, action)
        actions.append(action)
    return jnp.stack(actions)


def evaluate_plans(args, model, policy, z, actions, key):
    """(Z,), (H, N, A) -> J, J_c (N,): discounted return and cost over the horizon, then the policy's values (Eq. 11).

    J = sum_i gamma^i r + gamma^H Q(z_H, pi(z_H)), J_c likewise; Q and Qc are the means over all online heads."""
    plan_cost = {"max": jnp.max, "mean": jnp.mean}[args.plan_cost_agg]
    returns, costs, z = 0.0, 0.0, z[None]  # one row: the first latent is common to all sequences
    for i, action in enumerate(actions):
        returns += args.gamma**i * read_out(mlp(model["reward"], z, action), args.bin_limit)
        costs += args.cost_gamma**i * plan_cost(cost_heads(args, model["cost"], z, action), axis=0)
        z = next_latent(args, model, z, action)
    action, _, _ = policy_sample(args, policy, z, key)
    returns += args.gamma**len(actions) * heads(args, model["q"], z, action).mean(0)
    costs += args.cost_gamma**len(actions) * cost_heads(args, model["qc"], z, action).mean(0)
    return returns, costs


def select_elites(args, returns, costs):
    """Algorithm 1, (N,) each, the policy's sequences first -> mask of the elites (N,), metrics.

    Thresholds d_R, d_c: the means over the policy's sequences (Eq. 12). Improving: J >= d_R and J_c <= d_c. None: the
    policy's own sequences. More than k: the k of highest J among them."""
    reward_threshold, cost_threshold = returns[:args.num_pi_trajs].mean(), costs[:args.num_pi_trajs].mean()
    improving = (returns >= reward_threshold) & (costs <= cost_threshold)
    _, best = jax.lax.top_k(jnp.where(improving, returns, -jnp.inf), args.num_elites)
    elites = jnp.zeros_like(improving).at[best].set(True) & improving
    is_prior = jnp.arange(args.num_samples) < args.num_pi_trajs
    metrics = {
        "planner/reward_threshold": reward_threshold,
        "planner/cost_threshold": cost_threshold,
        "planner/num_improving": jnp.sum(improving, dtype=jnp.float32),
        "planner/no_improvement": 1.0 - jnp.any(improving),
    }
    return jnp.where(jnp.any(improving), elites, is_prior), metrics


class Plan(NamedTuple):
    mean: jax.Array  # (H, A)
    std: jax.Array  # (H, A)
    action: jax.Array  # (A,): first action of the elite that was drawn


def plan(args, model, policy, z, last_mean, key):
    """(Z,) -> Plan, metrics of its last iteration: cross-entropy refinement of action sequences towards the elites.

    `last_mean` (H, A) is the mean of the plan one agent step ago (zeros after a reset)."""
    key_rollout, key_prior, key_refine = jax.random.split(key, 3)
    prior = policy_rollout(args, model, policy, z, key_rollout)
    prior_returns, prior_costs = evaluate_plans(args, model, policy, z, prior, key_prior)  # once: they do not change

    def refine(current, key):
        key_sample, key_value, key_draw = jax.random.split(key, 3)
        noise = jax.random.normal(key_sample, (len(prior), args.num_samples - args.num_pi_trajs, prior.shape[-1]))
        sampled = jnp.clip(current.mean[:, None] + current.std[:, None] * noise, -1.0, 1.0)
        sampled_returns, sampled_costs = evaluate_plans(args, model, policy, z, sampled, key_value)
        actions = jnp.concatenate([prior, sampled], axis=1)
        returns = jnp.concatenate([prior_returns, sampled_returns])
        costs = jnp.concatenate([prior_costs, sampled_costs])
        elites, metrics = select_elites(args, returns, costs)
        log_weights = jnp.where(elites, args.temperature * returns, -jnp.inf)
        weights = jax.nn.softmax(log_weights)
        average = partial(jnp.einsum, "n,hna->ha", weights, precision="highest")
        mean = average(actions)
        std = jnp.sqrt(average((actions - mean[:, None]) ** 2))
        drawn = jax.random.categorical(key_draw, log_weights)
        return Plan(mean, jnp.clip(std, args.min_std, args.max_std), actions[0, drawn]), metrics

    first_mean = jnp.concatenate([last_mean[1:], jnp.zeros_like(last_mean[:1])])  # shifted by one step
    first = Plan(first_mean, jnp.full_like(first_mean, args.max_std), first_mean[0])
    final, metrics = jax.lax.scan(refine, first, jax.random.split(key_refine, args.iterations))
    return final, jax.tree.map(lambda values: values[-1], metrics)


def bootstrap_bounds(args, values, key):
    """(K,) -> the 2.5% and 97.5% percentiles of the mean of K heads drawn with replacement."""
    drawn = jax.random.randint(key, (args.bootstrap_samples, values.size), 0, values.size)
    return jnp.percentile(values[drawn].mean(-1), jnp.array([2.5, 97.5]))


def prefer_plan(args, q_plan, q_policy, qc_plan, qc_policy, key):
    """(K,) each -> bool: the plan's action is no worse than the policy's in either value (Algorithm 2), up to what
    the bootstrap bounds of the policy's value leave open (METHOD §6)."""
    lowest_q, highest_qc = q_policy.mean(), qc_policy.mean()
    if args.switch_rule == "bootstrap":
        key_q, key_qc = jax.random.split(key)
        lowest_q, highest_qc = bootstrap_bounds(args, q_policy, key_q)[0], bootstrap_bounds(args, qc_policy, key_qc)[1]
    return (q_plan.mean() >= lowest_q) & (qc_plan.mean() <= highest_qc)


def decide(args, model, policy, z, last_mean, key, explore):
    """(Z,) -> action (A,), the plan's mean (H, A), metrics: the choice between plan and policy for one environment."""
    key_plan, key_noise, key_policy, key_switch = jax.random.split(key, 4)
    final, metrics = plan(args, model, policy, z, last_mean, key_plan)
    noise = final.std[0] * jax.random.normal(key_noise, final.action.shape)
    plan_action = jnp.clip(final.action + jnp.where(explore, noise, 0.0), -1.0, 1.0)
    sampled, mean, _ = policy_sample(args, policy, z, key_policy)
    policy_action = jnp.where(explore, sampled, mean)
    both = jnp.stack([plan_action, policy_action])
    q, qc = heads(args, model["q"], z[None], both), cost_heads(args, model["qc"], z[None], both)  # (K, 2)
    use_plan = prefer_plan(args, q[:, 0], q[:, 1], qc[:, 0], qc[:, 1], key_switch)
    action = jnp.where(use_plan, plan_action, policy_action)
    return action, final.mean, metrics | {"charts/balance": use_plan.astype(jnp.float32)}


class Actor(NamedTuple):
    """What acting carries from one agent step to the next."""

    key: jax.Array
    step: jax.Array  # agent steps taken; the step's own key is folded from it
    plan_mean: jax.Array  # (E, H, A)
    metrics: dict  # name -> (E,): sums over agent steps since they were last set to zero


def init_actor(args, key, action_dim):
    """An actor at the start of a run."""
    names = ["charts/balance"] + [f"planner/{name}" for name in (
        "reward_threshold", "cost_threshold", "num_improving", "no_improvement")]
    plan_mean = jnp.zeros((args.num_envs, args.plan_horizon or args.horizon, action_dim))
    return Actor(jnp.copy(key), jnp.int32(0), plan_mean, {name: jnp.zeros(args.num_envs) for name in names})


@partial(jax.jit, static_argnames="args")
def act(args, agent, actor, obs, is_first, explore):
    """Algorithm 2 for all environments at once: obs (E, O), is_first (E,) -> action (E, A) in [-1, 1], next actor.

    `is_first` marks the environments that were just reset; without `explore` no noise is added."""
    keys = jax.random.split(jax.random.fold_in(actor.key, actor.step), obs.shape[0])
    last_mean = jnp.where(is_first[:, None, None], 0.0, actor.plan_mean)
    z = encode(args, agent.model, obs)
    at_once = obs.shape[0]
    if jax.default_backend() == "cpu":  # a few environments at a time: what is computed between stays in the cache
        at_once = max(n for n in range(1, 6) if obs.shape[0] % n == 0)
    action, plan_mean, metrics = jax.lax.map(
        lambda each: decide(args, agent.model, agent.policy, *each, explore), (z, last_mean, keys), batch_size=at_once)
    metrics = jax.tree.map(jnp.add, actor.metrics, metrics)
    return action, Actor(actor.key, actor.step + 1, plan_mean, metrics)


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
    differs from the paper: mu grows by 1 + nu up to its cap, where the paper prints a maximum (the release clips).
    Under a cost budget Psi = lambda Delta, and it is `steer` that moves lambda."""
    if args.cost_budget is not None:
        return multiplier * violation, multiplier, penalty
    shifted = multiplier + penalty * violation
    psi = jnp.where(shifted >= 0, multiplier * violation + 0.5 * penalty * violation**2, -0.5 * multiplier**2 / penalty)
    next_multiplier = jnp.clip(shifted, 0.0, args.lambda_max)
    return psi, next_multiplier, jnp.minimum(penalty * (1.0 + args.mu_growth) ** pace(args), args.mu_max)


def episode_costs(buffer):
    """(E,): the cost, as far as the ring holds it, of each environment's latest episode that ended; NaN without one."""
    done, cost = (jnp.roll(x, -buffer.head, axis=0)[::-1] for x in (buffer.rows.done, buffer.rows.cost))  # newest first
    ends = jnp.cumsum(done, axis=0)  # at and after a row: the latest that ended has 1, what has begun since has 0
    return jnp.where(ends[-1] > 0, jnp.sum(cost * (ends == 1), axis=0), jnp.nan)


def steer(args, multiplier, buffer, num_updates):
    """The multiplier that the next updates are to use under a cost budget: integral control of its logarithm.

    log lambda grows by 2e-5 e per simulator step, within [0.001, 10], with e = mean cost of the environments' latest
    episodes / budget - 1, at most 1: it rises no faster than it falls, and cannot wind up. As costs fall about
    exponentially in lambda, relative steps suit budgets and tasks of any size. PID-Lagrangian (arXiv 2007.03964) sums
    absolute errors and adds two more parts; a proportional one made lambda's weight swing."""
    error = jnp.minimum(jnp.nan_to_num(jnp.nanmean(episode_costs(buffer)) / args.cost_budget - 1.0), 1.0)
    steps = num_updates * args.action_repeat / args.updates_per_step
    return jnp.clip(multiplier * jnp.exp(2e-5 * steps * error), 0.001, 10.0)


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
                      multiplier=jnp.float32(args.lambda_init if args.cost_budget is None else 0.02),
                      penalty=jnp.float32(min(args.mu_init * pace(args), args.mu_max)), scale=jnp.float32(1.0),
                      key=key_updates, num_updates=jnp.int32(0))


def update(args, agent, batch, key):
    """One gradient step of the world model, then of the policy, multiplier and target networks -> agent, metrics.

    `batch` is a Transition of sequences, (H, B, ...)."""
    key_target, key_keep_q, key_keep_qc, key_policy = jax.random.split(key, 4)
    next_z = encode(args, agent.model, batch.next_obs)
    q_target, qc_target = td_targets(args, agent.policy, agent.target, batch, next_z, key_target)
    shape = (batch.reward.size, args.mlp_dim)
    keep_q = dropout_mask(args, key_keep_q, (args.num_q, *shape))
    keep_qc = dropout_mask(args, key_keep_qc, (args.num_qc, *shape))
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

    if args.cost_budget is not None:
        agent = agent._replace(multiplier=steer(args, agent.multiplier, buffer, num_updates))
    agent, metrics = jax.lax.scan(step, agent, length=num_updates)
    if args.cost_budget is not None:
        metrics["charts/cost_budget"] = jnp.float32(args.cost_budget)
    metrics["losses/param_norm"] = optax.tree.norm((agent.model, agent.policy))
    return agent, jax.tree.map(jnp.mean, metrics)


def updates_due(args, step):
    """Updates that belong to the first `step` simulator steps."""
    return int(step // args.action_repeat * args.updates_per_step + 1e-6)  # 11,000 x 0.7 is 7,699.999... in floats


def action_size(agent):
    """A"""
    return agent.policy[-1]["b"].size // 2


# ----------------------------------------------------------------------------------------------------------------------
# Diagnostics: what was known of the costs
# ----------------------------------------------------------------------------------------------------------------------
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


@partial(jax.jit, static_argnames="args")
def read_costs(args, model, obs, action):
    """(N, O), (N, A) -> (N,) each: the cost that the one-step heads read, and that Qc does, means over heads."""
    z = encode(args, model, obs)
    return tuple(cost_heads(args, model[name], z, action).mean(0) for name in ("cost", "qc"))


def critic_metrics(args, agent, episodes):
    """What was known of the costs in evaluation episodes: numbers by tag, none for what did not occur. critic/cost_auc:
    of the one-step cost heads for "this agent step costs"; then `read_and_followed` of Qc(s, a)."""
    rows = jax.tree.map(lambda *each: np.concatenate(each), *(episode["played"] for episode in episodes))
    one_step, qc = in_chunks(partial(read_costs, args, agent.model), rows.obs, rows.action)
    area = auc(one_step, rows.cost > 0)
    return ({} if math.isnan(area) else {"critic/cost_auc": area}) | read_and_followed(args, episodes, qc)


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
