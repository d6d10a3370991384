"""SPOWL on tasks without one of their sensors: its entries of the observation are 0 (docs/results/latent.md).

    python probe/blind.py --preset laptop --env-id SafetyPointGoal1NoHazardsLidar-v0

Every such task with a flat observation is there for each of SENSORS; flags and run directories are those of
spowl_continuous.py."""

import sys
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cost_probe import sensors

import spowl_continuous as spowl

SENSORS = ("accelerometer", "velocimeter", "gyro", "magnetometer", "goal_lidar", "hazards_lidar", "vases_lidar")


class Blind(gymnasium.Wrapper):
    """A task whose observations are 0 at `entries`."""

    def __init__(self, env, entries):
        super().__init__(env)
        self.entries = entries

    def hide(self, obs):
        obs = np.array(obs)
        obs[self.entries] = 0.0
        return obs

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.hide(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self.hide(obs), *rest


def make_blind(env_id, sensor, **options):
    """The task without that sensor. ValueError if it has none such."""
    env = spowl.import_safety_gymnasium().make(env_id, **options)
    if sensor not in (places := sensors(env)):
        raise ValueError(f"{env_id} has no {sensor}, but {', '.join(places)}")
    return Blind(env, places[sensor])


def register():
    """Every flat task, for each of SENSORS, as {task}No{Sensor}-v0."""
    safety_gymnasium = spowl.import_safety_gymnasium()
    from safety_gymnasium.utils.registration import safe_registry
    for env_id in [name for name in safe_registry if name.endswith("-v0") and "Vision" not in name]:
        for sensor in SENSORS:
            name = env_id.replace("-v0", f"No{sensor.title().replace('_', '')}-v0")
            safety_gymnasium.register(id=name, entry_point=partial(make_blind, env_id, sensor))


register()

if __name__ == "__main__":
    spowl.main()
