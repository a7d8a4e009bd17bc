"""Compiling is offline and repeatable, and the committed definition is current, valid and closed."""

import copy
import json
import logging
import os
import subprocess
import sys

import boto3
import pytest

from skin_lesion.cloud.compile import (
    CALLS_AWS,
    compile_pipeline,
    each_step,
    has_local_storage,
    unsafe_jobs,
    validate,
)
from skin_lesion.settings import load_settings, parameter_name, pipeline_settings, project_file

DEFINITIONS = project_file("pipelines", "definitions")
COMMITTED = {path.stem: path.read_text() for path in DEFINITIONS.glob("*.json")}

# No sockets and no AWS settings; a fresh interpreter has its own hash seed, so an order taken from a set shows.
OFFLINE = """
import json, socket, sys
def refuse(*args, **kwargs): raise OSError("no sockets here")
socket.socket.connect = socket.socket.bind = socket.getaddrinfo = socket.create_connection = refuse
from skin_lesion.cloud.compile import compile_pipeline
from skin_lesion.settings import load_settings
settings = load_settings(environ={})
sys.stdout.write(json.dumps({name: compile_pipeline(name, settings) for name in sys.argv[1:]}))
"""


def compile_offline(hash_seed, folder, names):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SAGEMAKER_", "SKIN_LESION_"))}
    environ |= {"PYTHONHASHSEED": hash_seed, "HOME": str(folder), "PYTHONPATH": str(project_file())}
    done = subprocess.run([sys.executable, "-c", OFFLINE, *names], cwd=folder, env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert list(folder.iterdir()) == []  # nothing is left behind
    return done


@pytest.fixture(scope="module")
def definition():
    return json.loads(COMMITTED["training"])


def change(definition, name):
    """A copy of the definition, and the arguments of one of its steps to break."""
    changed = copy.deepcopy(definition)
    return changed, next(s["Arguments"] for s in each_step(changed["Steps"]) if s["Name"] == name)


def test_two_compilations_without_sockets_give_the_committed_bytes(tmp_path):
    first, second = compile_offline("1", tmp_path, COMMITTED), compile_offline("2", tmp_path, ["training"])
    assert json.loads(first.stdout)["training"] == json.loads(second.stdout)["training"]
    assert first.stderr == b""
    differ = [name for name, text in json.loads(first.stdout).items() if text != COMMITTED[name]]
    assert not differ, f"run: skin-lesion compile {differ[0]} -o pipelines/definitions/{differ[0]}.json"
    assert COMMITTED.keys() == {path.stem for path in project_file("pipelines").glob("*.py")}


def test_compiling_for_other_settings_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "of-the-user")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-2")
    environ, session = dict(os.environ), boto3.DEFAULT_SESSION
    handlers, level, disabled = logging.root.handlers[:], logging.root.level, logging.root.manager.disable
    # ml.p3 has an EBS volume, to which SageMaker gives our key; the default ml.g5 has a disk of its own, where it takes none
    settings = load_settings(
        {
            "train.epochs": "3",
            "aws.region": "eu-north-1",
            "aws.training_instance": "ml.p3.2xlarge",
            "aws.training_instances": "2",
        },
        environ={},
    )
    definition = json.loads(compile_pipeline("training", settings))
    assert dict(os.environ) == environ and boto3.DEFAULT_SESSION is session
    assert (logging.root.handlers, logging.root.level, logging.root.manager.disable) == (handlers, level, disabled)
    assert {"DefaultValue": 3, "Name": "TrainEpochs", "Type": "Integer"} in definition["Parameters"]
    assert unsafe_jobs(definition) == [] and validate(definition) == []
    changed, arguments = change(definition, "train")
    assert arguments["ResourceConfig"]["InstanceCount"] == 2
    del arguments["ResourceConfig"]["VolumeKmsKeyId"]
    assert unsafe_jobs(changed) == ["train: no KMS key on its volume"]


def test_a_profile_is_compiled_in_and_what_is_not_of_it_stays(definition):
    settings = load_settings(environ={}, profile="full")
    full = json.loads(compile_pipeline("training", settings))
    assert unsafe_jobs(full) == [] and validate(full) == []
    before, after = ({p["Name"]: p["DefaultValue"] for p in d["Parameters"]} for d in (definition, full))
    turned = {parameter_name(n) for n, s in settings.items() if s.source == "profile full" and n.startswith("train.")}
    assert {n for n in after if after[n] != before[n]} == turned | {"DataImageSize"}
    assert after["DataImageSize"] == 260 and after["TrainViews"] == 8
    assert (
        json.loads(compile_pipeline("training", load_settings(environ={}, profile="quick"))) == definition
    )  # the defaults


