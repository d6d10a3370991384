"""METHOD §7: each variant's own rule against brute force, one small real run of each, no run with the wrong script."""
import dataclasses
import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import certain, leaves_equal, np_heads, np_latent, np_mlp, random_agent, small_args
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import ALIVE, B, H, dropout_masks, make_batch
from test_losses import ARGS as LOSS_ARGS
from test_planner import np_scores
from test_train import POINT, ROOT, SUMMARY, TAGS, checkpoint, rows_of, run, scalars, train

import spowl_continuous as full
import spowl_fixed_threshold as fixed
import spowl_plan_only as plan_only
import spowl_policy_only as policy_only
from ablations import spowl_decoder as decoder

VARIANTS = {module.__name__.split(".")[-1]: module for module in (fixed, plan_only, policy_only, decoder)}
SCRIPTS = {name: ROOT / (module.__name__.replace(".", "/") + ".py") for name, module in VARIANTS.items()}
SCRIPTS["spowl_continuous"] = ROOT / "spowl_continuous.py"
OBS, ACTIONS = 5, 2


def args_of(module, **changes):
    """Flags of toy size for a variant."""
    own = {name: changes.pop(name) for name in list(changes) if not hasattr(full.Args, name)}
    return module.Args(**(dataclasses.asdict(small_args(**changes)) | own))


@pytest.fixture(scope="module")
def agent():
    return random_agent(small_args(num_bins=11, bin_limit=5.0), OBS, ACTIONS, seed=5)


@pytest.fixture(scope="module")
def z():
    return jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(8), 2).reshape(16), jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Fixed threshold
# ----------------------------------------------------------------------------------------------------------------------
N, K = 13, 4
small_numbers = st.lists(st.integers(-2, 3).map(float), min_size=N, max_size=N)


def check_elites(returns, costs, threshold):
    """Constrained cross-entropy by sorting; among equals at the cut any choice is right. -> the elites"""
    args = args_of(fixed, num_samples=N, num_pi_trajs=3, num_elites=K, plan_threshold=threshold)
    elites, metrics = jax.jit(fixed.select_elites, static_argnums=0)(
        args, jnp.array(returns, jnp.float32), jnp.array(costs, jnp.float32))
    chosen, feasible = np.flatnonzero(elites), [n for n in range(N) if costs[n] < threshold]
    assert elites.dtype == bool and len(chosen) == K
    assert metrics["planner/num_improving"] == len(feasible) and metrics["planner/cost_threshold"] == threshold
    assert metrics["planner/no_improvement"] == (len(feasible) < K)
    if len(feasible) < K:
        assert sorted(costs[n] for n in chosen) == sorted(costs)[:K]
        assert set(feasible) <= set(chosen)
    else:
        assert set(chosen) <= set(feasible)
        assert sorted(returns[n] for n in chosen) == sorted(returns[n] for n in feasible)[-K:]
    return set(chosen.tolist())


@settings(max_examples=120)
@given(small_numbers, small_numbers, st.sampled_from([0.5, 1.0, 2.0, 3.0, np.inf]))
def test_fixed_elites_against_sorting(returns, costs, threshold):
    check_elites(returns, costs, threshold)


@pytest.mark.parametrize("count", [0, 1, K - 1, K, K + 1, N])
def test_fixed_elites_by_number_of_feasible_sequences(count):
    """Fewer than k feasible: the k of lowest cost, whatever they return; else the feasible of highest return."""
    returns = [float(n) for n in range(N)]
    costs = [0.5] * count + [2.0 + n for n in range(N - count)]
    assert check_elites(returns, costs, 1.0) == (set(range(K)) if count < K else set(range(count - K, count)))


def test_fixed_threshold_itself_is_not_feasible():
    assert check_elites([9.0] * 4 + [1.0] * 9, [1.0] * 4 + [0.9] * 9, 1.0) <= set(range(4, N))


def test_infinite_threshold_is_no_constraint():
    assert check_elites([float(n) for n in range(N)], [1e6] * N, np.inf) == set(range(N - K, N))


