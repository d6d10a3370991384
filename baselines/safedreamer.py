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
"""SafeDreamer (arXiv 2307.07176) on Safety-Gymnasium: DreamerV3 with a cost head, a cost critic and a constraint.

One file, pure functions. A recurrent state-space model is learned from replayed windows: h follows from the state and
the action before, a categorical state from h and the observation (posterior), or from h alone (prior). In rollouts
imagined from replayed states an actor is trained by backpropagation, critics on lambda-returns of reward and cost. To
act, bsrp_lag draws from the actor, which an augmented Lagrangian constrains; osrp and osrp_lag search by cross-entropy
for the plan of highest return among those that the model predicts to be safe.

    for every 5,000 simulator steps:
        for every agent step, all environments at once:
            h = GRU(h, stoch, a);  stoch ~ q(. | h, observation)
            bsrp_lag: a ~ actor(h, stoch)
            osrp, osrp_lag: repeat: draw N plans around (mean, std), imagine each, predict its return and cost;
                    elites = the k of highest return among those below the cost limit, if k are, else the k of least
                    cost;  (mean, std) = theirs.  a = the first action of the mean
            step the simulator, add the transition to the replay ring
        for every second agent step just collected:
            sample windows; model: reconstruction, reward, cost, continuation, KL between posterior and prior
            imagine H steps from every state; R, C = lambda-returns of reward and cost, bootstrapped by V, Vc
            actor: down -(R - V) / S - entropy + Psi(sum of C over the rollout - limit), lambda and mu follow
            critics: towards R and C

Shapes: E environments, B windows of L agent steps, N rollouts or plans of H steps, O observation, A action, D recurrent
state, S variables of C classes, F = D + S C features, M bins. "Steps" are simulator steps unless called agent steps
(one = `action_repeat` of them).

Shares with spowl_continuous.py what surrounds the method, and
    same: whole, Whole, LARGE, Count, Natural, Positive, NotNegative, Share - numbers on the command line
    same: symlog, symexp, two_hot, read_out, cost_bins, cost_two_hot, cost_read_out, cross_entropy - read-outs
    same: free_of_cost - heads that read no cost at first
    same: transform_obs, bin_weights, OBS_BINS, OBS_LIMIT, spread_obs - lidars
    same: Transition, Buffer, cut_episodes, updates_due, action_size - the replay ring; counts
    same: auc, cost_to_go, read_and_followed - what a cost critic knew
    own: make_env - of what surrounds the method: cameras
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
    method: Literal["bsrp_lag", "osrp", "osrp_lag"] = "bsrp_lag"
    """bsrp_lag: the actor acts, trained with an augmented Lagrangian; osrp: the planner acts, among plans that are safe
    as far as the model knows; osrp_lag: so it does, with the cost under a PID-controlled multiplier in its score too"""
    preset: Literal["paper", "laptop"] = "paper"
    """values of all flags that are not given: the reference's, or PRESETS["laptop"], for two cores"""
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

    num_envs: Count = 1
    """environments stepped in parallel, in as many processes as there are cores"""
    action_repeat: Count = 5
    """simulator steps per agent step; reward and cost are summed over them"""
    learning_starts: Natural = 5_000
    """simulator steps with uniformly random actions at the start"""
    train_every: Count = 5_000
    """simulator steps between two blocks of updates"""
    updates_per_step: Positive = 0.5
    """updates per agent step"""
    inputs: Literal["vector", "vision"] = "vector"
    """what the agent sees: the task's observation, or a camera to the front and one to the back, 64 x 64 pixels each"""
    obs_transform: Literal["raw", "log", "bins"] = "raw"
    """vectors as the networks see them: raw (the encoder gets symlog of it), log, which spreads the near end of a lidar
    (see transform_obs), or bins: log, and the encoder gets each entry's weights on eight bins too (see spread_obs)"""
    env_timeout: Annotated[float, (1 / LARGE, 1e6)] = 60.0
    """seconds after which an environments' process without an answer counts as dead (at least 300 to start)"""
    eval_every: Natural = 100_000
    """simulator steps between evaluations, each followed by a checkpoint (0: only at the end)"""
    eval_episodes: Count = 10
    """whole episodes per evaluation, on environments and seeds of their own"""
    buffer_size: Count = 1_000_000
    """transitions kept for replay, all environments together; the oldest are overwritten"""


@dataclasses.dataclass(frozen=True)
class WorldModel:
    """World model"""

    deter: Count = 256
    """width D of the recurrent state"""
    stoch: Count = 16
    """categorical variables S of the stochastic state"""
    classes: Count = 16
    """classes C of each of them"""
    units: Count = 256
    """width of every hidden layer"""
    enc_layers: Count = 3
    """hidden layers of encoder and decoder, for vectors"""
    channels: Count = 32
    """channels of the first of the encoder's four convolutions, for pictures; they double with every one"""
    head_layers: Count = 2
    """hidden layers of the heads, the actor and the critics"""
    num_bins: Annotated[int, Whole, (2, LARGE)] = 255
    """bins M of the two-hot read-outs of reward, cost and values"""
    bin_limit: Positive = 20.0
    """the bins span symlog values in [-bin_limit, bin_limit]"""
    cost_read_out: Literal["symlog", "expectation"] = "symlog"
    """how logits stand for a cost: as for rewards, which reads rare costs low, or as the expectation over [0, C], C the
    largest possible discounted cost (see cost_bins)"""
    unimix: Annotated[float, (1e-6, 1.0)] = 0.01
    """share of the uniform distribution in every categorical variable; at 0 a divergence may not be finite"""
    free_bits: NotNegative = 1.0
    """KL divergence, in nats, below which it is not trained on"""
    dynamics_coef: NotNegative = 0.5
    """weight of the KL divergence that moves the prior towards the posterior"""
    representation_coef: NotNegative = 0.1
    """weight of the KL divergence that moves the posterior towards the prior"""
    reconstruction_coef: NotNegative = 5.0
    """weight of the reconstruction's squared error"""
    cost_weight: NotNegative = 10.0
    """weight of the cost head's loss where an agent step's cost is at least 1"""
    batch_size: Count = 16
    """windows B per update"""
    window: Annotated[int, Whole, (2, LARGE)] = 64
    """agent steps L of a window"""
    model_lr: Positive = 1e-4
    """step size of Adam, for the world model"""
    model_clip: Positive = 1000.0
    """global norm to which its gradient is clipped"""


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Actor and critics, in imagination"""

    horizon: Count = 15
    """imagined agent steps H"""
    gamma: Share = 0.997
    """discount of reward per agent step"""
    cost_gamma: Share = 0.997
    """discount of cost per agent step"""
    return_lambda: Share = 0.95
    """lambda of the returns: 0 bootstraps after one step, 1 only at the horizon"""
    min_std: Positive = 0.1
    """smallest standard deviation of the actor's Gaussian"""
    max_std: Positive = 1.0
    """largest standard deviation of the actor's Gaussian"""
    entropy_coef: NotNegative = 3e-4
    """weight of the actor's entropy"""
    slow_tau: Annotated[float, (1 / LARGE, 1.0)] = 0.02
    """share by which the slow critics move towards the critics after every update"""
    slow_coef: NotNegative = 1.0
    """weight of the loss that keeps a critic near its slow one"""
    behaviour_lr: Positive = 3e-5
    """step size of Adam, for the actor and for each critic"""
    behaviour_clip: Positive = 100.0
    """global norm to which each of their gradients is clipped"""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Constraint: the augmented Lagrangian of bsrp_lag, the PID controller of osrp_lag"""

    cost_limit: NotNegative = 2.0
    """limit on the imagined cost returns of bsrp_lag (see constraint_over), on the cost that a plan predicts for an
    episode (see select_elites), and on an episode's cost for the PID controller"""
    constraint_over: Literal["sum", "mean"] = "sum"
    """over the H imagined steps: sum, the reference's, or mean, under which the constraint weighs H times less"""
    lambda_init: NotNegative = 1e-6
    """first Lagrange multiplier lambda of bsrp_lag"""
    mu_init: Positive = 5e-9
    """first penalty mu"""
    mu_growth: NotNegative = 1e-5
    """mu is multiplied by 1 + mu_growth after every update"""
    mu_max: Positive = 1.0
    """cap of mu"""
    episode_length: Count = 1000
    """simulator steps that the planner's predicted costs are stretched to before they meet cost_limit"""
    pid_kp: NotNegative = 0.1
    """gain of the controller's smoothed error"""
    pid_ki: NotNegative = 0.01
    """gain of its integral"""
    pid_kd: NotNegative = 0.01
    """gain of the rise of the smoothed cost"""
    pid_max: NotNegative = 0.1
    """cap of its multiplier"""
    pid_starts: Natural = 5_000
    """agent steps before the first update of its multiplier"""


