"""METHOD §3: symlog and two-hot regression, SimNorm, Mish, layer norm, masked means."""
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import np_cross_entropy, np_layer_norm, np_mish, np_two_hot, small_args
from hypothesis import given
from hypothesis import strategies as st

import spowl_continuous as spowl
from spowl_continuous import (cross_entropy, layer_norm, masked_mean, norm_mish, read_out, sim_norm, symexp, symlog,
                              two_hot)

symlog, symexp, layer_norm = jax.jit(symlog), jax.jit(symexp), jax.jit(layer_norm)
two_hot, sim_norm = jax.jit(two_hot, static_argnums=(1, 2)), jax.jit(sim_norm, static_argnums=1)
read_out, cross_entropy = jax.jit(read_out), jax.jit(cross_entropy)
masked_mean, norm_mish = jax.jit(masked_mean), jax.jit(norm_mish)
NUMBERS = np.array([0.0, 1e-4, 0.03, -0.03, 0.5, 1.0, -1.0, 3.7, -25.0, 144.4, -2000.0, 21000.0])
EXPECTATION = small_args(cost_read_out="expectation", num_bins=101)
any_float = st.floats(width=32, allow_nan=False)


# ----------------------------------------------------------------------------------------------------------------------
# symlog, symexp
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("x, expected", [(0.0, 0.0), (math.e - 1, 1.0), (1 - math.e, -1.0), (99.0, math.log(100.0))])
def test_symlog_by_hand(x, expected):
    """§3: sign(x) log(1 + |x|)."""
    assert symlog(x) == pytest.approx(expected, rel=1e-6)
    assert symexp(expected) == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("function, shapes", [
    (lambda x: spowl.read_out(x, 10.0), [(3, 5)]), (partial(spowl.cost_read_out, EXPECTATION), [(3, 101)]),
    (spowl.norm_mish_backward, [((3, 8), (3, 1), (3, 8), (8,)), (3, 8)])])
def test_products_that_a_gpu_would_round_say_so(function, shapes):
    """To 10 bits, in TF32: numbers that are read out, and the derivative of every layer."""
    zeros = [jnp.zeros(shape) if isinstance(shape[0], int) else tuple(map(jnp.zeros, shape)) for shape in shapes]
    with jax.default_matmul_precision("default"):
        equations = jax.make_jaxpr(function)(*zeros).jaxpr.eqns
    found = {equation.params["precision"] for equation in equations if equation.primitive.name == "dot_general"}
    assert found == {(jax.lax.Precision.HIGHEST,) * 2}


