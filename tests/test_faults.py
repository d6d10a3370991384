"""What a run does when the disk is full, nobody reads what it prints, a number is not finite, or it is told to stop.

The long ones: python -m pytest -q -m long tests"""
import contextlib
import io
import json
import math
import os
import re
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
from conftest import run_of, small_args
from test_envs import Scripted, no_process, scripted_train, threads, toy_agent
from tensorboard.summary.writer.record_writer import RecordWriter
from test_train import HEED_SIGNALS, POINT, SCRIPT, TINY, Wandb, checkpoint, environment, rows_of, start

import spowl_continuous as spowl


# ----------------------------------------------------------------------------------------------------------------------
# On scripted environments
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def scripted_main(scripted_train, monkeypatch):
    """scripted_main(signals, **flags) runs `main`, which trains as `scripted_train` does -> exit status. Signals are
    (function, step, number): sent when that function is called with a run at that step."""
    train, handlers, ever = spowl.train, {}, {}

    def handle(number, handler):
        before, handlers[number] = handlers.get(number), handler
        ever.setdefault(number, []).append(handler)
        return before

    def run(signals=(), hangup=signal.SIG_DFL, program="__main__", **flags):
        def train_once(args, stopping):
            patch.setattr(spowl, "train", train)
            return scripted_train(stopping=stopping, **flags)

        def sending(name, function):
            def wrapped(*arguments):
                for where, step, number in signals:
                    if (where, step) == (name, arguments[-1].step):
                        handlers[number](number, None)
                return function(*arguments)
            return wrapped

        with monkeypatch.context() as patch:
            for name, value in {"parse_args": lambda argv: small_args(), "train": train_once}.items():
                patch.setattr(spowl, name, value)
            for name in {name for name, *_ in signals}:
                patch.setattr(spowl, name, sending(name, getattr(spowl, name)))
            patch.setattr(signal, "signal", handle)
            patch.setattr(signal, "getsignal", lambda number: hangup)  # these tests may themselves run under nohup
            patch.setattr(spowl, "__name__", program)
            if program == "__main__":
                patch.setattr(os, "_exit", sys.exit)
            try:
                spowl.main([])
            except SystemExit as end:
                return end.code
        return 0

    run.handlers, run.ever = handlers, ever
    return run


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize("signals, status, step", [
    ([("collect", 20, TERM)], 143, 30), ([("collect", 70, INT)], 130, 80),
    ([("collect", 70, TERM), ("collect", 70, TERM)], 143, 80), ([("save_checkpoint", 50, TERM)], 143, 50),
    ([("collect", 70, TERM), ("save_checkpoint", 80, TERM)], 143, 80), ([("save_checkpoint", 100, TERM)], 0, 100),
    ([("collect", 20, HUP)], 129, 30)])
def test_signals_end_a_run_with_a_checkpoint(scripted_main, tmp_path, capfd, signals, status, step):
    """Before an evaluation, after it, while saving; the same one again changes nothing. A run that is done is done.
    Ctrl-C ends it at once only after another Ctrl-C."""
    assert scripted_main(signals, runs_dir=str(tmp_path)) == status
    (directory,) = tmp_path.iterdir()
    stderr = capfd.readouterr().err
    counters = checkpoint(directory)[0]
    assert counters["step"] == step and counters["wall_time"] > 0 and "stopping after this step; Ctrl-C once" in stderr
    assert (f"stopped at step {step}; go on with --resume {directory}\n" in stderr) == (status != 0)
    heed, interrupted = scripted_main.ever[TERM][0], any(number == INT for *_, number in signals)
    assert callable(heed)
    assert scripted_main.ever == {  # in the end what it was
        INT: [heed] + [signal.SIG_DFL] * interrupted + [signal.SIG_DFL], TERM: [heed, signal.SIG_DFL],
        HUP: [heed, signal.SIG_DFL]}


