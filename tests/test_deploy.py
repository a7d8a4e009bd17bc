"""Deploying: here as a server in the background, on SageMaker against moto with what it lacks, answered by a real server."""

import json
import os
import urllib.error
import urllib.request

import psutil
import pytest
from click.testing import CliRunner
from conftest import Served, colours_package
from moto import mock_aws
from moto.core.responses import ActionResult
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

from skin_lesion.cli import main
from skin_lesion.cloud import endpoint as module
from skin_lesion.cloud.deploy import http_invoke, read_endpoint
from skin_lesion.cloud.registry import approve, register
from skin_lesion.serving.package import pack
from skin_lesion.settings import load_settings

NAME, BUCKET, GROUP, REGION = "skin-lesion", "skin-lesion", "skin-lesion", "eu-west-1"
TARGET = {"ServiceNamespace": "sagemaker"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = colours_package(tmp_path_factory.mktemp("colours") / "package")
    (folder / "evaluation.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with Served(folder) as served:
        yield served


def forwarded(served, body, content_type):
    """Status and body of the real server. Not by requests, which moto watches."""
    request = urllib.request.Request(f"{served.url}/invocations", body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Account:
    """moto's account, and what happens in it that moto does not know: updates, and answers by the real server."""

    def __init__(self, package):
        self.aws = module._aws(REGION)
        self.updates, self.how, self.package, self.count = [], None, package, 0  # how a version is bad
        self.aws.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        self.aws.sagemaker.create_model_package_group(ModelPackageGroupName=GROUP)

    def register(self, status="Approved"):
        self.count += 1
        key = f"runs/{self.count}/model.tar.gz"
        self.aws.s3.upload_file(str(self.package), BUCKET, key)
        self.aws.sagemaker.create_model_package(
            ModelPackageGroupName=GROUP,
            ModelApprovalStatus=status,
            InferenceSpecification={
                "Containers": [{"Image": "steps", "ModelDataUrl": f"s3://{BUCKET}/{key}"}],
                "SupportedContentTypes": ["image/jpeg"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
        )

    def deploy(self, version=None, **pairs):
        lines = []
        settings = load_settings({f"serving.{k}": str(v) for k, v in pairs.items()}, environ={})
        return module.deploy(settings, version, seconds=0, echo=lines.append), lines

    def endpoint(self):
        return self.aws.sagemaker.describe_endpoint(EndpointName=NAME)

    def left(self):
        """Everything that there is for endpoints."""
        aws = self.aws
        return {
            "endpoints": [e["EndpointName"] for e in aws.sagemaker.list_endpoints()["Endpoints"]],
            "configs": [c["EndpointConfigName"] for c in aws.sagemaker.list_endpoint_configs()["EndpointConfigs"]],
            "models": [m["ModelName"] for m in aws.sagemaker.list_models()["Models"]],
            "targets": [t["ResourceId"] for t in aws.scaling.describe_scalable_targets(**TARGET)["ScalableTargets"]],
            "policies": [p["PolicyName"] for p in aws.scaling.describe_scaling_policies(**TARGET)["ScalingPolicies"]],
            "alarms": [a["AlarmName"] for a in aws.cloudwatch.describe_alarms()["MetricAlarms"]],
        }


NOTHING = dict.fromkeys(("endpoints", "configs", "models", "targets", "policies", "alarms"), [])


@pytest.fixture
def account(folder, served, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_PROFILE", raising=False)

    def update_endpoint(self):
        account.updates.append({k: self._get_param(k) for k in ("EndpointConfigName", "DeploymentConfig")})
        endpoint = self.sagemaker_backend.endpoints[self._get_param("EndpointName")]
        targets = account.aws.scaling.describe_scalable_targets(**TARGET)["ScalableTargets"]
        assert not targets, "SageMaker refuses to change a variant that is registered for scaling"
        config = self.sagemaker_backend.endpoint_configs[self._get_param("EndpointConfigName")]
        if account.how != "alarm":
            endpoint.endpoint_config_name = config.endpoint_config_name
            endpoint.production_variants = endpoint._process_production_variants(config.production_variants)
        return ActionResult({"EndpointArn": endpoint.arn})

    def answer(body, content_type):
        broken = {"smoke test": (500, b'{"error": "broken"}'), "other form": (200, b'{"probabilities": []}')}
        return broken.get(account.how) or forwarded(served, body, content_type)

    made = SageMakerRuntimeResponse.setup_class

    def bytes_as_they_are(self, request, full_url, headers, use_raw_body=False):
        return made(self, request, full_url, headers, use_raw_body=True)

    def invoke_endpoint(self):
        status, body = answer(self.body, self.headers["Content-Type"])
        if status == 200:
            return 200, {"Content-Type": "application/json"}, body
        error = {"Message": "from the model", "OriginalStatusCode": status, "OriginalMessage": body.decode()}
        return 424, {"status": 424, "x-amzn-errortype": "ModelError"}, json.dumps(error)

    def invoke_endpoint_async(self):
        bucket, key = self.headers["X-Amzn-SageMaker-InputLocation"].removeprefix("s3://").split("/", 1)
        sent = account.aws.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        status, body = answer(sent, self.headers["X-Amzn-SageMaker-Content-Type"])
        places = {name: f"asynchronous/{name}/{os.path.basename(key)}" for name in ("answers", "failures")}
        account.aws.s3.put_object(Bucket=BUCKET, Key=places["answers" if status == 200 else "failures"], Body=body)
        headers = {
            "X-Amzn-SageMaker-OutputLocation": f"s3://{BUCKET}/{places['answers']}",
            "X-Amzn-SageMaker-FailureLocation": f"s3://{BUCKET}/{places['failures']}",
        }
        return 202, headers, json.dumps({"InferenceId": "1"})

    monkeypatch.setattr(SageMakerResponse, "update_endpoint", update_endpoint, raising=False)
    monkeypatch.setattr(SageMakerRuntimeResponse, "setup_class", bytes_as_they_are)
    monkeypatch.setattr(SageMakerRuntimeResponse, "invoke_endpoint", invoke_endpoint)
    monkeypatch.setattr(SageMakerRuntimeResponse, "invoke_endpoint_async", invoke_endpoint_async)
    with mock_aws():
        account = Account(pack(folder, tmp_path / "model.tar.gz"))
        yield account


def test_a_first_deployment_is_encrypted_closed_scaled_watched_and_has_answered(account):
    account.register()
    account.register("PendingManualApproval")
    name, lines = account.deploy()
    assert account.endpoint()["EndpointConfigName"] == name and name.startswith(f"{NAME}-v1-")
    assert lines[-1].endswith("answers with version 1")
    config = account.aws.sagemaker.describe_endpoint_config(EndpointConfigName=name)
    assert config["KmsKeyId"] == "alias/skin-lesion" and not config.get("DataCaptureConfig")
    model = account.aws.sagemaker.describe_model(ModelName=name)
    assert model["ExecutionRoleArn"].endswith(":role/skin-lesion-serving")  # may read models, and nothing of training
    assert model["PrimaryContainer"]["Image"].endswith("skin-lesion-serve:latest") and model["VpcConfig"]["Subnets"]
    environment = model["PrimaryContainer"]["Environment"]
    seen = load_settings(environ=environment)  # as the container reads it
    assert seen["serving.queue"].source == "$SKIN_LESION_SERVING_QUEUE"
    [target] = account.aws.scaling.describe_scalable_targets(**TARGET)["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 5)
    [policy] = account.aws.scaling.describe_scaling_policies(**TARGET)["ScalingPolicies"]
    tracked = policy["TargetTrackingScalingPolicyConfiguration"]["PredefinedMetricSpecification"]
    assert tracked["PredefinedMetricType"] == "SageMakerVariantInvocationsPerInstance"
    assert {a["AlarmName"] for a in account.aws.cloudwatch.describe_alarms()["MetricAlarms"]} >= {
        f"{NAME}-errors",
        f"{NAME}-latency",
    }
    assert account.deploy()[0] == name and account.updates == []  # again: nothing to do


def test_an_update_goes_by_canary_with_rollback_and_removes_what_it_replaced(account):
    account.register()
    account.deploy(instances_min=3)
    account.register()
    name, _ = account.deploy(instances_min=3)
    [update] = account.updates
    policy = update["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
    assert policy["Type"] == "CANARY" and policy["CanarySize"] == {"Type": "CAPACITY_PERCENT", "Value": 20}
    guards = update["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"]
    assert [a["AlarmName"] for a in guards] == [f"{NAME}-errors", f"{NAME}-latency"]
    left = account.left()
    assert name.startswith(f"{NAME}-v2-") and left["configs"] == left["models"] == [name]
    assert len(left["targets"]) == len(left["policies"]) == 1


@pytest.mark.parametrize("how", ["alarm", "smoke test", "other form"])
def test_a_bad_version_makes_way_for_the_one_before(account, how):
    account.register()
    good, _ = account.deploy()
    account.register()
    account.how = how
    why = {"alarm": "went back to", "smoke test": "answered a smoke picture with 500", "other form": "predictions"}
    with pytest.raises(RuntimeError, match=f"Version 2 is not deployed.*{why[how]}"):
        account.deploy()
    left = account.left()
    assert account.endpoint()["EndpointConfigName"] == good and left["configs"] == left["models"] == [good]
    assert len(left["targets"]) == len(left["policies"]) == 1


def test_a_bad_first_version_leaves_nothing(account):
    account.register()
    account.how = "smoke test"
    with pytest.raises(RuntimeError, match="Version 1 is not deployed"):
        account.deploy()
    assert account.left() == NOTHING


@pytest.mark.parametrize("kind", ["serverless", "asynchronous"])
def test_other_kinds_answer_and_scale_in_their_own_way(account, kind):
    account.register()
    name, _ = account.deploy(kind=kind)
    config = account.aws.sagemaker.describe_endpoint_config(EndpointConfigName=name)
    [variant], left = config["ProductionVariants"], account.left()
    if kind == "serverless":
        assert variant["ServerlessConfig"] == {"MemorySizeInMB": 3072, "MaxConcurrency": 5}
        assert "KmsKeyId" not in config and left["targets"] == []
    else:
        assert config["AsyncInferenceConfig"]["OutputConfig"]["KmsKeyId"] == "alias/skin-lesion"
        [policy] = account.aws.scaling.describe_scaling_policies(**TARGET)["ScalingPolicies"]
        metric = policy["TargetTrackingScalingPolicyConfiguration"]["CustomizedMetricSpecification"]
        assert metric["MetricName"] == "ApproximateBacklogSizePerInstance"
    assert account.deploy()[0] != name  # another kind is another configuration of the same endpoint
    assert len(account.left()["targets"]) == 1


def test_only_an_approved_version_is_deployed(account):
    with pytest.raises(ValueError, match="No version of 'skin-lesion' is approved .there is: none"):
        account.deploy()
    account.register("Rejected")
    with pytest.raises(ValueError, match="Version 1 of 'skin-lesion' is not approved .there is: 1 Rejected"):
        account.deploy(1)
    assert account.left() == NOTHING


def test_teardown_leaves_nothing_of_its_own_and_all_of_others(account):
    account.register()
    account.deploy()
    account.deploy(endpoint="skin-lesion-other")
    run = lambda *words: CliRunner().invoke(main, words)
    for _ in range(2):
        done = run("teardown", "--on", "sagemaker")
        assert done.exit_code == 0, done.output
        left = account.left()
        assert left["endpoints"] == ["skin-lesion-other"] and len(left["models"]) == len(left["configs"]) == 1
    assert run("teardown", "--on", "sagemaker", "--set", "serving.endpoint=skin-lesion-other").exit_code == 0
    assert account.left() == NOTHING


def test_the_command_line_deploys_on_sagemaker_without_the_account_number(account):
    account.register()
    done = CliRunner().invoke(main, ["deploy", "--on", "sagemaker"])
    assert done.exit_code == 0 and "answers with version 1" in done.output and "123456789012" not in done.output
    refused = CliRunner().invoke(main, ["deploy", "7", "--on", "sagemaker"])
    assert refused.exit_code == 1 and "Version 7" in refused.output


# --- on this machine ---------------------------------------------------------------------------------------------------


def test_a_local_endpoint_is_replaced_by_one_that_answers_and_kept_from_one_that_does_not(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(main, [str(w) for w in words])
    root, endpoint = tmp_path / "runs", tmp_path / "runs" / "endpoints" / NAME
    model = json.loads((folder / "model.json").read_text())
    for n, change in enumerate([{}, {"dataset": "second"}, {"calibration": {"temperature": -1.0}}], 1):
        copy = tmp_path / f"package{n}"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / "model.json").write_text(json.dumps(model | change))
        register(pack(copy, tmp_path / f"{n}.tar.gz"), {"ModelPackageGroupName": GROUP}, root)
    refused = run("deploy")
    assert refused.exit_code == 1 and "There is no approved version" in refused.output
    approve(root, 1)
    states = []
    try:
        for version in (1, 2):
            approve(root, version)
            done = run("deploy")
            assert done.exit_code == 0 and f"version {version} answers at http://127.0.0.1:" in done.output, done.output
            states.append(read_endpoint(endpoint))
            assert psutil.pid_exists(states[-1]["pid"])
        assert not psutil.pid_exists(states[0]["pid"]) or psutil.Process(states[0]["pid"]).status() == "zombie"
        approve(root, 3)
        failed = run("deploy", 3)  # a temperature below 0: it starts, and cannot answer
        assert failed.exit_code == 1 and "smoke picture with 500" in failed.output, failed.output
        assert read_endpoint(endpoint) == states[-1]
        assert http_invoke(states[-1]["address"])(b"no picture", "image/jpeg")[0] == 400
    finally:
        assert run("teardown").exit_code == 0 and run("teardown").exit_code == 0
    assert read_endpoint(endpoint) is None and len(list(endpoint.glob("*.log"))) >= 1


def test_the_pipeline_probes_the_approved_version_here_and_refuses_when_there_is_none(folder, project, tmp_path):
    none = project.cli("run", "deploy")
    assert none.returncode == 1 and "No version is approved" in none.stdout + none.stderr
    root = project.work / "runs"
    register(pack(folder, tmp_path / "model.tar.gz"), {"ModelPackageGroupName": GROUP}, root)
    approve(root, 1)
    done = project.cli("run", "deploy")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(next(root.rglob("deployment.json")).read_text())
    assert (found["version"], found["place"], found["configuration"]) == (1, "local", None)
    assert [list(answer["probabilities"]) for answer in found["answers"]] == [["MEL", "NV", "AK"]] * 2
    assert not (project.work / "data").exists()  # no sample is drawn for it
