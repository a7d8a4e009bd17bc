"""Images and pipelines into moto's account. The container tool is a script that writes down what it is told: pushing needs a
registry, and `make image-test` builds the images for real."""

import json
import os

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws

from skin_lesion.cli import main
from skin_lesion.cloud import release as module
from skin_lesion.settings import load_settings, project_file

REGION, ACCOUNT = "eu-west-1", "123456789012"  # moto's
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
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
def aws(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        session = boto3.Session(region_name=REGION)
        for name in ("steps", "serve"):
            session.client("ecr").create_repository(repositoryName=f"skin-lesion-{name}")
        yield session


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """`docker` on the path; gives the words it was called with, a line a call."""
    log, script = tmp_path / "log", tmp_path / "bin" / "docker"
    script.parent.mkdir()
    script.write_text(TOOL.format(log=log))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


def put_image(aws, name):
    manifest = json.dumps({"mediaType": "application/vnd.oci.image.manifest.v1+json", "of": name})
    aws.client("ecr").put_image(repositoryName=f"skin-lesion-{name}", imageManifest=manifest, imageTag="abc123")


def test_only_what_ecr_lacks_is_built_and_pushed(aws, tool):
    put_image(aws, "serve")
    lines = []
    module.push_images(load_settings(VALUES, environ={}), lines.append)
    login, password, build, push = tool()
    assert login == f"login --username AWS --password-stdin {REGISTRY}" and password and "x" != password
    dockerfile = project_file("pipelines", "images", "steps", "Dockerfile")
    assert build.startswith(f"build -f {dockerfile} --build-arg COMMIT=") and build.endswith(
        f"-t {VALUES['aws.image_uri']} ."
    )
    assert push == f"push {VALUES['aws.image_uri']}"
    assert [line.split(":", 1)[1] for line in lines] == ["abc123 was built and pushed", "abc123 is there"]
    assert ACCOUNT not in str(lines)


def test_a_failed_build_pushes_nothing_and_names_the_command(aws, tool, monkeypatch):
    monkeypatch.setenv("FAILS", "build")
    with pytest.raises(RuntimeError, match="`docker build` ended with 1"):
        module.push_images(load_settings(VALUES, environ={}), print)
    assert not any(line.startswith("push") for line in tool())


def test_without_a_tool_or_for_a_digest_it_says_what_is_needed(aws, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="aws.image_uri is not in ECR. Building it needs Docker or podman"):
        module.push_images(load_settings(VALUES, environ={}), print)
    digest = {"aws.image_uri": VALUES["aws.image_uri"].replace(":abc123", "@sha256:" + "0" * 64)}
    with pytest.raises(ValueError, match="a digest cannot be built"):
        module.push_images(load_settings(VALUES | digest, environ={}), print)


def test_deploy_all_goes_in_order_and_leaves_alone_what_is_there(aws, monkeypatch, tmp_path):
    """With one pipeline, because compiling all seven takes long; the endpoint then lacks an approved version."""
    (tmp_path / "pipelines" / "definitions").mkdir(parents=True)
    (tmp_path / "pipelines" / "definitions" / "window.json").touch()
    monkeypatch.setattr(module, "project_file", lambda *parts: tmp_path.joinpath(*parts))
    for name in ("steps", "serve"):
        put_image(aws, name)
    sagemaker = aws.client("sagemaker")
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
