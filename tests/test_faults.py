"""What a run does when processes die, the disk is full, a number is not finite, or it is told to stop at once.

The long ones: python -m pytest -q -m long tests"""
import gc
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_args
from test_envs import Scripted, scripted_envs, toy_agent
from test_train import HEED_SIGNALS, POINT, SCRIPT, TINY, Wandb, checkpoint, environment, rows_of, start

import spowl_continuous as spowl

pytestmark = pytest.mark.usefixtures("compiled_quickly")


# ----------------------------------------------------------------------------------------------------------------------
# Processes that die
# ----------------------------------------------------------------------------------------------------------------------
def workers(pid):
    """Process numbers of a run's environments, its children that compute, in the order in which they started."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{entry}/cmdline") as file:
                words = file.read()
        except (OSError, ValueError):
            continue
        if entry.isdigit() and int(fields[1]) == pid and fields[0] != "Z" and "resource_tracker" not in words:
            found.append((int(fields[19]), int(entry)))
    return [number for _, number in sorted(found)]


def check_killed_run(directory, stderr):
    """No row of the buffer joins two episodes, and what was cut is counted. -> What was told of every failure."""
    told = [line for line in stderr.splitlines() if line.endswith("; all are started anew")]
    assert "Traceback" not in stderr
    counters, arrays = checkpoint(directory)
    rows = {field: arrays[f"['buffer'].rows.{field}"] for field in spowl.Transition._fields}
    ended = rows["done"] > 0
    assert np.array_equal((rows["obs"][1:] == rows["next_obs"][:-1]).all(-1), ~ended[:-1])
    lengths = [int(row["length"]) for row in rows_of(directory / "episodes.csv") if row["split"] == "train"]
    assert set(lengths) <= {1000}  # those cut short are not counted as episodes
    # both environments at once; a process that dies while others start anew is told, but cuts nothing more
    times, rest = divmod(sum(counters["episodes"]) - len(lengths), 2)
    assert rest == 0 and times <= sum(line.startswith("training") for line in told)
    whole = np.zeros_like(ended)  # 40 agent steps since the end before
    for env, each in enumerate(ended.T):
        ends = np.flatnonzero(each)
        whole[ends[np.diff([-1, *ends]) == 40], env] = True
    cut = ended & ~whole
    assert whole.sum() == len(lengths) and len(np.flatnonzero(cut.any(1))) <= times
    assert (ended[cut.any(1)]).all()
    return told


def test_killed_processes_cost_unfinished_episodes_only(place):
    """One of the training environments' at the beginning, then one of the evaluation's: a line for each, and the run
    ends as always."""
    runs = place / "killed"
    process = start(place, "--runs-dir", runs, *POINT)
    assert f"{runs}" in process.stdout.readline()
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    while not (line := process.stdout.readline()).startswith("step 1,000"):
        assert line, process.stderr.read()
    os.kill(workers(process.pid)[0], signal.SIGKILL)  # the training environments' are younger now
    _, stderr = process.communicate(timeout=600)
    (directory,) = runs.iterdir()
    assert process.returncode == 0, stderr
    told = check_killed_run(directory, stderr)
    assert [line.split(" environment ")[0] for line in told] == ["training", "evaluation"]
    assert all("exit code -9" in line for line in told)
    rows = rows_of(directory / "episodes.csv")
    assert [row["step"] for row in rows if row["split"] == "eval"] == ["1000", "1000", "2000", "2000", "2500", "2500"]


@pytest.mark.long
def test_twenty_killed_processes(place):
    """At random moments: also while others start anew, and during evaluations."""
    runs, rng, killed, total = place / "killed20", random.Random(20), 0, 400_000
    with open(place / "killed20.stderr", "w+") as errors:  # a pipe that nobody reads would fill
        process = start(place, "--runs-dir", runs, *POINT, "--total-timesteps", total, "--buffer-size",
                        4 * total // 25, "--eval-every", 2 * total, stderr=errors)
        assert f"{runs}" in process.stdout.readline()
        while killed < 20 and process.poll() is None:
            time.sleep(rng.uniform(0.5, 3.0))
            if alive := workers(process.pid):
                os.kill(rng.choice(alive), signal.SIGKILL)
                killed += 1
        process.communicate(timeout=1500)
        errors.seek(0)
        stderr = errors.read()
    assert process.returncode == 0, stderr
    (directory,) = runs.iterdir()
    assert len(check_killed_run(directory, stderr)) >= 15  # a process of an evaluation may be killed several times


@pytest.fixture
def learn(scripted_envs, monkeypatch):
    """learn(lives, eval_lives, ...) runs `learn` on scripted environments, 22 and 12 steps long unless given: 100
    steps, random until 50, evaluated there and at 100, without updates -> the last evaluation's episodes."""
    monkeypatch.setattr(spowl, "critic_metrics", lambda args, agent, episodes: {})

    def run(lives=None, eval_lives=None, stopping=(), **flags):
        flags = {"total_timesteps": 100, "learning_starts": 50, "train_every": 50, "eval_every": 50, "eval_episodes": 2,
                 "updates_per_step": 1e-9} | flags
        eval_envs = scripted_envs(*eval_lives or (Scripted(22), Scripted(12)), stream=1, **flags)
        envs = scripted_envs(*lives or (Scripted(22), Scripted(12)), **flags)
        return spowl.learn(envs.args, envs, eval_envs, (3, 1), stopping)

    return run


