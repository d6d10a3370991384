"""benchmark/sweep.py and grid.py: what a grid means, and runs on real Ray, alone and on a cluster that loses a node.

Most runs here are of a stand-in for a script: it counts steps instead of learning, and writes down who did which."""
import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import tyro
from test_train import HEED_SIGNALS, ROOT, TINY, environment, train

sys.path.insert(0, str(ROOT / "benchmark"))

import sweep
from grid import read_grid

import spowl_continuous as spowl

GRIDS = sorted((ROOT / "benchmark" / "grids").glob("*.yaml"))
STEPS = {"paper": 5_000_000, "two_cores": 300_000, "million": 1_000_000}
SWEEP = ROOT / "benchmark" / "sweep.py"


# ----------------------------------------------------------------------------------------------------------------------
# Grids
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """Scale -> committed grid -> its runs."""
    runs_dir = tmp_path_factory.mktemp("runs")
    return {scale: {path.stem: sweep.jobs_of(read_grid(path, scale), runs_dir) for path in GRIDS
                    if f"\n  {scale}:" in path.read_text()} for scale in STEPS}


@pytest.mark.parametrize("scale, runs", [
    ("paper", {"fig3": 18, "fig4": 12, "fig6": 9, "fig7": 9, "fig8": 21, "fig9": 15, "table1": 189}),
    ("two_cores", {"fig3": 18, "fig4": 18, "fig6": 45, "fig7": 6, "fig8": 8, "fig9": 10, "table1": 132}),
    ("million", {"fig3": 6, "fig6": 6, "table1": 45})])
def test_the_committed_grids(grids, scale, runs):
    """Counted by hand; every run has a name of its own, and flags that its script takes."""
    assert {name: len({job.name for job in jobs}) for name, jobs in grids[scale].items()} == runs
    for name, jobs in grids[scale].items():
        assert len({job.name for job in jobs}) == len(jobs)
        without_a_model = {5_000_000} if (name, scale) == ("table1", "two_cores") else set()
        assert {job.steps for job in jobs} == {STEPS[scale]} | without_a_model


def test_the_same_run_has_the_same_flags_in_every_grid(grids):
    """So that figures can share runs."""
    for scale in STEPS:
        flags = {}
        for job in sum(grids[scale].values(), []):
            assert flags.setdefault(job.name, job) == job


def test_scripts_are_read_beside_modules_of_the_same_name():
    """A process that has imported a script keeps it: what is pickled by name is found again."""
    assert sweep.load_script("spowl_continuous.py").Args is not spowl.Args
    assert sys.modules["spowl_continuous"] is spowl


GOOD = """
title: a title
tasks: [SafetyPointGoal1-v0]
scales:
  tiny: {seeds: [1], flags: {total_timesteps: 10}}
  large: {seeds: [1, 2], tasks: [SafetyCarGoal1-v0]}
settings:
  one: {label: 1, script: spowl_continuous.py, flags: {capture-video: false, num-q: 3}}
  two: {label: second, script: spowl_plan_only.py, scales: [large]}
"""
SOME = GOOD.replace("tasks: [SafetyPointGoal1-v0]", "tasks: [SafetyPointGoal1-v0, SafetyCarGoal1-v0]").replace(
    "num-q: 3}", "num-q: 3}, tasks: [SafetyCarGoal1-v0]")


