"""Keep of a run what pages speak of: the episodes of its evaluations and its logged numbers, as two small csv files.

    python benchmark/keep.py runs/RUN [runs/RUN ...] --to benchmark/results/million

RUN's name without its time is theirs: NAME_episodes.csv has a row per evaluation episode, those of --evaluate last and
marked "final"; NAME_numbers.csv a row per evaluation with every tag of TensorBoard at that step and the means of the
100 training episodes that ended last (train/cost, train/return), to four digits. NAME_args.json is the run's args.json:
flags, versions, git commit."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from plot import scalars_by_step

COLUMNS = ("split", "step", "environment", "return", "cost", "length")


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories"""
    to: Path
    """directory of the csv files"""


def episodes(run):
    """Rows of the evaluations' episodes, oldest first; those of --evaluate, if it was run, as "final"."""
    def rows(name, split):
        if not (run / name).exists():
            return []
        with open(run / name, newline="") as file:
            return [[split, row["step"], row["environment"], f"{float(row['return']):.3f}", f"{float(row['cost']):g}",
                     row["length"]] for row in csv.DictReader(file) if row["split"] == "eval"]

    return rows("episodes.csv", "eval") + rows("evaluation.csv", "final")


def training(run, steps, count=100):
    """Mean return and cost of the `count` training episodes that ended last, by tag and step."""
    with open(run / "episodes.csv", newline="") as file:
        played = [row for row in csv.DictReader(file) if row["split"] == "train"]
    found = {"train/cost": {}, "train/return": {}}
    for step in steps:
        if latest := [row for row in played if int(row["step"]) <= step][-count:]:
            for tag, values in found.items():
                values[step] = sum(float(row[tag[6:]]) for row in latest) / len(latest)
    return found


def numbers(run, steps):
    """Every tag's value at those steps, "" where it has none: the header and a row for each step."""
    logged = scalars_by_step(run) | training(run, steps)
    tags = sorted(logged)
    text = lambda tag, step: f"{logged[tag][step]:.4g}" if step in logged[tag] else ""
    return [["step", *tags], *([step, *(text(tag, step) for tag in tags)] for step in steps)]


def main(options):
    """SystemExit, with what was there before it left alone, for no run, no evaluation, or another run of that name."""
    if options.to.exists() and not options.to.is_dir():
        raise SystemExit(f"--to {options.to} is not a directory")
    options.to.mkdir(parents=True, exist_ok=True)
    kept = {}
    for run in options.runs:
        try:
            info, played = json.loads((run / "args.json").read_text()), episodes(run)
            name = "{env_id}__{exp_name}__{seed}".format(**info["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{run} is not a run directory: {error}")
        if not any(row[0] == "eval" for row in played):
            raise SystemExit(f"{run} has no evaluation yet")
        if odd := {row[1] for row in played if row[0] == "final"} - {row[1] for row in played if row[0] == "eval"}:
            raise SystemExit(f"{run} was judged at step {odd.pop()}, at which training evaluated nothing: train it to "
                             "an evaluation, or take away its evaluation.csv")
        there = options.to / f"{name}_args.json"
        if name in kept or there.exists() and json.loads(there.read_text()) != info:
            raise SystemExit(f"{run}: another run is {name} in {options.to}: name another directory with --to")
        kept[name] = run, played
    for name, (run, played) in kept.items():
        steps = sorted({int(row[1]) for row in played if row[0] == "eval"})
        for what, rows in {"episodes": [COLUMNS, *played], "numbers": numbers(run, steps)}.items():
            with open(options.to / f"{name}_{what}.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        shutil.copy(run / "args.json", options.to / f"{name}_args.json")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