@dataclasses.dataclass(frozen=True)
class Planner:
    """Constrained cross-entropy planner of osrp and osrp_lag"""

    plan_horizon: Count = 15
    """agent steps of a plan"""
    num_samples: Count = 500
    """action sequences N per iteration"""
    num_elites: Count = 50
    """sequences k that the next iteration is fitted to"""
    iterations: Count = 6
    """refinements of the plan at every agent step"""
    plan_std: Positive = 1.0
    """first standard deviation of the plan"""
    momentum: Share = 0.1
    """share of the mean of one iteration that stays in the next"""


@dataclasses.dataclass(frozen=True)
class Args(Planner, Constraint, Behaviour, WorldModel, Protocol, Experiment):
    """SafeDreamer on Safety-Gymnasium: a recurrent world model, a constrained actor or planner in its imagination."""


GROUPS = (Experiment, Protocol, WorldModel, Behaviour, Constraint, Planner)


PRESETS = {
    "paper": {},
    "laptop": dict(
        num_envs=10, total_timesteps=300_000, eval_every=50_000, buffer_size=300_000, obs_transform="bins", deter=128,
        stoch=8, classes=16, units=128, enc_layers=2, channels=8, head_layers=1, num_bins=63, bin_limit=8.0,
        reconstruction_coef=1.0, batch_size=8, window=32, model_lr=6e-4, horizon=10, gamma=0.98, cost_gamma=0.95,
        behaviour_lr=3e-4, mu_init=1e-7, mu_growth=1e-4, plan_horizon=10, num_samples=64, num_elites=8, iterations=4,
        pid_max=0.5),
}


def advice(args):
    """A line to begin a run on a CPU with, or ""."""
    if args.preset != "paper":
        return ""
    return "the paper's preset on a CPU takes weeks: --preset laptop is made for one"


