"""benchmark/speed.py: operations are counted as the fewest the method needs, and never more than are done."""
import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import pytest
from conftest import SMALL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

import speed
import spowl_continuous as spowl

OBS, ACTIONS = 60, 2


def inner(value):
    """The jaxprs that a parameter of an equation holds."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [getattr(each, "jaxpr", each) for each in values if hasattr(each, "eqns") or hasattr(each, "jaxpr")]


def count(jaxpr):
    """Operations of every matrix product in a jaxpr, scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
            total += 2 * depth * equation.outvars[0].aval.size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(count(each) for value in equation.params.values() for each in inner(value))
    return total


def test_the_counter_itself():
    def repeated(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=3)[0] + jax.jit(lambda y: y @ y)(x)

    assert count(jax.make_jaxpr(repeated)(jax.numpy.ones((5, 5))).jaxpr) == 4 * 2 * 5**3


@pytest.mark.parametrize("size", speed.SIZES)
def test_operations_are_those_of_the_products_done(size):
    """What is counted lies below what is done, and not far: nothing that is done in plenty is left out."""
    args = spowl.Args(**speed.SIZES[size] | {"buffer_size": 1000})
    agent = jax.eval_shape(partial(spowl.init_agent, args, obs_dim=OBS, action_dim=ACTIONS), jax.random.key(0))
    buffer = jax.eval_shape(partial(spowl.init_buffer, args, OBS, ACTIONS))
    actor = jax.eval_shape(partial(spowl.init_actor, args, action_dim=ACTIONS), jax.random.key(1))
    obs = jax.ShapeDtypeStruct((args.num_envs, OBS), "float32")
    update = jax.make_jaxpr(lambda *a: spowl.update_many.__wrapped__(args, *a, 1))(agent, buffer)
    act = jax.make_jaxpr(lambda *a: spowl.act.__wrapped__(args, *a))(
        agent, actor, obs, jax.ShapeDtypeStruct((args.num_envs,), bool), True)
    assert 0.9 < speed.update_flops(args, OBS, ACTIONS) / count(update.jaxpr) <= 1.0
    assert 0.9 < speed.plan_flops(args, OBS, ACTIONS) / count(act.jaxpr) <= 1.0


def test_default_sizes_against_an_earlier_count():
    """About 73 GFLOP an update and 1.0 TFLOP a plan for ten environments, by an earlier count of another prototype."""
    args = spowl.Args()
    assert speed.update_flops(args, OBS, ACTIONS) == pytest.approx(73e9, rel=0.1)
    assert speed.plan_flops(args, OBS, ACTIONS) == pytest.approx(1.0e12, rel=0.1)


@pytest.mark.long
def test_every_part_is_measured_written_and_drawn(tmp_path, monkeypatch):
    tiny = SMALL | {"buffer_size": 400, "train_every": 40, "action_repeat": 2, "horizon": 2}
    monkeypatch.setattr(speed, "SIZES", {"laptop": tiny})
    monkeypatch.setattr(speed, "GROWTH", {"plan": {}, "update": {"batch_size": (8, 8, 16)}})
    monkeypatch.setattr(speed, "measure_env_step", lambda args: (0.02, 0.01))
    files = {name: tmp_path / f"speed.{name}" for name in ("json", "csv")} | {"picture": tmp_path / "speed.png"}
    speed.main(speed.Options(sizes=("laptop",), repeats=1, cycle_share=0.5, **files))
    rows = json.loads(files["json"].read_text())
    parts = {row["part"]: row for row in rows}
    assert set(speed.COLUMNS) == set(rows[0])
    assert {"ceiling", "copy", "update", "buffer_add", "plan", "env_step", "cycle",
            "update batch_size=16"} <= set(parts)
    assert parts["env_step"]["share_of_ceiling"] == 0.5 and parts["ceiling"]["share_of_ceiling"] == 1.0
    for name in ("update", "plan", "cycle"):
        assert parts[name]["seconds"] > 0 and parts[name]["flops"] > 0 and 0 < parts[name]["share_of_ceiling"] < 1
    assert len(files["csv"].read_text().splitlines()) == 1 + len(rows)
    assert files["picture"].stat().st_size > 10_000


@pytest.mark.parametrize("changes, said", [({"repeats": 0}, "--repeats"), ({"cycle_share": 1.5}, "--cycle-share"),
                                           ({"csv": Path("/nowhere/speed.csv")}, "no directory /nowhere")])
def test_flags_that_cannot_be(changes, said):
    """Said before anything is measured."""
    with pytest.raises(SystemExit, match=said):
        speed.main(dataclasses.replace(speed.Options(), **changes))


@pytest.mark.parametrize("size", speed.SIZES)
@pytest.mark.parametrize("part", speed.GROWTH)
def test_every_size_on_a_curve_is_one_that_a_run_accepts(size, part):
    """So what is counted for it is done: no more heads for the constraint than there are, for one."""
    for *_, args in speed.grown(spowl.Args(**speed.SIZES[size]), part):
        assert spowl.problems(args) == []


def test_a_csv_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("size,part\nlaptop,update\n")
    with pytest.raises(SystemExit, match="not a table that this program wrote"):
        speed.read_rows(tmp_path / "other.csv")
