"""Command lines that cannot be: each ends with a status other than 0 and one line that names the flag and what it
should be, before anything is started; and random small ones that can: each runs a cycle."""
import dataclasses
import importlib.util
import re

import jax
import numpy as np
import pytest
from conftest import small_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import SCRIPT, command, main, one_line, scripted

import spowl_continuous as spowl
from baselines import tdmpc2
from spowl_continuous import parse_args

AT_LEAST_ONE = """num-envs action-repeat total-timesteps train-every eval-episodes batch-size latent-dim enc-dim mlp-dim
simnorm-dim num-q num-qc num-c horizon num-samples num-pi-trajs num-elites iterations lagrangian-heads
bootstrap-samples""".split()
POSITIVE = """env-timeout learning-rate enc-lr-scale grad-clip bin-limit cost-positive-weight min-std mu-init
updates-per-step""".split()
NOT_NEGATIVE = """entropy-coef consistency-coef reward-coef value-coef cost-coef cost-value-coef temperature
mu-growth""".split()
BAD = [(f"--{name} 0", "must be at least 1") for name in AT_LEAST_ONE]
BAD += [(f"--{name} -5", "must be at least 1") for name in ("num-envs", "batch-size", "horizon")]
BAD += [(f"--{name} 0", "must be positive") for name in POSITIVE]
BAD += [(f"--{name} -0.1", "must be at least 0") for name in NOT_NEGATIVE]
BAD += [
    ("--seed -1", "at least 0 and at most 4294967295"), ("--seed 4294967296", "at least 0 and at most 4294967295"),
    ("--cost-limit 1e305", "must be a finite number"), ("--max-std 1e305", "must be a finite number"),
    ("--total-timesteps 1000", "--total-timesteps must be at least --learning-starts = 5000"),
    ("--cost-budget 0", "--cost-budget must be positive"), ("--cost-budget -5", "--cost-budget must be positive"),
    ("--learning-starts 100", "at least --num-envs x --action-repeat x --horizon = 150"),
    ("--train-every 80", "multiple of --num-envs x --action-repeat = 50, for example 100"),
    ("--train-every 5000 --num-envs 7", "multiple of --num-envs x --action-repeat = 35, for example 5005"),
    ("--plan-horizon 0", "must be at least 1"), ("--updates-per-step 0.0015", "a whole number of updates of 5000 / 5"),
    ("--cost-read-out expectation --cost-gamma 1", "smaller than 1"),
    ("--eval-every 7000", "multiple of --train-every"), ("--eval-every -5000", "must be at least 0"),
    ("--buffer-size 30", "more than --horizon transitions per environment"),
    ("--horizon 200000", "--learning-starts must be at least"),
    ("--latent-dim 100", "multiple of --simnorm-dim"), ("--simnorm-dim 7", "multiple of --simnorm-dim"),
    ("--num-bins 1", "at least 2"), ("--dropout 1", "at least 0 and at most 0.99"),
    ("--dropout -0.1", "at least 0 and at most 0.99"), ("--learning-starts -1", "must be at least 0"),
    ("--gamma 1.5", "at least 0 and at most 1"), ("--cost-gamma -0.1", "at least 0 and at most 1"),
    ("--tau 0", "positive and at most 1"), ("--tau 1.1", "positive and at most 1"),
    ("--rho 0", "positive and at most 1"), ("--rho 2", "positive and at most 1"),
    ("--num-pi-trajs 512", "smaller than --num-samples"), ("--num-samples 20", "smaller than --num-samples"),
    ("--num-elites 600", "must not exceed --num-samples"), ("--num-samples 50", "must not exceed --num-samples"),
    ("--lagrangian-heads 6", "must not exceed --num-qc"), ("--num-qc 3", "must not exceed --num-qc"),
    ("--min-std 3", "at most --max-std"), ("--max-std 0.01", "at most --max-std"),
    ("--lambda-init 11", "at most --lambda-max"), ("--lambda-max -1", "at most --lambda-max"),
    ("--lambda-init -1", "at least 0"),
    ("--mu-init 2", "at most --mu-max"), ("--mu-max 1e-9", "at most --mu-max"),
    ("--mu-growth 1 --total-timesteps 4000 --eval-every 0", "--mu-growth is too large"),
    ("--preset laptop --mu-growth 1e12", "--mu-growth is too large"),
    ("--log-std-min 3", "smaller than --log-std-max"), ("--exp-name a/b", "must not hold a slash"),
    ("--train-every 500 --updates-per-step 1.105", "must make a whole number of updates of 500 / 5 agent steps"),
    ("--resume a --evaluate a", "a is not a run directory"), ("--env-timeout 1e7", "positive and at most 1000000"),
    ("--resume /nowhere", "is not a run directory"), ("--evaluate /nowhere", "is not a run directory"),
]
UNREADABLE = [
    ("--switch-rule best", "bootstrap"), ("--preset desktop", "laptop"), ("--obs-transform sqrt", "log"),
    ("--cost-read-out mean", "expectation"), ("--cost-target-agg sum", "min"), ("--lagrangian-agg 5", "mean"),
    ("--plan-cost-agg median", "max"), ("--num-envs many", "many"), ("--gamma high", "high"),
    ("--seed", "--seed"), ("--no-such-flag 1", "--no-such-flag"), ("--num-env 3", "--num-envs"), ("surplus", "surplus"),
    ("--capture-video perhaps", "perhaps"), ("--total-timesteps 1.5", "must be a whole number"),
    ("--num-envs 2.5", "must be a whole number"), ("--num-envs 1e-1", "must be a whole number"),
    ("--seed nan", "must be a whole number"), ("--batch-size inf", "must be a whole number"),
]