@pytest.mark.parametrize("score, agg", [("global", "max"), ("local", "max"), ("local", "mean")])
def test_fixed_scores_against_numpy(agent, z, score, agg):
    """Global: J_c of Eq. 11. Local: the undiscounted sum of the cost heads' maximum (mean), no Qc. J is the same. Plans
    are deeper than training sequences."""
    args = args_of(fixed, horizon=2, plan_horizon=3, gamma=0.9, cost_gamma=0.8, num_bins=11, bin_limit=5.0,
                   plan_cost_agg=agg, plan_cost_score=score)
    actions = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (3, 4, ACTIONS)), jnp.float32)
    policy = certain(agent.policy)
    returns, costs = jax.jit(fixed.evaluate_plans, static_argnums=0)(
        args, agent.model, policy, z, actions, jax.random.key(0))

    def local(sequence):
        latent, total = np.asarray(z, np.float64), 0.0
        for action in np.asarray(sequence, np.float64):
            values = np_heads(args, agent.model["cost"], latent, action)
            total += values.max() if agg == "max" else values.mean()
            latent = np_latent(args, agent.model["dynamics"], latent, action)
        return total

    expected = np.array([np_scores(args, agent._replace(policy=policy), z, actions[:, n]) for n in range(4)])
    if score == "local":
        expected[:, 1] = [local(actions[:, n]) for n in range(4)]
    np.testing.assert_allclose(np.stack([returns, costs], -1), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_threshold_that_is_not_positive_is_refused(value):
    """Infinity is no constraint."""
    with pytest.raises(SystemExit) as stop:
        fixed.parse_args(["--plan-threshold", value])
    assert str(stop.value) == f"--plan-threshold must be {'a finite number' if value == 'nan' else 'positive'}"
    assert fixed.parse_args(["--plan-threshold", "inf"]).plan_threshold == np.inf


# ----------------------------------------------------------------------------------------------------------------------
# Always the plan
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", [plan_only, fixed], ids=["plan_only", "fixed_threshold"])
def test_the_plan_is_executed_whatever_the_values_say(module, agent, z, monkeypatch):
    """Its action as it is in evaluation; plus std x noise of its first step, clipped, in training."""
    std = jnp.array([[0.1, 0.4], [1.9, 1.9], [1.9, 1.9]])
    final = module.Plan(0.5 * std, std, jnp.zeros(2))
    monkeypatch.setattr(module, "plan", lambda *_: (final, {"planner/some": jnp.float32(2.0)}))
    monkeypatch.setattr(module, "heads", None)  # no value is read
    decide = jax.jit(jax.vmap(partial(module.decide, args_of(module), agent.model, agent.policy, z, std),
                              in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 2000)
    action, mean, metrics = decide(keys, False)
    assert not np.any(action) and np.array_equal(mean[7], 0.5 * std)
    assert np.unique(metrics["charts/balance"]).tolist() == [1.0]
    assert np.unique(metrics["planner/some"]).tolist() == [2.0]
    action = np.asarray(decide(jax.random.clone(keys), True)[0])
    np.testing.assert_allclose(action[:, 0].std(), 0.1, rtol=0.08)
    assert np.mean(np.abs(action[:, 1]) == 1.0) == pytest.approx(0.0124, abs=0.01) and np.abs(action).max() == 1.0


def test_both_execute_the_plan_by_the_same_text():
    assert inspect.getsource(fixed.decide) == inspect.getsource(plan_only.decide)


@pytest.mark.parametrize("module", [plan_only, pytest.param(fixed, marks=pytest.mark.long)], ids=lambda m: m.__name__)
def test_every_environment_gets_its_own_plan(module, agent):
    """Evaluation: each action is that of `plan` from the environment's own latent and last mean; balance is 1."""
    args = args_of(module, num_envs=3, num_bins=11, bin_limit=5.0)
    actor = module.init_actor(args, jax.random.key(2), ACTIONS)._replace(plan_mean=jnp.full((3, 3, ACTIONS), 0.4))
    obs, is_first = np.random.default_rng(3).normal(size=(3, OBS)).astype(np.float32), np.array([False, True, False])
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2), 0), 3)
    last = [jnp.full((3, ACTIONS), 0.0 if first else 0.4) for first in is_first]
    plan = jax.jit(partial(module.plan, args, agent.model, agent.policy))
    expected = [plan(latent, last_mean, jax.random.split(key)[0])[0]
                for latent, last_mean, key in zip(full.encode(args, agent.model, obs), last, keys)]
    action, actor = module.act(args, agent, actor, obs, is_first, False)
    np.testing.assert_allclose(action, [final.action for final in expected], atol=1e-5)
    np.testing.assert_allclose(actor.plan_mean, [final.mean for final in expected], atol=1e-4)
    assert np.all(actor.metrics["charts/balance"] == 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Always the policy
# ----------------------------------------------------------------------------------------------------------------------
def test_the_policy_acts(agent):
    """Its mean in evaluation; in training its samples, apart from environment to environment and step to step."""
    args = args_of(policy_only, num_envs=400)
    act = partial(policy_only.act, args, agent, is_first=np.zeros(400, bool))
    obs = np.tile(np.random.default_rng(3).normal(size=OBS), (400, 1)).astype(np.float32)
    z = full.encode(args, agent.model, obs)
    expected, mean, _ = full.policy_sample(args, agent.policy, z, jax.random.key(4))
    action, actor = act(actor=policy_only.init_actor(args, jax.random.key(2), ACTIONS), obs=obs, explore=False)
    np.testing.assert_allclose(action, mean, atol=1e-6)
    first, actor = act(actor=actor, obs=obs, explore=True)
    second, actor = act(actor=actor, obs=obs, explore=True)
    assert int(actor.step) == 3 and not np.any(actor.metrics["charts/balance"])
    assert len(np.unique(first, axis=0)) == 400 and not np.any(np.all(first == second, -1))
    assert np.all(np.abs(first.mean(0) - expected.mean(0)) < 6 * expected.std(0) / np.sqrt(400))
    np.testing.assert_allclose(first.std(0), expected.std(0), rtol=0.2)


def test_policy_only_has_no_planner():
    names = "policy_rollout evaluate_plans select_elites Plan plan bootstrap_bounds prefer_plan decide".split()
    assert all(hasattr(full, name) and not hasattr(policy_only, name) for name in names)
    assert policy_only.Actor._fields == ("key", "step", "metrics")


# ----------------------------------------------------------------------------------------------------------------------
# Decoder
# ----------------------------------------------------------------------------------------------------------------------
def decoder_args(**changes):
    flags = dataclasses.asdict(LOSS_ARGS) | changes
    return decoder.Args(**flags)


@pytest.fixture(scope="module")
def decoder_model():
    shapes = jax.eval_shape(partial(decoder.init_model, decoder_args(), obs_dim=OBS, action_dim=ACTIONS),
                            jax.random.key(0))
    rng = np.random.default_rng(11)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


loss_and_grads = jax.jit(jax.value_and_grad(decoder.world_model_loss, has_aux=True), static_argnums=1)
full_loss = jax.jit(jax.value_and_grad(full.world_model_loss, has_aux=True), static_argnums=1)


@pytest.mark.parametrize("coef, consistency", [(0.0, 3.0), (0.01, 3.0), (1.0, 0.0)])
def test_decoder_adds_one_squared_error(decoder_model, coef, consistency):
    """Fig. 9: the full agent's loss plus coef x the error of the rollout's H + 1 latents, up to an episode's end."""
    args = decoder_args(decoder_coef=coef, consistency_coef=consistency)
    inputs = make_batch() + dropout_masks()
    (total, (metrics, zs)), grads = loss_and_grads(decoder_model, args, *inputs)
    others = {name: layers for name, layers in decoder_model.items() if name != "decoder"}
    full_args = dataclasses.replace(LOSS_ARGS, consistency_coef=consistency)
    (plain, (_, plain_zs)), plain_grads = full_loss(others, full_args, *inputs)
    batch, error = inputs[0], 0.0
    for t in range(H + 1):
        obs = np.asarray(batch.obs[0] if t == 0 else batch.next_obs[t - 1], np.float64)
        guess = np_mlp(decoder_model["decoder"], np.asarray(zs[t], np.float64))
        error += 0.6**t / (H + 1) * np.mean(((guess - obs) ** 2).mean(-1)[ALIVE[t] > 0])
    assert metrics["losses/reconstruction"] == pytest.approx(error, rel=1e-4) and error > 0.1
    assert total == pytest.approx(float(plain) + coef * error, rel=1e-4)
    assert leaves_equal(zs, plain_zs)
    reached = {name: any(np.any(leaf) for leaf in jax.tree.leaves(layers)) for name, layers in grads.items()}
    assert reached["decoder"] == (coef > 0)
    for name in plain_grads:  # it shapes the latents, so encoder and dynamics; the heads' losses are what they were
        moved = not all(np.allclose(a, b, rtol=1e-4, atol=1e-6)
                        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(plain_grads[name])))
        assert moved == (coef > 0 and name in ("encoder", "dynamics")), name


