"""What a trained agent pays for: its evaluation's costs by what charged them (hazards, vases, gremlins, buttons).

    python probe/what_costs.py RUN [RUN ...] --csv benchmark/results/what_costs.csv

The episodes are those of --evaluate. Safety-Gymnasium's `info` says for each simulator step what charged how much; what
two charge in one step is counted for both, though a step costs 1 at most."""

import csv
import dataclasses
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spowl_continuous as spowl


@dataclasses.dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories of spowl_continuous.py, whose newest checkpoints are taken"""
    csv: Path
    """file to write, a row for each source of an episode"""
    episodes: int = 50
    """episodes to play"""


class Counted(gymnasium.Wrapper):
    """`paid`: what each source charged, in every episode that could begin."""

    def __init__(self, env):
        super().__init__(env)
        self.paid = []

    def reset(self, *, seed=None, options=None):
        answer = self.env.reset(seed=seed, options=options)
        self.paid.append(Counter())
        return answer

    def step(self, action):
        answer = self.env.step(action)
        self.paid[-1].update({name.removeprefix("cost_"): float(cost) for name, cost in answer[-1].items()
                              if name.startswith("cost_") and name != "cost_sum"})
        return answer


def ask_here(args, envs, begun):
    """`start_envs`'s `ask` for environments of this process: what they counted can be read. `begun` gets a list at each
    reset: the place in every environment's `paid` of the episode that begins."""
    playing = []

    def ask(command, values):
        if command == "reset":
            begun.append([len(env.paid) for env in envs])
            playing[:] = [spowl.play(args, env, 1, index, episode)
                          for index, (env, (episode, _)) in enumerate(zip(envs, values))]
            obs, episodes, *_ = zip(*map(next, playing))
            return np.stack(obs), np.array(episodes)
        obs, episodes, rows, steps = zip(*(each.send(action) for each, action in zip(playing, values)))
        rows = spowl.Transition(*(np.array(x, np.float32) for x in zip(*rows)))
        return np.stack(obs), np.array(episodes), rows, np.array(steps)

    return ask


def paid_for(args, agent, envs):
    """-> the episodes of `spowl.evaluate`, and for each what each source charged."""
    envs, begun = [Counted(env) for env in envs], []
    episodes = spowl.evaluate(dataclasses.replace(args, capture_video=False), agent, ask_here(args, envs, begun))[0]
    places = (divmod(each["environment"], len(envs)) for each in episodes)
    return episodes, [envs[index].paid[begun[nth][index]] for nth, index in places]


def main(options):
    if not options.runs:
        raise SystemExit("name a run directory or more")
    if options.episodes < 1:
        raise SystemExit("--episodes must be at least 1")
    if not options.csv.parent.is_dir():
        raise SystemExit(f"--csv {options.csv}: {options.csv.parent} is not a directory")
    rows = []
    for run in options.runs:
        args = spowl.parse_args(["--evaluate", str(run), "--eval-episodes", str(options.episodes)])
        envs = [spowl.make_env(args, False) for _ in range(min(args.num_envs, options.episodes))]
        obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
        template = {"agent": jax.eval_shape(partial(spowl.init_agent, args, obs_dim=obs_dim, action_dim=action_dim),
                                            jax.random.key(0))}
        episodes, paid = paid_for(args, spowl.load_checkpoint(run, template)[0]["agent"], envs)
        if not (named := sorted(set().union(*paid))):
            raise SystemExit(f"{run}: the info of {args.env_id} names no source of cost, such as cost_hazards")
        for each, sources in zip(episodes, paid):
            rows += [[run.name, args.env_id, each["environment"], f"{each['cost']:g}", source, f"{sources[source]:g}"]
                     for source in named]
        print(f"{run.name}: cost {np.mean([each['cost'] for each in episodes]):.2f} an episode;",
              ", ".join(f"{source} {np.mean([sources[source] for sources in paid]):.2f}" for source in named))
    with open(options.csv, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["run", "env_id", "environment", "cost", "source", "charged"], *rows])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
