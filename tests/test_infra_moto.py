"""The account comes up, works and goes again without a rest: applied to moto and destroyed there."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from conftest import Served, colours_package
from infra import ROOT, init, run

from skin_lesion.serving.package import pack


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SERVICES = (
    "apigatewayv2 appautoscaling budgets cloudtrail cloudwatch ec2 ecr events iam kms lambda logs s3 sagemaker "
    "scheduler sfn sns sqs sts"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder, and a real server of it."""
    folder = colours_package(tmp_path_factory.mktemp("colours") / "package")
    (folder / "evaluation.json").write_text("{}")
    with Served(folder) as served:
        yield folder, served.url


@pytest.fixture
def moto(model):
    """A moto server on loopback, whose endpoints answer as the model does; gives its address."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("moto_account.py"), str(port), model[1]],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert "listens" in server.stdout.readline()
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def on_moto(folder, url):
    """Points the provider of a copy of terraform/ to moto, and keeps the state beside it."""
    endpoints = "\n".join(f'    {service} = "{url}"' for service in SERVICES)
    (folder / "moto_override.tf").write_text(
        f"""terraform {{
  backend "local" {{}}
}}
provider "aws" {{
  access_key                  = "x"
  secret_key                  = "x"
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  s3_use_path_style           = true
  max_retries                 = 3
  endpoints {{
{endpoints}
  }}
}}
"""
    )


def left(url):
    """What is in the account, beyond what moto itself puts there."""
    client = lambda service: boto3.client(
        service, region_name="eu-west-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="x"
    )
    sagemaker, ec2 = client("sagemaker"), client("ec2")
    scaled = client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    return {
        "buckets": [b["Name"] for b in client("s3").list_buckets()["Buckets"]],
        "roles": [r["RoleName"] for r in client("iam").list_roles()["Roles"]],
        "networks": [v["VpcId"] for v in ec2.describe_vpcs()["Vpcs"] if not v["IsDefault"]],
        "endpoints": [
            e["VpcEndpointId"] for e in ec2.describe_vpc_endpoints()["VpcEndpoints"] if e["State"] != "deleted"
        ],
        "repositories": [r["repositoryName"] for r in client("ecr").describe_repositories()["repositories"]],
        "logs": [g["logGroupName"] for g in client("logs").describe_log_groups()["logGroups"]],
        "alarms": [a["AlarmName"] for a in client("cloudwatch").describe_alarms()["MetricAlarms"]],
        "topics": [t["TopicArn"] for t in client("sns").list_topics()["Topics"]],
        "queues": client("sqs").list_queues().get("QueueUrls", []),
        "functions": [f["FunctionName"] for f in client("lambda").list_functions()["Functions"]],
        "machines": [m["name"] for m in client("stepfunctions").list_state_machines()["stateMachines"]],
        "rules": [r["Name"] for r in client("events").list_rules()["Rules"]],
        "schedules": [s["Name"] for s in client("scheduler").list_schedules()["Schedules"]],
        "pipelines": [p["PipelineName"] for p in sagemaker.list_pipelines()["PipelineSummaries"]],
        "domains": [d["DomainId"] for d in sagemaker.list_domains()["Domains"]],
        "served": [e["EndpointName"] for e in sagemaker.list_endpoints()["Endpoints"]],
        "served by": [c["EndpointConfigName"] for c in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
        "models": [m["ModelName"] for m in sagemaker.list_models()["Models"]],
        "scaled": scaled["ScalableTargets"],
        "groups": sagemaker.list_model_package_groups()["ModelPackageGroupSummaryList"],
    }


def the_doctor_finds_all_of_it(url, settings, folder):
    """`skin-lesion doctor` in a folder with the settings of Terraform's output, once the images are pushed."""
    (folder / "settings.ini").write_text(settings)
    env = os.environ | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": url}
    words = [sys.executable, "-c", "from skin_lesion.cli import main; main()", "doctor", "--json"]
    look = lambda *more: subprocess.run(
        [*words, *more], cwd=folder, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    done = look("--before-deploy")  # of the workflow: the images are not there
    assert done.returncode == 0, done.stdout
    ecr = boto3.client(
        "ecr", region_name="eu-west-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="x"
    )
    for name in ("steps", "serve"):
        manifest = json.dumps({"mediaType": "application/vnd.oci.image.manifest.v1+json", "of": name})
        ecr.put_image(repositoryName=f"skin-lesion-{name}", imageManifest=manifest, imageTag="unset")
    done = look()
    lines = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert {f"pipeline skin-lesion-{name}" for name in ("training", "deploy", "notebook-jobs")} <= {
        line["name"] for line in lines
    }


def a_run_and_a_deployment_work_there_and_teardown_takes_the_endpoint_away(url, folder, package):
    """With the settings of Terraform's output, by the commands that a person gives."""
    env = os.environ | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": url}
    program = [sys.executable, "-c", "from skin_lesion.cli import main; main()"]

    def command(*words):
        done = subprocess.run(
            [*program, *words], cwd=folder, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ran = command("run", "training", "--on", "sagemaker")
    assert "was started as execution" in ran and "Succeeded" in ran.splitlines()[-1]
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = lambda service: boto3.client(service, region_name="eu-west-1", endpoint_url=url, **keys)
    bucket = re.search("^bucket = (.*)$", (folder / "settings.ini").read_text(), re.M)[1]
    client("s3").upload_file(str(pack(package, folder / "model.tar.gz")), bucket, "runs/1/model.tar.gz")
    address = f"s3://{bucket}/runs/1/model.tar.gz"
    client("sagemaker").create_model_package(
        ModelPackageGroupName="skin-lesion",
        ModelApprovalStatus="Approved",
        InferenceSpecification={
            "Containers": [{"Image": "steps", "ModelDataUrl": address}],
            "SupportedContentTypes": ["image/jpeg"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
    )
    said = command("deploy", "--on", "sagemaker", "--all")
    assert said.count(" is there") == 2 and said.count(" is as compiled") == 7, said  # Terraform's, and no other
    assert "answers with version 1" in said.splitlines()[-1]
    there = left(url)
    (target,) = there["scaled"]
    assert there["served"] == ["skin-lesion"] and (target["MinCapacity"], target["MaxCapacity"]) == (1, 5)
    scaling = client("application-autoscaling").describe_scaling_policies(ServiceNamespace="sagemaker")
    assert [p["PolicyName"] for p in scaling["ScalingPolicies"]] == ["skin-lesion-load"]
    command("teardown", "--on", "sagemaker")
    there = left(url)
    assert not (there["served"] or there["served by"] or there["models"] or there["scaled"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_an_account_comes_up_and_goes_again_without_a_rest(staged, model, moto, tmp_path, environment):
    root = tmp_path / "account"
    shutil.copytree(staged.parent, root, ignore=shutil.ignore_patterns(".terraform*"))
    folder = root / "terraform"
    on_moto(folder, moto)
    init(folder)
    # without force_destroy, which only dev has, destroy rightly stops at the bucket of access logs
    variables = (f"-var-file=environments/{environment}.tfvars", "-var=force_destroy=true")
    words = ("-no-color", "-auto-approve", "-input=false", *variables)
    began = time.monotonic()
    done = run("terraform", "apply", *words, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    there = left(moto)
    assert len(there["buckets"]) == 6 and "skin-lesion-training" in there["pipelines"] and there["alarms"]
    said = run("terraform", "output", "-raw", "settings", cwd=folder).stdout
    assert "role_arn = arn:aws:iam::123456789012:role/skin-lesion-pipeline" in said
    if environment == "dev":
        the_doctor_finds_all_of_it(moto, said, tmp_path)
        a_run_and_a_deployment_work_there_and_teardown_takes_the_endpoint_away(moto, tmp_path, model[0])
    done = run("terraform", "destroy", *words, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert {kind: names for kind, names in left(moto).items() if names} == {}
    print(f"\n{environment}: applied and destroyed in {time.monotonic() - began:.0f} s")