@pytest.mark.parametrize("program, at_once", [
    ("__main__", signal.SIG_DFL), ("spowl_continuous", signal.default_int_handler)])
def test_signals_end_an_evaluation_at_once(monkeypatch, program, at_once):
    """It has nothing to save."""
    asked = []
    for name, value in {"parse_args": lambda argv: small_args(evaluate="run"), "evaluate_run": lambda args: [1],
                        "__name__": program}.items():
        monkeypatch.setattr(spowl, name, value)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, handler: asked.append((number, handler)))
    spowl.main([])
    assert asked[:3] == [(number, at_once) for number in spowl.STOPS] and len(asked) == 6


def test_a_hangup_that_is_ignored_stays_so(scripted_main, tmp_path):
    """nohup has it ignored."""
    assert scripted_main(hangup=signal.SIG_IGN, runs_dir=str(tmp_path)) == 0 and HUP not in scripted_main.ever


@pytest.mark.parametrize("signals, status, second", [
    ([("collect", 20, TERM)], 143, []), ([("collect", 70, INT)], 130, [signal.default_int_handler])])
def test_a_guest_keeps_its_interpreter(scripted_main, tmp_path, monkeypatch, signals, status, second):
    """Where another program calls `main`: SystemExit, which it may catch; a second Ctrl-C is KeyboardInterrupt; its
    handlers are back at the end."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("the interpreter is not ours"))
    mine = lambda number, frame: None
    scripted_main.handlers.update({INT: mine, TERM: signal.SIG_IGN})
    hook = threading.excepthook
    assert scripted_main(signals, program="spowl_continuous", runs_dir=str(tmp_path)) == status
    heed = scripted_main.ever[INT][0]
    assert scripted_main.ever == {INT: [heed, *second, mine], TERM: [heed, signal.SIG_IGN],
                                  HUP: [heed, signal.SIG_DFL]} and threading.excepthook is hook


def test_a_run_whose_last_agent_step_is_cut_short_is_evaluated_and_saved(scripted_train, tmp_path):
    """95 steps are no multiple of the 10 that an agent step of all takes: the run ends after 100."""
    assert len(scripted_train(total_timesteps=95, runs_dir=str(tmp_path))) == 2
    (directory,) = tmp_path.iterdir()
    assert checkpoint(directory)[0]["completed"] == 100
    rows = rows_of(directory / "episodes.csv")
    assert [row["step"] for row in rows if row["split"] == "eval"] == ["50"] * 2 + ["100"] * 2


def test_a_resumed_run_that_is_stopped_again_says_how_it_was_going_on(scripted_train, tmp_path, capfd):
    """Flags that a resumed run was given stand in no file. At its end it is refused."""
    scripted_train(runs_dir=str(tmp_path))
    (directory,) = tmp_path.iterdir()
    capfd.readouterr()
    assert scripted_train(resume=str(directory), total_timesteps=200, eval_every=100, stopping=[15]) == []
    assert "stopped at step 100; go on with the same command\n" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="is at step 100 already: raise --total-timesteps"):
        scripted_train(resume=str(directory))


def test_every_evaluation_is_filmed(scripted_train, threads, tmp_path, monkeypatch):
    """Its first episode, once the checkpoint is there: a picture after each of five agent steps but the last, when the
    next episode has begun. In the end no simulator is left."""
    made, saved = [], lambda path: (path.parent.parent / f"checkpoint_{path.stem}.npz").exists()
    monkeypatch.setattr(spowl, "write_video", lambda path, frames: made.append((path.name, len(frames), saved(path))))
    scripted_train(capture_video=True, runs_dir=str(tmp_path))
    assert made == [("50.mp4", 4, True), ("100.mp4", 4, True)]
    assert not any(thread.is_alive() for thread in threads.started)


def test_a_run_stopped_before_its_first_step_can_be_evaluated(scripted_train, threads, tmp_path, capsys):
    scripted_train(runs_dir=str(tmp_path), stopping=[15])
    (directory,) = tmp_path.iterdir()
    threads.lives = {1: [Scripted(22), Scripted(12)]}
    args = small_args(env_id="Scripted-v0", eval_episodes=2, evaluate=str(directory))
    assert [episode["length"] for episode in spowl.evaluate_run(args)] == [22, 12]
    said = capsys.readouterr().out.splitlines()
    assert re.match(r"step 0: return .* cost rate 0\.0000,", next(line for line in said if line.startswith("step ")))


def test_weights_and_biases_gets_all_of_a_stopped_run(scripted_train, tmp_path, monkeypatch):
    """Closed before the process leaves at once."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    scripted_train(runs_dir=str(tmp_path), track=True, stopping=[15])
    assert wandb.finished == [True]


