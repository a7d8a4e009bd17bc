"""`--on sagemaker` against moto: the pipeline is there, an execution runs, its steps are followed, the champion is copied."""

import json
from datetime import UTC, datetime

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws
from moto.sagemaker.models import FakePipelineExecution
from moto.sagemaker.responses import SageMakerResponse

from skin_lesion.cli import main
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


def test_a_spot_job_without_a_checkpoint_path_is_not_started(aws):
    unsafe = json.loads(TEXT)
    del next(s for s in unsafe["Steps"] if s["Name"] == "train")["Arguments"]["CheckpointConfig"]
    with pytest.raises(ValueError, match="not started: train: spot instances without a checkpoint path"):
        on_sagemaker.run(json.dumps(unsafe), "training", {}, load_settings(environ={}))
    assert aws[0].list_pipelines()["PipelineSummaries"] == []