EVALUATIONS = [("eval", step, *row) for step in ("50", "100") for row in (("0", "22.0", "5.5", "22"),
                                                                          ("1", "12.0", "3.0", "12"))]


@pytest.mark.parametrize("failing, after, at, ended", [
    ("training", 12, 20, [(50, "1"), (70, "0"), (80, "1")]),
    ("training", 32, 70, [(30, "1"), (50, "0"), (60, "1"), (100, "1")]),
    ("evaluation", 22, 100, [(30, "1"), (50, "0"), (60, "1"), (90, "1"), (100, "0")])])
def test_a_run_that_fails_again_and_again_is_saved_and_can_go_on(learn, tmp_path, capfd, failing, after, at, ended):
    """`at` is where the first environment fails, after its `after` steps and for ever: among random actions, among an
    agent's, in the second evaluation. Once the run goes on, it ends like any other, but for the episodes cut there."""
    lives = [[Scripted(22, fails_after=0 if start else after) for start in range(11)],
             [Scripted(12) for _ in range(11)]]
    with pytest.raises(spowl.EnvFailure, match=rf"{failing} environment 0 of .* \(after 10 new starts\)"):
        learn(**{"lives" if failing == "training" else "eval_lives": lives}, runs_dir=str(tmp_path))
    gc.collect()  # what the exception held, the lock among it
    (directory,) = tmp_path.iterdir()
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped at step {at}; go on with --resume {directory}"
    counters, _ = checkpoint(directory)
    assert (counters["step"], counters["completed"]) == (at, 0 if at < 50 else 50)
    episodes = learn(resume=str(directory))
    assert [episode["length"] for episode in episodes] == [22, 12] and checkpoint(directory)[0]["completed"] == 100
    rows = [tuple(row.values()) for row in rows_of(directory / "episodes.csv")]
    assert [row for row in rows if row[0] == "eval"] == EVALUATIONS
    assert [(int(row[1]), row[2]) for row in rows if row[0] == "train"] == ended
    with pytest.raises(SystemExit, match="is at step 100 already"):
        learn(resume=str(directory))


def test_a_run_whose_last_agent_step_is_cut_short_is_evaluated_and_saved(learn, tmp_path):
    """95 steps are no multiple of the 10 that an agent step of all takes: the run ends after 100."""
    assert len(learn(total_timesteps=95, runs_dir=str(tmp_path))) == 2
    (directory,) = tmp_path.iterdir()
    assert checkpoint(directory)[0]["completed"] == 100
    rows = rows_of(directory / "episodes.csv")
    assert [row["step"] for row in rows if row["split"] == "eval"] == ["50"] * 2 + ["100"] * 2