# ----------------------------------------------------------------------------------------------------------------------
# A disk that is full
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["episodes.csv", "events.*", "checkpoint.tmp"])
def test_a_full_disk_ends_a_run(scripted_main, scripted_train, tmp_path, monkeypatch, name):
    """From its first checkpoint on there is no room for that file: a line, exit status 1, and the checkpoint stays.
    Once there is room the run goes on to its end."""
    save, hooked = spowl.save_checkpoint, []

    def save_and_fill(run_dir, run):
        save(run_dir, run)
        for path in list(run_dir.glob(name)) or [run_dir / name]:
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(spowl, "save_checkpoint", save_and_fill)
        patch.setattr(threading, "excepthook", hooked.append)  # it prints tracebacks
        status = scripted_main(runs_dir=str(tmp_path))
    assert re.fullmatch(r".*No space left on device.*; the last checkpoint stays", status) and not hooked
    (directory,) = tmp_path.iterdir()
    assert [path.name for path in spowl.checkpoints(directory)] == ["checkpoint_50.npz"]
    for path in directory.glob(name):
        path.unlink()
    assert [episode["length"] for episode in scripted_train(resume=str(directory))] == [22, 12]
    rows = [tuple(row.values()) for row in rows_of(directory / "episodes.csv")]
    assert [row[1:] for row in rows if row[0] == "eval"] == [
        (step, *row) for step in ("50", "100") for row in (("0", "22.0", "5.5", "22"), ("1", "12.0", "3.0", "12"))]
    assert [(row[1], row[2]) for row in rows if row[0] == "train"] == [  # after 5, 3, 3, 3 and 5 agent steps
        ("30", "1"), ("50", "0"), ("60", "1"), ("90", "1"), ("100", "0")]


