"""What a run does when a process dies, the disk is full, a number is not finite, or it is told to stop at once.

The long ones: python -m pytest -q -m long tests"""
import os
import random
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
from test_train import HEED_SIGNALS, POINT, SCRIPT, TINY, checkpoint, environment, rows_of, start

import spowl_continuous as spowl


# ----------------------------------------------------------------------------------------------------------------------
# Processes that die
# ----------------------------------------------------------------------------------------------------------------------
def workers(pid):
    """Process numbers of a run's environments: its children that compute."""
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
            found.append(int(entry))
    return sorted(found)


def kill_workers(place, kills, total):
    """Train while environments are killed at random -> the run's directory, what it wrote to stderr."""
    runs, rng, killed = place / f"killed{kills}", random.Random(kills), 0
    with open(place / f"killed{kills}.stderr", "w+") as errors:  # a pipe that nobody reads would fill
        process = start(place, "--runs-dir", runs, *POINT, "--total-timesteps", total, "--buffer-size",
                        4 * total // 25, "--eval-every", 2 * total, stderr=errors)
        assert f"{runs}" in process.stdout.readline()
        while killed < kills and process.poll() is None:
            time.sleep(rng.uniform(0.5, 3.0))
            if alive := workers(process.pid):
                os.kill(rng.choice(alive), signal.SIGKILL)
                killed += 1
        process.communicate(timeout=1500)
        errors.seek(0)
        stderr = errors.read()
    assert process.returncode == 0, stderr
    (directory,) = runs.iterdir()
    return directory, stderr


def check_killed_run(directory, stderr, at_least):
    """Every failure was told, and no row of the buffer joins two episodes."""
    told = [line for line in stderr.splitlines() if "exit code -9; restarted in episode" in line]
    assert len(told) >= at_least and "Traceback" not in stderr
    counters, arrays = checkpoint(directory)
    rows = {field: arrays[f"['buffer'].rows.{field}"] for field in spowl.Transition._fields}
    ended = rows["done"][:-1] > 0
    assert np.array_equal((rows["obs"][1:] == rows["next_obs"][:-1]).all(-1), ~ended)
    lengths = [int(row["length"]) for row in rows_of(directory / "episodes.csv") if row["split"] == "train"]
    assert set(lengths) <= {1000}  # those cut short are not counted as episodes
    cut = int(ended.sum()) - len(lengths)
    # a process killed while it starts is told, and replaced in the same episode
    begun = {(words[2], words[-1]) for line in told if (words := line.split())[0] == "training"}
    assert 0 <= cut <= len(begun)
    assert np.sum(counters["episodes"]) == len(lengths) + len(begun)


def test_killed_workers_cost_their_episodes_only(place):
    check_killed_run(*kill_workers(place, kills=3, total=20_000), at_least=2)


def test_an_evaluation_is_played_again_where_a_process_dies(monkeypatch):
    """The same episodes come out as without the failure, and none of it is left of the first attempt."""
    args, step_envs, calls = small_args(), spowl.step_envs, []
    agent = spowl.init_agent(args, jax.random.key(0), 60, 2)
    envs = spowl.start_envs(args, 1, 2, start_method="spawn")

    def step(*arguments):
        calls.append(1)
        if len(calls) == 7:
            envs.processes[1].kill()
            envs.processes[1].join()
        return step_envs(*arguments)

    try:
        undisturbed, _ = spowl.evaluate(args, agent, envs, 2)
        monkeypatch.setattr(spowl, "step_envs", step)
        disturbed, _ = spowl.evaluate(args, agent, envs, 2)
    finally:
        spowl.close_envs(envs)
    assert len(calls) == 7 + 200 and len(envs.failures) == 1
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, disturbed, undisturbed)))
    assert [episode["length"] for episode in disturbed] == [1000] * 2
    assert [episode["played"].obs.shape for episode in disturbed] == [(200, 60)] * 2


@pytest.mark.long
def test_twenty_killed_workers(place):
    check_killed_run(*kill_workers(place, kills=20, total=400_000), at_least=18)


