"""Runs a script on a simulator that gives the same numbers, to the last bit, in 0.7 of the time.

    python benchmark/fast_simulator.py baselines/ppo_lagrangian.py --env-id SafetyPointGoal1-v0

Safety-Gymnasium turns to each object by itself, looks the robot up for it again, and asks after each sensor's type.
Here that is done once a sweep; the physics stay as they are. Worth it where the simulator is most of a run: for methods
without a model, which take one simulator step per action."""
import math
import runpy
import sys
from pathlib import Path

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def lidar(task, positions):
    """`BaseTask._obs_lidar_pseudo`: what each bin of the lidar reads of objects at positions (K, 2 or 3) -> (bins,)."""
    conf, agent, mat, turn = task.lidar_conf, task.agent.pos, task.agent.mat, 2.0 * np.pi
    bins, reach = conf.num_bins, conf.max_dist
    size, readings = turn / bins, [0.0] * bins
    places = np.zeros((len(positions := np.array(positions, ndmin=2)), 1, 3))
    places[:, 0, :2] = positions[:, :2]
    ego = np.matmul(places - agent, mat)[:, 0, :2]  # a product an object: one of all would round otherwise
    z = np.ascontiguousarray(ego).view(complex)[:, 0]
    for dist, angle in zip(np.abs(z).tolist(), (np.angle(z) % turn).tolist()):
        at = int(angle / size)
        near = np.exp(-conf.exp_gain * dist) if reach is None else max(0, reach - dist) / reach
        readings[at] = max(readings[at], near)
        if conf.alias:
            share, above, below = (angle - size * at) / size, (at + 1) % bins, (at - 1) % bins
            readings[above] = max(readings[above], share * near)
            readings[below] = max(readings[below], (1 - share) * near)
    return np.array(readings)


def distance(agent, position):
    """`BaseAgent.dist_xy`: from the robot to a position (2 or 3,) in the plane."""
    (x, y, _), (u, v) = agent.engine.data.body("agent").xpos.tolist(), position[:2].tolist()
    return math.sqrt((u - x) * (u - x) + (v - y) * (v - y))


def hazards_cost(hazards):
    """`Hazards.cal_cost`: depths of the robot's position inside of hazards, times the cost of each."""
    if not hazards.is_constrained:
        return {}
    cost, (x, y, _) = 0, hazards.agent.pos.tolist()
    for u, v, _ in map(np.ndarray.tolist, hazards.pos):
        far = math.sqrt((u - x) * (u - x) + (v - y) * (v - y))
        if far <= hazards.size:
            cost += hazards.cost * (hazards.size - far)
    return {"cost_hazards": cost}


def contains(box, x, plain=gymnasium.spaces.Box.contains):
    """`Box.contains`, without the questions about an array's type where it is the box's own."""
    if not isinstance(x, np.ndarray) or x.dtype != box.dtype:
        return plain(box, x)
    return x.shape == box.shape and bool((x >= box.low).all() and (x <= box.high).all())


def replaced(simulator):
    """(class, name, function) of all that is replaced in the module safety_gymnasium and in its spaces."""
    bases, hazards = simulator.bases, simulator.assets.geoms.hazards.Hazards
    return ((bases.base_task.BaseTask, "_obs_lidar_pseudo", lidar), (bases.base_agent.BaseAgent, "dist_xy", distance),
            (hazards, "cal_cost", hazards_cost), (gymnasium.spaces.Box, "contains", contains))


def main(argv):
    """Replace it, then run the script argv[0] with the flags that follow it."""
    if not argv or not Path(argv[0]).is_file():
        raise SystemExit("which script? python benchmark/fast_simulator.py baselines/ppo_lagrangian.py FLAGS")
    simulator = runpy.run_path(f"{ROOT}/spowl_continuous.py")["import_safety_gymnasium"]()
    for owner, name, function in replaced(simulator):
        setattr(owner, name, function)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)  # as Python itself would
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
