"""Command lines that cannot be: each ends with a status other than 0 and one line that names the flag and what it
should be; and random small ones that can: each runs a cycle."""
import dataclasses

import jax
import numpy as np
import pytest
from conftest import small_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import SCRIPT, command, one_line

import spowl_continuous as spowl
from spowl_continuous import parse_args

AT_LEAST_ONE = """num-envs action-repeat total-timesteps train-every eval-episodes batch-size latent-dim enc-dim mlp-dim
simnorm-dim num-q num-c num-cost-heads horizon num-samples num-pi-trajs num-elites iterations lagrangian-heads
bootstrap-samples""".split()
POSITIVE = """env-timeout learning-rate enc-lr-scale grad-clip bin-limit cost-positive-weight min-std mu-init
updates-per-step""".split()
NOT_NEGATIVE = """entropy-coef consistency-coef reward-coef value-coef cost-coef cost-value-coef temperature
mu-growth""".split()
BAD = [(f"--{name} 0", "must be at least 1") for name in AT_LEAST_ONE]
BAD += [(f"--{name} -5", "must be at least 1") for name in ("num-envs", "batch-size", "horizon")]
BAD += [(f"--{name} 0", "must be positive") for name in POSITIVE]
BAD += [(f"--{name} -0.1", "must not be negative") for name in NOT_NEGATIVE]
BAD += [(f"--{field.name.replace('_', '-')} {value}", "must be a finite number")
        for field in dataclasses.fields(spowl.Args) if field.type is float for value in ("nan", "inf")]