def test_decoder_starts_from_the_full_agents_weights():
    """With the same seed every other network is the full agent's."""
    ours = full.init_agent(LOSS_ARGS, jax.random.key(3), OBS, ACTIONS)
    theirs = decoder.init_agent(decoder_args(), jax.random.key(3), OBS, ACTIONS)
    assert {name for name in theirs.model if name not in ours.model} == {"decoder"}
    assert leaves_equal(ours.model, {name: theirs.model[name] for name in ours.model})
    assert theirs.model["decoder"][-1]["w"].shape == (LOSS_ARGS.enc_dim, OBS)


@pytest.mark.long  # the loss and the first weights are compared above
def test_decoder_without_weight_learns_what_the_full_agent_learns():
    """One update at coefficient 0: the other networks, the policy and the targets are the same to the last bit."""
    batch, learned = make_batch()[0], []
    for module, args in ((full, dataclasses.replace(LOSS_ARGS, batch_size=B)),
                         (decoder, decoder_args(batch_size=B, decoder_coef=0.0))):
        fresh = module.init_agent(args, jax.random.key(0), OBS, ACTIONS)
        updated, _ = jax.jit(module.update, static_argnums=0)(args, fresh, batch, jax.random.key(1))
        learned.append(({name: updated.model[name] for name in fresh.target | {"encoder": 0, "dynamics": 0}},
                        updated.policy, updated.target))
    assert leaves_equal(*learned)


