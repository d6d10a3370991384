"""probe/cost_probe.py, blind.py, pretrained.py, drawn.py and what_costs.py, on a run made by hand and on a task."""
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leaves_equal, random_agent, saved_run, small_args
from test_envs import toy_agent

import spowl_continuous as spowl
from benchmark.kept import read_kept
from probe import cost_probe, drawn, pretrained, what_costs
from spowl_continuous import Transition

ARGS = small_args(num_envs=4, buffer_size=200, obs_transform="log", preset="laptop")  # 50 rows of 4 environments
STEPS = 60  # ten more than the ring holds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose ring is full and has begun anew. The first observed number is the step; a step costs where the second
    is positive."""
    rng, buffer = np.random.default_rng(0), spowl.init_buffer(ARGS, 3, 2)
    zeros = np.zeros(4, np.float32)
    for step in range(STEPS):
        obs, action = rng.normal(size=(4, 3)).astype(np.float32), rng.uniform(-1, 1, (4, 2)).astype(np.float32)
        obs[:, 0] = step
        cost = (obs[:, 1] > 0).astype(np.float32)
        buffer = spowl.add(buffer, Transition(obs, action, zeros, cost, obs, zeros, zeros))
    agent, args = random_agent(ARGS, 3, 2), dataclasses.replace(ARGS, runs_dir=str(tmp_path_factory.mktemp("probe")))
    return saved_run(spowl, args, agent, buffer, 1200, 10.0), agent


def test_rows_are_read_oldest_first(run):
    rows, args = cost_probe.load_rows(run[0])
    assert args == dataclasses.replace(ARGS, runs_dir=str(run[0].parent)) and rows.obs.shape == (50, 4, 3)
    assert rows.obs[:, 0, 0].tolist() == list(range(10, 60))
    few, _ = cost_probe.load_rows(run[0], max_steps=200)
    assert few.obs[:, 0, 0].tolist() == list(range(10, 20))


def test_what_is_stored_transformed_cannot_be_asked_raw(run):
    rows, args = cost_probe.load_rows(run[0])
    assert cost_probe.transformed(rows, "log", args) is rows
    assert cost_probe.transformed(rows, "log", dataclasses.replace(args, obs_transform="bins")) is rows
    with pytest.raises(SystemExit, match="raw observations"):
        cost_probe.transformed(rows, "log", dataclasses.replace(args, obs_transform="raw"))


def test_raw_rows_are_transformed_by_the_bounds_of_the_task():
    obs = np.full((2, 1, 60), 0.5, np.float32)
    rows = Transition(obs, *[None] * 3, obs, None, None)
    seen = cost_probe.transformed(rows, "raw", dataclasses.replace(ARGS, env_id="SafetyPointGoal1-v0")).next_obs
    np.testing.assert_allclose(seen[..., 12:], -np.log(0.52), rtol=1e-6)
    np.testing.assert_allclose(seen[..., :12], np.log(1.5), rtol=1e-6)


def test_reading_by_hand(monkeypatch):
    """Costs 1, 0, 2 of one environment whose episode ends with the second step; Qc reads 4, 5, 6, the head the cost."""
    column = lambda *values: np.array(values, np.float32)[:, None]
    cost, done = column(1, 0, 2), column(0, 1, 0)
    rows = Transition(column(4, 5, 6)[..., None], column(1, 0, 2)[..., None], 0 * cost, cost, None, 0 * cost, done)
    monkeypatch.setattr(spowl, "encode", lambda args, model, obs: obs)
    monkeypatch.setattr(spowl, "cost_heads",
                        lambda args, name, z, action: {"cost": action, "qc": z}[name][None, ..., 0])
    args = small_args(cost_gamma=0.5)
    area, _, correlation, read, followed = cost_probe.held_out_reading(args, {"cost": "cost", "qc": "qc"}, rows)
    expected = [1 + 0.5 * 5, 5.0, 6.0]  # Qc's own reading where an episode is cut
    assert area == 1.0 and read == 5.0 and followed == pytest.approx(np.mean(expected))
    assert correlation == pytest.approx(np.corrcoef([4, 5, 6], expected)[0, 1])


def test_sensors_of_a_task():
    """PointGoal1: four readings of three numbers, then three lidars of 16 (Safety-Gymnasium's documentation)."""
    names = ["accelerometer", "velocimeter", "gyro", "magnetometer", "goal_lidar", "hazards_lidar", "vases_lidar"]
    assert cost_probe.sensors(spowl.import_safety_gymnasium().make("SafetyPointGoal1-v0")) == dict(zip(names, [
        slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), slice(12, 28), slice(28, 44), slice(44, 60)]))