BAD += [
    ("--seed -1", "0 .. 2^32 - 1"), ("--seed 4294967296", "0 .. 2^32 - 1"),
    ("--learning-starts 100", "at least --num-envs x --action-repeat x --horizon = 150"),
    ("--train-every 80", "multiple of --num-envs x --action-repeat = 50"),
    ("--train-every 5000 --num-envs 7", "multiple of --num-envs x --action-repeat = 35"),
    ("--plan-horizon 0", "must be at least 1"), ("--updates-per-step 0.0015", "a whole number of updates of 5000 / 5"),
    ("--cost-read-out expectation --cost-gamma 1", "smaller than 1"),
    ("--eval-every 7000", "multiple of --train-every"), ("--eval-every -5000", "must not be negative"),
    ("--buffer-size 30", "more than --horizon transitions per environment"),
    ("--horizon 200000", "--learning-starts must be at least"),
    ("--latent-dim 100", "multiple of --simnorm-dim"), ("--simnorm-dim 7", "multiple of --simnorm-dim"),
    ("--num-bins 1", "at least 2"), ("--dropout 1", "[0, 1)"), ("--dropout -0.1", "[0, 1)"),
    ("--gamma 1.5", "0 .. 1"), ("--cost-gamma -0.1", "0 .. 1"), ("--tau 0", "(0, 1]"), ("--tau 1.1", "(0, 1]"),
    ("--rho 0", "(0, 1]"), ("--rho 2", "(0, 1]"),
    ("--num-pi-trajs 512", "smaller than --num-samples"), ("--num-samples 20", "smaller than --num-samples"),
    ("--num-elites 600", "must not exceed --num-samples"), ("--num-samples 50", "must not exceed --num-samples"),
    ("--lagrangian-heads 6", "must not exceed --num-c"), ("--num-c 3", "must not exceed --num-c"),
    ("--min-std 3", "at most --max-std"), ("--max-std 0.01", "at most --max-std"),
    ("--lambda-init 11", "0 .. --lambda-max"), ("--lambda-max -1", "0 .. --lambda-max"),
    ("--mu-init 2", "at most --mu-max"), ("--mu-max 1e-9", "at most --mu-max"),
    ("--log-std-min 3", "smaller than --log-std-max"), ("--exp-name a/b", "must not hold a slash"),
    ("--resume a --evaluate a", "a is not a run directory"),
    ("--resume /nowhere", "is not a run directory"), ("--evaluate /nowhere", "is not a run directory"),
]
UNREADABLE = [
    ("--switch-rule best", "bootstrap"), ("--preset desktop", "laptop"), ("--obs-transform sqrt", "log"),
    ("--cost-read-out mean", "expectation"), ("--cost-target-agg sum", "min"), ("--lagrangian-agg 5", "mean"),
    ("--plan-cost-agg median", "max"), ("--num-envs many", "many"), ("--num-envs 2.5", "2.5"), ("--gamma high", "high"),
    ("--seed", "--seed"), ("--no-such-flag 1", "--no-such-flag"), ("--num-env 3", "--num-envs"), ("surplus", "surplus"),
    ("--capture-video perhaps", "perhaps"), ("--total-timesteps 1e6", "1e6"),
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
def test_words_that_cannot_be_read(words, advice):
    message = refusal(words)
    assert "\n" not in message and advice in message and "--help" in message


def test_all_mistakes_are_told_at_once():
    lines = refusal("--num-envs 0 --tau 2 --num-elites 600").splitlines()
    assert sorted(line.split()[0] for line in lines) == ["--num-elites", "--num-envs", "--tau"]


@pytest.mark.parametrize("words, expected", [
    (["--num-elites", "600"], ["--num-elites", "--num-samples"]),
    (["--no-such-flag", "1"], ["--no-such-flag", "--help"]),
    (["--env-id", "SafetyPointGoal"], ["--env-id", "SafetyPointGoal1-v0"]),
    (["--env-id", "SafetyPointGoal1Vision-v0"], ["SafetyPointGoal1Vision-v0", "not a flat vector"]),
    (["--env-id", "CartPole-v1"], ["--env-id", "CartPole-v1"]),
    (["--runs-dir", "/proc/nowhere"], ["--runs-dir", "/proc/nowhere"]),
    (["--runs-dir", "/dev/null"], ["--runs-dir", "/dev/null"]),
    (["--buffer-size", "100000000000"], ["--buffer-size", "GiB"]),
    (["--track"], ["--track", "pip install wandb"]),
])
def test_on_the_command_line(place, words, expected):
    """What only the task, the disk or the memory can tell: one line as well, nothing left behind."""
    one_line(command(place, SCRIPT, "--num-envs", 2, "--train-every", 5000, "--runs-dir", place / "never", *words),
             *expected)
    assert not (place / "never").exists()


sizes = st.fixed_dictionaries(dict(
    num_envs=st.integers(1, 3), action_repeat=st.sampled_from([1, 5, 25]), latent_dim=st.sampled_from([8, 24]),
    simnorm_dim=st.sampled_from([2, 4, 8]), enc_dim=st.integers(1, 9), mlp_dim=st.integers(1, 9),
    num_bins=st.integers(2, 9), num_q=st.integers(1, 3), num_c=st.integers(1, 3), num_cost_heads=st.integers(1, 2),
    batch_size=st.integers(1, 5), horizon=st.integers(1, 4), num_pi_trajs=st.integers(1, 3), more=st.integers(1, 5),
    iterations=st.integers(1, 2), agg=st.sampled_from(["min", "mean", "max"]), temperature=st.sampled_from([0.0, 0.5]),
    rule=st.sampled_from(["means", "bootstrap"]), dropout=st.sampled_from([0.0, 0.3]), elites=st.integers(1, 4)))


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(sizes)
def test_whatever_is_accepted_runs(drawn):
    """Random small sizes that pass the checks: acting, storing and updating give finite numbers."""
    samples = drawn.pop("more") + drawn["num_pi_trajs"]
    args = small_args(num_samples=samples, num_elites=min(drawn.pop("elites"), samples),
                      lagrangian_heads=drawn["num_c"], buffer_size=60, cost_target_agg=drawn.pop("agg"),
                      switch_rule=drawn.pop("rule"), learning_starts=1000, **drawn)
    block = args.num_envs * args.action_repeat
    args = dataclasses.replace(args, train_every=10 * block, eval_every=0)
    assert spowl.problems(args) == []
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
