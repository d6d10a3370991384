"""ablations/spowl_pixels.py: the encoder against NumPy; stacks and shifts by hand and by brute force, at an episode's
start and across the ring's end; what acting carries along; what a checkpoint keeps. A real run, stopped and resumed:
python -m pytest -q -m long tests/test_pixels.py"""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, leaves_equal, np_layer_norm, np_simnorm, random_weights, run_of
from test_train import POINT, can_draw, checkpoint, run, train

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ablations"))

import spowl_pixels as px

ARGS = px.Args(**SMALL | dict(channels=3, buffer_size=24, batch_size=400, horizon=3))
SIZE = px.PIXELS**2 * px.COLOURS


# ----------------------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------------------
def np_convolve(layer, x, stride):
    """One output after another."""
    k = len(layer["w"])
    size = (x.shape[1] - k) // stride + 1
    out = np.zeros((len(x), size, size, layer["w"].shape[-1]))
    for i in range(size):
        for j in range(size):
            seen = x[:, stride * i:stride * i + k, stride * j:stride * j + k]
            out[:, i, j] = np.einsum("nabc,abco->no", seen, layer["w"]) + layer["b"]
    return out


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_encoder_against_numpy(monkeypatch, backend):
    """Kernels of 7, 5, 3, 3 at strides 2, 2, 2, 1; x / 255 - 0.5; the latent through LayerNorm and SimNorm. As it is
    computed on either kind of device."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    shapes = jax.eval_shape(lambda key: px.init_model(ARGS, key, SIZE, 2), jax.random.key(0))
    encoder = random_weights(shapes["encoder"], 1, 0.1)
    obs = np.random.default_rng(0).integers(0, 256, (2, 3, px.STACK, px.PIXELS, px.PIXELS, px.COLOURS)).astype(np.uint8)
    z = jax.jit(partial(px.encode, ARGS))({"encoder": encoder}, obs.reshape(2, 3, -1))
    convolutions, (last,) = jax.tree.map(lambda x: np.asarray(x, np.float64), encoder)
    x = np.concatenate([obs[:, :, k] for k in range(px.STACK)], -1).reshape(6, 64, 64, 18) / 255.0 - 0.5
    for layer, stride, side, k in zip(convolutions, (2, 2, 2, 1), (29, 13, 6, 4), (7, 5, 3, 3)):
        assert layer["w"].shape[:2] == (k, k)
        x = np.maximum(np_convolve(layer, x, stride), 0.0)
        assert x.shape == (6, side, side, ARGS.channels)
    expected = np_simnorm(np_layer_norm(x.reshape(6, -1) @ last["w"] + last["b"], last["scale"], last["shift"]),
                          ARGS.simnorm_dim)
    assert z.shape == (2, 3, ARGS.latent_dim) and np.allclose(z.reshape(6, -1), expected, atol=1e-5)


def test_an_update_fits_together():
    """By shapes alone: -m long makes real ones."""
    start = jax.eval_shape(lambda key: px.fresh(ARGS, (SIZE, 2), key), jax.random.key(0))
    agent, _ = jax.eval_shape(lambda *given: px.update_many(ARGS, *given, 2), start["agent"], start["buffer"])
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(agent) == shapes(start["agent"])


def test_the_first_weights_keep_the_scale():
    """He's: about half of the squares of unit inputs that ReLU lets through."""
    layer = px.layer_of(jax.random.key(0), 7, 7, 18, 200)
    assert float(layer["w"].std()) == pytest.approx(np.sqrt(2 / (49 * 18)), rel=0.02) and not layer["b"].any()


# ----------------------------------------------------------------------------------------------------------------------
# Stacks and shifts
# ----------------------------------------------------------------------------------------------------------------------
def test_stacks_by_hand():
    """Pictures 0 to 7, of which 3 and 6 begin an episode: what came before them is not seen."""
    pictures, starts = jnp.arange(8, dtype=jnp.uint8)[:, None], jnp.arange(8) % 3 == 0
    stacks = px.stacked(pictures, starts & (jnp.arange(8) > 0))
    assert stacks.tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 4], [3, 4, 5], [6, 6, 6], [6, 6, 7]]
    assert stacks.dtype == jnp.uint8


