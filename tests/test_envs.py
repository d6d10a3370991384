"""The simulator side (METHOD §2): what the environments' processes answer, on scripted environments and real ones; what
a run does when one fails."""
import dataclasses
import io
import math
import multiprocessing
import os
import signal
import socket
import threading
import types
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_args
from tqdm import tqdm

import spowl_continuous as spowl
from spowl_continuous import Args, EnvFailure, collect, env_worker, episode_seed, reset_envs, step_envs

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

    It raises after `fails_after` steps of all its episodes together, or in the reset of an episode."""

    def __init__(self, length=7, ends_by="truncation", low=(-1.0,), high=(1.0,), fails_after=None, fails_at_reset=False,
                 noise=0.0, cannot_draw_at=()):
        self.length, self.ends_by, self.fails_after, self.fails_at_reset = length, ends_by, fails_after, fails_at_reset
        self.noise, self.cannot_draw_at, self.options = noise, cannot_draw_at, None
        self.observation_space, self.action_space = box([-9.0] * 3, [9.0] * 3), box(low, high)
        self.place, self.steps, self.seeds, self.actions = (-1, -1), 0, [], []

    def observe(self):
        return np.array([*self.place, self.steps + self.noise], np.float64)

    def reset(self, seed=None):
        if self.fails_at_reset and seed:
            raise RuntimeError("the floor gave way")
        self.place, self.steps, self.seeds = PLACES.get(seed, (-1, -1)), 0, self.seeds + [seed]
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


@pytest.fixture
def worker(monkeypatch):
    """worker(envs, commands) runs env_worker on those environments -> its answers, the first before any command.

    The commands wait in the pipe beforehand, so no second process or thread is needed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(envs, commands, stream=0, indices=None, drawn=False, **flags):
        waiting = list(envs)

        def make(name, **options):
            waiting[0].options = options
            return waiting.pop(0)

        monkeypatch.setattr(spowl, "import_safety_gymnasium", lambda: types.SimpleNamespace(make=make))
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
        return answers

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


BEGIN = "reset", [(0, [])]


def same(tree, other):
    """Whether two trees of arrays and numbers are equal to the last bit."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


def step_with(*actions):
    """The command for one agent step, one action per environment."""
    return "step", np.array(actions, np.float32)


def test_sizes_come_first_and_reset_gives_float32(worker):
    sizes, obs = worker([Scripted(low=(-1.0, -1.0), high=(1.0, 1.0))], [BEGIN])
    assert sizes == (3, 2)
    assert obs.dtype == np.float32 and obs.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("action, expected", [
    ((0.0, 0.0), (5.0, 0.0)), ((1.0, 1.0), (20.0, 0.785)), ((-1.0, -1.0), (-10.0, -0.785)),
    ((0.5, -0.5), (12.5, -0.3925)), ((3.0, -1.5), (20.0, -0.785))])
def test_actions_are_rescaled_to_the_bounds_and_clipped(worker, action, expected):
    """What is stored is the action as it was chosen."""
    env = Scripted(low=(-10.0, -0.785), high=(20.0, 0.785))
    _, row, _ = worker([env], [BEGIN, step_with(action)], action_repeat=1)[2]
    assert np.allclose(env.actions, [expected]) and np.allclose(row.action, [action])


def test_action_repeat_sums_rewards_and_costs(worker):
    env = Scripted(length=100)
    obs, row, stats = worker([env], [BEGIN, step_with([0.3])])[2]
    assert row.obs.tolist() == [[0, 0, 0]] and obs.tolist() == row.next_obs.tolist() == [[0, 0, 5]]
    assert [x.tolist() for x in row[2:4]] == [[5.0], [1.25]] and [x.tolist() for x in row[5:]] == [[0.0], [0.0]]
    assert all(x.dtype == np.float32 for x in (obs, *row)) and stats.tolist() == [[5.0, 5.0, 1.25, 5.0]]
    assert len(env.actions) == 5 and np.ptp(env.actions) == 0.0


@pytest.mark.parametrize("ends_by", ["termination", "truncation"])
def test_action_repeat_stops_at_the_end_and_the_next_episode_begins(worker, ends_by):
    """METHOD §2: stop early at the episode's end. The answer holds its last observation and the next one's first; its
    return, cost and length are those of the whole episode, and those of the next one begin at zero."""
    answers = worker([Scripted(length=7, ends_by=ends_by)], [BEGIN] + 3 * [step_with([0.0])])
    obs, row, stats = answers[3]
    assert row.next_obs.tolist() == [[0, 0, 7]] and obs.tolist() == [[0, 1, 0]]
    assert (row.reward, row.cost, row.done, row.terminated) == (2.0, 0.5, 1.0, ends_by == "termination")
    assert stats.tolist() == [[2.0, 7.0, 1.75, 7.0]]
    assert answers[4][1].obs.tolist() == [[0, 1, 0]] and answers[4][0].tolist() == [[0, 1, 5]]
    assert answers[4][2].tolist() == [[5.0, 5.0, 1.25, 5.0]]


def test_an_end_on_the_last_repeat_is_seen_once(worker):
    answers = worker([Scripted(length=10)], [BEGIN] + 3 * [step_with([0.0])])
    assert [answer[1].done.tolist() for answer in answers[2:]] == [[0.0], [1.0], [0.0]]
    assert [answer[2][0, 0] for answer in answers[2:]] == [5, 5, 5]


def test_every_episode_has_the_seed_of_its_counters(worker):
    """Episodes are numbered from the one that `reset` names; each one that follows by itself counts one up."""
    env, name = Scripted(length=5), lambda episode: ("reset", [(episode, [])])
    worker([env], [name(2)] + 2 * [step_with([0.0])] + [name(9), step_with([0.0])], seed=3, stream=1, indices=[4])
    assert env.seeds == [0] + [episode_seed(3, 1, 4, episode) for episode in (2, 3, 4, 9, 10)]


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
    _, obs, first, second = worker(envs, [("reset", [(3, []), (0, []), (8, [])]), step_with([0.5], [0.5], [-1.0]),
                                          step_with([0.0], [-1.0], [1.0])], indices=[4, 5, 6])
    assert obs.tolist() == [[4, 3, 0], [5, 0, 0], [6, 8, 0]]
    assert first[0].tolist() == [[4, 3, 5], [5, 0, 5], [6, 9, 0]]
    assert second[1].next_obs.tolist() == [[4, 3, 7], [5, 0, 10], [6, 9, 5]]
    assert second[1].done.tolist() == [1, 0, 1] and second[1].terminated.tolist() == [0, 0, 1]
    assert second[2].tolist() == [[2, 7, 1.75, 7], [5, 10, 2.5, 10], [5, 5, 1.25, 5]]
    assert [np.unique(env.actions).tolist() for env in envs] == [[0.0, 0.5], [0.0, 3.0], [-1.0, 1.0]]


def test_a_reset_may_take_actions(worker):
    """They bring the environment, and the sums of its episode, to where the same steps did."""
    actions = [np.float32([x]) for x in (0.1, -0.2, 0.3)]
    stepped, again = Scripted(1000), Scripted(1000)
    expected = worker([stepped], [BEGIN] + [step_with(action) for action in actions + [[0.9]]])
    _, obs, after = worker([again], [("reset", [(0, actions)]), step_with([0.9])])
    assert np.array_equal(obs, expected[-2][0]) and same(after, expected[-1])
    assert after[2].tolist() == [[5, 20, 5, 20]] and np.array_equal(again.actions, stepped.actions)


def test_the_process_transforms_what_the_networks_see(worker):
    """--obs-transform log: a lidar's 1 becomes -log(0.02), an unbounded 9 log(10), anything else stays."""
    env = Scripted(length=5)
    env.observation_space = box([0.0, -np.inf, -1.0], [1.0, np.inf, 1.0])
    env.observe = lambda: np.array([1.0, 9.0, float(env.steps)])
    obs, (new_obs, row, _) = worker([env], [BEGIN, step_with([0.0])], obs_transform="log")[1:]
    expected = [-math.log(0.02), math.log(10.0)]
    assert np.allclose(obs, [[*expected, 0.0]], rtol=1e-6) and np.array_equal(obs, row.obs)
    assert np.allclose(row.next_obs, [[*expected, 5.0]], rtol=1e-6) and np.array_equal(new_obs, obs)


