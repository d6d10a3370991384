"""What the pages say of chance: each p is computed here from the committed csv, and must stand on its page. So are the
rows that a page has of kept runs without being a table of them."""
import csv
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

from budget import with_interval
from kept import played, read_kept
from plot import RESULTS, by_seed, read_rows

TASK = "SafetyPointGoal1-v0"
FIXED = ["local_0.01", "local_0.1", "local_0.3", "local_1", "local_3"]


def at(table, setting, name, step=300_000, seeds=()):
    """A column's values at one step, in the order of seeds (default: all)."""
    found = by_seed(read_rows(RESULTS / f"{table}.csv"), TASK, setting, name)
    return [found[seed][step] for seed in seeds or found]


def says(page, *sentences):
    """Whether each stands there, however its lines are broken."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "results" / f"{page}.md").read_text())
    return all(sentence in text for sentence in sentences)


def rank_p(first, second):
    return scipy.stats.mannwhitneyu(first, second, alternative="two-sided", method="exact").pvalue


def one_more_p(known, new):
    """Chance that one more value of the normal distribution of `known` is as far from their mean as `new`."""
    spread = np.std(known, ddof=1) * np.sqrt(1 + 1 / len(known))
    return 2 * scipy.stats.t.sf(abs(new - np.mean(known)) / spread, len(known) - 1)


@pytest.mark.parametrize("step, all_seeds, first_three, sentence", [
    (60_000, 0.01, None, "(rank test, p = 0.01)"),
    (120_000, 0.08, 0.02, "(p = 0.08; with its seeds 1 to 3 alone p = 0.02)"),
    (300_000, 0.13, 0.17, "(p = 0.13; with the full agent's seeds 1 to 3 alone p = 0.17)"),
])
def test_planning_against_the_policy_alone(step, all_seeds, first_three, sentence):
    full, plan, policy = (at("fig6_two_cores", name, "return", step) for name in ("laptop", "plan_only", "policy_only"))
    assert (len(full), len(plan), len(policy)) == (5, 3, 3) and says("fig6", sentence)
    assert round(rank_p(full + plan, policy), 2) == all_seeds
    if first_three:
        assert round(rank_p(full[:3] + plan, policy), 2) == first_three


def test_planning_against_the_policy_alone_by_means():
    full, plan, policy = (at("fig6_two_cores", name, "return") for name in ("laptop", "plan_only", "policy_only"))
    difference = lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis)
    found = scipy.stats.permutation_test((full + plan, policy), difference, vectorized=True, n_resamples=np.inf)
    assert round(found.pvalue, 2) == 0.06 and says("fig6", "A test of the means instead of ranks gives 0.06")


@pytest.mark.parametrize("figure, setting, name, expected", [
    ("fig7", "target_min", "cost_rate", 0.02), ("fig7", "target_max", "cost_rate", 0.03),
    ("fig7", "target_max", "return", 0.14),
    ("fig8", "heads_1x1", "cost_rate", 0.08), ("fig8", "heads_3x3_max", "cost_rate", 0.17),
])
def test_one_run_against_five(figure, setting, name, expected):
    (new,), known = (at(f"{figure}_two_cores", which, name) for which in (setting, "laptop"))
    assert len(known) == 5 and round(one_more_p(known, new), 2) == expected


def test_one_run_against_three():
    """What training costs under fixed thresholds on the plan's cost, beside the adaptive one's three seeds."""
    rates = {name: at("fig4_two_cores", name, "cost_rate") for name in ("plan_only", *FIXED)}
    p = [round(one_more_p(rates["plan_only"], *rates[name]), 3) for name in FIXED]
    assert len(rates["plan_only"]) == 3 and min(p[:3]) > 0.2 and p[3:] == [0.021, 0.006]
    assert says("fig4", "only 1 and 3 are clearly above (prediction interval, p = 0.02 and 0.006)")


def test_those_of_one_run_are_on_their_pages():
    assert says("fig7", "(p = 0.02 and 0.03)", "(p = 0.14;") and says("fig8", "(p = 0.08 and 0.17)")


def test_the_papers_cost_discount():
    """Training costs less and the return is lower in six pairs of six: by signs, twice a half to the sixth."""
    pairs = lambda name: np.transpose([
        (more, less) for setting, prefix in (("laptop", ""), ("larger planner", "larger planner with "))
        for more, less in zip(at("laptop_ablation", setting, name, seeds=(1, 2, 3)),
                              at("laptop_ablation", f"{prefix}paper's cost discount", name), strict=True)])
    more, less = pairs("cost_rate")
    saved = 1 - less / more
    assert (f"{saved.min():.0%}", f"{saved.max():.0%}") == ("4%", "24%") and says("ablation", "by 4% to 24%")
    lost = np.subtract(*pairs("return"))
    assert (f"{lost.min():.1f}", f"{lost.max():.1f}") == ("0.1", "1.6") and says("ablation", "by 0.1 to 1.6")
    assert len(saved) == len(lost) == 6
    assert round(scipy.stats.binomtest(6, 6).pvalue, 2) == 0.03 and says("ablation", "sign test, p = 0.03,")


def test_a_full_multiplier_from_the_start():
    """Three pairs of seeds, and their episodes: the mean difference over the standard error of six means."""
    known, new, *deviations = (
        at(table, setting, name, seeds=(3, 4, 5)) for name in ("cost", "cost_std")
        for table, setting in (("laptop", "laptop"), ("laptop_early", "lambda-init 0.2, whole run")))
    z = np.sum(np.subtract(new, known)) / np.sqrt(np.sum(np.square(deviations)) / 49)  # the csv's are over 50
    assert (round(z, 1), round(2 * scipy.stats.norm.sf(z), 2)) == (2.1, 0.04)
    assert round(scipy.stats.ttest_rel(new, known).pvalue, 2) == 0.09
    assert says("training_costs", "(z = 2.1, p = 0.04)", "(paired t, p = 0.09)")


def test_who_acts():
    """Plan or policy, plan alone, policy alone, of agents of two lengths: the page's cells, and every difference of the
    episodes' means with p below 0.05."""
    found, cells, tests = {}, {}, 0
    for table in ("who_acts", "who_acts_million"):
        with open(RESULTS / f"{table}.csv", newline="") as file:
            rows = {(row["env_id"][6:-3], row["acts"]): row for row in csv.DictReader(file)}
        for task in {task for task, _ in rows}:
            each = [rows[task, acts] for acts in ("policy", "plan or policy", "plan")]
            cells.setdefault(task, []).extend(f"{float(row['return']):.1f} / {float(row['cost']):.1f}" for row in each)
            for name in ("return", "cost"):
                for one, other in itertools.combinations(each, 2):
                    gap = float(one[name]) - float(other[name])
                    error = np.hypot(float(one[f"{name}_std"]), float(other[f"{name}_std"])) / 49**0.5
                    p, tests = 2 * scipy.stats.norm.sf(abs(gap) / error), tests + 1
                    if p < 0.05:
                        more, less = (one, other) if gap > 0 else (other, one)
                        found[name, more["acts"], less["acts"], task, table] = round(p, 3)
    assert tests == 60 and found == {
        ("return", "plan or policy", "plan", "CarGoal1", "who_acts"): 0.019,
        ("return", "plan or policy", "plan", "CarGoal1", "who_acts_million"): 0.012,
        ("return", "plan or policy", "plan", "PointButton1", "who_acts"): 0.021,
        ("return", "plan or policy", "plan", "PointButton1", "who_acts_million"): 0.023,
        ("return", "plan or policy", "plan", "PointGoal2", "who_acts"): 0.0,
        ("return", "plan or policy", "plan", "PointGoal1", "who_acts_million"): 0.001,
        ("return", "plan or policy", "policy", "PointPush1", "who_acts"): 0.009,
        ("return", "plan or policy", "policy", "PointPush1", "who_acts_million"): 0.017,
        ("return", "plan or policy", "policy", "PointGoal2", "who_acts"): 0.019,
        ("return", "policy", "plan", "PointButton1", "who_acts"): 0.034,
        ("return", "plan", "policy", "PointPush1", "who_acts"): 0.034,
        ("return", "policy", "plan", "PointGoal1", "who_acts_million"): 0.0,
        ("return", "policy", "plan", "CarGoal1", "who_acts_million"): 0.006,
        ("return", "policy", "plan", "PointButton1", "who_acts_million"): 0.002,
        ("cost", "policy", "plan", "PointGoal2", "who_acts_million"): 0.022,
        ("cost", "policy", "plan", "PointButton1", "who_acts_million"): 0.05}
    assert says("latency", *(f"| {task} | {' | '.join(each)} |" for task, each in cells.items()))
    assert says("latency", "on CarGoal1 (p = 0.02 after 300,000 steps, 0.01 after 1,000,000), PointButton1",
                "(0.02, 0.02), PointGoal2 (below 0.001 after 300,000 only) and PointGoal1 (0.001 after 1,000,000 only)",
                "on PointPush1 (p = 0.01, 0.02) and, after 300,000 steps only, PointGoal2 (0.02)",
                "on PointGoal2 (p = 0.02) and PointButton1", "(0.05). No other",
                "on PointButton1 (p = 0.03, 0.002) and, after 1,000,000 steps only, PointGoal1 (below 0.001)",
                "and CarGoal1 (0.006). On PointPush1 it returns less (0.03, after 300,000 steps only)",
                f"sixty tests: {len(found)} have")
    least = [sum(min(range(3), key=lambda acts: float(each[3 * half + acts].split()[0])) == 2
                 for each in cells.values()) for half in (0, 1)]
    assert least == [4, 4] and says("fig6", "on four of five tasks, after 300,000 steps and after 1,000,000")