def crops(stack):
    """The 49 stacks (3, 64, 64, 6) that a shift by up to 3 pixels, edges repeated, can make of one, as bytes."""
    padded = np.pad(stack, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    return {padded[:, i:i + 64, j:j + 64].tobytes() for i in range(7) for j in range(7)}


def test_shifts_by_brute_force():
    """Each stack is one of the 49 pictures cut out of the padded one, whole, and all of these occur."""
    rng = np.random.default_rng(1)
    obs = rng.integers(0, 256, (1, 600, px.STACK * SIZE)).astype(np.uint8)
    obs[:] = obs[:, :1]  # the same stack 600 times
    moved = np.asarray(px.shifted(ARGS, jnp.asarray(obs), jax.random.key(0)))
    known = crops(obs[0, 0].reshape(px.STACK, 64, 64, 6))
    found = {each.tobytes() for each in moved[0]}
    assert moved.shape == obs.shape and moved.dtype == np.uint8 and len(known) == 49 and found == known
    still = px.shifted(px.Args(**SMALL | dict(max_shift=0)), jnp.asarray(obs[:, :2]), jax.random.key(0))
    assert np.array_equal(still, obs[:, :2])


def test_updates_see_shifted_pictures():
    """All pictures of a ring are the same: samples are of its shifted kinds, each stack its own."""
    picture, nothing = np.random.default_rng(2).integers(0, 256, (64, 64, 6)), np.zeros(2, np.float32)
    obs = np.tile(np.float32(picture).reshape(1, -1), (2, 1))
    args = px.Args(**SMALL | dict(buffer_size=24, batch_size=12, horizon=3))
    buffer = px.init_buffer(args, SIZE, 2)
    for _ in range(8):
        action = np.zeros((2, 2), np.float32)
        buffer = px.add(buffer, px.Transition(obs, action, nothing, nothing, obs, nothing, nothing))
    batch = jax.jit(partial(px.sample, args))(buffer, jax.random.key(0))
    known = crops(np.tile(np.uint8(picture), (3, 1, 1, 1)))
    for stacks in (np.asarray(batch.obs), np.asarray(batch.next_obs)):
        found = {stack.tobytes() for stack in stacks.reshape(-1, 3 * SIZE)}
        assert found <= known and len(found) > 5


@pytest.fixture
def one_pixel(monkeypatch):
    """Pictures of one pixel, of which each colour is a number."""
    monkeypatch.setattr(px, "PIXELS", 1)


@pytest.mark.parametrize("steps", [9, 12, 17, 31], ids=["half full", "full", "over the end", "twice over"])
def test_samples_by_brute_force(one_pixel, steps):
    """From a ring of 12 rows of two environments, whose pictures name the environment, the episode, and the step in it:
    every stack is the three latest pictures of its episode that the ring has, the first one repeated."""
    args = px.Args(**SMALL | dict(buffer_size=24, batch_size=500, horizon=3, max_shift=0))
    buffer, written, at = px.init_buffer(args, px.COLOURS, 1), [], np.zeros((2, 2), int)
    rng = np.random.default_rng(steps)
    for _ in range(steps):
        done = rng.random(2) < 0.3
        obs = np.float32([[env, *at[env], 0, 0, 9] for env in range(2)])
        paid = np.float32([len(written) + 100 * env for env in range(2)])
        nothing = np.zeros(2, np.float32)
        buffer = px.add(buffer, px.Transition(obs, paid[:, None], paid, paid, obs, nothing, np.float32(done)))
        written.append((obs, done))
        at = np.where(done[:, None], at + [1, 0], at + [0, 1]) * np.where(done[:, None], [1, 0], 1)
    assert buffer.rows.obs.dtype == jnp.uint8 and buffer.rows.next_obs.size == 0
    batch = jax.tree.map(np.asarray, jax.jit(partial(px.sample, args))(buffer, jax.random.key(0)))
    assert batch.obs.shape == (1, 500, 18) and batch.next_obs.shape == (3, 500, 18)
    oldest, begun = max(0, steps - 12), set()
    stacks = np.concatenate([batch.obs, batch.next_obs]).reshape(4, 500, 3, 6)
    for b in range(500):
        env, first = divmod(int(batch.reward[0, b]), 100)
        begun.add((env, first))
        assert batch.reward[:, b].tolist() == [first + t + 100 * env for t in range(3)]
        assert batch.done[:, b].tolist() == [float(written[first + t][1][env]) for t in range(3)]
        for t in range(4):
            row = first + t
            rows = [row]
            for _ in range(2):
                before = rows[-1] - 1
                rows.append(before if before >= oldest and not written[before][1][env] else rows[-1])
            assert stacks[t, b].tolist() == [written[r][0][env].tolist() for r in reversed(rows)]
    assert begun == {(env, first) for env in range(2) for first in range(oldest, steps - 3)}  # 3 and one more picture


def test_an_episodes_last_step_is_not_learned_from(monkeypatch):
    """Its next picture is another episode's: losses do not depend on what it says."""
    seen = []
    monkeypatch.setattr(px, "masked_mean", lambda x, mask: seen.append(mask) or jnp.sum(x * mask, -1))
    monkeypatch.setattr(px, "encode", lambda args, model, obs: jnp.ones((len(obs), args.latent_dim)))
    model = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(
        lambda key: px.init_model(ARGS, key, SIZE, 2), jax.random.key(0)))
    done = jnp.float32([[0, 0, 1], [0, 1, 0], [0, 0, 0]])
    zeros = jnp.zeros((3, 3))
    batch = px.Transition(jnp.zeros((1, 3, 4)), jnp.zeros((3, 3, 2)), zeros, zeros, zeros, zeros, done)
    keep = jnp.ones((4, 9, ARGS.mlp_dim))
    px.world_model_loss(model, ARGS, batch, jnp.zeros((3, 3, ARGS.latent_dim)), zeros, zeros, keep[:3], keep)
    assert len(seen) == 5 and all(mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]] for mask in seen)


