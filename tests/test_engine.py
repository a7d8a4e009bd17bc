"""The local engine on real processes: small programs in place of the notebooks, and the real runner where it matters."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from test_definition import condition, definition, fail, get, join, json_get, out, parameter, processing

from skin_lesion.execution import cache
from skin_lesion.execution.definition import PipelineError, local_path
from skin_lesion.execution.engine import run
from skin_lesion.execution.runs import find_run, list_runs, read_state

# A step's program. It notes its start, does what its options say, and leaves an output made of its inputs.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
name, root, work = sys.argv[1], Path(os.environ["SKIN_LESION_ROOT"]), Path(os.environ["TEST_WORK"])
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
hyper = root/"input/config/hyperparameters.json"
if hyper.exists(): options |= {f"--{k}": v for k, v in json.loads(hyper.read_text()).items()}
with open(work/"began", "a") as f: f.write(f"{name} {time.time()}\\n")
print(f"{name} begins", flush=True)
def stop(number, frame):
    (root/"checkpoints").mkdir(exist_ok=True)
    (root/"checkpoints/stopped").write_text("1")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if "--child" in options: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
if "--checkpoint" in options:
    steps = root/"checkpoints/steps"
    done = int(steps.read_text()) if steps.exists() else 0
    print(f"from {done}", flush=True)
    for i in range(done, 40):
        steps.write_text(str(i + 1))
        time.sleep(float(options["--checkpoint"]))
time.sleep(float(options.get("--sleep", 0)))
if "--fail" in options:
    (root/"output").mkdir(exist_ok=True)
    (root/"output/failure").write_text(options["--fail"])
    sys.exit(1)
if "--kill-times" in options and len([l for l in open(work/"began") if l.startswith(name + " ")]) <= int(options["--kill-times"]):
    os.kill(os.getpid(), signal.SIGKILL)
made = root/("model" if hyper.exists() else "processing/output/out")
if "--fill" in options: (made/"out.bin").write_bytes(bytes(int(options["--fill"])))
if options.get("--leave") != "nothing":
    files = sorted(p for folder in (root/"processing/input", root/"input/data") for p in folder.glob("*/*"))
    (made/"out.txt").write_text(name + "".join(p.read_text() for p in files if p.suffix == ".txt"))
    (made/"score.json").write_text(options.get("--score", '{"m": 1}'))
    if "--package" in options:
        (made/"model.json").write_text(json.dumps({"provenance": {"git_commit": options["--package"]}}))
        (made/"evaluation.json").write_text('{"balanced_accuracy": {"low": 0.6}}')
"""

ENGINE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_engine import Project
result = Project(sys.argv[2]).run(json.loads(sys.argv[3]), **json.loads(sys.argv[4]))
sys.exit(result.exit_code)
"""


class Project:
    """A working folder with a program that stands for all steps, and a notebook a step, which the cache reads."""

    def __init__(self, work):
        self.work, self.root = Path(work), Path(work) / "runs"
        os.environ["TEST_WORK"] = str(self.work)

    def make(self):
        (self.work / "program.py").write_text(PROGRAM)
        raw = local_path("s3://bucket/raw", self.root)
        raw.mkdir(parents=True)
        (raw / "raw.txt").write_text("raw")
        return self

    def notebook(self, words):
        file = self.work / f"{words[2]}.ipynb"
        if not file.exists():
            self.write_notebook(words[2], "1 + 1")
        return file

    def write_notebook(self, name, *sources):
        cells = [
            {"cell_type": "code", "source": s, "metadata": {}, "outputs": [], "execution_count": None, "id": f"c{i}"}
            for i, s in enumerate(sources)
        ]
        (self.work / f"{name}.ipynb").write_text(
            json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        )

    def command(self, words):
        assert words[:2] == ["skin-lesion", "step"]
        return [sys.executable, str(self.work / "program.py"), *words[2:]]

    def run(self, pipeline, **options):
        return run(pipeline, root=self.root, command=self.command, notebook=self.notebook, **options)

    def engine(self, pipeline, **options):
        """The same in a process of its own, to be killed."""
        words = [
            sys.executable,
            "-c",
            ENGINE,
            str(Path(__file__).parent),
            str(self.work),
            json.dumps(pipeline),
            json.dumps(options),
        ]
        return subprocess.Popen(words, stdout=open(self.work / "engine.log", "ab"), stderr=subprocess.STDOUT)

    def began(self):
        file = self.work / "began"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_WORK", str(tmp_path))
    return Project(tmp_path).make()


RAW = "s3://bucket/raw"


def step(name, *inputs, cached=False, **options):
    """A Processing step; options go to the program."""
    arguments = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    extra = {"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}} if cached else {}
    return processing(name, inputs or [RAW], arguments, **extra)


def training(name, channel, cached=False, **hyperparameters):
    checkpoints = join("/", "s3://bucket", get("Execution.PipelineExecutionId"), "checkpoints")
    return {
        "Name": name,
        "Type": "Training",
        "Arguments": {
            "AlgorithmSpecification": {"ContainerEntrypoint": ["skin-lesion", "step"], "ContainerArguments": [name]},
            "HyperParameters": hyperparameters,
            "InputDataConfig": [{"ChannelName": "train", "DataSource": {"S3DataSource": {"S3Uri": channel}}}],
            "OutputDataConfig": {"S3OutputPath": join("/", "s3://bucket", get("Execution.PipelineExecutionId"))},
            "CheckpointConfig": {"S3Uri": checkpoints, "LocalPath": "/opt/ml/checkpoints"},
        },
        **({"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}} if cached else {}),
    }


def statuses(execution):
    return {s["StepName"]: s["StepStatus"] for s in execution.state["PipelineExecutionSteps"]}


def hits(execution):
    return {s["StepName"] for s in execution.state["PipelineExecutionSteps"] if "CacheHitResult" in s}


def wait_for(moment, seconds=30):
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.02)


def processes(work):
    """The processes of steps of a project that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("SKIN_LESION_ROOT", "").startswith(str(work))
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


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


