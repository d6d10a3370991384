"""The simulator side (METHOD §2): what the environments' processes answer, on scripted environments and real ones; what
a run does when one fails."""
import contextlib
import dataclasses
import inspect
import itertools
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from fractions import Fraction
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_numpy, run_of, small_args
from gymnasium import spaces

import spowl_continuous as spowl
from spowl_continuous import Args, collect, env_worker, episode_seed

PLACES = {episode_seed(1, stream, index, episode): (index, episode)
          for stream in (0, 1) for index in range(10) for episode in range(40)}


# ----------------------------------------------------------------------------------------------------------------------
# Scripted environments
# ----------------------------------------------------------------------------------------------------------------------
def box(low, high):
    low, high = (np.asarray(bound, np.float32) for bound in (low, high))
    return types.SimpleNamespace(low=low, high=high, shape=low.shape)


class Scripted:
    """Observes (environment, episode, steps in it), which it reads off the episode's seed (seed 1; else -1, -1); pays 1
    and costs 0.25 a step; ends after `length` steps.

    It raises after `fails_after` steps of all its episodes together, and in the resets of some episodes."""

    def __init__(self, length=7, ends_by="truncation", low=(-1.0,), high=(1.0,), fails_after=None, fails_at_reset=(),
                 noise=0.0, cannot_draw_at=()):
        self.length, self.ends_by, self.fails_after, self.fails_at_reset = length, ends_by, fails_after, fails_at_reset
        self.noise, self.cannot_draw_at, self.options = noise, cannot_draw_at, None
        self.observation_space, self.action_space = box([-9.0] * 3, [9.0] * 3), box(low, high)
        self.place, self.steps, self.seeds, self.actions = (-1, -1), 0, [], []

    def observe(self):
        return np.array([*self.place, self.steps + self.noise], np.float64)

    def reset(self, seed=None):
        self.place, self.steps, self.seeds = PLACES.get(seed, (-1, -1)), 0, self.seeds + [seed]
        if self.place[1] in self.fails_at_reset:
            raise RuntimeError("the floor gave way")
        return self.observe(), {}

    def step(self, action):
        assert self.steps < self.length, "stepped past the end"
        if len(self.actions) == self.fails_after:
            self.fail()
        self.steps, self.actions = self.steps + 1, self.actions + [np.array(action)]
        terminated = self.steps == self.length and self.ends_by == "termination"
        truncated = self.steps == self.length and not terminated
        return self.observe(), 1.0, 0.25, terminated, truncated, {}

    def fail(self):
        raise RuntimeError("the floor gave way\nin the cellar")

    def render(self):
        if self.steps in self.cannot_draw_at:
            raise RuntimeError("no picture")
        return np.full((4, 4, 3), self.steps, np.uint8)


def raised_in(method):
    """What is told of the exception that this method raises: with its file and line."""
    lines, first = inspect.getsourcelines(method)
    number, said = next((first + i, re.search(r'raise (\w+)\("([^"\\]*)', line)) for i, line in enumerate(lines)
                        if "raise " in line)
    return f"{said[1]}: {said[2]} ({__file__}, line {number})"


class Reusing(Scripted):
    """Every observation is the same array, which the next step overwrites."""

    array = np.zeros(3, np.float32)

    def observe(self):
        self.array[:] = super().observe()
        return self.array


class Hanging(Scripted):
    """Gives no answer when it should fail, until its process is killed."""

    released = threading.Event()

    def fail(self):
        self.released.wait(10.0)
        raise RuntimeError("too late")


class Dying(Scripted):
    """Takes its process with it."""

    def fail(self):
        raise SystemExit(3)


class Thread(threading.Thread):
    """Looks to its parent like a process, and can be killed while it waits."""

    def __init__(self, target, daemon, args):
        pipe = Connection(os.dup(args[0].fileno()))  # as a fork or spawn does: the parent closes its copy
        super().__init__(target=target, daemon=daemon, args=(pipe, *args[1:]))
        self.pipe, self.stream, self.group, self.waiting, self.exitcode = pipe, args[2], args[3], list(args[3]), None
        Hanging.released.clear()

    def run(self):
        try:
            super().run()
        except SystemExit as death:
            self.exitcode = death.code
        except OSError:  # the pipe was shut
            self.exitcode = -9
        finally:
            self.pipe.close()

    def kill(self):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)
        Hanging.released.set()


def simulator(make):
    """What stands for Safety-Gymnasium."""
    registration = types.SimpleNamespace(safe_registry={"Scripted-v0"})
    return types.SimpleNamespace(make=make, utils=types.SimpleNamespace(registration=registration))


@pytest.fixture
def no_process(monkeypatch):
    """env_worker may run in this process: no signal is blocked, and nothing dies with its parent."""
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *args: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # so that it comes back
    monkeypatch.setenv("MUJOCO_GL", "")  # as it was, at the end
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(spowl, "ctypes", types.SimpleNamespace(
        CDLL=lambda name: types.SimpleNamespace(prctl=lambda *args: None)))


@pytest.fixture
def toy_agent(monkeypatch):
    """An agent whose plan's mean counts the agent steps of an episode, which takes every other plan, and whose actions
    follow from the actor's keys: `act` is compiled in no time."""
    def decide(args, model, policy, z, last_mean, key, explore):
        metrics = {name: jnp.zeros(()) for name in spowl.init_actor(args, key, 1).metrics}
        action = jnp.tanh(jax.random.normal(key, last_mean.shape[1:]))
        return action, last_mean + 1.0, metrics | {"charts/balance": last_mean[0, 0] % 2}

    nothing = dict.fromkeys(spowl.AgentState._fields)
    monkeypatch.setattr(spowl, "decide", decide)
    monkeypatch.setattr(spowl, "encode", lambda args, model, obs: obs)
    monkeypatch.setattr(spowl, "init_agent", lambda args, key, obs_dim, action_dim: spowl.AgentState(**nothing | {
        "policy": ({"b": jnp.zeros(2 * action_dim)},), "key": key, "scale": jnp.float32(1.0),
        "num_updates": jnp.int32(0)}))


@pytest.fixture
def threads(monkeypatch, no_process, toy_agent):
    """Processes of start_envs are threads of this one. threads.lives holds their environments by stream (0 training, 1
    evaluation), threads.started all that were started, threads.methods how. All are ended with the test."""
    closing, here = [], types.SimpleNamespace(lives={}, started=[], methods=[])

    def make(name, **options):
        thread = threading.current_thread()
        env = here.lives[thread.stream][thread.waiting.pop(0)]
        env.options = options
        return env

    def process(**arguments):
        here.started.append(Thread(**arguments))
        return here.started[-1]

    context = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    for name, module in {
            "multiprocessing": types.SimpleNamespace(
                get_context=lambda method: here.methods.append(method) or context),
            "import_safety_gymnasium": lambda: simulator(make),
            "atexit": types.SimpleNamespace(register=lambda *call: closing.append(call))}.items():
        monkeypatch.setattr(spowl, name, module)
    yield here
    for function, *values in closing:
        function(*values)
    for thread in here.started:
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.fixture
def scripted_envs(threads, monkeypatch):
    """scripted_envs(environment, ...) -> args, ask, groups of environments by process: what start_envs gives for those
    environments, whose processes are threads."""
    def start(*lives, cores=2, stream=0, drawn=False, **flags):
        threads.lives[stream], before = lives, len(threads.started)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        sizes = {"num_envs": len(lives), "buffer_size": 20 * len(lives), "env_timeout": 30.0}
        args = small_args(**sizes | {"env_id": "Scripted-v0"} | flags)
        ask, *sizes = spowl.start_envs(args, stream, len(lives), drawn)
        assert sizes == [3, 1]
        return types.SimpleNamespace(args=args, ask=ask, groups=[list(x.group) for x in threads.started[before:]])

    return start