def rules(args):
    """What must hold between flags: pairs of whether it does and what to say where it does not."""
    block, updates = args.num_envs * args.action_repeat, args.train_every / args.action_repeat * args.updates_per_step
    near = max(round(args.train_every / block), 1) * block
    return [
        ("/" not in args.exp_name, "--exp-name must not hold a slash: it becomes part of a directory's name"),
        (args.inputs == "vector" or args.obs_transform == "raw", "--inputs vision needs --obs-transform raw"),
        (args.train_every % block == 0,
         f"--train-every must be a multiple of --num-envs x --action-repeat = {block}, for example {near}"),
        (args.learning_starts >= block * args.window,
         f"--learning-starts must be at least --num-envs x --action-repeat x --window = {block * args.window}"),
        (args.learning_starts <= args.train_every or args.learning_starts % args.train_every == 0,
         "--learning-starts must be at most --train-every, or a multiple of it"),
        (args.method != "osrp_lag" or args.learning_starts == args.train_every, "--learning-starts must be "
         f"--train-every = {args.train_every} with --method osrp_lag: its controller takes one cycle's episodes"),
        (round(updates) and math.isclose(updates, round(updates)), "--updates-per-step must make a whole number of "
         f"updates of {args.train_every} / {args.action_repeat} agent steps"),
        (args.total_timesteps >= args.learning_starts,
         f"--total-timesteps must be at least --learning-starts = {args.learning_starts}: before, nothing is learned"),
        (args.eval_every % args.train_every == 0, "--eval-every must be a multiple of --train-every"),
        (args.buffer_size >= args.num_envs * args.window,
         f"--buffer-size must hold --num-envs x --window = {args.num_envs * args.window} transitions"),
        (args.cost_read_out == "symlog" or args.cost_gamma < 1,
         "--cost-gamma must be smaller than 1 with --cost-read-out expectation, whose bins end at the largest cost"),
        (args.num_elites <= args.num_samples, "--num-elites must be at most --num-samples"),
        (args.min_std <= args.max_std, "--min-std must be at most --max-std"),
        (args.mu_init <= args.mu_max, "--mu-init must be at most --mu-max"),
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
    """Normalise the last axis to mean 0 and variance 1 (eps 1e-3), then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3) * scale + shift


def lambda_returns(args, paid, discount, values):
    """(H, ...) each -> R (H, ...): R_t = paid_t + discount_t ((1 - l) values_t + l R_t+1), where `values` are those of
    the states that the steps lead to and the last one stands for R_H."""
    def step(following, each):
        paid, discount, value = each
        total = paid + discount * ((1.0 - args.return_lambda) * value + args.return_lambda * following)
        return total, total

    return jax.lax.scan(step, values[-1], (paid, discount, values), reverse=True)[1]


# ----------------------------------------------------------------------------------------------------------------------
# Networks: a layer is a dict of arrays, an MLP a tuple of layers
# ----------------------------------------------------------------------------------------------------------------------
def weights(key, shape, scale=1.0):
    """Truncated normal of variance scale / (mean of fan-in and fan-out), or 0 where scale is."""
    if not scale:
        return jnp.zeros(shape)
    return jax.nn.initializers.variance_scaling(scale, "fan_avg", "truncated_normal")(key, shape)


def hidden(key, *shape):
    """A layer without bias: a product or convolution, LayerNorm; who applies it adds the activation."""
    return {"w": weights(key, shape), "scale": jnp.ones(shape[-1]), "shift": jnp.zeros(shape[-1])}


def normed(layer, x):
    """(..., in) -> (..., out): Linear, LayerNorm."""
    return layer_norm(x @ layer["w"], layer["scale"], layer["shift"])


def init_mlp(key, size, units, num_layers, out=None, out_scale=1.0):
    """`num_layers` hidden layers, then, unless `out` is None, a Linear with bias."""
    *keys, key_out = jax.random.split(key, num_layers + 1)
    layers = [hidden(key, n_in, units) for key, n_in in zip(keys, [size] + [units] * (num_layers - 1))]
    if out is not None:
        layers.append({"w": weights(key_out, (units, out), out_scale), "b": jnp.zeros(out)})
    return tuple(layers)


def mlp(layers, x):
    """(..., in) -> (..., out): Linear, LayerNorm, SiLU, ..., and Linear where the last layer has a bias."""
    for layer in layers:
        x = x @ layer["w"] + layer["b"] if "b" in layer else jax.nn.silu(normed(layer, x))
    return x


PIXELS, COLOURS, DOUBLINGS = 64, 6, 4  # two cameras with three colours each; four layers halve the width, to 4


def init_pictures(args, key, feature_dim):
    """Encoder and decoder of pictures: convolutions of 4 x 4 at stride 2, and their mirror."""
    widths, side = [COLOURS] + [args.channels * 2**i for i in range(DOUBLINGS)], PIXELS // 2**DOUBLINGS
    key_first, key_last, *keys = jax.random.split(key, 2 * DOUBLINGS + 1)
    encoder = tuple(hidden(key, 4, 4, *sizes) for key, sizes in zip(keys, zip(widths[:-1], widths[1:])))
    decoder = [{"w": weights(key_first, (feature_dim, side**2 * widths[-1])), "b": jnp.zeros(side**2 * widths[-1])}]
    for key, n_in, n_out in zip(keys[DOUBLINGS:], widths[:1:-1], widths[-2:0:-1]):
        decoder.append(hidden(key, 4, 4, n_in, n_out))
    decoder.append({"w": weights(key_last, (4, 4, widths[1], COLOURS)), "b": jnp.zeros(COLOURS)})
    return encoder, tuple(decoder)


def windows(x):
    """(n, h, h, c) -> (n, h - 1, h - 1, 4 c): two by two of them side by side."""
    side = x.shape[1] - 1
    return jnp.concatenate([x[:, i:i + side, j:j + side] for i in (0, 1) for j in (0, 1)], -1)


def halve(x, w):
    """(n, h, h, in), (4, 4, in, out) -> (n, h / 2, h / 2, out): the convolution at stride 2, padded by one.

    As one product: XLA's own convolutions take ten times as long inside a scan on a CPU. Pairs of pixels become
    channels first; a window of two by two such pairs is then what one output sees."""
    n, side, _, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, side // 2 + 1, 2, side // 2 + 1, 2, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, side // 2 + 1, side // 2 + 1, 4 * channels)
    w = w.reshape(2, 2, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)  # k = 2 pair + place in it
    return windows(x) @ w.reshape(16 * channels, -1)


def double(x, w):
    """(n, h, h, in), (4, 4, in, out) -> (n, 2 h, 2 h, out): the transpose of `halve`, y[2 i + k - 1] += x[i] w[k].

    A window of two by two inputs gives the two by two outputs that all four of them reach."""
    n, side, _, channels = x.shape
    x = windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    w = w.reshape(2, 2, 2, 2, channels, -1)[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5)  # the first input is at k = 2, 3
    y = (x @ w.reshape(4 * channels, -1)).reshape(n, side + 1, side + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(n, 2 * side + 2, 2 * side + 2, -1)[:, 1:-1, 1:-1]


def encode_pictures(layers, x):
    """(..., 64 * 64 * 6) in [0, 1] -> (..., 4 * 4 * 8 channels)"""
    lead, x = x.shape[:-1], x.reshape(-1, PIXELS, PIXELS, COLOURS) - 0.5
    for layer in layers:
        x = jax.nn.silu(layer_norm(halve(x, layer["w"]), layer["scale"], layer["shift"]))
    return x.reshape(*lead, -1)


def decode_pictures(layers, x):
    """(..., F) -> (..., 64 * 64 * 6), about [0, 1]"""
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1]) @ layers[0]["w"] + layers[0]["b"]
    x = x.reshape(len(x), PIXELS // 2**DOUBLINGS, PIXELS // 2**DOUBLINGS, -1)
    for layer in layers[1:]:
        x = double(x, layer["w"])
        x = x + layer["b"] if "b" in layer else jax.nn.silu(layer_norm(x, layer["scale"], layer["shift"]))
    return x.reshape(*lead, -1) + 0.5


# ----------------------------------------------------------------------------------------------------------------------
# World model
# ----------------------------------------------------------------------------------------------------------------------
class Latent(NamedTuple):
    """The state of the recurrent state-space model."""

    deter: jax.Array  # (..., D)
    stoch: jax.Array  # (..., S C): S one-hot vectors of C classes


def init_model(args, key, obs_dim, action_dim):
    """Weights by name: encoder and decoder, the recurrent model, and heads for reward, cost and continuation."""
    stoch, pictures = args.stoch * args.classes, args.inputs == "vision"
    size, head = args.deter + stoch, partial(init_mlp, units=args.units, num_layers=args.head_layers)
    keys = iter(jax.random.split(key, 10))
    if pictures:
        encoder, decoder = init_pictures(args, next(keys), size)
        embedding = PIXELS**2 // 4**DOUBLINGS * args.channels * 2**(DOUBLINGS - 1)
    else:
        encoder = init_mlp(next(keys), spread_obs(args, jnp.zeros(obs_dim)).size, args.units, args.enc_layers)
        decoder, embedding = init_mlp(next(keys), size, args.units, args.enc_layers, obs_dim), args.units
    return {
        "encoder": encoder,
        "decoder": decoder,
        "first": jnp.zeros(args.deter),
        "input": hidden(next(keys), stoch + action_dim, args.units),
        "gru": hidden(next(keys), args.deter + args.units, 3 * args.deter),
        "prior": init_mlp(next(keys), args.deter, args.units, 1, stoch),
        "posterior": init_mlp(next(keys), args.deter + embedding, args.units, 1, stoch),
        "reward": head(next(keys), size, out=args.num_bins, out_scale=0.0),
        "cost": free_of_cost(args, head(next(keys), size, out=args.num_bins)),
        "continue": head(next(keys), size, out=1),
    }


def free_of_cost(args, layers):
    """The same heads (K, ...) with biases that let them read 0 at first where costs are expectations: each bin but the
    first has a probability of e^-10 / (1 + its cost)."""
    if args.cost_read_out == "symlog":
        return layers
    biases = -(10.0 + np.log1p(cost_bins(args))) * (np.arange(args.num_bins) > 0)
    return (*layers[:-1], layers[-1] | {"b": layers[-1]["b"] + biases.astype(np.float32)})


def encode(args, model, obs):
    """(..., O) -> embedding (..., units), or of pictures (..., 128 channels)."""
    if args.inputs == "vision":
        return encode_pictures(model["encoder"], obs)
    return mlp(model["encoder"], symlog(obs) if args.obs_transform == "raw" else spread_obs(args, obs))


def decode(args, model, latent):
    """The observation (..., O) that a latent stands for."""
    return (decode_pictures if args.inputs == "vision" else mlp)(model["decoder"], features(latent))


def features(latent):
    """(..., D + S C): what heads, actor and critics get."""
    return jnp.concatenate([latent.deter, latent.stoch], -1)


def log_probs(args, logits):
    """(..., S C) -> (..., S, C): log of (1 - unimix) softmax(logits) + unimix / C."""
    probs = jax.nn.softmax(logits.reshape(*logits.shape[:-1], args.stoch, args.classes))
    return jnp.log((1.0 - args.unimix) * probs + args.unimix / args.classes)


def sample_stoch(logits, key):
    """Log-probabilities (..., S, C) -> one-hot (..., S C), whose gradient is that of the probabilities."""
    drawn, probs = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1]), jnp.exp(logits)
    straight_through = drawn + probs - jax.lax.stop_gradient(probs)
    return straight_through.reshape(*logits.shape[:-2], -1)


def next_deter(model, latent, action):
    """h' = GRU(h, [stoch, a]): (..., D), ..., (..., A) -> (..., D). Actions are scaled to at most 1."""
    action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
    x = jax.nn.silu(normed(model["input"], jnp.concatenate([latent.stoch, action], -1)))
    gates = normed(model["gru"], jnp.concatenate([latent.deter, x], -1))
    reset, candidate, update = jnp.split(gates, 3, -1)
    candidate, update = jnp.tanh(jax.nn.sigmoid(reset) * candidate), jax.nn.sigmoid(update - 1.0)
    return update * candidate + (1.0 - update) * latent.deter


def prior(args, model, deter):
    """p(stoch | h): log-probabilities (..., S, C)."""
    return log_probs(args, mlp(model["prior"], deter))


def posterior(args, model, deter, embedding):
    """q(stoch | h, observation): log-probabilities (..., S, C)."""
    return log_probs(args, mlp(model["posterior"], jnp.concatenate([deter, embedding], -1)))


def first_deter(args, model, action_dim):
    """(D,): h at the first observation of an episode, the learned state that is before it moved by no action."""
    deter = jnp.tanh(model["first"])
    likeliest = jax.nn.one_hot(jnp.argmax(prior(args, model, deter), -1), args.classes).reshape(-1)
    return next_deter(model, Latent(deter, likeliest), jnp.zeros(action_dim))


def imagine(args, model, latent, action, key):
    """One step without an observation: Latent (...), action (..., A) -> Latent (...)."""
    deter = next_deter(model, latent, action)
    return Latent(deter, sample_stoch(prior(args, model, deter), key))


def observe(args, model, batch, key):
    """Filter the windows of a Transition (L, B, ...) -> two pairs (Latent, posterior's log-probabilities), (L, B, ...)
    each: of `next_obs`; and of `obs` if an episode began there, which is where a window begins and where each episode
    goes on from after an end."""
    key_first, key_steps = jax.random.split(key)
    deter = first_deter(args, model, batch.action.shape[-1])
    deter = jnp.broadcast_to(deter, (*batch.reward.shape, deter.size))
    first_logits = posterior(args, model, deter, encode(args, model, batch.obs))
    first = Latent(deter, sample_stoch(first_logits, key_first))
    begins = jnp.concatenate([jnp.ones_like(batch.done[:1]), batch.done[:-1]]) > 0

    def step(latent, each):
        first, begins, action, embedding, key = each
        latent = jax.tree.map(lambda new, old: jnp.where(begins[:, None], new, old), first, latent)
        deter = next_deter(model, latent, action)
        logits = posterior(args, model, deter, embedding)
        latent = Latent(deter, sample_stoch(logits, key))
        return latent, (latent, logits)

    each = first, begins, batch.action, encode(args, model, batch.next_obs), jax.random.split(key_steps, len(begins))
    _, following = jax.lax.scan(step, jax.tree.map(lambda x: x[0], first), each)
    return following, (first, first_logits)


def kl(p, q):
    """(..., S, C) each -> (...): KL(p || q) of all S variables together, from log-probabilities."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=(-2, -1))


def world_model_loss(model, args, batch, key):
    """Transition (L, B, ...) -> loss, (metrics, Latent (L, B, ...) of next_obs).

    Per step: 0.5 max(1, KL[sg posterior || prior]) + 0.1 max(1, KL[posterior || sg prior]) + squared error of the
    reconstruction - log-likelihoods of reward, cost and continuation. All but the last three at a window's first
    observation, too.
    differs from the reference: only a terminated episode does not continue; there one cut by its time limit neither."""
    (latents, after_logits), first = observe(args, model, batch, key)
    first, first_logits = jax.tree.map(lambda x: x[:1], first)
    every = jax.tree.map(lambda first, after: jnp.concatenate([first, after]), first, latents)
    after, before = jnp.concatenate([first_logits, after_logits]), prior(args, model, every.deter)
    stop = jax.lax.stop_gradient
    dynamics, representation = kl(stop(after), before), kl(after, stop(before))  # the same number, other gradients
    seen = jnp.concatenate([batch.obs[:1], batch.next_obs])
    error = jnp.sum((decode(args, model, every) - seen) ** 2, -1)
    heads = {name: mlp(model[name], features(latents)) for name in ("reward", "cost", "continue")}
    reward = two_hot(batch.reward, args.num_bins, args.bin_limit)
    cost_weights = jnp.where(batch.cost >= 1.0, args.cost_weight, 1.0)
    losses = {
        "reconstruction": jnp.mean(error),
        "reward": jnp.mean(cross_entropy(heads["reward"], reward)),
        "cost": jnp.mean(cost_weights * cross_entropy(heads["cost"], cost_two_hot(args, batch.cost))),
        "continue": jnp.mean(optax.sigmoid_binary_cross_entropy(heads["continue"][..., 0], 1.0 - batch.terminated)),
    }
    total = (args.reconstruction_coef * losses["reconstruction"] + losses["reward"] + losses["cost"]
             + losses["continue"]
             + args.dynamics_coef * jnp.mean(jnp.maximum(args.free_bits, dynamics))
             + args.representation_coef * jnp.mean(jnp.maximum(args.free_bits, representation)))
    metrics = {f"losses/{name}": value for name, value in losses.items()}
    return total, (metrics | {"losses/kl": jnp.mean(dynamics), "losses/total": total}, latents)


# ----------------------------------------------------------------------------------------------------------------------
# Actor and critics
# ----------------------------------------------------------------------------------------------------------------------
def gaussian(args, policy, x):
    """Features (..., F) -> mean, standard deviation (..., A) of the actor, before its actions are clipped."""
    mean, std = jnp.split(mlp(policy, x), 2, -1)
    return jnp.tanh(mean), (args.max_std - args.min_std) * jax.nn.sigmoid(std + 2.0) + args.min_std


def sample_action(args, policy, x, key):
    """Features (..., F) -> action (..., A), differentiable."""
    mean, std = gaussian(args, policy, x)
    return mean + std * jax.random.normal(key, mean.shape)


def read(args, head, x):
    """Features (..., F) -> (...): what a head of reward or value stands for."""
    return read_out(mlp(head, x), args.bin_limit)


def read_cost(args, head, x):
    """Features (..., F) -> (...): what a head of cost or cost value stands for."""
    return cost_read_out(args, mlp(head, x))


class Imagined(NamedTuple):
    """Predictions along imagined rollouts of H steps."""

    features: jax.Array  # (H + 1, N, F)
    cost: jax.Array  # (H, N), of each step
    values: jax.Array  # (H + 1, N)
    returns: jax.Array  # (H, N): lambda-returns of reward
    cost_returns: jax.Array  # (H, N)
    proceed: jax.Array  # (H, N): probability that the episode goes on after each step


def predict(args, model, critics, x):
    """What is imagined for features (H + 1, N, F)."""
    reward, cost = read(args, model["reward"], x[1:]), read_cost(args, model["cost"], x[1:])
    proceed = jax.nn.sigmoid(mlp(model["continue"], x[1:])[..., 0])
    values, cost_values = read(args, critics["value"], x), read_cost(args, critics["cost_value"], x)
    returns = lambda_returns(args, reward, args.gamma * proceed, values[1:])
    cost_returns = lambda_returns(args, cost, args.cost_gamma * proceed, cost_values[1:])
    return Imagined(x, cost, values, returns, cost_returns, proceed)


def augmented_lagrangian(args, violation, multiplier, penalty):
    """Psi and the next lambda and mu, from g = `violation`.

    If lambda + mu g > 0, Psi = lambda g + mu g^2 / 2, otherwise -lambda^2 / (2 mu); lambda' = max(0, lambda + mu g)."""
    shifted = multiplier + penalty * violation
    psi = jnp.where(shifted > 0, multiplier * violation + 0.5 * penalty * violation**2, -0.5 * multiplier**2 / penalty)
    return psi, jnp.maximum(shifted, 0.0), jnp.minimum(penalty * (1.0 + args.mu_growth), args.mu_max)


def policy_loss(policy, args, agent, model, start, alive, key):
    """Latent (N, ...) and whether the episode goes on there (N,) -> loss, (Imagined, weights (H, N), next lambda, mu
    and scale, metrics).

    mean of w_t (-(R_t - V_t) / max(1, S) - 3e-4 entropy), by backpropagation through the model, but not through what
    the actor sees: an action is credited with its own consequences, not with the actions that follow. w_t discounts and
    counts the probability that the episode got there; S averages the 5 to 95% range of R. For bsrp_lag plus
    Psi(g), g = the mean of the sums of a rollout's cost returns - cost_limit."""
    def step(latent, key):
        key_action, key_next = jax.random.split(key)
        action = sample_action(args, policy, jax.lax.stop_gradient(features(latent)), key_action)
        following = imagine(args, model, latent, action, key_next)
        return following, features(following)

    x = jax.lax.scan(step, start, jax.random.split(key, args.horizon))[1]
    seen = predict(args, model, agent.critics, jnp.concatenate([features(start)[None], x]))
    through = jnp.concatenate([alive[None], args.gamma * seen.proceed[:-1]])
    discounted = jax.lax.stop_gradient(jnp.cumprod(through, axis=0))
    low, high = jnp.percentile(jax.lax.stop_gradient(seen.returns), jnp.array([5.0, 95.0]))
    scale = 0.99 * agent.scale + 0.01 * (high - low)
    advantage = (seen.returns - seen.values[:-1]) / jnp.maximum(1.0, scale)
    _, std = gaussian(args, policy, jax.lax.stop_gradient(seen.features[:-1]))
    entropy = jnp.sum(jnp.log(std) + 0.5 * math.log(2.0 * math.pi * math.e), -1)
    loss = jnp.mean(discounted * (-advantage - args.entropy_coef * entropy))
    metrics = {"losses/policy": loss, "losses/entropy": jnp.mean(entropy), "losses/scale": scale}
    multiplier, penalty = agent.multiplier, agent.penalty
    if args.method == "bsrp_lag":
        over_time = {"sum": jnp.sum, "mean": jnp.mean}[args.constraint_over](seen.cost_returns, axis=0)
        violation = jnp.mean(over_time) - args.cost_limit
        psi, multiplier, penalty = augmented_lagrangian(args, violation, multiplier, penalty)
        loss = loss + psi
        metrics |= {"losses/psi": psi, "lagrangian/violation": violation, "lagrangian/lambda": multiplier,
                    "lagrangian/mu": penalty}
    return loss, (seen, discounted, multiplier, penalty, scale, metrics)


def critic_loss(critic, args, slow, x, returns, discounted, of_cost=False):
    """Cross-entropy of a critic at features (H, N, F) to the returns (H, N), and to what the slow critic reads."""
    logits, reading, target = mlp(critic, x), read, partial(two_hot, num_bins=args.num_bins, limit=args.bin_limit)
    if of_cost:
        reading, target = read_cost, partial(cost_two_hot, args)
    towards_slow = cross_entropy(logits, target(reading(args, slow, x)))
    return jnp.mean(discounted * (cross_entropy(logits, target(returns)) + args.slow_coef * towards_slow))


# ----------------------------------------------------------------------------------------------------------------------
# PID controller of osrp_lag
# ----------------------------------------------------------------------------------------------------------------------
class Pid(NamedTuple):
    cost: jax.Array  # average of the episodes' costs, from 0 at the rate 0.01
    error: jax.Array  # smoothed cost - cost_limit
    integral: jax.Array
    smooth: jax.Array  # smoothed cost
    history: jax.Array  # (10,): its last values, the oldest first
    multiplier: jax.Array


def init_pid():
    zero = partial(jnp.zeros, ())  # each its own: all are donated to the update
    return Pid(zero(), zero(), jnp.float32(0.001), zero(), jnp.zeros(10), zero())


def control(args, pid, cost, active):
    """The controller after an episode of that cost; its multiplier stays while `active` is not set.

    lambda = K_p smoothed error + integral + K_d rise of the smoothed cost, between 0 and pid_max."""
    pid = pid._replace(cost=0.99 * pid.cost + 0.01 * cost)
    error, smooth = pid.cost - args.cost_limit, 0.95 * pid.smooth + 0.05 * pid.cost
    integral = jnp.maximum(0.0, pid.integral + args.pid_ki * error)
    smoothed, rise = 0.95 * pid.error + 0.05 * error, jnp.maximum(0.0, smooth - pid.history[0])
    multiplier = jnp.clip(args.pid_kp * smoothed + integral + args.pid_kd * rise, 0.0, args.pid_max)
    moved = Pid(pid.cost, smoothed, integral, smooth, jnp.append(pid.history[1:], smooth), multiplier)
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, pid)


