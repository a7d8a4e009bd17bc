"""The local engine on real processes: where things lie, branches, failures, retries, and the real runner and registry."""

import copy
import json
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
from engine_project import RAW, hits, new_project, processes, statuses, step, training
from test_definition import condition, definition, fail, get, join, json_get, out, parameter, processing

from skin_lesion.execution.definition import PipelineError, local_path
from skin_lesion.execution.engine import run
from skin_lesion.execution.runs import find_run, list_runs, read_state

project = pytest.fixture(new_project)


# -- a run ----------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_lie_where_sagemaker_has_them(project, capsys):
    model = get("Steps.train.ModelArtifacts.S3ModelArtifacts")
    pipeline = definition(
        step("prepare"), training("train", out("prepare"), epochs="2"), step("evaluate", model, out("prepare"))
    )
    result = project.run(pipeline, run_id="run-1", name="test")
    assert (result.status, result.exit_code) == ("Succeeded", 0)
    root, s3 = result.folder / "steps", project.root / "s3/bucket/run-1"
    assert (s3 / "prepare/out.txt").read_text() == "prepareraw" and not (
        root / "prepare/processing/output/out"
    ).exists()
    config = json.loads((root / "prepare/config/processingjobconfig.json").read_text())
    assert config["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"] == "s3://bucket/run-1/prepare"
    assert json.loads((root / "train/input/config/hyperparameters.json").read_text()) == {"epochs": "2"}
    assert (
        json.loads((root / "train/input/config/inputdataconfig.json").read_text())["train"]["TrainingInputMode"]
        == "File"
    )
    assert json.loads((root / "train/input/config/resourceconfig.json").read_text())["current_host"] == "algo-1"
    assert (root / "train/input/data/train").is_symlink() and (
        root / "train/checkpoints"
    ).resolve() == s3 / "checkpoints"
    packed = s3 / "pipelines-run-1-train/output/model.tar.gz"
    with tarfile.open(packed) as tar:
        assert tar.getnames() == ["out.txt", "score.json"] and tar.extractfile("out.txt").read() == b"trainprepareraw"
    assert (root / "evaluate/processing/input/in0/model.tar.gz").resolve() == packed
    printed = capsys.readouterr().out
    assert "prepare | prepare begins" in printed and "train | train begins" in printed
    assert (root / "train/log.txt").read_text() == "train begins\n"


def test_the_state_has_sagemakers_names(project):
    pipeline = definition(step("a"), parameters=[parameter("N", "Integer", 3), parameter("B", "Boolean", True)])
    result = project.run(pipeline, parameters={"N": "4"}, name="test")
    state = json.loads((result.folder / "steps.json").read_text())
    assert state["PipelineName"] == "test" and state["PipelineExecutionStatus"] == "Succeeded"
    assert state["PipelineExecutionArn"].endswith(f"pipeline/test/execution/{result.folder.name}")
    assert state["PipelineParameters"] == [{"Name": "N", "Value": "4"}, {"Name": "B", "Value": "true"}]
    (entry,) = state["PipelineExecutionSteps"]
    assert entry["StepName"] == "a" and entry["StepType"] == "Processing" and entry["StepStatus"] == "Succeeded"
    assert entry["AttemptCount"] == 1 and entry["StartTime"] < entry["EndTime"]
    assert entry["Metadata"]["ProcessingJob"]["Arn"] == entry["Response"]["ProcessingJobArn"]
    assert json.loads((result.folder / "definition.json").read_text()) == pipeline
    assert (project.root / "latest").resolve() == result.folder == find_run(project.root)
    assert [s["PipelineExecutionId"] for s in list_runs(project.root)] == [result.folder.name]
    with pytest.raises(PipelineError, match=f"no run 'nope'.*{result.folder.name}"):
        find_run(project.root, "nope")