@pytest.fixture
def scripted_train(threads, monkeypatch):
    """scripted_train(lives, eval_lives, stopping, **flags) -> what `train` gives on those environments, 22 and 12 steps
    long unless given: 100 steps, random until 50, evaluated there and at 100, without updates."""
    monkeypatch.setattr(spowl, "critic_metrics", lambda args, agent, episodes: {})

    def run(lives=None, eval_lives=None, stopping=(), **flags):
        threads.lives = {0: lives or [Scripted(22), Scripted(12)], 1: eval_lives or [Scripted(22), Scripted(12)]}
        defaults = {"total_timesteps": 100, "learning_starts": 50, "train_every": 50, "eval_every": 50,
                    "eval_episodes": 2, "updates_per_step": 1e-9, "num_envs": 2, "action_repeat": 5, "buffer_size": 40,
                    "env_timeout": 30.0, "env_id": "Scripted-v0"}
        return spowl.train(small_args(**defaults | flags), stopping)

    return run


@pytest.fixture
def worker(monkeypatch, no_process):
    """worker(envs, commands) runs env_worker on those environments -> its answers, the first before any command.

    The commands wait in the pipe beforehand, so no second process or thread is needed."""
    def run(envs, commands, stream=0, indices=None, drawn=False, **flags):
        waiting = list(envs)

        def make(name, **options):
            waiting[0].options = options
            return waiting.pop(0)

        monkeypatch.setattr(spowl, "import_safety_gymnasium", lambda: simulator(make))
        ours, theirs = multiprocessing.Pipe()
        for command in commands:
            ours.send(command)
        socket.socket(fileno=os.dup(ours.fileno())).shutdown(socket.SHUT_WR)  # the worker sees the end after the last
        args = small_args(env_id="Scripted-v0", **flags)
        env_worker(theirs, args, stream, list(range(len(envs)) if indices is None else indices), drawn)
        answers = []
        while ours.poll():
            answers.append(ours.recv())
        ours.close(), theirs.close()
        return answers[:-1] if answers[-1].startswith("EOFError: ") else answers

    return run


BEGIN = "reset", [(0, [])]


def same(tree, other):
    """Whether two trees of arrays, keys, numbers and words are equal to the last bit."""
    plain = lambda x: as_numpy(x) if isinstance(x, jax.Array) else x
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(plain(x), plain(y)), tree, other)))


def step_with(*actions):
    """The command for one agent step, one action per environment."""
    return "step", np.array(actions, np.float32)


def test_sizes_come_first_and_reset_gives_float32(worker):
    sizes, (obs, episodes) = worker([Scripted(low=(-1.0, -1.0), high=(1.0, 1.0))], [BEGIN])
    assert sizes == (3, 2)
    assert obs.dtype == np.float32 and obs.tolist() == [[0.0, 0.0, 0.0]] and episodes.tolist() == [0]


@pytest.mark.parametrize("action, expected", [
    ((0.0, 0.0), (5.0, 0.0)), ((1.0, 1.0), (20.0, 0.785)), ((-1.0, -1.0), (-10.0, -0.785)),
    ((0.5, -0.5), (12.5, -0.3925)), ((3.0, -1.5), (20.0, -0.785))])
def test_actions_are_rescaled_to_the_bounds_and_clipped(worker, action, expected):
    """What is stored is the action as it was chosen."""
    env = Scripted(low=(-10.0, -0.785), high=(20.0, 0.785))
    _, _, row, _ = worker([env], [BEGIN, step_with(action)], action_repeat=1)[2]
    assert np.allclose(env.actions, [expected]) and np.allclose(row.action, [action])


def test_action_repeat_sums_rewards_and_costs(worker):
    env = Scripted(length=100)
    obs, episodes, row, steps = worker([env], [BEGIN, step_with([0.3])])[2]
    assert row.obs.tolist() == [[0, 0, 0]] and obs.tolist() == row.next_obs.tolist() == [[0, 0, 5]]
    assert [x.tolist() for x in row[2:4]] == [[5.0], [1.25]] and [x.tolist() for x in row[5:]] == [[0.0], [0.0]]
    assert all(x.dtype == np.float32 for x in (obs, *row)) and (episodes.tolist(), steps.tolist()) == ([0], [5])
    assert len(env.actions) == 5 and np.ptp(env.actions) == 0.0


@pytest.mark.parametrize("ends_by", ["termination", "truncation"])
def test_action_repeat_stops_at_the_end_and_the_next_episode_begins(worker, ends_by):
    """METHOD §2: stop early at the episode's end. The answer holds its last observation and the next one's first, with
    the next one's number."""
    answers = worker([Scripted(length=7, ends_by=ends_by)], [BEGIN] + 3 * [step_with([0.0])])
    obs, episodes, row, steps = answers[3]
    assert row.next_obs.tolist() == [[0, 0, 7]] and obs.tolist() == [[0, 1, 0]] and episodes.tolist() == [1]
    assert (row.reward, row.cost, row.done, row.terminated) == (2.0, 0.5, 1.0, ends_by == "termination")
    assert [answer[3].tolist() for answer in answers[2:]] == [[5], [2], [5]]
    assert answers[4][2].obs.tolist() == [[0, 1, 0]] and answers[4][0].tolist() == [[0, 1, 5]]
    assert (answers[4][2].reward, answers[4][2].cost) == (5.0, 1.25)


def test_an_end_on_the_last_repeat_is_seen_once(worker):
    answers = worker([Scripted(length=10)], [BEGIN] + 3 * [step_with([0.0])])
    assert [answer[2].done.tolist() for answer in answers[2:]] == [[0.0], [1.0], [0.0]]
    assert [answer[3].tolist() for answer in answers[2:]] == [[5], [5], [5]]


def test_every_episode_has_the_seed_of_its_counters(worker):
    """Episodes are numbered from the one that `reset` names; each one that follows by itself counts one up."""
    env, name = Scripted(length=5), lambda episode: ("reset", [(episode, [])])
    worker([env], [name(2)] + 2 * [step_with([0.0])] + [name(9), step_with([0.0])], seed=3, stream=1, indices=[4])
    expected = [episode_seed(3, 1, 4, episode) for episode in (2, 3, 4, 9, 10)]
    assert env.seeds[0] == 0 and [seed for seed in env.seeds if seed] == expected  # the first reset is unlike others


