"""Runs that benchmark/keep.py kept, read again, and as rows of benchmark/plot.py."""

import csv
import json
import math
from typing import NamedTuple

import numpy as np


class Kept(NamedTuple):
    """A run."""

    args: dict  # its flags
    evaluations: dict  # {step: episodes}, oldest first; what --evaluate played stands for the one at its step
    last: int  # step of what --evaluate played, or of the last evaluation
    numbers: dict  # {step: {tag: text, "" where nothing was logged}}
    drawn: list  # episodes that probe/drawn.py played, none if it was not asked


def table(path):
    """A csv file's rows by column."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_kept(folder):
    """Every run kept in a folder, in the order of its files' names. SystemExit where what was judged has no numbers, or
    where drawn episodes are of another step than the last."""
    found = []
    for path in sorted(folder.glob("*_args.json")):
        stem = path.name.removesuffix("_args.json")
        episodes = table(folder / f"{stem}_episodes.csv")
        at = {row["step"]: row["split"] for row in episodes}  # "final" comes last
        evaluations = {int(step): [row for row in episodes if (row["split"], row["step"]) == (split, step)]
                       for step, split in sorted(at.items(), key=lambda each: int(each[0]))}
        numbers = {int(row["step"]): row for row in table(folder / f"{stem}_numbers.csv")}
        if lacking := sorted(set(evaluations) - set(numbers)):
            raise SystemExit(f"{stem} was judged at step {lacking[0]}, at which training evaluated nothing")
        beside, last = folder / f"{stem}_drawn.csv", int(episodes[-1]["step"])
        drawn = table(beside) if beside.exists() else []
        if drawn and int(drawn[0]["step"]) != last:
            raise SystemExit(f"{beside} is of step {drawn[0]['step']}, not {last}: make it again with probe/drawn.py")
        found.append(Kept(json.loads(path.read_text())["args"], evaluations, last, numbers, drawn))
    return found


def played(run, step, name):
    """A column of an evaluation's episodes."""
    return np.array([float(row[name]) for row in run.evaluations[step]])


def rows_of(folder):
    """A row per evaluation of every kept run, with the columns of benchmark/plot.py; hours at the last one alone."""
    rows = []
    for run in read_kept(folder):
        for step in run.evaluations:
            logged = lambda tag: float(run.numbers[step].get(tag) or "nan")
            returns, costs = played(run, step, "return"), played(run, step, "cost")
            rows.append({
                **{name: run.args[name] for name in ("exp_name", "env_id", "seed")}, "step": step,
                "episodes": len(costs), "return": returns.mean(), "return_std": returns.std(), "cost": costs.mean(),
                "cost_std": costs.std(), "cost_rate": logged("charts/cost_rate"), "balance": logged("eval/balance"),
                "no_improvement": logged("planner/no_improvement"),
                "hours": step / logged("charts/SPS") / 3600 if step == max(run.evaluations) else math.nan})
    return rows
