"""What the machine can do, and how near to it the agent comes: one table, one picture, one run on one machine.

    python benchmark/speed.py                                  # everything, minutes; leave the machine alone meanwhile
    python benchmark/speed.py --sizes laptop --parts update plan --json speed.json

The ceiling is measured in the same run: a large float32 matrix product, and a copy of the device's memory. Operations
are counted as the fewest that the method needs (see `update_flops` and `plan_flops`), so doing more of them does not
raise the share of the ceiling. Times are medians, but for the simulators and a cycle, which are gone through once."""

import csv
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import spowl_continuous as spowl
from baselines import ppo_lagrangian
from plot import STYLE, WIDTH, save

SIZES = {"paper": {}, "laptop": spowl.PRESETS["laptop"]}
PARTS = ("update", "plan", "env_step", "cycle", "growth")
COLUMNS = ("size", "part", "seconds", "flops", "share_of_ceiling", "compile_seconds", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class Options:
    sizes: tuple[Literal["paper", "laptop"], ...] = ("laptop", "paper")
    """presets to measure; how times grow, and the simulator, are measured with the first"""
    parts: tuple[Literal["ceiling", "update", "plan", "env_step", "cycle", "growth", "on_policy"], ...] = PARTS
    """what to measure; the ceiling always is, by itself if it is all that is named; on_policy, not measured unless
    named, is a rollout of PPO-Lagrangian at its own sizes"""
    cycle_share: float = 0.1
    """how much of a cycle is measured; its row is for a whole one"""
    env_id: str = "SafetyPointGoal1-v0"
    """task that is stepped"""
    repeats: int = 7
    """measurements per number (of growth: 3)"""
    json: Path | None = None
    """file for the rows as a list"""
    csv: Path | None = None
    """file for the rows as a table"""
    picture: Path | None = None
    """file for the picture"""


# ----------------------------------------------------------------------------------------------------------------------
# Operations, a multiplication and an addition counted as two
# ----------------------------------------------------------------------------------------------------------------------
def products(rows, *sizes):
    """Operations of an MLP's matrix products."""
    return 2 * rows * sum(n_in * n_out for n_in, n_out in zip(sizes[:-1], sizes[1:]))


def encoder_dim(args, obs_dim):
    """How many numbers the encoder gets of an observation."""
    return jax.eval_shape(partial(spowl.spread_obs, args), jnp.zeros(obs_dim)).size


def update_flops(args, obs_dim, action_dim):
    """One update: heads that targets and losses read, forward once, backward by weights and by inputs where needed."""
    obs_dim = encoder_dim(args, obs_dim)
    z, w, bins, starts = args.latent_dim, args.mlp_dim, args.num_bins, args.batch_size
    rows = starts * args.horizon
    head = partial(products, rows, z + action_dim, w, w, bins)
    encoder = partial(products, rows, obs_dim, args.enc_dim, z)
    targets = encoder() + products(rows, z, w, w, 2 * action_dim) + (2 + args.num_qc) * head()
    trained = 3 * (1 + args.num_c + args.num_q + args.num_qc) * head()
    dynamics = 3 * products(rows, z + action_dim, w, w, z)
    encoded = 3 * products(starts, obs_dim, args.enc_dim, z) - products(starts, obs_dim, args.enc_dim)
    rows = starts * (args.horizon + 1)
    forward, by_action = products(rows, z + action_dim, w, w, bins), products(rows, action_dim, w, w, bins)
    read = (2 + args.lagrangian_heads) * (forward + by_action)
    policy = 3 * products(rows, z, w, w, 2 * action_dim) - products(rows, z, w)
    return targets + trained + dynamics + encoded + read + policy


def plan_flops(args, obs_dim, action_dim):
    """Acting once in all environments: the policy's sequences are scored once; the common first latent is multiplied
    once per network, not once per sequence."""
    z, w, bins, horizon, prior = args.latent_dim, args.mlp_dim, args.num_bins, args.horizon, args.num_pi_trajs
    networks = 2 + args.num_c  # reward, dynamics, cost heads: what a step of a sequence passes through
    scored = prior + args.iterations * (args.num_samples - prior)
    step = (1 + args.num_c) * products(scored, z + action_dim, w, w, bins) + products(
        scored, z + action_dim, w, w, z)
    common = networks * products(scored - 1 - args.iterations, z, w)
    last = products(scored, z, w, w, 2 * action_dim) + (args.num_q + args.num_qc) * products(
        scored, z + action_dim, w, w, bins)
    rollout = horizon * (products(prior, z, w, w, 2 * action_dim) + products(prior, z + action_dim, w, w, z))
    choice = (args.num_q + args.num_qc) * products(2, z + action_dim, w, w, bins)
    encoded = products(1, encoder_dim(args, obs_dim), args.enc_dim, z)
    return args.num_envs * (encoded + horizon * step - common + last + rollout + choice)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------
def median_seconds(run, repeats):
    """Median time of run(), which waits for its result, after one call that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def row(size, part, seconds, flops=None, share=None, compile_seconds=None, peak_bytes=None):
    return dict(zip(COLUMNS, (size, part, seconds, flops, share, compile_seconds, peak_bytes)))


def measure_ceiling(repeats):
    """The best of three square float32 products -> operations a second, its row and that of a copy."""
    best = None
    for n in (1024, 2048, 4096) if jax.default_backend() == "cpu" else (4096, 8192, 16384):
        a = jax.random.normal(jax.random.key(0), (n, n))
        multiply = jax.jit(jnp.dot)
        seconds = median_seconds(lambda: multiply(a, a).block_until_ready(), repeats)
        best = max(best or (0, 0, 0), (2 * n**3 / seconds, seconds, 2 * n**3))
    x = jnp.zeros(2**26)
    copy = jax.jit(jnp.copy)
    seconds = median_seconds(lambda: copy(x).block_until_ready(), repeats)
    return best[0], [row("", "ceiling", best[1], best[2], 1.0), row("", "copy", seconds, peak_bytes=2 * x.nbytes)]


def compiled(function, *arguments):
    """A jitted function compiled for these arguments -> it, seconds to compile, peak bytes of a call."""
    began = time.perf_counter()
    made = function.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - began, made.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes)
    return made, seconds, peak


def noise(args, obs_dim, action_dim):
    """Transitions as a task might give them, costs rare."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: rng.uniform(-1, 1, (args.num_envs, *shape)).astype(np.float32)
    return spowl.Transition(f32(obs_dim), f32(action_dim), f32(), (f32() > 0.9).astype(np.float32), f32(obs_dim),
                            0 * f32(), (f32() > 0.99).astype(np.float32))


def measure_update(args, obs_dim, action_dim, repeats):
    """One update, as a tenth of a scan of ten; and one addition to the buffer -> seconds, compile, peak of both."""
    agent, buffer = spowl.init_agent(args, jax.random.key(0), obs_dim, action_dim), spowl.init_buffer(
        args, obs_dim, action_dim)
    new = noise(args, obs_dim, action_dim)
    run_add, *about_add = compiled(spowl.add, buffer, new)
    for _ in range(200):
        buffer = run_add(buffer, new)
    run, *about = compiled(spowl.update_many, args, agent, buffer, 10)
    state = [agent, buffer]

    def update():
        state[0], metrics = run(state[0], state[1])
        jax.block_until_ready(metrics)

    def add():
        state[1] = run_add(state[1], new)
        state[1].size.block_until_ready()

    return (median_seconds(update, repeats) / 10, *about), (median_seconds(add, 20 * repeats), *about_add)


def measure_plan(args, obs_dim, action_dim, repeats):
    """Acting once in all environments, until the actions are on the host -> seconds, compile, peak."""
    agent = spowl.init_agent(args, jax.random.key(0), obs_dim, action_dim)
    state = [spowl.init_actor(args, jax.random.key(1), action_dim)]
    obs = np.random.default_rng(0).normal(size=(args.num_envs, obs_dim)).astype(np.float32)
    first = np.zeros(args.num_envs, bool)
    run, *about = compiled(spowl.act, args, agent, state[0], obs, first, True)

    def once():
        action, state[0] = run(agent, state[0], obs, first, True)
        np.asarray(action)

    return (median_seconds(once, repeats), *about)


def random_actions(args, action_dim, steps):
    return np.random.default_rng(0).uniform(-1, 1, (steps, args.num_envs, action_dim)).astype(np.float32)


def step_alone(args, indices, actions, pipe):
    """A process that steps those environments and talks to nobody meanwhile; sends how long it took."""
    envs = {index: spowl.import_safety_gymnasium().make(args.env_id) for index in indices}
    for env in envs.values():
        env.reset(seed=0)
    pipe.send(None)
    pipe.recv()
    began = time.perf_counter()
    for action in actions:
        for index, env in envs.items():
            for _ in range(args.action_repeat):
                *_, terminated, truncated, _ = env.step(action[index])
                if terminated or truncated:
                    env.reset(seed=index)
                    break
    pipe.send(time.perf_counter() - began)


def measure_env_step(args, steps=600):
    """Agent steps of all environments with the same random actions -> seconds of one, seconds if no process waited.

    Processes are forked, as a run's are: call it before JAX is used."""
    ask, _, action_dim = spowl.start_envs(args, 0, args.num_envs)
    try:
        actions = random_actions(args, action_dim, steps)
        ask("reset", [(0, [])] * args.num_envs)
        began = time.perf_counter()
        for action in actions:
            ask("step", action)
        ours = time.perf_counter() - began
    finally:
        ask("close")
    context, started = multiprocessing.get_context("fork"), []
    for indices in np.array_split(range(args.num_envs), min(args.num_envs, len(os.sched_getaffinity(0)))):
        pipe, theirs = context.Pipe()
        context.Process(target=step_alone, args=(args, indices, actions, theirs), daemon=True).start()
        started.append(pipe)
    for message in (None, "go"):
        for pipe in started:
            pipe.send(message) if message else pipe.recv()
    return ours / steps, max(pipe.recv() for pipe in started) / steps


def measure_cycle(args, share):
    """That share of a cycle, as `train` goes through it -> seconds of acting, stepping, updating, of a whole cycle."""
    ask, *sizes = spowl.start_envs(args, 0, args.num_envs, start_method="spawn")
    try:
        run = spowl.begin(args, ask, sizes)._replace(step=args.learning_starts)
        for _ in range(args.horizon):  # enough to sample from; compiles
            run, _ = spowl.collect(args, ask, run)
        steps = max(1, round(share * args.train_every / (args.num_envs * args.action_repeat)))
        updates = spowl.updates_due(args, steps * args.num_envs * args.action_repeat)
        agent, metrics = spowl.update_many(args, run.agent, run.buffer, updates)
        jax.device_get(metrics)
        run, acting, began = run._replace(agent=agent), 0.0, time.perf_counter()
        for _ in range(steps):
            run, seconds = spowl.collect(args, ask, run)
            acting += seconds
        collected = time.perf_counter()
        agent, metrics = spowl.update_many(args, run.agent, run.buffer, updates)
        jax.device_get(metrics)
        parts = acting, collected - began - acting, time.perf_counter() - collected
    finally:
        ask("close")
    return [seconds * args.train_every / (steps * args.num_envs * args.action_repeat) for seconds in parts]


def measure_on_policy(env_id, count=3):
    """Rollouts of baselines/ppo_lagrangian.py and what is learned from them, the first one (it compiles) left out ->
    seconds of an agent step of all environments, seconds if no process waited, median seconds of a whole rollout.

    Processes are forked, as a run's are: call it before JAX is used."""
    args = ppo_lagrangian.Args(env_id=env_id)
    step, alone = measure_env_step(args)
    ask, *sizes = ppo_lagrangian.start_envs(args, 0, args.num_envs)
    seconds = []
    try:
        run = ppo_lagrangian.begin(args, ask, sizes)
        for cycle in range(1, count + 2):
            began = time.perf_counter()
            while run.step < cycle * args.train_every:
                run, _ = ppo_lagrangian.collect(args, ask, run)
            agent, metrics = ppo_lagrangian.update_many(args, run.agent, run.buffer, 1)
            run, _ = run._replace(agent=agent), jax.device_get(metrics)
            seconds.append(time.perf_counter() - began)
    finally:
        ask("close")
    return step, alone, statistics.median(seconds[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Table and picture
# ----------------------------------------------------------------------------------------------------------------------
GROWTH = {"plan": {"num_envs": (5, 10, 20), "num_samples": (256, 512, 1024), "horizon": (2, 3, 6), "num_q": (3, 5, 10)},
          "update": {"batch_size": (128, 256, 512), "horizon": (2, 3, 6), "num_q": (3, 5, 10)}}
WORDS = {"num_envs": "environments", "num_samples": "samples", "horizon": "steps deep", "num_q": "heads",
         "batch_size": "sequences in a batch"}


def grown(args, part):
    """(name, value, flags) of every point of GROWTH, scaled to the sizes at hand; both ensembles grow together."""
    for name, values in GROWTH[part].items():
        for value in values:
            value = round(value * getattr(args, name) / values[1])
            heads = min(value, args.lagrangian_heads)  # the constraint reads no more than there are
            both = {"num_qc": value, "lagrangian_heads": heads} if name == "num_q" else {}
            yield name, value, dataclasses.replace(args, **{name: value}, **both)


def measure(options):
    """Rows, one at a time as they are measured; first what has to come before JAX is used."""
    if "env_step" in options.parts:
        args = spowl.Args(env_id=options.env_id, **SIZES[options.sizes[0]])
        for env_id in dict.fromkeys((options.env_id, "SafetyAntGoal1-v0")):
            ours, alone = measure_env_step(dataclasses.replace(args, env_id=env_id))
            suffix = "" if env_id == options.env_id else f" {env_id}"
            yield row(options.sizes[0], "env_step" + suffix, ours, share=alone / ours)
    if "on_policy" in options.parts:
        step, alone, rollout = measure_on_policy(options.env_id)
        steps = ppo_lagrangian.Args().train_every // ppo_lagrangian.Args().num_envs
        yield row("ppo", "env_step", step, share=alone / step)
        yield row("ppo", "cycle", rollout, share=steps * alone / rollout)
    ceiling, rows = measure_ceiling(options.repeats)
    yield from rows
    for size in options.sizes:
        args = spowl.Args(env_id=options.env_id, **SIZES[size])
        ask, *sizes = spowl.start_envs(args, 0, 1, start_method="spawn")
        ask("close")
        share = lambda flops, seconds: flops / seconds / ceiling
        if "update" in options.parts:
            flops = update_flops(args, *sizes)
            (seconds, *about), (add_seconds, *about_add) = measure_update(args, *sizes, options.repeats)
            yield row(size, "update", seconds, flops, share(flops, seconds), *about)
            yield row(size, "buffer_add", add_seconds, None, None, *about_add)
        if "plan" in options.parts:
            flops = plan_flops(args, *sizes)
            seconds, *about = measure_plan(args, *sizes, options.repeats)
            yield row(size, "plan", seconds, flops, share(flops, seconds), *about)
        if "cycle" in options.parts:
            acting, stepping, updating = measure_cycle(args, options.cycle_share)
            seconds, plans = acting + stepping + updating, args.train_every / args.action_repeat / args.num_envs
            flops = spowl.updates_due(args, args.train_every) * update_flops(args, *sizes)
            flops += plans * plan_flops(args, *sizes)
            yield row(size, "cycle", seconds, flops, share(flops, seconds))
            for name, value in (("act", acting), ("environments", stepping), ("updates", updating)):
                yield row(size, f"cycle: {name}", value)
        if "growth" in options.parts and size == options.sizes[0]:
            for part, run, count in (("update", measure_update, update_flops), ("plan", measure_plan, plan_flops)):
                for name, value, larger in grown(args, part):
                    measured = run(larger, *sizes, 3)
                    seconds, _, peak = measured[0] if part == "update" else measured
                    flops = count(larger, *sizes)
                    yield row(size, f"{part} {name}={value}", seconds, flops, share(flops, seconds), peak_bytes=peak)


def show(row):
    """One line of the table."""
    number = lambda value, form: "" if value is None else format(value, form)
    gflop = row["flops"] and row["flops"] / 1e9
    peak = row["peak_bytes"] and row["peak_bytes"] / 2**20
    return (f"{row['size']:8} {row['part']:26} {number(row['seconds'], '10.4g'):>10} s "
            f"{number(gflop, '10.4g'):>10} GFLOP "
            f"{number(row['share_of_ceiling'], '6.1%'):>6} {number(row['compile_seconds'], '6.1f'):>6} s "
            f"{number(peak, '8.0f'):>8} MiB")


def part_name(row):
    """A measured part in words."""
    part = row["part"].replace("cycle", "all in turn").replace("env_step", "simulators")
    part = part.replace("Safety", "on ").replace("-v0", "")
    return f"{part}, {row['size']} preset" if "simulators" in part else f"{part}, {row['size']} sizes"


@plt.rc_context(STYLE)
def draw(rows, path):
    """Shares of the ceiling above; below, how time grows, both axes relative to the size's own point."""
    figure, axes = plt.subplot_mosaic([["bars", "bars"], list(GROWTH)], figsize=(WIDTH, 5.6), layout="constrained")
    top = axes.pop("bars")
    parts = [row for row in rows if row["share_of_ceiling"] and "=" not in row["part"] and row["part"] != "ceiling"]
    bars = top.barh(list(map(part_name, parts)), [100 * row["share_of_ceiling"] for row in parts])
    top.bar_label(bars, fmt="{:.0f}%", padding=2, fontsize=7.5)
    top.set(title="share of what the machine can do, %", xlim=(0, 100))
    top.grid(axis="x", alpha=0.3)
    top.invert_yaxis()
    for part, axis in axes.items():
        for size in dict.fromkeys(row["size"] for row in rows):
            curves = defaultdict(list)
            for row in rows:
                kind, _, setting = row["part"].partition(" ")
                if row["size"] == size and kind == part and "=" in setting:
                    curves[setting.split("=")[0]].append((int(setting.split("=")[1]), row["seconds"]))
            for color, (marker, (name, points)) in enumerate(zip("osD^vP", curves.items())):
                base, seconds = points[1]
                axis.plot([x / base for x, _ in points], [y / seconds for _, y in points], color=f"C{color}",
                          marker=marker, markersize=4.5, linewidth=1, label=f"{WORDS.get(name, name)} ({base})")
        axis.axline((0, 0), slope=1, color="black", linewidth=0.6)
        axis.set(title=f"time of {'an' if part[0] in 'aeiou' else 'a'} {part}", xlim=(0, 2.1), ylim=(0, 2.5),
                 xlabel="size, in sizes of the run", ylabel="time, in times of the run")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left")
    save(figure, path, "One run on one machine. Updates and plans: medians of several measurements; "
         "simulators and all in turn: one measurement. Networks are compared with a large matrix product, simulators "
         "with simulators that do nothing else. Below, one size is changed at a time (in brackets: what it is in the "
         "run); on the black line time grows as the size does.")


def read_rows(path):
    """The rows of a csv that this program wrote."""
    try:
        with open(path, newline="") as file:
            return [{name: row[name] if name in ("size", "part") else float(row[name]) if row[name] else None
                     for name in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--csv {path} is not a table that this program wrote: {error}")


def main(options):
    if options.repeats < 1 or not 0 < options.cycle_share <= 1:
        raise SystemExit("--repeats must be at least 1, and --cycle-share lie in (0, 1]")
    for path in filter(None, (options.json, options.csv, options.picture)):
        if not path.parent.is_dir():
            raise SystemExit(f"{path}: there is no directory {path.parent}")
    rows = []
    for row in measure(options):
        rows.append(row)
        print(show(row), flush=True)
    print(jax.devices()[0], f"{os.cpu_count()} CPU cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