def test_nothing_starts_when_something_is_wrong(project):
    foreign = step("a")
    foreign["Arguments"]["AppSpecification"]["ContainerEntrypoint"] = ["python3", "train.py"]
    with pytest.raises(PipelineError, match="skin-lesion step NAME") as error:
        run(definition(foreign, step("b") | {"Type": "Lambda"}), {"Nope": "1"}, project.root)
    assert "no parameter 'Nope'" in str(error.value) and "'Lambda'" in str(error.value)
    with pytest.raises(PipelineError, match="There is no step 'no-such-step'"):
        run(definition(step("no-such-step")), root=project.root)
    expires = step("a") | {"CacheConfig": {"Enabled": True, "ExpireAfter": "30 days"}}
    outside = step("b")
    outside["Arguments"]["ProcessingInputs"][0]["S3Input"]["LocalPath"] = "/data"
    with pytest.raises(PipelineError, match="P30D") as error:
        project.run(definition(expires, outside))
    assert "'/data' is not below /opt/ml" in str(error.value)
    assert not project.began() and not list_runs(project.root)


def test_a_missing_input_names_the_uri_and_the_folder(project):
    (project.root / "s3/bucket/empty").mkdir()
    for uri, word in (("s3://bucket/none", "not there"), ("s3://bucket/empty", "empty"), ("file:///none", "not there")):
        result = project.run(definition(step("a", uri)))
        assert result.status == "Failed" and word in result.state["FailureReason"]
        assert (
            uri in result.state["FailureReason"] and str(local_path(uri, project.root)) in result.state["FailureReason"]
        )
    assert not project.began()


def test_a_file_uri_is_read_in_place(project):
    data = project.work / "data"
    data.mkdir()
    (data / "x.txt").write_text("here")
    assert project.run(definition(step("a", f"file://{data}")), run_id="r").status == "Succeeded"
    assert (project.root / "s3/bucket/r/a/out.txt").read_text() == "ahere" and (data / "x.txt").exists()


def test_a_step_that_leaves_nothing_has_failed(project):
    result = project.run(definition(step("a", leave="nothing", cached=True), step("b", out("a"))))
    assert (
        statuses(result) == {"a": "Failed"} and "left nothing in processing/output/out" in result.state["FailureReason"]
    )
    assert not (project.root / "cache").exists()


# -- conditions and failures ----------------------------------------------------------------------------------------


def gated(score, **extra):
    """a -> gate -> (b -> c) or stop; d waits for b as well."""
    reason = join("", "only ", json_get("a", "score", "m"))
    floor = {"Type": "GreaterThanOrEqualTo", "LeftValue": json_get("a", "score", "m"), "RightValue": 0.5}
    kept = {"Type": "Equals", "LeftValue": get("Parameters.Keep"), "RightValue": "yes"}
    gate = condition("gate", [floor, kept], [step("b", out("a")), step("c", out("b"))], [fail("stop", reason)])
    return definition(
        step("a", score=score), gate, step("d", out("b")), parameters=[parameter("Keep", "String", "yes")], **extra
    )


def test_the_branch_taken_runs(project):
    result = project.run(gated('{"m": 0.7}'))
    assert result.status == "Succeeded" and result.state["SkippedSteps"] == ["stop"]
    assert statuses(result) == dict.fromkeys(["a", "gate", "b", "c", "d"], "Succeeded")
    assert result.step("gate")["Metadata"] == {"Condition": {"Outcome": "True"}}


def test_the_branch_not_taken_is_skipped_with_all_that_hangs_on_it(project):
    result = project.run(gated('{"m": 0.3}'))
    assert result.status == "Failed" and result.exit_code == 1
    assert sorted(result.state["SkippedSteps"]) == ["b", "c", "d"] and project.began() == ["a"]
    assert (
        result.state["FailureReason"]
        == "stop: only 0.3"
        == "stop: " + result.step("stop")["Metadata"]["Fail"]["ErrorMessage"]
    )


def test_all_conditions_must_hold(project):
    assert project.run(gated('{"m": 0.7}'), parameters={"Keep": "no"}).state["FailureReason"] == "stop: only 0.7"


@pytest.mark.parametrize(
    "score, why", [("{", "is not JSON"), ('{"n": 1}', "has nothing at 'm'"), ('{"m": "high"}', "only numbers")]
)
def test_a_property_file_that_does_not_answer_fails_the_condition(project, score, why):
    result = project.run(gated(score))
    assert statuses(result) == {"a": "Succeeded", "gate": "Failed"} and why in result.state["FailureReason"]


