"""Whole runs from the command line, small: what they write, go on from, repeat to the last bit, and refuse."""
import ast
import contextlib
import csv
import dataclasses
import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest

import spowl_continuous as spowl
from spowl_continuous import GROUPS, Args, Envs, Transition, parse_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "spowl_continuous.py"
TINY = ("--num-envs 2 --learning-starts 500 --train-every 500 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-bins 21 "
        "--num-samples 16 --num-elites 4 --num-pi-trajs 4 --iterations 2 --batch-size 8 --bootstrap-samples 50 "
        "--num-q 2 --num-qc 2 --num-c 2 --lagrangian-heads 2").split()
POINT = TINY + "--total-timesteps 2500 --action-repeat 25 --buffer-size 120 --eval-every 1000 --eval-episodes 2".split()
SUMMARY = re.compile(r"step ([\d,]+): return (-?\d+\.\d\d) ± \d+\.\d\d \[-?\d+\.\d, -?\d+\.\d\], "
                     r"cost (\d+\.\d) ± \d+\.\d \[\d+\.\d, \d+\.\d\] over (\d+) episodes, "
                     r"cost rate (0\.\d{4}), balance \d+%, wall time \d+:\d\d:\d\d")
TAGS = """charts/episodic_return charts/episodic_cost charts/episodic_length charts/cost_rate charts/SPS charts/balance
eval/episodic_return eval/episodic_cost eval/balance losses/consistency losses/reward losses/cost losses/value
losses/cost_value losses/policy losses/psi losses/total lagrangian/lambda lagrangian/mu lagrangian/violation
planner/reward_threshold planner/cost_threshold planner/num_improving planner/no_improvement critic/read_outside
critic/followed_outside time/env time/act time/update""".split()


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------
def environment():
    """Variables for a run: on the CPU."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
                         "PYTHONUNBUFFERED": "1"}


def command(place, *words, **variables):
    """Run python with those words in `place`, perhaps with more environment variables -> the finished process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=place, env=environment() | variables,
                          capture_output=True, text=True, timeout=1800)


def run(place, *flags, script=SCRIPT, **variables):
    """Run a script, which must succeed."""
    finished = command(place, script, *flags, **variables)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def train(place, *flags, script=SCRIPT, **variables):
    """Train into a directory of its own -> the run's directory, the finished process."""
    runs = place / f"runs{len(list(place.iterdir()))}"
    finished = run(place, "--runs-dir", runs, *flags, script=script, **variables)
    (directory,) = runs.iterdir()
    return types.SimpleNamespace(dir=directory, stdout=finished.stdout, stderr=finished.stderr)


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # where the numbers do not matter: compiling takes most of the time


@pytest.fixture(scope="session")
def point(place):
    """The run that most tests look at: five blocks of 500 steps, evaluated at 1000, 2000 and 2500."""
    return train(place, *POINT)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def newest(run_dir):
    """The newest checkpoint's path."""
    return max(run_dir.glob("checkpoint_*.npz"), key=lambda path: int(path.stem.split("_")[1]))


def checkpoint(run_dir):
    with np.load(newest(run_dir), allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("counters"))), arrays


def args_of(run_dir):
    """The flags that a run was started with."""
    return json.loads((run_dir / "args.json").read_text())["args"]


def scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()
    return {tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
            for tag in events.Tags()["tensors"] if not tag.startswith("_hparams_/")}