# ----------------------------------------------------------------------------------------------------------------------
# A disk that is full
# ----------------------------------------------------------------------------------------------------------------------
LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])"""


def test_training_goes_on_where_no_checkpoint_fits(place):
    """No file may grow beyond 40 kB: csv and logs fit, checkpoints do not. Warnings, no half-written file, exit 0."""
    runs = place / "full"
    words = [sys.executable, "-c", LIMITED, "40000", sys.executable, SCRIPT, "--runs-dir", runs, *POINT]
    variables = environment(place) | {"JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # none cut off
    finished = subprocess.run([str(word) for word in words], cwd=place, env=variables, capture_output=True, text=True,
                              timeout=600)
    (directory,) = runs.iterdir()
    warnings = [line for line in finished.stderr.splitlines() if line.startswith("warning: File too large")]
    assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
    assert len(warnings) == 3 and all("training goes on" in line for line in warnings)
    assert sorted(path.suffix for path in directory.iterdir() if "tfevents" not in path.name) == [".csv", ".json"]
    assert len(rows_of(directory / "episodes.csv")) == 2 + 6


def tiny_state(args):
    agent = spowl.init_agent(args, jax.random.key(0), 3, 2)
    return agent, spowl.init_actor(args, jax.random.key(1), 2), spowl.init_buffer(args, 3, 2)


def test_a_failed_checkpoint_leaves_the_older_ones(tmp_path, monkeypatch, capsys):
    """Half the file is written when the disk is full: what was there stays as it was, to the byte."""
    state = tiny_state(small_args())
    for step in (100, 200):
        spowl.save_checkpoint(tmp_path, *state, {"step": step})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file, **arrays):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert not spowl.attempt(spowl.save_checkpoint, tmp_path, *state, {"step": 300})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert capsys.readouterr().err == "warning: No space left on device: the run directory; training goes on\n"


def test_the_last_two_checkpoints_are_kept(tmp_path):
    state = tiny_state(small_args())
    for step in (5, 900, 1000, 20_000):
        spowl.save_checkpoint(tmp_path, *state, {"step": step})
        assert spowl.checkpoints(tmp_path)[-1].name == f"checkpoint_{step}.npz"
    assert [path.name for path in spowl.checkpoints(tmp_path)] == ["checkpoint_1000.npz", "checkpoint_20000.npz"]


def test_episodes_are_written_whole_or_not_at_all(tmp_path):
    """A csv that cannot grow keeps its lines, and takes the missing ones later."""
    path, rows = tmp_path / "episodes.csv", [["train", step, 0, 1.5, 2.0, 1000] for step in range(200)]
    spowl.append_episodes(path, rows[:2])
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        with pytest.raises(OSError):
            spowl.append_episodes(path, rows[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    spowl.append_episodes(path, rows[2:])
    assert [int(row["step"]) for row in rows_of(path)] == list(range(200))


def test_trimming_drops_what_is_played_again_and_half_a_line(tmp_path):
    """A checkpoint at step 1500 of a cycle that began at 1000: later episodes and evaluations go, the rows of the
    unfinished cycle come back."""
    path = tmp_path / "episodes.csv"
    spowl.append_episodes(path, [["train", 1000, 0, 1.25, 2.0, 1000], ["eval", 1000, 0, 3.0, 4.0, 1000],
                                 ["train", 1200, 1, 5.0, 6.0, 1000], ["eval", 1500, 0, 7.0, 8.0, 1000],
                                 ["train", 1800, 1, 9.0, 9.0, 1000]])
    with open(path, "a") as file:
        file.write("train,19")
    assert spowl.trim_episodes(path, 1500, 1000) == [["train", 1200, 1, 5.0, 6.0, 1000]]
    assert [(row["split"], row["step"]) for row in rows_of(path)] == [("train", "1000"), ("eval", "1000"),
                                                                      ("train", "1200")]
    assert path.read_text().startswith("split,step,environment,return,cost,length")
    assert [entry.name for entry in tmp_path.iterdir()] == ["episodes.csv"]


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
    transition = spowl.Transition(np.zeros((3, 4)), values["action"], values["reward"], values["cost"],
                                  values["next_obs"], np.zeros(3), np.zeros(3))
    step = spowl.EnvStep(values["obs"], transition, np.full(3, 5), np.zeros(3, int))
    monkeypatch.setattr(spowl, "step_envs", lambda *_: step)
    monkeypatch.setattr(spowl, "act", lambda *_: (values["action"], None))
    first, totals, obs = np.zeros(3, int), np.zeros((3, 3)), np.zeros((3, 4))
    progress = spowl.Progress(600, 0, 0, 0.0, 0, first, totals, [[], [], []], obs, 0.0)
    with pytest.raises(SystemExit) as stop:
        spowl.collect(args, types.SimpleNamespace(action_dim=2), None, None, None, progress)
    name = {"obs": "observation", "next_obs": "observation"}.get(field, field)
    assert str(stop.value).startswith(f"{name} of environment 1 is not finite at step 6")


def test_losses_and_parameters_are_watched(place):
    """A step size that blows everything up: one line, exit status 1, nothing saved."""
    runs = place / "exploded"
    words = [sys.executable, SCRIPT, "--runs-dir", runs, *POINT, "--learning-rate", "1e30"]
    finished = subprocess.run([str(word) for word in words], cwd=place, env=environment(place), capture_output=True,
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
