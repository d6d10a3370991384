"""Shared by the tests: the import path, checks that are on for all of them, small flags, random weights, and the
networks of METHOD §3 once more, in float64 NumPy, as the reference that expected numbers come from."""
import contextlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.key_reuse import _core as key_reuse

from spowl_continuous import AgentState, Args, init_agent

jax.config.update("jax_debug_key_reuse", True)  # every test fails where a random key is used twice
key_reuse.key_reuse_signatures[jax.lax.transpose_p] = key_reuse.KeyReuseSignature(key_reuse.Forward(0, 0))
# (JAX does not know that a transposed key is the same key, and so refuses every scan over keys under vmap)


def key_signature(primitive, *args, original=key_reuse.key_reuse_signature_from_primitive, **params):
    """What becomes of keys in an operation. JAX traces every slice to know that; most are of numbers, by the thousand
    where a test goes through an array's rows."""
    if primitive is jax.lax.slice_p and not jax.dtypes.issubdtype(args[0].dtype, jax.dtypes.prng_key):
        return key_reuse.KeyReuseSignature()
    return original(primitive, *args, **params)


key_reuse.key_reuse_signature_from_primitive = key_signature
jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 where there is a GPU
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the tests' time
# and half of that these emitters of fusions
EMITTERS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
ENOUGH = EMITTERS | {"xla_backend_optimization_level": 1}  # runs nearly as fast as more
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the same for a script that a test runs
         "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in EMITTERS.items())}


def compile_options(*args, original=compiler.get_compile_options, **kwargs):
    """What compiles soonest; or, where much is to be run, what compiles soonest of all that runs nearly as fast."""
    options = original(*args, **kwargs)
    ours = EMITTERS if jax.config.read("jax_disable_most_optimizations") else ENOUGH
    options.env_option_overrides = [*options.env_option_overrides, *ours.items()]
    return options


compiler.get_compile_options = compile_options
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("repeatable")

SMALL = dict(num_envs=2, buffer_size=40, latent_dim=16, enc_dim=12, mlp_dim=16, num_bins=21, num_q=3, num_qc=4,
             num_c=2, lagrangian_heads=4, batch_size=8, num_samples=24, num_pi_trajs=5, num_elites=6,
             iterations=2, bootstrap_samples=200)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """What one file compiled is not kept in memory for the next."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where the tests' runs go."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What one file or one of the tests' runs compiles is kept on disk for the next."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
                            "persistent_cache_min_compile_time_secs": 0.0}.items():
            jax.config.update(f"jax_{name}", value)
            patch.setenv(f"JAX_{name.upper()}", str(value))
        compilation_cache.reset_cache()  # where something was compiled before, the place was settled with it
        yield


def all_fast():
    """Thousands of steps: here running takes longer than compiling, and a check of the keys at every call longest."""
    slow = {"jax_disable_most_optimizations": True, "jax_debug_key_reuse": True}
    for name in slow:
        jax.config.update(name, False)
    yield
    for name, value in slow.items():
        jax.config.update(name, value)


fast = pytest.fixture(all_fast)  # for one test
fast_file = pytest.fixture(all_fast, scope="module")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes many minutes; left out unless asked for with -m long")


LONGEST = ["test_resume.py", "test_train.py", "test_variants.py", "test_safedreamer.py", "test_probe.py",
           "test_sweep.py", "test_ppo_lagrangian.py", "test_cpo.py", "test_cvpo.py", "test_costs.py", "test_tdmpc2.py"]


def pytest_collection_modifyitems(config, items):
    place = {name: number for number, name in enumerate(LONGEST)}  # first, so that both processes end together
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def small_args(**changes):
    """Flags for networks and planner of toy size."""
    return Args(**(SMALL | changes))


def random_weights(shapes, seed, spread=0.3):
    """Parameters for a tree of shapes with noise on every leaf: no bias, scale or shift is at its start, no layer 0."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        start = 1.0 if "'scale'" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(start + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_agent(args, obs_dim, action_dim, seed=0, spread=0.3):
    """An agent before its first update with random weights, target heads of their own included."""
    shapes = jax.eval_shape(partial(init_agent, args, obs_dim=obs_dim, action_dim=action_dim), jax.random.key(0))
    model, policy, target = (random_weights(part, seed + i, spread)
                             for i, part in enumerate((shapes.model, shapes.policy, shapes.target)))
    model_opt, policy_opt = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
                             for part in (shapes.model_opt, shapes.policy_opt))
    numbers = (jnp.asarray(x, jnp.float32) for x in (args.lambda_init, args.mu_init, 1.0))
    return AgentState(model, policy, target, model_opt, policy_opt, *numbers, jax.random.key(seed), jnp.int32(0))


def run_of(script, args, agent, actor, buffer, step, cost=0.0):
    """A run of that script at that step, at its episodes' beginning."""
    nothing, obs = np.zeros(args.num_envs, int), np.zeros((args.num_envs, 3), np.float32)
    return script.Run(agent, actor, buffer, step, step, step, cost, nothing, np.zeros((args.num_envs, 3)), obs, [], 0.0)


