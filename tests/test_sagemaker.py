"""`--on sagemaker` against moto: the pipeline is there, an execution runs, its steps are followed, the champion is copied; and
what `deploy --all` puts there before the endpoint."""

import json
import os
from datetime import UTC, datetime

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws
from moto.sagemaker.models import FakePipelineExecution
from moto.sagemaker.responses import SageMakerResponse

from skin_lesion.cli import main
from skin_lesion.cloud import release
from skin_lesion.cloud import sagemaker as on_sagemaker
from skin_lesion.cloud.compile import each_step
from skin_lesion.settings import load_settings, project_file

NAME, BUCKET, GROUP = "skin-lesion-training", "skin-lesion", "skin-lesion"
PREFIX = f"s3://{BUCKET}/champion/{GROUP}"
TEXT = project_file("pipelines", "definitions", "training.json").read_text()
ACCOUNT = "123456789012"  # moto's


@pytest.fixture
def aws(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        sagemaker, s3 = on_sagemaker.clients("eu-west-1")
        s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        yield sagemaker, s3


@pytest.fixture
def listed_steps(monkeypatch):
    """moto cannot list the steps of an execution, and calls it Succeeded at once. This gives it the handler: the steps
    of the definition that moto itself stored, one more of them done at each look; the execution runs until all are."""
    looks = []
    made = FakePipelineExecution.__init__

    def executing(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.pipeline_execution_status = "Executing"

    def list_pipeline_execution_steps(self):
        arn = self._get_param("PipelineExecutionArn")
        stored = self.sagemaker_backend.describe_pipeline_definition_for_execution(arn)["PipelineDefinition"]
        steps = [s["Name"] for s in each_step(json.loads(stored)["Steps"]) if s["Type"] != "Fail"]
        looks.append(arn)
        if len(looks) == len(steps):
            self.sagemaker_backend.pipelines[NAME].pipeline_executions[arn].pipeline_execution_status = "Succeeded"
        now = datetime.now(UTC).timestamp()
        return json.dumps(
            {
                "PipelineExecutionSteps": [
                    {"StepName": name, "StartTime": now, "StepStatus": "Succeeded" if n < len(looks) else "Executing"}
                    for n, name in enumerate(steps[: len(looks) + 1])
                ]
            }
        )

    monkeypatch.setattr(FakePipelineExecution, "__init__", executing)
    monkeypatch.setattr(
        SageMakerResponse, "list_pipeline_execution_steps", list_pipeline_execution_steps, raising=False
    )
    return looks


def approve_package(aws, content):
    sagemaker, s3 = aws
    number = len(sagemaker.list_model_packages(ModelPackageGroupName=GROUP)["ModelPackageSummaryList"]) + 1
    key = f"runs/e{number}/register/package/model.tar.gz"
    s3.put_object(Bucket=BUCKET, Key=key, Body=content)
    return sagemaker.create_model_package(
        ModelPackageGroupName=GROUP,
        ModelApprovalStatus="Approved",
        InferenceSpecification={
            "Containers": [{"Image": "i", "ModelDataUrl": f"s3://{BUCKET}/{key}"}],
            "SupportedContentTypes": ["image/jpeg"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
    )["ModelPackageArn"]


def test_a_run_is_upserted_started_and_followed(aws, listed_steps):
    sagemaker, _ = aws
    lines = []
    settings = load_settings(environ={})
    status = on_sagemaker.run(TEXT, "training", {"TrainEpochs": 2}, settings, seconds=0, echo=lines.append)
    assert status == "Succeeded"
    assert sagemaker.describe_pipeline(PipelineName=NAME)["PipelineDefinition"] == TEXT
    arn = listed_steps[0]
    sent = sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=arn)["PipelineParameters"]
    assert {p["Name"]: p["Value"] for p in sent} == {"TrainEpochs": "2", "ChampionData": f"{PREFIX}/none"}
    states = [line.split()[1:] for line in lines[1:]]
    for step in ("prepare", "train", "evaluate", "gate", "register", "model"):
        assert [state for name, state in states if name == step][-1] == "Succeeded"
    assert states[-1] == ["execution", "Succeeded"]
    assert len({tuple(s) for s in states}) == len(states)  # a state is printed once
    assert ACCOUNT not in "\n".join(lines)
    on_sagemaker.upsert(TEXT, NAME, settings["aws.role_arn"].value, sagemaker)  # a second time updates it
    assert len(sagemaker.list_pipelines()["PipelineSummaries"]) == 1


def test_a_pipeline_of_a_longer_name_is_not_taken_for_it(aws):
    sagemaker, _ = aws
    for name in (NAME + "-old", NAME, NAME):
        on_sagemaker.upsert(TEXT, name, "arn:aws:iam::123456789012:role/pipeline", sagemaker)
    assert {p["PipelineName"] for p in sagemaker.list_pipelines()["PipelineSummaries"]} == {NAME, NAME + "-old"}


def test_a_pipeline_is_found_on_any_page_of_the_list(aws):
    sagemaker, _ = aws
    role = "arn:aws:iam::123456789012:role/pipeline"
    for name in (NAME, *(f"{NAME}-{n}" for n in range(5))):
        on_sagemaker.upsert(TEXT, name, role, sagemaker)
    pages = []

    def of_two(params, **_):  # the service gives ten at most
        pages.append(params.get("NextToken"))
        params["MaxResults"] = 2

    sagemaker.meta.events.register("provide-client-params.sagemaker.ListPipelines", of_two)
    changed = TEXT.replace("ml.m5.xlarge", "ml.m5.2xlarge")
    for name in (NAME, f"{NAME}-4"):  # created first and last
        on_sagemaker.upsert(changed, name, role, sagemaker)
        assert sagemaker.describe_pipeline(PipelineName=name)["PipelineDefinition"] == changed != TEXT
    assert len(pages) == 6 and pages[0] is None and pages[1]


def test_the_champion_is_the_newest_approved_package_at_an_address_of_its_own(aws):
    sagemaker, s3 = aws
    publish = lambda: on_sagemaker.publish_champion(PREFIX, "alias/skin-lesion", sagemaker, s3)
    read = lambda address, name: s3.get_object(Bucket=BUCKET, Key=f"{address.removeprefix(f's3://{BUCKET}/')}/{name}")
    assert publish() == f"{PREFIX}/none"
    sagemaker.create_model_package_group(ModelPackageGroupName=GROUP + "-other")
    assert publish() == f"{PREFIX}/none"
    sagemaker.create_model_package_group(ModelPackageGroupName=GROUP)
    approve_package(aws, b"first")
    second = approve_package(aws, b"second")
    address = publish()
    assert address == f"{PREFIX}/2"
    assert json.loads(read(address, "champion.json")["Body"].read()) == {"version": 2}
    model = read(address, "model.tar.gz")
    assert model["Body"].read() == b"second" and model["SSEKMSKeyId"].endswith("alias/skin-lesion")
    assert read(PREFIX, "model.tar.gz")["Body"].read() == b"second", "where the scheduled monitor finds it"
    sagemaker.update_model_package(ModelPackageArn=second, ModelApprovalStatus="Rejected")
    address = publish()
    assert address == f"{PREFIX}/1" and read(address, "model.tar.gz")["Body"].read() == b"first"


def test_no_credentials_is_said_before_anything_is_sent(monkeypatch, tmp_path):
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(ValueError, match="No AWS credentials were found.*--on local"):
        on_sagemaker.run(TEXT, "training", {}, load_settings(environ={}))


def test_a_refusal_is_one_sentence_without_the_account(aws):
    _, s3 = aws
    s3.delete_bucket(Bucket=BUCKET)
    with pytest.raises(ValueError, match="AWS refused: .*NoSuchBucket") as refused:
        on_sagemaker.run(TEXT, "training", {}, load_settings(environ={}))
    assert ACCOUNT not in str(refused.value) and refused.value.__suppress_context__


def test_the_command_line_runs_on_sagemaker_with_the_settings_of_the_moment(aws, listed_steps, monkeypatch):
    monkeypatch.setattr(on_sagemaker.time, "sleep", lambda seconds: None)
    done = CliRunner().invoke(
        main, ["run", "training", "--on", "sagemaker", "--dataset", "ham10000", "--set", "train.epochs=2"]
    )
    assert done.exit_code == 0, done.output
    assert "execution        Succeeded" in done.output and ACCOUNT not in done.output
    stored = json.loads(aws[0].describe_pipeline(PipelineName=NAME)["PipelineDefinition"])
    defaults = {p["Name"]: p.get("DefaultValue") for p in stored["Parameters"]}
    assert (defaults["TrainEpochs"], defaults["DataDataset"]) == (2, "ham10000")
    sent = aws[0].list_pipeline_parameters_for_execution(PipelineExecutionArn=listed_steps[0])["PipelineParameters"]
    assert {"Name": "InputData", "Value": f"s3://{BUCKET}/raw/ham10000"} in sent
    refused = CliRunner().invoke(main, ["run", "training", "--on", "sagemaker", "--data-dir", "here"])
    assert refused.exit_code == 2 and "s3:// address" in refused.output


def test_a_run_above_the_budget_is_not_started_unless_it_is_said(aws, listed_steps, monkeypatch, tmp_path):
    monkeypatch.setenv("SKIN_LESION_LOCAL_RUNS", str(tmp_path))  # no past runs make it cheap
    monkeypatch.setattr(on_sagemaker.time, "sleep", lambda seconds: None)
    words = ["run", "training", "--on", "sagemaker", "--set", "aws.budget=1"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1 and "more than the budget of US$ 1 (setting aws.budget)" in refused.output
    assert aws[0].list_pipelines()["PipelineSummaries"] == [] and not listed_steps
    done = CliRunner().invoke(main, [*words, "--over-budget"])
    assert done.exit_code == 0 and "execution        Succeeded" in done.output, done.output


def test_a_spot_job_without_a_checkpoint_path_is_not_started(aws):
    unsafe = json.loads(TEXT)
    del next(s for s in unsafe["Steps"] if s["Name"] == "train")["Arguments"]["CheckpointConfig"]
    with pytest.raises(ValueError, match="not started: train: spot instances without a checkpoint path"):
        on_sagemaker.run(json.dumps(unsafe), "training", {}, load_settings(environ={}))
    assert aws[0].list_pipelines()["PipelineSummaries"] == []


# ---- images and pipelines: deploy --all. The container tool is a script that writes down what it is told: pushing needs a
# registry, and `make image-test` builds the images for real.

REGISTRY = f"{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com"
VALUES = {
    f"aws.{key}": f"{REGISTRY}/skin-lesion-{name}:abc123"
    for key, name in (("image_uri", "steps"), ("serving_image_uri", "serve"))
}
TOOL = """#!/bin/sh
echo "$@" >> {log}
case $1 in login) cat >> {log}; echo >> {log};; esac
test "$1" != "$FAILS"
"""


@pytest.fixture
def ecr(aws):
    client = boto3.client("ecr", region_name="eu-west-1")
    for name in ("steps", "serve"):
        client.create_repository(repositoryName=f"skin-lesion-{name}")
    return client


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """`docker` on the path; gives the words it was called with, a line a call."""
    log, script = tmp_path / "log", tmp_path / "bin" / "docker"
    script.parent.mkdir()
    script.write_text(TOOL.format(log=log))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


def put_image(ecr, name):
    manifest = json.dumps({"mediaType": "application/vnd.oci.image.manifest.v1+json", "of": name})
    ecr.put_image(repositoryName=f"skin-lesion-{name}", imageManifest=manifest, imageTag="abc123")


def test_only_what_ecr_lacks_is_built_and_pushed(ecr, tool):
    put_image(ecr, "serve")
    lines = []
    release.push_images(load_settings(VALUES, environ={}), lines.append)
    login, password, build, push = tool()
    assert login == f"login --username AWS --password-stdin {REGISTRY}" and password and "x" != password
    dockerfile = project_file("pipelines", "images", "steps", "Dockerfile")
    assert build.startswith(f"build -f {dockerfile} --build-arg COMMIT=") and build.endswith(
        f"-t {VALUES['aws.image_uri']} ."
    )
    assert push == f"push {VALUES['aws.image_uri']}"
    assert [line.split(":", 1)[1] for line in lines] == ["abc123 was built and pushed", "abc123 is there"]
    assert ACCOUNT not in str(lines)


def test_a_failed_build_pushes_nothing_and_names_the_command(ecr, tool, monkeypatch):
    monkeypatch.setenv("FAILS", "build")
    with pytest.raises(RuntimeError, match="`docker build` ended with 1"):
        release.push_images(load_settings(VALUES, environ={}), print)
    assert not any(line.startswith("push") for line in tool())


def test_without_a_tool_or_for_a_digest_it_says_what_is_needed(ecr, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="aws.image_uri is not in ECR. Building it needs Docker or podman"):
        release.push_images(load_settings(VALUES, environ={}), print)
    digest = {"aws.image_uri": VALUES["aws.image_uri"].replace(":abc123", "@sha256:" + "0" * 64)}
    with pytest.raises(ValueError, match="a digest cannot be built"):
        release.push_images(load_settings(VALUES | digest, environ={}), print)


def test_deploy_all_goes_in_order_and_leaves_alone_what_is_there(aws, ecr, monkeypatch, tmp_path):
    """With one pipeline, because compiling all seven takes long; the endpoint then lacks an approved version."""
    (tmp_path / "pipelines" / "definitions").mkdir(parents=True)
    (tmp_path / "pipelines" / "definitions" / "window.json").touch()
    monkeypatch.setattr(release, "project_file", lambda *parts: tmp_path.joinpath(*parts))
    for name in ("steps", "serve"):
        put_image(ecr, name)
    sagemaker, _ = aws
    sagemaker.create_model_package_group(ModelPackageGroupName="skin-lesion")
    words = ["deploy", "--on", "sagemaker", "--all", *(w for k, v in VALUES.items() for w in ("--set", f"{k}={v}"))]
    told = []
    for more in ([], [], ["--set", "serving.endpoint=other"]):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 1 and "No version of 'skin-lesion' is approved" in done.output, done.output
        assert ACCOUNT not in done.output
        told.append([line for line in done.output.splitlines() if line.startswith("skin-lesion-window")])
    assert told == [[f"skin-lesion-window {what}"] for what in ("was created", "is as compiled", "was updated")]
    stored = json.loads(sagemaker.describe_pipeline(PipelineName="skin-lesion-window")["PipelineDefinition"])
    assert {p["Name"]: p["DefaultValue"] for p in stored["Parameters"]}["ImageUri"] == VALUES["aws.image_uri"]
    assert CliRunner().invoke(main, ["deploy", "--all"]).exit_code == 2