def test_episode_seeds_are_distinct_and_reproducible():
    places = [(seed, stream, env, episode) for seed in (0, 1, 2) for stream in (0, 1, 2) for env in range(10)
              for episode in range(20)]
    seeds = [episode_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [episode_seed(*place) for place in places]
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)


def test_one_process_holds_several_environments(worker):
    """Each has its own index, action, bounds, length and seeds; what comes back is in their order."""
    envs = [Scripted(7), Scripted(1000, low=(0.0,), high=(4.0,)), Scripted(5, "termination")]
    _, begun, first, second = worker(envs, [("reset", [(3, []), (0, []), (8, [])]), step_with([0.5], [0.5], [-1.0]),
                                            step_with([0.0], [-1.0], [1.0])], indices=[4, 5, 6])
    assert begun[0].tolist() == [[4, 3, 0], [5, 0, 0], [6, 8, 0]] and begun[1].tolist() == [3, 0, 8]
    assert first[0].tolist() == [[4, 3, 5], [5, 0, 5], [6, 9, 0]] and first[1].tolist() == [3, 0, 9]
    assert second[2].next_obs.tolist() == [[4, 3, 7], [5, 0, 10], [6, 9, 5]] and second[1].tolist() == [4, 0, 10]
    assert second[2].done.tolist() == [1, 0, 1] and second[2].terminated.tolist() == [0, 0, 1]
    assert (second[2].reward.tolist(), second[3].tolist()) == ([2, 5, 5], [2, 5, 5])
    assert [np.unique(env.actions).tolist() for env in envs] == [[0.0, 0.5], [0.0, 3.0], [-1.0, 1.0]]


def test_a_reset_may_take_actions(worker):
    """They bring the environment to where the same steps did."""
    actions = [np.float32([x]) for x in (0.1, -0.2, 0.3)]
    stepped, again = Scripted(1000), Scripted(1000)
    expected = worker([stepped], [BEGIN] + [step_with(action) for action in actions + [[0.9]]])
    _, begun, after = worker([again], [("reset", [(0, actions)]), step_with([0.9])])
    assert same(begun, expected[-2][:2]) and begun[0].tolist() == [[0, 0, 15]] and same(after, expected[-1])
    assert np.array_equal(again.actions, stepped.actions)


def test_an_episode_that_cannot_begin_counts_as_used(worker, capfd):
    """At once or after another: the next one is played, and what comes back is its number. A reset to that number, as
    a resumed run asks for it, leads to the same. A line says so each time."""
    life = dict(length=5, fails_at_reset=[0, 2, 3])
    _, (obs, episodes), first, second = worker([Scripted(**life)], [BEGIN] + 2 * [step_with([0.0])])
    assert obs.tolist() == [[0, 1, 0]] and episodes.tolist() == [1]
    assert first[2].next_obs.tolist() == [[0, 1, 5]] and first[0].tolist() == [[0, 4, 0]] and first[1].tolist() == [4]
    assert capfd.readouterr().err.splitlines() == [
        f"episode {episode} of environment 0 left out: the floor gave way" for episode in (0, 2, 3)]
    _, begun, after = worker([Scripted(**life)], [("reset", [(4, [])]), step_with([0.0])])
    assert same(begun, first[:2]) and same(after, second)


def test_ten_episodes_in_a_row_that_cannot_begin_are_the_end(worker):
    """Nine are not, and are counted anew after each that could."""
    assert worker([Scripted(fails_at_reset=range(10))], [BEGIN])[1:] == [raised_in(Scripted.reset)]
    failing = [*range(9), *range(10, 19), *range(20, 30)]
    answers = worker([Scripted(5, fails_at_reset=failing)], [BEGIN] + 2 * [step_with([0.0])])
    assert [answer[1].tolist() for answer in answers[1:3]] == [[9], [19]]
    assert answers[3:] == [raised_in(Scripted.reset)]


def test_the_process_transforms_what_the_networks_see(worker):
    """--obs-transform log: a lidar's 1 becomes -log(0.02), an unbounded 9 log(10), anything else stays."""
    env = Scripted(length=5)
    env.observation_space = box([0.0, -np.inf, -1.0], [1.0, np.inf, 1.0])
    env.observe = lambda: np.array([1.0, 9.0, float(env.steps)])
    (obs, _), (new_obs, _, row, _) = worker([env], [BEGIN, step_with([0.0])], obs_transform="log")[1:]
    expected = [-math.log(0.02), math.log(10.0)]
    assert np.allclose(obs, [[*expected, 0.0]], rtol=1e-6) and np.array_equal(obs, row.obs)
    assert np.allclose(row.next_obs, [[*expected, 5.0]], rtol=1e-6) and np.array_equal(new_obs, obs)


def test_a_failing_environment_answers_with_one_line(worker):
    answers = worker([Scripted(fails_after=2)], [BEGIN, step_with([0.0])])
    assert answers[2:] == [raised_in(Scripted.fail)]


@pytest.mark.parametrize("answer, said", [
    ((np.zeros(3), 1.0, False, False, {}), "ndarray, float, bool, bool, dict"),  # as Gymnasium has it
    ((np.zeros(3), None, 0.0, False, False, {}), "ndarray, NoneType, float, bool, bool, dict"),
    ((np.zeros(3), 0, None, False, False, {}), "ndarray, int, NoneType, bool, bool, dict")])
def test_what_a_step_returns_is_six_values(worker, answer, said):
    env = Scripted()
    env.step = lambda action: answer
    (told,) = worker([env], [BEGIN, step_with([0.0])])[2:]
    assert told.endswith(f"its step must return observation, reward, cost, terminated, truncated, info, not {said}")


def test_observations_of_another_shape_end_a_run(worker):
    """In the middle of an episode."""
    env = Scripted()
    env.observe = lambda: np.zeros(3 + (env.steps > 4))
    (told,) = worker([env], [BEGIN, step_with([0.0])])[2:]
    assert told == "ValueError: its observations must be of one shape, (3,), not (4,)"


@pytest.mark.parametrize("space, seen", [
    (spaces.Box(0, 255, (4, 4, 3), np.uint8), np.zeros((4, 4, 3))), (spaces.Box(0, 1, ()), np.float64(0.0)),
    (spaces.Dict({"lidar": spaces.Box(0, 1, (3,))}), {"lidar": np.zeros(3)}), (spaces.Box(0, 1, (4,)), np.zeros(3))],
    ids=["picture", "number", "dictionary", "another size"])
def test_observations_that_are_not_flat_are_refused(worker, space, seen):
    """In one line that says what must be and what is, when the process starts."""
    env = Scripted()
    env.observation_space, env.observe = space, lambda: seen
    (told,) = worker([env], [])
    assert told.startswith("ValueError: its observations must be flat vectors: ") and told.endswith(str(space.shape))