def test_a_disk_that_was_full_for_a_moment_ends_a_run(scripted_main, tmp_path, monkeypatch):
    """TensorBoard's thread dies of it and may not say so: one line, exit status 1, even where it was the last write."""
    write, written, full_at = RecordWriter.write, [], []

    def watched(writer, data):
        written.append(data)
        if [len(written)] == full_at:
            raise OSError(28, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", watched)
    assert scripted_main(runs_dir=str(tmp_path / "in peace")) == 0
    for number in (len(written) - 3, len(written)):
        written.clear()
        full_at[:] = [number]
        status = scripted_main(runs_dir=str(tmp_path / str(number)))
        assert status == "[Errno 28] No space left on device; the last checkpoint stays"


def test_a_directory_that_is_gone_ends_a_run(scripted_main, tmp_path, monkeypatch):
    """Moved after its first checkpoint, which is still there: one line at the next write."""
    save = spowl.save_checkpoint

    def save_and_move(run_dir, run):
        save(run_dir, run)
        run_dir.rename(tmp_path / "moved")

    monkeypatch.setattr(spowl, "save_checkpoint", save_and_move)
    status = scripted_main(runs_dir=str(tmp_path))
    assert status.endswith(" is gone; if it was moved, go on with --resume and its new place") and "\n" not in status
    monkeypatch.undo()
    assert [path.name for path in spowl.checkpoints(tmp_path / "moved")] == ["checkpoint_50.npz"]


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1152921504606846976 bytes.\nmore")])
def test_memory_that_is_full_ends_a_run(scripted_main, tmp_path, monkeypatch, error):
    """The simulator's machine or the accelerator: one line."""
    monkeypatch.setattr(spowl, "update_many", lambda *_: (_ for _ in ()).throw(error))
    status = scripted_main(runs_dir=str(tmp_path), updates_per_step=1.0)
    assert re.fullmatch(r"the memory is full \((of this machine|RESOURCE_EXHAUSTED: .*)\): choose smaller.*", status)


def test_a_stop_that_could_not_be_saved_does_not_say_how_to_go_on(scripted_main, tmp_path, monkeypatch, capfd):
    """Its checkpoint is older, or none."""
    monkeypatch.setattr(np, "savez", lambda file, **arrays: open("/nowhere/at/all"))
    status = scripted_main([("collect", 20, TERM)], runs_dir=str(tmp_path))
    assert status.startswith("[Errno 2] No such file or directory: '/nowhere/at/all'")
    assert "--resume" not in capfd.readouterr().err


LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])"""


@pytest.mark.long
def test_a_run_ends_where_no_checkpoint_fits(place):
    """No file may grow beyond 40 kB: csv and logs fit, checkpoints do not. One line, exit status 1, no checkpoint."""
    runs = place / "full"
    words = [sys.executable, "-c", LIMITED, "40000", sys.executable, SCRIPT, "--runs-dir", runs, *POINT]
    variables = environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # none cut off
    finished = subprocess.run([str(word) for word in words], cwd=place, env=variables, capture_output=True, text=True,
                              timeout=600)
    (directory,) = runs.iterdir()
    assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert finished.stderr.splitlines()[-1] == "[Errno 27] File too large; the last checkpoint stays"
    assert spowl.checkpoints(directory) == [] and len(rows_of(directory / "episodes.csv")) == 2


def tiny_run(step, **changes):
    """A run at that step, of next to nothing."""
    args, nothing = small_args(), dict.fromkeys(spowl.AgentState._fields)
    agent = spowl.AgentState(**nothing | {"key": jax.random.key(0), "scale": np.float32(step)})
    actor, buffer = spowl.init_actor(args, jax.random.key(1), 2), spowl.init_buffer(args, 3, 2)
    return run_of(spowl, args, agent, actor, buffer, step)._replace(**changes)


class Killed(BaseException):
    """Nothing of the script runs after it, as after SIGKILL."""


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), Killed()], ids=["full", "killed"])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch, end):
    """Half the file is written: what was there stays as it was, to the byte, and the next one leaves nothing of it."""
    for step in (100, 200):
        spowl.save_checkpoint(tmp_path, tiny_run(step))
    contents = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".tmp"}
    assert sorted(before := contents()) == ["checkpoint_100.npz", "checkpoint_200.npz"]

    def half(file, **arrays):
        file.write(b"x" * 1000)
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        for step in (300, 200):  # another one, and the newest once more
            with pytest.raises(type(end)):
                spowl.save_checkpoint(tmp_path, tiny_run(step))
            assert contents() == before and spowl.checkpoints(tmp_path)[-1].name == "checkpoint_200.npz"
    spowl.save_checkpoint(tmp_path, tiny_run(300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_200.npz", "checkpoint_300.npz"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("named") or rename(*paths))
    spowl.save_checkpoint(tmp_path, tiny_run(5))
    assert done == [(tmp_path / "checkpoint_5.npz").stat().st_size, "named"]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    (tmp_path / "checkpoint_100000_best.npz").touch()
    for step in (5, 900, 1000, 20_000):
        spowl.save_checkpoint(tmp_path, tiny_run(step))
        assert spowl.checkpoints(tmp_path)[-1].name == f"checkpoint_{step}.npz"
    assert [path.name for path in spowl.checkpoints(tmp_path)] == ["checkpoint_1000.npz", "checkpoint_20000.npz"]
    assert len(list(tmp_path.iterdir())) == 3  # a copy by another name is none of them


def test_a_cycle_that_was_interrupted_is_reported_whole(tmp_path):
    """A checkpoint at step 1500 of a cycle that began at 1000 holds the training episodes that ended in between: they
    count for the cycle's means. The csv is written anew from all of them, whatever it held (here, half a line)."""
    rows = [["train", 1000, 0, 1.25, 2.0, 1000], ["eval", 1000, 0, 3.0, 4.0, 1000], ["train", 1200, 1, 5.0, 6.0, 900],
            ["train", 2000, 0, 9.0, 9.0, 800]]
    args = small_args(total_timesteps=5000, learning_starts=1000, eval_every=3000, action_repeat=125)  # 4 agent steps
    run, seen = tiny_run(2000, completed=1000, simulated=4000, cost=30.0, rows=rows, wall_time=10.0), []
    run = run._replace(actor=run.actor._replace(metrics=run.actor.metrics | {"charts/balance": np.float32([1.0, 3.0])}))
    path = tmp_path / "episodes.csv"
    path.write_text("split,step\ntrain,19")
    writer = types.SimpleNamespace(add_scalar=lambda *values: seen.append(values), flush=lambda: seen.append("flush"))
    bar = types.SimpleNamespace(set_postfix=lambda shown, refresh: seen.append(shown))
    after, episodes = spowl.end_cycle(args, None, tmp_path, writer, run, {"losses/total": 7.0}, bar, ())
    *scalars, flushed, shown = seen
    expected = {"losses/total": 7.0, "charts/episodic_return": 7.0, "charts/episodic_cost": 7.5, "charts/SPS": 200.0,
                "charts/episodic_length": 850.0, "charts/cost_rate": 0.0075, "charts/balance": 0.5}
    values = {tag: value for tag, value, _ in scalars}
    assert flushed == "flush" and {step for *_, step in scalars} == {2000} and expected.items() <= values.items()
    assert values.keys() - expected == {tag for tag in run.actor.metrics if tag.startswith("planner/")}
    assert shown == {"SPS": "200", "balance": "0.5", "cost_rate": "0.0075", "episodic_cost": "7.5",
                     "episodic_length": "850", "episodic_return": "7"}
    assert [list(row.values()) for row in rows_of(path)] == [list(map(str, row)) for row in rows]
    assert (after.completed, episodes) == (2000, []) and not any(map(np.any, after.actor.metrics.values()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["episodes.csv"]


# ----------------------------------------------------------------------------------------------------------------------
# Two processes in one directory
# ----------------------------------------------------------------------------------------------------------------------
def test_two_runs_of_one_name_in_one_second(tmp_path, monkeypatch):
    """Each has a directory of its own, also where both look before either makes it."""
    monkeypatch.setattr(spowl.time, "time", lambda: 1795.5)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            spowl.open_run_dir(small_args(env_id="Task-v0", exp_name="name", runs_dir=str(tmp_path)), stack)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"Task-v0__name__1__{1795 + k}" for k in range(3)]


def test_a_second_process_is_refused(scripted_train, tmp_path, monkeypatch):
    """In one line, before it reads or changes anything; once the first has ended, no longer."""
    scripted_train(runs_dir=str(tmp_path), stopping=[15])
    (directory,) = tmp_path.iterdir()
    contents = lambda: {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
    with contextlib.ExitStack() as first:
        spowl.hold(directory, first)
        (directory / "episodes.csv").write_text("as it is")
        before = contents()
        for _ in range(2):
            with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
                patch.setattr(spowl, "load_checkpoint", None)
                scripted_train(resume=str(directory))
            assert str(stop.value) == f"another process trains in {directory}" and contents() == before
    assert len(scripted_train(resume=str(directory))) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Output that nobody reads
# ----------------------------------------------------------------------------------------------------------------------
SPEAKING = """import json, os, sys
import spowl_continuous as spowl

def speak(args, stopping):
    with spowl.tqdm(total=100, mininterval=0.0) as bar:
        for line in range(100):
            print(100 * ".", "said", line)
            print(100 * ".", "told", line, file=sys.stderr)
            bar.write("\u00b1")
            bar.update()
    return [True]

args, statuses = spowl.parse_args([]), {}
spowl.train, spowl.parse_args = speak, lambda argv: args
for name, number in (("stdout", 1), ("stderr", 2)):
    for kind in ("pipe", "full", "closed"):
        if child := os.fork():
            statuses[f"{name} {kind}"] = os.waitpid(child, 0)[1]
            continue
        os.dup2(os.open(f"{name} {kind}", os.O_CREAT | os.O_WRONLY), 3 - number)
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2({"pipe": writing, "full": os.open("/dev/full", os.O_WRONLY), "closed": writing}[kind], number)
        if kind == "closed":  # as Python finds it when it starts
            os.close(number)
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        sys.exit(spowl.main([]))
if child := os.fork():
    statuses["at once"] = os.waitpid(child, 0)[1]
else:  # what Python's own end would write is lost here
    os.dup2(os.open("at once", os.O_CREAT | os.O_WRONLY), 1)
    spowl.train = lambda *_: (print("said"), os._exit(0))
    spowl.main([])
print(json.dumps(statuses))"""


def test_a_run_goes_on_where_nobody_reads_what_it_prints(tmp_path):
    """Standard output or standard error is a closed pipe, a full disk or closed: exit status 0, nothing on the other
    stream but what belongs there, and all of that. In a file each line stands at once."""
    variables = environment() | {"PYTHONUNBUFFERED": ""}
    finished = subprocess.run([sys.executable, "-c", SPEAKING], cwd=tmp_path, env=variables, capture_output=True,
                              text=True, timeout=300)
    assert finished.returncode == 0 and finished.stderr == ""
    cases = {f"{name} {kind}" for name in ("stdout", "stderr") for kind in ("pipe", "full", "closed")}
    assert json.loads(finished.stdout) == dict.fromkeys([*cases, "at once"], 0)
    assert (tmp_path / "at once").read_text().splitlines()[-1] == "said"
    for case in cases:
        text, word = (tmp_path / case).read_text(), "told" if case.startswith("stdout") else "said"
        assert re.findall(rf"\.{{100}} {word} (.*)\n", text) == [str(line) for line in range(100)], case
        assert "Traceback" not in text and "ignored" not in text, text


def test_a_thread_may_train(monkeypatch):
    """Not the main thread, which alone can say what signals do: nothing is changed there."""
    handlers, ended = [signal.getsignal(number) for number in (INT, TERM)], []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    monkeypatch.setattr(spowl, "train", lambda args, stopping: [(args.seed, stopping)])
    thread = threading.Thread(target=lambda: ended.append(spowl.main(["--seed", "2"])))
    thread.start()
    thread.join()
    assert ended == [None] and [signal.getsignal(number) for number in (INT, TERM)] == handlers


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field, value", [
    ("obs", np.nan), ("next_obs", np.inf), ("reward", np.nan), ("cost", -np.inf), ("action", np.nan)])