def test_failures_count_anew_in_every_cycle(learn, tmp_path):
    """Six in each, and six in each evaluation, are no reason to stop, though ten would be."""
    lives = lambda later: [[Scripted(22, fails_after=0) for _ in range(6)] + [Scripted(22, fails_after=later)] + [
        Scripted(22, fails_after=0) for _ in range(5)] + [Scripted(22)], [Scripted(12) for _ in range(13)]]
    learn(lives(24), lives(22), runs_dir=str(tmp_path))
    (directory,) = tmp_path.iterdir()
    rows = [tuple(row.values()) for row in rows_of(directory / "episodes.csv")]
    assert [row for row in rows if row[0] == "eval"] == EVALUATIONS
    assert checkpoint(directory)[0]["episodes"] == [6 + 1 + 6 + 1, 6 + 1 + 6 + 1]


# ----------------------------------------------------------------------------------------------------------------------
# A disk that is full
# ----------------------------------------------------------------------------------------------------------------------
LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])"""


def test_training_goes_on_where_there_is_no_room(learn, tmp_path, monkeypatch, capfd):
    """Never for checkpoints, for the csv not before the second cycle: warnings, no half-written file, all episodes."""
    writes, replacing = [], spowl.replacing

    def full(path):
        writes.append(path.name)
        if path.suffix == ".npz" or len(writes) < 4:
            raise OSError(28, "No space left on device", str(path))
        return replacing(path)

    monkeypatch.setattr(spowl, "replacing", full)
    with pytest.raises(SystemExit, match="step 100 could not be saved"):  # nothing else has the trained agent
        learn(runs_dir=str(tmp_path))
    (directory,) = tmp_path.iterdir()
    csv = ["episodes.csv"] * 2
    assert writes == csv + ["checkpoint_50.npz"] + csv + ["checkpoint_100.npz"]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert told == [f"warning: No space left on device: {directory / name} was not written" for name in (
        *csv, "checkpoint_50.npz", "checkpoint_100.npz")]
    assert sorted(path.suffix for path in directory.iterdir() if "tfevents" not in path.name) == [".csv", ".json"]
    rows = [tuple(row.values()) for row in rows_of(directory / "episodes.csv")]
    assert [row for row in rows if row[0] == "eval"] == EVALUATIONS
    assert [(row[1], row[2]) for row in rows if row[0] == "train"] == [
        ("30", "1"), ("50", "0"), ("60", "1"), ("90", "1"), ("100", "0")]


def test_a_stop_that_could_not_be_saved_says_so(learn, tmp_path, monkeypatch, capfd):
    """No "go on with --resume", where the checkpoint is older or none."""
    monkeypatch.setattr(np, "savez", lambda file, **arrays: file.close() or open("/nowhere/at/all"))
    with pytest.raises(SystemExit, match="^step 0 could not be saved; any checkpoint in .* is older$"):
        learn(runs_dir=str(tmp_path), stopping=[15])
    assert "--resume" not in capfd.readouterr().err


def test_a_resumed_run_that_is_stopped_again_says_how_it_was_going_on(learn, tmp_path, capfd):
    """Flags that a resumed run was given stand in no file: the next line has them."""
    learn(runs_dir=str(tmp_path))
    (directory,) = tmp_path.iterdir()
    capfd.readouterr()
    learn(resume=str(directory), total_timesteps=200, eval_every=100, stopping=[15])
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"stopped at step 100; go on with --resume {directory} --total-timesteps 200 --eval-every 100")


def test_a_run_stopped_before_its_first_step_can_be_evaluated(learn, scripted_envs, tmp_path, monkeypatch, capsys):
    learn(runs_dir=str(tmp_path), stopping=[15])
    (directory,) = tmp_path.iterdir()
    envs = scripted_envs(Scripted(22), Scripted(12), stream=1, eval_episodes=2, evaluate=str(directory))
    monkeypatch.setattr(spowl, "check_machine", lambda args: None)
    monkeypatch.setattr(spowl, "start_envs", lambda *_: (envs, 3, 1))
    assert [episode["length"] for episode in spowl.evaluate_run(envs.args)] == [22, 12]
    assert re.match(r"step 0: return .* cost rate 0\.0000,", capsys.readouterr().out.splitlines()[-1])


def test_weights_and_biases_gets_all_of_a_stopped_run(learn, tmp_path, monkeypatch):
    """Closed before the process leaves at once; what it refuses is one line."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    learn(runs_dir=str(tmp_path), track=True, stopping=[15])
    assert wandb.finished == [True]
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    with pytest.raises(SystemExit, match="^--track: division by zero$"):
        learn(runs_dir=str(tmp_path / "other"), track=True)