def test_a_failure_starts_nothing_new_and_lets_what_runs_end(project):
    pipeline = definition(step("bad", fail="no pixels"), step("slow", sleep="1"), step("later", out("slow")))
    result = project.run(pipeline, parallel=2)
    assert statuses(result) == {"bad": "Failed", "slow": "Succeeded"}
    assert result.state["FailureReason"] == "bad: no pixels" and result.exit_code == 1
    assert not (result.folder / "steps/bad/processing/output/out").exists()


def test_fail_ends_the_run_after_running_steps(project):
    pipeline = definition(step("slow", sleep="1"), fail("stop", "enough"), step("later", out("slow")))
    result = project.run(pipeline, parallel=2)
    assert (
        statuses(result) == {"slow": "Succeeded", "stop": "Failed"} and result.state["FailureReason"] == "stop: enough"
    )


def test_a_full_disk_is_named_and_leaves_nothing_half_written(project):
    small = project.root / "s3/bucket/small"  # a file system of a megabyte, where the runs lie
    shutil.move(project.root, project.work / "kept")
    project.root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", project.root], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        small.mkdir(parents=True)
        (small / "x.txt").write_text("x")
        result = project.run(definition(step("a", "s3://bucket/small", fill="5000000")))
        assert "No space left on device" in result.state["FailureReason"]
        assert read_state(result.folder)["PipelineExecutionStatus"] == "Failed"
        assert not list(project.root.rglob("out.bin*")), "what was half-written makes room again"
    finally:
        subprocess.run(["umount", project.root], check=True)


def test_independent_steps_run_side_by_side_up_to_the_limit(project):
    pipeline = definition(step("a", sleep="0.6"), step("b", sleep="0.6"), step("c", out("a"), out("b")))
    result = project.run(pipeline, parallel=2, run_id="r")
    assert result.status == "Succeeded"
    assert result.step("b")["StartTime"] < result.step("a")["EndTime"]
    assert (project.root / "s3/bucket/r/c/out.txt").read_text() == "carawbraw"
    result = project.run(pipeline)
    assert result.step("b")["StartTime"] >= result.step("a")["EndTime"]


# -- retries --------------------------------------------------------------------------------------------------------


def retried(pipeline_step, *types, **policy):
    return pipeline_step | {
        "RetryPolicies": [
            {"ExceptionType": list(types), "IntervalSeconds": 0.1, "BackoffRate": 2.0, "MaxAttempts": 2} | policy
        ]
    }


def test_a_killed_step_is_tried_again_if_the_policy_says_so(project):
    policy = ("SageMaker.CAPACITY_ERROR", "SageMaker.JOB_INTERNAL_ERROR")
    result = project.run(definition(retried(step("a", kill_times="2"), *policy)))
    assert result.status == "Succeeded" and result.step("a")["AttemptCount"] == 3 and project.began() == ["a"] * 3


def test_retries_are_counted_and_only_for_the_exception_named(project):
    internal = "SageMaker.JOB_INTERNAL_ERROR"
    result = project.run(definition(retried(step("a", kill_times="9"), internal)))
    assert result.step("a")["AttemptCount"] == 3 and "SIGKILL" in result.state["FailureReason"]
    result = project.run(definition(retried(step("b", kill_times="9"), "SageMaker.CAPACITY_ERROR")))
    assert result.step("b")["AttemptCount"] == 1
    result = project.run(definition(retried(step("c", fail="a bug"), internal)))
    assert result.step("c")["AttemptCount"] == 1 and result.state["FailureReason"] == "c: a bug"
    result = project.run(definition(step("d", kill_times="1")))
    assert result.step("d")["AttemptCount"] == 1 and result.status == "Failed"


# -- the real runner, the real registry -----------------------------------------------------------------------------


