"""A run that is stopped or killed, itself or one of its environments' processes, and resumed ends bit for bit where an
uninterrupted one ends, as the README promises.

The long ones: python -m pytest -q -m long tests"""
import os
import random
import signal
import time

import jax.numpy as jnp
import pytest
from test_envs import Dying, Hanging, Scripted, no_process, raised_in, scripted_train, threads, toy_agent
from test_faults import workers
from test_train import POINT, TINY, checkpoint, run, same_end, start, start_and_evaluate, train

import spowl_continuous as spowl

FLAGS = {"point": POINT + ["--eval-episodes", "1"], "ant": TINY + (
    "--env-id SafetyAntGoal1-v0 --total-timesteps 2500 --buffer-size 400 --eval-every 1000 --eval-episodes 1").split()}


# ----------------------------------------------------------------------------------------------------------------------
# On scripted environments
# ----------------------------------------------------------------------------------------------------------------------
MOMENTS = 2 * (5 + 3 + 5)  # agent steps, blocks of updates, and agent steps of the evaluation, twice
UPDATES = [0, 84, 167, 250]  # done after each block of a cycle's 10 agent steps x 25: at most 100, nearly equal


@pytest.fixture
def watched(scripted_train, monkeypatch, tmp_path):
    """watched(stop_at, ...) -> how many moments there were in a run in `run` of the working directory that is told to
    stop at that one (never: None). An update adds what is in the buffer, so it is not the same at another time."""
    monkeypatch.chdir(tmp_path)  # the same flags each time: compiled once
    start_envs, stopping, moments = spowl.start_envs, [], []

    def moment(stop_at):
        moments.append(1)
        stopping.extend([signal.SIGTERM] * (len(moments) == stop_at))

    def run(stop_at=None, **flags):
        def start_counted(*arguments):
            ask, *sizes = start_envs(*arguments)
            return lambda command, *values: (command == "step" and moment(stop_at), ask(command, *values))[1], *sizes

        def update(args, agent, buffer, num_updates):
            moment(stop_at)
            scale = 0.5 * agent.scale + jnp.sum(buffer.rows.action) + num_updates
            return agent._replace(num_updates=agent.num_updates + num_updates, scale=scale), {"losses/total": scale}

        monkeypatch.setattr(spowl, "start_envs", start_counted)
        monkeypatch.setattr(spowl, "update_many", update)
        stopping.clear(), moments.clear()
        try:
            scripted_train(stopping=stopping, updates_per_step=25.0, buffer_size=14, runs_dir=".", **flags)  # it wraps
        finally:
            for directory in tmp_path.glob("Scripted-*"):
                directory.rename("run")
        return len(moments)

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where an uninterrupted run is kept."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def uninterrupted(watched, kept, tmp_path):
    """The directory of a run that was not interrupted."""
    if not kept.exists():
        assert watched() == MOMENTS
        (tmp_path / "run").rename(kept)
    return kept