def test_environment_numbers_are_watched(monkeypatch, field, value):
    """Named with their environment and step, before they reach the buffer."""
    args = small_args(num_envs=3, learning_starts=0 if field == "action" else 10_000)
    values = {name: np.zeros((3, size)[:1 + (size > 0)]) for name, size in {
        "obs": 4, "action": 2, "reward": 0, "cost": 0, "next_obs": 4}.items()}
    values[field][1:2] = value
    row = spowl.Transition(**values | {"obs": np.zeros((3, 4))}, terminated=np.zeros(3), done=np.zeros(3))
    monkeypatch.setattr(spowl, "act", lambda *_: (values["action"], None))
    run = run_of(spowl, args, None, None, spowl.init_buffer(args, 4, 2), 600)
    with pytest.raises(SystemExit) as stop:
        spowl.collect(args, lambda *_: (values["obs"], np.zeros(3, int), row, np.full(3, 5)), run)
    name = {"obs": "observation", "next_obs": "observation"}.get(field, field)
    assert str(stop.value) == f"{name} of environment 1 not finite at step 615; the last checkpoint stays"
    assert not any(x.is_deleted() for x in run.buffer.rows)


@pytest.mark.parametrize("field", ["obs", "next_obs", "reward", "cost", "action"])
def test_numbers_of_an_evaluation_are_watched(monkeypatch, field):
    """An encoder with NaN does not make a safe agent that returns nothing."""
    args = small_args(num_envs=3, eval_episodes=3)
    values = {"obs": np.zeros((3, 4)), "next_obs": np.zeros((3, 4)), "action": np.zeros((3, 2)), "reward": np.zeros(3),
              "cost": np.zeros(3)}
    values[field][2] = np.nan
    row = spowl.Transition(**values | {"obs": np.zeros((3, 4))}, terminated=np.zeros(3), done=np.ones(3))
    numbers = np.zeros(3, int)
    answers = {"reset": (np.zeros((3, 4)), numbers), "step": (values["obs"], numbers, row, np.ones(3))}
    monkeypatch.setattr(spowl, "action_size", lambda agent: 2)
    monkeypatch.setattr(spowl, "act", lambda *arguments: (values["action"], arguments[2]))
    name = "observation" if field.endswith("obs") else field
    with pytest.raises(SystemExit, match=f"^{name} of environment 2 not finite in evaluation; "):
        spowl.evaluate(args, None, lambda command, *_: answers[command])


