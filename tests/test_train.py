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
import threading
import types
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import QUICK, np_heads, np_latent, random_agent, small_args

import spowl_continuous as spowl
from spowl_continuous import GROUPS, Args, Run, Transition, parse_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "spowl_continuous.py"
TINY = ("--num-envs 2 --learning-starts 500 --train-every 500 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-bins 21 "
        "--num-samples 16 --num-elites 4 --num-pi-trajs 4 --iterations 2 --batch-size 8 --bootstrap-samples 50 "
        "--num-q 2 --num-qc 2 --num-c 2 --lagrangian-heads 2").split()
POINT = TINY + "--total-timesteps 2500 --action-repeat 25 --buffer-size 120 --eval-every 1000 --eval-episodes 2".split()
SUMMARY = re.compile(r"step ([\d,]+): return (-?\d+\.\d\d) ± \d+\.\d\d \[-?\d+\.\d, -?\d+\.\d\], "
                     r"cost (\d+\.\d) ± \d+\.\d \[\d+\.\d, \d+\.\d\](?: \(budget 5\))? over (\d+) episodes, "
                     r"cost rate (0\.\d{4})(?:, balance \d+%)?, wall time \d+:\d\d:\d\d")
TAGS = """charts/episodic_return charts/episodic_cost charts/episodic_length charts/cost_rate charts/SPS charts/balance
eval/episodic_return eval/episodic_cost eval/balance losses/consistency losses/reward losses/cost losses/value
losses/cost_value losses/policy losses/psi losses/total lagrangian/lambda lagrangian/mu lagrangian/violation
planner/reward_threshold planner/cost_threshold planner/num_improving planner/no_improvement critic/read_outside
critic/followed_outside time/env time/act time/update""".split()


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------
def environment():
    """Variables for a run: on the CPU, compiled quickly."""
    return os.environ | QUICK | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
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
            for tag in events.Tags()["tensors"]}


