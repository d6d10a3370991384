"""Many runs on Ray: every task, setting and seed of a grid, each a process of its own script, gone on with until done.

    python benchmark/sweep.py benchmark/grids/fig6.yaml
    python benchmark/sweep.py benchmark/grids/fig6.yaml --scale paper --address auto --cpus 8 --gpus 0.5

Without an address Ray starts on this machine and ends with the sweep. On a cluster every node needs this repository,
its packages and --runs-dir under the same paths. A run is known by its task, setting and seed, as its directory
RUNS_DIR/{env_id}__{setting}__{seed}__{time} says: what is finished there is not repeated, what is not is resumed from
its newest checkpoint, so Ctrl-C (every run then writes a checkpoint) and the same command again go on. Where a process
fails or its node dies, the run is resumed wherever there is room. RUNS_DIR/sweep/{env_id}__{setting}__{seed}.log has
what the processes print; whoever writes it holds its lock, so a run never has two processes, also where a node is only
cut off."""

import ctypes
import dataclasses
import fcntl
import glob
import importlib.util
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from grid import read_grid, settings_on
from rich.console import Console
from rich.live import Live
from rich.table import Table

try:
    import ray
except ImportError:  # --dry-run does without
    ray = None

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    grid: Annotated[Path, tyro.conf.Positional]
    """YAML file of tasks, settings, scales"""
    scale: str = "two_cores"
    """which of the grid's scales"""
    runs_dir: Path | None = None
    """directory of the runs (default: runs/SCALE), seen by every node"""
    only: tuple[str, ...] = ()
    """settings to run (default: all)"""
    address: str | None = None
    """of a Ray cluster, or auto for the one that is running here (default: an instance of its own)"""
    cpus: float = 1.0
    """cores per run"""
    gpus: float = 0.0
    """GPUs per run; with a fraction several share one"""
    attempts: int = 3
    """a run is given up after so many attempts in a row that left no new checkpoint"""
    dry_run: bool = False
    """print the runs, where they are and their commands, and stop"""


class Job(NamedTuple):
    """One run of the grid."""

    name: str  # {env_id}__{setting}__{seed}
    script: str  # under ROOT
    flags: tuple  # words of its command line
    steps: int  # at which it is finished


# ----------------------------------------------------------------------------------------------------------------------
# The grid
# ----------------------------------------------------------------------------------------------------------------------
def words(flags):
    """Flags by name, as YAML has them, as words of a command line."""
    made = []
    for name, value in flags.items():
        made += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return made