def same_arrays(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------------------
# What a run writes
# ----------------------------------------------------------------------------------------------------------------------
def test_run_directory_is_named_after_task_experiment_and_seed(point):
    assert re.fullmatch(r"SafetyPointGoal1-v0__spowl_continuous__1__\d+", point.dir.name)


def test_args_json_holds_all_flags_and_versions(point):
    info = json.loads((point.dir / "args.json").read_text())
    assert info["script"] == "spowl_continuous" and info["python"] == sys.version.split()[0]
    assert info["args"] == dataclasses.asdict(parse_args(POINT + ["--runs-dir", str(point.dir.parent)]))
    assert info["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", info["git_commit"])
    assert {"jax", "numpy", "mujoco", "safety-gymnasium", "gymnasium"} <= info["packages"].keys()
    assert all(version == metadata.version(name) for name, version in info["packages"].items())


def test_episodes_csv_has_every_episode_once(point):
    """METHOD §8. Two environments of 1000 steps each: their first training episodes end at step 2000."""
    rows = rows_of(point.dir / "episodes.csv")
    assert list(rows[0]) == ["split", "step", "environment", "return", "cost", "length"]
    expected = [("eval", 1000), ("train", 2000), ("eval", 2000), ("eval", 2500)]
    assert [(row["split"], int(row["step"]), int(row["environment"])) for row in rows] == [
        (split, step, environment) for split, step in expected for environment in (0, 1)]
    assert all(row["length"] == "1000" for row in rows)
    assert all(float(row["cost"]) % 1 == 0 and 0 <= float(row["cost"]) <= 1000 for row in rows)
    assert len({row["return"] for row in rows}) == len(rows)


def test_every_tag_is_logged(point):
    """DESIGN's list of tags."""
    logged = scalars(point.dir)
    assert set(TAGS) <= logged.keys()
    assert all(np.isfinite(value) for points in logged.values() for _, value in points)


def test_every_flag_is_in_tensorboard(point):
    """Where its table of hyperparameters looks for them; one that is not given is there as well."""
    from google.protobuf.json_format import MessageToDict
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert len(list(point.dir.glob("events.*.flags"))) == 1
    plugin = EventAccumulator(str(point.dir)).Reload().SummaryMetadata("_hparams_/session_start_info").plugin_data
    found = MessageToDict(HParamsPluginData.FromString(plugin.content))["sessionStartInfo"]["hparams"]
    assert plugin.plugin_name == "hparams"
    assert found == {name: "" if value is None else value for name, value in args_of(point.dir).items()}


def test_the_axis_is_simulator_steps(point):
    logged = {tag: [step for step, _ in points] for tag, points in scalars(point.dir).items()}
    every_block = [500, 1000, 1500, 2000, 2500]
    assert all(logged[tag] == every_block for tag in ("charts/cost_rate", "charts/SPS", "losses/total", "time/env"))
    assert logged["charts/balance"] == logged["planner/num_improving"] == every_block[1:]  # random actions before
    assert logged["charts/episodic_return"] == [2000]
    assert logged["eval/episodic_return"] == logged["eval/episodic_cost"] == [1000, 2000, 2500]


def test_logged_numbers_agree_with_the_csv(point):
    """METHOD §8: the cost rate is all training cost so far over all training steps so far."""
    logged = {tag: dict(points) for tag, points in scalars(point.dir).items()}
    rows = rows_of(point.dir / "episodes.csv")
    mean = lambda split, step, name: np.mean(
        [float(row[name]) for row in rows if row["split"] == split and row["step"] == str(step)])
    for step in (1000, 2000, 2500):
        assert np.isclose(logged["eval/episodic_return"][step], mean("eval", step, "return"), rtol=1e-5)
        assert np.isclose(logged["eval/episodic_cost"][step], mean("eval", step, "cost"), rtol=1e-5)
    assert np.isclose(logged["charts/episodic_return"][2000], mean("train", 2000, "return"), rtol=1e-5)
    assert np.isclose(logged["charts/episodic_cost"][2000], mean("train", 2000, "cost"), rtol=1e-5)
    assert logged["charts/episodic_length"][2000] == 1000
    assert np.isclose(logged["charts/cost_rate"][2000], 2 * mean("train", 2000, "cost") / 2000, rtol=1e-5)
    shares = np.array([list(logged[f"time/{part}"].values()) for part in ("env", "act", "update")])
    assert (shares >= 0).all() and (shares.sum(0) <= 1.0 + 1e-6).all()
    assert all(0 <= share <= 1 for share in logged["charts/balance"].values())


def test_summary_lines_are_printed(point):
    found = [match.groups() for match in map(SUMMARY.fullmatch, point.stdout.splitlines()) if match]
    assert [(step, episodes) for step, _, _, episodes, _ in found] == [(s, "2") for s in ("1,000", "2,000", "2,500")]
    last = [float(row["return"]) for row in rows_of(point.dir / "episodes.csv")[-2:]]
    assert float(found[-1][1]) == pytest.approx(np.mean(last), abs=0.006)
    assert f"{point.dir}: 60 observations, 2 actions" in point.stdout


def test_the_papers_preset_on_a_cpu_names_the_other(point):
    """Sizes of 16 for 2,500 steps: the estimate is next to nothing, but there. Said once, in one line."""
    (line,) = (line for line in point.stdout.splitlines() if "preset" in line)
    assert re.fullmatch(r"the paper's preset on a CPU takes about \S+ days: --preset laptop is made for one", line)


def test_checkpoint_counts_what_was_done(point):
    """METHOD §2: one gradient update per agent step collected; 500 steps of random actions."""
    counters, arrays = checkpoint(point.dir)
    assert (counters["step"], counters["simulated"]) == (2500, 2500)
    assert counters["episodes"] == [1, 1] and counters["is_first"] == [False, False]  # number 0 is over
    assert counters.keys() == {*spowl.Progress._fields, "format"} and counters["format"] == spowl.CHECKPOINT_FORMAT
    columns = spowl.COLUMNS  # the csv is written from these
    assert [[str(value) for value in row] for row in counters["rows"]] == [
        [row[name] for name in columns] for row in rows_of(point.dir / "episodes.csv")]
    assert sorted(path.name for path in point.dir.glob("check*")) == ["checkpoint_2000.npz", "checkpoint_2500.npz"]
    assert arrays["['agent'].num_updates"] == 2500 // 25
    assert arrays["['actor'].step"] == (2500 - 500) // 50
    assert arrays["['buffer'].size"] == arrays["['buffer'].head"] == 2500 // 50
    rows = arrays["['buffer'].rows.reward"]
    assert rows.shape == (50, 2) and arrays["['buffer'].rows.obs"].shape == (50, 2, 60)
    assert counters["cost"] == arrays["['buffer'].rows.cost"].sum()
    episodes = [float(row["return"]) for row in rows_of(point.dir / "episodes.csv") if row["split"] == "train"]
    assert np.allclose(rows[:40].sum(0), episodes, atol=1e-4)
    assert (np.flatnonzero(arrays["['buffer'].rows.done"][:, 0]) == [39]).all()
    assert np.array_equal(counters["obs"], arrays["['buffer'].rows.next_obs"][49])
    assert not list(point.dir.glob("*.tmp"))


def test_actions_are_random_first_and_stay_in_range(point):
    """METHOD §2: uniform random actions in the first 500 steps (10 rows), all actions in [-1, 1]."""
    actions = checkpoint(point.dir)[1]["['buffer'].rows.action"]
    assert np.unique(actions[:10]).size == 40 and np.abs(actions[:10]).max() < 1.0
    assert abs(actions[:10].mean()) < 0.3 and 0.4 < actions[:10].std() < 0.75
    assert np.abs(actions).max() <= 1.0


@pytest.mark.parametrize("flags, ends", [
    (dict(), [5000, 10_000, 15_000]), (dict(learning_starts=0), [5000, 10_000]),
    (dict(learning_starts=1000), [1000, 5000, 10_000]), (dict(learning_starts=10_000), [10_000, 15_000]),
    (dict(total_timesteps=7000), [5000, 7000]), (dict(total_timesteps=700), [700])])
def test_cycles_end_where_updates_are_due(flags, ends):
    """The first one with the random start, the others at multiples of train_every, the last one with the run."""
    starts = [0, *ends[:-1]]
    assert [spowl.cycle_end(Args(**flags), start) for start in starts] == ends


@pytest.mark.parametrize("per_step", [0.35, 0.7, 1.0, 1.15, 1.4])
def test_no_update_is_lost_to_rounding(per_step):
    """As many per cycle of 1,000 agent steps as the flag says, also where a product of floats falls just below."""
    args = Args(updates_per_step=per_step)
    due = [spowl.updates_due(args, cycle * 5000) for cycle in range(1001)]
    assert set(np.diff(due)) == {round(1000 * per_step)}


# ----------------------------------------------------------------------------------------------------------------------
# The same numbers again
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def unevaluated(place):
    """The same run, but evaluated only at its end."""
    return train(place, *POINT, "--eval-every", 0)


def test_same_seed_gives_the_same_numbers_and_evaluation_touches_nothing(point, unevaluated):
    """Agent, actor and replay buffer are bitwise equal after two runs of one seed, though one was evaluated midway."""
    counters, arrays = checkpoint(point.dir)
    other_counters, other_arrays = checkpoint(unevaluated.dir)
    assert same_arrays(arrays, other_arrays)
    rows, other_rows = (each.pop("rows") for each in (counters, other_counters))
    assert counters | {"wall_time": 0} == other_counters | {"wall_time": 0}
    assert [row for row in rows if row[0] == "train" or row[1] == 2500] == other_rows


@pytest.fixture(scope="session")
def other_seed(place):
    """Seed 2, evaluated by one episode, which needs fewer environments than training; says what was compiled."""
    code = ("import sys; from spowl_continuous import *; train(parse_args(sys.argv[1:]));"
            "print('compiled', act._cache_size(), update_many._cache_size(), add._cache_size())")
    finished = command(place, "-c", code, "--runs-dir", place / "other", *POINT, "--seed", 2, "--eval-episodes", 1)
    assert finished.returncode == 0, finished.stderr
    (directory,) = (place / "other").iterdir()
    return types.SimpleNamespace(dir=directory, stdout=finished.stdout)


def test_every_jitted_function_is_compiled_once(other_seed):
    assert "compiled 1 1 1" in other_seed.stdout


def test_another_seed_gives_other_numbers(point, other_seed):
    """Networks, random actions, layouts: all of them follow from the seed."""
    arrays, other = checkpoint(point.dir)[1], checkpoint(other_seed.dir)[1]
    names = [name for name, array in arrays.items() if array.size > 50 and "scale" not in name and "shift" not in name]
    names = [name for name in names if ".done" not in name and ".terminated" not in name and "cost" not in name]
    assert len(names) > 20 and not any(np.array_equal(arrays[name], other[name]) for name in names)
    assert not (arrays["['buffer'].rows.obs"][0] == other["['buffer'].rows.obs"][0]).all(-1).any()
    assert rows_of(point.dir / "episodes.csv")[0]["return"] != rows_of(other_seed.dir / "episodes.csv")[0]["return"]


# ----------------------------------------------------------------------------------------------------------------------
# --evaluate and video
# ----------------------------------------------------------------------------------------------------------------------
def can_draw():
    """Whether MuJoCo gets a picture without a screen on this machine (EGL), and why not."""
    code = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"
    finished = subprocess.run([sys.executable, "-c", code], env=environment() | {"MUJOCO_GL": "egl"},
                              capture_output=True, text=True, timeout=300)
    return finished.returncode == 0, finished.stderr.strip().rpartition("\n")[2]


@pytest.fixture(scope="session")
def evaluated(place, point):
    """A copy of the run, evaluated by one episode more than in training, with a video where one can be drawn."""
    directory = place / "evaluated" / point.dir.name
    shutil.copytree(point.dir, directory)
    draws, reason = can_draw()
    finished = run(place, "--evaluate", directory, "--eval-episodes", 3, *(["--capture-video"] if draws else []))
    return types.SimpleNamespace(dir=directory, stdout=finished.stdout, draws=draws, reason=reason)


def test_evaluation_alone_gives_the_same_episodes_again(point, evaluated):
    """METHOD §2: evaluation has fixed seeds: what training measured last comes out again, in another process, filmed
    or not, whatever the number of episodes."""
    rows, training = rows_of(evaluated.dir / "evaluation.csv"), rows_of(point.dir / "episodes.csv")
    assert [*rows[0]] == [*training[0], "balance"]
    assert [{name: row[name] for name in training[0]} for row in rows[:2]] == training[-2:]
    assert [row["environment"] for row in rows] == ["0", "1", "2"] and len({row["return"] for row in rows}) == 3
    assert SUMMARY.search(evaluated.stdout).group(1, 4) == ("2,500", "3")
    assert f"balance {np.mean([float(row['balance']) for row in rows]):.0%}," in evaluated.stdout
    known = dict(line.split() for line in evaluated.stdout.splitlines() if line.startswith("critic/"))
    assert {"critic/read_outside", "critic/followed_outside"} <= known.keys()
    assert all(np.isfinite(float(value)) for value in known.values())


def test_evaluation_alone_changes_nothing_else(point, evaluated):
    for name in ("episodes.csv", "checkpoint_2000.npz", "checkpoint_2500.npz", "args.json"):
        assert (point.dir / name).read_bytes() == (evaluated.dir / name).read_bytes()


@pytest.mark.filterwarnings("ignore:os.fork")  # by imageio, which starts ffmpeg
def test_video_shows_the_first_episode(evaluated):
    """One picture of 512x512 per agent step but the last, and the scene moves."""
    if not evaluated.draws:
        pytest.skip(f"MuJoCo cannot draw without a screen here: {evaluated.reason}")
    import imageio

    frames = np.stack(imageio.mimread(evaluated.dir / "videos" / "evaluation_2500.mp4", memtest=False)).astype(float)
    assert frames.shape == (39, 512, 512, 3)
    assert frames.std(axis=(1, 2, 3)).min() > 10.0
    assert np.abs(frames[0] - frames[-1]).max() > 30.0


def test_a_video_tells_return_and_cost_and_warns_of_nothing(tmp_path):
    """JAX has threads here, so that starting ffmpeg by os.fork() would be warned of; text in a corner alone."""
    import imageio

    jax.devices()
    black, logged = np.zeros((512, 512, 3), np.uint8), []
    wandb_run = types.SimpleNamespace(log=logged.append)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spowl.write_video(tmp_path / "videos" / "5.mp4", [(black, 1.0, 0.0), (black, -2.5, 30.0), (black, -2.5, 30.0)])
    assert [str(warning.message) for warning in told] == []
    with warnings.catch_warnings(action="ignore"):
        frames = np.stack(imageio.mimread(tmp_path / "videos" / "5.mp4", memtest=False)).astype(float)
    assert frames.shape == (3, 512, 512, 3) and frames[:, :40, :250].max() > 200 and frames[:, 50:].max() < 20
    first, second, third = frames[:, :40, :300]
    assert np.abs(first - second).max() > 150 > 30 > np.abs(second - third).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", types.SimpleNamespace(Video=lambda path: ("video", path)))
        spowl.write_video(tmp_path / "6.mp4", [(black, 1.0, 0.0)], wandb_run)
    assert logged == [{"video": ("video", str(tmp_path / "6.mp4"))}]


# ----------------------------------------------------------------------------------------------------------------------
# --resume
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def resumed(place, point):
    """A copy of the run after it was killed later than its checkpoint, gone on with to 4500 steps."""
    directory = place / "resumed" / point.dir.name
    shutil.copytree(point.dir, directory)
    with open(directory / "episodes.csv", "a") as file:
        file.write("train,3000,0,1.0,2.0,1000\r\n")
    run(place, "--resume", directory, "--total-timesteps", 4500, "--eval-every", 0)
    return types.SimpleNamespace(dir=directory)


def test_resumed_csv_goes_on_without_duplicates(point, resumed):
    rows, before = rows_of(resumed.dir / "episodes.csv"), rows_of(point.dir / "episodes.csv")
    assert rows[:len(before)] == before
    assert [(row["split"], row["step"], row["environment"]) for row in rows[len(before):]] == [
        (split, step, environment) for split, step in (("train", "4000"), ("eval", "4500")) for environment in "01"]
    assert all(row["length"] == "1000" for row in rows)


def test_resumed_step_axis_continues(resumed):
    logged = {tag: [step for step, _ in points] for tag, points in scalars(resumed.dir).items()}
    assert logged["charts/cost_rate"] == logged["losses/total"] == list(range(500, 5000, 500))
    assert logged["eval/episodic_return"] == [1000, 2000, 2500, 4500]


def test_resumed_counters_and_cost_rate_go_on(point, resumed):
    before, after = checkpoint(point.dir)[0], checkpoint(resumed.dir)[0]
    arrays = checkpoint(resumed.dir)[1]
    assert (after["step"], after["simulated"], after["episodes"]) == (4500, 4500, [2, 2])
    assert after["wall_time"] > before["wall_time"]
    assert (arrays["['agent'].num_updates"], arrays["['actor'].step"]) == (180, 80)
    costs = [float(row["cost"]) for row in rows_of(resumed.dir / "episodes.csv") if row["split"] == "train"]
    assert after["cost"] == sum(costs) + arrays["['buffer'].rows.cost"][20:30].sum()  # the ring has begun anew
    assert np.isclose(scalars(resumed.dir)["charts/cost_rate"][-1][1], after["cost"] / 4500, rtol=1e-5)


def test_resumed_buffer_keeps_its_contents(point, resumed):
    """60 rows, of which 50 were filled and 40 more were written: rows 30 to 49 are as they were, and the unfinished
    episodes went on after them."""
    before, after = checkpoint(point.dir)[1], checkpoint(resumed.dir)[1]
    assert (after["['buffer'].size"], after["['buffer'].head"]) == (60, 30)
    for field in spowl.Transition._fields:
        old, new = (arrays[f"['buffer'].rows.{field}"] for arrays in (before, after))
        assert np.array_equal(old[30:50], new[30:50])
    assert not after["['buffer'].rows.done"][49:60].any()
    assert np.array_equal(after["['buffer'].rows.obs"][50], after["['buffer'].rows.next_obs"][49])


def one_line(finished, *words):
    """The script refused: one line, naming those words, and no traceback."""
    assert finished.returncode not in (0, None)
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert all(str(word) in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("flag, value", [
    ("--gamma", "0.9"), ("--num-envs", "5"), ("--seed", "2"), ("--latent-dim", "32"), ("--env-id", "SafetyCarGoal1-v0"),
    ("--action-repeat", "5"), ("--cost-limit", "1"), ("--buffer-size", "200"), ("--switch-rule", "means")])
def test_flags_that_matter_cannot_change_on_resume(point, flag, value):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--resume", str(point.dir), flag, value])
    assert str(stop.value) == f"{flag} cannot differ from the run in {point.dir}"


def test_resume_and_evaluate_take_the_flags_of_the_run(point):
    """Its own flags without repeating them; those that may differ do."""
    saved = Args(**json.loads((point.dir / "args.json").read_text())["args"])
    resumed = parse_args(["--resume", str(point.dir), "--total-timesteps", "9000", "--eval-episodes", "7"])
    assert resumed == dataclasses.replace(saved, resume=str(point.dir), total_timesteps=9000, eval_episodes=7)
    evaluated = parse_args(["--evaluate", str(point.dir), "--seed", "5", "--capture-video"])
    assert evaluated == dataclasses.replace(saved, evaluate=str(point.dir), seed=5, capture_video=True)


# Where the tests run in the background, Ctrl-C is ignored, and what they start would ignore it too.
HEED_SIGNALS = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])"""


def start(place, *flags, stderr=subprocess.PIPE):
    """Start the script in the background, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-c", HEED_SIGNALS, sys.executable, SCRIPT, *map(str, flags)], cwd=place,
                            env=environment(), text=True, stdout=subprocess.PIPE, stderr=stderr,
                            start_new_session=True)


