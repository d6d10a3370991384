"""Can the costs be learned? Train on the fixed replay buffer of a run, ask about the environments that were left out.

    python probe/cost_probe.py RUN --variants "log: --obs-transform log" bins --csv costs.csv

Minutes where a training run takes an hour. RUN is a run directory of spowl_continuous.py; the agents are trained from
scratch on all but two of its environments by the script's own updates, with the run's flags and on top of them those of
the variant. For each, by number of updates, on the two others: AUC of the one-step cost heads for "this agent step
costs", and the same among the steps that begin outside a hazard, where the agent can still turn away; correlation of Qc
with the discounted cost that followed, and the means of both; and how much of the distance to the nearest hazard (up to
3 m) is linear in the latent: 1 - squared error / variance of a linear map fitted on the others. A variant whose label
begins with "supervised" is the ceiling: a plain MLP that is told nothing but observation, action and whether the step
cost.

    python probe/cost_probe.py RUN --variants bins "decoder: ablations/spowl_decoder.py --decoder-coef 1"
    python probe/cost_probe.py RUN --variants bins --without hazards_lidar"""

import csv
import importlib
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import spowl_continuous as spowl

COLUMNS = ("variant", "updates", "cost_auc", "entry_auc", "qc_correlation", "qc_read", "qc_followed", "hazard_r2",
           "seconds")


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run directory whose newest checkpoint holds the buffer"""
    variants: tuple[str, ...] = ("log: --obs-transform log", "bins: --obs-transform bins")
    """label, or label: flags of spowl_continuous.py, or label: another script and its flags"""
    without: tuple[str, ...] = ()
    """sensors of the task, for example hazards_lidar, that agents do not see: their entries are 0"""
    updates: int = 6_000
    """updates per variant"""
    every: int = 2_000
    """updates between two readings: a multiple of 100"""
    held_out: int = 2
    """environments, the last ones, that are asked about and never trained on"""
    max_steps: int | None = None
    """use no more than the oldest so many simulator steps of the buffer"""
    csv: Path | None = None
    """file for the readings"""


def load_rows(run, max_steps=None):
    """The transitions in a run's newest checkpoint, oldest first, as NumPy arrays (T, E, ...), and its flags."""
    try:
        info = json.loads((run / "args.json").read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{run} is not a run directory: {error}")
    known = {field.name for field in fields(spowl.Args)}
    args = spowl.Args(**{name: value for name, value in info.items() if name in known})
    found = spowl.checkpoints(run)
    if not found:
        raise SystemExit(f"{run} has no checkpoint")
    with np.load(found[-1]) as file:
        names = {name: f"['buffer'].rows.{name}" for name in spowl.Transition._fields}
        if names["obs"] not in file:
            raise SystemExit(f"{found[-1]} holds no replay buffer: it is an agent alone")
        rows = spowl.Transition(**{name: file[key] for name, key in names.items()})
        first = int(file["['buffer'].head"]) if len(rows.reward) == args.buffer_size // args.num_envs else 0
    count = len(rows.reward) if max_steps is None else max(0, max_steps // (args.num_envs * args.action_repeat))
    return jax.tree.map(lambda x: np.roll(x, -first, axis=0)[:count], rows), args


def transformed(rows, stored, args):
    """The same transitions with observations as an agent with these flags sees them, from the way they are stored."""
    if (args.obs_transform == "raw") == (stored == "raw"):  # bins are of the encoder, what is stored is the log
        return rows
    if stored != "raw":
        raise SystemExit(f"the run has --obs-transform {stored}: other variants need a run with raw observations")
    space = spowl.import_safety_gymnasium().make(args.env_id).observation_space
    see = lambda obs: spowl.transform_obs(obs, space.low, space.high).astype(np.float32)
    return rows._replace(obs=see(rows.obs), next_obs=see(rows.next_obs))


def sensors(env):
    """{name of a sensor: its entries in the observation} of a task's environment."""
    space = env.unwrapped.task.obs_info.obs_space_dict
    ends = np.cumsum([math.prod(part.shape) for part in space.spaces.values()]).tolist()
    return {name: slice(end - math.prod(part.shape), end) for (name, part), end in zip(space.spaces.items(), ends)}


def hazard_distance(rows, stored, entries):
    """(T, E): metres to the nearest hazard, up to 3, from a lidar at those entries: 1 - distance / 3."""
    near = rows.obs[..., entries].max(-1)
    return 3.0 * (1.0 - (near if stored == "raw" else 1.02 - np.exp(-near)))


def blinded(rows, entries):
    """The same transitions with those entries of the observations at 0."""
    obs, next_obs = rows.obs.copy(), rows.next_obs.copy()
    for part in entries:
        obs[..., part] = next_obs[..., part] = 0.0
    return rows._replace(obs=obs, next_obs=next_obs)


def linear_r2(seen, asked):
    """1 - squared error / variance of y (N,) given x (N, Z) in `asked`, by the linear map fitted on those in `seen`."""
    both = [(np.concatenate([x, np.ones((len(x), 1))], -1, dtype=float), y) for x, y in (seen, asked)]
    (x, y), (x_asked, y_asked) = both
    weights = np.linalg.solve(x.T @ x + 1e-3 * np.eye(x.shape[1]), x.T @ y)
    return 1.0 - np.mean((x_asked @ weights - y_asked) ** 2) / np.var(y_asked)


def areas(score, rows):
    """AUC of a score (T, E) for "this agent step costs": of all steps, and of those that begin outside a hazard."""
    costly = rows.cost > 0
    inside = np.concatenate([np.zeros_like(costly[:1]), costly[:-1] & (rows.done[:-1] == 0)])
    return spowl.auc(score.ravel(), costly.ravel()), spowl.auc(score[~inside], costly[~inside])


def held_out_reading(args, model, rows, script=spowl):
    """`areas` of the cost heads, correlation of Qc with what followed, and the means of both, on rows (T, E, ...)."""
    z = script.encode(args, model, rows.obs)
    cost, qc = (np.asarray(script.cost_heads(args, model[name], z, rows.action).mean(0)) for name in ("cost", "qc"))
    followed = np.zeros_like(qc)
    for env in range(qc.shape[1]):
        for episode in np.split(np.arange(len(qc)), np.flatnonzero(rows.done[:-1, env]) + 1):
            followed[episode, env] = spowl.cost_to_go(
                rows.cost[episode, env], rows.terminated[episode, env], qc[episode[-1], env], args.cost_gamma)
    correlation = np.corrcoef(qc.ravel(), followed.ravel())[0, 1] if qc.std() > 0 else 0.0
    return *areas(cost, rows), correlation, qc.mean(), followed.mean()


def probe(label, args, rows, distance, options, script=spowl):
    """Train an agent on the rows of all but the held-out environments -> readings as rows of the csv. `distance` (T, E)
    is that to the nearest hazard, or None."""
    parts = slice(None, -options.held_out), slice(-options.held_out, None)
    seen, asked = (jax.tree.map(lambda x: x[:, part], rows) for part in parts)
    obs_dim, action_dim = rows.obs.shape[-1], rows.action.shape[-1]
    buffer = script.Buffer(jax.tree.map(jnp.asarray, script.Transition(*seen)), jnp.int32(0),
                           jnp.int32(len(rows.reward)))
    agent, began = script.init_agent(args, jax.random.key(args.seed), obs_dim, action_dim), time.time()
    for updates in range(options.every, options.updates + 1, options.every):
        for _ in range(options.every // 100):
            agent, _ = script.update_many(args, agent, buffer, 100)
        reading = held_out_reading(args, agent.model, asked, script)
        if distance is None:
            known = math.nan
        else:
            latents = np.asarray(script.encode(args, agent.model, rows.obs))
            known = linear_r2(*((latents[:, part].reshape(-1, latents.shape[-1]), distance[:, part].ravel())
                                for part in parts))
        yield [label, updates, *(round(float(x), 4) for x in (*reading, known)), round(time.time() - began)]


def supervised(label, args, rows, distance, options, script=spowl):
    """The ceiling: an MLP with two hidden layers learns whether a step costs -> readings of its AUC."""
    inputs = np.concatenate([spowl.spread_obs(args, rows.obs), rows.action], -1)
    seen, asked = inputs[:, :-options.held_out], inputs[:, -options.held_out:]
    asked_rows = jax.tree.map(lambda x: x[:, -options.held_out:], rows)
    mean, spread = seen.mean((0, 1)), seen.std((0, 1)) + 1e-3
    seen, asked = ((x - mean) / spread for x in (seen, asked))
    seen = jnp.asarray(seen.reshape(-1, seen.shape[-1]))
    costly = jnp.asarray(rows.cost[:, :-options.held_out].ravel() > 0, jnp.float32)
    layers = spowl.init_mlp(jax.random.key(args.seed), (seen.shape[-1], 128, 128, 1), zero_last=True)
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, static_argnums=2)
    def train(state, key, steps):
        def step(state, key):
            layers, opt = state
            chosen = jax.random.randint(key, (256,), 0, len(seen))
            loss = lambda layers: optax.sigmoid_binary_cross_entropy(
                spowl.mlp(layers, seen[chosen])[:, 0], costly[chosen]).mean()
            updates, opt = optimizer.update(jax.grad(loss)(layers), opt)
            return (optax.apply_updates(layers, updates), opt), None
        return jax.lax.scan(step, state, jax.random.split(key, steps))[0]

    state, began = (layers, optimizer.init(layers)), time.time()
    for updates in range(options.every, options.updates + 1, options.every):
        state = train(state, jax.random.key(updates), options.every)
        score = np.asarray(spowl.mlp(state[0], jnp.asarray(asked)))[..., 0]
        yield [label, updates, *(round(x, 4) for x in areas(score, asked_rows)), *[""] * 4, round(time.time() - began)]


def read_variant(variant, info):
    """label, or label: [script] flags -> label, script, its Args on top of the run's flags. SystemExit for flags that
    cannot be."""
    label, _, words = variant.partition(":")
    words, script = shlex.split(words), spowl
    if words and words[0].endswith(".py"):
        name = words.pop(0)
        if not (ROOT / name).is_file():
            raise SystemExit(f"--variants {label}: {name} does not exist in {ROOT}")
        sys.path.insert(0, str((ROOT / name).parent))
        script = importlib.import_module(Path(name).stem)
    known = {field.name for field in fields(script.Args)}
    args = script.read_flags(words, script.Args(**{name: value for name, value in info.items() if name in known}))
    if args.preset != info["preset"]:
        raise SystemExit(f"--variants {label}: --preset changes nothing here: give the flags that it stands for")
    if found := script.problems(args):
        raise SystemExit(f"--variants {label}: {found[0]}")
    return label, script, args


def main(options):
    """SystemExit, before anything is trained, for options that cannot be."""
    stored, args = load_rows(options.run, options.max_steps)
    if options.every < 100 or options.every % 100 or options.updates < options.every:
        raise SystemExit("--every must be a multiple of 100, --updates at least as many")
    if not 1 <= options.held_out < args.num_envs:
        raise SystemExit(f"--held-out must be at least 1 and leave one of the run's {args.num_envs} environments")
    if options.csv and not options.csv.parent.is_dir():
        raise SystemExit(f"--csv {options.csv}: there is no directory {options.csv.parent}")
    if len(stored.reward) < args.horizon:
        raise SystemExit(f"{len(stored.reward)} agent steps of each environment hold no sequence of --horizon "
                         f"{args.horizon}: raise --max-steps, or train the run for longer")
    places = sensors(spowl.import_safety_gymnasium().make(args.env_id))
    for name in options.without:
        if name not in places:
            raise SystemExit(f"--without {name}: {args.env_id} has {', '.join(places)}")
    print(f"{stored.reward.size:,} transitions, {np.mean(stored.cost > 0):.1%} of them cost", flush=True)
    distance = None
    if "hazards_lidar" in places:
        distance = hazard_distance(stored, args.obs_transform, places["hazards_lidar"])
    readings, variants = [], [read_variant(variant, vars(args)) for variant in options.variants]
    seen = [transformed(stored, args.obs_transform, chosen) for *_, chosen in variants]
    for (label, script, chosen), rows in zip(variants, seen):
        rows = blinded(rows, [places[name] for name in options.without])
        learner = supervised if label.startswith("supervised") else probe
        for reading in learner(label, chosen, rows, distance, options, script):
            print(*(f"{name} {value}" for name, value in zip(COLUMNS, reading)), sep=", ", flush=True)
            readings.append(reading)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *readings])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
