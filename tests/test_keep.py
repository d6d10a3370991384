"""benchmark/keep.py: the two csv files of a run say what its own files say. kept.py reads them again."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary import Writer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

import inside
import keep
import kept
import plot
from grid import Grid

NUMBERS = {100: {"charts/cost_rate": 0.123456, "lagrangian/lambda": 2e-7}, 150: {"charts/cost_rate": 9.0},
           200: {"charts/cost_rate": 0.5, "critic/cost_auc": 0.91}}


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "Task-v0__name__3__1795"
    directory.mkdir()
    (directory / "args.json").write_text(json.dumps({"args": {"env_id": "Task-v0", "exp_name": "name", "seed": 3}}))
    (directory / "episodes.csv").write_text("split,step,environment,return,cost,length\neval,100,0,1.23456,2.0,1000\n"
                                            "train,150,0,9,9,1000\ntrain,200,1,6,7,1000\neval,200,0,-3,0.25,1000\n")
    (directory / "evaluation.csv").write_text(
        "split,step,environment,return,cost,length,balance\neval,200,5,4,7,90,1\n")
    writer = Writer(str(directory))
    for step, values in NUMBERS.items():
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
    writer.close()
    return directory


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_what_is_kept(run, tmp_path):
    """Episodes of evaluations alone, numbers at their steps alone, a gap where nothing was logged."""
    keep.main(keep.Options((run,), tmp_path / "kept"))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        f"Task-v0__name__3_{what}" for what in ("args.json", "episodes.csv", "numbers.csv")]
    assert rows(tmp_path / "kept" / "Task-v0__name__3_episodes.csv") == [
        list(keep.COLUMNS), ["eval", "100", "0", "1.235", "2", "1000"], ["eval", "200", "0", "-3.000", "0.25", "1000"],
        ["final", "200", "5", "4.000", "7", "90"]]
    assert rows(tmp_path / "kept" / "Task-v0__name__3_numbers.csv") == [
        ["step", "charts/cost_rate", "critic/cost_auc", "lagrangian/lambda", "train/cost", "train/return"],
        ["100", "0.1235", "", "2e-07", "", ""], ["200", "0.5", "0.91", "", "8", "7.5"]]
    assert (tmp_path / "kept" / "Task-v0__name__3_args.json").read_text() == (run / "args.json").read_text()


def test_kept_runs_are_rows_of_a_picture(run, tmp_path):
    """What is read from the small files is what plot.py reads from the run, but for its hours: of the speed logged."""
    folder = tmp_path / "kept"
    keep.main(keep.Options((run,), folder))
    name = "Task-v0__name__3"
    text = (folder / f"{name}_numbers.csv").read_text()
    lines = [f"{line},{speed}" for line, speed in zip(text.splitlines(), ("charts/SPS", "2", "5"))]
    (folder / f"{name}_numbers.csv").write_text("\n".join(lines))
    found, expected = plot.read_rows(folder), list(plot.evaluations(run))
    expected[1] |= {"hours": 200 / 5 / 3600, "balance": np.nan}  # that of --evaluate's episodes is not kept
    assert len(found) == len(expected) == 2
    for row, wanted in zip(found, expected):
        names = [wanted.pop(name) for name in ("exp_name", "env_id")]
        assert [row.pop(name) for name in ("exp_name", "env_id")] == names
        assert row == pytest.approx(wanted, rel=1e-3, nan_ok=True)


def test_table_of_kept_runs(run, tmp_path):
    """Beside the system's rows at 300,000 steps, which are told by their label, and the paper's."""
    keep.main(keep.Options((run,), tmp_path / "kept"))
    grids = [Grid("", (), ("Task-v0",), (1, 3), {}, {name: {"label": "Ours, new"}, "other": {"label": "Theirs"}})
             for name in ("name", "before")]
    before = [{"exp_name": "before", "env_id": "Task-v0", "seed": seed, "step": 5, "return": reward, "cost": 2.0 * seed}
              for seed, reward in ((1, 3.0), (2, 4.04))]
    printed = {("Task-v0", "return", "Ours"): ("7.0", "0.5"), ("Task-v0", "cost", "Ours"): ("1.0", "0.1")}
    made = inside.table_of_kept(kept.read_kept(tmp_path / "kept"), grids[0], before, grids[1], printed)
    assert made.splitlines()[2:-2] == ["| Task | Ours, new | 3 | 4.0 [4.0, 4.0] | 7.0 [7.0, 7.0] | 5000 | 1 | "
                                       "3.0, 4.0 / 2.0, 4.0 | 7.0 ± 0.5 / 1.0 ± 0.1 |"]


def test_another_run_of_the_name_is_not_replaced(run, tmp_path):
    """The same run again is; nothing is written for a call that is refused."""
    keep.main(keep.Options((run,), tmp_path / "kept"))
    with pytest.raises(SystemExit, match="another run is Task-v0__name__3"):
        keep.main(keep.Options((run, run), tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").iterdir())
    (run / "evaluation.csv").unlink()
    keep.main(keep.Options((run,), tmp_path / "kept"))
    assert len(rows(tmp_path / "kept" / "Task-v0__name__3_episodes.csv")) == 3
    info = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(info | {"git_commit": "another"}))
    with pytest.raises(SystemExit, match="another run is Task-v0__name__3"):
        keep.main(keep.Options((run,), tmp_path / "kept"))


@pytest.mark.parametrize("missing, says", [("args.json", "is not a run directory"), ("episodes.csv", "no evaluation")])
def test_what_cannot_be_kept(run, tmp_path, missing, says):
    (run / missing).unlink()
    (run / "evaluation.csv").unlink()
    with pytest.raises(SystemExit, match=says):
        keep.main(keep.Options((run,), tmp_path / "kept"))


def test_a_run_judged_where_training_evaluated_nothing(run, tmp_path):
    """It would keep the folder from being read."""
    text = (run / "evaluation.csv").read_text()
    (run / "evaluation.csv").write_text(text.replace("eval,200", "eval,150"))
    with pytest.raises(SystemExit, match="was judged at step 150, at which training evaluated nothing"):
        keep.main(keep.Options((run,), tmp_path / "kept"))
    assert not list((tmp_path / "kept").iterdir())


def test_training_episodes_of_late(run):
    """The mean is over the latest `count` that had ended by then, at equal steps those that stand last."""
    assert keep.training(run, [100, 150, 200], count=1) == {
        "train/cost": {150: 9.0, 200: 7.0}, "train/return": {150: 9.0, 200: 6.0}}
    (run / "episodes.csv").write_text("split,step,return,cost\n" + "train,1,0,900\n" + 100 * "train,2,1,3\n")
    assert keep.training(run, [2]) == {"train/cost": {2: 3.0}, "train/return": {2: 1.0}}  # the pages say: of 100