def test_a_failing_environment_answers_with_one_line(worker):
    answers = worker([Scripted(fails_after=2)], [BEGIN, step_with([0.0])])
    assert answers[2:] == ["RuntimeError: the floor gave way"]


@pytest.mark.parametrize("shape", [(64, 64, 3), None])
def test_observations_that_are_not_flat_are_refused(worker, shape):
    """Pictures and dictionaries (whose space has no shape) alike, in words that name the observation."""
    env = Scripted()
    env.observation_space = types.SimpleNamespace(shape=shape)
    (answer,) = worker([env], [])
    assert "observations are not a flat vector" in answer


def test_only_the_first_environment_draws(worker, monkeypatch):
    """A picture of what it is in, None where there is none; without a screen, unless the variable names another way."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    envs = [Scripted(1000, cannot_draw_at=[10]), Scripted(1000)]
    commands = [("reset", [(0, []), (0, [])])] + 3 * [step_with([0.0], [0.0]), ("draw", [None, None])]
    pictures = worker(envs, commands, drawn=True)[3::2]
    assert [None if picture is None else picture[0, 0, 0] for picture in pictures] == [5, None, 15]
    assert envs[0].options["render_mode"] == "rgb_array" and envs[1].options == {}
    assert os.environ["MUJOCO_GL"] == "egl"
    other = Scripted()
    worker([other], [], indices=[1], drawn=True)
    assert other.options == {}


# ----------------------------------------------------------------------------------------------------------------------
# Several of them, in threads
# ----------------------------------------------------------------------------------------------------------------------
class Thread(threading.Thread):
    """Looks to its parent like a process, and ends when its pipe is closed."""

    def __init__(self, target, daemon, args):
        pipe = Connection(os.dup(args[0].fileno()))  # as a fork or spawn does: the parent closes its copy
        super().__init__(target=target, daemon=daemon, args=(pipe, *args[1:]))
        self.pipe, self.stream, self.waiting, self.exitcode = pipe, args[2], list(args[3]), None

    def run(self):
        try:
            super().run()
        except SystemExit as death:
            self.exitcode = death.code
        finally:
            self.pipe.close()

    def kill(self):
        pass

    def join(self, timeout=None):
        pass


class Hanging(Scripted):
    """Gives no answer when it should fail."""

    released = threading.Event()

    def fail(self):
        self.released.wait(10.0)
        raise RuntimeError("too late")


class Dying(Scripted):
    """Takes its process with it."""

    def fail(self):
        raise SystemExit(3)


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
def scripted_envs(monkeypatch, toy_agent):
    """scripted_envs(life, ...) -> Envs whose processes are threads of this one, started by start_envs. There is one
    `life` per environment: a list of what it is after each start, or the only one."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # only a main thread may call it
    Hanging.released.clear()
    opened, threads, lives_of = [], [], {}  # by stream

    def start(*lives, cores=2, stream=0, drawn=False, **flags):
        lives_of[stream] = [list(each) if isinstance(each, (list, tuple)) else [each] for each in lives]

        def make(name, **options):
            thread = threading.current_thread()
            env = lives_of[thread.stream][thread.waiting.pop(0)].pop(0)
            env.options = options
            return env

        def process(**arguments):
            threads.append(Thread(**arguments))
            return threads[-1]

        context = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
        monkeypatch.setattr(spowl, "multiprocessing", types.SimpleNamespace(
            get_context=lambda method: start.methods.append(method) or context))
        monkeypatch.setattr(spowl, "import_safety_gymnasium", lambda: types.SimpleNamespace(make=make))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        sizes = {"num_envs": len(lives), "buffer_size": 20 * len(lives), "env_timeout": 30.0}
        args = small_args(**sizes | {"env_id": "Scripted-v0"} | flags)
        envs, obs_dim, action_dim = spowl.start_envs(args, stream, len(lives), drawn)
        assert (obs_dim, action_dim) == (3, 1)
        opened.append(envs)
        return envs

    start.methods = []
    yield start
    Hanging.released.set()
    for envs in opened:
        spowl.close_envs(envs)
    for thread in threads:
        threading.Thread.join(thread, 10.0)
        assert not thread.is_alive()


