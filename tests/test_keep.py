"""benchmark/keep.py: the two csv files of a run say what its own files say."""
import csv
import json
import sys
from pathlib import Path

import pytest
from tensorboard.summary import Writer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

import keep

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


def test_training_episodes_of_late(run):
    """The mean is over the latest `count` that had ended by then, at equal steps those that stand last."""
    assert keep.training(run, [100, 150, 200], count=1) == {
        "train/cost": {150: 9.0, 200: 7.0}, "train/return": {150: 9.0, 200: 6.0}}
    (run / "episodes.csv").write_text("split,step,return,cost\n" + "train,1,0,900\n" + 100 * "train,2,1,3\n")
    assert keep.training(run, [2]) == {"train/cost": {2: 3.0}, "train/return": {2: 1.0}}  # the pages say: of 100