@pytest.mark.long
def test_training_goes_on_where_no_checkpoint_fits(place):
    """No file may grow beyond 40 kB: csv and logs fit, checkpoints do not. Warnings, no half-written file, exit 1."""
    runs = place / "full"
    words = [sys.executable, "-c", LIMITED, "40000", sys.executable, SCRIPT, "--runs-dir", runs, *POINT]
    variables = environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # none cut off
    finished = subprocess.run([str(word) for word in words], cwd=place, env=variables, capture_output=True, text=True,
                              timeout=600)
    (directory,) = runs.iterdir()
    warnings = [line for line in finished.stderr.splitlines() if line.startswith("warning: File too large")]
    assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert len(warnings) == 3 and re.search(r"step [\d,]+ could not be saved", finished.stderr.splitlines()[-1])
    assert sorted(path.suffix for path in directory.iterdir() if "tfevents" not in path.name) == [".csv", ".json"]
    assert len(rows_of(directory / "episodes.csv")) == 2 + 6


def tiny_run(step):
    """A run at that step, of next to nothing."""
    args = small_args()
    nothing = dict.fromkeys(spowl.AgentState._fields) | {"key": jax.random.key(0), "scale": np.float32(step)}
    progress = spowl.Progress(step, 0, step, 0.0, 0, np.zeros(2, int), np.ones(2, bool), np.zeros((2, 3)), [], 0.0)
    return spowl.Run(spowl.AgentState(**nothing), spowl.init_actor(args, jax.random.key(1), 2),
                     spowl.init_buffer(args, 3, 2), progress)