def test_pictures_are_refused_where_there_is_no_screen(worker):
    """Their first reset draws: it must not be what is told."""
    env = Scripted(cannot_draw_at=[0])
    env.observation_space, env.observe = spaces.Box(0, 255, (4, 4, 3), np.uint8), env.render
    (told,) = worker([env], [])
    assert "its observations must be flat vectors" in told


@pytest.mark.parametrize("space", [
    spaces.Discrete(4), spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(np.float32([-1, 0]), np.float32([1, np.inf])),
    spaces.Box(-1, 1, (2, 2)), spaces.MultiDiscrete([2, 3])],
    ids=["discrete", "unbounded", "half bounded", "matrix", "several"])
def test_actions_that_are_not_flat_and_bounded_are_refused(worker, space):
    env = Scripted()
    env.action_space = space
    assert worker([env], []) == [f"ValueError: its actions must be flat vectors within finite bounds: {space}"]


def test_only_the_first_environment_draws(worker):
    """A picture of what it is in; without a screen, unless the variable names another way."""
    envs = [Scripted(1000, cannot_draw_at=[10]), Scripted(1000)]
    commands = [("reset", [(0, []), (0, [])])] + 3 * [step_with([0.0], [0.0]), ("draw", [None, None])]
    answers = worker(envs, commands, drawn=True)
    assert answers[3].tolist() == np.full((4, 4, 3), 5).tolist() and answers[5:] == [raised_in(Scripted.render)]
    assert envs[0].options["render_mode"] == "rgb_array" and envs[1].options == {}
    assert os.environ["MUJOCO_GL"] == "egl"
    other = Scripted(cannot_draw_at=[0])
    assert worker([other], [], indices=[1], drawn=True) == [(3, 1)] and other.options == {}


# ----------------------------------------------------------------------------------------------------------------------
# Several of them, in threads
# ----------------------------------------------------------------------------------------------------------------------
def agent_steps(ask, num_envs, number, action_dim=1):
    """The answers to that many agent steps with random actions, from episode 0 on."""
    ask("reset", [(0, [])] * num_envs)
    actions = np.random.default_rng(0).uniform(-1, 1, (number, num_envs, action_dim)).astype(np.float32)
    return [ask("step", action) for action in actions]


@pytest.mark.parametrize("num_envs, cores, groups", [
    (10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]), (2, 8, [[0], [1]]), (3, 1, [[0, 1, 2]])])
