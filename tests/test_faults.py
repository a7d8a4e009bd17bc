"""Kills, full disks and bad input: what a run loses (nothing), and what a person is told."""

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

STEPS = ("prepare", "train", "evaluate", "register")


@pytest.fixture
def sampled(project):
    """A project with a tiny sample to run on."""
    assert project.cli("data", "sample", "--out", "tiny", "--lesions", "40").returncode == 0
    return project


def start(project, *words) -> subprocess.Popen:
    with open(project.work / "engine.log", "ab") as log:
        return subprocess.Popen(project.command(*words), cwd=project.work, env=project.env, stdout=log, stderr=log)


def state(run: Path) -> dict:
    return {s["StepName"]: s for s in json.loads((run / "steps.json").read_text())["PipelineExecutionSteps"]}


def wait_for(condition, process, seconds=120):
    """Waits until the condition holds; fails when the process ends before it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (OSError, ValueError, KeyError, StopIteration):
            pass
        assert process.poll() is None, "the run ended before the moment to kill it"
        time.sleep(0.05)
    raise AssertionError("the moment to kill it never came")


def runners(project):
    """The processes of steps, by name: the runner that the engine has started."""
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "skin_lesion.execution.step" in words and process.environ().get("PYTHONPATH") == str(project.code):
                found[words[words.index("skin_lesion.execution.step") + 1]] = process
        except (psutil.Error, OSError):
            pass
    return found


def results(run: Path) -> tuple[dict, bytes]:
    """All figures of a run, and its weights."""
    with tarfile.open(run / "model.tar.gz") as package:
        weights = package.extractfile("model.safetensors").read()
    return json.loads((run / "evaluation.json").read_text()), weights


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["engine", pytest.param("step", marks=pytest.mark.slow)])
def test_kill_9_in_each_step_then_resume_ends_with_the_same_metrics(sampled, finished, victim):
    """One run, killed once inside each of its four steps, against one that was never killed."""
    run = sampled.work / "runs" / "latest"
    process = start(sampled, *sampled.tiny_run("--data-dir", "tiny"))
    finished_before = {}
    for name in STEPS:
        notebook = {"train": "output/data", "evaluate": "processing/output/report"}.get(name)
        wait_for(lambda name=name: state(run)[name]["StepStatus"] == "Executing" and name in runners(sampled), process)
        if notebook:  # deep inside the step: its notebook is on disk, some cells executed
            wait_for(
                lambda name=name, notebook=notebook: next((run / "steps" / name / notebook).glob("*.ipynb")), process
            )
        if victim == "engine":
            process.kill()
        else:
            runners(sampled)[name].kill()
        assert process.wait(60) != 0
        if victim == "step":
            assert "SIGKILL" in state(run)[name]["FailureReason"]
        for done, ended in finished_before.items():
            assert state(run)[done]["EndTime"] == ended, f"{done} was repeated"
        finished_before = {n: s["EndTime"] for n, s in state(run).items() if s["StepStatus"] == "Succeeded"}
        process = start(sampled, "run", "training", "--resume")
    assert process.wait(200) == 0, (sampled.work / "engine.log").read_text()[-3000:]
    for done, ended in finished_before.items():
        assert state(run)[done]["EndTime"] == ended, f"{done} was repeated"
    never_killed = finished.work / "runs" / sorted(p.name for p in (finished.work / "runs").glob("2*"))[0]
    assert results(run) == results(never_killed)
    assert not runners(sampled), "a step's process outlived its run"


def test_a_damaged_picture_stops_prepare_and_is_named(sampled):
    picture = next(iter(sorted((sampled.work / "tiny/images").iterdir())))
    picture.write_bytes(picture.read_bytes()[:200])
    done = sampled.cli(*sampled.tiny_run("--data-dir", "tiny"))
    assert done.returncode == 1 and picture.stem in done.stdout
    run = sampled.work / "runs/latest"
    assert state(run)["prepare"]["StepStatus"] == "Failed" and (run / "notebooks/10_prepare.ipynb").exists()
    assert not list((sampled.work / "runs/s3").rglob("shards.json")), "nothing half-written is taken for whole"
    process = start(sampled, *sampled.tiny_run("--data-dir", "tiny", "--allow-missing"))
    wait_for(lambda: state(sampled.work / "runs/latest")["train"]["StepStatus"] == "Executing", process)
    process.terminate()
    process.wait(60)


def test_a_missing_column_is_named_with_those_found(sampled):
    table = sampled.work / "tiny/metadata.csv"
    pd.read_csv(table).drop(columns="lesion_id").to_csv(table, index=False)
    done = sampled.cli(*sampled.tiny_run("--data-dir", "tiny"))
    assert done.returncode == 1 and "lesion_id" in done.stdout and "expected" in done.stdout


def test_a_missing_file_needs_allow_missing(sampled):
    next(iter(sorted((sampled.work / "tiny/images").iterdir()))).unlink()
    done = sampled.cli(*sampled.tiny_run("--data-dir", "tiny"))
    assert done.returncode == 1 and "--allow-missing" in done.stdout


def test_a_parameter_that_no_pipeline_has_is_refused_before_anything_starts(sampled):
    done = sampled.cli(*sampled.tiny_run("--data-dir", "tiny", train__epochs="two"))
    assert done.returncode != 0 and "whole number" in done.stderr
    assert not (sampled.work / "runs").exists() or not list((sampled.work / "runs").glob("2*"))


def test_a_full_disk_says_so_and_leaves_nothing_whole(sampled, tmp_path):
    """The run's folder on a file system of a few megabytes."""
    small = sampled.work / "runs"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        done = sampled.cli(*sampled.tiny_run("--data-dir", "tiny", data__image_size="128"))
        assert done.returncode == 1 and "space" in done.stdout + done.stderr
        assert not list(small.rglob("s3/*/shards.json")) and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_stop_signal_leaves_a_run_that_resumes(sampled):
    process = start(sampled, *sampled.tiny_run("--data-dir", "tiny", train__epochs="5"))
    run = sampled.work / "runs" / "latest"
    wait_for(lambda: (run / "steps/train/checkpoints/last.pt").exists(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert state(run)["train"]["StepStatus"] == "Stopped" and not runners(sampled)
    resumed = sampled.cli("run", "training", "--resume", timeout=280)
    assert resumed.returncode == 0, resumed.stdout[-2000:]
    assert "resumed at epoch" in resumed.stdout


def test_two_engines_never_work_on_one_run(sampled):
    process = start(sampled, *sampled.tiny_run("--data-dir", "tiny"))
    try:
        wait_for(lambda: state(sampled.work / "runs/latest")["prepare"]["StepStatus"] == "Executing", process)
        second = sampled.cli("run", "training", "--resume")
        assert second.returncode == 1 and "being worked on" in second.stderr
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