def test_symexp_inverts_symlog():
    """§3, both ways; small numbers keep their relative precision."""
    numbers = np.concatenate([NUMBERS, [1e-7, -1e-7]]).astype(np.float32)
    np.testing.assert_allclose(symexp(symlog(numbers)), numbers, rtol=3e-6)
    logs = np.linspace(-10, 10, 41, dtype=np.float32)
    np.testing.assert_allclose(symlog(symexp(logs)), logs, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Two-hot targets, their read-out and cross-entropy
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("log_x, expected", [
    (0.0, [0, 0, 1, 0, 0]), (1.0, [0, 0, 0, 1, 0]), (-2.0, [1, 0, 0, 0, 0]), (2.0, [0, 0, 0, 0, 1]),  # bin centres
    (0.5, [0, 0, 0.5, 0.5, 0]), (-1.5, [0.5, 0.5, 0, 0, 0]), (-1.25, [0.25, 0.75, 0, 0, 0]), (1.9, [0, 0, 0, 0.1, 0.9]),
    (2.1, [0, 0, 0, 0, 1]), (-7.0, [1, 0, 0, 0, 0]), (80.0, [0, 0, 0, 0, 1]), (-80.0, [1, 0, 0, 0, 0])])
def test_two_hot_by_hand(log_x, expected):
    """§3: bins at -2, -1, 0, 1, 2 in symlog space; beyond the range all weight is on the last bin."""
    x = math.copysign(math.expm1(abs(log_x)), log_x)
    np.testing.assert_allclose(two_hot(jnp.float32(x), 5, 2.0), expected, atol=1e-6)


def test_two_hot_of_infinity():
    np.testing.assert_array_equal(two_hot(jnp.array([jnp.inf, -jnp.inf]), 3, 1.0), [[0, 0, 1], [1, 0, 0]])


@given(any_float, st.sampled_from([(2, 1.0), (6, 3.0), (101, 10.0)]))
def test_two_hot_is_a_distribution_on_neighbours(x, bins):
    """§3: weights in [0, 1] that sum to 1, on at most two bins, which are neighbours; as a search for them finds."""
    weights = np.asarray(two_hot(jnp.float32(x), *bins))
    used = np.flatnonzero(weights)
    assert weights.min() >= 0.0 and weights.max() <= 1.0 and weights.sum() == pytest.approx(1.0, abs=2e-5)
    assert len(used) <= 2 and used[-1] - used[0] <= 1
    if np.isfinite(x):
        np.testing.assert_allclose(weights, np_two_hot(x, *bins), atol=5e-5)


@pytest.mark.parametrize("num_bins", [100, 101])
def test_read_out_of_two_hot(num_bins):
    """§3: the read-out of logits whose softmax is the two-hot target of x is x."""
    logits = jnp.log(two_hot(jnp.asarray(NUMBERS), num_bins, 10.0) + 1e-30)
    assert logits.shape == (len(NUMBERS), num_bins)
    np.testing.assert_allclose(read_out(logits, 10.0), NUMBERS, rtol=1e-4, atol=1e-5)


def test_read_out_is_clipped_to_the_bins():
    logits = jnp.log(two_hot(jnp.array([1e9, -1e9]), 11, 3.0) + 1e-30)
    np.testing.assert_allclose(read_out(logits, 3.0), [math.expm1(3.0), -math.expm1(3.0)], rtol=1e-5)


def test_read_out_averages_in_symlog_space():
    """§3: a 5% chance of cost 5 reads as about 0.09, not 0.25 (§4's known bias)."""
    chance = 0.05 * two_hot(5.0, 101, 10.0) + 0.95 * two_hot(0.0, 101, 10.0)
    assert read_out(jnp.log(chance + 1e-30), 10.0) == pytest.approx(6.0**0.05 - 1, rel=1e-4)
    assert read_out(jnp.log(jnp.array([0.25, 0.25, 0.5])), 1.0) == pytest.approx(math.exp(0.25) - 1, rel=1e-5)
    assert read_out(jnp.zeros(101), 10.0) == pytest.approx(0.0, abs=1e-5)


def test_cross_entropy_against_numpy():
    """§3: -sum target log softmax(logits), for one-hot, two-hot and uniform targets."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 7)) * 5
    target = np.stack([np.eye(7)[:4], np.full((4, 7), 1 / 7), rng.dirichlet(np.ones(7), 4)])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(target)),
                               np_cross_entropy(logits, target), rtol=2e-5)


def test_cross_entropy_by_hand():
    assert cross_entropy(jnp.zeros(101), two_hot(3.3, 101, 10.0)) == pytest.approx(math.log(101), rel=1e-5)
    logits = jnp.array([1000.0, 0.0, -1000.0])  # no overflow
    assert cross_entropy(logits, jnp.array([1.0, 0.0, 0.0])) == pytest.approx(0.0)
    assert cross_entropy(logits, jnp.array([0.0, 0.25, 0.75])) == pytest.approx(1750.0)


# ----------------------------------------------------------------------------------------------------------------------
# SimNorm, layer norm, Mish
# ----------------------------------------------------------------------------------------------------------------------
def test_sim_norm_by_hand():
    """§3: softmax within each group, not across groups; large inputs do not overflow."""
    x = jnp.array([[0.0, 0.0, math.log(3.0), 0.0], [500.0, -500.0, -500.0, -500.0]])
    np.testing.assert_allclose(sim_norm(x, 2), [[0.5, 0.5, 0.75, 0.25], [1.0, 0.0, 0.5, 0.5]], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(sim_norm(x[:1], 4), [np.array([1, 1, 3, 1]) / 6], rtol=1e-6)


def test_sim_norm_groups_are_independent():
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    out = np.asarray(sim_norm(x, 8))
    np.testing.assert_allclose(out.reshape(3, 5, 2, 8).sum(-1), 1.0, rtol=1e-6)
    changed = np.asarray(sim_norm(x + np.r_[np.zeros(8), np.arange(8.0)].astype(np.float32), 8))
    np.testing.assert_array_equal(changed[..., :8], out[..., :8])
    assert not np.allclose(changed[..., 8:], out[..., 8:])


def test_layer_norm_against_numpy():
    """§3: over the last axis, with scale and shift, eps 1e-5 inside the root."""
    rng = np.random.default_rng(0)
    x, scale, shift = rng.normal(size=(2, 3, 12)) * 7 + 4, rng.normal(size=12), rng.normal(size=12)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x), scale, shift), np_layer_norm(x, scale, shift), atol=1e-5)
    plain = np.asarray(layer_norm(jnp.asarray(x), 1.0, 0.0))
    np.testing.assert_allclose([plain.mean(-1).max(), plain.std(-1).min()], [0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("function", [layer_norm, lambda *inputs: norm_mish(*inputs) / 0.6])
def test_layer_norm_eps(function):
    """§3: a row of variance 1e-5 is divided by the root of 2e-5. Mish(y) is about 0.6 y + 0.32 y^2 near 0."""
    x = jnp.sqrt(jnp.float32(1e-5)) * jnp.array([-1.0, 1.0])
    out = function(x, 0.01 * jnp.ones(2), jnp.zeros(2))
    assert out[1] - out[0] == pytest.approx(2 * 0.01 / math.sqrt(2.0), rel=1e-3)
    assert np.all(np.asarray(function(jnp.full(4, 3.0), jnp.ones(4), jnp.zeros(4))) == 0.0)


def plain_norm_mish(x, scale, shift):
    y = layer_norm(x, scale, shift)
    return y * jnp.tanh(jax.nn.softplus(y))


def mish_inputs(width=12, rows=(4, 3), largest=60.0):
    """Inputs with pre-activations from about -largest to largest: small, moderate and huge scales in one layer."""
    rng = np.random.default_rng(1)
    scale = np.geomspace(0.01, largest, width) * rng.choice([-1, 1], width)
    return tuple(jnp.asarray(a) for a in (rng.normal(size=(*rows, width)), scale, rng.normal(size=width)))


def test_norm_mish_values():
    """§3: Mish(y) = y tanh(softplus(y)): 0 at 0, the identity far right, 0 far left."""
    x, scale, shift = mish_inputs()
    expected = np_mish(np_layer_norm(*(np.asarray(a, np.float64) for a in (x, scale, shift))))
    np.testing.assert_allclose(norm_mish(x, scale, shift), expected, rtol=2e-5, atol=2e-6)
    flat = norm_mish(jnp.ones(5), jnp.ones(5), jnp.array([0.0, 100.0, 1000.0, -100.0, -1000.0]))
    np.testing.assert_allclose(flat, [0.0, 100.0, 1000.0, 0.0, 0.0], atol=1e-30)
    assert norm_mish(jnp.ones(2), jnp.ones(2), jnp.ones(2))[0] == pytest.approx(0.8650984, rel=1e-6)


@partial(jax.jit, static_argnums=0)
def gradients(function, inputs, cotangent):
    return jax.vjp(function, *inputs)[1](cotangent)


@pytest.mark.parametrize("largest", [1.0, 8.0, 60.0, 1e4])
def test_norm_mish_gradients(largest):
    """§3: all three gradients equal automatic differentiation of the plain composition, in float64 and float32."""
    with jax.enable_x64(True):
        inputs = tuple(a.astype(jnp.float64) for a in mish_inputs(largest=largest))
        cotangent = jnp.asarray(np.random.default_rng(2).normal(size=inputs[0].shape))
        exact = gradients(plain_norm_mish, inputs, cotangent)
        for ours, expected in zip(gradients(norm_mish, inputs, cotangent), exact, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * largest)
    inputs, cotangent = mish_inputs(largest=largest), jnp.asarray(np.asarray(cotangent, np.float32))
    for ours, expected in zip(gradients(norm_mish, inputs, cotangent), exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5 * max(largest, 1.0))


def test_norm_mish_gradient_at_extremes():
    """§3: the slope is 1 far right, 0 far left, 0.6 at 0, and never NaN."""
    shift = jnp.array([-1e9, -90.0, -25.0, 0.0, 19.9, 20.1, 90.0, 1e9])
    slope = jax.grad(lambda shift: norm_mish(jnp.ones(8), jnp.ones(8), shift).sum())(shift)
    np.testing.assert_allclose(slope, [0.0, 0.0, 0.0, 0.6, 1.0, 1.0, 1.0, 1.0], atol=1e-6)


def test_norm_mish_under_vmap():
    """§3: an ensemble is a vmap over heads: values and gradients are those of a loop over them."""
    rng = np.random.default_rng(3)
    x, scale, shift, cotangent = (jnp.asarray(rng.normal(size=s)) for s in ((3, 4, 6), (3, 6), (3, 6), (3, 4, 6)))
    out = jax.jit(jax.vmap(norm_mish))(x, scale, shift)
    grads = gradients(jax.vmap(norm_mish), (x, scale, shift), cotangent)
    for k in range(3):
        np.testing.assert_allclose(out[k], jax.jit(plain_norm_mish)(x[k], scale[k], shift[k]), atol=1e-5)
        exact = gradients(plain_norm_mish, (x[k], scale[k], shift[k]), cotangent[k])
        for ours, expected in zip(grads, exact, strict=True):
            np.testing.assert_allclose(ours[k], expected, atol=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Masked mean
# ----------------------------------------------------------------------------------------------------------------------
def test_masked_mean_by_hand():
    """§2: means are over what is valid; 0 where nothing is."""
    x = jnp.array([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0], [1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(masked_mean(x, mask), [3.0, 3.5, 2.0, 0.0], rtol=1e-6)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=6, max_size=6))
def test_masked_mean_is_the_mean_of_what_is_valid(pairs):
    valid = [x for x, keep in pairs if keep]
    x, mask = (jnp.array(column, jnp.float32) for column in zip(*pairs))
    assert masked_mean(x, mask) == pytest.approx(np.mean(valid) if valid else 0.0, abs=1e-3)