def start_and_evaluate(place, *flags):
    """The same, gone on until its first evaluation is done."""
    process = start(place, *flags)
    while not (line := process.stdout.readline()).startswith("step "):
        assert line, process.stderr.read()
    return process


def test_an_interrupted_run_says_how_to_go_on(place):
    """Ctrl-C: exit code 130 and one line, no traceback from the script or from its environments' processes."""
    process = start_and_evaluate(place, "--runs-dir", place / "interrupted", *POINT)
    try:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr and "--resume" in stderr
    (directory,) = (place / "interrupted").iterdir()
    assert 1000 <= checkpoint(directory)[0]["step"] < 2500


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be loaded
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def copied(place, point, tmp_path, monkeypatch):
    """A copy of the run to spoil, with no simulator started when it is evaluated in this process."""
    monkeypatch.setattr(spowl, "check_machine", lambda args: None)
    monkeypatch.setattr(spowl, "start_envs", lambda args, *rest: (Envs(args, 1, False, [[0, 1]], [], []), 60, 2))
    directory = tmp_path / "run"
    shutil.copytree(point.dir, directory)
    return directory


def evaluate_again(directory):
    """--evaluate in this process."""
    return spowl.evaluate_run(parse_args(["--evaluate", str(directory)]))


def change_flags(directory, **changes):
    info = json.loads((directory / "args.json").read_text())
    info["args"] |= changes
    (directory / "args.json").write_text(json.dumps(info))


