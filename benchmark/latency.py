"""How long one decision takes, and what it is worth: a trained agent with other numbers of samples and other depths.

    taskset -c 0 python benchmark/latency.py benchmark/pretrained/laptop_PointGoal1 --csv latency.csv
    python benchmark/latency.py benchmark/pretrained/laptop_PointGoal1 --samples 64 128 --depths 3 6 --episodes 20
    python benchmark/latency.py RUN --samples 64 --depths 3 --alone --episodes 50   # who acts: policy, either, plan

RUN is a run directory of spowl_continuous.py. Times are medians of deciding for one environment, as multiples of the
policy's alone in the same process; leave the machine alone meanwhile. The shares of the policy's sequences and of the
elites among the samples stay the run's. With --episodes each of them also plays: the same episodes for all."""

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
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spowl_continuous as spowl
import spowl_plan_only as plan_only
import spowl_policy_only as policy_only

COLUMNS = ("acts", "samples", "depth", "times_policy", "episodes", "return", "return_std", "cost", "cost_std",
           "balance")


@dataclasses.dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run directory whose newest checkpoint decides"""
    samples: tuple[int, ...] = (32, 64, 128, 256, 512)
    """numbers of sequences scored per iteration"""
    depths: tuple[int, ...] = (3, 6, 10)
    """agent steps that a plan looks ahead"""
    alone: bool = False
    """also with each of them its plan alone, executed always"""
    episodes: int = 0
    """evaluation episodes that each plays"""
    repeats: int = 50
    """decisions timed"""
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


def main(options):
    args = spowl.parse_args(["--evaluate", str(options.run)])
    args = dataclasses.replace(args, num_envs=min(args.num_envs, max(options.episodes, 1)),  # as many as play
                               eval_episodes=max(options.episodes, 1))
    ask, *sizes = spowl.start_envs(args, 1, args.num_envs)
    shapes = jax.eval_shape(lambda: spowl.init_agent(args, jax.random.key(0), *sizes))
    agent = spowl.load_checkpoint(options.run, {"agent": shapes})[0]["agent"]
    obs, rows, alone = ask("reset", [(0, [])] * args.num_envs)[0][0], [], math.nan
    candidates = [("policy", "", "", policy_only, args)]
    for depth, samples in itertools.product(options.depths, options.samples):
        chosen = planner_of(args, samples, depth)
        candidates += [("plan or policy", samples, depth, spowl, chosen)]
        candidates += [("plan", samples, depth, plan_only, chosen)] * options.alone
    for acts, samples, depth, script, chosen in candidates:
        chosen = of_script(script, chosen)
        seconds = median_seconds(script, chosen, agent, obs, sizes[1], options.repeats)
        alone = seconds if script is policy_only else alone  # the policy comes first
        values = played(script, chosen, agent, ask) if options.episodes else [0, *[""] * 5]
        rows.append([acts, samples, depth, round(seconds / alone, 1), *values])
        print(*(f"{name} {value}" for name, value in zip(COLUMNS, rows[-1])), sep=", ", flush=True)
    ask("close")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/spowl"))
    main(tyro.cli(Options, description=__doc__))