def test_longer_runs():
    """PointGoal1: where the multiplier is at its cap; what 500,000 steps return beside five seeds after 300,000."""
    runs = read_kept(RESULTS / "length")
    capped = [min(step for step, row in run.numbers.items() if row["lagrangian/lambda"] == "0.2") for run in runs]
    assert capped == [300_000, 300_000]
    assert says("laptop", "In runs of 500,000 steps it is at its cap of 0.2 from 300,000 on")
    longer = [np.mean(played(run, run.last, "return")) for run in runs]
    shorter = at("laptop", "laptop", "return", seeds=(1, 2, 3, 4, 5))
    p = rank_p(longer, shorter)
    assert p > 0.05 and rank_p([6, 7], [1, 2, 3, 4, 5]) > 0.09  # two against five, however far apart
    assert says("laptop", f"it cannot be told (two seeds, p = {p:.2f}; never below 0.09)")


def test_a_million_steps():
    """PointGoal1: three seeds' ends and five after 300,000 steps; what evaluations cost on the way, what their worst
    episodes cost, where the multiplier is at its cap; the other tasks' ends; what the critic reads before a hazard."""
    kept = read_kept(RESULTS / "million")
    runs = [run for run in kept if (run.args["env_id"], run.args["exp_name"]) == (TASK, "spowl")]
    ends = [[np.mean(played(run, run.last, name)) for run in runs] for name in ("return", "cost")]
    shorter = at("laptop", "laptop", "return", seeds=(1, 2, 3, 4, 5))
    assert min(ends[0]) > max(shorter) and round(rank_p(ends[0], shorter), 2) == 0.04
    pairs = [f"{gain:.1f} / {cost:.1f}" for gain, cost in zip(*ends)]
    assert says("million", "three seeds end at {}, {} and {}".format(*pairs), "(22.3 to 24.4; rank test, p = 0.04)")
    cost = lambda step: [round(np.mean(played(run, step, "cost")), 1) for run in runs]
    assert (min(cost(50_000)), max(cost(50_000)), min(cost(300_000)), max(cost(300_000))) == (18.4, 64.0, 10.5, 17.5)
    assert max(max(cost(step)) for step in range(400_000, 1_000_001, 50_000)) == 6.3
    last = [played(run, run.last, "cost") for run in runs]
    assert [np.sum(costs == 0) for costs in last] == [73, 79, 76] and np.max(last) == 38
    capped = lambda run: min(step for step, row in run.numbers.items() if row["lagrangian/lambda"] == "0.2")
    assert [capped(run) for run in runs] == [600_000, 600_000, 650_000]
    spowl = [run for run in kept if run.args["exp_name"] == "spowl"]
    first = {run.args["env_id"]: run for run in spowl if run.args["seed"] == 1}
    push, button = (first[f"Safety{name}-v0"] for name in ("PointPush1", "PointButton1"))
    goal2, cars = ([run for run in spowl if run.args["env_id"] == f"Safety{task}-v0"]
                   for task in ("PointGoal2", "CarGoal1"))
    assert [capped(run) for run in (*goal2, *cars, button)] == [500_000, 550_000, 800_000, 850_000, 400_000]
    assert says("million", "from 500,000 or 550,000 on (PointGoal2), from 400,000",
                "on (PointButton1), from 800,000 or 850,000 on (CarGoal1)",
                f"On PointPush1 it ends at {float(push.numbers[push.last]['lagrangian/lambda']):.3f}")
    (gain, paid), (more, cost), *twos = (
        [np.mean(played(run, run.last, name)) for name in ("return", "cost")] for run in (push, button, *goal2, *cars))
    assert paid < 0.7 and more > 15.9 and (round(cost, 1), round(16.6 - cost, 1)) == (15.7, 0.9)
    assert all(gain2 > 14.3 and paid2 < 4.8 for gain2, paid2 in twos[:2])
    two = "two seeds end at {:.1f} / {:.1f} and {:.1f} / {:.1f}. {}"
    assert says("million", two.format(*twos[0], *twos[1], "Both return more"),
                two.format(*twos[2], *twos[3], "Both return 1.4 more than the paper's"))
    assert [round(car - 31.3, 1) for car, _ in twos[2:]] == [1.4, 1.4]
    assert says("million", f"ends at {gain:.1f} / {paid:.1f}: at 300,000",
                f"(return missed by {18.7 - gain:.1f})", f"(cost missed by {cost - 5.4:.1f})",
                f"ends at {more:.1f} / {cost:.1f}: {more / 10:.1f} times the paper's return at {cost / 5.4:.1f} times")
    assert f"after 1,000,000 at {gain / 18.7:.0%} and {cost / 5.4:.1f} times (one seed each)" in (
        ROOT / "README.md").read_text()
    at_step = lambda step, name: round(np.mean(played(button, step, name)), 1)
    costs = [at_step(step, "cost") for step in range(450_000, 1_000_001, 50_000)]
    assert [at_step(200_000, "cost"), at_step(400_000, "cost"), min(costs), max(costs)] == [37.3, 17.9, 6.8, 21.1]
    assert len(costs) == 12 and [at_step(step, "return") for step in (400_000, 1_000_000)] == [18.8, 25.4]
    before = lambda run: [(float(row["critic/read_before_1"]), float(row["critic/followed_before_1"]))
                          for row in run.numbers.values() if row["critic/read_before_1"]]
    read = [pair for run in spowl for pair in before(run)]
    less = sum(one < other for one, other in read)
    assert says("million", "on PointButton1 {:.1f} of {:.1f} (means of 20)".format(*np.mean(before(button), axis=0)))
    assert says("million", "18.4 to 64.0 at 50,000 steps, 10.5 to 17.5 at 300,000. From 400,000 on they cost 6.3",
                "from 600,000 or 650,000 steps on (PointGoal1)", f"at {less} of {len(read)} evaluations")