BLIND = """
import sys; sys.path.insert(0, "probe")
import blind, numpy as np
plain, without = (blind.spowl.import_safety_gymnasium().make(f"SafetyPointGoal1{name}-v0") for name in
                  ("", "NoHazardsLidar"))
pairs = [[env.reset(seed=1)[0] for env in (plain, without)]]
for _ in range(1000):
    seen, hidden = (env.step(np.ones(2)) for env in (plain, without))
    assert seen[1:5] == hidden[1:5]
    pairs.append([seen[0], hidden[0]])
assert seen[4] and all(np.delete(a - b, slice(28, 44)).any() == b[28:44].any() == False for a, b in pairs)
assert np.abs(pairs)[:, 0, 28:44].max() > 0.5 and pairs[0][0].dtype == pairs[0][1].dtype
blind.spowl.main(["--env-id", "SafetyPointCircle1NoVasesLidar-v0", "--runs-dir", "/nowhere"])
"""


def test_a_task_without_a_sensor():
    """The same episode to its end but for the entries of the hazards' lidar; a task without such a sensor says so."""
    ended = subprocess.run([sys.executable, "-c", BLIND], cwd=cost_probe.ROOT, capture_output=True, text=True,
                           timeout=300)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].partition(" (/")[0].endswith(
        "ValueError: SafetyPointCircle1-v0 has no vases_lidar, but accelerometer, velocimeter, gyro, magnetometer, "
        "circle_lidar"), ended.stderr
    assert "WARN" not in ended.stderr  # gymnasium's, for a wrapper whose reset does not name a seed


@pytest.mark.parametrize("stored", ["raw", "log"])
def test_distance_to_the_nearest_hazard(stored):
    """A lidar of 0.9 is 0.3 m away; the nearest counts, and what is not a hazard does not."""
    obs = np.array([[[0.99, 0.9, 0.5, 0.98]], [[0.7, 0.0, 0.0, 0.2]]], np.float32)
    rows = Transition(obs if stored == "raw" else -np.log(1.02 - obs), *[None] * 6)
    np.testing.assert_allclose(cost_probe.hazard_distance(rows, stored, slice(1, 3)), [[0.3], [3.0]], atol=1e-5)


def test_what_agents_do_not_see():
    rng = np.random.default_rng(0)
    rows = Transition(rng.normal(size=(2, 3, 5)), *[None] * 3, rng.normal(size=(2, 3, 5)), None, None)
    less = cost_probe.blinded(rows, [slice(1, 2), slice(3, 5)])
    for before, after in ((rows.obs, less.obs), (rows.next_obs, less.next_obs)):
        assert (after[..., [1, 3, 4]] == 0.0).all() and (before != 0.0).all()
        assert np.array_equal(after[..., [0, 2]], before[..., [0, 2]])


