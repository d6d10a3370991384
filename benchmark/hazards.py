"""The environment of docs/jax_environment.md in NumPy and processes, trained by spowl_continuous.py at the same sizes.

    python benchmark/hazards.py --total-timesteps 50000

How long that takes beside the page's `train` at cycles = 10 (150000: cycles = 30) is in
benchmark/results/jax_environment.csv. A simulator step is one of the five moves of the page's `step`."""

import sys
from pathlib import Path

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spowl_continuous as spowl

FLAGS = """--env-id Hazards-v0 --cost-budget 10 --num-envs 20 --buffer-size 100000 --updates-per-step 0.2
--latent-dim 64 --enc-dim 64 --mlp-dim 64 --num-q 2 --num-qc 2 --num-c 2 --lagrangian-heads 2
--batch-size 128 --num-samples 32 --num-pi-trajs 8 --num-elites 8 --iterations 3 --cost-read-out
expectation --cost-gamma 0.95 --eval-every 0""".split()


class Hazards(gymnasium.Env):
    """A point that goes to goals, among six discs that cost."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (20,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal, *self.hazards = self.np_random.uniform(-1.0, 1.0, (8, 2))
        return self.observe(), {}

    def observe(self):
        way = np.array(self.hazards) - self.place
        angle = np.arctan2(way[:, 1], way[:, 0])[:, None] - np.arange(16) * np.pi / 8
        near = np.maximum(0.0, 1.0 - np.linalg.norm(way, axis=1))[:, None] * (np.cos(angle) > np.cos(np.pi / 8))
        return np.concatenate([self.place, self.goal - self.place, near.max(0)])

    def step(self, action):
        place = np.clip(self.place + 0.02 * action, -1.0, 1.0)
        before, after = (np.linalg.norm(each - self.goal) for each in (self.place, place))
        self.place = place
        if after < 0.1:
            self.goal = self.np_random.uniform(-1.0, 1.0, 2)
        cost = float((np.linalg.norm(np.array(self.hazards) - place, axis=1) < 0.2).any())
        return self.observe(), before - after + (after < 0.1), cost, False, False, {}


if __name__ == "__main__":
    spowl.import_safety_gymnasium().register(id="Hazards-v0", entry_point=Hazards, max_episode_steps=250)
    spowl.main(FLAGS + sys.argv[1:])
