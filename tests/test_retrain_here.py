"""The loop on one machine: the command line trains, compares and decides, and a person reads why."""

import json
import shutil
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from conftest import TINY, Project, Served, colours_package

from skin_lesion.cloud.deploy import (
    approved,
    deploy_locally,
    http_invoke,
    read_endpoint,
    smoke_pictures,
    teardown_locally,
)
from skin_lesion.cloud.registry import approve, register
from skin_lesion.execution.retrain import serve_promoted
from skin_lesion.monitoring.example import write_example
from skin_lesion.monitoring.retrain import read_record
from skin_lesion.serving.package import pack
from skin_lesion.settings import load_settings

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


@pytest.mark.slow  # three trainings
def test_a_new_challenger_is_judged_and_the_same_again_changes_nothing(trained):
    before = len(json.loads(trained.cli("models", "--json").stdout))  # other tests register, too
    done, record = retrain(trained, "--reason", "another seed", train__seed="2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line["event"] for line in record] == ["started", "ended"]
    assert record[0]["reason"]["text"] == "another seed" and record[1]["version"] == before + 1
    models = {m["version"]: m for m in json.loads(trained.cli("models", "--json").stdout)}
    assert models[before + 1]["status"] == {"promoted": "Approved", "kept": "Rejected"}[record[1]["outcome"]]
    assert models[before + 1]["history"][-1]["reason"] in record[1]["says"]
    assert "frozen test" in record[1]["says"] and record[1]["says"] in done.stdout
    assert list((trained.work / "runs" / "retraining").glob("*/processing/output/report/70_retrain.ipynb"))
    best = max(version for version, m in models.items() if m["status"] == "Approved")
    done, record = retrain(trained, "--reason", "as the champion", train__seed=str(best))
    assert done.returncode == 0 and f"weights of version {best}, the champion, again" in record[-1]["says"], record[-1]


def test_a_failing_retrain_says_so_and_the_champion_stays(project):
    (project.work / "tiny").mkdir()  # a data set without its tables
    before = project.cli("models").stdout
    done, record = retrain(project, "--reason", "new pictures")
    assert done.returncode == 1 and "champion goes on serving" in done.stderr, done.stderr[-2000:]
    assert [line["event"] for line in record] == ["started", "ended"]
    assert record[-1]["outcome"] == "failed" and "prepare" in record[-1]["says"], record[-1]
    assert project.cli("models").stdout == before


def test_a_refusal_is_a_result_and_names_the_guard(project):
    (project.work / "tiny").mkdir()
    done, record = retrain(project, "--reason", "no labels came", retrain__new_labels="50")
    assert done.returncode == 0 and "new labels: 0 pictures" in done.stdout and record[-1]["event"] == "refused"
    assert not list((project.work / "runs").glob("*/steps.json"))
    both = project.cli("retrain")
    assert both.returncode == 2 and "--reason TEXT or --event FILE" in both.stderr


def test_what_was_promoted_serves_where_an_endpoint_runs(tmp_path):
    settings = load_settings({"local.runs": str(tmp_path / "runs")}, environ={})
    root, endpoint = tmp_path / "runs", tmp_path / "runs" / "endpoints" / "skin-lesion"
    for number in (1, 2):
        folder = colours_package(tmp_path / f"package{number}")
        (folder / "evaluation.json").write_text(json.dumps({"number": number}))
        register(pack(folder, tmp_path / f"{number}.tar.gz"), {"ModelPackageGroupName": "skin-lesion"}, root)
        approve(root, number, reason="for this test")
    first = deploy_locally(approved(root, "skin-lesion", 1), endpoint)
    try:
        assert serve_promoted({"outcome": "kept", "version": 2}, settings) is None
        assert read_endpoint(endpoint) == first
        time.sleep(1.1)  # a server's log is named by the second of its start
        assert serve_promoted({"outcome": "promoted", "version": 2}, settings)["version"] == 2
        status, answer = http_invoke(read_endpoint(endpoint)["address"])(smoke_pictures()[0], "image/jpeg")
        assert (status, len(answer["predictions"])) == (200, 1)
    finally:
        teardown_locally(endpoint)


def test_watch_hands_addresses_on_and_ends_on_sigterm(project):
    words = project.command("watch", "--capture", "s3://No Bucket/capture", "--minutes", "10")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    watching = subprocess.Popen(words, cwd=project.work, env=project.env, **pipes)
    first = watching.stdout.readline()
    assert "round 1: the monitor ended with exit code 1" in first, first
    watching.send_signal(signal.SIGTERM)
    said, why = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "stopped after 1 rounds" in said
    assert "'s3://No Bucket/capture' is no address" in why, why  # said by the round's monitor, which would fetch it


def watched(project, until, *words, seconds=280):
    """The lines of a watch, which is ended when one of them says `until`."""
    command = project.command("watch", "--minutes", "10", *words)
    watching = subprocess.Popen(
        command, cwd=project.work, env=project.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(seconds, watching.terminate)  # which ends what it started, too
    timer.start()
    lines = []
    for line in watching.stdout:
        lines.append(line)
        if until in line or "no reason to retrain" in line:
            watching.send_signal(signal.SIGTERM)
    timer.cancel()
    assert watching.wait(30) == 0 and any(until in line for line in lines), "".join(lines)[-3000:]
    return lines


def test_watch_takes_a_lasting_alarm_to_the_guards_and_tells_their_refusal(project):
    """The real monitor on captured requests that are out of focus; the last retraining is an hour old."""
    example = write_example(project.work / "example", days=2, blurred=2, lesions=110)
    root = project.work / "runs"
    register(example / "package" / "model.tar.gz", {"ModelPackageGroupName": "skin-lesion"}, root)
    approve(root, 1, reason="for this test")
    hour = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    started = {"time": hour, "id": "before", "event": "started", "labels": 0}
    ended = {"time": hour, "id": "before", "event": "ended", "outcome": "kept", "says": "no better"}
    (root / "retraining.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (started, ended)))
    data = ("--data-dir", example / "sample")
    loose = ("--set", "retrain.new_labels=0", "--set", "train.epochs=1")
    lines = watched(project, "not retrained", "--capture", example / "capture", *loose, *data, seconds=120)
    assert any("round 1: drift: drift that lasts: " in line and "sharpness" in line for line in lines), lines
    refused = read_record(str(root / "retraining.jsonl"))[-1]
    assert (
        refused["event"] == "refused"
        and refused["reason"]["kind"] == "drift"
        and refused["reason"]["by"] == "skin-lesion"
    )
    assert "cool-down: the last one ended 1.0 h ago, 72 h must have passed" in refused["says"]
    assert not list(root.glob("*/steps.json"))


@pytest.mark.slow  # two trainings
@pytest.mark.timeout(900)
def test_watch_retrains_on_what_a_server_captured_and_the_frozen_test_stays(project):
    """A server captures blurred requests, their diagnoses come back, and `watch` finds the drift and trains on them, too."""
    sample = ("--set=data.validation_share=0.4", "--set=data.test_share=0.2", "--set=monitoring.window_hours=0.0006")
    for folder, lesions, seed in (("raw/sample", 150, 1), ("clinic", 60, 2)):
        made = project.cli("data", "sample", "--out", folder, "--lesions", lesions, "--seed", seed)
        assert made.returncode == 0, made.stderr
    done = project.cli(*project.tiny_run("--data-dir", "raw/sample", *sample[:2], data__image_size="64"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert project.cli("approve", "1", "--reason", "first").returncode == 0
    frozen = json.loads((project.work / "runs" / "latest" / "split_proof.json").read_text())
    captured = ("--capture", str(project.work / "captured"), "--set", "serving.capture_pictures=true")
    with Served(project.work / "runs" / "latest" / "model.tar.gz", *captured) as server:
        send = ("simulate", server.url, "clinic", "--rate", "25", "--seconds", "10", "--drift", "blur")
        sent = project.cli(*send, "--dataset", "sample", "--labels", "labels.jsonl")
        assert sent.returncode == 0 and "200: 250" in sent.stdout, sent.stdout + sent.stderr
    pairs = TINY | OPEN | {"data.dataset": "sample,captured", "data.image_size": "64"}
    places = ("--capture", "captured", "--labels", "labels.jsonl", "--data-dir", "raw")
    words = [*places, *sample, *(f"--set={name}={value}" for name, value in pairs.items())]
    lines = watched(project, "Version 2 ", *words, seconds=600)
    assert any("round 1: drift: " in line for line in lines), lines
    [started, ended] = read_record(str(project.work / "runs" / "retraining.jsonl"))
    assert started["reason"]["kind"] == "drift" and started["labels"] == 250
    assert ended["version"] == 2 and "newest window: " in ended["says"] and "not compared" not in ended["says"], ended
    again = json.loads((project.work / "runs" / "latest" / "split_proof.json").read_text())
    for part in ("validation", "test"):
        assert again["sha256"][part] == frozen["sha256"][part], part
    assert again["images"]["train"] > frozen["images"]["train"] and set(again["shared"].values()) == {0}
    evaluation = json.loads((project.work / "runs" / "latest" / "evaluation.json").read_text())
    assert evaluation["model"]["dataset"] == "sample,captured" and evaluation["synthetic"]