def saved_run(script, args, agent, buffer, step, cost=0.0):
    """A new run directory in args.runs_dir with a checkpoint at that step -> its path."""
    actor = script.init_actor(args, jax.random.key(1), buffer.rows.action.shape[-1])
    with contextlib.ExitStack() as stack:
        directory, _ = script.open_run_dir(args, stack)
    script.save_checkpoint(directory, run_of(script, args, agent, actor, buffer, step, cost))
    return directory


def fixed_policy(mean, raw_log_std, latent_dim=16, width=4):
    """A policy that ignores its latent: mean (A,) before tanh, and the network's output for the log-std (A,)."""
    out = jnp.concatenate([jnp.asarray(mean, jnp.float32), jnp.asarray(raw_log_std, jnp.float32)])
    hidden = {"w": jnp.zeros((latent_dim, width)), "b": jnp.zeros(width), "scale": jnp.ones(width),
              "shift": jnp.zeros(width)}
    return hidden, {"w": jnp.zeros((width, out.size)), "b": out}


def certain(policy, raw=-20.0):
    """The same policy with its log-std at the lower bound: its actions are its means, but for noise of e^-10."""
    *hidden, last = policy
    actions = last["b"].size // 2
    return (*hidden, {"w": last["w"].at[:, actions:].set(0.0), "b": last["b"].at[actions:].set(raw)})


def leaves_equal(tree, other):
    """Whether two trees have the same numbers to the last bit (-0 equals 0)."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(as_numpy(x), as_numpy(y))), tree, other)))


def as_numpy(x):
    """A NumPy array, of a random key's data where x is a key."""
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# ----------------------------------------------------------------------------------------------------------------------
# METHOD §3 in NumPy
# ----------------------------------------------------------------------------------------------------------------------
def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_layer_norm(x, scale, shift):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


def np_mish(y):
    return y * np.tanh(np.logaddexp(0.0, y))


def np_simnorm(x, group):
    return np.concatenate([np_softmax(x[..., i:i + group]) for i in range(0, x.shape[-1], group)], -1)


def np_mlp(layers, x, action=None, keep=None):
    """[Linear, dropout, LayerNorm, Mish]*, Linear on the concatenation [x, action]; the weights made float64."""
    layers = float64(layers)
    weights = [layer["w"] for layer in layers]
    if action is not None:
        lead = np.broadcast_shapes(x.shape[:-1], action.shape[:-1])
        x, action = (np.broadcast_to(y, (*lead, y.shape[-1])).astype(np.float64) for y in (x, action))
        x, weights[0] = np.concatenate([x, action], -1), np.concatenate([weights[0], layers[0]["w_action"]])
    for i, layer in enumerate(layers):
        x = x @ weights[i] + layer["b"]
        if i == 0 and keep is not None:
            x = x * np.asarray(keep).reshape(x.shape)
        if i < len(layers) - 1:
            x = np_mish(np_layer_norm(x, layer["scale"], layer["shift"]))
    return x


def np_latent(args, layers, x, action=None):
    last = float64(layers[-1])
    return np_simnorm(np_layer_norm(np_mlp(layers, x, action), last["scale"], last["shift"]), args.simnorm_dim)


def one_head(layers, k):
    """Head k of an ensemble."""
    return jax.tree.map(lambda x: x[k], layers)


def np_heads(args, layers, z, action):
    """(K, ...): read-outs of an ensemble, head after head."""
    return np.stack([np_read_out(np_mlp(one_head(layers, k), z, action), args.bin_limit)
                     for k in range(len(layers[0]["b"]))])


def np_symlog(x):
    return np.sign(x) * np.log(1.0 + np.abs(x))


def np_symexp(x):
    return np.sign(x) * (np.exp(np.abs(x)) - 1.0)


def np_read_out(logits, limit):
    return np_symexp(np_softmax(logits) @ np.linspace(-limit, limit, logits.shape[-1]))


def np_two_hot(x, num_bins, limit):
    """One number -> (M,), by looking for the two bins around it."""
    bins, weights = np.linspace(-limit, limit, num_bins), np.zeros(num_bins)
    position = np.clip(np_symlog(float(x)), -limit, limit)
    low = int(np.clip(np.searchsorted(bins, position, side="right") - 1, 0, num_bins - 2))
    weights[low + 1] = (position - bins[low]) / (bins[low + 1] - bins[low])
    weights[low] = 1.0 - weights[low + 1]
    return weights


def np_cross_entropy(logits, target):
    return -np.sum(target * np.log(np_softmax(logits) + 1e-300), -1)


def np_policy(args, policy, z):
    """Mean before tanh, log-std."""
    mean, raw = np.split(np_mlp(policy, z), 2, -1)
    return mean, args.log_std_min + 0.5 * (args.log_std_max - args.log_std_min) * (np.tanh(raw) + 1.0)
