"""probe/reconstruct.py on a run directory made by hand: what is chosen, decoded, drawn and refused."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import saved_run
from PIL import Image

from probe import reconstruct
from probe.reconstruct import safedreamer as sd

ARGS = sd.Args(inputs="vision", num_envs=2, buffer_size=24, deter=8, stoch=2, classes=3, units=8, channels=2,
               head_layers=1, num_bins=11, window=4)
PICTURE = 64 * 64 * 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose ring of twelve rows has gone round. Environment 0's episodes end at steps 9 and 13 of 15; every
    picture has one colour that says the step."""
    buffer, rng = sd.init_buffer(ARGS, PICTURE, 2), np.random.default_rng(0)
    zeros = np.zeros(2, np.float32)
    for step in range(15):
        obs, ends = np.full((2, PICTURE), step / 255.0), np.array([step in (9, 13), False], np.float32)
        buffer = sd.add(buffer, sd.Transition(obs, rng.uniform(-1, 1, (2, 2)), zeros, zeros, obs, zeros, ends))
    agent = sd.init_agent(ARGS, jax.random.key(0), PICTURE, 2)
    args = dataclasses.replace(ARGS, runs_dir=str(tmp_path_factory.mktemp("reconstruct")))
    return saved_run(sd, args, agent, buffer, 150)


@pytest.mark.parametrize("length, first", [(1, 14), (2, 12), (4, 10), (5, 5), (7, 3)])
def test_the_newest_rows_of_one_episode(length, first):
    done = np.isin(np.arange(15), (9, 13))[3:]
    rows = sd.Transition(*[np.arange(3, 15)] * 6, done)
    assert reconstruct.window(rows, length).reward.tolist() == list(range(first, first + length))


def test_no_episode_is_long_enough():
    rows = sd.Transition(*[np.arange(6)] * 6, np.array([0, 0, 1, 0, 0, 0]))
    with pytest.raises(SystemExit, match="no episode in the buffer is 4 agent steps long"):
        reconstruct.window(rows, 4)


def test_what_is_drawn():
    """Front above back, seen above decoded, one column a step, a line after the last one seen."""
    true, made = np.zeros((3, 64, 64, 6)), np.zeros((3, 64, 64, 6))
    true[1, ..., :3], true[2, ..., 3:], made[0, ..., 4] = 0.2, 0.4, 0.6
    sheet = reconstruct.sheet(true.reshape(3, -1), made.reshape(3, -1), 2)
    assert sheet.shape == (4 * 68, 3 * 68, 3)
    centre = lambda row, column: sheet[68 * row + 34, 68 * column + 34].tolist()
    assert centre(0, 1) == [51] * 3 and centre(2, 2) == [102] * 3 and centre(3, 0) == [0, 153, 0]
    assert centre(0, 0) == centre(1, 1) == centre(2, 1) == [0] * 3
    assert (sheet[:, 2 * 68 - 1:2 * 68 + 1] == (200, 0, 0)).all()


@pytest.mark.long
def test_decoding_goes_on_without_pictures():
    """What is decoded up to `seen` depends on its pictures; what follows on no picture after them."""
    model = sd.init_model(ARGS, jax.random.key(0), PICTURE, 2)
    rng = np.random.default_rng(1)
    obs, action = rng.random((5, 1, PICTURE)).astype(np.float32), rng.normal(size=(5, 1, 2)).astype(np.float32)
    zeros = np.zeros((5, 1), np.float32)
    rows = sd.Transition(obs, action, zeros, zeros, obs[::-1].copy(), zeros, zeros)
    decode = lambda rows: reconstruct.decoded(ARGS, model, rows, 3, jax.random.key(2))
    made = decode(rows)
    assert made.shape == (5, PICTURE)
    seen = decode(rows._replace(next_obs=np.concatenate([1 - rows.next_obs[:1], rows.next_obs[1:]])))
    assert not np.array_equal(seen[0], made[0])
    later = rows._replace(next_obs=np.concatenate([rows.next_obs[:3], 1 - rows.next_obs[3:]]))
    assert np.array_equal(decode(later), made)
    other = decode(rows._replace(action=np.concatenate([action[:4], -action[4:]])))
    assert np.array_equal(other[:4], made[:4]) and not np.array_equal(other[4], made[4])


@pytest.mark.long
def test_a_picture_of_a_run(run, tmp_path, capsys):
    reconstruct.main(reconstruct.Options(run, tmp_path / "seen.png", seen=3, imagined=2))
    picture = np.asarray(Image.open(tmp_path / "seen.png"))
    assert picture.shape == (4 * 68, 5 * 68, 3)
    assert [picture[34, 68 * column + 34].tolist() for column in range(5)] == [[step] * 3 for step in range(5, 10)]
    assert capsys.readouterr().out.startswith("mean squared error of a pixel, seen and imagined: ")


def test_what_cannot_be_drawn(run, tmp_path):
    for changes, said in (({"environment": 2}, "--environment must be from 0 to 1"),
                          ({"seen": 0}, "must be at least 1"), ({"imagined": 0}, "must be at least 1"),
                          ({"picture": tmp_path / "none" / "p.png"}, "there is no directory")):
        with pytest.raises(SystemExit, match=said):
            reconstruct.main(dataclasses.replace(reconstruct.Options(run, tmp_path / "p.png"), **changes))
    (tmp_path / "args.json").write_text((run / "args.json").read_text())
    with pytest.raises(SystemExit, match="has no checkpoint"):
        reconstruct.main(reconstruct.Options(tmp_path, tmp_path / "p.png"))


def test_another_run_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="is not a run directory of safedreamer.py"):
        reconstruct.main(reconstruct.Options(tmp_path, tmp_path / "p.png"))
    info = json.loads((run / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(info | {"args": info["args"] | {"inputs": "vector"}}))
    with pytest.raises(SystemExit, match="was not trained with --inputs vision"):
        reconstruct.main(reconstruct.Options(tmp_path, tmp_path / "p.png"))