def play(envs, agent_steps, action_dim=1):
    """(obs, row, stats) of every one of that many agent steps with random actions."""
    num_envs = sum(map(len, envs.groups))
    reset_envs(envs, [0] * num_envs)
    actions = np.random.default_rng(0).uniform(-1, 1, (agent_steps, num_envs, action_dim)).astype(np.float32)
    return [step_envs(envs, action) for action in actions]


@pytest.mark.parametrize("num_envs, cores, groups", [
    (10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]), (2, 8, [[0], [1]]), (3, 1, [[0, 1, 2]])])
def test_there_are_as_many_processes_as_cores(scripted_envs, num_envs, cores, groups):
    """How environments are spread over them changes nothing."""
    envs = scripted_envs(*(Scripted(4 + index) for index in range(num_envs)), cores=cores)
    assert envs.groups == groups and len(envs.workers) == len(groups)
    for t, (obs, row, stats) in enumerate(play(envs, 12)):
        assert obs.shape == (num_envs, 3) and stats.shape == (num_envs, 4)
        assert obs[:, 0].tolist() == row.next_obs[:, 0].tolist() == list(range(num_envs))
        per_episode = np.ceil((4 + np.arange(num_envs)) / 5)  # agent steps
        assert obs[:, 1].tolist() == ((t + 1) // per_episode).tolist()


def test_simulators_get_the_numbers_that_are_stored(scripted_envs):
    """float32, whatever the caller's type: a resumed run takes the stored actions again."""
    life = Scripted(1000)
    envs = scripted_envs(life, action_repeat=1)
    reset_envs(envs, [0])
    stored = [step_envs(envs, np.array([[0.1]], kind))[1].action for kind in (np.float64, np.float32)]
    assert stored[0].dtype == np.float32 and same(*stored) and same(*life.actions)


def test_termination_and_truncation_reach_the_transition(scripted_envs):
    """METHOD §2: an episode ends by termination (bootstrap stops) or by truncation (bootstrap continues)."""
    steps = play(scripted_envs(Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(1000)), 3)
    done = np.array([row.done for _, row, _ in steps])
    terminated = np.array([row.terminated for _, row, _ in steps])
    assert done.T.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert terminated.T.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert np.array([stats[:, 0] for _, _, stats in steps]).T.tolist() == [[5, 2, 5], [5, 5, 2], [5, 5, 5]]
    assert all(field.dtype == np.float32 for field in steps[0][1])


def test_no_row_of_the_buffer_joins_two_episodes(scripted_envs):
    """METHOD §2, on numbered transitions: within a row the episode stays the same and its steps go on by the repeat;
    a row that follows an end begins at step 0 of the next episode."""
    lengths = (7, 12, 20)
    envs = scripted_envs(Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(20, "truncation"))
    buffer = spowl.init_buffer(envs.args, 3, 1)
    for _, row, _ in play(envs, 25):  # the ring holds 20: it wraps
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
# Failures while data is collected
# ----------------------------------------------------------------------------------------------------------------------
def begin(envs):
    """A run at its first moment. By default all its actions are random."""
    return spowl.begin(envs.args, envs, (3, 1))


@pytest.mark.parametrize("failing, reason", [
    (Scripted, "RuntimeError: the floor gave way"), (Hanging, "no answer for 0.5 seconds"),
    (Dying, "its process ended with exit code 3")])
def test_after_a_failure_all_environments_begin_anew(scripted_envs, capfd, failing, reason):
    """METHOD §2: in the episode after the one they were in. The failed step leaves no row and counts for nothing; the
    newest row ends all episodes, by truncation. One line says what happened where."""
    lives = [[Scripted(1000), Scripted(1000)], [failing(1000, fails_after=7), Scripted(1000)],
             [Scripted(1000), Scripted(1000)]]
    envs = scripted_envs(*lives, env_timeout=0.5)
    before, run = list(envs.workers), begin(envs)
    run, _ = collect(envs.args, envs, run)
    assert not np.asarray(run.buffer.rows.done).any() and run.progress.is_first.tolist() == [False] * 3
    counted = run.progress
    run, _ = collect(envs.args, envs, run)
    assert run.progress.obs.tolist() == [[0, 1, 0], [1, 1, 0], [2, 1, 0]]
    assert run.progress.episodes.tolist() == [1, 1, 1] and run.progress.is_first.tolist() == [True] * 3
    assert np.asarray(run.buffer.rows.done)[:2].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert not np.asarray(run.buffer.rows.terminated).any() and int(run.buffer.size) == 1
    for name in ("step", "completed", "simulated", "cost", "acts", "rows"):
        assert getattr(run.progress, name) == getattr(counted, name)
    assert len(envs.workers) == 2 and not any(worker in before for worker in envs.workers)
    run, _ = collect(envs.args, envs, run)
    assert np.asarray(run.buffer.rows.obs)[1].tolist() == [[0, 1, 0], [1, 1, 0], [2, 1, 0]]
    assert run.progress.obs.tolist() == [[0, 1, 5], [1, 1, 5], [2, 1, 5]] and run.progress.step == 2 * 3 * 5
    assert capfd.readouterr().err == (
        f"training environment 0, 1 of Scripted-v0 (seed 1): {reason}; all are started anew\n")
    assert envs.failures == [f"training environment 0, 1 of Scripted-v0 (seed 1): {reason}"]


def test_processes_start_by_fork_and_anew_by_spawn(scripted_envs):
    """By then JAX has threads, which a fork would copy in whatever state they are."""
    envs = scripted_envs([Scripted(fails_after=0), Scripted()])
    collect(envs.args, envs, begin(envs))
    assert scripted_envs.methods == ["fork", "spawn"]


def test_no_row_joins_two_episodes_where_processes_fail(scripted_envs, capfd):
    """METHOD §2 with failures in the middle of episodes, at their beginning, right after another, and during a reset:
    the row before a failure is an end by truncation; episodes and their sums are counted anew, in every environment."""
    lives = [[Scripted(22), Scripted(22, fails_after=0), Scripted(22), Scripted(22), Scripted(22)],
             [Scripted(1000, fails_after=12), *(Scripted(1000) for _ in range(4))],
             [Scripted(12), Scripted(12), Scripted(12, fails_at_reset=True), Scripted(12, fails_after=12),
              Scripted(12)]]
    envs = scripted_envs(*lives)
    run, firsts, failed = begin(envs), [], []
    for call in range(20):  # the third, fourth and eighth fail; the fourth while it starts anew once more
        firsts.append(run.progress.is_first.tolist())
        before = run.progress.step
        run, _ = collect(envs.args, envs, run)
        failed += [call + 1] if run.progress.step == before else []
    assert failed == [3, 4, 8] and len(envs.failures) == 4 and int(run.buffer.size) == 17
    assert [call + 1 for call, first in enumerate(firsts) if all(first)] == [1, 4, 5, 9]
    assert firsts[7] == [False, False, True] and firsts[5] == firsts[6] == [False] * 3

    rows = jax.tree.map(lambda x: np.asarray(x)[:17], run.buffer.rows)
    (env, episode, number), (_, next_episode, next_number) = (np.moveaxis(x, -1, 0) for x in (rows.obs, rows.next_obs))
    done = rows.done > 0
    assert (env == [0, 1, 2]).all() and (episode == next_episode).all()
    assert np.array_equal(number[1:], np.where(done[:-1], 0.0, next_number[:-1])) and not number[0].any()
    ends = [[1, 4, 9, 14], [1, 4], [1, 4, 7, 10, 13, 16]]
    assert [np.flatnonzero(each).tolist() for each in done.T] == ends and not rows.terminated.any()
    # the failures are after rows 1 (twice, with nothing between) and 4, where the third had just ended by itself
    assert episode[:, 0].tolist() == 2 * [0] + 3 * [2] + 5 * [3] + 5 * [4] + 2 * [5]
    assert episode[:, 1].tolist() == 2 * [0] + 3 * [2] + 12 * [3]
    assert episode[:, 2].tolist() == 2 * [0] + 3 * [2] + 3 * [4] + 3 * [5] + 3 * [6] + 3 * [7]

    progress = run.progress
    assert progress.episodes.tolist() == [5, 3, 8] and progress.step == 17 * 3 * 5
    assert progress.simulated == rows.reward.sum() == 4 * progress.cost
    ended = [("train", 15 * (row + 1), env, length) for row in range(17) for env, length in ((0, 22), (2, 12))
             if done[row, env] and next_number[row, env] == length]
    assert [(*row[:3], row[5]) for row in progress.rows] == ended and len(ended) == 7
    assert all(row[3] == row[5] and row[4] == 0.25 * row[5] for row in progress.rows)
    told = capfd.readouterr().err.splitlines()
    assert [line.split(" of ")[0].split("environment ")[1] for line in told] == ["0, 1", "0, 1", "2", "2"]
    assert all(line.endswith("; all are started anew") for line in told)


def test_a_failure_at_the_very_first_step(scripted_envs):
    """Where the ring is still empty there is no row to mark."""
    envs = scripted_envs([Scripted(1000, fails_after=0), Scripted(1000)])
    run, _ = collect(envs.args, envs, begin(envs))
    assert int(run.buffer.size) == 0 and run.progress.episodes.tolist() == [1]
    for _ in range(20):  # until the ring is full
        run, _ = collect(envs.args, envs, run)
    assert not np.asarray(run.buffer.rows.done).any() and run.progress.obs.tolist() == [[0, 1, 100]]


def test_a_failure_resets_the_mean_of_the_plan(scripted_envs):
    """METHOD §5: a plan starts from the last one's mean, in a new episode from zero. Nothing is lost of the sums that
    the actor keeps: the step that failed counts for them."""
    lives = [[Scripted(1000), Scripted(1000)], [Scripted(1000, fails_after=5), Scripted(1000)]]
    envs = scripted_envs(*lives, learning_starts=0)
    run, means = begin(envs), []
    for _ in range(4):  # the second fails
        run, _ = collect(envs.args, envs, run)
        means.append(run.actor.plan_mean[:, 0, 0].tolist())
    assert means == [[1, 1], [2, 2], [1, 1], [2, 2]]
    assert (run.progress.acts, int(run.actor.step), run.progress.step) == (4, 4, 30)
    assert run.actor.metrics["charts/balance"].tolist() == [2, 2]


@pytest.mark.parametrize("later", [{"fails_after": 0}, {"fails_at_reset": True}], ids=["when stepped", "when reset"])
@pytest.mark.parametrize("learning_starts", [5000, 0], ids=["random actions", "an agent's actions"])
def test_too_many_failures_are_the_end(scripted_envs, tmp_path, capfd, learning_starts, later):
    """An environment that always fails is not started for ever. The run comes back as it was at the last good step (or
    cut), in a state to be saved and gone on with."""
    lives = [Scripted(1000) for _ in range(11)], [Scripted(1000, fails_after=12)] + [
        Scripted(1000, **later) for _ in range(10)]
    envs = scripted_envs(*lives, learning_starts=learning_starts)
    bar = tqdm(total=100, file=io.StringIO())
    run, values, failure = spowl.cycle(envs.args, envs, begin(envs), bar, [])
    assert isinstance(failure, EnvFailure) and values == {}
    assert str(failure) == ("training environment 1 of Scripted-v0 (seed 1): RuntimeError: the floor gave way "
                            "(after 10 new starts)")
    assert len(envs.failures) == 10 == spowl.MAX_FAILURES
    cuts = 10 if "fails_after" in later else 0
    assert run.progress.step == 2 * 2 * 5 and run.progress.episodes.tolist() == [cuts, cuts]
    assert np.asarray(run.buffer.rows.done)[:3].tolist() == [[0, 0], 2 * [cuts > 0], [0, 0]]
    assert run.progress.acts == int(run.actor.step) == (0 if learning_starts else 2 + cuts + 1)

    spowl.save_checkpoint(tmp_path, run, 0.0)
    healthy = [Scripted(1000), Scripted(1000)]
    run = begin(scripted_envs(*healthy, learning_starts=learning_starts, resume=str(tmp_path)))
    steps = 0 if cuts else 10
    assert run.progress.obs.tolist() == [[0, cuts, steps], [1, cuts, steps]]
    assert run.progress.is_first.tolist() == 2 * [cuts > 0] and "does not repeat" not in capfd.readouterr().err
    assert [len(env.actions) for env in healthy] == [steps, steps]


def test_failures_are_counted_since_the_list_was_emptied(scripted_envs):
    envs = scripted_envs([Scripted(1000, fails_after=0) for _ in range(30)])
    run = begin(envs)
    for _ in range(spowl.MAX_FAILURES):
        run, _ = collect(envs.args, envs, run)
    envs.failures.clear()
    run, _ = collect(envs.args, envs, run)
    assert len(envs.failures) == 1 and run.progress.episodes.tolist() == [11]
    envs.failures[:] = ["one"] * spowl.MAX_FAILURES
    with pytest.raises(EnvFailure, match="the floor gave way"):
        collect(envs.args, envs, run)


def test_an_environment_that_cannot_be_made_ends_all_processes(scripted_envs):
    """One line; the fixture sees that none is left."""
    broken = Scripted()
    broken.observation_space = types.SimpleNamespace(shape=(64, 64, 3))
    with pytest.raises(EnvFailure) as stop:
        scripted_envs(Scripted(), Scripted(), broken, Scripted())
    assert str(stop.value) == ("training environment 2, 3 of Scripted-v0 (seed 1): ValueError: its observations are "
                               "not a flat vector")


def test_a_process_that_cannot_draw_fails_at_its_start(scripted_envs):
    """Not at the first evaluation, hours later; and the line says what to install."""
    with pytest.raises(EnvFailure) as stop:
        scripted_envs(Scripted(cannot_draw_at=[0]), stream=1, drawn=True)
    assert str(stop.value).startswith("evaluation environment 0 of Scripted-v0 (seed 1): RuntimeError: no picture; "
                                      "--capture-video needs EGL or OSMesa")
    assert "\n" not in str(stop.value)
    scripted_envs(Scripted(cannot_draw_at=[0]), stream=1)


# ----------------------------------------------------------------------------------------------------------------------
# Going on
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, noise, cut", [(40, 0.0, False), (7, 0.0, False), (6, 0.0, True), (40, 3e-6, True)])
def test_unfinished_episodes_are_played_again_on_resume_or_cut(scripted_envs, tmp_path, capfd, rows, noise, cut):
    """METHOD §2: where the actions that the ring has lead to the saved observations, all goes on as if nothing had
    been. Where they do not (the ring has lost some, or the simulator is another), all episodes end by truncation, new
    ones begin, and that is said."""
    envs = scripted_envs(Scripted(1000), Scripted(12), buffer_size=2 * rows)
    args = envs.args
    run = begin(envs)
    assert run.progress.is_first.all() and run.progress.obs.tolist() == [[0, 0, 0], [1, 0, 0]]
    for _ in range(7):
        run, _ = collect(args, envs, run)
    spowl.save_checkpoint(tmp_path, run, 12.0)
    saved = run.progress
    assert saved.obs.tolist() == [[0, 0, 35], [1, 2, 5]]
    actions = np.asarray(run.buffer.rows.action)[..., 0]
    for _ in range(6):
        run, _ = collect(args, envs, run)
    assert capfd.readouterr().err == ""

    lives = Scripted(1000, noise=noise), Scripted(12)
    envs = scripted_envs(*lives, buffer_size=2 * rows, resume=str(tmp_path))
    resumed = begin(envs)
    assert ("does not repeat" in capfd.readouterr().err) == cut
    assert resumed.progress.wall_time == 12.0 and resumed.progress.rows == saved.rows
    if not cut:
        assert np.allclose(lives[0].actions, np.repeat(actions[:7, 0], 5)[:, None], atol=1e-6)
        assert np.allclose(lives[1].actions, np.repeat(actions[6, 1], 5)[:, None], atol=1e-6)
        assert same(resumed.progress._replace(wall_time=0.0), saved)
        for _ in range(6):
            resumed, _ = collect(args, envs, resumed)
        assert same(resumed.progress._replace(wall_time=0.0), run.progress)
        assert same(resumed.buffer, run.buffer)
        return
    newest = int(resumed.buffer.head) - 1
    assert np.asarray(resumed.buffer.rows.done)[newest].tolist() == [1, 1]
    assert not np.asarray(resumed.buffer.rows.terminated).any()
    assert resumed.progress.episodes.tolist() == [1, 3] and resumed.progress.is_first.tolist() == [True, True]
    assert np.allclose(resumed.progress.obs, [[0, 1, 0], [1, 3, 0]], atol=1e-5)
    assert resumed.progress._replace(episodes=0, is_first=0, obs=0, wall_time=0) == saved._replace(
        episodes=0, is_first=0, obs=0, wall_time=0)
    resumed, _ = collect(args, envs, resumed)
    assert np.allclose(np.asarray(resumed.buffer.rows.obs)[newest + 1], [[0, 1, 0], [1, 3, 0]], atol=1e-5)


def test_the_ring_tells_the_actions_of_unfinished_episodes():
    """At every position of its head, before and after it is full, and right after a cut: those since the last end, or
    all that it holds."""
    args = small_args(num_envs=3, buffer_size=21)  # seven rows
    rng, buffer, taken = np.random.default_rng(0), spowl.init_buffer(args, 2, 2), [[], [], []]
    assert [x.shape for x in spowl.unfinished(buffer)] == [(0, 2)] * 3
    for step in range(30):
        action, done = rng.normal(size=(3, 2)).astype(np.float32), np.float32(rng.random(3) < [0.0, 0.2, 0.5])
        flat, wide = np.zeros(3, np.float32), np.zeros((3, 2), np.float32)
        buffer = spowl.add(buffer, spowl.Transition(wide, action, flat, flat, wide, flat, done))
        taken = [[] if end else (each + [new])[-7:] for each, new, end in zip(taken, action, done)]
        if step in (3, 20):
            buffer, taken = spowl.cut_episodes(buffer, np.ones(3, bool)), [[], [], []]
        found = spowl.unfinished(buffer)
        assert [len(x) for x in found] == [len(each) for each in taken]
        assert all(np.array_equal(x, np.reshape(each, (-1, 2))) for x, each in zip(found, taken))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def played(monkeypatch):
    """played(envs, num_episodes, ...) -> what `evaluate` gives, and (obs, is_first, explore) of every call of `act`."""
    calls, act = [], spowl.act

    def watched(args, agent, actor, *how):
        calls.append((how[0].copy(), *how[1:]))
        return act(args, agent, actor, *how)

    monkeypatch.setattr(spowl, "act", watched)

    def play(envs, num_episodes, num_envs=3, **options):
        calls.clear()
        args = dataclasses.replace(envs.args, num_envs=num_envs)
        agent = spowl.init_agent(args, jax.random.key(0), 3, 1)
        return *spowl.evaluate(args, agent, envs, num_episodes, **options), list(calls)

    return play


def test_evaluation_plays_whole_episodes(scripted_envs, played):
    """METHOD §2, §8: five on two environments, in three batches; in each an environment's first episode counts. The
    actor sees as many environments as in training, and explores nothing."""
    envs = scripted_envs(Scripted(22), Scripted(7, "termination"), stream=1)
    bar = tqdm(total=5, file=io.StringIO())
    episodes, frames, calls = played(envs, 5, bar=bar)
    assert frames == [] and bar.n == 5
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
    assert [is_first.tolist() for _, is_first, _ in calls] == 3 * ([[True] * 3] + 4 * [[False] * 3])
    assert all(obs.shape == (3, 3) and not obs[2].any() for obs, *_ in calls)
    assert calls[4][0][:2].tolist() == [[0, 0, 20], [1, 2, 0]]
    assert len({float(episode["played"].action[0, 0]) for episode in episodes}) == 5  # keys of their own in each batch


def test_evaluation_ends_when_it_is_told_to(scripted_envs, played):
    envs, stopping = scripted_envs(Scripted(22), stream=1), []
    bar = types.SimpleNamespace(update=lambda count: stopping.append(signal.SIGTERM))
    assert played(envs, 5, stopping=stopping, bar=bar)[:2] == ([], [])
    assert played(envs, 1, stopping=stopping)[:2] == ([], [])


@pytest.mark.parametrize("at", ["first batch", "second batch", "reset", "draw"])
def test_an_evaluation_is_played_again_where_a_process_fails(scripted_envs, played, at):
    """The same episodes and pictures come out as without the failure, none twice; earlier batches stay."""
    expected, frames, _ = played(scripted_envs(Scripted(22), Scripted(12), stream=1, drawn=True), 4)
    failing = {"first batch": Scripted(22, fails_after=7), "second batch": Scripted(22, fails_after=36),
               "reset": Scripted(22, fails_at_reset=True), "draw": Dying(22)}[at]
    if at == "draw":
        failing.render = lambda: failing.fail() if failing.steps == 10 else np.zeros((4, 4, 3))
    envs = scripted_envs([failing, Scripted(22)], [Scripted(12), Scripted(12)], stream=1, drawn=True)
    bar = tqdm(total=4, file=io.StringIO())
    episodes, pictures, calls = played(envs, 4, bar=bar)
    assert same(episodes, expected) and same(pictures, frames) and len(pictures) == 4
    assert len(envs.failures) == 1 and bar.n == 4
    assert len(calls) == 10 + {"first batch": 2, "second batch": 3, "reset": 0, "draw": 2}[at]


def test_an_evaluation_that_always_fails_ends(scripted_envs, played):
    envs = scripted_envs([Scripted(22, fails_after=3) for _ in range(30)], stream=1)
    with pytest.raises(EnvFailure, match=r"evaluation environment 0 of .* \(after 10 new starts\)"):
        played(envs, 1)


def test_a_frame_that_cannot_be_drawn_is_skipped(scripted_envs, played):
    """The first episode is drawn after every agent step but the last, with its return and cost so far."""
    envs = scripted_envs(Scripted(22, cannot_draw_at=[10]), Scripted(22), stream=1, drawn=True)
    episodes, frames, _ = played(envs, 3)
    assert len(episodes) == 3 and envs.failures == []
    assert [(picture[0, 0, 0], total, cost) for picture, total, cost in frames] == [
        (5, 5.0, 1.25), (15, 15.0, 3.75), (20, 20.0, 5.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Safety-Gymnasium itself, in processes
# ----------------------------------------------------------------------------------------------------------------------
def start(task="SafetyPointGoal1-v0", num_envs=1, **flags):
    envs, obs_dim, action_dim = spowl.start_envs(Args(env_id=task, **flags), 0, num_envs, start_method="spawn")
    return envs, action_dim


@pytest.fixture(scope="module")
def point_envs():
    """Three environments of PointGoal1: the test that kills processes comes last."""
    envs, action_dim = start(num_envs=3)
    assert action_dim == 2
    yield envs
    processes = [process for process, _ in envs.workers]
    spowl.close_envs(envs)
    assert processes and not envs.workers and all(process.exitcode is not None for process in processes)


def test_real_sizes(point_envs):
    obs = reset_envs(point_envs, [0, 0, 0])
    new_obs, row, stats = step_envs(point_envs, np.ones((3, 2), np.float32))
    assert obs.shape == new_obs.shape == row.obs.shape == row.next_obs.shape == (3, 60) and row.action.shape == (3, 2)
    assert all(field.shape == (3,) for field in (row.reward, row.cost, row.terminated, row.done))
    assert stats[:, 0].tolist() == stats[:, 3].tolist() == [5, 5, 5] and np.array_equal(stats[:, 1], row.reward)
    assert np.isfinite(new_obs).all() and not np.array_equal(new_obs, obs) and np.array_equal(row.obs, obs)


def test_real_episodes_repeat_with_their_seed(point_envs):
    """The same episode again to the last bit; other environments and other episodes begin elsewhere."""
    def first_steps(episode):
        reset_envs(point_envs, [episode] * 3)
        actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, 2)).astype(np.float32)
        steps = [step_envs(point_envs, action) for action in actions]
        return np.stack([np.concatenate([obs, row.reward[:, None], row.cost[:, None]], -1) for obs, row, _ in steps])

    once, other, again = first_steps(0), first_steps(1), first_steps(0)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert not np.array_equal(once[:, 0], once[:, 1])


def test_a_real_episode_is_1000_steps_and_truncated(point_envs):
    rows = [row for _, row, _ in play(point_envs, 201, action_dim=2)]
    done = np.array([row.done for row in rows])
    assert done[199].tolist() == [1, 1, 1] and done.sum() == 3
    assert not any(row.terminated.any() for row in rows)
    assert all(row.cost.max() <= 5.0 for row in rows)


def test_killed_processes_start_anew_in_the_episodes_asked_for(point_envs, capfd):
    """Between two steps and before a reset; the new processes play the very episodes that the old ones would have."""
    episodes = [2, 0, 5]
    expected = reset_envs(point_envs, episodes)
    for ask in (lambda: step_envs(point_envs, np.zeros((3, 2), np.float32)), lambda: reset_envs(point_envs, episodes)):
        process, _ = point_envs.workers[-1]
        process.kill()
        process.join()
        with pytest.raises(EnvFailure) as failure:
            ask()
        assert np.array_equal(spowl.restart_envs(point_envs, episodes, failure.value), expected)
    last = ", ".join(map(str, point_envs.groups[-1]))
    assert capfd.readouterr().err == 2 * (f"training environment {last} of SafetyPointGoal1-v0 (seed 1): its process "
                                          "ended with exit code -9; all are started anew\n")
    _, row, stats = step_envs(point_envs, np.zeros((3, 2), np.float32))
    assert np.array_equal(row.obs, expected) and stats[:, 3].tolist() == [5, 5, 5]


def test_how_long_an_answer_may_take():
    """--env-timeout seconds, or what the simulator needs to be imported where there was a reset."""
    asked = []
    pipe = types.SimpleNamespace(poll=asked.append, send=lambda command: None)
    envs = spowl.Envs(Args(env_timeout=7.0), 0, False, [[0]], [(None, pipe)], [])
    for ask in (lambda: step_envs(envs, [0.0]), lambda: reset_envs(envs, [0])):
        with pytest.raises(EnvFailure, match="no answer for"):
            ask()
    assert asked == [7.0, spowl.START_TIMEOUT] and spowl.START_TIMEOUT > 60


@pytest.mark.parametrize("what", ["dies", "sends what is no answer"])
def test_a_process_that_gives_no_answer_is_noticed(what):
    """The parent is waiting for it; what comes may be half of what was sent."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(3,))
    process.start()
    if what != "dies":
        theirs.send_bytes(b"\x80")
    theirs.close()
    with pytest.raises(EnvFailure) as stop:
        spowl.receive(spowl.Envs(Args(seed=7), 1, False, [[0, 1]], [(process, ours)], []), 0)
    assert str(stop.value) == ("evaluation environment 0, 1 of SafetyPointGoal1-v0 (seed 7): its process ended with "
                               "exit code 3")


@pytest.mark.parametrize("task", [
    pytest.param("SafetyPointGoal1-v0", marks=pytest.mark.long), "SafetyCarGoal1-v0", "SafetyAntGoal1-v0"])
def test_an_episode_is_replayed_to_the_last_bit(task):
    """METHOD §2: from its seed and its actions, in processes that have another past, or none."""
    (envs, action_dim), rng = start(task, num_envs=2), np.random.default_rng(0)
    reset_envs(envs, [0, 3])
    actions = rng.uniform(-0.3, 0.3, (12, 2, action_dim)).astype(np.float32)
    steps = [step_envs(envs, action) for action in actions]
    assert not any(row.done[0] for _, row, _ in steps) and not any(row.done[1] for _, row, _ in steps[:7])
    expected = np.stack([steps[11][0][0], steps[6][0][1]])
    taken = [actions[:, 0], actions[:7, 1]]
    assert np.array_equal(reset_envs(envs, [0, 3], taken), expected)
    spowl.close_envs(envs)
    envs, _ = start(task, num_envs=2)
    assert np.array_equal(reset_envs(envs, [0, 3], taken), expected)
    _, _, stats = step_envs(envs, actions[7])
    assert stats[1].tolist() == steps[7][2][1].tolist()  # return, cost and length of the episode go on
    spowl.close_envs(envs)


def test_a_vision_task_is_refused_when_it_is_made():
    """It is a task, so it is not before; how the line looks is tested above."""
    with pytest.raises(ValueError, match="observations are not a flat vector"):
        spowl.make_env(Args(env_id="SafetyPointGoal1Vision-v0"), False)


@pytest.mark.parametrize("task, near", [
    ("SafetyPointGoal1", "SafetyPointGoal1-v0"), ("SafetyCarGoal1-v1", "SafetyCarGoal1-v0"),
    ("safetyantgoal1-v0", "SafetyAntGoal1-v0"), ("SafetyDogoGoal1-v0", "SafetyDoggoGoal1-v0")])
def test_an_unknown_task_names_the_nearest(task, near):
    with pytest.raises(SystemExit) as stop:
        spowl.check_machine(Args(env_id=task))
    message = str(stop.value)
    assert message.startswith(f"--env-id {task} is not a task of Safety-Gymnasium; did you mean ")
    assert near in message and "\n" not in message and "Vision" not in message


def test_a_task_unlike_all_others_is_refused_too():
    with pytest.raises(SystemExit, match="--env-id zzz is not a task .* for example SafetyPointGoal1-v0"):
        spowl.check_machine(Args(env_id="zzz"))


@pytest.mark.parametrize("task", [
    "SafetyPointGoal1-v0", "SafetyPointGoal2-v0", "SafetyPointPush1-v0", "SafetyPointButton1-v0", "SafetyCarGoal1-v0",
    "SafetyDoggoGoal1-v0", "SafetyAntGoal1-v0"])
def test_the_tasks_of_the_paper_are_known(task, tmp_path):
    """METHOD §2: the seven tasks of Table 1."""
    spowl.check_machine(Args(env_id=task, runs_dir=str(tmp_path / "runs")))