def finished_costs(args, buffer):
    """(R, E): costs of the episodes that ended in the R agent steps since the last block of updates, and where.

    An episode that ends in them may have begun before: its costs are summed as far back as the ring goes."""
    block = args.train_every // (args.num_envs * args.action_repeat)
    cost, done = (jnp.roll(x, -buffer.head, axis=0) for x in (buffer.rows.cost, buffer.rows.done))  # oldest first
    paid = jnp.concatenate([jnp.zeros_like(cost[:1]), jnp.cumsum(cost, axis=0)])  # before each row
    begun = jax.lax.cummax(jnp.where(done[:-1] > 0, jnp.arange(1, len(done))[:, None], 0))  # where its episode began
    begun = jnp.concatenate([jnp.zeros_like(begun[:1]), begun])
    totals = paid[1:] - jnp.take_along_axis(paid, begun, axis=0)
    return totals[-block:], done[-block:] > 0


def control_block(args, agent, buffer):
    """The controller, at the first update of a block after all episodes that ended since the last one."""
    def step(pid, each):
        cost, ended = each
        moved = control(args, pid, cost, agent.num_updates >= args.pid_starts * args.updates_per_step)
        return jax.tree.map(lambda new, old: jnp.where(ended, new, old), moved, pid), None

    def after(pid):
        costs, ended = finished_costs(args, buffer)
        return jax.lax.scan(step, pid, (costs.ravel(), ended.ravel()))[0]

    return jax.lax.cond(agent.num_updates % updates_due(args, args.train_every) == 0, after, lambda pid: pid, agent.pid)


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
    """An empty ring of args.buffer_size transitions; pictures are kept in whole numbers from 0 to 255."""
    sizes = Transition((obs_dim,), (action_dim,), (), (), (obs_dim,), (), ())
    kept = Transition(*[jnp.float32] * len(sizes))
    if args.inputs == "vision":
        kept = kept._replace(obs=jnp.uint8, next_obs=jnp.uint8)
    lead = args.buffer_size // args.num_envs, args.num_envs
    return Buffer(Transition(*(jnp.zeros((*lead, *size), dtype) for size, dtype in zip(sizes, kept))), jnp.int32(0),
                  jnp.int32(0))