@pytest.mark.long
def test_decoder_learns_to_reconstruct(decoder_model):
    """On one batch, with no consistency loss: a hundred updates more than halve the error."""
    args = decoder_args(decoder_coef=1.0, consistency_coef=0.0, batch_size=B, learning_rate=3e-3)
    step, agent = jax.jit(decoder.update, static_argnums=0), decoder.init_agent(args, jax.random.key(0), OBS, ACTIONS)
    batch, errors = make_batch()[0], []
    for key in jax.random.split(jax.random.key(1), 100):
        agent, metrics = step(args, agent, batch, key)
        errors.append(float(metrics["losses/reconstruction"]))
    assert errors[-1] < 0.5 * errors[0]


def test_negative_decoder_weight_is_refused():
    with pytest.raises(SystemExit) as stop:
        decoder.parse_args(["--decoder-coef", "-0.1"])
    assert str(stop.value) == "--decoder-coef must be at least 0"


# ----------------------------------------------------------------------------------------------------------------------
# Real runs
# ----------------------------------------------------------------------------------------------------------------------
OWN = {"spowl_fixed_threshold": ["--plan-threshold", "0.5", "--plan-cost-score", "local"],
       "spowl_decoder": ["--decoder-coef", "0.01", "--consistency-coef", "0"]}
ABSENT = {"spowl_fixed_threshold": {"planner/reward_threshold"},
          "spowl_policy_only": {tag for tag in TAGS if tag.startswith("planner/")}}