def same_arrays(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def same_end(one, other):
    """Whether two runs ended at the same agent, actor, buffer, counters and episodes."""
    (counters, arrays), (other_counters, other_arrays) = checkpoint(one), checkpoint(other)
    counters.pop("wall_time"), other_counters.pop("wall_time")
    unequal = [name for name in arrays if not np.array_equal(arrays[name], other_arrays[name], equal_nan=True)]
    assert arrays.keys() == other_arrays.keys() and unequal == []
    assert counters == other_counters
    assert (one / "episodes.csv").read_text() == (other / "episodes.csv").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# What a run writes
# ----------------------------------------------------------------------------------------------------------------------
def test_run_directory_is_named_after_task_experiment_and_seed(point):
    assert re.fullmatch(r"SafetyPointGoal1-v0__spowl_continuous__1__\d+", point.dir.name)


def test_args_json_holds_all_flags_and_versions(point):
    info = json.loads((point.dir / "args.json").read_text())
    assert info["script"] == "spowl_continuous" and info["python"] == sys.version.split()[0]
    assert info["args"] == dataclasses.asdict(parse_args(POINT + ["--runs-dir", str(point.dir.parent)]))
    log = subprocess.run("git log -9 --format=%H", shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert info["git_commit"] in (log.split() or [None])  # of the script's repository, wherever it is run
    named = "jax jaxlib optax numpy safety-gymnasium gymnasium mujoco".split()
    assert info["packages"] == {name: metadata.version(name) for name in named}


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
    assert "about 7 days" in spowl.advice(Args())


def test_checkpoint_counts_what_was_done(point):
    """METHOD §2: one gradient update per agent step collected; 500 steps of random actions."""
    counters, arrays = checkpoint(point.dir)
    assert (counters["step"], counters["simulated"]) == (2500, 2500)
    assert counters["episodes"] == [1, 1] and counters["completed"] == 2500  # number 0 is over
    assert counters.keys() == {*Run._fields} - {"agent", "actor", "buffer"}
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
    so_far = np.stack([rows[40:].sum(0), arrays["['buffer'].rows.cost"][40:].sum(0), [250, 250]], 1)
    assert np.allclose(counters["so_far"], so_far, atol=1e-4)
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


@pytest.mark.parametrize("per_cycle", [1, 70, 100, 101, 110, 350, 1000, 1150])
def test_updates_come_in_blocks_of_nearly_one_size(per_cycle):
    """At most 100 at once, each size compiled: as few blocks as that allows, at most two sizes, none across the end of
    what belongs to a cycle, whenever the random start was over and whatever was done before a stop."""
    for starts, first in ((5000, 0), (0, 0), (10_000, 0), (5000, per_cycle // 3), (5000, per_cycle)):
        args, done, blocks = Args(updates_per_step=per_cycle / 1000, learning_starts=starts), first, []
        for step in range(5000, 25_000, 5000):
            while count := spowl.next_updates(args, step, done):
                assert step >= starts and done // per_cycle == (done + count - 1) // per_cycle
                blocks, done = blocks + [count], done + count
            assert done == (per_cycle * step // 5000 if step >= starts else first)
        assert max(blocks) <= 100 and (first or max(blocks) - min(blocks) <= 1)
        assert len(blocks) == -(-per_cycle // 100) * 4 or first


# ----------------------------------------------------------------------------------------------------------------------
# What the critic knew
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_chunks_are_of_one_size_and_leave_nothing_out(count):
    x, y, called = np.arange(2.0 * count).reshape(count, 2), np.arange(3.0 * count).reshape(count, 3), []

    def function(x, y):
        called.append((x.shape, y.shape))
        return x.sum(1), y[:, 0]

    first, second = spowl.in_chunks(function, x, y)
    assert np.array_equal(first, x.sum(1)) and np.array_equal(second, y[:, 0])
    assert called == [((1000, 2), (1000, 3))] * -(-count // 1000)


def test_what_the_critic_knew_against_numpy_compiled_once():
    """Whatever the number of steps, on both sides of the size of a chunk: the area by comparing every costly step with
    every other, the values read from NumPy's networks."""
    args, rng, compiled = small_args(), np.random.default_rng(0), spowl.read_costs._cache_size()
    agent = random_agent(args, 5, 2)
    for count in (7, 1000, 1001, 2300):
        obs, action = rng.normal(size=(count, 5)).astype(np.float32), rng.uniform(-1, 1, (count, 2)).astype(np.float32)
        cost, zeros = (rng.random(count) < 0.3).astype(np.float32), np.zeros(count, np.float32)
        rows, cost[:2] = Transition(obs, action, zeros, cost, obs, zeros, zeros), [1.0, 0.0]
        episodes = [{"played": Transition(*(x[part] for x in rows))} for part in (slice(0, 3), slice(3, None))]
        z = np_latent(args, agent.model["encoder"], obs)
        one_step, qc = (np_heads(args, agent.model[name], z, action).mean(0) for name in ("cost", "qc"))
        above = one_step[cost > 0][:, None] - one_step[cost == 0]
        expected = {"critic/cost_auc": np.mean(np.where(above == 0, 0.5, above > 0))}
        expected |= spowl.read_and_followed(args, episodes, qc)
        found = spowl.critic_metrics(args, agent, episodes)
        assert found.keys() == expected.keys() and "critic/read_before_1" in found
        np.testing.assert_allclose([*found.values()], [expected[tag] for tag in found], rtol=1e-3, atol=1e-3)
        assert spowl.read_costs._cache_size() == compiled + 1, count


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


def test_killed_after_its_last_checkpoint_but_one(place, point, tmp_path):
    """What kill -9 leaves of it goes on to the same end, in another process: the steps since are done again."""
    directory = tmp_path / point.dir.name
    shutil.copytree(point.dir, directory)
    (directory / "checkpoint_2500.npz").unlink()
    run(place, "--resume", directory)
    same_end(directory, point.dir)


@pytest.fixture(scope="session")
def other_seed(place):
    """Seed 2, evaluated by one episode, which needs fewer environments than training; says what was compiled."""
    code = ("import sys; from spowl_continuous import *; train(parse_args(sys.argv[1:]));"
            "print('compiled', *(f._cache_size() for f in (act, update_many, add, read_costs)))")
    finished = command(place, "-c", code, "--runs-dir", place / "other", *POINT, "--seed", 2, "--eval-episodes", 1)
    assert finished.returncode == 0, finished.stderr
    (directory,) = (place / "other").iterdir()
    return types.SimpleNamespace(dir=directory, stdout=finished.stdout)


def test_every_jitted_function_is_compiled_once(other_seed):
    assert "compiled 1 1 1 1\n" in other_seed.stdout


def test_another_seed_gives_other_numbers(point, other_seed):
    """Networks, random actions, layouts: all of them follow from the seed."""
    arrays, other = checkpoint(point.dir)[1], checkpoint(other_seed.dir)[1]
    names = [name for name, array in arrays.items() if array.size > 50 and "scale" not in name and "shift" not in name]
    names = [name for name in names if ".done" not in name and ".terminated" not in name and "cost" not in name]
    assert len(names) > 20 and not any(np.array_equal(arrays[name], other[name]) for name in names)
    assert not (arrays["['buffer'].rows.obs"][0] == other["['buffer'].rows.obs"][0]).all(-1).any()
    assert not np.isin(*(each["['buffer'].rows.action"][:10] for each in (arrays, other))).any()  # drawn at random
    assert not any(np.array_equal(arrays[name], other[name]) for name in ("['agent'].key", "['actor'].key"))
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
    rate = f"{checkpoint(point.dir)[0]['cost'] / 2500:.4f}"
    assert SUMMARY.search(evaluated.stdout).group(1, 4, 5) == ("2,500", "3", rate)
    assert f"balance {np.mean([float(row['balance']) for row in rows]):.0%}," in evaluated.stdout
    said = evaluated.stdout.splitlines()
    places = said[said.index(f"episodes: {evaluated.dir / 'evaluation.csv'}"):]
    assert places[1:] == [f"the first one: {evaluated.dir / 'videos' / 'evaluation_2500.mp4'}"] * evaluated.draws
    known = dict(line.split() for line in said if line.startswith("critic/"))
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
    black = np.zeros((512, 512, 3), np.uint8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spowl.write_video(tmp_path / "videos" / "5.mp4", [(black, 1.0, 0.0), (black, -2.5, 30.0), (black, -2.5, 30.0)])
    assert [str(warning.message) for warning in told] == []
    with warnings.catch_warnings(action="ignore"):
        frames = np.stack(imageio.mimread(tmp_path / "videos" / "5.mp4", memtest=False)).astype(float)
    assert frames.shape == (3, 512, 512, 3) and frames[:, :40, :250].max() > 200 and frames[:, 50:].max() < 20
    first, second, third = frames[:, :40, :300]
    assert np.abs(first - second).max() > 150 > 30 > np.abs(second - third).max()


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
    free = {"total_timesteps": 9000, "eval_every": 500, "eval_episodes": 7, "env_timeout": 9.0, "capture_video": True,
            "track": True, "wandb_project_name": "p", "wandb_entity": "e", "runs_dir": "r", "resume": str(point.dir)}
    words = [f"--{name.replace('_', '-')}" + f"={value}" * (value is not True) for name, value in free.items()]
    assert parse_args(words) == dataclasses.replace(saved, **free)
    evaluated = parse_args(["--evaluate", str(point.dir), "--seed", "5", "--capture-video"])
    assert evaluated == dataclasses.replace(saved, evaluate=str(point.dir), seed=5, capture_video=True)
    with pytest.raises(SystemExit, match="^--resume and --evaluate exclude each other$"):
        parse_args(["--resume", str(point.dir), "--evaluate", str(point.dir)])


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


@pytest.mark.long
def test_an_interrupted_run_says_how_to_go_on(place):
    """Ctrl-C: exit code 130 and one line, no traceback from the script or from its environments' processes."""
    process = start_and_evaluate(place, "--runs-dir", place / "interrupted", *POINT, "--total-timesteps", 50_000)
    try:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr and "--resume" in stderr
    (directory,) = (place / "interrupted").iterdir()
    assert 1000 <= checkpoint(directory)[0]["step"] < 50_000


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be loaded
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def copied(place, point, tmp_path, monkeypatch):
    """A copy of the run to spoil, with no simulator started when it is evaluated in this process."""
    monkeypatch.setattr(spowl, "start_envs", lambda *_: (lambda *_: None, 60, 2))
    directory = tmp_path / "run"
    shutil.copytree(point.dir, directory)
    return directory


@pytest.fixture
def main(monkeypatch):
    """main(flag, ...) is the command line in this process -> what it printed, the message that it ends with or None. No
    signal is heeded, and no stream but its own is changed."""
    def run(*words):
        printed = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(sys, "stdout", printed), patch.setattr(sys, "stderr", io.StringIO())
            try:
                spowl.main(list(map(str, words)))
            except SystemExit as stop:
                return printed.getvalue(), stop.code
        return printed.getvalue(), None

    return run


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
    "a word for a number": lambda run, file: change_flags(run, total_timesteps="many"),
    "a list for a number": lambda run, file: change_flags(run, gamma=[0.9]),
    "a fraction for a count": lambda run, file: change_flags(run, num_envs=2.5),
    "a number for a name": lambda run, file: change_flags(run, env_id=3),
    "a word for a switch": lambda run, file: change_flags(run, track="yes"),
    "another word than there is": lambda run, file: change_flags(run, preset="desktop"),
    "nothing for a number": lambda run, file: change_flags(run, rho=None),
    "flags that are a list": lambda run, file: change_info(run, lambda info: info | {"args": [1]}),
    "no checkpoint": lambda run, file: [path.unlink() for path in run.glob("checkpoint_*")],
    "a counter is missing": lambda run, file: change_counters(file, lambda found: without(found, "simulated")),
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
    assert not (copied / "unpickled").exists()


@pytest.fixture
def load(copied):
    """load(...) is `load_checkpoint` of agent, actor and buffer, these as {path: array}, typed keys as their data."""
    make = partial(spowl.fresh, parse_args(["--evaluate", str(copied)]), (60, 2))

    def load(*names):
        trees, counters = spowl.load_checkpoint(copied, jax.eval_shape(make, jax.random.key(1)), *names)
        is_key = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return trees, counters, {jax.tree_util.keystr(path): np.asarray(jax.random.key_data(x) if is_key(x) else x)
                                 for path, x in jax.tree_util.tree_leaves_with_path(trees)}

    return load


@pytest.mark.parametrize("part", np.linspace(0.02, 0.98, 8).tolist())
def test_a_flipped_byte_is_noticed_or_harmless(copied, load, part):
    """Anywhere in the file: loading either gives the numbers that were saved or refuses in one line."""
    path, intact = newest(copied), load()[2]
    flip(path, int(part * path.stat().st_size))
    try:
        loaded = load()[2]
    except SystemExit as stop:
        assert str(path) in str(stop) and "\n" not in str(stop)
    else:
        assert same_arrays(intact, loaded)


@pytest.mark.parametrize("within, before, offset, bits", [
    (b"['buffer'].rows.obs", b"\x93NUMPY", 8, 0x02), (b"", b"PK\x01\x02", 6, 0x41), (b"", b"PK\x01\x02", 8, 0x41),
    (b"", b"PK\x01\x02", 10, 0x41)])
def test_a_flipped_bit_where_numpy_does_not_look_is_noticed(copied, load, within, before, offset, bits):
    """The length of an array's header, by which all numbers move by two bytes; the table of the zip file: version,
    encryption, compression."""
    path = newest(copied)
    data = bytearray(path.read_bytes())
    data[data.index(before, data.index(within)) + offset] ^= bits
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        load()
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)


def test_a_loaded_checkpoint_holds_what_was_saved(copied, load):
    """Every array of agent, actor and buffer comes back with its bits and its type, and the counters asked for."""
    trees, counters, loaded = load(Run._fields[3:])
    saved_counters, saved = checkpoint(copied)
    assert counters == saved_counters and loaded.keys() == saved.keys()
    assert load()[1] == {name: counters[name] for name in ("step", "simulated", "cost")}
    for name, array in loaded.items():
        filled = array[:50] if name.startswith("['buffer'].rows") else array
        assert np.array_equal(filled, saved[name]) and array.dtype == saved[name].dtype
        assert np.array_equal(array[len(filled):], np.zeros_like(array[len(filled):])) if array.ndim else True
    spowl.save_checkpoint(copied, Run(**trees, **counters)._replace(step=9999, obs=np.array(counters["obs"])))
    again_counters, again = checkpoint(copied)
    assert same_arrays(again, saved) and again_counters == counters | {"step": 9999}
    assert [path.name for path in spowl.checkpoints(copied)] == ["checkpoint_2500.npz", "checkpoint_9999.npz"]


def test_a_damaged_run_is_refused_on_the_command_line(copied, main, place):
    """And the checkpoint before it is evaluated, on a terminal that has no letter for plus or minus."""
    newest(copied).write_bytes(newest(copied).read_bytes()[:-1000])
    message = main("--evaluate", copied)[1]
    assert message.startswith(f"{newest(copied)} is damaged ") and "\n" not in message
    assert message.endswith("; remove it to go on from checkpoint_2000.npz")
    newest(copied).unlink()
    finished = command(place, SCRIPT, "--evaluate", copied, "--eval-episodes", 1, PYTHONIOENCODING="ascii")
    assert finished.returncode == 0, finished.stderr
    assert SUMMARY.search(finished.stdout.replace("?", "±")).group(1, 4) == ("2,000", "1")


@pytest.fixture
def played(copied, monkeypatch):
    """The copy, on which an evaluation is two episodes of four steps, filmed."""
    zeros, obs = np.zeros(4, np.float32), np.ones((4, 60), np.float32)
    rows = Transition(obs, np.zeros((4, 2), np.float32), zeros, zeros, obs, zeros, zeros)
    episodes = [{"environment": i, "return": 1.5, "cost": 2.0, "length": 1000, "balance": 0.5, "played": rows}
                for i in range(2)]
    monkeypatch.setattr(spowl, "evaluate", lambda *_, **__: (episodes, [(np.zeros((512, 512, 3), np.uint8), 0.0, 0.0)]))
    monkeypatch.setattr(spowl, "write_video", lambda *_: None)
    return copied


@pytest.mark.parametrize("error, told", [
    (OSError(28, "No space left on device", "a.mp4"),
     "[Errno 28] No space left on device: 'a.mp4'; the last checkpoint stays"),
    (OSError("[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nffmpeg -y"), "[Errno 32] Broken pipe")],
    ids=["the system's", "imageio's"])
def test_an_evaluation_that_cannot_be_written_is_told_nevertheless(played, main, monkeypatch, error, told):
    """What came out is printed, and one line says what could not be written: also where an error's text has several."""
    def fail(*_):
        raise error

    monkeypatch.setattr(spowl, "write_video", fail)
    printed, message = main("--evaluate", played)
    assert SUMMARY.search(printed).group(1, 2, 3, 4) == ("2,500", "1.50", "2.0", "2")
    assert "critic/read_outside" in printed and len(rows_of(played / "evaluation.csv")) == 2
    assert message == told
    (played / "evaluation.csv").unlink()
    (played / "evaluation.csv").mkdir()
    printed, message = main("--evaluate", played)
    assert SUMMARY.search(printed) and f"Is a directory: '{played / 'evaluation.csv'}'" in message


def test_an_evaluation_is_written_before_its_diagnostics(played, main, monkeypatch):
    """Which may find no memory for all its episodes."""
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(spowl, "critic_metrics", fail)
    printed, message = main("--evaluate", played)
    assert SUMMARY.search(printed) and "the memory is full" in message
    assert len(rows_of(played / "evaluation.csv")) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Two processes, Weights & Biases
# ----------------------------------------------------------------------------------------------------------------------
def resumed_args(run_dir, *flags):
    return parse_args(["--resume", str(run_dir), "--total-timesteps", "9000", *flags])


def in_use(directory):
    """The message with which resuming a run is refused."""
    with contextlib.ExitStack() as stack, pytest.raises(SystemExit) as stop:
        spowl.hold(directory, stack)
    return str(stop.value)


def test_a_run_in_use_is_not_resumed(copied):
    """One line, before anything is written; as soon as the other process has gone, it may be."""
    before = sorted((path.name, path.stat().st_mtime_ns) for path in copied.iterdir())
    with open(copied / "args.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_use(copied) == f"another process trains in {copied}"
        assert sorted((path.name, path.stat().st_mtime_ns) for path in copied.iterdir()) == before
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            spowl.hold(copied, stack)
            assert in_use(copied) == f"another process trains in {copied}"


def test_a_finished_run_is_not_resumed(copied):
    with pytest.raises(SystemExit) as stop:
        spowl.begin(parse_args(["--resume", str(copied)]), None, (60, 2))
    assert str(stop.value) == f"{copied} is at step 2,500 already: raise --total-timesteps to go on"


def test_a_checkpoint_with_other_counters_is_not_resumed(copied):
    """As one of another version: nothing is asked of the environments before."""
    change_counters(newest(copied), lambda found: without(found, "so_far"))
    with pytest.raises(SystemExit, match=r"checkpoint_2500.npz is damaged or not a checkpoint of this .*: 'so_far'"):
        spowl.begin(resumed_args(copied), None, (60, 2))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_is_no_other_process(copied, monkeypatch, number):
    """Lustre without them, and NFS, which locks only files opened for writing."""
    def flock(file, how):
        if number != errno.EBADF or not file.writable():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as stack:
        spowl.hold(copied, stack)


class Wandb(types.ModuleType):
    """Weights & Biases as far as it is called: what it was asked, and how often its run was finished."""

    def __init__(self):
        super().__init__("wandb")
        self.asked, self.finished = [], []

    def init(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(finish=lambda: self.finished.append(True))


def test_a_tracked_run_goes_on_where_it_was(copied, monkeypatch):
    """The same id, which may be resumed; seeds are one group; it follows what is written for TensorBoard."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    args = resumed_args(copied, "--track", "--wandb-project-name", "safe", "--wandb-entity", "us")
    with contextlib.ExitStack() as stack:
        spowl.open_run_dir(args, stack)
        assert wandb.asked == [{
            "id": "run", "group": "SafetyPointGoal1-v0__spowl_continuous", "resume": "allow", "project": "safe",
            "entity": "us", "config": vars(args), "dir": copied, "sync_tensorboard": True}]
        assert wandb.finished == []
    assert wandb.finished == [True]
    with contextlib.ExitStack() as stack:
        spowl.open_run_dir(resumed_args(copied), stack)
    assert len(wandb.asked) == 1  # not without --track


def test_where_nobody_is_logged_in_one_line_says_so(copied, monkeypatch):
    """What W&B raises there is a wandb.Error; anything else is ours, and stays what it is."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    wandb.Error = type("Error", (Exception,), {})

    def init(**_):
        raise raised

    wandb.init = init
    for raised, becomes, says in ((wandb.Error("no key\nuse `wandb login`"), SystemExit, "^--track: no key use `wandb"),
                                  (KeyError("key"), KeyError, "key")):
        with contextlib.ExitStack() as stack, pytest.raises(becomes, match=says):
            spowl.open_run_dir(resumed_args(copied, "--track"), stack)


@pytest.fixture
def scripted(monkeypatch):
    """`train` is next to nothing: one agent step a cycle, at which the next of these happens: an error is raised, a
    function called, None is nothing; then an evaluation."""
    def collect(args, ask, run):
        event = happens.pop(0) if happens else None
        if isinstance(event, BaseException):
            raise event
        if event:
            event()
        return run._replace(step=spowl.cycle_end(args, run.completed)), 0.0

    happens, agent = [], types.SimpleNamespace(num_updates=0)
    monkeypatch.setattr(spowl, "start_envs", lambda *_: (lambda *_: None, 60, 2))
    monkeypatch.setattr(spowl, "begin", lambda *_: Run(agent, None, None, 0, 0, 0, 0.0, [], [], [], [], 0.0))
    monkeypatch.setattr(spowl, "collect", collect)
    monkeypatch.setattr(spowl, "next_updates", lambda *_: 0)
    monkeypatch.setattr(spowl, "end_cycle", lambda args, ask, run_dir, writer, run, *_: (
        run._replace(completed=run.step), ["an episode"]))
    monkeypatch.setattr(spowl, "save_checkpoint", lambda *_: None)
    return happens


def test_a_run_stopped_after_an_evaluation_gives_no_episodes(scripted, tmp_path):
    """By this it is told from one that is done."""
    args, stopping = parse_args(["--total-timesteps", "15000", "--runs-dir", str(tmp_path)]), []
    scripted += [None, lambda: stopping.append(signal.SIGINT)]
    assert spowl.train(args, stopping) == [] and len(stopping) == 1
    (tmp_path / "other").mkdir()
    assert spowl.train(dataclasses.replace(args, runs_dir=str(tmp_path / "other"))) == ["an episode"]


@pytest.mark.parametrize("error, stopping", [
    (None, []), (None, [15]), (ChildProcessError("died"), []), (OSError(errno.ENOSPC, "No space left on device"), []),
    (SystemExit("not finite"), [])], ids=["end", "stop", "environment", "disk", "numbers"])
def test_a_tracked_run_is_finished_whatever_ends_it(scripted, monkeypatch, tmp_path, error, stopping):
    """Once, and after TensorBoard's file is closed, which it follows."""
    order, wandb = [], Wandb()
    wandb.finished = types.SimpleNamespace(append=lambda _: order.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("tensorboard.summary.Writer", lambda place: types.SimpleNamespace(
        close=lambda: order.append("closed")))
    scripted.append(error)
    args = parse_args(["--track", "--runs-dir", str(tmp_path)])
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        assert spowl.train(args, stopping) == ([] if stopping else ["an episode"])
    assert order == ["closed", "finished"] and len(wandb.asked) == 1


def test_tracking_without_weights_and_biases_is_one_line(scripted, main, monkeypatch, tmp_path):
    """Not installed: None stands for that in sys.modules. It is imported with --track alone."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, message = main("--track", "--runs-dir", tmp_path / "one")
    assert "wandb" in message and "\n" not in message and not (tmp_path / "one").exists()
    assert main("--runs-dir", tmp_path / "other")[1] is None


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


def test_main_works_in_a_notebook_too(monkeypatch):
    """Whose sys.stdout is no file: it cannot be told what to do with letters that it does not have. Nor need it be in
    the main thread, which alone can heed signals."""
    monkeypatch.setattr(spowl, "train", lambda args, stopping: [print("trained")])
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        thread = threading.Thread(target=spowl.main, args=([],))
        thread.start(), thread.join()
        with pytest.raises(SystemExit):
            spowl.main(["--help"])
    assert printed.getvalue().startswith("trained\n") and "--env-id" in printed.getvalue()


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
    entropy_coef=1e-4, cost_budget=None, cost_limit=0.1, lagrangian_heads=5, lagrangian_agg="mean", lambda_init=1e-6,
    lambda_max=10.0, mu_init=5e-9, mu_growth=5e-6, mu_max=1.0,
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


def test_presets_are_what_was_measured():
    """README's and docs/results' numbers were made with these: another value is another preset."""
    laptop = dict(
        total_timesteps=300_000, eval_every=20_000, buffer_size=300_000, updates_per_step=0.5, obs_transform="bins",
        latent_dim=128, enc_dim=128, mlp_dim=128, num_q=3, num_qc=3, num_c=3, lagrangian_heads=3, batch_size=128,
        cost_read_out="expectation", cost_gamma=0.95, lambda_max=0.2, mu_init=4.8e-8, mu_growth=5e-6, num_samples=64,
        num_pi_trajs=8, num_elites=8, iterations=4)
    assert spowl.PRESETS == {"paper": {}, "laptop": laptop}
    assert parse_args(["--preset", "laptop"]) == Args(preset="laptop", **laptop)
    assert parse_args(["--preset", "laptop", "--lambda-max", "2"]).lambda_max == 2.0  # a flag that is given counts


# ----------------------------------------------------------------------------------------------------------------------
# Episodes that end early; an environment of one's own
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_ant_ends_early(place):
    """METHOD §2: Ant may terminate before 1000 steps, which reaches csv and buffer."""
    flags = "--env-id SafetyAntGoal1-v0 --total-timesteps 1500 --learning-starts 1500 --eval-episodes 1"
    ant = train(place, *TINY, *flags.split())  # random actions alone
    rows, (counters, arrays) = rows_of(ant.dir / "episodes.csv"), checkpoint(ant.dir)
    lengths = [int(row["length"]) for row in rows if row["split"] == "train"]
    buffer = {field: arrays[f"['buffer'].rows.{field}"] for field in spowl.Transition._fields}
    done = buffer["done"] > 0
    assert lengths and max(lengths) < 1000 and len(lengths) == done.sum()
    assert np.array_equal(buffer["terminated"], buffer["done"])
    assert counters["episodes"] == done.sum(0).tolist()
    assert counters["step"] == 1500 and counters["simulated"] == 1500 - sum(-length % 5 for length in lengths)
    followed = (buffer["obs"][1:] == buffer["next_obs"][:-1]).all(-1)
    assert np.array_equal(followed, ~done[:-1])


def example(page, name):
    """The code block of a page that follows <!-- name -->."""
    return re.search(rf"<!-- {name} -->\s*```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL).group(1)


def short_loop():
    """The page's loop on one's own environment, with fewer steps and fewer, narrower networks."""
    code = example("docs/your_own.md", "own environment")
    assert "from spowl_continuous import" in code
    for given, less in (("% 250", "% 50"), ("10_000", "101"), (">= 500", ">= 50"), ("num_updates=50", "num_updates=2"),
                        ("iterations=4", "iterations=2, num_q=2, num_qc=1, num_c=1, lagrangian_heads=1, num_bins=21")):
        assert code.count(given) == 1
        code = code.replace(given, less)
    return re.sub(r"=\s*128\b", "=32", code)


def test_a_loop_of_ones_own_trains(place):
    check = "\nassert int(agent.num_updates) > 0 and all(np.isfinite(float(x)) for x in metrics.values()), metrics"
    finished = command(place, "-c", short_loop() + check)
    assert finished.returncode == 0, finished.stderr
    assert [line.split(": ")[0] for line in finished.stdout.splitlines()] == ["50 steps", "100 steps"]


REGISTERED = example("README.md", "own environment, registered")


def test_a_registered_class_of_ones_own_trains(place):
    """The example, with small flags."""
    flags = [*TINY, "--total-timesteps", "1000", "--eval-episodes", "2", "--runs-dir", str(place / "reach")]
    code = REGISTERED.replace('"--preset", "laptop"', f"*{flags}")
    assert code.count("num-envs") == 1 and code.count("*sys.argv[1:]") == 1
    (place / "reach.py").write_text(code)
    finished = run(place, script=place / "reach.py")
    assert "WARN" not in finished.stderr.replace("WARNING", "")
    assert SUMMARY.search(finished.stdout).group(1, 4) == ("1,000", "2")
    (directory,) = (place / "reach").iterdir()
    rows, (counters, arrays) = rows_of(directory / "episodes.csv"), checkpoint(directory)
    assert {row["length"] for row in rows} == {"100"} and arrays["['agent'].num_updates"] == 200
    assert {0.0, 5.0} <= set(np.unique(arrays["['buffer'].rows.cost"]).tolist()) and counters["step"] == 1000


def test_a_registered_class_takes_the_command_line(monkeypatch):
    """So that what a stopped run says, "go on with --resume ...", works for it."""
    asked = []
    monkeypatch.setattr(spowl, "main", asked.append)
    monkeypatch.setattr(sys, "argv", ["reach.py", "--resume", "runs/RUN"])
    exec(compile(REGISTERED, "reach.py", "exec"), {"__name__": "__main__"})
    assert asked == [["--env-id", "Reach-v0", "--preset", "laptop", "--resume", "runs/RUN"]]
    spowl.import_safety_gymnasium().utils.registration.safe_registry.discard("Reach-v0")


LOADED = example("docs/your_own.md", "a trained agent acts")


def test_a_loaded_agent_acts(place, point):
    kept = "benchmark/pretrained/laptop_PointGoal1"
    assert LOADED.count(kept) == 1 and (ROOT / kept).is_dir()
    finished = command(place, "-c", LOADED.replace(kept, str(point.dir)))
    assert finished.returncode == 0, finished.stderr
    numbers = re.fullmatch(r"return, cost, length so far: (\S+) (\S+) (\S+)\n", finished.stdout).groups()
    assert np.isfinite(float(numbers[0])) and float(numbers[2]) == 250.0