@partial(jax.jit, donate_argnames="buffer")
def add(buffer, transition):
    """Write one agent step of every environment, in place, over the oldest if the ring is full."""
    def written(rows, new):
        whole = jnp.round(255.0 * new).astype(jnp.uint8) if rows.dtype == jnp.uint8 else new
        return rows.at[buffer.head].set(whole)

    capacity = buffer.rows.reward.shape[0]
    rows = jax.tree.map(written, buffer.rows, transition)
    return Buffer(rows, (buffer.head + 1) % capacity, jnp.minimum(buffer.size + 1, capacity))


@partial(jax.jit, donate_argnames="buffer")
def cut_episodes(buffer, cut):
    """Mark the newest row as an episode's end (a truncation) where `cut` (E,): what is added next cannot join it."""
    done = buffer.rows.done.at[buffer.head - 1].max(cut)
    return buffer._replace(rows=buffer.rows._replace(done=done))


def sample(args, buffer, key):
    """B windows of L transitions, (L, B, ...), uniform over environments and starts, none across the write head."""
    capacity, num_envs = buffer.rows.reward.shape
    key_env, key_start = jax.random.split(key)
    env = jax.random.randint(key_env, (args.batch_size,), 0, num_envs)
    age = jax.random.randint(key_start, (args.batch_size,), 0, buffer.size - args.window + 1)  # 0: the oldest row
    row = (buffer.head - buffer.size + age + jnp.arange(args.window)[:, None]) % capacity
    batch = jax.tree.map(lambda rows: rows[row, env], buffer.rows)
    return jax.tree.map(lambda x: x / 255.0 if x.dtype == jnp.uint8 else x, batch)