# -- cache ----------------------------------------------------------------------------------------------------------


def chain(**options):
    return definition(
        step("a", cached=True, **options),
        training("b", out("a"), cached=True),
        step("c", get("Steps.b.ModelArtifacts.S3ModelArtifacts"), cached=True),
    )


def test_a_second_identical_run_takes_everything_from_the_cache(project):
    first = project.run(chain())
    started = time.perf_counter()
    second = project.run(chain())
    assert time.perf_counter() - started < 5 and project.began() == ["a", "b", "c"]
    assert hits(second) == {"a", "b", "c"} and second.status == "Succeeded"
    assert second.step("b")["CacheHitResult"] == {"SourcePipelineExecutionArn": first.state["PipelineExecutionArn"]}
    assert second.step("b")["Response"] == first.step("b")["Response"]
    assert hits(project.run(chain())) == {"a", "b", "c"}


def test_editing_a_notebook_reruns_its_step_and_those_after_it(project):
    project.run(chain())
    project.write_notebook("b", "1 + 2")
    assert hits(project.run(chain())) == {"a"} and project.began() == ["a", "b", "c", "b", "c"]
    assert hits(project.run(chain())) == {"a", "b", "c"}
    outputs = json.loads((project.work / "a.ipynb").read_text())
    outputs["cells"][0] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "2"}], "execution_count": 7}
    (project.work / "a.ipynb").write_text(json.dumps(outputs))
    assert hits(project.run(chain())) == {"a", "b", "c"}, "outputs are not source"


def test_other_arguments_input_bytes_or_library_code_are_another_step(project, monkeypatch):
    project.run(chain())
    assert hits(project.run(chain(score="{}"))) == set()
    (project.root / "s3/bucket/raw/raw.txt").write_text("other")
    assert hits(project.run(chain())) == set()
    (project.root / "s3/bucket/raw/raw.txt").write_text("raw")
    assert hits(project.run(chain())) == {"a", "b", "c"}
    real = cache.code_hash
    monkeypatch.setattr(cache, "code_hash", lambda notebook: real(notebook) + "changed" * (notebook.stem == "c"))
    assert hits(project.run(chain())) == {"a", "b"}


def test_the_cache_is_opt_in_and_only_of_successes(project):
    plain = definition(step("a"))
    assert hits(project.run(plain)) == hits(project.run(plain)) == set()
    broken = definition(step("b", cached=True, fail="no"))
    project.run(broken)
    assert project.run(broken).status == "Failed" and project.began() == ["a", "a", "b", "b"]
    after = definition(step("c"), step("d", out("c"), cached=True))
    project.run(after)
    assert hits(project.run(after)) == {"d"}, "the step before has no cache but made the same bytes"


def test_a_record_expires(project):
    short = definition(step("a") | {"CacheConfig": {"Enabled": True, "ExpireAfter": "PT1S"}})
    project.run(short)
    assert hits(project.run(short)) == {"a"}
    time.sleep(1)
    assert hits(project.run(short)) == set()


@pytest.mark.parametrize("harm", ["delete", "change"])
def test_a_record_whose_output_is_gone_or_changed_is_a_miss(project, harm):
    project.run(chain(), run_id="r")
    output = project.root / "s3/bucket/r/a/out.txt"
    output.unlink() if harm == "delete" else output.write_text("?")
    result = project.run(chain())
    assert "a" not in hits(result) and result.status == "Succeeded"


def test_hashing_thousands_of_images_takes_seconds(tmp_path):
    for i in range(4000):
        (tmp_path / f"{i}.jpg").write_bytes(i.to_bytes(2, "big") * 10_000)
    started = time.perf_counter()
    before = cache.hash_path(tmp_path)
    assert time.perf_counter() - started < 4
    (tmp_path / "77.jpg").write_bytes(b"x" * 20_000)
    assert cache.hash_path(tmp_path) != before


# -- kills, stops, resumes ------------------------------------------------------------------------------------------


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
