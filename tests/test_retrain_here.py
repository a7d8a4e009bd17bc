"""The loop on one machine: the command line trains, compares and decides, and a person reads why."""

import json
import shutil
import signal
import subprocess

import pytest
from conftest import TINY, Project

from skin_lesion.monitoring.retrain import read_record

OPEN = {"retrain.new_labels": "0", "retrain.cooldown_hours": "0", "retrain.automatic": "true"}


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """A copy of the finished project, whose first version is approved."""
    project = Project(tmp_path_factory.mktemp("retrain"))
    shutil.rmtree(project.work)
    shutil.copytree(finished.work, project.work, symlinks=True)
    assert project.cli("approve", "1", "--reason", "first").returncode == 0
    return project


def retrain(project, *words, **settings):
    pairs = TINY | OPEN | {name.replace("__", "."): value for name, value in settings.items()}
    done = project.cli("retrain", *words, "--data-dir", "tiny", *(f"--set={n}={v}" for n, v in pairs.items()))
    return done, read_record(str(project.work / "runs" / "retraining.jsonl"))


def test_a_new_challenger_is_judged_and_the_same_again_changes_nothing(trained):
    done, record = retrain(trained, "--reason", "another seed", train__seed="2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line["event"] for line in record] == ["started", "ended"]
    assert record[0]["reason"]["text"] == "another seed" and record[1]["version"] == 2
    models = {m["version"]: m for m in json.loads(trained.cli("models", "--json").stdout)}
    assert models[2]["status"] == {"promoted": "Approved", "kept": "Rejected"}[record[1]["outcome"]]
    assert models[2]["history"][-1]["reason"] in record[1]["says"]
    assert "frozen test" in record[1]["says"] and record[1]["says"] in done.stdout
    assert list((trained.work / "runs" / "retraining").glob("*/processing/output/report/70_retrain.ipynb"))
    best = max(version for version, m in models.items() if m["status"] == "Approved")
    done, record = retrain(trained, "--reason", "as the champion", train__seed=str(best))
    assert done.returncode == 0 and f"Version {best} again" in record[-1]["says"], record[-1]


def test_a_failing_retrain_says_so_and_the_champion_stays(trained):
    before = trained.cli("models").stdout
    done, record = retrain(trained, "--reason", "too strict", gate__balanced_accuracy_low="0.999", train__seed="3")
    assert done.returncode == 1 and "champion goes on serving" in done.stderr, done.stderr[-2000:]
    assert record[-1]["outcome"] == "failed" and "below" in record[-1]["says"]
    assert trained.cli("models").stdout == before


def test_a_refusal_is_a_result_and_names_the_guard(trained):
    done, record = retrain(trained, "--reason", "no labels came", retrain__new_labels="50")
    assert done.returncode == 0 and "new labels: 0 pictures" in done.stdout and record[-1]["event"] == "refused"
    both = trained.cli("retrain")
    assert both.returncode == 2 and "--reason TEXT or --event FILE" in both.stderr


def test_watch_ends_on_sigterm(project):
    (project.work / "captured").mkdir()
    words = project.command("watch", "--capture", "captured", "--minutes", "10")
    watching = subprocess.Popen(words, cwd=project.work, env=project.env, stdout=subprocess.PIPE, text=True)
    first = watching.stdout.readline()
    assert "round 1: the monitor ended with exit code" in first, first
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(30) == 0 and "stopped after 1 rounds" in watching.stdout.read()