def load_script(script):
    """A script of this repository as a module, under a name that does not replace one imported elsewhere."""
    if not (ROOT / script).is_file():
        raise SystemExit(f"script {script} does not exist in {ROOT}")
    spec = importlib.util.spec_from_file_location(f"script {script}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def jobs_of(grid, runs_dir):
    """Every run of a grid, the first seed's first; SystemExit with a line for each flag that its script refuses."""
    modules = {script: load_script(script) for script in {entry["script"] for entry in grid.settings.values()}}
    known = next(iter(modules.values())).import_safety_gymnasium().utils.registration.safe_registry
    if unknown := [task for task in grid.tasks if task not in known]:
        raise SystemExit(f"{', '.join(unknown)}: not a task of Safety-Gymnasium")
    jobs, mistakes, parsed = [], [], {}
    runs = [(seed, task, setting, entry) for seed in grid.seeds for task in grid.tasks
            for setting, entry in settings_on(grid, task).items()]
    for seed, task, setting, entry in runs:
        flags = words({"env-id": task, "exp-name": setting, "seed": seed, "runs-dir": runs_dir}
                      | grid.flags | entry["flags"])
        module, boxed = modules[entry["script"]], io.StringIO()
        try:
            with redirect_stderr(boxed):
                if setting not in parsed:  # once: reading a command line takes a tenth of a second
                    parsed[setting] = module.parse_args(flags)
        except SystemExit as stop:
            said = stop.code if isinstance(stop.code, str) else boxed.getvalue().splitlines()[1].strip("│ ")  # tyro's
            mistakes += [f"setting {setting}: {line}" for line in said.splitlines()]
            continue
        args = dataclasses.replace(parsed[setting], env_id=task, seed=seed)
        mistakes += [f"setting {setting}: {line}" for line in module.problems(args)]
        jobs.append(Job(f"{task}__{setting}__{seed}", entry["script"], tuple(flags), args.total_timesteps))
        mistakes += differences(jobs[-1], runs_dir, module, args)
    if mistakes:
        raise SystemExit("\n".join(dict.fromkeys(mistakes)))
    return jobs


def differences(job, runs_dir, module, args):
    """What speaks against taking the run that is there for this job, whose flags are to be args."""
    _, run_dir = where(job, runs_dir)
    if run_dir is None:
        return []
    try:
        info = json.loads((run_dir / "args.json").read_text())
        there = {"script": info["script"]} | info["args"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{run_dir} is not a run directory: {error}; move it elsewhere"]
    wanted = {"script": Path(job.script).stem} | json.loads(json.dumps(dataclasses.asdict(args)))
    free = set(module.FREE_ON_RESUME) - {"total_timesteps"}  # it paces the multiplier
    changed = [f"{name} {there.get(name)}, not {value}" for name, value in wanted.items()
               if name not in free and there.get(name) != value]
    return [f"{run_dir} has {'; '.join(changed)}: move it elsewhere, or take another --runs-dir"] if changed else []


def run_dirs(job, runs_dir):
    """Directories of a job, the newest last; a copy by another name is none."""
    found = runs_dir.glob(f"{glob.escape(job.name)}__*")
    return sorted(path for path in found if path.name[len(job.name) + 2:].isdigit())


def newest_checkpoint(run_dir):
    """The path of a run's newest checkpoint, or None."""
    step = lambda path: path.stem.removeprefix("checkpoint_")
    found = [path for path in run_dir.glob("checkpoint_*.npz") if step(path).isdigit()]
    return max(found, key=lambda path: int(step(path)), default=None)


def where(job, runs_dir):
    """(step up to which the newest checkpoint is complete, run directory) of a job; (0, None) before its first.

    SystemExit where there are two."""
    found = [path for path in run_dirs(job, runs_dir) if newest_checkpoint(path)]
    if len(found) > 1:
        raise SystemExit(f"{found[0]} and {found[1]} are the same run: move one of them elsewhere")
    if not found:
        return 0, None
    newest = newest_checkpoint(found[0])
    try:
        with np.load(newest, allow_pickle=False) as file:
            return int(json.loads(str(file["counters"]))["completed"]), found[0]
    except Exception:  # its script says what is wrong with it
        return 0, found[0]


# ----------------------------------------------------------------------------------------------------------------------
# On a node
# ----------------------------------------------------------------------------------------------------------------------
def die_with_parent():
    """In the child: SIGTERM, at which it writes a checkpoint and stops, when the Ray worker that waits for it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def environment(cpus, gpus):
    """The environment variables of a run that has these."""
    variables = dict(os.environ)
    variables["NPROC"] = str(max(1, math.floor(cpus)))  # threads of XLA on a CPU
    if gpus == 0:
        variables["JAX_PLATFORMS"] = "cpu"
    elif gpus < 1:
        variables.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 * gpus:.3f}")  # of the GPU's memory
    return variables


def attempt(job, root, runs_dir, cpus, gpus, stop):
    """Start or resume a job here and wait for its process, which is told to stop as soon as the file `stop` is there.
    Yields the node's name, then how the process ended."""
    node = f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()[:6]}"
    (runs_dir / "sweep").mkdir(parents=True, exist_ok=True)
    with open(runs_dir / "sweep" / f"{job.name}.log", "ab") as log:
        while True:  # the process inherits the lock: an earlier one may still be writing its checkpoint
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.exists():
                    return
                time.sleep(0.5)
        yield node
        step, run_dir = where(job, runs_dir)
        if step >= job.steps or stop.exists():
            yield "nothing to do"
            return
        command = [sys.executable, job.script, *job.flags, *(["--resume", str(run_dir)] if run_dir else [])]
        log.write(f"{time.strftime('%F %T')} {node}: {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, cwd=root, env=environment(cpus, gpus), stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, preexec_fn=die_with_parent)
        while process.poll() is None and not stop.exists():
            time.sleep(0.5)
        if process.poll() is None:
            process.terminate()  # it writes a checkpoint
        process.wait()
        with open(log.name, "rb") as written:
            last = written.read().decode(errors="replace").strip().splitlines()[-1].strip()
        yield f"exit status {process.returncode}: {last}"


# ----------------------------------------------------------------------------------------------------------------------
# The sweep
# ----------------------------------------------------------------------------------------------------------------------
def latest(run_dir):
    """(simulator step, mean return, mean cost of the newest evaluation or None) by a run's episodes.csv."""
    step, evaluation = 0, []
    with suppress(OSError, ValueError):
        rows = [line.split(",") for line in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
        rows = [row for row in rows if len(row) == 6]
        step = int(rows[-1][1]) if rows else 0
        newest = max((int(row[1]) for row in rows if row[0] == "eval"), default=None)
        evaluation = [(float(row[3]), float(row[4])) for row in rows if row[0] == "eval" and int(row[1]) == newest]
    return step, *(np.mean(evaluation, axis=0) if evaluation else (None, None))


def table_of(jobs, states, runs_dir):
    """These jobs as a table, what runs first."""
    table = Table("run", "state", "steps", "return", "cost", box=None, pad_edge=False, caption_justify="left",
                  caption=f"{sum(state == 'finished' for state in states.values())} of {len(states)} finished")
    for job in sorted(jobs, key=lambda job: not states[job.name].startswith("on ")):
        found = run_dirs(job, runs_dir)
        step, *evaluation = latest(found[-1]) if found else (0, None, None)
        table.add_row(job.name, states[job.name], f"{step:,} / {job.steps:,}",
                      *("" if value is None else f"{value:.1f}" for value in evaluation))
    return table


def check_room(cpus, gpus):
    """SystemExit if no node could ever take a run."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise SystemExit(f"--cpus {cpus:g} --gpus {gpus:g}: no node has that; there are {there}")


def sweep(options, jobs, runs_dir, console):
    """Run the jobs -> those given up, with the reason. KeyboardInterrupt once every run has stopped."""
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0)(attempt)
    stop = runs_dir / "sweep" / f"stop {socket.gethostname()} {os.getpid()} {time.time_ns()}"
    submit = lambda job: remote.options(name=job.name).remote(job, ROOT, runs_dir, options.cpus, options.gpus, stop)
    reached = {job.name: where(job, runs_dir)[0] for job in jobs}
    states = {job.name: "finished" if reached[job.name] >= job.steps else "waiting" for job in jobs}
    running = {submit(job): job for job in jobs if states[job.name] == "waiting"}
    vain, given_up = dict.fromkeys(states, 0), {}

    def heed(generator):
        """One report of a job: it began somewhere, ended, failed, or its node died."""
        job, problem = running[generator], None
        try:
            report = ray.get(next(generator))
            if states[job.name].startswith("waiting"):
                states[job.name] = f"on {report}"
                console.print(f"{job.name}: {states[job.name]}")
                return
            problem = report
        except StopIteration:
            problem = "it ended without a word"
        except ray.exceptions.RayError as error:
            error = getattr(error, "cause", None) or error  # what `attempt` itself raised
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        del running[generator]
        step, _ = where(job, runs_dir)
        if step >= job.steps:
            states[job.name] = "finished"
            console.print(f"{job.name}: finished")
            return
        vain[job.name] = 0 if step > reached[job.name] else vain[job.name] + 1
        reached[job.name] = step
        since = f"after its checkpoint of step {step:,}" if step else "before its first checkpoint"
        console.print(f"{job.name}: ended {since}: {problem}", soft_wrap=True)
        if vain[job.name] >= options.attempts:
            states[job.name], given_up[job.name] = "given up", problem
        else:
            states[job.name] = f"waiting, resumes from {step:,}"
            running[submit(job)] = job

    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while running:
                ready, _ = ray.wait(list(running), timeout=2.0, fetch_local=False)
                for generator in ready:
                    heed(generator)
                if console.is_terminal:
                    unfinished = [job for job in jobs if states[job.name] != "finished"]
                    live.update(table_of(unfinished, states, runs_dir), refresh=True)
        except KeyboardInterrupt:
            console.print(f"stopping {len(running)} runs, each writes a checkpoint; Ctrl-C once more does not wait")
            stop.parent.mkdir(parents=True, exist_ok=True)
            stop.touch()  # ray.cancel would not reach a task that waits for its process
            try:
                for generator in running:
                    with suppress(ray.exceptions.RayError, StopIteration):
                        while True:
                            ray.get(next(generator))
            finally:
                stop.unlink()
            raise
    console.print(table_of(jobs, states, runs_dir))
    return given_up


def interrupt(*_):
    """A handler of SIGTERM that does what Ctrl-C does."""
    raise KeyboardInterrupt


def main(options):
    if options.cpus <= 0 or options.gpus < 0 or options.attempts < 1:
        raise SystemExit("--cpus must be positive, --gpus not negative, --attempts at least 1")
    grid = read_grid(options.grid, options.scale)
    if missing := [name for name in options.only if name not in grid.settings]:
        raise SystemExit(f"--only {missing[0]}: at scale {options.scale} the grid has {', '.join(grid.settings)}")
    if options.only:
        grid = grid._replace(settings={name: grid.settings[name] for name in options.only})
    runs_dir = (options.runs_dir or ROOT / "runs" / options.scale).resolve()
    jobs, console = jobs_of(grid, runs_dir), Console(highlight=False, markup=False, emoji=False)
    if options.dry_run:
        for job in jobs:
            step, run_dir = where(job, runs_dir)
            console.print(f"{run_dir or 'not begun'} at {step:,} of {job.steps:,}: {job.script} {' '.join(job.flags)}",
                          soft_wrap=True)
        return
    if ray is None:
        raise SystemExit("this needs Ray: .venv/bin/python -m pip install --no-deps -r benchmark/requirements.txt")
    host, _, port = (options.address or "").rpartition(":")
    try:  # Ray itself would try for minutes
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise SystemExit(f"--address {options.address}: {error}")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray asks for a decision; ours is JAX_PLATFORMS
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    own = {} if options.address else {"include_dashboard": False, "object_store_memory": 100 * 2**20}  # hardly used
    try:
        ray.init(address=options.address or "local", logging_level="warning", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:  # none there; another version of Ray or Python there
        raise SystemExit(f"--address {options.address}: {' '.join(str(error).split())}")
    signal.signal(signal.SIGTERM, interrupt)
    try:
        check_room(options.cpus, options.gpus)
        given_up = sweep(options, jobs, runs_dir, console)
    except ray.exceptions.RayError as error:
        raise SystemExit(f"Ray has stopped ({' '.join(str(error).split())}); the same command goes on")
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        raise SystemExit(130)
    finally:
        ray.shutdown()
    if given_up:
        raise SystemExit("\n".join(f"{name} was given up: {problem}; see {runs_dir}/sweep/{name}.log"
                                   for name, problem in given_up.items()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