# ----------------------------------------------------------------------------------------------------------------------
# Acting
# ----------------------------------------------------------------------------------------------------------------------
def evaluate_plans(args, agent, latent, actions, key):
    """Latent (...), (H, N, A) -> J (N,), the cost predicted for an episode (N,).

    J is the lambda-return of reward at the first step, under osrp_lag less lambda_p times that of cost. The predicted
    cost is the sum over the H steps times episode_length / H, as the reference has it, whatever the action repeat."""
    latent = jax.tree.map(lambda x: jnp.broadcast_to(x, (actions.shape[1], x.size)), latent)

    def step(latent, each):
        action, key = each
        latent = imagine(args, agent.model, latent, action, key)
        return latent, features(latent)

    x = jax.lax.scan(step, latent, (actions, jax.random.split(key, len(actions))))[1]
    seen = predict(args, agent.model, agent.critics, jnp.concatenate([features(latent)[None], x]))
    score = seen.returns[0]
    if args.method == "osrp_lag":
        score = score - agent.pid.multiplier * seen.cost_returns[0]
    return score, seen.cost.sum(0) * (args.episode_length / len(actions))


def select_elites(args, scores, costs):
    """(N,) each -> mask of k elites: of the plans with a cost below the limit those of highest score, or, where fewer
    than k are, the k of lowest cost; and how many are."""
    feasible = costs < args.cost_limit
    count = jnp.sum(feasible)
    ranked = jnp.where(count >= args.num_elites, jnp.where(feasible, scores, -jnp.inf), -costs)
    _, best = jax.lax.top_k(ranked, args.num_elites)
    return jnp.zeros_like(feasible).at[best].set(True), count


