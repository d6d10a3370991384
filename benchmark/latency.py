"""How long one decision takes, and what it is worth: a trained agent with other numbers of samples and other depths.

    taskset -c 0 python benchmark/latency.py benchmark/pretrained/laptop_PointGoal1 --csv latency.csv
    python benchmark/latency.py benchmark/pretrained/laptop_PointGoal1 --samples 64 128 --depths 3 6 --episodes 20
    python benchmark/latency.py RUN ... --samples 64 --depths 3 --alone --episodes 50 --repeats 0

RUN is a run directory of spowl_continuous.py; several have one table. Times are medians of deciding for one
environment, as multiples of the policy's alone in the same process; leave the machine alone meanwhile, or time nothing
(--repeats 0). The shares of the policy's sequences and of the elites among the samples stay the run's. With --episodes
each of them also plays: the same episodes for all. The last line asks who should act: policy, either or plan."""

import csv
import dataclasses
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import spowl_continuous as spowl
import spowl_plan_only as plan_only
import spowl_policy_only as policy_only
from plot import STYLE, WIDTH, save

COLUMNS = ("env_id", "seed", "acts", "samples", "depth", "times_policy", "episodes", "return", "return_std", "cost",
           "cost_std", "balance")


@dataclasses.dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories: the newest checkpoint of each decides"""
    samples: tuple[int, ...] = (32, 64, 128, 256, 512)
    """numbers of sequences scored per iteration"""
    depths: tuple[int, ...] = (3, 6, 10)
    """agent steps that a plan looks ahead"""
    alone: bool = False
    """also with each of them its plan alone, executed always"""
    episodes: int = 0
    """evaluation episodes that each plays"""
    repeats: int = 50
    """decisions timed, 0 for none"""
    csv: Path | None = None
    """file for the table"""


def planner_of(args, samples, depth):
    """The flags with another number of samples, the policy's sequences and elites in proportion, and another depth;
    SystemExit if they cannot be."""
    share = lambda count: max(1, round(count * samples / args.num_samples))
    args = dataclasses.replace(args, num_samples=samples, num_pi_trajs=share(args.num_pi_trajs),
                               num_elites=share(args.num_elites), plan_horizon=depth)
    if found := spowl.problems(args):
        raise SystemExit(f"--samples {samples}, --depths {depth}: {found[0]}")
    return args


def of_script(script, args):
    """The same flags as that script has them."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in vars(args).items() if name in names})


def median_seconds(script, args, agent, obs, action_dim, repeats):
    """Median time of deciding for one environment with observation (O,), after two decisions that do not count."""
    args = dataclasses.replace(args, num_envs=1)
    actor, seconds = script.init_actor(args, jax.random.key(0), action_dim), []
    for decision in range(repeats + 2):
        began = time.perf_counter()
        action, actor = script.act(args, agent, actor, obs[None], np.array([decision == 0]), False)
        np.asarray(action)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def played(script, args, agent, ask):
    """How many episodes, mean and standard deviation of return and of cost, and the balance."""
    found, _ = script.evaluate(args, agent, ask)
    values = {name: [episode[name] for episode in found] for name in ("return", "cost", "balance")}
    return [len(found), *(round(float(function(values[name])), 4) for name in ("return", "cost")
                        for function in (np.mean, np.std)), round(float(np.mean(values["balance"])), 4)]