def grid_file(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


def test_a_dry_run_needs_no_ray(tmp_path):
    """It prints every run; without --dry-run one line says what to install."""
    without = ("import sys; sys.modules['ray'] = None; sys.path.insert(0, 'benchmark'); from sweep import *; "
               "options = tyro.cli(Options); main(options); main(dataclasses.replace(options, dry_run=False))")
    words = "benchmark/grids/fig9.yaml", "--runs-dir", tmp_path, "--dry-run"
    finished = subprocess.run([sys.executable, "-c", without, *words],
                              cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert finished.stdout.count("not begun at 0 of 300,000: ") == finished.stdout.count("\n") == 10, finished.stderr
    assert finished.returncode == 1
    assert finished.stderr.startswith("this needs Ray: ") and finished.stderr.count("\n") == 1


def test_a_grid_at_two_scales(tmp_path):
    path = grid_file(tmp_path, GOOD)
    tiny, large = read_grid(path, "tiny"), read_grid(path, "large")
    assert (tiny.tasks, tiny.seeds, tiny.flags) == (("SafetyPointGoal1-v0",), (1,), {"total-timesteps": 10})
    assert list(tiny.settings) == ["one"] and tiny.panels == ("return", "cost", "cost_rate", "balance")
    assert (large.tasks, large.seeds, large.flags) == (("SafetyCarGoal1-v0",), (1, 2), {})
    assert list(large.settings) == ["one", "two"] and large.settings["two"]["flags"] == {}
    (job,) = sweep.jobs_of(tiny._replace(flags={}), tmp_path)
    assert job == ("SafetyPointGoal1-v0__one__1", "spowl_continuous.py",
                   ("--env-id", "SafetyPointGoal1-v0", "--exp-name", "one", "--seed", "1", "--runs-dir", str(tmp_path),
                    "--no-capture-video", "--num-q", "3"), 5_000_000)


def test_a_setting_of_some_tasks(tmp_path):
    """It is run on those alone."""
    grid = read_grid(grid_file(tmp_path, SOME.replace("scales: [large]", "scales: [tiny]")), "tiny")._replace(flags={})
    assert [job.name for job in sweep.jobs_of(grid, tmp_path)] == [
        "SafetyPointGoal1-v0__two__1", "SafetyCarGoal1-v0__one__1", "SafetyCarGoal1-v0__two__1"]


@pytest.mark.parametrize("before, after, says", [
    ("title: a title", "", "lacks 'title'"),
    ("title: a title", "titel: a title\ntitle: b", "has 'titel'; known are title, tasks"),
    ("title: a title", "title: [", "is not a grid: "),
    ("[SafetyPointGoal1-v0]", "SafetyPointGoal1-v0", "tasks must be a list of str"),
    ("[SafetyPointGoal1-v0]", "[]", "tasks must be a list of str"),
    ("seeds: [1],", "seeds: [1, 1],", "seeds has something twice"),
    ("seeds: [1],", "seeds: [one],", "seeds must be a list of int"),
    ("seeds: [1],", "", "scale tiny lacks 'seeds'"),
    ("{total_timesteps: 10}", "[10]", "flags must be a mapping"),
    ("title: a title", "title: a title\npanels: [reward]", "panels has 'reward'; known are return, cost, cost_rate"),
    ("scales: [large]", "scales: [huge]", "setting two: scales has 'huge'; known are tiny, large"),
    ("num-q: 3}", "num-q: 3}, tasks: [SafetyAntGoal1-v0]", "setting one: tasks has 'SafetyAntGoal1-v0'; known are Saf"),
    ("label: second, ", "", "setting two lacks 'label'"),
    ("  two:", "  2:", "settings must be a mapping with names"),
    ("  two:", "  one:", "one stands there twice"),
    ("num-q: 3", "exp_name: mine", "setting one: flags has 'exp-name', which follows from tasks, settings and seeds"),
    ("{total_timesteps: 10}", "{seed: 7}", "scale tiny: flags has 'seed'"),
    ("script: spowl_continuous.py", "script: 5", "setting one: script must be a path"),
])
def test_a_grid_with_a_mistake_is_refused_in_one_line(tmp_path, before, after, says):
    assert before in GOOD
    path = grid_file(tmp_path, GOOD.replace(before, after))
    with pytest.raises(SystemExit) as stop:
        read_grid(path, "tiny")
    assert str(stop.value).startswith(str(path)) and says in str(stop.value) and "\n" not in str(stop.value)


def test_a_scale_without_a_setting_is_refused(tmp_path):
    path = grid_file(tmp_path, GOOD.replace("num-q: 3}}", "num-q: 3}, scales: [large]}"))
    with pytest.raises(SystemExit, match="--scale tiny: no setting of .* has it"):
        read_grid(path, "tiny")


@pytest.mark.parametrize("before, after, says", [
    ("num-q: 3", "num-q: 0", "setting one: --num-q must be at least 1"),
    ("seeds: [1]", "seeds: [1, -1]", "setting one: --seed must be at least 0"),
    ("num-q: 3", "num-quark: 3", "setting one: Unrecognized options: --num-quark"),
    ("SafetyPointGoal1-v0", "SafetyPointGoal9-v0", "SafetyPointGoal9-v0: not a task of Safety-Gymnasium"),
    ("spowl_continuous.py", "spowl_discrete.py", "script spowl_discrete.py does not exist"),
])
def test_what_a_script_would_refuse_is_refused_before_anything_runs(tmp_path, before, after, says):
    grid = read_grid(grid_file(tmp_path, GOOD.replace(before, after)), "tiny")
    with pytest.raises(SystemExit, match=re.escape(says)):
        sweep.jobs_of(grid._replace(flags={}), tmp_path)


@pytest.mark.parametrize("words, says", [
    (["--scale", "huge"], "--scale huge: "), (["--only", "three"], "--only three: "), (["--cpus", "0"], "--cpus must"),
    (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1"),
])
def test_bad_options_are_refused_in_one_line(tmp_path, words, says):
    with pytest.raises(SystemExit) as stop:
        sweep.main(tyro.cli(sweep.Options, args=[str(grid_file(tmp_path, GOOD)), "--scale", "large", *words]))
    assert str(stop.value).startswith(says) and "\n" not in str(stop.value)


@pytest.mark.long  # a Ray for one line
def test_cores_that_no_node_has_are_refused(tmp_path, start):
    finished = start(grid_file(tmp_path, GOOD), "--scale", "large", "--cpus", "999").communicate(timeout=300)
    assert "no node has that" in finished[1].splitlines()[-1] and "Traceback" not in finished[1]


# ----------------------------------------------------------------------------------------------------------------------
# What is there of a run
# ----------------------------------------------------------------------------------------------------------------------
def checkpoint(run_dir, step):
    run_dir.mkdir(exist_ok=True)
    np.savez(run_dir / f"checkpoint_{step}.npz", counters=json.dumps({"completed": step}))


def test_where_a_run_is(tmp_path):
    """At its newest checkpoint's step; nowhere before its first; refused where there are two."""
    job = sweep.Job("task__name__1", "script", (), 100)
    (tmp_path / "task__name__1__5").mkdir()
    checkpoint(tmp_path / "task__name__12__5", 70)
    checkpoint(tmp_path / "task__name__1__5.copy", 80)
    (tmp_path / "task__name__1__5" / "checkpoint_best.npz").touch()
    assert sweep.where(job, tmp_path) == (0, None)
    checkpoint(tmp_path / "task__name__1__7", 90)
    checkpoint(tmp_path / "task__name__1__7", 100)
    assert sweep.where(job, tmp_path) == (100, tmp_path / "task__name__1__7")
    (tmp_path / "task__name__1__7" / "checkpoint_110.npz").write_bytes(b"damaged")
    assert sweep.where(job, tmp_path) == (0, tmp_path / "task__name__1__7")  # resumed, so that its script says it
    checkpoint(tmp_path / "task__name__1__5", 10)
    with pytest.raises(SystemExit, match="task__name__1__5 and .*task__name__1__7 are the same run"):
        sweep.where(job, tmp_path)


def test_a_run_with_other_flags_is_not_taken(tmp_path):
    """Also where the other flag is one that the grid leaves at its default."""
    grid = read_grid(grid_file(tmp_path, GOOD), "tiny")
    grid = grid._replace(flags={})
    (job,) = sweep.jobs_of(grid, tmp_path)
    args = vars(sweep.load_script(job.script).parse_args(job.flags))
    run_dir = tmp_path / f"{job.name}__7"
    checkpoint(run_dir, 50)
    for changed, says in (({}, None), ({"eval_every": 1}, None), ({"total_timesteps": 1}, "total_timesteps 1, not"),
                          ({"num_q": 4}, "num_q 4, not 3"), ({"gamma": 0.5}, "gamma 0.5, not 0.975")):
        (run_dir / "args.json").write_text(json.dumps({"script": "spowl_continuous", "args": args | changed}))
        if says:
            with pytest.raises(SystemExit, match=says):
                sweep.jobs_of(grid, tmp_path)
        else:
            assert sweep.jobs_of(grid, tmp_path) == [job]
    (run_dir / "args.json").write_text(json.dumps({"script": "spowl_plan_only", "args": args}))
    with pytest.raises(SystemExit, match="script spowl_plan_only, not spowl_continuous"):
        sweep.jobs_of(grid, tmp_path)


def test_a_run_is_found_whatever_its_name(tmp_path):
    """A setting may have brackets, which a pattern would take for a choice."""
    job = sweep.Job("task__x[1]__1", "script.py", (), 100)
    (tmp_path / "task__x[1]__1__7").mkdir()
    (tmp_path / "task__x1__1__8").mkdir()
    assert sweep.run_dirs(job, tmp_path) == [tmp_path / "task__x[1]__1__7"]


def test_the_latest_evaluation_is_whole_however_long_ago(tmp_path):
    rows = ["split,step,environment,return,cost,length", *(f"eval,10,{i},{i},{2 * i},1000" for i in range(20)),
            *("train,20,0,1.0,2.0,1000" for _ in range(500))]
    (tmp_path / "episodes.csv").write_text("\n".join(rows))
    assert sweep.latest(tmp_path) == (20, 9.5, 19.0)


def test_the_latest_of_a_run(tmp_path):
    assert sweep.latest(tmp_path) == (0, None, None)
    rows = [("train", 10, 0, 1.0, 2.0, 5), ("eval", 10, 0, 1.0, 3.0, 5), ("eval", 20, 0, 2.0, 4.0, 5),
            ("eval", 20, 1, 5.0, 0.0, 5), ("train", 30, 0, 1.0, 2.0, 5)]
    with open(tmp_path / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("split", "step", "environment", "return", "cost", "length"), *rows])
    assert sweep.latest(tmp_path) == (30, 3.5, 2.0)


def test_what_a_run_may_use(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    on_cpu, shared, alone = sweep.environment(2.5, 0), sweep.environment(0.5, 0.25), sweep.environment(8, 1)
    assert (on_cpu["NPROC"], on_cpu["JAX_PLATFORMS"]) == ("2", "cpu")
    assert (shared["NPROC"], shared["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("1", "0.225")
    assert alone["NPROC"] == "8" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in alone and "JAX_PLATFORMS" not in alone


# ----------------------------------------------------------------------------------------------------------------------
# Runs on Ray
# ----------------------------------------------------------------------------------------------------------------------
STAND_IN = '''
import dataclasses, json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import tyro

FREE_ON_RESUME = ("runs_dir", "resume", "total_timesteps", "pause")

@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str
    exp_name: str
    seed: int
    runs_dir: str
    total_timesteps: int = 20
    resume: str | None = None
    pause: float = 0.2
    fail_at: str = ""
    fail_always: bool = False
    lingers: float = 0.0

def import_safety_gymnasium():
    return SimpleNamespace(utils=SimpleNamespace(registration=SimpleNamespace(safe_registry={"task"})))

def parse_args(argv=None):
    return tyro.cli(Args, args=argv)

def problems(args):
    return []

def main(args):
    if args.fail_always:
        sys.exit("cannot even begin")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    run_dir = Path(args.resume or Path(args.runs_dir) / name)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "args.json").write_text(json.dumps({"script": Path(__file__).stem, "args": dataclasses.asdict(args)}))
    done = max([int(path.stem.split("_")[1]) for path in run_dir.glob("checkpoint_*.npz")], default=0)
    with open(run_dir / "journal", "a", buffering=1) as journal:
        def linger(number, frame):
            journal.write(f"{os.getpid()} stops\\n")
            time.sleep(args.lingers)
            journal.write(f"{os.getpid()} stopped\\n")
            os._exit(143)
        signal.signal(signal.SIGTERM, linger)
        for step in range(done + 1, args.total_timesteps + 1):
            time.sleep(args.pause)
            journal.write(f"{os.getpid()} {step}\\n")
            np.savez(run_dir / "beside.npz", counters=json.dumps({"completed": step}))
            os.replace(run_dir / "beside.npz", run_dir / f"checkpoint_{step}.npz")
            if str(step) in args.fail_at.split():
                sys.exit(f"[planned] failure at [/{step}]")

if __name__ == "__main__":
    main(parse_args())
'''


def stand_in_grid(tmp_path, settings, seeds=(1,), flags="{}"):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    lines = "".join(f"  {name}: {{label: {name}, script: {tmp_path}/stand_in.py, flags: {{{flags_of}}}}}\n"
                    for name, flags_of in settings.items())
    return grid_file(tmp_path, f"title: t\ntasks: [task]\nscales:\n  tiny: {{seeds: {list(seeds)}, flags: {flags}}}\n"
                               f"settings:\n{lines}")


@pytest.fixture
def start(tmp_path):
    """start(grid, *words): the sweep in the background, in a process group of its own, as in a terminal."""
    started = []

    def background(grid, *words):
        command = [sys.executable, "-c", HEED_SIGNALS, sys.executable, SWEEP, grid, "--runs-dir", tmp_path / "runs",
                   *map(str, words)]
        if "--scale" not in words:
            command += ["--scale", "tiny"]
        variables = os.environ | {"COLUMNS": "300", "RAY_USE_MULTIPROCESSING_CPU_COUNT": "1"}  # as os.cpu_count does
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True, env=variables))
        return started[-1]

    yield background
    for process in started:  # those of a test that failed
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=120)


def wait_for(process, runs, pattern, count=1):
    """Until so many files are there; the sweep must go on meanwhile."""
    for _ in range(2000):
        if len(list(runs.glob(pattern))) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise TimeoutError(pattern)


def journal(runs, name):
    """The steps of a run by the process that made them, in order; one run directory, no process beside another."""
    (run_dir,) = runs.glob(f"{name}__*")
    lines = [line.split() for line in (run_dir / "journal").read_text().splitlines()]
    blocks = [(pid, [word for _, word in block]) for pid, block in itertools.groupby(lines, key=lambda line: line[0])]
    assert len({pid for pid, _ in blocks}) == len(blocks)
    return [[int(word) for word in block if word.isdigit()] for _, block in blocks]


def check_journal(runs, name, steps, processes):
    """Every step was made, again only where a process ended between step and checkpoint."""
    blocks = journal(runs, name)
    assert len(blocks) == processes, blocks
    reached = 0
    for block in blocks:
        if block:
            assert block[0] in (reached, reached + 1) and block == list(range(block[0], block[-1] + 1))
            reached = block[-1]
    assert reached == steps


def test_failures_are_resumed_and_given_up_without_progress(tmp_path, start):
    """One run fails after its checkpoints, one before its first, every time, which alone is given up: at once."""
    grid = stand_in_grid(tmp_path, {"good": "", "fails": "fail-at: 3 5", "never": "fail-always: true"},
                         flags="{total-timesteps: 8, pause: 0.05}")
    stdout, stderr = (process := start(grid, "--attempts", 1)).communicate(timeout=300)
    assert process.returncode == 1, stderr
    assert stderr.strip().splitlines()[-1].startswith(
        "task__never__1 was given up: exit status 1: cannot even begin; see ")
    for step in (3, 5):
        assert (f"task__fails__1: ended after its checkpoint of step {step}: exit status 1: [planned] failure at "
                f"[/{step}]") in stdout
    check_journal(tmp_path / "runs", "task__good__1", 8, processes=1)
    check_journal(tmp_path / "runs", "task__fails__1", 8, processes=3)
    assert list((tmp_path / "runs").glob("task__never__1__*")) == []


@pytest.mark.long  # the test above gives up after one
def test_given_up_after_three_attempts_in_vain(tmp_path, start):
    """So many unless --attempts says otherwise. What keeps a process from being started is named."""
    grid = stand_in_grid(tmp_path, {"never": "fail-always: true", "barred": ""}, flags="{pause: 0.01}")
    (tmp_path / "runs" / "sweep" / "task__barred__1.log").mkdir(parents=True)
    stdout, stderr = (process := start(grid)).communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert stdout.count("task__never__1: ended before its first checkpoint: exit status 1: cannot even begin") == 3
    assert stdout.count("task__barred__1: ended before its first checkpoint: IsADirectoryError: ") == 3


@pytest.mark.long
@pytest.mark.parametrize("whole_group", [True, False], ids=["SIGINT to the group", "SIGTERM"])
def test_stopped_and_continued(tmp_path, start, whole_group):
    """Ctrl-C in a terminal reaches the whole group, SIGTERM the sweep alone. The same command goes on, and then there
    is nothing left to do."""
    grid = stand_in_grid(tmp_path, {"good": "lingers: 0.5"}, seeds=(1, 2, 3), flags="{total-timesteps: 100}")
    process = start(grid, "--cpus", os.cpu_count() / 2)
    wait_for(process, tmp_path / "runs", "task__good__?__*/checkpoint_3.npz", count=2)
    os.killpg(process.pid, signal.SIGINT) if whole_group else process.terminate()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command goes on" in stdout and "Traceback" not in stderr
    assert not list((tmp_path / "runs").glob("task__good__3__*"))
    for seed in (1, 2):
        (run_dir,) = (tmp_path / "runs").glob(f"task__good__{seed}__*")
        assert (run_dir / "journal").read_text().split()[-1] == "stopped"  # it was waited for
    grid.write_text(grid.read_text().replace("total-timesteps: 100", "total-timesteps: 100, pause: 0.01"))
    process = start(grid)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    for seed, processes in ((1, 2), (2, 2), (3, 1)):
        check_journal(tmp_path / "runs", f"task__good__{seed}", 100, processes)
    process = start(grid)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and ": on " not in stdout and "3 of 3 finished" in stdout
    check_journal(tmp_path / "runs", "task__good__1", 100, processes=2)


@pytest.fixture
def cluster():
    """A real Ray cluster of two nodes with one core each, on this machine."""
    from ray.cluster_utils import Cluster

    handler, small = signal.getsignal(signal.SIGTERM), {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    two = Cluster()
    try:
        two.add_node(**small, include_dashboard=False)
        two.other = two.add_node(**small)
        two.wait_for_nodes()
        yield two
    finally:
        two.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own


def processes_of(node):
    """{process number: command line} of a node's raylet and all that came from it."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    table = {int(pid): (int(parent), words) for pid, parent, words in (line.split(None, 2) for line in table)}
    family = [node.all_processes["raylet"][0].process.pid]
    for member in family:
        family += [pid for pid, (parent, _) in table.items() if parent == member]
    return {pid: table[pid][1] for pid in family}


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.long
@pytest.mark.parametrize("whole", [pytest.param(True, id="the machine"), pytest.param(False, id="Ray on it")])
def test_a_node_of_two_dies(tmp_path, start, cluster, whole):
    """Every run finishes, none is lost, none has two processes at once: also where the dead node's process lives on for
    three seconds after all of Ray there is gone."""
    grid = stand_in_grid(tmp_path, {"good": "lingers: 3"}, seeds=(1, 2, 3), flags="{total-timesteps: 50}")
    process = start(grid, "--address", cluster.address)
    wait_for(process, tmp_path / "runs", "task__good__*/checkpoint_3.npz", count=2)
    for pid, words in processes_of(cluster.other).items():
        if whole or "stand_in.py" not in words:
            with suppress(ProcessLookupError):  # it went with its parent
                os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, (stdout, stderr)
    died = re.findall(r"task__good__(\d): ended after its checkpoint of step \d+: (\w+)", stdout)
    assert len(died) == 1 and died[0][1] in ("NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError"), stdout
    for seed in (1, 2, 3):
        check_journal(tmp_path / "runs", f"task__good__{seed}", 50, processes=2 if str(seed) == died[0][0] else 1)


@pytest.mark.long
def test_real_runs_on_a_cluster_that_loses_a_node(tmp_path, start, place, cluster, monkeypatch):
    """The agent itself: two seeds, the node of one killed after its first checkpoint. They end as they do alone."""
    flags = [*TINY, "--total-timesteps", "4000", "--action-repeat", "25", "--buffer-size", "200",
             "--eval-every", "1000", "--eval-episodes", "2", "--exp-name", "real"]
    alone = [train(place, *flags, "--seed", seed).dir for seed in (1, 2)]
    yaml_flags = ", ".join(f"{name[2:]}: {value}" for name, value in zip(flags[:-2:2], flags[1:-2:2]))
    grid = grid_file(tmp_path, f"title: t\ntasks: [SafetyPointGoal1-v0]\nscales:\n  tiny: {{seeds: [1, 2], flags: "
                               f"{{{yaml_flags}}}}}\nsettings:\n  real: {{label: real, script: spowl_continuous.py}}\n")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    process = start(grid, "--address", cluster.address)
    wait_for(process, tmp_path / "runs", "*__real__*/checkpoint_1000.npz", count=2)
    for pid in processes_of(cluster.other):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, (stdout, stderr)
    assert len(re.findall(r"__real__\d: ended after its checkpoint of step \d", stdout)) == 1
    for seed, reference in zip((1, 2), alone):
        (run_dir,) = (tmp_path / "runs").glob(f"SafetyPointGoal1-v0__real__{seed}__*")
        assert (run_dir / "episodes.csv").read_text() == (reference / "episodes.csv").read_text()