def refusal(words):
    """The message that a command line ends with."""
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    assert isinstance(stop.value.code, str)  # printed to stderr by Python, with exit status 1
    return stop.value.code


def test_there_are_enough_of_them():
    assert len(BAD) + len(UNREADABLE) >= 60 and len({words for words, _ in BAD + UNREADABLE}) == len(BAD + UNREADABLE)


@pytest.mark.parametrize("words, advice", BAD)
def test_values_that_cannot_be(words, advice):
    """A line with the flag and what it should be; a flag that spoils two rules gets two lines."""
    lines = refusal(words).splitlines()
    assert any(advice in line for line in lines), lines
    flags = {word for word in words.split() if word.startswith("--")}
    assert all(any(flag in line for flag in flags) or "is not a run directory" in line for line in lines), lines


@pytest.mark.parametrize("words, advice", UNREADABLE)
def test_words_that_cannot_be_read(words, advice, capsys):
    """tyro's own message, in a box on stderr: what is wrong, and where to read on."""
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    printed = capsys.readouterr()
    text = " ".join(re.sub("[─│╭╮╰╯]", " ", printed.err).split())
    assert stop.value.code == 2 and advice in text and "--help" in text and not printed.out


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_number_must_be_finite(value):
    """All at once: each gets its line."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(spowl.Args) if type(field.default) is float]
    lines = refusal(" ".join(f"--{name} {value}" for name in names)).splitlines()
    assert len(lines) == len(names) > 20
    assert all(line.startswith(f"--{name} must be a finite number") for name, line in zip(names, lines)), lines


def test_all_mistakes_are_told_at_once():
    """All values outside their ranges; or else all rules between flags that are broken, which need values inside."""
    lines = refusal("--num-envs 0 --tau 2 --num-elites 600").splitlines()
    assert [line.split()[0] for line in lines] == ["--num-envs", "--tau"]
    lines = refusal("--min-std 3 --num-elites 600").splitlines()
    assert [line.split()[0] for line in lines] == ["--num-elites", "--min-std"]


@pytest.mark.parametrize("text", ["a\udcffb", "a\nb", "a\x1b[2J", "\0"], ids=["no UTF-8", "line", "terminal", "zero"])
def test_text_that_cannot_be_printed_is_refused(text):
    """Python gives bytes that are no UTF-8 as lone surrogates. A line for each flag, in which they are not printed."""
    flags = ("--env-id", "--exp-name", "--runs-dir")
    with pytest.raises(SystemExit) as stop:
        parse_args([word for flag in flags for word in (flag, text)])
    assert stop.value.code.splitlines() == [f"{flag} must be printable text" for flag in flags]
    for flag in flags:
        args = dataclasses.replace(spowl.Args(), **{flag[2:].replace("-", "_"): text})
        assert spowl.problems(args) == [f"{flag} must be printable text"]
    assert spowl.problems(dataclasses.replace(spowl.Args(), exp_name="größer 0.5", runs_dir="/tmp/läufe 2")) == []


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--runs-dir", "--env-id"])
def test_a_shells_empty_variable_is_refused(flag):
    """No training in the place of --evaluate "$RUN", no new run in that of --resume, none in the root directory."""
    with pytest.raises(SystemExit, match=f"^{flag} must not be empty$"):
        parse_args([flag, ""])


def test_every_number_of_updates_that_is_whole_is_accepted():
    """500 simulator steps are 100 agent steps: each hundredth of an update per step makes a whole number, though 35 of
    the 300 products are none in floats. As many are due as the flag says."""
    hundredths = range(1, 301)
    assert sum(500 / 5 * (n / 100) % 1 != 0 for n in hundredths) == 35
    each = {n: dataclasses.replace(spowl.Args(), train_every=500, updates_per_step=n / 100) for n in hundredths}
    assert [n for n, args in each.items() if spowl.problems(args)] == []
    others = [tdmpc2.Args(train_every=500, updates_per_step=n / 100) for n in hundredths]
    assert [args for args in others if tdmpc2.problems(args)] == []  # whose rules are its own
    made = {n: {*np.diff([spowl.updates_due(args, 500 * k) for k in range(20)])} for n, args in each.items()}
    assert made == {n: {n} for n in each}
    assert parse_args("--train-every 500 --updates-per-step 1.1".split()).updates_per_step == 1.1


@pytest.mark.parametrize("word, expected", [("1e5", 100_000), ("7.5e3", 7500), ("5000.0", 5000), ("12345", 12345)])
def test_whole_numbers_may_be_written_as_floats(word, expected):
    args = parse_args(["--total-timesteps", word])
    assert args.total_timesteps == expected and type(args.total_timesteps) is int


@pytest.mark.parametrize("words", ["--train-every 7", "--train-every 80", "--train-every 5020", "--train-every 24999"])
def test_a_value_that_would_do_is_named(words):
    (line,) = (line for line in refusal(words).splitlines() if line.startswith("--train-every"))
    example = line.rpartition("for example ")[2]
    near = int(words.split()[1])
    assert parse_args(["--train-every", example]).train_every == int(example) and abs(int(example) - near) <= 50


# ----------------------------------------------------------------------------------------------------------------------
# What only the task, the disk, the machine can tell
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", [
    "SafetyPointGoal", "CartPole-v1", "SafetyPointGoal1Gymnasium-v0", "SafetyPointGoal1Vision-v1", "PointGoal1Vision",
    "SafetyPointGoal1Gymnasium-v1", "SafetyCarGoal1-v9", "SafetyDogoGoal1-v0", "safetyantvelocity-v1", "zzz",
    "SafetyPointGoal1Debug-v1"])
def test_only_tasks_that_can_be_trained_on_are_offered(monkeypatch, env_id):
    """No pictures, no copies with Gymnasium's interface, which have the cost in info; nothing of Gymnasium itself. No
    process is started before."""
    monkeypatch.setattr(spowl.multiprocessing, "get_context", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(SystemExit) as stop:
        spowl.train(parse_args(["--env-id", env_id]))
    message = stop.value.code
    assert message.startswith(f"--env-id {env_id} is not a task of Safety-Gymnasium; did you mean ")
    offered = re.findall(r"Safety\w+-v\d", message.partition(";")[2])
    assert "\n" not in message and offered
    assert not any(kind in name for name in offered for kind in ("Vision", "Debug", "Gymnasium"))
    assert set(offered) <= spowl.import_safety_gymnasium().utils.registration.safe_registry


@pytest.mark.parametrize("place, reason", [
    ("file", "Not a directory"), ("file/runs", "Not a directory"), ("a" * 300, "File name too long"),
    ("/proc/nowhere", "No such file or directory"), ("link", "No such file or directory")])
def test_a_place_that_cannot_hold_runs_is_told_in_one_line(scripted, main, tmp_path, place, reason):
    """A file, below a file, what the system refuses, a broken link; one that is still to be made is none of these."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    _, message = main("--runs-dir", tmp_path / place)
    assert re.fullmatch(rf"\[Errno \d+\] {reason}: '{tmp_path / place}.*; the last checkpoint stays", message)
    assert main("--runs-dir", tmp_path / "runs" / "here")[1] is None and (tmp_path / "runs" / "here").is_dir()