EXTRA = {"spowl_decoder": {"losses/reconstruction"}}
BALANCE = {"spowl_fixed_threshold": 1.0, "spowl_plan_only": 1.0, "spowl_policy_only": 0.0}


@pytest.fixture(scope="session")
def runs(place):
    """Name -> a small run of each variant, started when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            flags = *POINT, "--eval-every", 0, "--eval-episodes", 1, "--cost-budget", 5, *OWN.get(name, [])
            made[name] = train(place, *flags, script=SCRIPTS[name])
        return made[name]

    return get


# What spowl_plan_only has of its own is spowl_fixed_threshold's decide, to the letter.
RUN = [pytest.param(name, marks=[pytest.mark.long] * (name == "spowl_plan_only")) for name in VARIANTS]


@pytest.mark.parametrize("name", RUN)
def test_a_small_run(runs, name):
    """The same files, tags, summary lines and checkpoint as the full agent's, under the script's own name. With a cost
    budget, which takes the multiplier away from --lambda-init."""
    made = runs(name)
    assert re.fullmatch(rf"SafetyPointGoal1-v0__{name}__1__\d+", made.dir.name)
    lines = [line for line in made.stdout.splitlines() if SUMMARY.fullmatch(line)]
    assert len(lines) == 1 and lines[0].startswith("step 2,500: ") and "(budget 5)" in lines[0]
    logged = scalars(made.dir)
    assert all(0.015 < value < 0.025 for _, value in logged["lagrangian/lambda"])
    assert {value for _, value in logged["charts/cost_budget"]} == {5.0}
    tags = set(TAGS) - ABSENT.get(name, set()) | EXTRA.get(name, set())
    assert tags <= logged.keys() and not logged.keys() & ABSENT.get(name, set())
    assert all(np.isfinite(value) for values in logged.values() for _, value in values)
    if name in BALANCE:
        assert {value for tag in ("charts/balance", "eval/balance") for _, value in logged[tag]} == {BALANCE[name]}
    assert len(rows_of(made.dir / "episodes.csv")) == 2 + 1  # training episodes, the evaluation
    assert checkpoint(made.dir)[0]["step"] == 2500


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "spowl_decoder"))
                                  for name in VARIANTS])
def test_a_run_goes_on_with_its_own_script(runs, place, name):
    """--evaluate plays the same episodes again, with flags of its own and networks that others do not have."""
    made = runs(name)
    run(place, "--evaluate", made.dir, script=SCRIPTS[name])
    again, last = rows_of(made.dir / "evaluation.csv"), rows_of(made.dir / "episodes.csv")[-1:]
    assert [{column: row[column] for column in last[0]} for row in again] == last
    assert name not in BALANCE or {float(row["balance"]) for row in again} == {BALANCE[name]}


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_another_script_is_refused(runs, name, flag):
    """One line that names the right one, from every other script, although the flags may not even exist there."""
    made = runs(name)
    for other, module in {"spowl_continuous": full, **VARIANTS}.items():
        if other != name:
            with pytest.raises(SystemExit) as stop:
                module.parse_args([flag, str(made.dir)])
            assert str(stop.value) == (f"{made.dir} is not a run directory of this script: it was made by {name}.py, "
                                       "use that script")


@pytest.mark.parametrize("name", VARIANTS)
def test_one_command_line_fits_all_scripts(name):
    """The README's recipe, and every flag of the full agent, is understood by every script."""
    module, fields = VARIANTS[name], {field.name: field for field in dataclasses.fields(full.Args)}
    assert fields.keys() <= {field.name for field in dataclasses.fields(module.Args)}
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/trials.md"))
    recipes = re.findall(r"python spowl_continuous\.py (--env-id [^\n]*--iterations \d+|--preset laptop[^\n`]*)", pages)
    assert len(recipes) >= 2
    for flags in recipes:
        assert dataclasses.asdict(full.parse_args(flags.split())).items() <= (
            dataclasses.asdict(module.parse_args(flags.split())) | {"exp_name": "spowl_continuous"}).items()