def real(name, project, *sources):
    """A Processing step whose notebook is a file of the test, run by the real step runner."""
    project.write_notebook(name, *sources)
    nb = json.loads((project.work / f"{name}.ipynb").read_text())
    nb["cells"].insert(
        0,
        {
            "cell_type": "code",
            "id": "p",
            "source": "size: int = 1  # pixels",
            "metadata": {"tags": ["parameters"]},
            "outputs": [],
            "execution_count": None,
        },
    )
    (project.work / f"{name}.ipynb").write_text(json.dumps(nb))
    made = processing(name, [RAW], ["--size", "7"])
    made["Arguments"]["AppSpecification"]["ContainerArguments"][0] = str(project.work / f"{name}.ipynb")
    outputs = made["Arguments"]["ProcessingOutputConfig"]["Outputs"]
    outputs.append(copy.deepcopy(outputs[0]) | {"OutputName": "report"})
    outputs[1]["S3Output"] |= {"S3Uri": f"s3://bucket/report-{name}", "LocalPath": "/opt/ml/processing/output/report"}
    return made | {"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}}


WRITE = "import os, pathlib; root = pathlib.Path(os.environ['SKIN_LESION_ROOT']); (root/'processing/output/out/x.txt').write_text(str(size))"


def test_notebooks_by_the_real_runner(project):
    pipeline = definition(
        real("good", project, WRITE, "print('pixels:', size)"), real("bad", project, "print('so far')", "1 / 0", WRITE)
    )
    result = run(pipeline, root=project.root, run_id="r")
    assert (
        statuses(result) == {"good": "Succeeded", "bad": "Failed"}
        and "ZeroDivisionError" in result.state["FailureReason"]
    )
    assert (project.root / "s3/bucket/r/good/x.txt").read_text() == "7"
    assert "pixels: 7" in (result.folder / "steps/good/log.txt").read_text()
    assert "pixels: 7" in (result.folder / "notebooks/good.ipynb").read_text()
    partial = (result.folder / "notebooks/bad.ipynb").read_text()
    assert "so far" in partial and "ZeroDivisionError" in partial and not (project.root / "s3/bucket/r/bad").exists()
    again = run(definition(pipeline["Steps"][0]), root=project.root)
    assert hits(again) == {"good"} and "pixels: 7" in (again.folder / "notebooks/good.ipynb").read_text()


def test_kill_9_of_the_real_runner_leaves_no_kernel(project):
    result = run(
        definition(
            real(
                "dies",
                project,
                "import os, signal",
                "os.kill(os.getppid(), signal.SIGKILL)",
                "import time; time.sleep(60)",
            )
        ),
        root=project.root,
    )
    assert "killed by SIGKILL" in result.state["FailureReason"] and not processes(project.work)


def test_engine_imports_fast():
    code = "import sys, skin_lesion.execution.engine; print([m for m in ('numpy', 'pandas', 'torch', 'boto3', 'papermill', 'psutil', 'sqlite3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_engine_itself_costs_little(project):
    pipeline = definition(*(step(f"s{i}", cached=True) for i in range(10)))
    project.run(pipeline)
    started = time.perf_counter()
    assert len(hits(project.run(pipeline))) == 10
    assert time.perf_counter() - started < 10 * 0.2


def test_a_model_is_registered_once(project):
    register = {"Name": "model", "Type": "RegisterModel", "Arguments": {
        "ModelPackageGroupName": "g", "ModelApprovalStatus": "PendingManualApproval",
        "InferenceSpecification": {"Containers": [{"Image": "i", "ModelDataUrl": get("Steps.b.ModelArtifacts.S3ModelArtifacts")}]}}}  # fmt: skip
    pipeline = definition(step("a"), training("b", out("a"), package="c0ffee"), register)
    first, second = project.run(pipeline), project.run(pipeline)
    assert second.step("b")["Response"]["TrainingJobName"] != first.step("b")["Response"]["TrainingJobName"]
    arn = second.step("model")["Metadata"]["RegisterModel"]["Arn"]
    assert first.step("model")["Metadata"]["RegisterModel"]["Arn"] == arn and arn.endswith("model-package/g/1")
    assert first.step("model")["Response"]["ModelPackageVersion"] == 1 and (first.folder / "model.tar.gz").exists()
    broken = copy.deepcopy(pipeline)
    del broken["Steps"][1]["Arguments"]["HyperParameters"]["package"]
    result = project.run(broken)
    assert "is not a model package" in result.state["FailureReason"] and not (result.folder / "model.tar.gz").exists()