def test_a_buffer_that_cannot_fit_is_refused(monkeypatch):
    """Before an environment is asked for anything; one that fits is not."""
    with pytest.raises(SystemExit, match=r"^the replay buffer needs \d+\.\d GiB .*, .* has \d+\.\d: lower --buf"):
        spowl.begin(parse_args(["--buffer-size", "1e11"]), None, (60, 2))
    with pytest.raises(ZeroDivisionError):
        spowl.begin(parse_args([]), lambda *_: 1 / 0, (60, 2))
    monkeypatch.setattr(spowl.os, "sysconf", {"SC_PHYS_PAGES": 3 * 2**18, "SC_PAGE_SIZE": 1024}.get)  # 0.75 GiB
    with pytest.raises(SystemExit, match=r"^the replay buffer needs 0\.9 GiB \(on a CPU with .*, .* has 0\.8: lower"):
        spowl.begin(parse_args([]), None, (60, 2))  # it would fit, its copy in a checkpoint would not


@pytest.mark.parametrize("words, variables, expected", [
    ("", {"MUJOCO_GL": "foo"}, "^.*MUJOCO_GL: foo$"),
    ("--capture-video", {"MUJOCO_GL": "disable"},
     "evaluation environment 0(, 1)? of .*; drawing needs EGL or OSMesa"),
    ("--env-id SafetyPointGoal1Vision-v0", {}, "SafetyPointGoal1Vision-v0 .*observations must be flat vectors: "),
    ("", {"JAX_PLATFORMS": "cuda"}, "^JAX finds no device: .*cuda"),
    ("", {"JAX_ENABLE_X64": "1"}, "^JAX_ENABLE_X64 is set: "),
    ("", {"JAX_PLATFORMS": "toaster"}, "^JAX finds no device: .*toaster")],
    ids=["MuJoCo", "drawing", "pictures", "CUDA", "float64", "no device"])