def change_info(directory, change):
    info = json.loads((directory / "args.json").read_text())
    (directory / "args.json").write_text(json.dumps(change(info)))


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


def without(info, name):
    return {key: value for key, value in info.items() if key != name}


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewrite(path, change):
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    with open(path, "wb") as file:
        np.savez(file, **change(arrays))


def change_counters(path, change):
    change_text = lambda text: np.array(json.dumps(change(json.loads(str(text)))))
    rewrite(path, lambda arrays: arrays | {"counters": change_text(arrays["counters"])})


SPOILED = {
    "nothing there": lambda run, file: shutil.rmtree(run),
    "another directory": lambda run, file: (run / "args.json").unlink(),
    "args.json of something else": lambda run, file: (run / "args.json").write_text('{"lr": 1}'),
    "args.json not json": lambda run, file: (run / "args.json").write_text("{"),
    "args.json a list": lambda run, file: (run / "args.json").write_text("[]"),
    "args.json without the script": lambda run, file: change_info(run, lambda info: without(info, "script")),
    "another script's run": lambda run, file: change_info(run, lambda info: info | {"script": "spowl_plan_only"}),
    "an unknown flag": lambda run, file: change_flags(run, colour="red"),
    "no checkpoint": lambda run, file: [path.unlink() for path in run.glob("checkpoint_*")],
    "a checkpoint of a newer version": lambda run, file: change_counters(file, lambda found: found | {"format": 3}),
    "a checkpoint of an older version": lambda run, file: change_counters(file, lambda found: found | {"format": 1}),
    "a checkpoint of no version": lambda run, file: change_counters(file, lambda found: without(found, "format")),
    "an empty checkpoint": lambda run, file: file.write_bytes(b""),
    "a truncated checkpoint": lambda run, file: file.write_bytes(file.read_bytes()[:-1000]),
    "half a checkpoint": lambda run, file: file.write_bytes(file.read_bytes()[:file.stat().st_size // 2]),
    "noise for a checkpoint": lambda run, file: file.write_bytes(bytes(range(256)) * 100),
    "text for a checkpoint": lambda run, file: file.write_text("a checkpoint"),
    "one array for a checkpoint": lambda run, file: file.write_bytes(npy_bytes()),
    "a directory for a checkpoint": lambda run, file: (file.unlink(), file.mkdir()),
    "pickled objects": lambda run, file: rewrite(file, lambda arrays: arrays | {
        "['agent'].scale": np.array(Trap(run / "unpickled"), object)}),
    "a missing array": lambda run, file: rewrite(file, lambda arrays: without(arrays, "['agent'].multiplier")),
    "missing counters": lambda run, file: rewrite(file, lambda arrays: without(arrays, "counters")),
    "counters not json": lambda run, file: rewrite(file, lambda arrays: arrays | {"counters": np.array("{")}),
    "other sizes": lambda run, file: change_flags(run, latent_dim=32),
}


def npy_bytes():
    import io

    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_no_run_is_refused_in_one_line(copied, what):
    SPOILED[what](copied, newest(copied))
    with pytest.raises(SystemExit) as stop:
        evaluate_again(copied)
    message = str(stop.value)
    assert str(copied) in message and "\n" not in message
    assert ("of another version" in message) == (what.startswith("a checkpoint of") and what[-10:] != "no version")
    assert not (copied / "unpickled").exists()


@pytest.mark.parametrize("part", np.linspace(0.02, 0.98, 8).tolist())
def test_a_flipped_byte_is_noticed_or_harmless(copied, part):
    """Anywhere in the file: loading either gives the numbers that were saved or refuses in one line."""
    path = newest(copied)
    args = parse_args(["--evaluate", str(copied)])
    template = jax.eval_shape(partial(spowl.fresh, args, (60, 2)), jax.random.key(1))
    intact = spowl.flatten(spowl.load_checkpoint(copied, template)[0])
    flip(path, int(part * path.stat().st_size))
    try:
        loaded = spowl.flatten(spowl.load_checkpoint(copied, template)[0])
    except SystemExit as stop:
        assert str(path) in str(stop) and "\n" not in str(stop)
    else:
        assert same_arrays(intact, loaded)


def test_a_loaded_checkpoint_holds_what_was_saved(copied):
    """Every array of agent, actor and buffer comes back with its bits and its type."""
    args = parse_args(["--evaluate", str(copied)])
    template = jax.eval_shape(partial(spowl.fresh, args, (60, 2)), jax.random.key(1))
    trees, counters = spowl.load_checkpoint(copied, template)
    saved_counters, saved = checkpoint(copied)
    loaded = spowl.flatten(trees)
    assert counters == saved_counters and loaded.keys() == saved.keys()
    for name, array in loaded.items():
        filled = array[:50] if name.startswith("['buffer'].rows") else array
        assert np.array_equal(filled, saved[name]) and array.dtype == saved[name].dtype
        assert np.array_equal(array[len(filled):], np.zeros_like(array[len(filled):])) if array.ndim else True
    progress = spowl.Progress(**{name: counters[name] for name in spowl.Progress._fields})._replace(step=9999)
    spowl.save_checkpoint(copied, spowl.Run(**trees, progress=progress), 7.5)
    again_counters, again = checkpoint(copied)
    assert same_arrays(again, saved) and again_counters == counters | {"step": 9999, "wall_time": 7.5}
    assert [path.name for path in spowl.checkpoints(copied)] == ["checkpoint_2500.npz", "checkpoint_9999.npz"]


def test_a_damaged_run_is_refused_on_the_command_line(copied, place):
    """And the checkpoint before it is evaluated, on a terminal that has no letter for plus or minus."""
    newest(copied).write_bytes(newest(copied).read_bytes()[:-1000])
    one_line(command(place, SCRIPT, "--evaluate", copied), newest(copied), "damaged", "checkpoint_2000.npz")
    newest(copied).unlink()
    finished = command(place, SCRIPT, "--evaluate", copied, "--eval-episodes", 1, PYTHONIOENCODING="ascii")
    assert finished.returncode == 0, finished.stderr
    assert SUMMARY.search(finished.stdout.replace("?", "±")).group(1, 4) == ("2,000", "1")


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def played(copied, monkeypatch):
    """The copy, on which an evaluation is two episodes of four steps; an earlier one is there."""
    (copied / "evaluation.csv").write_text("an earlier one")
    zeros, obs = np.zeros(4, np.float32), np.ones((4, 60), np.float32)
    rows = Transition(obs, np.zeros((4, 2), np.float32), zeros, zeros, obs, zeros, zeros)
    episodes = [{"environment": i, "return": 1.5, "cost": 2.0, "length": 1000, "balance": 0.5, "played": rows}
                for i in range(2)]
    monkeypatch.setattr(spowl, "evaluate", lambda *_, **__: (episodes, [(np.zeros((512, 512, 3), np.uint8), 0.0, 0.0)]))
    monkeypatch.setattr(spowl, "write_video", lambda *_: None)
    return copied


@pytest.mark.parametrize("module, name", [(os, "replace"), (spowl, "open"), (spowl, "write_video")])
def test_an_evaluation_that_cannot_be_written_is_told_nevertheless(played, monkeypatch, capsys, module, name):
    """What came out is printed, one line says that it was not written, and an earlier evaluation.csv stays."""
    broken = no_room if module is os or name == "write_video" else lambda path, mode="r", **rest: (
        open(path, mode, **rest) if mode == "r" else no_room())
    monkeypatch.setattr(module, name, broken, raising=False)
    with pytest.raises(SystemExit) as stop:
        evaluate_again(played)
    printed = capsys.readouterr().out
    assert SUMMARY.search(printed).group(1, 2, 3, 4) == ("2,500", "1.50", "2.0", "2")
    assert "critic/read_outside" in printed
    assert str(stop.value) == (
        f"{played}: No space left on device: the lines above were not written to a file")
    assert (played / "evaluation.csv").read_text().startswith("split" if name == "write_video" else "an earlier one")
    assert not list(played.glob("*.tmp"))


def test_a_video_that_cannot_be_written_says_why(played, monkeypatch):
    """imageio's own errors are OSErrors with nothing but a text of several lines."""
    def fail(*_):
        raise OSError("[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nffmpeg -y")

    monkeypatch.setattr(spowl, "write_video", fail)
    with pytest.raises(SystemExit) as stop:
        evaluate_again(played)
    assert "None" not in str(stop.value) and "\n" not in str(stop.value)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes, Weights & Biases
# ----------------------------------------------------------------------------------------------------------------------
def resumed_args(run_dir, *flags):
    return parse_args(["--resume", str(run_dir), "--total-timesteps", "9000", *flags])


def test_a_run_in_use_is_not_resumed(copied):
    """One line, before anything is read or written; as soon as the other process has gone, it may be."""
    before = sorted((path.name, path.stat().st_mtime_ns) for path in copied.iterdir())
    with open(copied / "args.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            spowl.learn(resumed_args(copied), None, None, (60, 2), ())
        assert str(stop.value) == f"another process trains in {copied}"
        assert sorted((path.name, path.stat().st_mtime_ns) for path in copied.iterdir()) == before
    logs = spowl.open_logs(resumed_args(copied), copied)
    with pytest.raises(SystemExit, match="another process trains in"):
        spowl.open_logs(resumed_args(copied), copied)
    logs.writer.close()


def test_a_finished_run_is_not_resumed(copied):
    with pytest.raises(SystemExit) as stop:
        spowl.begin(parse_args(["--resume", str(copied)]), None, (60, 2))
    assert str(stop.value) == f"{copied} is at step 2,500 already: raise --total-timesteps to go on"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_is_no_other_process(copied, monkeypatch, number):
    """Lustre without them, and NFS, which locks only files opened for writing."""
    def flock(file, how):
        if number != errno.EBADF or not file.writable():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    spowl.open_logs(resumed_args(copied), copied).writer.close()


class Wandb(types.ModuleType):
    """Weights & Biases as far as it is called: what it was asked, and a run that keeps what is logged."""

    def __init__(self, logs_in=True, mode="online"):
        super().__init__("wandb")
        self.asked, self.logged, self.finished = [], [], []
        self.login = lambda **options: logs_in
        self.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))

    def init(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(log=self.logged.append, finish=lambda: self.finished.append(True))


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """tracked(module) trains with that module as wandb and --track, as far as nothing is started -> the message."""
    def train_with(module, mode="online"):
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setattr(spowl, "start_envs", lambda *_: sys.exit("all was well"))
        with pytest.raises(SystemExit) as stop:
            spowl.train(parse_args(["--track", "--runs-dir", str(tmp_path / "runs")]))
        assert not (tmp_path / "runs").exists() and "\n" not in str(stop.value)
        return str(stop.value)

    return train_with


def test_track_is_refused_where_it_cannot_be(tracked, tmp_path, monkeypatch):
    """Not installed (None stands for that in sys.modules), nobody logged in, or broken."""
    assert tracked(None).startswith("--track: Weights & Biases cannot be used: ")
    assert "wandb login" in tracked(Wandb(logs_in=False)) and "all was well" in tracked(Wandb())
    (tmp_path / "wandb.py").write_text("raise AttributeError('np.float_ was removed')")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="--track: Weights & Biases cannot be used: np.float_ was removed"):
        spowl.train(parse_args(["--track", "--runs-dir", str(tmp_path / "runs")]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_track_needs_no_login_where_nothing_is_sent(tracked, mode):
    """wandb 0.31: login() is False under WANDB_MODE=offline, which the message of the script itself offers."""
    assert tracked(Wandb(logs_in=False, mode=mode), mode) == "all was well"


def test_a_tracked_run_goes_on_where_it_was(copied, monkeypatch):
    """The same id, which may be resumed; seeds are one group; flags that are not given are there, without None."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    args = resumed_args(copied, "--track", "--wandb-project-name", "safe", "--wandb-entity", "us")
    logs = spowl.open_logs(args, copied)
    (asked,) = wandb.asked
    assert {name: asked[name] for name in ("id", "group", "resume", "project", "entity")} == {
        "id": "run", "group": "SafetyPointGoal1-v0__spowl_continuous", "resume": "allow", "project": "safe",
        "entity": "us"}
    assert asked["config"] == {name: "" if value is None else value for name, value in vars(args).items()}
    spowl.write_logs(logs, {"losses/total": np.float32(1.5), "charts/SPS": 3}, 500)
    assert wandb.logged == [{"losses/total": 1.5, "charts/SPS": 3.0, "step": 500}]
    logs.writer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------
HELP = """--env-id --seed --total-timesteps --num-envs --action-repeat --learning-starts --train-every --batch-size
--buffer-size --learning-rate --gamma --cost-gamma --tau --horizon --rho --num-samples --num-elites --num-pi-trajs
--iterations --min-std --max-std --temperature --latent-dim --enc-dim --mlp-dim --num-bins --num-q --num-qc --cost-limit
--eval-every --eval-episodes --capture-video --track --resume --evaluate""".split()


def test_help_shows_every_flag_in_its_group(place):
    """Also on a terminal that has no letters for a box."""
    finished = command(place, SCRIPT, "--help", PYTHONIOENCODING="ascii")
    assert finished.returncode == 0, finished.stderr
    text = finished.stdout
    titles = re.findall(r"(\w+) options", text)
    assert [title.lower() for title in titles if title] == [group.__name__.lower() for group in GROUPS]
    for group, rest in zip(GROUPS, re.split(r"\w+ options", text)[1:]):
        assert {"--" + field.name.replace("_", "-") for field in dataclasses.fields(group)} <= set(
            re.findall(r"--[a-z][a-z-]*", rest))
        assert group.__doc__ in " ".join(rest.split())
    assert set(HELP) <= set(re.findall(r"--[a-z][a-z-]*", text))
    fields = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Args)}
    assert fields <= set(re.findall(r"--[a-z][a-z-]*", text))


def test_main_prints_into_a_notebook_too():
    """Whose sys.stdout is no file: it cannot be told what to do with letters that it does not have."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        spowl.main(["--help"])
    assert "--env-id" in printed.getvalue()


@pytest.mark.parametrize("group", GROUPS)
def test_every_flag_has_a_docstring(group):
    tree = ast.parse(SCRIPT.read_text())
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == group.__name__)
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    is_text = lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    assert len(fields) == len(dataclasses.fields(group))
    assert [body[i].target.id for i in fields if i + 1 == len(body) or not is_text(body[i + 1])] == []


def test_every_flag_is_in_one_group():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(Args)) and len(set(names)) == len(names)


DEFAULTS = dict(
    # METHOD §2
    action_repeat=5, num_envs=10, total_timesteps=5_000_000, learning_starts=5_000, train_every=5_000,
    eval_every=50_000, eval_episodes=10, buffer_size=1_000_000, batch_size=256,
    # METHOD §3
    enc_dim=256, mlp_dim=512, latent_dim=512, simnorm_dim=8, num_bins=101, bin_limit=10.0, num_q=5, num_qc=5,
    num_c=5, dropout=0.01, horizon=3, rho=0.5, consistency_coef=20.0, reward_coef=0.1, value_coef=0.1,
    cost_coef=0.1, cost_value_coef=0.1, cost_positive_weight=10.0, gamma=0.975, cost_gamma=0.997, tau=0.01,
    cost_target_agg="mean", cost_read_out="symlog", obs_transform="raw", updates_per_step=1.0,
    learning_rate=3e-4, enc_lr_scale=0.3, grad_clip=20.0, log_std_min=-10.0, log_std_max=2.0,
    # METHOD §4
    entropy_coef=1e-4, cost_limit=0.1, lagrangian_heads=5, lagrangian_agg="mean", lambda_init=1e-6, lambda_max=10.0,
    mu_init=5e-9, mu_growth=5e-6, mu_max=1.0,
    # METHOD §5-6, §9
    plan_horizon=None, num_samples=512, num_pi_trajs=24, num_elites=64, iterations=6, temperature=0.5, min_std=0.05,
    max_std=2.0, plan_cost_agg="max", switch_rule="bootstrap", bootstrap_samples=1000)


def test_defaults_are_those_of_the_method():
    """Every number of METHOD's tables, and every flag but those of the run itself is one of them."""
    args = dataclasses.asdict(Args())
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert set(args) - set(DEFAULTS) == {"env_id", "exp_name", "seed", "runs_dir", "track", "wandb_project_name",
                                         "wandb_entity", "capture_video", "resume", "evaluate", "env_timeout", "preset"}
    assert parse_args([]) == Args()


# ----------------------------------------------------------------------------------------------------------------------
# Episodes that end early; an environment of one's own
# ----------------------------------------------------------------------------------------------------------------------
def test_ant_ends_early(place):
    """METHOD §2: Ant may terminate before 1000 steps, which reaches csv and buffer."""
    flags = "--env-id SafetyAntGoal1-v0 --total-timesteps 1000 --learning-starts 1500 --eval-episodes 1"
    ant = train(place, *TINY, *flags.split(), **QUICK)  # random actions alone: nothing is updated
    rows, (counters, arrays) = rows_of(ant.dir / "episodes.csv"), checkpoint(ant.dir)
    lengths = [int(row["length"]) for row in rows if row["split"] == "train"]
    buffer = {field: arrays[f"['buffer'].rows.{field}"] for field in spowl.Transition._fields}
    done = buffer["done"] > 0
    assert lengths and max(lengths) < 1000 and len(lengths) == done.sum()
    assert np.array_equal(buffer["terminated"], buffer["done"])
    assert counters["episodes"] == done.sum(0).tolist()
    assert counters["step"] == 1000 and counters["simulated"] == 1000 - sum(-length % 5 for length in lengths)
    followed = (buffer["obs"][1:] == buffer["next_obs"][:-1]).all(-1)
    assert np.array_equal(followed, ~done[:-1])


def example(page, name):
    """The code block of a page that follows <!-- name -->."""
    return re.search(rf"<!-- {name} -->\s*```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL).group(1)


def short_loop():
    """The page's loop on one's own environment, with fewer steps and fewer, narrower networks."""
    code = example("docs/your_own.md", "own environment")
    assert "from spowl_continuous import" in code
    for given, less in (("10_000", "101"), (">= 500", ">= 50"), ("num_updates=50", "num_updates=2"),
                        ("iterations=4", "iterations=2, num_q=2, num_qc=1, num_c=1, lagrangian_heads=1, num_bins=21")):
        assert code.count(given) == 1
        code = code.replace(given, less)
    return re.sub(r"=\s*128\b", "=32", code)


def test_a_loop_of_ones_own_trains(place):
    check = "\nassert int(agent.num_updates) > 0 and all(np.isfinite(float(x)) for x in metrics.values()), metrics"
    finished = command(place, "-c", short_loop() + check, **QUICK)
    assert finished.returncode == 0, finished.stderr


REGISTERED = example("README.md", "own environment, registered")


def test_a_registered_class_of_ones_own_trains(place):
    """The example, with small flags; one of its processes dies, once, and so is started anew by importing the file."""
    flags = [*TINY, "--total-timesteps", "1000", "--eval-episodes", "2", "--runs-dir", str(place / "reach")]
    died = place / "died"
    code = REGISTERED.replace('"--preset", "laptop"', f"*{flags}").replace(
        "        reward, cost", f"        import os; os.path.exists('{died}') or (open('{died}', 'w'), os._exit(3))\n"
        "        reward, cost", 1)
    assert code.count("num-envs") == 1 == code.count("_exit")
    (place / "reach.py").write_text(code)
    finished = run(place, script=place / "reach.py", **QUICK)
    told = [line for line in finished.stderr.splitlines() if "exit code 3" in line]
    assert len(told) == 1 and "started anew" in told[0] and "WARN" not in finished.stderr.replace("WARNING", "")
    assert SUMMARY.search(finished.stdout).group(1, 4) == ("1,000", "2")
    (directory,) = (place / "reach").iterdir()
    rows, (counters, arrays) = rows_of(directory / "episodes.csv"), checkpoint(directory)
    assert {row["length"] for row in rows} == {"100"} and arrays["['agent'].num_updates"] == 200
    assert {0.0, 5.0} <= set(np.unique(arrays["['buffer'].rows.cost"]).tolist()) and counters["step"] == 1000


LOADED = example("docs/your_own.md", "a trained agent acts")


def test_a_loaded_agent_acts(place, point):
    finished = command(place, "-c", f"run_dir = {str(point.dir)!r}\n" + LOADED)
    assert finished.returncode == 0, finished.stderr
    numbers = re.fullmatch(r"return, cost, length so far: (\S+) (\S+) (\S+)\n", finished.stdout).groups()
    assert np.isfinite(float(numbers[0])) and float(numbers[2]) == 250.0