def test_there_are_as_many_processes_as_cores(scripted_envs, num_envs, cores, groups):
    """How environments are spread over them changes nothing."""
    envs = scripted_envs(*(Scripted(4 + index) for index in range(num_envs)), cores=cores)
    assert envs.groups == groups
    for t, (obs, episodes, row, steps) in enumerate(agent_steps(envs.ask, num_envs, 12)):
        assert obs.shape == (num_envs, 3) and steps.shape == (num_envs,)
        assert obs[:, 0].tolist() == row.next_obs[:, 0].tolist() == list(range(num_envs))
        per_episode = np.ceil((4 + np.arange(num_envs)) / 5)  # agent steps
        assert obs[:, 1].tolist() == episodes.tolist() == ((t + 1) // per_episode).tolist()


def test_processes_start_by_fork(scripted_envs, threads):
    """The simulator, which `start_envs` has imported, need not be imported again."""
    scripted_envs(Scripted())
    assert threads.methods == ["fork"]


def test_only_the_process_of_the_first_environment_draws(scripted_envs):
    """The others need no screen, and are not asked for a picture."""
    lives = Scripted(1000), Scripted(1000, cannot_draw_at=[0]), Scripted(1000, cannot_draw_at=[0])
    envs = scripted_envs(*lives, stream=1, drawn=True)
    assert envs.groups == [[0, 1], [2]] and [bool(life.options) for life in lives] == [True, False, False]
    envs.ask("reset", [(0, [])] * 3)
    assert envs.ask("draw").tolist() == np.zeros((4, 4, 3)).tolist()
    assert envs.ask("step", np.zeros((3, 1)))[0].tolist() == [[0, 0, 5], [1, 0, 5], [2, 0, 5]]  # no picture is left


def test_simulators_get_the_numbers_that_are_stored(scripted_envs):
    """float32, whatever the caller's type: a resumed run takes the stored actions again."""
    life = Scripted(1000)
    ask = scripted_envs(life, action_repeat=1).ask
    ask("reset", [(0, [])])
    stored = [ask("step", np.array([[0.1]], kind))[2].action for kind in (np.float64, np.float32)]
    assert stored[0].dtype == np.float32 and same(*stored) and same(*life.actions)


def test_termination_and_truncation_reach_the_transition(scripted_envs):
    """METHOD §2: an episode ends by termination (bootstrap stops) or by truncation (bootstrap continues)."""
    envs = scripted_envs(Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(1000))
    answers = agent_steps(envs.ask, 3, 3)
    done = np.array([row.done for _, _, row, _ in answers])
    terminated = np.array([row.terminated for _, _, row, _ in answers])
    assert done.T.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert terminated.T.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert np.array([steps for *_, steps in answers]).T.tolist() == [[5, 2, 5], [5, 5, 2], [5, 5, 5]]
    assert all(field.dtype == np.float32 for field in answers[0][2])


def test_no_row_of_the_buffer_joins_two_episodes(scripted_envs):
    """METHOD §2, on numbered transitions: within a row the episode stays the same and its steps go on by the repeat;
    a row that follows an end begins at step 0 of the next episode."""
    lengths = (7, 12, 20)
    envs = scripted_envs(Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(20, "truncation"))
    buffer = spowl.init_buffer(envs.args, 3, 1)
    for _, _, row, _ in agent_steps(envs.ask, 3, 25):  # the ring holds 20: it wraps
        buffer = spowl.add(buffer, row)
    rows = jax.tree.map(lambda x: np.roll(np.asarray(x), -int(buffer.head), axis=0), buffer.rows)  # oldest first
    (_, episode, number), (_, next_episode, next_number) = (np.moveaxis(x, -1, 0) for x in (rows.obs, rows.next_obs))
    assert int(buffer.size) == 20 and (rows.done.sum(0) > 2).all()
    assert (episode == next_episode).all()
    assert (next_number == np.minimum(number + 5, lengths)).all()
    assert (rows.done == (next_number == lengths)).all()
    assert (rows.reward == next_number - number).all() and (rows.cost == 0.25 * rows.reward).all()
    ended = rows.done[:-1] > 0
    assert (episode[1:] == np.where(ended, episode[:-1] + 1, episode[:-1])).all()
    assert (number[1:] == np.where(ended, 0.0, next_number[:-1])).all()


# ----------------------------------------------------------------------------------------------------------------------
# Data that is collected, and processes that fail
# ----------------------------------------------------------------------------------------------------------------------
class Garbling(Scripted):
    """Sends what is no answer when it should fail, and takes its process with it."""

    def fail(self):
        threading.current_thread().pipe.send_bytes(b"\x80")
        raise SystemExit(4)


class Interrupted(Scripted):
    """Sends a part of an answer, and takes its process with it."""

    def fail(self):
        os.write(threading.current_thread().pipe.fileno(), b"\0\0\0\x10abc")
        raise SystemExit(5)


def begin(envs, resume=None):
    """A run at its first moment or that of a checkpoint. By default all its actions are random."""
    return spowl.begin(dataclasses.replace(envs.args, resume=resume), envs.ask, (3, 1))


def collected(envs, run, number):
    """The run after that many agent steps."""
    for _ in range(number):
        run, _ = collect(envs.args, envs.ask, run)
    return run


def test_training_explores(scripted_envs, monkeypatch):
    """Evaluation does not: see below."""
    explored, act = [], spowl.act
    monkeypatch.setattr(spowl, "act", lambda *given: explored.append(given[-1]) or act(*given))
    collected(envs := scripted_envs(Scripted(12), learning_starts=0), begin(envs), 2)
    assert explored == [True, True]


def test_what_a_run_counts(scripted_envs):
    """Episodes that end have a row with their return, cost and length; the sums of those that go on are kept. `step`
    counts as if no episode were ever cut short by its end, `simulated` what was really taken."""
    run = collected(envs := scripted_envs(Scripted(7), Scripted(1000), Scripted(10, "termination")), begin(envs), 5)
    assert (run.step, run.completed, run.simulated) == (75, 0, (5 + 2 + 5 + 2 + 5) + 25 + 25)
    assert run.cost == 0.25 * run.simulated
    assert run.rows == [["train", 30, 0, 7, 1.75, 7], ["train", 30, 2, 10, 2.5, 10], ["train", 60, 0, 7, 1.75, 7],
                        ["train", 60, 2, 10, 2.5, 10]]
    assert run.episodes.tolist() == [2, 0, 2] and run.obs.tolist() == [[0, 2, 5], [1, 0, 25], [2, 2, 5]]
    assert run.so_far.tolist() == [[5, 1.25, 5], [25, 6.25, 25], [5, 1.25, 5]]


def test_a_plan_starts_from_the_last_one_within_an_episode(scripted_envs):
    """METHOD §5: from its mean; in a new episode from zero."""
    run, means = begin(envs := scripted_envs(Scripted(12), Scripted(1000), learning_starts=0)), []
    for _ in range(5):
        run = collected(envs, run, 1)
        means.append(run.actor.plan_mean[:, 0, 0].tolist())
    assert means == [[1, 1], [2, 2], [3, 3], [1, 4], [2, 5]]
    assert int(run.actor.step) == 5 and run.actor.metrics["charts/balance"].tolist() == [2, 2]


@pytest.mark.parametrize("failing, reason", [
    (Scripted, raised_in(Scripted.fail)), (Hanging, "no answer for 1.5 seconds"),
    (Dying, "its process ended with exit code 3"), (Garbling, "its process ended with exit code 4"),
    (Interrupted, "its process ended with exit code 5")])
def test_a_process_that_fails_leaves_the_run_as_it_was(scripted_envs, threads, tmp_path, failing, reason):
    """All processes end, and one line says what happened where. The run of the last good step can be saved, and goes
    on in new processes as if nothing had been."""
    flags = {"learning_starts": 15, "env_timeout": 1.5}  # one agent step is random, all others are an agent's
    lives = lambda: (Scripted(1000), Scripted(1000), Scripted(12))
    through = collected(envs := scripted_envs(*lives(), **flags), begin(envs), 5)
    before = len(threads.started)
    run = collected(envs := scripted_envs(Scripted(1000), failing(1000, fails_after=12), Scripted(12), **flags),
                    begin(envs), 2)
    with pytest.raises(ChildProcessError) as stop:
        collect(envs.args, envs.ask, run)
    assert str(stop.value) == f"training environment 0, 1 of Scripted-v0 (seed 1): {reason}"
    assert [thread.is_alive() for thread in threads.started[before:]] == [False, False]
    spowl.save_checkpoint(tmp_path, run)
    resumed = begin(envs := scripted_envs(*lives(), **flags), tmp_path)
    assert same(resumed, run) and run.step == 30 and int(run.actor.step) == 1
    assert same(collected(envs, resumed, 3), through)


def test_an_episodes_seed():
    """Of NumPy's SeedSequence, whose numbers do not change: with others no published evaluation could be repeated."""
    assert spowl.episode_seed(1, 1, 0, 0) == 1189033389 and spowl.episode_seed(3, 1, 4, 2) == 2247877960


def test_how_long_an_answer_may_take(threads, monkeypatch):
    """--env-timeout seconds for an agent step; for all else no less than what the simulator takes where many import it
    at once. It is waited in 60 parts, of which a stop of all processes (Ctrl-Z) uses up one."""
    pipe = mock.Mock(**{"recv.return_value": (np.zeros(1), np.zeros(1))})
    context = types.SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=mock.Mock())
    monkeypatch.setattr(spowl, "multiprocessing", types.SimpleNamespace(get_context=lambda method: context))
    for timeout, others in ((6.0, 300.0), (600.0, 600.0)):
        pipe.poll = mock.Mock(return_value=True)
        ask, *_ = spowl.start_envs(Args(env_id="Scripted-v0", env_timeout=timeout), 0, 1)
        for command in ("step", "reset", "draw"):
            ask(command)
        assert [60 * call.args[0] for call in pipe.poll.call_args_list] == [others, timeout, others, others]
    pipe.poll = mock.Mock(side_effect=59 * [False] + [True] + 60 * [False])
    ask("step")
    with pytest.raises(ChildProcessError, match="no answer for 600 seconds$"):
        ask("step")


def test_an_environment_that_cannot_be_made_ends_all_processes(scripted_envs, threads):
    """One line."""
    broken = Scripted()
    broken.observation_space = types.SimpleNamespace(shape=(64, 64, 3))
    with pytest.raises(ChildProcessError, match="^training environment 2, 3 of Scripted-v0 .*: ValueError: its obs.*$"):
        scripted_envs(Scripted(), Scripted(), broken, Scripted())
    assert [thread.is_alive() for thread in threads.started] == [False, False]


@pytest.mark.parametrize("why, hint", [
    ("no EGL display", True), ("libOSMesa.so", True), ("no picture of a single angle", False)])
def test_a_process_that_cannot_draw_fails_at_its_start(scripted_envs, monkeypatch, why, hint):
    """Not at the first evaluation, hours later; and the line says what to install where that may be the reason."""
    monkeypatch.setattr(Scripted, "render", lambda env: exec("raise RuntimeError(why)", {"why": why}))
    with pytest.raises(ChildProcessError) as stop:
        scripted_envs(Scripted(), stream=1, drawn=True)
    said = f"evaluation environment 0 of Scripted-v0 (seed 1): RuntimeError: {why} (<string>, line 1)"
    needed = "; drawing needs EGL or OSMesa (MUJOCO_GL=osmesa): apt-get install libegl1 libgl1-mesa-dri"
    assert str(stop.value) == said + needed * hint
    scripted_envs(Scripted(), stream=1)