@plt.rc_context(STYLE)
def draw(path, picture):
    """Time of a decision against samples, a line per depth, from the rows of a csv that played no episodes; then one
    from those that did: what the same agent returns and costs with other planners."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["acts"] == "plan or policy" and row["episodes"] == "0"]
    who = [row for row in rows if row["episodes"] != "0"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    for depth, marker in zip(sorted({int(row["depth"]) for row in timed}), itertools.cycle("osD^")):
        points = [(int(row["samples"]), float(row["times_policy"])) for row in timed if int(row["depth"]) == depth]
        left.plot(*zip(*points), marker=marker, label=f"{depth} agent steps deep")
    left.axhline(1, color="0.6", linewidth=1, label="the policy alone")
    samples, ticks = sorted({int(row["samples"]) for row in timed}), [1, 3, 10, 30, 100, 300, 1000]
    left.set(xscale="log", yscale="log", xlabel="sequences scored per iteration", ylim=(0.7, 1500),
             title="time of a decision, in decisions of the policy")
    left.set_xticks(samples, map(str, samples))
    left.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    left.minorticks_off()
    left.legend(loc="center right")
    names = ["the policy alone" if row["acts"] == "policy" else f"{row['samples']} samples, {row['depth']} steps"
             for row in who]
    places = np.arange(len(who))
    for offset, name, color in ((-0.2, "return", "tab:blue"), (0.2, "cost", "tab:orange")):
        bars = right.barh(places + offset, [float(row[name]) for row in who], 0.38, color=color, label=name)
        right.bar_label(bars, fmt="{:.1f}", padding=2, fontsize=7)
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set(xlim=(0, 36), title=f"return and cost, {who[0]['episodes']} evaluation episodes" if who else "")
    right.legend(loc="upper right")
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="both" if axis is left else "x")
    save(figure, picture, "One agent, one environment. Left: a mark is the median of 50 decisions on one core; both "
         "axes are logarithmic. Right: a bar is the mean over the same episodes for all; chance alone moves the return "
         "by about 1 and the cost by about 2.")


def candidates_of(options, run):
    """The flags of a run, and (who acts, samples, depth, script, flags) of each that decides; SystemExit where it is no
    run directory or its planner cannot be so."""
    args = spowl.parse_args(["--evaluate", str(run)])
    args = dataclasses.replace(args, num_envs=min(args.num_envs, max(options.episodes, 1)),  # as many as play
                               eval_episodes=max(options.episodes, 1))
    candidates = [("policy", "", "", policy_only, args)]
    for depth, samples in itertools.product(options.depths, options.samples):
        chosen = planner_of(args, samples, depth)
        candidates += [("plan or policy", samples, depth, spowl, chosen)]
        candidates += [("plan", samples, depth, plan_only, chosen)] * options.alone
    return args, [(*names, script, of_script(script, chosen)) for *names, script, chosen in candidates]


def compared(options, run, args, candidates, ask, *sizes):
    """The rows of one run, printed as they come."""
    shapes = jax.eval_shape(lambda: spowl.init_agent(args, jax.random.key(0), *sizes))
    agent = spowl.load_checkpoint(run, {"agent": shapes})[0]["agent"]
    obs, rows, alone = ask("reset", [(0, [])] * args.num_envs)[0][0], [], math.nan
    for acts, samples, depth, script, chosen in candidates:
        times = ""
        if options.repeats:
            seconds = median_seconds(script, chosen, agent, obs, sizes[1], options.repeats)
            alone = seconds if script is policy_only else alone  # the policy comes first
            times = round(seconds / alone, 1)
        values = played(script, chosen, agent, ask) if options.episodes else [0, *[""] * 5]
        rows.append([args.env_id, args.seed, acts, samples, depth, times, *values])
        print(*(f"{name} {value}" for name, value in zip(COLUMNS, rows[-1])), sep=", ", flush=True)
    ask("close")
    return rows


def main(options):
    """SystemExit, before anything is timed or played, for options that cannot be."""
    if not options.runs:
        raise SystemExit("name a run directory, or several")
    if options.repeats < 0 or options.episodes < 0 or options.repeats == options.episodes == 0:
        raise SystemExit("--repeats and --episodes must be at least 0, and not both 0")
    if options.csv and (options.csv.exists() or not options.csv.parent.is_dir()):
        raise SystemExit(f"--csv {options.csv}: name a new file in a directory that is there")
    chosen = [(run, *candidates_of(options, run)) for run in options.runs]
    started = [spowl.start_envs(args, 1, args.num_envs) for _, args, _ in chosen]  # all before JAX has threads
    rows = [row for each, envs in zip(chosen, started) for row in compared(options, *each, *envs)]
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    if not jax.config.jax_compilation_cache_dir:  # the variable JAX_COMPILATION_CACHE_DIR names another place
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/spowl"))
    main(tyro.cli(Options, description=__doc__))