def test_what_is_linear_is_found():
    """y = 2 x_0 + 1 is known; of y = x_0 + x_1 with x_1 unseen half the variance is; of noise nothing."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 4000, 3)), rng.normal(size=(2, 4000))
    of = lambda y: cost_probe.linear_r2(*((x[i][:, [0, 2]], y(i)) for i in (0, 1)))
    assert of(lambda i: 2.0 * x[i][:, 0] + 1.0) == pytest.approx(1.0, abs=1e-6)
    assert of(lambda i: x[i][:, 0] + x[i][:, 1]) == pytest.approx(0.5, abs=0.03)
    assert of(lambda i: noise[i]) == pytest.approx(0.0, abs=0.01)


def test_variants():
    label, script, args = cost_probe.read_variant("wide: --mlp-dim 32", dataclasses.asdict(ARGS))
    assert (label, script, args) == ("wide", spowl, dataclasses.replace(ARGS, mlp_dim=32))
    label, script, args = cost_probe.read_variant("d: ablations/spowl_decoder.py --decoder-coef 2",
                                                  dataclasses.asdict(ARGS))
    assert (label, script.__name__, args.decoder_coef, args.mlp_dim) == ("d", "spowl_decoder", 2.0, ARGS.mlp_dim)
    with pytest.raises(SystemExit, match="x.py does not exist"):
        cost_probe.read_variant("d: x.py", dataclasses.asdict(ARGS))


def test_a_sensor_that_is_not_there(run):
    with pytest.raises(SystemExit, match="--without eyes: SafetyPointGoal1-v0 has accelerometer, "):
        cost_probe.main(cost_probe.Options(run=run[0], without=("eyes",)))


@pytest.mark.parametrize("changes, said", [
    ({"every": 250}, "--every must be"), ({"every": 0}, "--every must be"), ({"updates": 100}, "--updates at least"),
    ({"held_out": 4}, "--held-out must be"), ({"held_out": 0}, "--held-out must be"),
    ({"max_steps": 20}, "raise --max-steps"), ({"max_steps": -1}, "^0 agent steps"),
    ({"csv": Path("/nowhere/x.csv")}, "no directory /nowhere"), ({"run": Path("/nowhere")}, "not a run directory")])
def test_options_that_cannot_be(run, changes, said):
    """Updates are made in blocks of 100: what is reported was made."""
    with pytest.raises(SystemExit, match=said):
        cost_probe.main(dataclasses.replace(cost_probe.Options(run=run[0]), **changes))


def test_areas_by_hand():
    """Costs 0 1 1 | 0 1 of one environment, | an episode's end: the third step alone begins inside a hazard."""
    column = lambda *values: np.array(values, np.float32)[:, None]
    rows = Transition(*[None] * 3, column(0, 1, 1, 0, 1), None, None, column(0, 0, 1, 0, 0))
    score = column(0.3, 0.2, 0.9, 0.1, 0.4)  # of six pairs 5 in order; without the third step 3 of four
    assert cost_probe.areas(score, rows) == (pytest.approx(5 / 6), pytest.approx(3 / 4))
    ends = rows._replace(done=column(0, 1, 0, 0, 0))  # now the fourth does: scores 0.2, 0.9, 0.4 against 0.3
    assert cost_probe.areas(score, ends)[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("learner", [cost_probe.supervised, cost_probe.probe])
def test_learners_never_see_what_is_asked(run, learner, monkeypatch):
    """Two environments are left out: their costs may be anything while learning, and decide the reading."""
    options = cost_probe.Options(run=run[0], updates=200, every=100)
    rows, args = cost_probe.load_rows(run[0])
    args = dataclasses.replace(args, learning_rate=3e-3, horizon=1, num_q=1, num_qc=1, num_c=1, lagrangian_heads=1)
    distance = np.abs(rows.obs[..., 1])
    readings = list(learner("x", args, rows, distance, options))
    assert [reading[1] for reading in readings] == [100, 200]
    assert {len(reading) for reading in readings} == {len(cost_probe.COLUMNS)}
    rows.cost[:, 2:] = 1.0 - rows.cost[:, 2:]
    turned = list(learner("x", args, rows, None, options))
    assert [reading[2] for reading in turned] == pytest.approx([1.0 - reading[2] for reading in readings], abs=2e-4)


def test_pretrained_keeps_what_evaluation_needs(run, tmp_path):
    pretrained.main(pretrained.Options(run[0], tmp_path / "kept"))
    (path,) = spowl.checkpoints(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "args.json").read_text())["args"] == dataclasses.asdict(ARGS) | {
        "runs_dir": str(run[0].parent)}
    trees, counters = spowl.load_checkpoint(tmp_path / "kept", {"agent": run[1]})
    agent = trees["agent"]
    networks = run[1].model, run[1].policy
    halved = jax.tree.map(lambda x: np.float32(np.float16(x)), networks)
    assert leaves_equal((agent.model, agent.policy), halved) and not any(map(np.any, jax.tree.leaves(agent.target)))
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (halved, networks)))) < 1e-3
    assert leaves_equal(agent[5:], run[1][5:])  # the numbers, as they were
    assert (counters["step"], counters["cost"]) == (1200, 10.0)
    with pytest.raises(SystemExit, match="not a checkpoint"):
        spowl.load_checkpoint(tmp_path / "kept", {"agent": run[1], "buffer": spowl.init_buffer(ARGS, 3, 2)})
    with pytest.raises(SystemExit, match="is there already"):
        pretrained.main(pretrained.Options(run[0], tmp_path / "kept"))


