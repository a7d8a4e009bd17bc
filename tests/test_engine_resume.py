"""Runs of the local engine that failed, were killed or stopped, and go on where they were."""

import copy
import json
import signal
import tarfile

import pytest
from engine_project import new_project, processes, statuses, step, training, wait_for
from test_definition import definition, get, out, parameter

from skin_lesion.execution.definition import PipelineError, local_path
from skin_lesion.execution.runs import read_state

project = pytest.fixture(new_project)


def test_resume_repeats_no_finished_step_after_a_failure(project):
    pipeline = definition(step("a"), step("b", out("a")))
    (project.root / "s3/bucket/raw/raw.txt").rename(project.work / "kept")
    (project.root / "s3/bucket/raw/score.json").write_text("{}")
    broken = copy.deepcopy(pipeline)
    broken["Steps"][1]["Arguments"]["ProcessingInputs"][0]["S3Input"]["S3Uri"] = "s3://bucket/late"
    first = project.run(broken, run_id="r")
    assert statuses(first) == {"a": "Succeeded", "b": "Failed"}
    late = project.root / "s3/bucket/late"
    late.mkdir()
    (late / "late.txt").write_text("late")
    second = project.run(None, resume=True)
    assert second.status == "Succeeded" and "FailureReason" not in second.state and project.began() == ["a", "b"]
    assert second.step("a") == first.step("a") and second.step("b")["AttemptCount"] == 2
    assert project.run(None, resume=True, run_id="r").status == "Succeeded" and project.began() == ["a", "b"]


def test_a_run_is_resumed_as_it_was_begun(project):
    pipeline = definition(step("a"), parameters=[parameter("N", "Integer", 1)])
    project.run(pipeline, run_id="r")
    assert project.run(pipeline, run_id="r", resume=True, parameters={"N": "1"}).status == "Succeeded"
    for other in ({"parameters": {"N": "2"}}, {"parameters": {"M": "1"}}):
        with pytest.raises(PipelineError, match="started with another value of"):
            project.run(pipeline, run_id="r", resume=True, **other)
    with pytest.raises(PipelineError, match="the definition"):
        project.run(definition(step("b")), run_id="r", resume=True)
    with pytest.raises(PipelineError, match="is there already"):
        project.run(pipeline, run_id="r")
    with pytest.raises(PipelineError, match="inner hyphens"):
        project.run(pipeline, run_id="../r")


def slow_chain():
    return definition(
        step("a"), training("b", out("a"), checkpoint="0.05"), step("c", get("Steps.b.ModelArtifacts.S3ModelArtifacts"))
    )


def checkpoint(project):
    file = project.root / "s3/bucket/r/checkpoints/steps"
    return int(file.read_text() or 0) if file.exists() else 0


def test_kill_9_of_the_engine_then_resume(project):
    engine = project.engine(slow_chain(), run_id="r")
    wait_for(lambda: checkpoint(project) > 3)
    (project.root / "r/steps/b/model/stale.txt").write_text("half-written")
    engine.kill()
    engine.wait()
    assert read_state(project.root / "r")["PipelineExecutionStatus"] == "Stopped"
    assert processes(project.work), "this program does not watch its parent: it is an orphan"
    orphans = {p.pid for p in processes(project.work)}
    result = project.run(None, run_id="r", resume=True)
    assert result.status == "Succeeded" and project.began() == ["a", "b", "b", "c"]
    assert not orphans & {p.pid for p in processes(project.work)}, "the orphan was ended first"
    log = (result.folder / "steps/b/log.txt").read_text()
    assert "from 0" in log and int(log.split("from ")[2].split()[0]) > 3, "went on from the checkpoint"
    with tarfile.open(
        local_path(result.step("b")["Response"]["ModelArtifacts"]["S3ModelArtifacts"], project.root)
    ) as tar:
        assert tar.getnames() == ["out.txt", "score.json"], "nothing stale was packed"


def test_kill_9_of_a_step_then_resume(project):
    pipeline = slow_chain()
    pipeline["Steps"][1]["Arguments"]["HyperParameters"]["child"] = "1"  # it leaves a process behind, killed or not
    engine = project.engine(pipeline, run_id="r")
    wait_for(lambda: checkpoint(project) > 3)
    min(processes(project.work), key=lambda p: p.create_time()).kill()
    assert engine.wait(30) == 1
    state = json.loads((project.root / "r/steps.json").read_text())
    assert state["PipelineExecutionStatus"] == "Failed" and "killed by SIGKILL" in state["FailureReason"]
    assert not processes(project.work), "what the step had started is gone too"
    result = project.run(None, run_id="r", resume=True)
    assert result.status == "Succeeded" and project.began() == ["a", "b", "b", "c"]
    assert not processes(project.work)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes(project, number, code):
    engine = project.engine(slow_chain(), run_id="r")
    wait_for(lambda: checkpoint(project) > 3)
    engine.send_signal(number)
    assert engine.wait(30) == code
    state = json.loads((project.root / "r/steps.json").read_text())
    assert state["PipelineExecutionStatus"] == "Stopped"
    assert [s["StepStatus"] for s in state["PipelineExecutionSteps"]] == ["Succeeded", "Stopped"]
    assert (project.root / "s3/bucket/r/checkpoints/stopped").exists(), "the step had time to write a checkpoint"
    result = project.run(None, run_id="r", resume=True)
    assert result.status == "Succeeded" and project.began() == ["a", "b", "b", "c"]
    assert not processes(project.work)


def test_two_engines_never_work_on_one_run(project):
    engine = project.engine(definition(step("a", sleep="60")), run_id="r")
    wait_for(lambda: project.began() == ["a"])
    with pytest.raises(PipelineError, match=f"being worked on by process {engine.pid}"):
        project.run(None, run_id="r", resume=True)
    assert read_state(project.root / "r")["PipelineExecutionStatus"] == "Executing"
    engine.terminate()
    assert engine.wait(30) == 143