# ----------------------------------------------------------------------------------------------------------------------
# Cameras; what was known of the costs
# ----------------------------------------------------------------------------------------------------------------------
def test_one_camera_looks_ahead_and_one_back(monkeypatch):
    """The second picture is taken from the other side of the robot's axis, turned by half a turn about it: quaternion
    (0, 0, 0, 1) (w, x, y, z) = (-z, -y, x, w); then the camera is where it was."""
    mujoco, rendering = pytest.importorskip("mujoco"), pytest.importorskip("gymnasium.envs.mujoco.mujoco_rendering")
    camera, taken = SimpleNamespace(id=0, pos=np.array([0.1, 0.2, 0.3]), quat=np.array([0.4, 0.5, 0.6, 0.7])), []
    model = SimpleNamespace(vis=SimpleNamespace(global_=SimpleNamespace()), camera=lambda name: camera)
    viewer = SimpleNamespace(vopt=SimpleNamespace(geomgroup=np.zeros(6)), opengl_context=SimpleNamespace(
        make_current=lambda: None), render=lambda *_: taken.append([*camera.pos, *camera.quat]) or np.full(
            (px.PIXELS, px.PIXELS, 3), len(taken)))
    monkeypatch.setattr(mujoco, "mj_camlight", lambda *_: None)
    monkeypatch.setattr(rendering, "OffScreenViewer", lambda *_: viewer)
    env = SimpleNamespace(unwrapped=SimpleNamespace(task=SimpleNamespace(model=model, data=None)), action_space=None,
                          reset=lambda: (None, {}))
    view, _ = px.with_cameras(env).reset()
    assert not taken and np.array_equal(np.asarray(view).reshape(-1, 6), [[1, 1, 1, 2, 2, 2]] * px.PIXELS**2)
    ahead = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    np.testing.assert_allclose(taken, [ahead, [-0.1, -0.2, 0.3, -0.7, -0.6, 0.5, 0.4]])
    assert [*camera.pos, *camera.quat] == ahead


def test_costs_are_read_from_an_episodes_own_stacks(monkeypatch):
    """Two episodes of three and two pictures, each of one number."""
    noted = []
    monkeypatch.setattr(px, "read_costs", lambda args, model, obs, action: (noted.extend(obs.tolist()), np.zeros(
        (2, 250)))[1])
    episodes = []
    for numbers in ([1, 2, 3], [7, 8]):
        zeros = np.zeros(len(numbers), np.float32)
        obs = np.float32(numbers)[:, None]
        ended = np.eye(len(numbers), dtype=np.float32)[-1]
        episodes.append({"played": px.Transition(obs, obs, zeros, zeros, obs, zeros, ended)})
    px.critic_metrics(ARGS, SimpleNamespace(model=None), episodes)
    assert noted[:5] == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [7, 7, 7], [7, 7, 8]]


# ----------------------------------------------------------------------------------------------------------------------
# Acting; checkpoints; flags
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def seen(monkeypatch):
    """The stacks that `act` encodes, as numbers: what was added to one picture, which must be there unshifted."""
    stacks, picture = [], np.random.default_rng(3).integers(0, 200, SIZE)
    monkeypatch.setattr(px, "decide", lambda args, model, policy, z, mean, key, explore: (
        jnp.zeros(2), mean, {name: jnp.zeros(()) for name in px.init_actor(args, key, 2).metrics}))
    act = px.act.__wrapped__

    def watched(args, actor, values, first):
        def encode(args, model, obs):
            added = np.int32(obs).reshape(2, 3, -1) - picture
            assert np.all(added == added[..., :1])
            stacks.append(added[..., 0].tolist())
            return jnp.zeros((2, 16))

        monkeypatch.setattr(px, "encode", encode)
        obs = np.float32(picture + np.array(values)[:, None])
        agent = px.AgentState(*[None] * len(px.AgentState._fields))
        return act(args, agent, actor, obs, np.array(first), True)[1]

    return watched, stacks