def test_several_hosts_decode_a_part_each_and_train_on_copies_of_all_shards(definition):
    """nbs/guides/sagemaker.ipynb gives the reasons."""
    settings = load_settings({"aws.prepare_instances": "3", "aws.training_instances": "2"}, environ={})
    spread = json.loads(compile_pipeline("training", settings))
    assert unsafe_jobs(spread) == [] and validate(spread) == []
    decode, prepare = spread["Steps"][:2]
    assert (decode["Name"], decode["Arguments"]["ProcessingResources"]["ClusterConfig"]["InstanceCount"]) == (
        "decode",
        3,
    )
    raw = decode["Arguments"]["ProcessingInputs"][0]["S3Input"]
    assert raw["S3DataDistributionType"] == "ShardedByS3Key" and raw["S3Uri"] == {"Get": "Parameters.InputData"}
    assert "Steps.decode." in prepare["Arguments"]["ProcessingInputs"][0]["S3Input"]["S3Uri"]["Get"]
    assert [s["Name"] for s in spread["Steps"][1:]] == [s["Name"] for s in definition["Steps"]]
    arguments = {step["Name"]: step["Arguments"] for step in each_step(spread["Steps"])}
    channels = {
        c["ChannelName"]: (c["InputMode"], c["DataSource"]["S3DataSource"]["S3DataDistributionType"])
        for c in arguments["train"]["InputDataConfig"]
    }
    assert channels == dict.fromkeys(("train", "validation", "table"), ("File", "FullyReplicated"))
    inputs = [(name, i["S3Input"]) for name, a in arguments.items() for i in a.get("ProcessingInputs", ())]
    assert {i["S3InputMode"] for _, i in inputs} == {"File"}
    assert {name for name, i in inputs if i["S3DataDistributionType"] != "FullyReplicated"} == {"decode"}


def test_captured_pictures_are_inputs_of_prepare_which_is_never_answered_from_the_cache(definition):
    """What is captured changes under one address, and SageMaker's cache looks at addresses."""
    settings = load_settings({"data.dataset": "ham10000,captured", "serving.capture": "s3://captures"}, environ={})
    beside = json.loads(compile_pipeline("training", settings))
    assert unsafe_jobs(beside) == [] and validate(beside) == []
    prepare = beside["Steps"][0]
    inputs = {i["InputName"]: i["S3Input"]["S3Uri"]["Get"] for i in prepare["Arguments"]["ProcessingInputs"]}
    assert inputs == {
        n: f"Parameters.{p}Data" for n, p in (("raw", "Input"), ("captures", "Capture"), ("labels", "Labels"))
    }
    assert "CacheConfig" not in prepare and "CacheConfig" in definition["Steps"][0]
    defaults = {p["Name"]: p["DefaultValue"] for p in beside["Parameters"]}
    assert defaults["CaptureData"] == "s3://captures/skin-lesion"
    several = load_settings({"data.dataset": "ham10000,captured", "aws.prepare_instances": "2"}, environ={})
    with pytest.raises(ValueError, match="aws.prepare_instances = 1"):
        compile_pipeline("training", several)


def test_every_pipeline_setting_is_a_parameter_and_reaches_a_step(definition):
    names = {p["Name"] for p in definition["Parameters"]}
    for name in pipeline_settings(load_settings(environ={})):
        if name.startswith(("experiments.", "monitoring.")):
            continue  # of other pipelines
        parameter = "".join(word.capitalize() for word in name.replace(".", "_").split("_"))
        assert parameter in names
        assert f'"Parameters.{parameter}"' in json.dumps(definition["Steps"]), f"{parameter} is used by no step"


def test_unknown_pipeline_names_those_that_exist():
    with pytest.raises(ValueError, match="There is no pipeline 'x'. There are: .*training"):
        compile_pipeline("x", load_settings(environ={}))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_definition_is_valid_and_safe(name):
    assert validate(json.loads(COMMITTED[name])) == []
    assert unsafe_jobs(json.loads(COMMITTED[name])) == []


@pytest.mark.parametrize(
    "step, path, value, problem",
    [
        (
            "prepare",
            ["AppSpecification", "Entrypoint"],
            "x",
            'prepare: Unknown parameter in AppSpecification: "Entrypoint"',
        ),
        (
            "prepare",
            ["ProcessingResources", "ClusterConfig", "InstanceCount"],
            "1",
            "prepare: Invalid type for parameter",
        ),
        ("train", ["RoleArn"], None, "train: Invalid type for parameter RoleArn"),
        ("train", ["HyperParameters", "seed"], {"Get": "Parameters.TrainSeed"}, "train: Invalid type for parameter"),
        ("evaluate", ["RoleArn"], {"Get": "Parameters.Rolearn"}, "evaluate: refers to 'Rolearn'"),
        ("register", ["RoleArn"], {"Get": "Steps.prepared.RoleArn"}, "register: refers to 'prepared'"),
        ("model", ["ModelMetrics", "Quality"], {}, "model: Unknown parameter in ModelMetrics"),
    ],
)
def test_a_planted_fault_is_found(definition, step, path, value, problem):
    changed, arguments = change(definition, step)
    for key in path[:-1]:
        arguments = arguments[key]
    arguments[path[-1]] = value
    found = validate(changed)
    assert len(found) == 1 and problem in found[0], found