# ----------------------------------------------------------------------------------------------------------------------
# Going on
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, noise, cut", [(40, 0.0, False), (7, 0.0, False), (6, 0.0, True), (40, 3e-6, True)])
def test_unfinished_episodes_are_played_again_on_resume_or_cut(scripted_envs, tmp_path, capfd, rows, noise, cut):
    """METHOD §2: where the actions that the ring has lead to the saved observations, all goes on as if nothing had
    been. Where they do not (the ring has lost some, or the simulator is another), all episodes end by truncation, new
    ones begin, and that is said."""
    envs = scripted_envs(Scripted(1000), Scripted(12), buffer_size=2 * rows)
    saved = collected(envs, begin(envs), 7)._replace(wall_time=12.0)
    assert saved.obs.tolist() == [[0, 0, 35], [1, 2, 5]]
    spowl.save_checkpoint(tmp_path, saved)
    actions = np.asarray(saved.buffer.rows.action)[..., 0]
    run = collected(envs, saved._replace(buffer=jax.tree.map(jnp.copy, saved.buffer)), 6)
    assert capfd.readouterr().err == ""

    lives = Scripted(1000, noise=noise), Scripted(12)
    resumed = begin(envs := scripted_envs(*lives, buffer_size=2 * rows), tmp_path)
    assert ("does not repeat" in capfd.readouterr().err) == cut
    if not cut:
        assert np.allclose(lives[0].actions, np.repeat(actions[:7, 0], 5)[:, None], atol=1e-6)
        assert np.allclose(lives[1].actions, np.repeat(actions[6, 1], 5)[:, None], atol=1e-6)
        assert same(resumed, saved) and same(collected(envs, resumed, 6), run)
        return
    newest = int(resumed.buffer.head) - 1
    assert np.asarray(resumed.buffer.rows.done)[newest].tolist() == [1, 1]
    assert not np.asarray(resumed.buffer.rows.terminated).any()
    assert resumed.episodes.tolist() == [1, 3] and not resumed.so_far.any()
    assert np.allclose(resumed.obs, [[0, 1, 0], [1, 3, 0]], atol=1e-5)
    changed = dict.fromkeys(("buffer", "episodes", "so_far", "obs"))
    assert same(resumed._replace(**changed), saved._replace(**changed))
    resumed = collected(envs, resumed, 1)
    assert np.allclose(np.asarray(resumed.buffer.rows.obs)[newest + 1], [[0, 1, 0], [1, 3, 0]], atol=1e-5)


def test_a_resumed_run_leaves_the_same_episodes_out(scripted_envs, tmp_path, capfd):
    """Those that cannot begin."""
    life = lambda: Scripted(12, fails_at_reset=[0, 2])
    saved = collected(envs := scripted_envs(life()), begin(envs), 4)
    assert saved.obs.tolist() == [[0, 3, 5]] and saved.episodes.tolist() == [3]
    spowl.save_checkpoint(tmp_path, saved)
    run = collected(envs, saved, 4)
    resumed = begin(envs := scripted_envs(life()), tmp_path)
    assert same(collected(envs, resumed, 4), run) and "does not repeat" not in capfd.readouterr().err


def test_unfinished_episodes_begin_after_their_last_end_in_the_ring(toy_agent, monkeypatch):
    """At every position of its head, before and after it is full, and right after a cut; with all that it holds where
    it knows of no end."""
    args = small_args(num_envs=3, buffer_size=21, resume="run")  # seven rows
    rng, buffer, taken, asked = np.random.default_rng(0), spowl.init_buffer(args, 2, 2), [[], [], []], []
    counters = dict(zip(spowl.Run._fields[3:], (0, 0, 0, 0.0, [4, 5, 6], [[0] * 3] * 3, [[0] * 2] * 3, [], 0.0)))
    monkeypatch.setattr(spowl, "load_checkpoint", lambda run_dir, shapes, names: (
        {"agent": None, "actor": None, "buffer": buffer}, counters))
    ask = lambda command, values: asked.append((command, values)) or (np.zeros((3, 2), np.float32), np.array([4, 5, 6]))
    for step in range(30):
        spowl.begin(args, ask, (2, 2))
        ((command, values),) = asked
        assert command == "reset" and [episode for episode, _ in values] == [4, 5, 6]
        assert [len(found) for _, found in values] == [len(each) for each in taken]
        assert all(np.array_equal(found, np.reshape(each, (-1, 2))) for (_, found), each in zip(values, taken))
        asked.clear()
        action, done = rng.normal(size=(3, 2)).astype(np.float32), np.float32(rng.random(3) < [0.0, 0.2, 0.5])
        flat, wide = np.zeros(3, np.float32), np.zeros((3, 2), np.float32)
        buffer = spowl.add(buffer, spowl.Transition(wide, action, flat, flat, wide, flat, done))
        taken = [[] if end else (each + [new])[-7:] for each, new, end in zip(taken, action, done)]
        if step in (3, 20):
            buffer, taken = spowl.cut_episodes(buffer, np.ones(3, bool)), [[], [], []]