def plan(args, agent, latent, last_mean, key):
    """Latent (...) of one environment -> mean (H, A) of the plan, metrics of the last iteration.

    `last_mean` (H, A) is that of one agent step ago (zeros after a reset): it is shifted, its last entry repeated."""
    def refine(current, key):
        mean, std = current
        key_sample, key_value = jax.random.split(key)
        noise = jax.random.normal(key_sample, (len(mean), args.num_samples, mean.shape[-1]))
        actions = jnp.clip(mean[:, None] + std[:, None] * noise, -1.0, 1.0)
        scores, costs = evaluate_plans(args, agent, latent, actions, key_value)
        elites, feasible = select_elites(args, scores, costs)
        average = lambda x: jnp.sum(jnp.where(elites[:, None], x, 0.0), axis=1) / args.num_elites
        elite_mean = average(actions)
        std = jnp.sqrt(average((actions - elite_mean[:, None]) ** 2))
        mean = args.momentum * mean + (1.0 - args.momentum) * elite_mean
        return (mean, std), {"planner/num_feasible": feasible.astype(jnp.float32),
                             "planner/too_few_feasible": (feasible < args.num_elites).astype(jnp.float32)}

    first = jnp.concatenate([last_mean[1:], last_mean[-1:]])
    (mean, _), metrics = jax.lax.scan(
        refine, (first, jnp.full_like(first, args.plan_std)), jax.random.split(key, args.iterations))
    return mean, jax.tree.map(lambda values: values[-1], metrics)


class Actor(NamedTuple):
    """What acting carries from one agent step to the next."""

    key: jax.Array
    step: jax.Array  # agent steps taken; the step's own key is folded from it
    latent: Latent  # (E, ...)
    action: jax.Array  # (E, A): the one before
    plan_mean: jax.Array  # (E, H, A)
    metrics: dict  # name -> (E,): sums over agent steps since they were last set to zero


def init_actor(args, key, action_dim):
    """An actor at the start of a run."""
    names = ["charts/balance"]
    if args.method != "bsrp_lag":
        names += ["planner/num_feasible", "planner/too_few_feasible"]
    latent = Latent(jnp.zeros((args.num_envs, args.deter)), jnp.zeros((args.num_envs, args.stoch * args.classes)))
    return Actor(jnp.copy(key), jnp.int32(0), latent, jnp.zeros((args.num_envs, action_dim)),
                 jnp.zeros((args.num_envs, args.plan_horizon, action_dim)),
                 {name: jnp.zeros(args.num_envs) for name in names})


@partial(jax.jit, static_argnames="args")
def act(args, agent, actor, obs, is_first, explore):
    """All environments at once: obs (E, O), is_first (E,) -> action (E, A) in [-1, 1], next actor.

    bsrp_lag draws from the actor, the others execute the first action of the plan's mean, exploring or not.
    `is_first` marks the environments that were just reset; at an actor's first step all begin anew."""
    key_stoch, key_action = jax.random.split(jax.random.fold_in(actor.key, actor.step))
    begins = (is_first | (actor.step == 0))[:, None]
    deter = jnp.where(begins, first_deter(args, agent.model, actor.action.shape[-1]),
                      next_deter(agent.model, actor.latent, actor.action))
    logits = posterior(args, agent.model, deter, encode(args, agent.model, obs))
    latent = Latent(deter, sample_stoch(logits, key_stoch))
    if args.method == "bsrp_lag":
        action = jnp.clip(sample_action(args, agent.policy, features(latent), key_action), -1.0, 1.0)
        plan_mean, metrics = actor.plan_mean, {"charts/balance": jnp.zeros(len(obs))}
    else:
        last_mean = jnp.where(begins[:, None], 0.0, actor.plan_mean)
        plan_mean, metrics = jax.vmap(partial(plan, args, agent))(
            latent, last_mean, jax.random.split(key_action, len(obs)))
        action, metrics = plan_mean[:, 0], metrics | {"charts/balance": jnp.ones(len(obs))}
    metrics = jax.tree.map(jnp.add, actor.metrics, metrics)
    return action, Actor(actor.key, actor.step + 1, latent, action, plan_mean, metrics)


# ----------------------------------------------------------------------------------------------------------------------
# Update
# ----------------------------------------------------------------------------------------------------------------------
class AgentState(NamedTuple):
    """Everything that learning changes."""

    model: dict
    policy: tuple
    critics: dict  # "value" and "cost_value"
    slow: dict  # averages of the critics
    model_opt: tuple
    policy_opt: tuple
    critics_opt: dict
    multiplier: jax.Array  # lambda of bsrp_lag
    penalty: jax.Array  # mu
    pid: Pid  # of osrp_lag
    scale: jax.Array  # S
    key: jax.Array
    num_updates: jax.Array  # gradient updates done; each one's key is folded from it


def model_optimizer(args):
    return optax.chain(optax.clip_by_global_norm(args.model_clip), optax.adam(args.model_lr, eps=1e-8))


def behaviour_optimizer(args):
    return optax.chain(optax.clip_by_global_norm(args.behaviour_clip), optax.adam(args.behaviour_lr, eps=1e-5))


def init_agent(args, key, obs_dim, action_dim):
    """A fresh agent for observations and actions of those sizes; `key` is a typed key (jax.random.key)."""
    key_model, key_policy, key_value, key_cost_value, key_updates = jax.random.split(key, 5)
    model, num_features = init_model(args, key_model, obs_dim, action_dim), args.deter + args.stoch * args.classes
    policy = init_mlp(key_policy, num_features, args.units, args.head_layers, 2 * action_dim)
    critics = {name: init_mlp(key, num_features, args.units, args.head_layers, args.num_bins, out_scale=0.0)
               for name, key in {"value": key_value, "cost_value": key_cost_value}.items()}
    critics["cost_value"] = free_of_cost(args, critics["cost_value"])
    slow = jax.tree.map(jnp.copy, critics)  # copies: both are donated to the update
    critics_opt = {name: behaviour_optimizer(args).init(critic) for name, critic in critics.items()}
    return AgentState(model, policy, critics, slow, model_optimizer(args).init(model),
                      behaviour_optimizer(args).init(policy), critics_opt, jnp.float32(args.lambda_init),
                      jnp.float32(args.mu_init), init_pid(), scale=jnp.float32(0.0), key=key_updates,
                      num_updates=jnp.int32(0))