@pytest.mark.parametrize("moment", [1, 3, 5, 6, 8, 9, 12, 13, 14, 16, 18, 20, 21, 22, 25])
def test_stopped_at_any_moment(uninterrupted, watched, tmp_path, moment):
    """The first step and the last of each cycle, between two blocks of updates, during an evaluation: a checkpoint of
    that very step, and on it goes to the same end."""
    assert watched(moment) == moment
    counters, arrays = checkpoint(tmp_path / "run")
    cycle, within = divmod(moment - 1, MOMENTS // 2)
    assert counters["step"] == 50 * cycle + 10 * min(within + 1, 5) and counters["completed"] == 50 * (moment // 13)
    assert arrays["['agent'].num_updates"] == 250 * cycle + UPDATES[min(max(within - 4, 0), 3)]
    watched(resume="run")
    same_end(tmp_path / "run", uninterrupted)


def test_a_run_that_is_done_is_not_stopped(uninterrupted, watched, tmp_path, capfd):
    """Told at its very last moment, the last step of its last evaluation."""
    assert watched(MOMENTS) == MOMENTS and "--resume" not in capfd.readouterr().err
    same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("stream, failing, after, step, completed", [
    ("training", Scripted, 0, 0, 0), ("training", Dying, 12, 20, 0), ("training", Hanging, 32, 70, 50),
    ("evaluation", Dying, 12, 50, 0), ("evaluation", Scripted, 22, 100, 50)])
def test_after_a_failing_environment_it_goes_on_to_the_same_end(
        uninterrupted, watched, tmp_path, capfd, stream, failing, after, step, completed):
    """It raises, dies or gives no answer after so many steps: among random actions, among an agent's, in an evaluation.
    One line says where, one how to go on. No row is left of the agent step that failed."""
    envs = {f"{'eval_' * (stream == 'evaluation')}lives": [failing(22, fails_after=after), Scripted(12)]}
    reason = {Scripted: raised_in(Scripted.fail), Dying: "its process ended with exit code 3",
              Hanging: "no answer for 1.5 seconds"}[failing]
    with pytest.raises(ChildProcessError) as failure:
        watched(**envs, env_timeout=1.5)
    process = "0" if len(os.sched_getaffinity(0)) > 1 else "0, 1"  # the environments that died with it
    assert str(failure.value) == f"{stream} environment {process} of Scripted-v0 (seed 1): {reason}"
    (directory,) = tmp_path.iterdir()
    assert f"stopped at step {step}; go on with --resume Scripted-v0" in capfd.readouterr().err
    counters, arrays = checkpoint(directory)
    assert (counters["step"], counters["completed"]) == (step, completed)
    assert arrays["['buffer'].head"] == step // 10 % 7
    watched(resume="run")
    same_end(directory, uninterrupted)


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


def ended(process, directory, status, again="the same command"):
    """A run's step, once it has ended with that exit status and said how to go on, and what else it said last."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in stderr, stderr
    step = checkpoint(directory)[0]["step"]
    assert f"stopped at step {step:,}; go on with {again}\n" in stderr
    return step, stderr.splitlines()[-1]


@pytest.mark.long  # test_killed_after_its_last_checkpoint_but_one resumes one, the scripted ones at any moment
@pytest.mark.parametrize("task", FLAGS)
def test_killed_and_stopped_and_killed_and_finished(place, straight, task):
    """SIGTERM after the first evaluation, wherever the run then is; SIGKILL after the second, which leaves none of its
    processes: what came later is played again; Ant's environments lose a process; the last time nobody reads what is
    printed. It ends where the uninterrupted run does."""
    reference, runs = straight(task), place / f"{task}_interrupted"
    process = start_and_evaluate(place, "--runs-dir", runs, *FLAGS[task])
    process.send_signal(signal.SIGTERM)
    (directory,) = runs.iterdir()
    step, _ = ended(process, directory, 128 + signal.SIGTERM, f"--resume {directory}")
    assert 1000 <= step < 2000

    process = start_and_evaluate(place, "--resume", directory)
    process.kill()
    process.communicate(timeout=60)  # its processes have its standard output too: they died with it
    assert checkpoint(directory)[0]["completed"] == 2000

    if task == "ant":  # test_after_a_failing_environment has this for both kinds, scripted
        process = start(place, "--resume", directory)
        assert f"{directory}" in "".join(process.stdout.readline() for _ in range(2))
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        step, line = ended(process, directory, 1)
        assert 2000 <= step < 2500
        assert line.startswith("training environment 0") and line.endswith("exit code -9")

    process = start(place, "--resume", directory)
    assert f"{directory}" in "".join(process.stdout.readline() for _ in range(2))
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait() == 0 and "rror" not in stderr, stderr
    same_end(directory, reference.dir)


def interrupt_and_resume(place, reference, task, number, delay, choose):
    """After so many seconds send that signal, or kill a process of its environments (None); then resume if there is a
    checkpoint -> what happened."""
    runs = place / f"interrupted{len(list(place.iterdir()))}"
    process = start(place, "--runs-dir", runs, *FLAGS[task])
    time.sleep(delay)
    if number:
        process.send_signal(number)
    elif alive := workers(process.pid):
        os.kill(choose(alive), signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert "Traceback" not in stderr
    found = list(runs.iterdir()) if runs.exists() else []
    if not found or not list(found[0].glob("checkpoint_*.npz")):
        assert number == signal.SIGKILL or not found
        return "nothing to resume"
    over = number in (signal.SIGTERM, signal.SIGINT) and process.returncode == -number  # while Python itself was ending
    if process.returncode == 0 or over:
        same_end(found[0], reference.dir)
        return "was done before"
    if number != signal.SIGKILL:
        assert process.returncode == (128 + number if number else 1) and f"--resume {found[0]}" in stderr
    stopped_at = checkpoint(found[0])[0]["step"]
    if stopped_at < checkpoint(reference.dir)[0]["step"] or checkpoint(found[0])[0]["completed"] < stopped_at:
        run(place, "--resume", found[0])
    same_end(found[0], reference.dir)
    return f"resumed at {stopped_at}"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None],
                         ids=lambda number: getattr(number, "name", "an environment's process"))
@pytest.mark.parametrize("task", FLAGS)
def test_any_moment(place, straight, task, number):
    """Twenty random moments of a run for SIGKILL, to it or to a process of its environments, ten each for the signals
    that are heeded."""
    reference, rng = straight(task), random.Random(f"{task}{number}")
    began = time.time()
    train(place, *FLAGS[task])
    seconds = time.time() - began  # without what is compiled
    delays = [rng.uniform(0.3, 1.0) * seconds for _ in range(10 if number in (signal.SIGTERM, signal.SIGINT) else 20)]
    ends = [interrupt_and_resume(place, reference, task, number, delay, rng.choice) for delay in delays]
    print(task, number, ends)
    assert sum(end.startswith("resumed") for end in ends) >= len(ends) // 3
