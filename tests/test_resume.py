"""A run that is stopped or killed and resumed ends bit for bit where an uninterrupted one ends, as the README promises.

The long ones: python -m pytest -q -m long tests"""
import os
import random
import signal
import time

import numpy as np
import pytest
from test_train import POINT, TINY, checkpoint, run, start, start_and_evaluate, train

ANT = TINY + ("--env-id SafetyAntGoal1-v0 --total-timesteps 2000 --buffer-size 400 --eval-every 500 --eval-episodes 1"
              ).split()
FLAGS = {"point": POINT, "ant": ANT}


@pytest.fixture(scope="session")
def straight(place):
    """Task -> an uninterrupted run, and how long it took without what it compiled."""
    made = {}

    def get(task):
        if task not in made:
            train(place, *FLAGS[task])  # compiles
            began = time.time()
            made[task] = train(place, *FLAGS[task]), time.time() - began
        return made[task]

    return get


def same_end(one, other):
    """Whether two runs ended at the same agent, actor, buffer, counters and episodes."""
    (counters, arrays), (other_counters, other_arrays) = checkpoint(one), checkpoint(other)
    counters.pop("wall_time"), other_counters.pop("wall_time")
    unequal = [name for name in arrays if not np.array_equal(arrays[name], other_arrays[name], equal_nan=True)]
    assert arrays.keys() == other_arrays.keys() and unequal == []
    assert counters == other_counters
    assert (one / "episodes.csv").read_text() == (other / "episodes.csv").read_text()


def interrupt_and_resume(place, straight, task, number, delay):
    """Send that signal after so many seconds, resume if there is a checkpoint, begin anew if not -> what happened."""
    reference, _ = straight(task)
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


@pytest.mark.parametrize("task", FLAGS)
def test_stopped_between_checkpoints_and_resumed(place, straight, task):
    """SIGTERM shortly after an evaluation, wherever the run then is: a checkpoint of that very step, the same end."""
    runs = place / f"{task}_stopped"
    process = start_and_evaluate(place, "--runs-dir", runs, *FLAGS[task])
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    (directory,) = runs.iterdir()
    assert process.returncode == 143 and "Traceback" not in stderr and f"--resume {directory}" in stderr
    counters, _ = checkpoint(directory)
    run(place, "--resume", directory)
    same_end(directory, straight(task)[0].dir)
    assert counters["step"] < checkpoint(directory)[0]["step"]


@pytest.mark.parametrize("task", FLAGS)
def test_killed_after_a_checkpoint_and_resumed(place, straight, task):
    """SIGKILL to the whole group after the first evaluation: what came later is played again."""
    runs = place / f"{task}_killed"
    process = start_and_evaluate(place, "--runs-dir", runs, *FLAGS[task])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (directory,) = runs.iterdir()
    run(place, "--resume", directory)
    same_end(directory, straight(task)[0].dir)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("task", FLAGS)
def test_any_moment(place, straight, task, number):
    """Twenty random moments of a run for SIGKILL, ten each for the signals that are heeded."""
    _, seconds = straight(task)
    rng = random.Random(f"{task}{number}")
    delays = [rng.uniform(0.3, 1.0) * seconds for _ in range(20 if number == signal.SIGKILL else 10)]
    ends = [interrupt_and_resume(place, straight, task, number, delay) for delay in delays]
    print(task, number.name, ends)
    assert sum(end.startswith("resumed") for end in ends) >= len(ends) // 3