def test_actions_are_drawn_in_a_baselines_evaluation(run):
    """A script whose episodes are what it acted with: drawn while it is judged, its own again afterwards."""
    script = SimpleNamespace(
        parse_args=lambda argv: SimpleNamespace(num_envs=20, argv=argv), fresh=lambda args, sizes, key: {"agent": 0.0},
        start_envs=lambda args, stream, count: (lambda what: None, count, 2), act=lambda *inputs: inputs[-1],
        load_checkpoint=lambda directory, trees: ({"agent": directory}, {"step": 7}),
        evaluate=lambda args, agent, ask: ([args.argv, agent, script.act(args, agent, 0, 0, 0, False)], []))
    (argv, agent, explored), step = drawn.play_drawn(script, "somewhere", 3)
    assert argv == ["--evaluate", "somewhere", "--eval-episodes", "3"] and agent == "somewhere" and step == 7
    assert explored is True and script.act(0, 0, 0, 0, 0, False) is False
    with pytest.raises(SystemExit, match="is of spowl_continuous.py; only ppo_lagrangian, cpo, cvpo"):
        drawn.main(drawn.Options(run[0], run[0]))
    with pytest.raises(SystemExit, match="is not a run: "):
        drawn.main(drawn.Options(run[0] / "nothing", run[0]))
    with pytest.raises(SystemExit, match="--episodes must be at least 1"):
        drawn.main(drawn.Options(run[0], run[0], episodes=0))


def test_drawn_episodes_are_written_as_kept_ones_are(tmp_path, monkeypatch, capsys):
    """Under the name that its flags give, not over another run's; those of an earlier step are told."""
    directory, args = tmp_path / "moved", {"env_id": "Task-v0", "exp_name": "name", "seed": 3}
    directory.mkdir()
    (directory / "args.json").write_text(json.dumps({"script": "cpo", "args": args}))
    played = [{"environment": 0, "return": 1.23456, "cost": 7.0, "length": 1000, "balance": 0.0}]
    monkeypatch.setattr(drawn, "play_drawn", lambda script, run, count: (played * count, 50))
    drawn.main(drawn.Options(directory, tmp_path / "kept", episodes=2))
    path = tmp_path / "kept" / "Task-v0__name__3_drawn.csv"
    assert path.read_bytes() == b"split,step,environment,return,cost,length\n" + 2 * b"drawn,50,0,1.235,7,1000\n"
    assert capsys.readouterr().out == f"{path}\n"
    other = json.dumps({"script": "cpo", "args": args | {"hidden": 1}})
    (tmp_path / "kept" / "Task-v0__name__3_args.json").write_text(other)
    with pytest.raises(SystemExit, match="another run is Task-v0__name__3"):
        drawn.main(drawn.Options(directory, tmp_path / "kept"))
    columns = "split,step,environment,return,cost,length"
    for what, text in (("episodes", f"{columns}\neval,60,0,1,2,3\n"), ("numbers", "step\n60\n")):
        (tmp_path / "kept" / f"Task-v0__name__3_{what}.csv").write_text(text)
    with pytest.raises(SystemExit, match="drawn.csv is of step 50, not 60"):
        read_kept(tmp_path / "kept")


@pytest.mark.parametrize("variant, says", [("raw: --obs-transform raw", "need a run with raw observations"),
                                           ("x: gone.py", "gone.py does not exist"),
                                           ("x: --num-qc 0", "--variants x: --num-qc must be at least 1"),
                                           ("x: --preset paper", "--variants x: --preset changes nothing")])