def test_a_failed_checkpoint_leaves_the_older_ones(tmp_path, monkeypatch, capsys):
    """Half the file is written when the disk is full: what was there stays as it was, to the byte."""
    for step in (100, 200):
        spowl.save_checkpoint(tmp_path, tiny_run(step), 0.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["checkpoint_100.npz", "checkpoint_200.npz"]

    def full(file, **arrays):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    for step in (300, 200):  # another one, and the newest once more
        spowl.attempt(spowl.save_checkpoint, tmp_path, tiny_run(step), 0.0)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert capsys.readouterr().err == "warning: No space left on device: the run directory was not written\n"


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (5, 900, 1000, 20_000):
        spowl.save_checkpoint(tmp_path, tiny_run(step), 0.0)
        assert spowl.checkpoints(tmp_path)[-1].name == f"checkpoint_{step}.npz"
    assert [path.name for path in spowl.checkpoints(tmp_path)] == ["checkpoint_1000.npz", "checkpoint_20000.npz"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_writer_leaves_is_gone_with_the_next_checkpoint(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Nothing of the script runs after it, as after SIGKILL."""

    def killed(file, **arrays):
        file.write(b"x" * 1000)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "savez", killed)
        spowl.save_checkpoint(tmp_path, tiny_run(100), 0.0)
    assert len(list(tmp_path.iterdir())) == 1 and not spowl.checkpoints(tmp_path)
    spowl.save_checkpoint(tmp_path, tiny_run(200), 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_200.npz"]


def test_episodes_are_written_whole_or_not_at_all(tmp_path, capsys):
    """A csv for which there is no room keeps its lines, and has the missing ones as soon as there is."""
    path, rows = tmp_path / "episodes.csv", [["train", step, 0, 1.5, 2.0, 1000] for step in range(200)]
    write = lambda count: spowl.attempt(spowl.write_csv, path, spowl.COLUMNS, rows[:count])
    write(2)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        write(200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["episodes.csv"]
    assert capsys.readouterr().err == "warning: File too large: the run directory was not written\n"
    write(200)
    assert [int(row["step"]) for row in rows_of(path)] == list(range(200))
    assert capsys.readouterr().err == ""


def test_a_cycle_that_was_interrupted_is_reported_whole(tmp_path, monkeypatch):
    """A checkpoint at step 1500 of a cycle that began at 1000 holds the training episodes that ended in between: they
    count for the cycle's means. The csv is written anew from all of them, whatever it held (here, half a line)."""
    rows = [["train", 1000, 0, 1.25, 2.0, 1000], ["eval", 1000, 0, 3.0, 4.0, 1000], ["train", 1200, 1, 5.0, 6.0, 900],
            ["train", 2000, 0, 9.0, 9.0, 800]]
    run, seen = tiny_run(2000), []
    run = run._replace(progress=run.progress._replace(completed=1000, simulated=4000, cost=30.0, acts=4, rows=rows),
                       actor=run.actor._replace(metrics=run.actor.metrics | {"charts/balance": np.float32([1.0, 3.0])}))
    path = tmp_path / "episodes.csv"
    path.write_text("split,step\ntrain,19")
    monkeypatch.setattr(spowl, "write_logs", lambda logs, values, step: seen.append((step, values)))
    bar = types.SimpleNamespace(set_postfix=lambda shown: seen.append(shown))
    after = spowl.report(types.SimpleNamespace(run_dir=tmp_path), bar, run, {"losses/total": 7.0})
    (step, values), shown = seen
    expected = {"losses/total": 7.0, "charts/episodic_return": 7.0, "charts/episodic_cost": 7.5,
                "charts/episodic_length": 850.0, "charts/cost_rate": 0.0075, "charts/balance": 0.5}
    assert step == 2000 and {tag: values[tag] for tag in expected} == expected
    assert set(values) - set(expected) == {tag for tag in run.actor.metrics if tag.startswith("planner/")}
    assert shown == {"balance": "50%", "return": "7.0", "cost": "8", "cost_rate": "0.0075"}
    assert [list(row.values()) for row in rows_of(path)] == [list(map(str, row)) for row in rows]
    assert after.progress.acts == 0 and not any(np.any(total) for total in after.actor.metrics.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["episodes.csv"]


# ----------------------------------------------------------------------------------------------------------------------
# Two processes in one directory
# ----------------------------------------------------------------------------------------------------------------------
def test_a_second_process_is_refused(tmp_path):
    """In one line, before it touches anything, be it the environments; once the first has ended, no longer."""
    args = small_args(runs_dir=str(tmp_path))
    directory = spowl.make_run_dir(args)
    first = spowl.open_logs(args, directory)
    (directory / "episodes.csv").write_text("as it is")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
    resumed = small_args(resume=str(directory))
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            spowl.learn(resumed, None, None, None, [])
        assert str(stop.value) == f"another process trains in {directory}"
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()} == before
    first.lock.close()
    spowl.open_logs(resumed, directory).lock.close()


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field, value", [
    ("obs", np.nan), ("next_obs", np.inf), ("reward", np.nan), ("cost", -np.inf), ("action", np.nan)])
def test_environment_numbers_are_watched(monkeypatch, field, value):
    """Named with their environment and step, before they reach the buffer."""
    args = small_args(num_envs=3, learning_starts=0 if field == "action" else 10_000)
    values = {"obs": np.zeros((3, 4)), "action": np.zeros((3, 2)), "reward": np.zeros(3), "cost": np.zeros(3),
              "next_obs": np.zeros((3, 4))}
    values[field][1:2] = value
    row = spowl.Transition(np.zeros((3, 4)), values["action"], values["reward"], values["cost"], values["next_obs"],
                           np.zeros(3), np.zeros(3))
    monkeypatch.setattr(spowl, "step_envs", lambda *_: (values["obs"], row, np.full((3, 4), 5.0)))
    monkeypatch.setattr(spowl, "act", lambda *_: (values["action"], None))
    first, buffer = np.zeros(3, int), spowl.init_buffer(args, 4, 2)
    progress = spowl.Progress(600, 0, 0, 0.0, 0, first, first == 0, np.zeros((3, 4)), [], 0.0)
    with pytest.raises(SystemExit) as stop:
        spowl.collect(args, None, spowl.Run(None, None, buffer, progress))
    name = {"obs": "observation", "next_obs": "observation"}.get(field, field)
    assert str(stop.value).startswith(f"{name} of environment 1 is not finite at step 615; ")
    assert not any(x.is_deleted() for x in buffer.rows)


def test_losses_and_parameters_are_watched(learn, tmp_path, monkeypatch):
    """In one line, and nothing is saved of what they are the end of."""
    def update(args, agent, buffer, num_updates):
        numbers = {"losses/total": math.nan, "losses/param_norm": math.inf, "lagrangian/lambda": 1e-6}
        return agent._replace(num_updates=agent.num_updates + num_updates), numbers | {
            tag: 1.0 for tag in numbers if agent.num_updates < 10}

    monkeypatch.setattr(spowl, "update_many", update)
    with pytest.raises(SystemExit) as stop:
        learn(updates_per_step=1.0, runs_dir=str(tmp_path))
    assert str(stop.value) == ("losses/param_norm, losses/total not finite at step 100; the last checkpoint stays as "
                               "it is")
    (directory,) = tmp_path.iterdir()
    (kept,) = spowl.checkpoints(directory)
    assert kept.name == "checkpoint_50.npz" and checkpoint(directory)[1]["['agent'].num_updates"] == 10


@pytest.mark.long
def test_losses_that_explode_end_a_run(place):
    """A step size that blows everything up: one line, exit status 1, nothing saved."""
    runs = place / "exploded"
    words = [sys.executable, SCRIPT, "--runs-dir", runs, *POINT, "--learning-rate", "1e30"]
    finished = subprocess.run([str(word) for word in words], cwd=place, env=environment(), capture_output=True,
                              text=True, timeout=600)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert "not finite at step 500" in last and "losses/" in last
    (directory,) = runs.iterdir()
    assert spowl.checkpoints(directory) == []


# ----------------------------------------------------------------------------------------------------------------------
# Stopping at once; a long time
# ----------------------------------------------------------------------------------------------------------------------
COMPUTING = """import jax
import jax.numpy as jnp
import spowl_continuous as spowl

def endless(args, stopping):
    spin = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2.0, jnp.cos, x)).lower(0.5).compile()
    print("computing", flush=True)
    spin(0.5).block_until_ready()

spowl.train = endless
spowl.main([])"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_first_signal_is_acknowledged_and_a_second_ctrl_c_ends_it_while_jax_computes(first):
    """Python gets control back only after a computation, here never."""
    process = subprocess.Popen([sys.executable, "-c", HEED_SIGNALS, sys.executable, "-c", COMPUTING],
                               cwd=Path(SCRIPT).parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = threading.Timer(60.0, process.kill)  # a line that never comes must not hang the tests
    limit.start()
    try:
        assert process.stdout.readline() == "computing\n"
        time.sleep(1.0)  # now it is
        process.send_signal(first)
        assert process.stderr.readline() == "\n" and process.stderr.readline().startswith("stopping after this step")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


def usage(pid):
    """Resident memory in MB and open files of a process."""
    with open(f"/proc/{pid}/status") as file:
        resident = next(line for line in file if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.long
def test_nothing_grows(place):
    """200,000 steps at tiny sizes: memory of the run and of its environments, and open files, stay level."""
    seen = []
    with open(place / "soak.stderr", "w") as errors:  # a pipe that nobody reads would fill
        process = start(place, "--runs-dir", place / "soak", *TINY, "--total-timesteps", 200_000, "--action-repeat", 25,
                        "--buffer-size", 400, "--eval-every", 10_000, "--eval-episodes", 2, stderr=errors)
        for line in process.stdout:
            if line.startswith("step "):
                seen.append([usage(process.pid), *map(usage, workers(process.pid))])
    assert process.wait() == 0 and len(seen) >= 19
    early, late = np.array(seen[4]), np.array(seen[-2])  # (processes, 2)
    print("memory in MB and open files after 50,000 and 190,000 steps", early.tolist(), late.tolist())
    assert np.all(late[:, 0] < 1.05 * early[:, 0] + 10) and np.all(late[:, 1] <= early[:, 1])
