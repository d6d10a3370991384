"""Judge a trained agent by actions drawn from its policy, as in training, instead of by the policy's mean.

    python probe/drawn.py runs/RUN --to benchmark/results/rivals

For the baselines without a model, whose evaluations play the mean. The episodes are those of --evaluate. RUN_drawn.csv
gets a row for each, beside what benchmark/keep.py keeps of the run."""

import contextlib
import csv
import json
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import jax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "baselines"))
SCRIPTS = "ppo_lagrangian", "cpo", "cvpo"


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run directory, whose newest checkpoint is taken"""
    to: Path
    """directory for the csv file"""
    episodes: int = 100
    """episodes to play"""


def play_drawn(script, run, count):
    """`count` episodes of a run's newest checkpoint, as `script.evaluate` gives them, and its step."""
    args, act = script.parse_args(["--evaluate", str(run), "--eval-episodes", str(count)]), script.act
    drawn = lambda args, agent, actor, obs, is_first, explore: act(args, agent, actor, obs, is_first, True)
    with contextlib.ExitStack() as stack:
        ask, *sizes = script.start_envs(args, 1, min(args.num_envs, count))
        stack.callback(ask, "close")
        shapes = jax.eval_shape(partial(script.fresh, args, sizes), jax.random.key(0))
        trees, counters = script.load_checkpoint(run, {"agent": shapes["agent"]})
        with mock.patch.object(script, "act", drawn):
            episodes, _ = script.evaluate(args, trees["agent"], ask)
    return episodes, counters["step"]


def main(options):
    if options.episodes < 1:
        raise SystemExit("--episodes must be at least 1")
    try:
        info = json.loads((options.run / "args.json").read_text())
        script, name = info["script"], "{env_id}__{exp_name}__{seed}".format(**info["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{options.run} is not a run: {error}")
    if script not in SCRIPTS:
        raise SystemExit(f"{options.run} is of {script}.py; only {', '.join(SCRIPTS)} are judged here")
    if options.to.exists() and not options.to.is_dir():
        raise SystemExit(f"--to {options.to} is not a directory")
    options.to.mkdir(parents=True, exist_ok=True)
    kept, script = options.to / f"{name}_args.json", import_module(script)
    if kept.exists() and json.loads(kept.read_text()) != info:
        raise SystemExit(f"{options.run}: another run is {name} in {options.to}: name another directory with --to")
    episodes, step = play_drawn(script, options.run, options.episodes)
    rows = [["drawn", step, each["environment"], f"{each['return']:.3f}", f"{each['cost']:g}", each["length"]]
            for each in episodes]
    path = options.to / f"{name}_drawn.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([script.COLUMNS, *rows])
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