def test_acting_carries_the_last_two_pictures_along(seen):
    """A new episode's first picture stands for the two before it, in its environment alone. So does the picture at
    which the agent begins to act, in the middle of an episode: those before it were not carried along. No shifts."""
    watched, stacks = seen
    actor = px.init_actor(ARGS, jax.random.key(0), 2)
    for step, first in enumerate(((0, 1), (0, 0), (0, 1), (0, 0), (0, 0)), 1):  # env 0: after random actions
        actor = watched(ARGS, actor, (step, 10 + step), np.array(first, bool))
    assert stacks == [[[1, 1, 1], [11, 11, 11]], [[1, 1, 2], [11, 11, 12]], [[1, 2, 3], [13, 13, 13]],
                      [[2, 3, 4], [13, 13, 14]], [[3, 4, 5], [13, 14, 15]]]
    assert actor.pictures.dtype == jnp.uint8 and actor.pictures.shape == (2, 2, SIZE)


def test_a_checkpoint_keeps_pictures_to_the_bit(tmp_path, one_pixel):
    """Of the ring and of the actor, as whole numbers."""
    buffer, rng = px.init_buffer(ARGS, px.COLOURS, 2), np.random.default_rng(0)
    for _ in range(5):
        values = [rng.integers(0, 256, (2, 6)), rng.random((2, 2)), *rng.random((2, 2)), np.zeros((2, 6)),
                  np.zeros(2), np.zeros(2)]
        buffer = px.add(buffer, px.Transition(*(np.float32(x) for x in values)))
    actor = px.init_actor(ARGS, jax.random.key(1), 2)._replace(pictures=jnp.uint8(rng.integers(0, 256, (2, 2, 6))))
    nothing = px.AgentState(*[jnp.zeros(2)] * len(px.AgentState._fields))
    px.save_checkpoint(tmp_path, run_of(px, ARGS, nothing, actor, buffer, 25))
    trees, _ = px.load_checkpoint(tmp_path, {"actor": actor, "buffer": buffer})
    assert leaves_equal(trees["actor"], actor) and leaves_equal(trees["buffer"], buffer)
    assert trees["actor"].pictures.dtype == trees["buffer"].rows.obs.dtype == jnp.uint8


def test_a_ring_has_room_for_a_sequence_and_one_more_picture():
    """H + 1 = 4 rows of ten environments at the random start's end, more than 4 in the ring."""
    for words, told in (("--learning-starts 150", "x (--horizon + 1) = 200"),
                        ("--buffer-size 40", "more than --horizon + 1 transitions")):
        with pytest.raises(SystemExit) as stop:
            px.parse_args(words.split())
        assert told in str(stop.value.code)
    assert px.parse_args("--learning-starts 200 --buffer-size 50".split()).buffer_size == 50


def test_pictures_are_not_transformed():
    """bins would draw each picture four times, and give the same one."""
    with pytest.raises(SystemExit, match="--obs-transform is for vectors: pictures need raw"):
        px.parse_args(["--obs-transform", "bins"])


def test_the_preset_fits_a_laptop():
    """20,000 transitions of 24.6 kB: half a gigabyte."""
    args = px.parse_args(["--preset", "laptop"])
    rows = jax.eval_shape(lambda: px.init_buffer(args, SIZE, 2)).rows
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))
    assert 24_576 < total / args.buffer_size < 24_610 and args.total_timesteps // args.action_repeat == args.buffer_size
    assert px.problems(args) == []


@pytest.mark.long
def test_a_real_run_goes_on_to_the_bit(place):
    """What is drawn is the same again: stopped in the middle, a run ends as an uninterrupted one. (mu stays 1: its
    schedule is that of the run's length.)"""
    draws, reason = can_draw()
    if not draws:
        pytest.skip(reason)
    script = ROOT / "ablations" / "spowl_pixels.py"
    flags = [*POINT, "--channels", 4, "--mu-init", 1, "--mu-growth", 0, "--total-timesteps", 2000]
    whole = train(place, *flags, script=script)
    half = train(place, *flags[:-1], 1000, script=script)
    run(place, "--resume", half.dir, "--total-timesteps", 2000, script=script)
    (counters, arrays), (again, others) = checkpoint(whole.dir), checkpoint(half.dir)
    assert arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)
    assert counters["obs"] == again["obs"] and len(np.unique(arrays["['buffer'].rows.obs"])) > 50
