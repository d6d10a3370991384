"""A run that is stopped or killed and resumed ends bit for bit where an uninterrupted one ends, as the README promises.

The long ones: python -m pytest -q -m long tests"""
import os
import random
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_envs import scripted_envs, toy_agent
from test_faults import learn
from test_train import POINT, SCRIPT, TINY, checkpoint, command, one_line, run, start, start_and_evaluate, train

import spowl_continuous as spowl

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ANT = TINY + ("--env-id SafetyAntGoal1-v0 --total-timesteps 2000 --buffer-size 400 --eval-every 500 --eval-episodes 1"
              ).split()
FLAGS = {"point": POINT + ["--eval-every", "500"], "ant": ANT}


def same_end(one, other):
    """Whether two runs ended at the same agent, actor, buffer, counters and episodes."""
    (counters, arrays), (other_counters, other_arrays) = checkpoint(one), checkpoint(other)
    counters.pop("wall_time"), other_counters.pop("wall_time")
    unequal = [name for name in arrays if not np.array_equal(arrays[name], other_arrays[name], equal_nan=True)]
    assert arrays.keys() == other_arrays.keys() and unequal == []
    assert counters == other_counters
    assert (one / "episodes.csv").read_text() == (other / "episodes.csv").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# On scripted environments
# ----------------------------------------------------------------------------------------------------------------------
MOMENTS = 2 * (5 + 3 + 5)  # agent steps, updates, and agent steps of the evaluation, twice


@pytest.fixture
def watched(learn, monkeypatch):
    """watched(stop_at, ...) -> the run's directory, after `learn` with that moment told to stop (never: None), and how
    many moments there were. An update adds what is in the buffer, so it is not the same at another time."""
    def update(args, agent, buffer, num_updates):
        scale = 0.5 * agent.scale + jnp.sum(buffer.rows.action) + num_updates
        return agent._replace(num_updates=agent.num_updates + num_updates, scale=scale), {"losses/total": scale}

    step_envs = spowl.step_envs

    def run(stop_at, runs_dir, **flags):
        moments, stopping = [], []

        def counted(function):
            def wrapped(*arguments):
                moments.append(1)
                stopping.extend([signal.SIGTERM] * (len(moments) == stop_at))
                return function(*arguments)
            return wrapped

        monkeypatch.setattr(spowl, "step_envs", counted(step_envs))
        monkeypatch.setattr(spowl, "update_many", counted(update))
        learn(stopping=stopping, updates_per_step=3.0, buffer_size=14, runs_dir=str(runs_dir), **flags)  # it wraps
        (directory,) = runs_dir.iterdir()
        return directory, len(moments)

    return run


@pytest.mark.parametrize("moment", [1, 3, 5, 6, 8, 9, 13, 14, 16, 18, 20, 21, 22, MOMENTS])
def test_stopped_at_any_moment(watched, tmp_path, moment):
    """The first step and the last of each cycle, between two updates, during an evaluation: a checkpoint of that very
    step, and on it goes to the same end."""
    straight, moments = watched(None, tmp_path / "straight")
    assert moments == MOMENTS
    stopped, moments = watched(moment, tmp_path / "stopped")
    assert moments == moment
    counters, arrays = checkpoint(stopped)
    cycle, within = divmod(moment - 1, MOMENTS // 2)
    assert counters["step"] == 50 * cycle + 10 * min(within + 1, 5) and counters["completed"] == 50 * cycle
    assert arrays["['agent'].num_updates"] == 30 * cycle + 10 * min(max(within - 4, 0), 3)
    watched(None, tmp_path / "stopped", resume=str(stopped))
    same_end(stopped, straight)


# ----------------------------------------------------------------------------------------------------------------------
# On real ones
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def straight(place):
    """Task -> an uninterrupted run, which also compiles what the others need."""
    made = {}

    def get(task):
        if task not in made:
            made[task] = train(place, *FLAGS[task])
        return made[task]

    return get


@pytest.mark.parametrize("task", ["point", pytest.param("ant", marks=pytest.mark.long)])
def test_stopped_then_killed_then_finished(place, straight, task):
    """SIGTERM shortly after the first evaluation, wherever the run then is: a checkpoint of that very step. It goes on
    until SIGKILL, to the whole group, after the second: what came later is played again. While a process is there, be
    it halted, no other goes on with its run; once it is dead, one does, to the same end."""
    reference, runs = straight(task), place / f"{task}_interrupted"
    process = start_and_evaluate(place, "--runs-dir", runs, *FLAGS[task])
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    (directory,) = runs.iterdir()
    assert process.returncode == 143 and "Traceback" not in stderr and f"--resume {directory}" in stderr
    stopped_at = checkpoint(directory)[0]["step"]

    process = start_and_evaluate(place, "--resume", directory)
    os.killpg(process.pid, signal.SIGSTOP)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    one_line(command(place, SCRIPT, "--resume", directory), f"another process trains in {directory}")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before and "episodes.csv" in before
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert stopped_at < checkpoint(directory)[0]["step"] < checkpoint(reference.dir)[0]["step"]
    run(place, "--resume", directory)
    same_end(directory, reference.dir)


def interrupt_and_resume(place, reference, task, number, delay):
    """Send that signal after so many seconds, resume if there is a checkpoint, begin anew if not -> what happened."""
    runs = place / f"interrupted{len(list(place.iterdir()))}"
    process = start(place, "--runs-dir", runs, *FLAGS[task])
    time.sleep(delay)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert "Traceback" not in stderr
    found = list(runs.iterdir()) if runs.exists() else []
    if not found or not list(found[0].glob("checkpoint_*.npz")):
        assert number == signal.SIGKILL or not found
        return "nothing to resume"
    ended = process.returncode == -number and number != signal.SIGKILL  # while Python itself was ending
    if process.returncode == 0 or ended:
        same_end(found[0], reference.dir)
        return "was done before"
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and f"--resume {found[0]}" in stderr
    stopped_at = checkpoint(found[0])[0]["step"]
    if stopped_at < checkpoint(reference.dir)[0]["step"] or checkpoint(found[0])[0]["completed"] < stopped_at:
        run(place, "--resume", found[0])
    same_end(found[0], reference.dir)
    return f"resumed at {stopped_at}"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("task", FLAGS)
def test_any_moment(place, straight, task, number):
    """Twenty random moments of a run for SIGKILL, ten each for the signals that are heeded."""
    reference, rng = straight(task), random.Random(f"{task}{number}")
    began = time.time()
    train(place, *FLAGS[task])
    seconds = time.time() - began  # without what is compiled
    delays = [rng.uniform(0.3, 1.0) * seconds for _ in range(20 if number == signal.SIGKILL else 10)]
    ends = [interrupt_and_resume(place, reference, task, number, delay) for delay in delays]
    print(task, number.name, ends)
    assert sum(end.startswith("resumed") for end in ends) >= len(ends) // 3