@pytest.mark.parametrize("step", ["prepare", "evaluate", "register"])
@pytest.mark.parametrize(
    "path, problem",
    [
        (["ProcessingResources", "ClusterConfig", "VolumeKmsKeyId"], "no KMS key on its volume"),
        (["ProcessingOutputConfig", "KmsKeyId"], "no KMS key on its outputs"),
        (["NetworkConfig", "VpcConfig"], "no private network"),
        (["NetworkConfig", "VpcConfig", "Subnets"], "no private network"),
        (["NetworkConfig", "EnableNetworkIsolation"], "no network isolation"),
        (["NetworkConfig", "EnableInterContainerTrafficEncryption"], "no encryption between containers"),
    ],
)
def test_an_open_processing_job_is_found(definition, step, path, problem):
    changed, arguments = change(definition, step)
    for key in path[:-1]:
        arguments = arguments[key]
    del arguments[path[-1]]
    assert unsafe_jobs(changed) == [f"{step}: {problem}"]


@pytest.mark.parametrize(
    "path, problem",
    [
        (["OutputDataConfig", "KmsKeyId"], "no KMS key on its outputs"),
        (["VpcConfig"], "no private network"),
        (["EnableNetworkIsolation"], "no network isolation"),
        (["EnableInterContainerTrafficEncryption"], "no encryption between containers"),
        (["CheckpointConfig"], "spot instances without a checkpoint path"),
        (["CheckpointConfig", "S3Uri"], "spot instances without a checkpoint path"),
    ],
)
def test_an_open_training_job_is_found(definition, path, problem):
    changed, arguments = change(definition, "train")
    for key in path[:-1]:
        arguments = arguments[key]
    del arguments[path[-1]]
    assert unsafe_jobs(changed) == [f"train: {problem}"]


ALL_JOBS = [
    (name, step["Name"])
    for name, text in sorted(COMMITTED.items())
    for step in each_step(json.loads(text)["Steps"])
    if step["Type"] in ("Processing", "Training", "Tuning")
]


@pytest.mark.parametrize("name, step", ALL_JOBS, ids="-".join)
def test_whatever_is_taken_away_from_any_job_of_any_pipeline_is_found(name, step):
    definition = json.loads(COMMITTED[name])
    defaults = {p["Name"]: p.get("DefaultValue") for p in definition["Parameters"]}

    def without(key):
        """The definition's problems when `key` is not in the job at all; None where the job never had it."""
        changed, arguments = change(definition, step)
        taken = []

        def take(value):
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            if isinstance(value, dict) and key in value:
                taken.append(value.pop(key))
            for child in list(inside):
                take(child)

        take(arguments)
        return unsafe_jobs(changed) if taken else None

    _, arguments = change(definition, step)
    arguments = arguments.get("TrainingJobDefinition", arguments)
    machine = arguments.get("ResourceConfig") or arguments["ProcessingResources"]["ClusterConfig"]
    instance = machine["InstanceType"]
    instance = instance if isinstance(instance, str) else defaults[instance["Get"].removeprefix("Parameters.")]
    expected = {
        "KmsKeyId": "no KMS key on its outputs",
        "VpcConfig": "no private network",
        "Subnets": "no private network",
        "SecurityGroupIds": "no private network",
        "EnableInterContainerTrafficEncryption": "no encryption between containers",
    }
    if step not in CALLS_AWS:
        expected["EnableNetworkIsolation"] = "no network isolation"
    if not has_local_storage(instance):
        expected["VolumeKmsKeyId"] = "no KMS key on its volume"
    for key, problem in expected.items():
        assert without(key) == [f"{step}: {problem}"], key


def test_a_job_that_is_not_on_spot_needs_no_checkpoint_path(definition):
    changed, arguments = change(definition, "train")
    del arguments["CheckpointConfig"], arguments["EnableManagedSpotTraining"]
    assert unsafe_jobs(changed) == []


def test_retries_are_only_for_what_passes_by_itself(definition):
    passing = {"Step.THROTTLING", "SageMaker.RESOURCE_LIMIT", "SageMaker.CAPACITY_ERROR"}
    for step in each_step(definition["Steps"]):
        assert {e for policy in step.get("RetryPolicies", []) for e in policy["ExceptionType"]} <= passing


def test_a_registered_model_names_every_type_that_the_server_takes_and_gives():
    register = next(
        s
        for s in each_step(json.loads(project_file("pipelines", "definitions", "training.json").read_text())["Steps"])
        if s["Type"] == "RegisterModel"
    )
    types = register["Arguments"]["InferenceSpecification"]
    described = json.loads(project_file("nbs", "serving", "openapi.json").read_text())["paths"]["/invocations"]["post"]
    assert set(types["SupportedContentTypes"]) == set(described["requestBody"]["content"])
    assert set(types["SupportedResponseMIMETypes"]) == set(described["responses"]["200"]["content"])