def update(args, agent, batch, key):
    """One gradient step of the world model on windows (L, B, ...), then of the actor and the critics on rollouts
    imagined from all of their states -> agent, metrics."""
    key_model, key_imagine = jax.random.split(key)
    model_grads, (metrics, latents) = jax.grad(world_model_loss, has_aux=True)(agent.model, args, batch, key_model)
    updates, model_opt = model_optimizer(args).update(model_grads, agent.model_opt)
    model = optax.apply_updates(agent.model, updates)

    start = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), latents)
    policy_grads, (seen, discounted, multiplier, penalty, scale, policy_metrics) = jax.grad(policy_loss, has_aux=True)(
        agent.policy, args, agent, model, start, 1.0 - batch.terminated.ravel(), key_imagine)
    updates, policy_opt = behaviour_optimizer(args).update(policy_grads, agent.policy_opt)
    policy = optax.apply_updates(agent.policy, updates)
    metrics |= policy_metrics | {"losses/model_grad_norm": optax.tree.norm(model_grads),
                                 "losses/policy_grad_norm": optax.tree.norm(policy_grads)}

    critics, critics_opt = {}, {}
    for name, returns in {"value": seen.returns, "cost_value": seen.cost_returns}.items():
        metrics[f"losses/{name}"], grads = jax.value_and_grad(critic_loss)(
            agent.critics[name], args, agent.slow[name], seen.features[:-1], returns, discounted,
            name == "cost_value")
        updates, critics_opt[name] = behaviour_optimizer(args).update(grads, agent.critics_opt[name])
        critics[name] = optax.apply_updates(agent.critics[name], updates)
    slow = jax.tree.map(lambda old, new: old + args.slow_tau * (new - old), agent.slow, critics)
    return AgentState(model, policy, critics, slow, model_opt, policy_opt, critics_opt, multiplier, penalty, agent.pid,
                      scale, agent.key, agent.num_updates + 1), metrics


@partial(jax.jit, static_argnames=("args", "num_updates"), donate_argnames="agent")
def update_many(args, agent, buffer, num_updates):
    """`num_updates` updates, each on windows sampled from the buffer -> agent, metrics averaged over them."""

    def step(agent, _):
        key_sample, key_update = jax.random.split(jax.random.fold_in(agent.key, agent.num_updates))
        return update(args, agent, sample(args, buffer, key_sample), key_update)

    if args.method == "osrp_lag":
        agent = agent._replace(pid=control_block(args, agent, buffer))
    agent, metrics = jax.lax.scan(step, agent, length=num_updates)
    metrics["losses/param_norm"] = optax.tree.norm((agent.model, agent.policy))
    if args.method == "osrp_lag":
        metrics |= {"lagrangian/lambda": agent.pid.multiplier, "lagrangian/violation": agent.pid.cost - args.cost_limit}
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


@partial(jax.jit, static_argnames="args")
def read_costs(args, agent, batch, key):
    """Transition (T, N, ...) of episodes from their start -> (T, N) each: the cost that the model expects of each step
    before its outcome is seen, and the cost critic's value before it."""
    (latents, _), (first, _) = observe(args, agent.model, batch, key)
    before = jax.tree.map(lambda first, after: jnp.concatenate([first[:1], after[:-1]]), first, latents)
    likeliest = jax.nn.one_hot(jnp.argmax(prior(args, agent.model, latents.deter), -1), args.classes)
    expected = Latent(latents.deter, likeliest.reshape(latents.stoch.shape))
    return (read_cost(args, agent.model["cost"], features(expected)),
            read_cost(args, agent.critics["cost_value"], features(before)))


def critic_metrics(args, agent, episodes):
    """What cost head and cost critic knew of the costs in evaluation episodes: numbers by tag, none for what did not
    occur.

    critic/cost_auc: of the predicted cost of a step for "this agent step costs"; then `read_and_followed` of the cost
    critic, whose values are of the actor's own actions, also where the planner acted."""
    played = [episode["played"] for episode in episodes]
    longest = 1 << (max(len(each.cost) for each in played) - 1).bit_length()  # few lengths to compile for
    pad = lambda x: np.pad(x, [(0, longest - len(x))] + [(0, 0)] * (x.ndim - 1))[:, None]
    keys, found = jax.random.split(jax.random.key(0), len(played)), []
    for each, key in zip(played, keys):  # one at a time: fifty episodes of pictures fill the memory
        both = read_costs(args, agent, jax.tree.map(pad, each), key)
        found.append([np.asarray(x)[:len(each.cost), 0] for x in both])
    one_step, values = map(np.concatenate, zip(*found))
    area = auc(one_step, np.concatenate([each.cost for each in played]) > 0)
    return ({} if math.isnan(area) else {"critic/cost_auc": area}) | read_and_followed(args, episodes, values)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
def with_cameras(env):
    """The environment with flat pictures (64 * 64 * 6,) in [0, 1] as observations: RGB of the robot's camera, and of
    the same one turned to its back. They are drawn when they are made an array, not at every step of a repeat."""
    import gymnasium
    import mujoco
    from gymnasium.envs.mujoco import mujoco_rendering

    task, viewers = env.unwrapped.task, []

    def look(dtype=None, copy=None):
        model, data = task.model, task.data
        if not viewers:
            model.vis.global_.offwidth, model.vis.global_.offheight = PIXELS, PIXELS
            viewers.append(mujoco_rendering.OffScreenViewer(model, data))
            viewers[0].vopt.geomgroup[:] = 1
        viewer, camera = viewers[0], model.camera("vision")
        viewer.model, viewer.data = model, data  # each reset makes new ones, of the same shapes and textures
        viewer.opengl_context.make_current()
        place, turn, pictures, back = camera.pos.copy(), camera.quat.copy(), [], np.zeros(4)
        mujoco.mju_mulQuat(back, np.array([0.0, 0.0, 0.0, 1.0]), turn)  # half a turn about the robot's vertical axis
        for camera.pos[:], camera.quat[:] in ((place, turn), (place * (-1, -1, 1), back)):
            mujoco.mj_camlight(model, data)
            pictures.append(viewer.render("rgb_array", camera.id))
        camera.pos[:], camera.quat[:] = place, turn
        mujoco.mj_camlight(model, data)
        return (np.concatenate(pictures, -1) / 255.0).ravel().astype(dtype)

    view = type("View", (), {"__array__": staticmethod(look)})()  # of the state at that moment

    def reset(**options):
        _, info = env.reset(**options)
        return view, info

    def step(action):
        _, *others = env.step(action)
        return view, *others

    def render():
        for viewer in task._viewers.values():  # others have drawn since
            viewer.opengl_context.make_current()
        return env.render()

    space = gymnasium.spaces.Box(0.0, 1.0, (PIXELS * PIXELS * COLOURS,))
    return types.SimpleNamespace(
        observation_space=space, action_space=env.action_space, reset=reset, step=step, render=render)


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
    """One environment of the task, able to draw if `drawn`, seen by its cameras under --inputs vision."""
    if drawn or args.inputs == "vision":
        os.environ.setdefault("MUJOCO_GL", "egl")
    options = {"render_mode": "rgb_array", "camera_name": "fixedfar", "width": 512, "height": 512} if drawn else {}
    env = import_safety_gymnasium().make(args.env_id, **options)
    if args.inputs == "vision":
        env.reset(seed=0)  # makes the model that the cameras look at
        env = with_cameras(env)
    return env


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
