"""benchmark/fast_simulator.py: the numbers of Safety-Gymnasium to the last bit, and the scripts as they are."""
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import spowl_continuous

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import fast_simulator  # noqa: E402

TASKS = "SafetyPointGoal1-v0", "SafetyPointButton1-v0", "SafetyPointPush2-v0", "SafetyAntGoal2-v0"


def episode(simulator, task, steps=150):
    """Every observation, reward and cost of two episodes, of so many random steps at most, and where they ended."""
    env, rng, numbers = simulator.make(task), np.random.default_rng(0), []
    for seed in (1, 2):
        numbers += [env.reset(seed=seed)[0]]
        for _ in range(steps):
            obs, reward, cost, terminated, truncated, info = env.step(rng.uniform(-1.0, 1.0, env.action_space.shape))
            numbers += [obs, reward, cost, terminated, truncated, *(info[name] for name in sorted(info))]
            if terminated:
                break
        numbers += [env.unwrapped.task.data.qpos.copy(), env.unwrapped.task.data.time]
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in numbers])


@pytest.mark.parametrize("task", TASKS)
def test_the_same_numbers_to_the_last_bit(task, monkeypatch):
    simulator = spowl_continuous.import_safety_gymnasium()
    plain = episode(simulator, task)
    called = set()
    for owner, name, function in fast_simulator.replaced(simulator):
        def counted(*args, function=function, name=name):
            called.add(name)
            return function(*args)
        assert name in vars(owner)  # else the library's own would go on being used
        monkeypatch.setattr(owner, name, counted)
    fast = episode(simulator, task)
    np.testing.assert_array_equal(plain.view(np.int64), fast.view(np.int64))
    assert len(called) == len(fast_simulator.replaced(simulator)), called


def test_no_costs_would_be_missed():
    """The robot stands inside of two hazards that overlap: both cost, by depth; at a rim it costs nothing."""
    class Agent:
        pos = np.array([1.0, 2.0, 0.1])

    class Hazards:
        agent, size, cost, is_constrained = Agent, 0.5, 2.0, True
        pos = [np.array([x, y, 0.0]) for x, y in ((1.3, 2.4), (1.0, 1.9), (1.2, 2.0), (4.0, 2.0))]

    cost = fast_simulator.hazards_cost(Hazards)["cost_hazards"]
    np.testing.assert_allclose(cost, 2.0 * (0.0 + 0.4 + 0.3), atol=1e-12)
    Hazards.is_constrained = False
    assert fast_simulator.hazards_cost(Hazards) == {}


@pytest.mark.parametrize("x, inside", [([0.5, 1.0], True), ([0.5, 1.1], False), ([-0.1, 0.0], False),
                                       ([np.nan, 0.5], False), ([0.5], False), ([1, 0], True)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, None])
def test_an_observation_outside_its_space_is_found(x, inside, kind):
    """Another type can be one that the space takes, or one it does not; a list is taken."""
    x = x if kind is None else np.array(x, kind)
    box, narrow = (gymnasium.spaces.Box(0.0, 1.0, (2,), bits) for bits in (np.float64, np.float32))
    assert fast_simulator.contains(box, x) == inside == box.contains(x)
    assert fast_simulator.contains(narrow, x) == narrow.contains(x)


def test_a_script_is_run_as_it_is(tmp_path):
    """With its flags, as the program that it is, on the faster simulator; it finds the modules beside it."""
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("from safety_gymnasium.bases.base_agent import BaseAgent as agent\n")
    script.write_text("import sys\nfrom beside import agent\nif __name__ == '__main__':\n"
                      "    print(sys.argv[1:], agent.dist_xy.__name__)\n")
    command = [sys.executable, ROOT / "benchmark/fast_simulator.py", script, "--seed", "2"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.stdout.strip() == "['--seed', '2'] distance", done.stderr


@pytest.mark.parametrize("argv", [[], ["no_such_script.py", "--seed", "2"]])
def test_a_script_is_asked_for(argv):
    with pytest.raises(SystemExit, match="which script"):
        fast_simulator.main(argv)