def test_a_later_variant_is_refused_before_anything_is_trained(run, monkeypatch, variant, says):
    monkeypatch.setattr(cost_probe, "probe", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(cost_probe, "sensors", lambda _: {})
    with pytest.raises(SystemExit, match=says):
        cost_probe.main(cost_probe.Options(run[0], variants=("log: --obs-transform log", variant), held_out=1))


KEPT = sorted(Path(__file__).resolve().parent.parent.glob("benchmark/pretrained/*/args.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_what_is_committed_can_be_evaluated(path):
    """Its flags are those of today's script and its arrays fit; it is small."""
    with pytest.raises(SystemExit, match="holds no replay buffer"):
        cost_probe.load_rows(path.parent)
    args = spowl.parse_args(["--evaluate", str(path.parent)])
    size = {"SafetyPointGoal1-v0": 60, "SafetyPointGoal2-v0": 60, "SafetyPointPush1-v0": 76,
            "SafetyPointButton1-v0": 76, "SafetyCarGoal1-v0": 72}[args.env_id]
    template = jax.eval_shape(lambda key: spowl.init_agent(args, key, size, 2), jax.random.key(0))
    template = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.zeros(x.shape, x.dtype),
                            template)
    spowl.load_checkpoint(path.parent, {"agent": template})
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < (4e6 if "laptop" in path.parent.name else 1.5e6)


# ----------------------------------------------------------------------------------------------------------------------
# What costs
# ----------------------------------------------------------------------------------------------------------------------
class Charging(gymnasium.Env):
    """An episode of 4 to 8 steps, by its seed. Every second step "there" charges 0.5, every third "here" 1."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed, options=None):
        self.step_count, self.length = 0, 4 + seed % 5
        return np.zeros(3), {}

    def step(self, action):
        self.step_count += 1
        info = {"cost_there": 0.5 * (self.step_count % 2 == 0), "cost_here": float(self.step_count % 3 == 0)}
        info["cost_sum"] = cost = min(1.0, sum(info.values()))
        return np.zeros(3), 0.0, cost, False, self.step_count == self.length, info


class Impossible(Charging):
    """The layout of every third reset, from the first on, cannot be drawn."""

    resets = 0

    def reset(self, **options):
        self.resets += 1
        if self.resets % 3 == 1:
            raise ValueError("no room")
        return super().reset(**options)


@pytest.mark.parametrize("kind", [Charging, Impossible])
@pytest.mark.parametrize("num_envs", [1, 2, 7])
def test_each_source_is_counted_by_episode(toy_agent, num_envs, kind):
    """Five episodes by one environment, by two in turn, by five at once; in step six both charge, it costs 1. Nothing
    is filmed, though the run was."""
    args = small_args(num_envs=num_envs, eval_episodes=5, action_repeat=2, capture_video=True)
    agent = spowl.init_agent(args, jax.random.key(0), 3, 2)
    episodes, paid = what_costs.paid_for(args, agent, [kind() for _ in range(min(num_envs, 5))])
    assert [each["environment"] for each in episodes] == [0, 1, 2, 3, 4]
    assert len({each["length"] for each in episodes}) > 1
    for each, sources in zip(episodes, paid):
        assert sources == {"there": each["length"] // 2 / 2, "here": each["length"] // 3}
        assert each["cost"] == sum(sources.values()) - 0.5 * (each["length"] >= 6)


def test_what_costs_is_written_and_told(run, monkeypatch, tmp_path, capsys):
    """A row for each episode and source."""
    monkeypatch.setattr(spowl, "make_env", lambda args, drawn: Charging())
    monkeypatch.setattr(what_costs, "paid_for", lambda args, agent, envs: (
        [{"environment": n, "cost": 2.5 * n} for n in range(args.eval_episodes)],
        [Counter({"there": 0.5 * n, "here": 2.0 * n} if n else {}) for n in range(len(envs))]))
    what_costs.main(what_costs.Options((run[0],), tmp_path / "what.csv", episodes=2))
    name, task = run[0].name, ARGS.env_id
    assert capsys.readouterr().out == f"{name}: cost 1.25 an episode; here 1.00, there 0.25\n"
    assert (tmp_path / "what.csv").read_text() == (
        f"run,env_id,environment,cost,source,charged\n{name},{task},0,0,here,0\n{name},{task},0,0,there,0\n"
        f"{name},{task},1,2.5,here,2\n{name},{task},1,2.5,there,0.5\n")


def test_what_cannot_be_asked_of_what_costs(run, tmp_path):
    path, ask = tmp_path / "what.csv", what_costs.Options
    for options, says in ((ask((), path), "^name a run directory or more$"),
                          (ask((run[0],), path, episodes=0), "^--episodes must be at least 1$"),
                          (ask((run[0],), tmp_path / "no" / "what.csv"), "^--csv .* is not a directory$"),
                          (ask((tmp_path,), path), "is not a run directory")):
        with pytest.raises(SystemExit, match=says):
            what_costs.main(options)


def test_a_task_that_names_no_source(run, monkeypatch, tmp_path):
    monkeypatch.setattr(spowl, "make_env", lambda args, drawn: Charging())
    monkeypatch.setattr(what_costs, "paid_for", lambda args, agent, envs: ([{"environment": 0, "cost": 1.0}], [{}]))
    with pytest.raises(SystemExit, match=f"the info of {ARGS.env_id} names no source of cost, such as cost_hazards$"):
        what_costs.main(what_costs.Options((run[0],), tmp_path / "what.csv"))