def test_losses_and_parameters_are_watched(scripted_train, tmp_path, monkeypatch):
    """In one line, and nothing is saved of what they are the end of."""
    def update(args, agent, buffer, num_updates):
        numbers = {"losses/total": math.nan, "losses/param_norm": math.inf, "lagrangian/lambda": 1e-6}
        return agent._replace(num_updates=agent.num_updates + num_updates), numbers | {
            tag: 1.0 for tag in numbers if agent.num_updates < 10}

    monkeypatch.setattr(spowl, "update_many", update)
    with pytest.raises(SystemExit) as stop:
        scripted_train(updates_per_step=1.0, runs_dir=str(tmp_path))
    assert str(stop.value) == "losses/param_norm, losses/total not finite at step 100; the last checkpoint stays"
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
COMPUTING = """import time
import jax
import jax.numpy as jnp
import spowl_continuous as spowl

def endless(args, stopping):
    spin = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2.0, jnp.cos, x)).lower(0.5).compile()
    print("training", flush=True)
    while not stopping:
        time.sleep(0.01)
    print("computing", flush=True)
    spin(0.5).block_until_ready()

spowl.train, spowl.__name__ = endless, "__main__"  # as where the script is the program
spowl.main([])"""


def test_a_second_ctrl_c_ends_a_run_at_once():
    """Even while JAX computes, here for ever. The first signal is acknowledged when JAX gives control back."""
    process = subprocess.Popen([sys.executable, "-c", HEED_SIGNALS, sys.executable, "-c", COMPUTING],
                               cwd=Path(SCRIPT).parent, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    limit = threading.Timer(300.0, process.kill)  # a line that never comes must not hang the tests
    limit.start()
    try:
        assert process.stdout.readline() == "training\n"
        process.send_signal(INT)
        assert process.stderr.readline() == "\n" and process.stderr.readline().startswith("stopping after this step")
        assert process.stdout.readline() == "computing\n"
        time.sleep(0.5)  # now it is
        assert process.poll() is None
        process.send_signal(INT)
        assert process.wait() == -INT
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


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
