"""A grid of runs: tasks x settings x seeds at a scale, read from a YAML file for sweep.py, which makes the runs, and
plot.py, which draws them.

    title: text above the picture
    panels: [return, cost, cost_rate, balance]                          # left out: these four
    tasks: [SafetyPointGoal1-v0]
    scales:
      two_cores: {seeds: [1, 2, 3], flags: {preset: laptop}}            # its own tasks, if they differ
    settings:
      local_1: {label: local 1, script: spowl_fixed_threshold.py, flags: {plan-cost-score: local, plan-threshold: 1},
                scales: [two_cores], tasks: [SafetyPointGoal1-v0]}      # left out: every scale, every task"""

from typing import NamedTuple

import yaml

PANELS = ("return", "cost", "cost_rate", "balance", "no_improvement", "total_cost")


class Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice, in line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


class Grid(NamedTuple):
    """A grid at one scale."""

    title: str
    panels: tuple
    tasks: tuple
    seeds: tuple
    flags: dict  # of all runs
    settings: dict  # name -> {label, script, flags}


def settings_on(grid, task):
    """The settings that are run on a task: those that name it, or no tasks at all."""
    return {name: entry for name, entry in grid.settings.items() if task in entry.get("tasks", (task,))}


def require(holds, message):
    if not holds:
        raise SystemExit(message)


def check_mapping(where, given, required, optional=()):
    """SystemExit unless `given` is a mapping with the required names and no unknown one."""
    require(isinstance(given, dict), f"{where} must be a mapping, found {given!r}")
    for name in required:
        require(name in given, f"{where} lacks {name!r}")
    for name in given:
        require(name in (*required, *optional), f"{where} has {name!r}; known are {', '.join((*required, *optional))}")


def check_list(where, given, kind, allowed=None):
    """SystemExit unless `given` is a list, not empty, without a repetition, of that type, of what is allowed."""
    require(isinstance(given, list) and given and all(type(value) is kind for value in given),
            f"{where} must be a list of {kind.__name__}, found {given!r}")
    require(len(set(given)) == len(given), f"{where} has something twice: {given!r}")
    for value in given:
        require(allowed is None or value in allowed, f"{where} has {value!r}; known are {', '.join(allowed or ())}")


NAMED_BY_THE_GRID = ("env-id", "exp-name", "seed", "runs-dir", "resume", "evaluate")


def read_flags(where, entry):
    """Flags of a scale or setting as the command line spells them; SystemExit for those that say which run it is."""
    given = entry.get("flags", {})
    require(isinstance(given, dict), f"{where}: flags must be a mapping, found {given!r}")
    flags = {str(name).replace("_", "-"): value for name, value in given.items()}
    for name in NAMED_BY_THE_GRID:
        require(name not in flags, f"{where}: flags has {name!r}, which follows from tasks, settings and seeds")
    return flags


def read_grid(path, scale):
    """The grid in a file at one of its scales; SystemExit with one line for what is wrong in it."""
    try:
        grid = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} is not a grid: {' '.join(str(error).split())}")
    check_mapping(path, grid, ("title", "tasks", "scales", "settings"), ("panels",))
    check_list(f"{path}: tasks", grid["tasks"], str)
    check_list(f"{path}: panels", grid.setdefault("panels", list(PANELS[:4])), str, PANELS)
    scales, settings = grid["scales"], grid["settings"]
    for where, entries in (("scales", scales), ("settings", settings)):
        require(isinstance(entries, dict) and entries and all(isinstance(name, str) for name in entries),
                f"{path}: {where} must be a mapping with names, found {entries!r}")
    for name, entry in scales.items():
        check_mapping(f"{path}: scale {name}", entry, ("seeds",), ("flags", "tasks"))
        entry["flags"] = read_flags(f"{path}: scale {name}", entry)
        check_list(f"{path}: scale {name}: seeds", entry["seeds"], int)
        check_list(f"{path}: scale {name}: tasks", entry.setdefault("tasks", grid["tasks"]), str)
    for name, entry in settings.items():
        check_mapping(f"{path}: setting {name}", entry, ("label", "script"), ("flags", "scales", "tasks"))
        entry["flags"] = read_flags(f"{path}: setting {name}", entry)
        require(isinstance(entry["script"], str), f"{path}: setting {name}: script must be a path")
        check_list(f"{path}: setting {name}: scales", entry.setdefault("scales", list(scales)), str, list(scales))
        check_list(f"{path}: setting {name}: tasks", entry.get("tasks", grid["tasks"]), str, grid["tasks"])
    require(scale in scales, f"--scale {scale}: {path} has {', '.join(scales)}")
    chosen = scales[scale]
    settings = {name: entry | {"label": str(entry["label"])} for name, entry in settings.items()
                if scale in entry["scales"]}
    require(settings, f"--scale {scale}: no setting of {path} has it")
    return Grid(str(grid["title"]), tuple(grid["panels"]), tuple(chosen["tasks"]), tuple(chosen["seeds"]),
                chosen["flags"], settings)