def test_updates_come_in_blocks():
    """At a cycle's end all that are due, as exact fractions say, in blocks of at most 100. None crosses a multiple of a
    cycle's updates, and between two multiples their sizes differ by one at most: each size is compiled. None before
    the random start is over."""
    cases = itertools.product((1, 2, 7), (1, 5), (1, 10, 143), ("0.1", "0.7", "1", "1.1", "3"), (0, 105, 5005, 8000))
    checked = 0
    for num_envs, repeat, multiple, share, random_steps in cases:
        block, per_cycle = num_envs * repeat, Fraction(share) * num_envs * multiple
        args = small_args(num_envs=num_envs, action_repeat=repeat, train_every=block * multiple, horizon=1,
                          updates_per_step=float(share), learning_starts=max(random_steps, block))
        if per_cycle.denominator > 1:
            assert not all(holds for holds, _ in spowl.rules(args))
            continue
        done = step = completed = 0
        for cycle in range(4):
            step += -(-(spowl.cycle_end(args, completed) - step) // block) * block
            sizes = {}
            while count := spowl.next_updates(args, step, done):
                assert 0 < count <= 100 and (done + count - 1) // per_cycle == done // per_cycle
                sizes.setdefault(done // per_cycle, []).append(count)
                done, checked = done + count, checked + 1
            assert done == math.floor(Fraction(share) * (step // repeat))
            assert all(max(each) - min(each) <= 1 for each in sizes.values())
            completed = step
        assert spowl.next_updates(args, args.learning_starts - 1, 0) == 0
    assert checked > 1000


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def played(monkeypatch):
    """played(envs, stop_after) -> what `evaluate` gives, and (obs, is_first, explore) of every call of `act`, after
    `stop_after` of which it is told to stop."""
    calls, stopping, act = [], [], spowl.act

    def play(envs, stop_after=None):
        def watched(args, agent, actor, *how):
            calls.append((how[0].copy(), *how[1:]))
            stopping.extend([signal.SIGTERM] * (len(calls) == stop_after))
            return act(args, agent, actor, *how)

        calls.clear(), stopping.clear()
        monkeypatch.setattr(spowl, "act", watched)
        agent = spowl.init_agent(envs.args, jax.random.key(0), 3, 1)
        return *spowl.evaluate(envs.args, agent, envs.ask, stopping), list(calls)

    return play


def test_evaluation_plays_whole_episodes(scripted_envs, played):
    """METHOD §2, §8: five on two environments, in three batches; in each an environment's first episode counts. The
    actor explores nothing."""
    envs = scripted_envs(Scripted(22), Scripted(7, "termination"), stream=1, eval_episodes=5)
    episodes, frames, calls = played(envs)
    assert frames == []
    assert [episode["environment"] for episode in episodes] == [0, 1, 2, 3, 4]
    lengths = [22, 7, 22, 7, 22]
    assert [episode["length"] for episode in episodes] == [episode["return"] for episode in episodes] == lengths
    assert [episode["cost"] for episode in episodes] == [0.25 * length for length in lengths]
    assert [episode["balance"] for episode in episodes] == [2 / 5, 1 / 2, 2 / 5, 1 / 2, 2 / 5]
    for number, (episode, length) in enumerate(zip(episodes, lengths)):
        rows, steps = episode["played"], list(range(0, length, 5))
        assert rows.obs.tolist() == [[number % 2, number // 2 * 2, step] for step in steps]
        assert rows.next_obs[:, 2].tolist() == steps[1:] + [length]
        assert rows.done.tolist() == [0] * (len(steps) - 1) + [1]
        assert rows.terminated.any() == (length == 7) and rows.action.shape == (len(steps), 1)
    assert len(calls) == 15 and not any(explore for *_, explore in calls)
    assert [is_first.tolist() for _, is_first, _ in calls] == 3 * ([[True] * 2] + 4 * [[False] * 2])
    assert calls[4][0].tolist() == [[0, 0, 20], [1, 2, 0]]
    assert len({float(episode["played"].action[0, 0]) for episode in episodes}) == 5  # keys of their own in each batch
    assert same(played(envs)[0], episodes)  # the same ones every time
    envs.args = dataclasses.replace(envs.args, seed=2)
    assert played(envs)[0][0]["played"].action[0] != episodes[0]["played"].action[0]


def test_evaluation_of_fewer_episodes_than_environments(scripted_envs, played):
    """The actor sees as many environments as in training, so that it is compiled once."""
    episodes, _, calls = played(scripted_envs(Scripted(12), Scripted(7), stream=1, eval_episodes=2, num_envs=4))
    assert [(episode["environment"], episode["length"]) for episode in episodes] == [(0, 12), (1, 7)]
    assert all(obs.shape == (4, 3) and not obs[2:].any() for obs, *_ in calls)
    assert [is_first.tolist() for _, is_first, _ in calls] == [[True] * 4, [False] * 4, [False] * 4]


def test_evaluation_ends_when_it_is_told_to(scripted_envs, played):
    """Between two agent steps, though an episode was complete."""
    envs = scripted_envs(Scripted(22), stream=1, eval_episodes=5, capture_video=True, drawn=True)
    episodes, frames, calls = played(envs, stop_after=7)
    assert (episodes, frames) == ([], []) and len(calls) == 7


@pytest.mark.parametrize("agent_steps, ends", [(10, True), (11, False)])
def test_an_evaluation_episode_may_take_100_000_steps(toy_agent, agent_steps, ends):
    """One that goes on for longer never ends: the line says what to do."""
    args, count = small_args(env_id="Endless-v0", num_envs=1, eval_episodes=1, action_repeat=10_000), itertools.count(1)
    obs, zero = np.zeros((1, 3), np.float32), np.zeros(1, np.float32)

    def ask(command, values):
        if command == "reset":
            return obs, np.zeros(1, int)
        done = np.float32([next(count) == agent_steps])
        return obs, np.zeros(1, int), spowl.Transition(obs, values, zero, zero, obs, zero, done), np.array([10_000])

    agent = spowl.init_agent(args, jax.random.key(0), 3, 1)
    if ends:
        assert spowl.evaluate(args, agent, ask)[0][0]["length"] == 100_000
        return
    with pytest.raises(ChildProcessError, match="^an episode of Endless-v0 does not end: .*max_episode_steps"):
        spowl.evaluate(args, agent, ask)


@pytest.mark.parametrize("life", [Scripted(22, fails_after=7), Scripted(22, cannot_draw_at=[10])])
def test_an_evaluation_whose_process_fails_says_so(scripted_envs, played, life):
    """In a step or where it draws."""
    envs = scripted_envs(life, Scripted(12), stream=1, drawn=True, capture_video=True, eval_episodes=2)
    with pytest.raises(ChildProcessError, match="^evaluation environment 0 of Scripted-v0 .*: RuntimeError: "):
        played(envs)


def test_the_first_episode_is_drawn(scripted_envs, played):
    """After every agent step but the last, with its return and cost so far."""
    envs = scripted_envs(Scripted(22), Scripted(27), stream=1, drawn=True, capture_video=True, eval_episodes=3)
    episodes, frames, _ = played(envs)
    assert len(episodes) == 3
    assert [(picture[0, 0, 0], total, cost) for picture, total, cost in frames] == [
        (5, 5.0, 1.25), (10, 10.0, 2.5), (15, 15.0, 3.75), (20, 20.0, 5.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Real processes
# ----------------------------------------------------------------------------------------------------------------------
ORPHANS = """import os, time
from test_envs import Scripted, np, simulator, spowl

class Endless(Scripted):
    def step(self, action):
        os.write(1, b"%d\\n" % os.getpid())  # in one piece: print may be cut in two where output is unbuffered
        time.sleep(100)

spowl.import_safety_gymnasium = lambda: simulator(lambda name: Endless())
os.sched_getaffinity = lambda pid: {0, 1}
ask, *_ = spowl.start_envs(spowl.Args(env_id="Scripted-v0"), 0, 2)
ask("reset", [(0, [])] * 2)
ask("step", np.zeros((2, 1)))
"""


def runs(pid):
    """Whether a process computes or waits."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_process_dies_with_its_parent_whatever_it_does():
    """Here each is in the middle of a simulator step that takes for ever, and the parent is killed. A signal to all,
    as Ctrl-C sends it, they leave to their parent."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=Path(__file__).parent, stdout=subprocess.PIPE,
                              text=True)
    pids = []
    try:
        pids += [int(parent.stdout.readline()) for _ in range(2)]
        assert len(set(pids)) == 2 and all(map(runs, pids))
        for pid in pids:
            ignored = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
            assert all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10.0
        while alive := [pid for pid in pids if runs(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
        for pid in filter(runs, pids):
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()


# ----------------------------------------------------------------------------------------------------------------------
# Safety-Gymnasium itself
# ----------------------------------------------------------------------------------------------------------------------
def start(task="SafetyPointGoal1-v0", num_envs=1, **flags):
    """ask, the sizes and the processes of that many environments, started by spawn: JAX, in use here, has threads."""
    before = set(multiprocessing.active_children())
    ask, *sizes = spowl.start_envs(Args(env_id=task, **flags), 0, num_envs, start_method="spawn")
    return ask, sizes, sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)


@pytest.fixture(scope="module")
def point_envs():
    """Three environments of PointGoal1 and their processes: the test that kills one comes last."""
    ask, sizes, processes = start(num_envs=3)
    assert sizes == [60, 2]
    yield ask, processes
    ask("close")
    assert processes and all(process.exitcode is not None for process in processes)


def test_real_sizes(point_envs):
    ask, _ = point_envs
    obs, _ = ask("reset", [(0, [])] * 3)
    new_obs, episodes, row, steps = ask("step", np.ones((3, 2), np.float32))
    assert obs.shape == new_obs.shape == row.obs.shape == row.next_obs.shape == (3, 60) and row.action.shape == (3, 2)
    assert all(field.shape == (3,) for field in (row.reward, row.cost, row.terminated, row.done))
    assert steps.tolist() == [5, 5, 5] and episodes.tolist() == [0, 0, 0]
    assert np.isfinite(new_obs).all() and not np.array_equal(new_obs, obs) and np.array_equal(row.obs, obs)


def test_real_episodes_repeat_with_their_seed(point_envs):
    """The same episode again to the last bit; other environments and other episodes begin elsewhere."""
    ask, _ = point_envs

    def first_steps(episode):
        ask("reset", [(episode, [])] * 3)
        actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, 2)).astype(np.float32)
        return np.stack([np.concatenate([obs, row.reward[:, None], row.cost[:, None]], -1)
                         for obs, _, row, _ in map(partial(ask, "step"), actions)])

    once, other, again = first_steps(0), first_steps(1), first_steps(0)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert not np.array_equal(once[:, 0], once[:, 1])


def test_a_real_episode_is_1000_steps_and_truncated(point_envs):
    rows = [row for _, _, row, _ in agent_steps(point_envs[0], 3, 201, action_dim=2)]
    done = np.array([row.done for row in rows])
    assert done[199].tolist() == [1, 1, 1] and done.sum() == 3
    assert not any(row.terminated.any() for row in rows)
    assert all(row.cost.max() <= 5.0 for row in rows)


def test_a_killed_process_ends_the_others(point_envs):
    ask, processes = point_envs
    ask("reset", [(0, [])] * 3)
    processes[-1].kill()
    last = ", ".join(map(str, np.array_split(range(3), len(processes))[-1]))
    with pytest.raises(ChildProcessError) as failure:
        ask("step", np.zeros((3, 2), np.float32))
    assert str(failure.value) == (f"training environment {last} of SafetyPointGoal1-v0 (seed 1): its process ended "
                                  "with exit code -9")
    assert all(process.exitcode == -9 for process in processes)


@pytest.mark.parametrize("task", [
    *(pytest.param(f"Safety{robot}Goal1-v0", marks=pytest.mark.long) for robot in ("Point", "Car")),
    "SafetyAntGoal1-v0"])
def test_an_episode_is_replayed_to_the_last_bit(task, monkeypatch):
    """METHOD §2: from its seed and its actions, in a process that has another past, or none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    (ask, (_, action_dim), _), rng = start(task, num_envs=2), np.random.default_rng(0)
    ask("reset", [(0, []), (3, [])])
    actions = rng.uniform(-0.3, 0.3, (12, 2, action_dim)).astype(np.float32)
    steps = [ask("step", action) for action in actions]
    assert not any(row.done[0] for _, _, row, _ in steps) and not any(row.done[1] for _, _, row, _ in steps[:7])
    expected = np.stack([steps[11][0][0], steps[6][0][1]]), np.array([0, 3])
    taken = [(0, actions[:, 0]), (3, actions[:7, 1])]
    assert same(ask("reset", taken), expected)
    ask("close")
    ask, *_ = start(task, num_envs=2)
    assert same(ask("reset", taken), expected)
    again = ask("step", actions[7])
    ask("close")
    assert same(*(jax.tree.map(lambda x: x[1], answer) for answer in (again, steps[7])))


@pytest.mark.parametrize("task, near", [
    ("SafetyPointGoal1", "SafetyPointGoal1-v0"), ("SafetyCarGoal1-v1", "SafetyCarGoal1-v0"),
    ("safetyantgoal1-v0", "SafetyAntGoal1-v0"), ("SafetyDogoGoal1-v0", "SafetyDoggoGoal1-v0"),
    ("zzz", "SafetyPointGoal1-v0")])
def test_an_unknown_task_names_the_nearest(task, near):
    with pytest.raises(SystemExit) as stop:
        spowl.start_envs(Args(env_id=task), 0, 1)
    message = str(stop.value)
    assert message.startswith(f"--env-id {task} is not a task of Safety-Gymnasium; did you mean ")
    assert near in message and "\n" not in message and "Vision" not in message


def test_the_tasks_of_the_paper_are_known():
    """METHOD §2: the seven tasks of Table 1."""
    tasks = ("PointGoal1", "PointGoal2", "PointPush1", "PointButton1", "CarGoal1", "DoggoGoal1", "AntGoal1")
    assert {f"Safety{task}-v0" for task in tasks} <= set(
        spowl.import_safety_gymnasium().utils.registration.safe_registry)


@pytest.mark.parametrize("costs, told", [
    ((0.0, 5.0), 0), ((-0.1, 1.0), 1), ((0.0, 5.1), 1), ((1e6, -1.0), 1)])
def test_unusual_costs_are_told_once(monkeypatch, capfd, costs, told):
    """Below 0, or above 1 a simulator step, which is also what several obstacles at once cost here."""
    spowl.tell.cache_clear()
    args, zeros = small_args(num_envs=2, action_repeat=5, learning_starts=10_000), np.zeros((2, 3), np.float32)
    row = spowl.Transition(zeros, zeros[:, :1], zeros[:, 0], np.float32(costs), zeros, zeros[:, 0], zeros[:, 0])
    run = run_of(spowl, args, None, None, spowl.init_buffer(args, 3, 1), 0)
    for _ in range(2):
        run, _ = collect(args, lambda *_: (zeros, np.zeros(2, int), row, np.full(2, 5)), run)
    assert capfd.readouterr().err.count("costs below 0 or above 1 a simulator step: ") == told
    assert run.cost == pytest.approx(2 * sum(costs))


def test_an_environment_may_reuse_its_observation():
    """The last observation of an episode is not overwritten by the next one's first."""
    playing = spowl.play(small_args(num_envs=1, action_repeat=1), Reusing(2), 0, 0, 0)
    next(playing)
    for before, after, first in ((0, 1, 1), (1, 2, 0), (0, 1, 1)):
        obs, _, row, _ = playing.send(np.zeros(1, np.float32))
        assert (row.obs[2], row.next_obs[2], obs[2]) == (before, after, first)