def test_what_is_paid_for():
    """The agents of a million steps: 50 episodes of each, by what charged them."""
    with open(RESULTS / "what_costs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["run"], row["environment"], row["source"]) for row in rows}) == len(rows) == 50 * (3 + 3)
    of = lambda task, source, name="charged": np.mean(
        [float(row[name]) for row in rows if (row["run"], row["source"]) == (f"million_{task}", source)])
    charged = [of("PointButton1", source) for source in ("gremlins", "buttons", "hazards")]
    assert says("million", "of {:.1f} an episode gremlins charge {:.1f}, wrong buttons {:.1f}, hazards {:.1f} (".format(
        of("PointButton1", "hazards", "cost"), *charged))
    assert says("million", "pays {:.1f} of {:.1f} to hazards, {:.1f} for vases set in motion".format(
        of("PointGoal2", "hazards"), of("PointGoal2", "hazards", "cost"), of("PointGoal2", "vases_velocity")))


def test_by_the_mean_or_drawn():
    """Methods without a model: what is said of the agents with a limit of 25, and with those of limit 2."""
    by_mean, by_drawing = {2: [], 25: []}, {2: [], 25: []}
    for run in (run for run in read_kept(RESULTS / "rivals") if run.drawn and run.args["env_id"] == TASK):
        assert [row["environment"] for row in run.drawn] == [row["environment"] for row in run.evaluations[run.last]]
        by_mean[run.args["cost_limit"]].append(played(run, run.last, "cost"))
        by_drawing[run.args["cost_limit"]].append(np.array([float(row["cost"]) for row in run.drawn]))
    assert (np.shape(by_mean[25]), np.shape(by_mean[2])) == ((9, 100), (5, 100))
    differences = {limit: np.subtract(by_mean[limit], by_drawing[limit]) for limit in (2, 25)}
    by_agent = {limit: np.mean(values, axis=1) for limit, values in differences.items()}
    p = lambda values: round(scipy.stats.ttest_1samp(values, 0).pvalue, 3)
    assert (p(by_agent[25]), p(by_agent[2])) == (0.004, 0.853)
    assert (round(min(by_agent[25]), 1), round(max(by_agent[25]), 1)) == (2.7, 16.0)
    z = np.mean(differences[25]) / np.sqrt(np.mean(np.var(differences[25], axis=1, ddof=1)) / differences[25].size)
    assert (round(z, 1), round(2 * scipy.stats.norm.sf(z), 4)) == (3.8, 0.0002)
    assert (round(np.mean(by_drawing[25]), 1), round(np.mean(by_mean[25]), 1)) == (23.7, 30.7)
    within = np.sum(np.minimum(by_mean[25], 100)) - np.sum(np.minimum(by_drawing[25], 100))
    assert 0.45 < within / np.sum(differences[25]) < 0.55
    assert (np.sum(np.greater(by_mean[25], 100)), np.max(by_mean[25])) == (21, 761)
    assert (np.sum(np.greater(by_drawing[25], 100)), np.max(by_drawing[25])) == (12, 341)
    assert says(
        "rivals",
        "23.7 over the 900 episodes of nine agents (from bins 17.2 to 20.8), by the mean 30.7",
        "(paired by episode z = 3.8, p = 0.0002). All nine differ so, by 2.7 to 16.0",
        "(t over agents, p = 0.004); limit 2's five do not (p = 0.85)",
        "Half of the difference is what a few episodes cost beyond 100: by the mean 21 of 900, the worst 761;",
        "drawn 12, the worst 341")


def test_what_all_of_training_cost():
    """SPOWL told what an episode may cost, and the methods without a model under the same limits, in thousands."""
    cost, early, late, bins = {}, {}, {}, ("ppo_lagrangian_25_bins", "cpo_25_bins", "cvpo_25_bins")
    for run in (run for folder in ("budget", "rivals") for run in read_kept(RESULTS / folder)):
        if run.args["env_id"] == TASK:
            total = run.last * float(run.numbers[run.last]["charts/cost_rate"])
            cost.setdefault(run.args["exp_name"], []).append(round(total / 1000))
            late.setdefault(run.args["exp_name"], []).append(round(float(run.numbers[run.last]["train/cost"]), 1))
            for step in {500_000, 2_000_000} & set(run.numbers):
                early[step, run.args["exp_name"]] = round(step * float(run.numbers[step]["charts/cost_rate"]) / 1000)
            if run.args["exp_name"] == "cvpo_25_bins":
                at_500_000 = [played(run, 500_000, each) for each in ("return", "cost")]
    assert [cost[name] for name in ("budget_25", *bins)] == [[9, 9], [141], [132], [129]]
    assert (cost["budget_2"], cost["ppo_lagrangian_2_fast_bins"]) == ([4, 6], [62])
    assert [early[2_000_000, name] for name in bins[:2]] + [early[500_000, "cvpo_25_bins"]] == [73, 53, 15]
    assert (late["budget_2"], late["ppo_lagrangian_2_fast_bins"]) == ([2.2, 4.0], [6.5])
    assert late["ppo_lagrangian_25_bins"] == [21.8]
    assert [(len(values), round(np.mean(values), 1)) for values in at_500_000] == [(20, 25.2), (20, 24.6)]
    assert says(
        "rivals", "for a cost of 9,000 in all of training",
        "after 500,000 steps, for 15,000: 25.2 / 24.6 over 20 episodes", "two more, for 129,000",
        "after 2,000,000, for 73,000 and 53,000",
        "cost 4,000 and 6,000 against 62,000, its last 100 episodes 2.2 and 4.0 against 6.5 each",
        "(its last 100 training episodes cost 21.8)")


@pytest.mark.parametrize("page, folder, name, count, form", [
    ("safedreamer", "rivals", "laptop_safedreamer", 2, "| {seed} | {return} | {cost} | {rate:.4f} |"),
    ("safedreamer", "rivals", "laptop_safedreamer_osrp", 2, "| {seed} | {return} | {cost} | {rate:.4f} |"),
    ("safedreamer", "pilots", "sd_bsrp", 1, "| {seed} | {return} | {cost} | {rate:.4f} |"),
    ("trials", "rivals", "ppo_lagrangian_2", 2, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "ppo_lagrangian_25", 2, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "ppo_lagrangian_25_bins", 1, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "cpo_25_bins", 1, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "cvpo_25", 2, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "cvpo_25_bins", 1, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "cpo_25", 2, "{return} / {cost} (seed {seed})"),
    ("trials", "pilots", "ppo2_adam01", 1, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "ppo_lagrangian_2_fast", 2, "{return} / {cost} (seed {seed})"),
    ("trials", "rivals", "ppo_lagrangian_2_fast_bins", 1, "{return} / {cost} (seed {seed})"),
])
def test_kept_runs_stand_on_their_pages(page, folder, name, count, form):
    runs = [run for run in read_kept(RESULTS / folder) if run.args["exp_name"] == name]
    assert len(runs) == count
    for run in runs:
        told = {each: with_interval(played(run, run.last, each)) for each in ("return", "cost")}
        rate = float(run.numbers[run.last]["charts/cost_rate"])
        assert says(f"../{page}", form.format(seed=run.args["seed"], rate=rate, **told))
