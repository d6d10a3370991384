"""The simulator side (METHOD §2): what an environment's process answers, on scripted environments and on real ones."""
import multiprocessing
import os
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest
from conftest import small_args

import spowl_continuous as spowl
from spowl_continuous import Args, Envs, check_env_id, env_worker, episode_seed, reset_envs, step_envs

POINT_SIZES = (60, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Scripted environments
# ----------------------------------------------------------------------------------------------------------------------
def box(low, high):
    low, high = (np.asarray(bound, np.float32) for bound in (low, high))
    return types.SimpleNamespace(low=low, high=high, shape=low.shape)


class Scripted:
    """Observes (episode number, steps in it), from 0 on; pays 1 and costs 0.25 a step; ends after `length` steps.

    The reset before the first episode, which starts the worker, is number -1."""

    def __init__(self, length=7, ends_by="truncation", low=(-1.0,), high=(1.0,), fails_at=None):
        self.length, self.ends_by, self.fails_at = length, ends_by, fails_at
        self.observation_space, self.action_space = box([-9.0, -9.0], [9.0, 9.0]), box(low, high)
        self.episode, self.seeds, self.actions = -2, [], []

    def observe(self):
        return np.array([self.episode, self.steps], np.float64)

    def reset(self, seed=None):
        self.episode, self.steps, self.seeds = self.episode + 1, 0, self.seeds + [seed]
        return self.observe(), {}

    def step(self, action):
        assert self.steps < self.length, "stepped past the end"
        self.steps, self.actions = self.steps + 1, self.actions + [np.array(action)]
        if self.steps == self.fails_at:
            raise RuntimeError("the floor gave way")
        terminated = self.steps == self.length and self.ends_by == "termination"
        truncated = self.steps == self.length and not terminated
        return self.observe(), 1.0, 0.25, terminated, truncated, {}


@pytest.fixture
def worker(monkeypatch):
    """worker(env, commands) runs env_worker on that environment -> its answers, the first before any command.

    The commands wait in the pipe beforehand, so no second process or thread is needed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(env, commands, action_repeat=5, **place):
        monkeypatch.setattr(spowl, "import_safety_gymnasium", lambda: types.SimpleNamespace(make=lambda name: env))
        ours, theirs = multiprocessing.Pipe()
        for command in commands + [(None, None)]:
            ours.send(command)
        where = {"seed": 1, "stream": 0, "index": 0} | place
        env_worker(theirs, "Scripted-v0", action_repeat, **where, render=False)
        answers = []
        while ours.poll():
            answers.append(ours.recv())
        return answers

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def step_with(*action):
    return "step", np.array(action, np.float32)


def test_sizes_come_first_and_reset_gives_float32(worker):
    sizes, obs = worker(Scripted(low=(-1.0, -1.0, -1.0), high=(1.0, 1.0, 1.0)), [("reset", 0)])
    assert sizes == (2, 3)
    assert obs.dtype == np.float32 and obs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("action, expected", [
    ((0.0, 0.0), (5.0, 0.0)), ((1.0, 1.0), (20.0, 0.785)), ((-1.0, -1.0), (-10.0, -0.785)),
    ((0.5, -0.5), (12.5, -0.3925)), ((3.0, -1.5), (20.0, -0.785))])
def test_actions_are_rescaled_to_the_bounds_and_clipped(worker, action, expected):
    env = Scripted(low=(-10.0, -0.785), high=(20.0, 0.785))
    worker(env, [("reset", 0), step_with(*action)], action_repeat=1)
    assert np.allclose(env.actions, [expected])


def test_action_repeat_sums_rewards_and_costs(worker):
    env = Scripted(length=100)
    obs, next_obs, reward, cost, terminated, truncated, steps = worker(env, [("reset", 0), step_with(0.3)])[2]
    assert obs.tolist() == next_obs.tolist() == [0.0, 5.0]
    assert (reward, cost, terminated, truncated, steps) == (5.0, 1.25, False, False, 5)
    assert len(env.actions) == 5 and np.ptp(env.actions) == 0.0


@pytest.mark.parametrize("ends_by", ["termination", "truncation"])
def test_action_repeat_stops_at_the_end_and_the_next_episode_begins(worker, ends_by):
    """METHOD §2: stop early at the episode's end. The answer holds its last observation and the next one's first."""
    answers = worker(Scripted(length=7, ends_by=ends_by), [("reset", 0)] + 3 * [step_with(0.0)])
    obs, next_obs, reward, cost, terminated, truncated, steps = answers[3]
    assert next_obs.tolist() == [0.0, 7.0] and obs.tolist() == [1.0, 0.0]
    assert obs.dtype == next_obs.dtype == np.float32
    assert (reward, cost, steps) == (2.0, 0.5, 2)
    assert (terminated, truncated) == (ends_by == "termination", ends_by == "truncation")
    assert answers[4][0].tolist() == [1.0, 5.0] and answers[4][6] == 5


def test_an_end_on_the_last_repeat_is_seen_once(worker):
    answers = worker(Scripted(length=10), [("reset", 0)] + 3 * [step_with(0.0)])
    assert [answer[5] for answer in answers[2:]] == [False, True, False]
    assert [answer[6] for answer in answers[2:]] == [5, 5, 5]


def test_every_episode_has_the_seed_of_its_counters(worker):
    """Episodes are numbered from the one that `reset` names; each one that follows by itself counts one up."""
    env, place = Scripted(length=5), {"seed": 3, "stream": 1, "index": 4}
    worker(env, [("reset", 2)] + 2 * [step_with(0.0)] + [("reset", 9), step_with(0.0)], **place)
    assert env.seeds[1:] == [episode_seed(3, 1, 4, episode) for episode in (2, 3, 4, 9, 10)]


def test_episode_seeds_are_distinct_and_reproducible():
    places = [(seed, stream, env, episode) for seed in (0, 1, 2) for stream in (0, 1, 2) for env in range(10)
              for episode in range(20)]
    seeds = [episode_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [episode_seed(*place) for place in places]
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)


def test_a_failing_environment_answers_with_text(worker):
    answers = worker(Scripted(fails_at=3), [("reset", 0), step_with(0.0)])
    assert answers[2:] == ["RuntimeError: the floor gave way"]


@pytest.mark.parametrize("shape", [(64, 64, 3), None])
def test_observations_that_are_not_flat_are_refused(worker, shape):
    """Pictures and dictionaries (whose space has no shape) alike, in words that name the observation."""
    env = Scripted()
    env.observation_space = types.SimpleNamespace(shape=shape)
    (answer,) = worker(env, [])
    assert "observations are not a flat vector" in answer


class Thread(threading.Thread):
    """A worker's thread, which looks to its parent like a process."""

    exitcode, kill = None, lambda self: None


@pytest.fixture
def scripted_envs(monkeypatch):
    """scripted_envs(envs, spare) -> Envs whose workers are threads of this process on those environments; where one of
    them fails, the next of `spare` takes its place."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # only a main thread may call it
    opened = []

    def start(envs, spare=(), timeout=5.0):
        waiting = [*envs, *spare]
        simulators = types.SimpleNamespace(make=lambda name: waiting.pop(0))
        monkeypatch.setattr(spowl, "import_safety_gymnasium", lambda: simulators)

        def start_env(args, stream, index, render, start_method):
            ours, theirs = multiprocessing.Pipe()
            place = theirs, args.env_id, 5, args.seed, stream, index, render
            thread = Thread(target=env_worker, daemon=True, args=place)
            thread.start()
            assert ours.poll(5.0)
            opened.append((ours, theirs, thread))
            return thread, ours

        monkeypatch.setattr(spowl, "start_env", start_env)
        args = small_args(env_id="Scripted-v0", env_timeout=timeout, num_envs=len(envs), buffer_size=20 * len(envs))
        return spowl.start_envs(args, 0, len(envs))

    yield start
    for ours, _, thread in opened:
        if not ours.closed:
            ours.send((None, None))
            thread.join(timeout=10)


def play(envs, agent_steps):
    """Every EnvStep of that many agent steps with random actions."""
    obs, steps = reset_envs(envs, [0] * len(envs.pipes)), []
    for action in np.random.default_rng(0).uniform(-1, 1, (agent_steps, len(envs.pipes), envs.action_dim)):
        steps.append(step_envs(envs, obs, action.astype(np.float32), [0] * len(envs.pipes)))
        obs = steps[-1].obs
    return steps


def test_termination_and_truncation_reach_the_transition(scripted_envs):
    """METHOD §2: an episode ends by termination (bootstrap stops) or by truncation (bootstrap continues)."""
    envs = scripted_envs([Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(1000)])
    steps = play(envs, 3)
    done = np.array([step.transition.done for step in steps])
    terminated = np.array([step.transition.terminated for step in steps])
    assert done.T.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert terminated.T.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert np.array([step.steps for step in steps]).T.tolist() == [[5, 2, 5], [5, 5, 2], [5, 5, 5]]
    assert all(field.dtype == np.float32 for field in steps[0].transition)


def test_no_row_of_the_buffer_joins_two_episodes(scripted_envs):
    """METHOD §2, on numbered transitions: within a row the episode stays the same and its steps go on by the repeat;
    a row that follows an end begins at step 0 of the next episode."""
    lengths = (7, 12, 20)
    envs = scripted_envs([Scripted(7, "termination"), Scripted(12, "truncation"), Scripted(20, "truncation")])
    buffer = spowl.init_buffer(small_args(num_envs=3, buffer_size=60), envs.obs_dim, envs.action_dim)
    for step in play(envs, 25):  # the ring holds 20: it wraps
        buffer = spowl.add(buffer, step.transition)
    rows = jax.tree.map(lambda x: np.roll(np.asarray(x), -int(buffer.head), axis=0), buffer.rows)  # oldest first
    (episode, number), (next_episode, next_number) = np.moveaxis(rows.obs, -1, 0), np.moveaxis(rows.next_obs, -1, 0)
    assert int(buffer.size) == 20 and (rows.done.sum(0) > 2).all()
    assert (episode == next_episode).all()
    assert (next_number == np.minimum(number + 5, lengths)).all()
    assert (rows.done == (next_number == lengths)).all()
    assert (rows.reward == next_number - number).all() and (rows.cost == 0.25 * rows.reward).all()
    ended = rows.done[:-1] > 0
    assert (episode[1:] == np.where(ended, episode[:-1] + 1, episode[:-1])).all()
    assert (number[1:] == np.where(ended, 0.0, next_number[:-1])).all()


# ----------------------------------------------------------------------------------------------------------------------
# Failures
# ----------------------------------------------------------------------------------------------------------------------
class Hanging(Scripted):
    """Gives no answer when it should fail."""

    def step(self, action):
        try:
            return super().step(action)
        except RuntimeError:
            time.sleep(1.5)
            raise


@pytest.mark.parametrize("failing, reason", [
    (Scripted, "RuntimeError: the floor gave way"), (Hanging, "no answer for 0.5 seconds")])
def test_a_failed_process_is_replaced_in_a_fresh_episode(scripted_envs, capfd, failing, reason):
    """METHOD §2: its step is the first of the next episode, from that episode's first observation; the others' are
    what they would have been. One line says what happened where."""
    spare = Scripted(1000)
    envs = scripted_envs([Scripted(1000), failing(1000, fails_at=8)], [spare], timeout=0.5)
    obs = reset_envs(envs, [0, 4])
    first = step_envs(envs, obs, np.zeros((2, 1), np.float32), [0, 4])
    second = step_envs(envs, first.obs, np.full((2, 1), 0.5, np.float32), [0, 4])
    assert first.restarted.tolist() == [0, 0] and second.restarted.tolist() == [0, 1]
    assert first.transition.next_obs.tolist() == [[0, 5], [0, 5]]
    assert second.transition.obs.tolist() == [[0, 5], [0, 0]]
    assert second.transition.next_obs.tolist() == [[0, 10], [0, 5]]
    assert second.transition.reward.tolist() == [5, 5] and not second.transition.done.any()
    assert spare.seeds[1:] == [episode_seed(envs.args.seed, 0, 1, 5)] and np.unique(spare.actions).tolist() == [0.5]
    assert capfd.readouterr().err == (
        f"training environment 1 of Scripted-v0 (seed 1): {reason}; restarted in episode 5\n")


def test_a_failure_during_reset_is_replaced_in_the_same_episode(scripted_envs):
    failing, spare = Scripted(), Scripted()
    failing.reset = lambda seed=None: (failing.observe(), {}) if not seed else 1 / 0
    failing.steps = 0
    envs = scripted_envs([Scripted(), failing], [spare])
    assert reset_envs(envs, [3, 6]).tolist() == [[0, 0], [0, 0]]
    assert spare.seeds[1:] == [episode_seed(1, 0, 1, 6)]


@pytest.mark.parametrize("shift", [0.0, 1e-6])
def test_episodes_that_do_not_repeat_are_cut_on_resume(scripted_envs, capfd, shift):
    """METHOD §2: where the replay does not meet the saved observation, unfinished episodes end by truncation, new ones
    begin, and that is said; where it does, all goes on."""
    envs = scripted_envs([Scripted(1000), Scripted(10)], [])
    first, args = np.zeros(2, int), envs.args
    progress = spowl.Progress(0, 0, 0, 0.0, 0, first, np.zeros((2, 3)), [[], []], reset_envs(envs, first), 0.0)
    buffer = spowl.init_buffer(args, 2, 1)
    for _ in range(2):  # the second environment's episode ends with the second step
        _, buffer, progress, _, _ = spowl.collect(args, envs, None, None, buffer, progress)
    envs = scripted_envs([Scripted(1000), Scripted(10)], [])
    reset_envs(envs, [0, 0])  # its second reset is episode 1
    saved = progress._replace(obs=progress.obs + np.float32([[0, shift], [0, 0]]))._asdict()
    saved["obs"][:, 0] = 1.0  # the number of a scripted episode counts a process's resets
    buffer, resumed = spowl.resume_envs(envs, buffer, saved)
    cut = shift > 0
    assert np.asarray(buffer.rows.done[1]).tolist() == [float(cut), 1.0]
    assert resumed.episodes.tolist() == [int(cut), 1]
    assert [len(taken) for taken in resumed.actions] == [2 * (not cut), 0]
    assert ("does not repeat" in capfd.readouterr().err) == cut
    assert (resumed.totals[0, 2] == 0.0) == cut


def test_too_many_failures_are_the_end(scripted_envs):
    """An environment that always fails is not replaced for ever."""
    envs = scripted_envs([Scripted(fails_at=3)], [Scripted(fails_at=3) for _ in range(30)])
    with pytest.raises(spowl.EnvFailure) as stop:
        play(envs, 1)
        play(envs, 1)
    assert len(envs.failures) <= spowl.MAX_RESTARTS + 1 and "the floor gave way" in str(stop.value)


def test_no_row_joins_two_episodes_where_processes_fail(scripted_envs):
    """METHOD §2 with failures in the middle of episodes, at their beginning, and right after another: the row before a
    failure is marked as an end by truncation; episodes and their totals are counted anew."""
    failing = [Scripted(22, fails_at=13), Scripted(1000, fails_at=26)]
    spare = [Scripted(22), Scripted(1000, fails_at=2), Scripted(1000, fails_at=11), Scripted(1000)]
    envs = scripted_envs(failing, spare)
    args = envs.args
    buffer, actor = spowl.init_buffer(args, 2, 1), None
    first = np.zeros(2, int)
    progress = spowl.Progress(0, 0, 0, 0.0, 0, first, np.zeros((2, 3)), [[], []], reset_envs(envs, first), 0.0)
    ended = []
    for _ in range(16):
        actor, buffer, progress, rows, _ = spowl.collect(args, envs, None, actor, buffer, progress)
        ended += rows
    rows = jax.tree.map(np.asarray, buffer.rows)
    rows = jax.tree.map(lambda x: x[:16], rows)
    number, next_number, done = rows.obs[..., 1], rows.next_obs[..., 1], rows.done > 0
    assert np.array_equal(number[1:], np.where(done[:-1], 0.0, next_number[:-1]))
    assert np.flatnonzero(done[:, 1]).tolist() == [4, 6] and not rows.terminated.any()
    assert len(envs.failures) == 4
    assert progress.episodes.tolist() == [3, 3] and progress.step == 16 * 2 * 5
    taken = [len(actions) for actions in progress.actions]
    assert taken == [16 - 1 - np.flatnonzero(done[:, index])[-1] for index in (0, 1)]
    assert progress.totals[:, 2].tolist() == [5.0 * count for count in taken]
    assert [row[2] for row in ended] == [0] * len(ended) and {row[5] for row in ended} == {22}


# ----------------------------------------------------------------------------------------------------------------------
# Safety-Gymnasium itself, in processes
# ----------------------------------------------------------------------------------------------------------------------
def start(task="SafetyPointGoal1-v0", num_envs=1, seed=1, stream=0, **args):
    return spowl.start_envs(Args(env_id=task, seed=seed, **args), stream, num_envs, start_method="spawn")


@pytest.fixture(scope="module")
def point_envs():
    """Three processes of PointGoal1: tests that kill one come last and take the last of them."""
    envs = start(num_envs=3)
    yield envs
    spowl.close_envs(envs)
    assert not any(process.is_alive() for process in envs.processes)


def test_real_sizes(point_envs):
    obs = reset_envs(point_envs, [0, 0, 0])
    assert (point_envs.obs_dim, point_envs.action_dim) == POINT_SIZES and obs.shape == (3, 60)
    step = step_envs(point_envs, obs, np.ones((3, 2), np.float32), [0, 0, 0])
    assert step.obs.shape == step.transition.next_obs.shape == (3, 60) and step.transition.action.shape == (3, 2)
    assert all(field.shape == (3,) for field in step.transition[2:4]) and step.steps.tolist() == [5, 5, 5]
    assert np.isfinite(step.obs).all() and not np.array_equal(step.obs, obs)


def test_real_episodes_repeat_with_their_seed(point_envs):
    """The same episode again to the last bit; other environments and other episodes begin elsewhere."""
    def first_steps(episode):
        obs, seen = reset_envs(point_envs, [episode] * 3), []
        for action in np.random.default_rng(0).uniform(-1, 1, (8, 3, 2)).astype(np.float32):
            step = step_envs(point_envs, obs, action, [episode] * 3)
            obs = step.obs
            seen.append(np.concatenate([obs, step.transition.reward[:, None], step.transition.cost[:, None]], -1))
        return np.stack(seen)

    once, other, again = first_steps(0), first_steps(1), first_steps(0)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert not np.array_equal(once[:, 0], once[:, 1])


def test_a_real_episode_is_1000_steps_and_truncated(point_envs):
    steps = play(point_envs, 201)
    done = np.array([step.transition.done for step in steps])
    assert done[199].tolist() == [1, 1, 1] and done.sum() == 3
    assert not any(step.transition.terminated.any() for step in steps)
    assert all(step.transition.cost.max() <= 5.0 for step in steps)


def test_a_killed_process_is_replaced(point_envs, capfd):
    """Between two steps and before a reset; the new process plays the very episode that the old one would have."""
    expected = reset_envs(point_envs, [0, 0, 5])
    for episodes, begin in (([0, 0, 4], True), ([0, 0, 5], False)):
        point_envs.processes[2].kill()
        point_envs.processes[2].join()
        if begin:
            step = step_envs(point_envs, np.zeros((3, 60), np.float32), np.zeros((3, 2), np.float32), episodes)
            assert step.restarted.tolist() == [0, 0, 1]
            assert np.array_equal(step.transition.obs[2], expected[2])
        else:
            assert np.array_equal(reset_envs(point_envs, episodes)[2], expected[2])
    lines = capfd.readouterr().err.splitlines()
    assert [line.rsplit(";")[-1] for line in lines] == [" restarted in episode 5"] * 2
    assert all("training environment 2 of SafetyPointGoal1-v0 (seed 1): " in line and "exit code -9" in line
               for line in lines)


def test_a_process_that_dies_during_its_step_is_noticed():
    """The parent is waiting for an answer that never comes."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(3,))
    process.start()
    theirs.close()
    with pytest.raises(spowl.EnvFailure) as stop:
        spowl.receive(Envs(Args(seed=7), 1, False, [process], [ours], [], 60, 2), 0)
    assert str(stop.value) == ("evaluation environment 0 of SafetyPointGoal1-v0 (seed 7): its process ended with exit "
                               "code 3")


@pytest.mark.parametrize("task", ["SafetyPointGoal1-v0", "SafetyCarGoal1-v0", "SafetyAntGoal1-v0"])
def test_an_episode_is_replayed_to_the_last_bit(task):
    """METHOD §2: from its seed and its actions, in a process that has another past."""
    envs, rng = start(task, num_envs=2), np.random.default_rng(0)
    obs, seen = reset_envs(envs, [0, 3]), None
    lengths, actions = (12, 7), [[], []]
    for t in range(12):
        action = rng.uniform(-0.3, 0.3, (2, envs.action_dim)).astype(np.float32)
        step = step_envs(envs, obs, action, [0, 3])
        assert not step.transition.done[:1].any()
        for index in (0, 1):
            actions[index] += [action[index]] if t < lengths[index] else []
        seen = step.obs if t == 6 else seen
        obs = step.obs
    expected = np.stack([obs[0], seen[1]])
    assert np.array_equal(spowl.replay_envs(envs, [0, 3], actions), expected)
    spowl.close_envs(envs)
    fresh = start(task, num_envs=2)
    assert np.array_equal(spowl.replay_envs(fresh, [0, 3], actions), expected)
    spowl.close_envs(fresh)


def test_a_vision_task_is_refused_in_one_clear_line():
    with pytest.raises(spowl.EnvFailure) as stop:
        start("SafetyPointGoal1Vision-v0")
    message = str(stop.value)
    assert "\n" not in message and "SafetyPointGoal1Vision-v0" in message
    assert "observations are not a flat vector" in message


@pytest.mark.parametrize("task, near", [
    ("SafetyPointGoal1", "SafetyPointGoal1-v0"), ("SafetyCarGoal1-v1", "SafetyCarGoal1-v0"),
    ("safetyantgoal1-v0", "SafetyAntGoal1-v0"), ("SafetyDogoGoal1-v0", "SafetyDoggoGoal1-v0")])
def test_an_unknown_task_names_the_nearest(task, near):
    with pytest.raises(SystemExit) as stop:
        check_env_id(task)
    message = str(stop.value)
    assert message.startswith(f"--env-id {task} is not a task of Safety-Gymnasium; did you mean ")
    assert near in message and "\n" not in message


def test_a_task_unlike_all_others_is_refused_too():
    with pytest.raises(SystemExit, match="--env-id zzz is not a task .* for example SafetyPointGoal1-v0"):
        check_env_id("zzz")


@pytest.mark.parametrize("task", [
    "SafetyPointGoal1-v0", "SafetyPointGoal2-v0", "SafetyPointPush1-v0", "SafetyPointButton1-v0", "SafetyCarGoal1-v0",
    "SafetyDoggoGoal1-v0", "SafetyAntGoal1-v0"])
def test_the_tasks_of_the_paper_are_known(task):
    """METHOD §2: the seven tasks of Table 1."""
    check_env_id(task)