def test_on_the_command_line(place, words, variables, expected):
    """One line before training begins, no traceback, nothing left behind."""
    if "cuda" in variables.values() and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("there is CUDA")
    words = ["--num-envs", 2, "--runs-dir", place / "never", *words.split()]
    finished = command(place, SCRIPT, *words, **variables)
    one_line(finished)
    assert re.search(expected, finished.stderr), finished.stderr
    assert not (place / "never").exists()


sizes = st.fixed_dictionaries(dict(
    num_envs=st.integers(1, 3), action_repeat=st.sampled_from([1, 5, 25]), latent_dim=st.sampled_from([8, 24]),
    simnorm_dim=st.sampled_from([2, 4, 8]), enc_dim=st.integers(1, 9), mlp_dim=st.integers(1, 9),
    num_bins=st.integers(2, 9), num_q=st.integers(1, 3), num_qc=st.integers(1, 3), num_c=st.integers(1, 2),
    batch_size=st.integers(1, 5), horizon=st.integers(1, 4), num_pi_trajs=st.integers(1, 3), more=st.integers(1, 5),
    iterations=st.integers(1, 2), agg=st.sampled_from(["min", "mean", "max"]), temperature=st.sampled_from([0.0, 0.5]),
    rule=st.sampled_from(["means", "bootstrap"]), dropout=st.sampled_from([0.0, 0.3]), elites=st.integers(1, 4)))


def drawn_args(drawn):
    """Flags of random small sizes that pass the checks."""
    samples = drawn.pop("more") + drawn["num_pi_trajs"]
    args = small_args(num_samples=samples, num_elites=min(drawn.pop("elites"), samples),
                      lagrangian_heads=drawn["num_qc"], buffer_size=60, cost_target_agg=drawn.pop("agg"),
                      switch_rule=drawn.pop("rule"), learning_starts=1000, **drawn)
    args = dataclasses.replace(args, train_every=10 * args.num_envs * args.action_repeat, eval_every=0)
    assert spowl.problems(args) == []
    return args


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(sizes)
def test_whatever_is_accepted_fits_together(drawn):
    """Random small sizes: acting and updating lead from arrays of some shapes to arrays of the same shapes."""
    args = drawn_args(drawn)
    states = jax.eval_shape(lambda key: (spowl.init_agent(args, key, 3, 2), spowl.init_actor(args, key, 2)),
                            jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    obs, first = jax.ShapeDtypeStruct((args.num_envs, 3), "float32"), jax.ShapeDtypeStruct((args.num_envs,), bool)
    action, actor = jax.eval_shape(lambda *given: spowl.act(args, *given, True), *states, obs, first)
    agent, _ = jax.eval_shape(lambda *given: spowl.update_many(args, *given, 2), states[0],
                              jax.eval_shape(lambda: spowl.init_buffer(args, 3, 2)))
    assert action.shape == (args.num_envs, 2) and shapes((agent, actor)) == shapes(states)


@pytest.mark.long
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(sizes)
def test_whatever_is_accepted_runs(drawn):
    """Acting, storing and updating give finite numbers."""
    args = drawn_args(drawn)
    agent = spowl.init_agent(args, jax.random.key(0), 3, 2)
    actor, buffer = spowl.init_actor(args, jax.random.key(1), 2), spowl.init_buffer(args, 3, 2)
    rng = np.random.default_rng(0)
    for step in range(args.horizon + 3):
        obs = rng.normal(size=(args.num_envs, 3)).astype(np.float32)
        action, actor = spowl.act(args, agent, actor, obs, np.full(args.num_envs, step == 0), True)
        ones = np.ones(args.num_envs, np.float32)
        buffer = spowl.add(buffer, spowl.Transition(obs, action, ones, ones, obs, 0 * ones, 0 * ones))
    agent, metrics = spowl.update_many(args, agent, buffer, 2)
    assert np.all(np.abs(action) <= 1.0) and all(np.isfinite(float(value)) for value in metrics.values())


@pytest.mark.parametrize("words", ["--preset laptop --help", "-h --preset laptop"])
def test_help_shows_the_presets_values(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(words.split())
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0 and "all environments together (default: 300000)" in shown
    assert "discount of cost per agent step (default: 0.95)" in shown
