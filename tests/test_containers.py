"""Jobs in containers: the engine with real podman and an image of one shell, beside the same program as a process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_definition import definition, fail, get, out, parameter, processing
from test_images_build import podman  # noqa: F401, a fixture

from skin_lesion.execution.cache import code_hash
from skin_lesion.execution.containers import check_image, end_container
from skin_lesion.execution.definition import PipelineError, local_path
from skin_lesion.execution.engine import run
from skin_lesion.execution.local import load_definition

IMAGE = "localhost/skin-lesion-shell"
# `skin-lesion step NAME [WORD]`: copies its inputs to its output, and says in what it ran.
PROGRAM = """#!/bin/sh
cd ${SKIN_LESION_ROOT:-/opt/ml}
echo "$2 begins"
case $3 in
killed) if [ ! -e checkpoints/tried ]; then touch checkpoints/tried; exit 137; fi;;
sleep) trap 'echo stopped; exit 143' TERM; while true; do date +%s%N > checkpoints/beat; sleep .1; done;;
esac
for made in processing/output/out model; do
    if [ -d $made ]; then cat processing/input/*/*.txt input/data/*/*.txt > $made/out.txt 2> /dev/null; echo "$2 $3 $WORD" >> $made/out.txt; fi
done
ls /sys/class/net; id -u; grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status
cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2> /dev/null
echo host=$TEST_OF_THE_HOST
if [ -z "$TEST_OF_THE_HOST" ]; then for input in processing/input/*; do touch $input/written && echo "$input can be written"; done; fi
true
"""
RUN = "import json, sys\nfrom pathlib import Path\nfrom test_containers import start\nsys.exit(start(Path(sys.argv[1]), json.loads(sys.argv[2])).exit_code)"


NOTEBOOK = '{"cells": []}'  # of every step


@pytest.fixture(scope="module")
def shell(podman, tmp_path_factory):  # noqa: F811
    """The image IMAGE; podman as the engine starts it."""
    busybox = shutil.which("busybox")
    if not busybox or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        pytest.skip("a static busybox, which the image is made of, is not on this machine (busybox-static)")
    folder = tmp_path_factory.mktemp("image")
    (folder / "bin").mkdir()
    shutil.copy(busybox, folder / "bin" / "busybox")
    for name in ("sh", "cat", "ls", "id", "grep", "touch", "date", "sleep"):
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "notebook.ipynb").write_text(NOTEBOOK)
    asked = (
        f"#!/bin/sh\nshift 2\nfor name; do echo {code_hash(folder / 'notebook.ipynb')}; done\n"  # what check_image asks
    )
    for name, text in {"skin-lesion": PROGRAM, "python3": asked}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    subprocess.run(["tar", "-C", folder, "-cf", folder / "image.tar", "bin"], check=True)
    podman("import", folder / "image.tar", IMAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", podman.env["CONTAINERS_CONF"])
        patch.setenv("TEST_OF_THE_HOST", "seen")
        yield podman
    podman("image", "rm", IMAGE)


def job(name, *inputs, word="", **extra):
    step = processing(name, inputs, [word], **extra)
    step["Arguments"]["AppSpecification"]["ImageUri"] = get("Parameters.ImageUri")
    return (
        step["Arguments"].update(NetworkConfig={"EnableNetworkIsolation": True}, Environment={"WORD": "nevus"}) or step
    )


def training(source):
    channel = {"ChannelName": "in", "DataSource": {"S3DataSource": {"S3Uri": source}}}
    image = {"TrainingImage": get("Parameters.ImageUri"), "ContainerEntrypoint": ["skin-lesion", "step"]}
    arguments = {"AlgorithmSpecification": image | {"ContainerArguments": ["train"]}, "InputDataConfig": [channel]}
    arguments |= {"EnableNetworkIsolation": True, "CheckpointConfig": {"S3Uri": "s3://bucket/checkpoints"}}
    return {
        "Name": "train",
        "Type": "Training",
        "Arguments": arguments | {"OutputDataConfig": {"S3OutputPath": "s3://bucket/models"}},
    }


PIPELINE = [job("prepare", "s3://bucket/raw"), training(out("prepare")), job("evaluate", out("prepare"))]


def start(folder, steps, **options):
    """Runs the steps with `folder` as its runs; as processes unless told otherwise."""
    (folder / "notebook.ipynb").write_text(options.pop("notebook", NOTEBOOK))
    (folder / "program").write_text(PROGRAM)
    raw = local_path("s3://bucket/raw", folder)
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "raw.txt").write_text("raw\n")
    pipeline = definition(*steps, parameters=[parameter("ImageUri", "String", IMAGE)])
    command = lambda words: ["sh", str(folder / "program"), *words[1:]]
    options = {"containers": True} | options
    return run(pipeline, root=folder, command=command, notebook=lambda words: folder / "notebook.ipynb", **options)


def results(result):
    """Key and bytes of each step's output."""
    files = {p.relative_to(result.root / "s3"): p for p in (result.root / "s3").rglob("*") if p.is_file()}
    ours = {str(k).replace(result.folder.name, "RUN"): p.read_bytes() for k, p in files.items()}
    return {s.name: result.step(s.name)["CacheKey"] for s in result.steps}, ours


def test_a_pipeline_in_containers_has_the_bytes_of_the_same_in_processes(shell, tmp_path):
    for name in ("processes", "containers"):
        (tmp_path / name).mkdir()
    here = start(tmp_path / "processes", PIPELINE, containers=False)
    there = start(tmp_path / "containers", PIPELINE)
    assert (here.status, there.status) == ("Succeeded", "Succeeded"), there.state
    assert results(here)[1] == results(there)[1]
    assert not set(results(here)[0].values()) & set(results(there)[0].values())  # none stands in for the other
    assert any(b"raw\nprepare  nevus\nevaluate  nevus\n" == text for text in results(there)[1].values())
    log = (there.folder / "steps" / "prepare" / "log.txt").read_text()
    lines = log.splitlines()
    assert lines[0] == "prepare begins" and "lo" in lines and "eth0" not in lines  # no network but its own
    assert "0" in lines and "CapEff:\t0000000000000000" in lines and "NoNewPrivs:\t1" in lines  # root in name only
    assert any(line.isdigit() and 1e8 < int(line) < 1e13 for line in lines)  # bytes at most
    assert (
        "host=" in lines and "can be written" not in log
    )  # nothing of this process's environment; inputs are only read


def test_a_result_is_that_of_one_image_and_an_image_of_another_code_is_refused(shell, tmp_path):
    cached = job("prepare", "s3://bucket/raw") | {"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}}
    first, second = (start(tmp_path, [cached]) for _ in range(2))
    assert "CacheHitResult" not in first.step("prepare") and "CacheHitResult" in second.step("prepare")
    assert "CacheHitResult" not in start(tmp_path, [cached], containers=False).step("prepare")
    name = shell("create", "--pull=never", IMAGE, "true").stdout.strip()
    shell("commit", "--change=LABEL again=1", name, IMAGE)  # built again
    shell("rm", name)
    assert "CacheHitResult" not in start(tmp_path, [cached]).step("prepare")
    changed = json.dumps({"cells": [{"cell_type": "code", "source": ["1"], "metadata": {}}]})
    with pytest.raises(PipelineError, match=f"The image {IMAGE} holds another code of prepare .* podman build"):
        start(tmp_path, [cached], notebook=changed)


def test_a_container_that_was_killed_is_tried_again_by_the_policy_of_the_step(shell, tmp_path):
    policy = {"ExceptionType": ["SageMaker.JOB_INTERNAL_ERROR"], "IntervalSeconds": 0, "MaxAttempts": 2}
    step = training("s3://bucket/raw")
    step["Arguments"]["AlgorithmSpecification"]["ContainerArguments"] += ["killed"]
    result = start(tmp_path, [step | {"RetryPolicies": [policy]}])
    assert result.status == "Succeeded" and result.step("train")["AttemptCount"] == 2


def asleep(folder):
    """An engine in a process of its own, whose only job sleeps in a container; waits until it does."""
    step = training("s3://bucket/raw")
    step["Arguments"]["AlgorithmSpecification"]["ContainerArguments"] += ["sleep"]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", RUN, str(folder), json.dumps([step])]
    engine = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    beat, end = local_path("s3://bucket/checkpoints", folder) / "beat", time.monotonic() + 30
    while not beat.exists():
        assert engine.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    return engine, step, beat


def running(podman):  # noqa: F811
    """The ids of the containers of IMAGE."""
    return podman("ps", "--quiet", "--no-trunc", f"--filter=ancestor={IMAGE}").stdout.split()


def test_a_stop_reaches_the_step_in_its_container(shell, tmp_path):
    engine, _, _ = asleep(tmp_path)
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(30) == 128 + signal.SIGTERM
    log = (tmp_path / "latest/steps/train/log.txt").read_text()
    assert log.splitlines()[-1] == "stopped"
    assert running(shell) == []


def test_the_container_of_a_killed_engine_is_ended_before_the_run_goes_on(shell, tmp_path):
    engine, step, beat = asleep(tmp_path)
    engine.kill()
    engine.wait()
    root = tmp_path / "latest" / "steps" / "train"
    assert running(shell) == [(root / "container").read_text()]  # it runs on
    end_container(root)  # what the engine does first when the run is resumed, as processes or in containers
    assert running(shell) == [] and not (root / "container").exists()
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


def test_what_cannot_run_is_said_before_anything_starts(shell, tmp_path, monkeypatch):
    networked = job("prepare", "s3://bucket/raw")
    del networked["Arguments"]["NetworkConfig"]
    with pytest.raises(PipelineError, match="step prepare: its job needs a network"):
        start(tmp_path, [networked])
    with pytest.raises(PipelineError, match="its job needs a network"):
        run(load_definition("deploy"), root=tmp_path, containers=True)
    with pytest.raises(PipelineError, match="localhost/nowhere is not on this machine. Build it .*podman build"):
        start(tmp_path, PIPELINE, parameters={"ImageUri": "localhost/nowhere"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="podman, which runs the containers, is not on this machine"):
        start(tmp_path, PIPELINE)
    assert not [p for p in tmp_path.iterdir() if (p / "steps.json").exists()]


def test_a_pipeline_without_jobs_needs_no_image(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="podman"):
        check_image(IMAGE, {})
    assert start(tmp_path, [fail("end", "as asked")]).state["FailureReason"] == "end: as asked"
