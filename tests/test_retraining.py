"""The closed loop on AWS: an event, the state machine run for real with the real handlers, the pipelines, the registry."""

import json
import os
import re
import subprocess
import sys
import time

import boto3
import numpy as np
import pytest
from chained_moto import ACCOUNT, REGION, serve
from conftest import ROOT
from moto import mock_aws

from skin_lesion.evaluation.gate import compare_with_champion, gate
from skin_lesion.monitoring.retrain import count_labels, read_record
from skin_lesion.monitoring.windows import read_history

BUCKET, GROUP = "skin-lesion", "skin-lesion"
LAMBDAS = ROOT / "terraform" / "lambdas"
NAMES = sorted(p.parent.name for p in LAMBDAS.glob("*/handler.py"))
MACHINE = f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine:retraining"
SETTINGS = {
    "SKIN_LESION_RETRAIN_POLL_SECONDS": "1",
    "SKIN_LESION_RETRAIN_NEW_LABELS": "0",
    "SKIN_LESION_RETRAIN_LABELS": f"s3://{BUCKET}/labels",
    "SKIN_LESION_RETRAIN_AUTOMATIC": "true",
    "SKIN_LESION_SERVING_CAPTURE": f"s3://{BUCKET}/capture",
    "SKIN_LESION_DATA_DATASET": "ham10000",
    "STATE_MACHINE_ARN": MACHINE,
    "METRICS_NAMESPACE": "skin-lesion",
}
DRIFT = {
    "endpoint": "skin-lesion",
    "alarm": True,
    "drift": True,
    "lasting": True,
    "aspects": [{"aspect": "sharpness", "effect": 0.41, "adjusted": 1e-9}],
    "quality": [],
}


def fill(text, **values):
    """What Terraform's templatefile does."""
    return re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], text)


@pytest.fixture(scope="module")
def zips(tmp_path_factory):
    out = tmp_path_factory.mktemp("zips")
    subprocess.run([sys.executable, LAMBDAS / "build.py", out], check=True, capture_output=True)
    return out


@pytest.fixture
def account(tmp_path, zips, monkeypatch):
    server = serve(tmp_path, monkeypatch)
    account = next(server)
    s3 = account.client("s3")
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    role = account.client("iam").create_role(RoleName="r", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    for name in NAMES:
        account.client("lambda").create_function(
            FunctionName=name,
            Runtime="python3.11",
            Handler="handler.handler",
            Role=role,
            Code={"ZipFile": (zips / f"{name}.zip").read_bytes()},
            Environment={"Variables": SETTINGS},
        )
    sns, sqs = account.client("sns"), account.client("sqs")
    topic = sns.create_topic(Name="alarms")["TopicArn"]
    account.queue = sqs.create_queue(QueueName="mail")["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=account.queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn, Attributes={"RawMessageDelivery": "true"})
    functions = {n: f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{n}" for n in NAMES}
    definition = fill((ROOT / "pipelines" / "retraining.asl.json").read_text(), topic=topic, **functions)
    made = account.client("stepfunctions").create_state_machine(name="retraining", definition=definition, roleArn=role)
    assert made["stateMachineArn"] == MACHINE
    rules = json.loads(
        fill(
            (ROOT / "pipelines" / "retraining.rules.json").read_text(),
            bucket=BUCKET,
            model_package_group=GROUP,
            state_machine_arn=MACHINE,
        )
    )
    events = account.client("events")
    for name in ("asked", "approved", "written"):
        events.put_rule(Name=name, EventPattern=json.dumps(rules[name]))
        events.put_targets(Rule=name, Targets=[{"Id": "machine", "Arn": MACHINE}])
    sagemaker = account.client("sagemaker")
    sagemaker.create_model_package_group(ModelPackageGroupName=GROUP)
    for stage in ("training", "window", "deploy"):
        sagemaker.create_pipeline(PipelineName=f"skin-lesion-{stage}", PipelineDefinition="{}", RoleArn=role)
    register(account, "first", "Approved", {})
    yield account
    server.close()


def register(account, execution, status, evaluation):
    """A version, as the training pipeline registers it."""
    place = f"runs/{execution}"
    s3 = account.client("s3")
    s3.put_object(Bucket=BUCKET, Key=f"{place}/model.tar.gz", Body=execution.encode())
    s3.put_object(Bucket=BUCKET, Key=f"{place}/evaluation.json", Body=json.dumps(evaluation))
    statistics = {"ContentType": "application/json", "S3Uri": f"s3://{BUCKET}/{place}/evaluation.json"}
    account.client("sagemaker").create_model_package(
        ModelPackageGroupName=GROUP,
        ModelApprovalStatus=status,
        CustomerMetadataProperties={"execution": execution},
        ModelMetrics={"ModelQuality": {"Statistics": statistics}},
        InferenceSpecification={
            "Containers": [{"Image": "i", "ModelDataUrl": f"s3://{BUCKET}/{place}/model.tar.gz"}],
            "SupportedContentTypes": ["image/jpeg"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
    )


def evaluated(wrong_challenger, wrong_champion):
    """An evaluation of two models on the same 200 pictures, of which they call that many wrong."""
    y = np.arange(200) % 2
    answers = []
    for wrong in (wrong_challenger, wrong_champion):
        p = np.eye(2)[y]
        p[:wrong] = p[:wrong, ::-1]
        answers.append(p)
    found = compare_with_champion(1, *answers, np.ones(200, bool), y, np.arange(200), 0.01, bootstrap=20)
    share = {"value": 1 - wrong_challenger / 200, "low": 0.5, "high": 1.0}
    evaluation = {"champion": found, "balanced_accuracy": share, "melanoma_sensitivity": share}
    return evaluation | {"gate": gate(evaluation, 0.5, 0.5, 0.01)}


def put_event(account, detail):
    entry = {"Source": "skin-lesion.monitor", "DetailType": "Skin lesion monitoring", "Detail": json.dumps(detail)}
    answer = account.client("events").put_events(Entries=[entry])
    assert answer["FailedEntryCount"] == 0
    return f"asked-{answer['Entries'][0]['EventId']}"


def executions(account, prefix):
    steps = account.client("stepfunctions")
    listed = steps.list_executions(stateMachineArn=MACHINE)["executions"]
    return [steps.describe_execution(executionArn=e["executionArn"]) for e in listed if e["name"].startswith(prefix)]


def ended(account, prefix, seconds=240):
    """The execution of that name, once it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [e for e in executions(account, prefix) if e["status"] != "RUNNING"]
        if found:
            return found[0]
        time.sleep(0.5)
    raise AssertionError(f"{prefix} has not ended in {seconds} s: {account.logs[-3:]}")


def messages(account):
    """The subjects and texts that the topic sent."""
    found = account.client("sqs").receive_message(QueueUrl=account.queue, MaxNumberOfMessages=10).get("Messages", [])
    return [m["Body"] for m in found]


def record(account, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", account.url)
    return read_record(f"s3://{BUCKET}/retraining/record.jsonl")


def statuses(account):
    listed = account.client("sagemaker").list_model_packages(ModelPackageGroupName=GROUP)
    return {p["ModelPackageVersion"]: p["ModelApprovalStatus"] for p in listed["ModelPackageSummaryList"]}


def test_labels_that_the_last_retraining_counted_are_not_read_again(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})

        def put(key, *ids):
            lines = [json.dumps({"eventMetadata": {"eventId": id}}) for id in ids]
            s3.put_object(Bucket=BUCKET, Key=f"labels/e/{key}.jsonl", Body="\n".join(lines))
            return s3.head_object(Bucket=BUCKET, Key=f"labels/e/{key}.jsonl")["LastModified"]

        place = f"s3://{BUCKET}/labels/e"
        first = put("2026/01/01/00/a", "x", "y")
        assert count_labels(place) == 2
        history = [{"time": first.isoformat(), "id": "a", "event": "started", "labels": 50}]
        history += [{"time": first.isoformat(), "id": "b", "event": "refused", "labels": 70}]
        assert count_labels(place, history) == 50
        while put("2026/01/01/01/b", "y", "z", "z") <= first:  # S3's clock has seconds
            time.sleep(0.2)
        assert (count_labels(place, history), count_labels(place)) == (52, 3)


def test_drift_trains_compares_approves_and_deploys_and_a_second_alarm_is_refused(account, monkeypatch):
    label = {"groundTruthData": {"data": "NV", "encoding": "CSV"}, "eventMetadata": {"eventId": "a"}}
    account.client("s3").put_object(Bucket=BUCKET, Key="labels/2026/01/01/00/a.jsonl", Body=json.dumps(label))

    def window(execution):
        place = f"runs/{execution}/window/comparison/window.json"
        account.client("s3").put_object(Bucket=BUCKET, Key=place, Body='{"difference": 0.1, "pictures": 240}')

    account.jobs = {
        "skin-lesion-training": lambda e: register(account, e, "PendingManualApproval", evaluated(4, 20)),
        "skin-lesion-window": window,
    }
    first = ended(account, put_event(account, DRIFT))
    assert first["status"] == "SUCCEEDED", (first, account.logs)
    answer = json.loads(first["output"])
    assert answer["outcome"] == "promoted" and "+0.080 against champion version 1" in answer["says"], answer
    assert "+0.100 on 240 pictures" in answer["says"]
    deployed = ended(account, "approved-")
    assert deployed["status"] == "SUCCEEDED", (deployed, account.logs)
    champion, challenger = f"s3://{BUCKET}/champion/{GROUP}/1", f"s3://{BUCKET}/champion/{GROUP}/2"
    (training, sent), (comparison, compared), (deploy, served) = account.starts
    assert (training, comparison, deploy) == ("skin-lesion-training", "skin-lesion-window", "skin-lesion-deploy")
    data = {"DataDataset": "ham10000", "InputData": f"s3://{BUCKET}/raw/ham10000"}
    assert sent == {"ChampionData": champion, **data}
    assert served == {"ChampionData": challenger, "DeployPlace": "sagemaker"}
    assert compared["ChampionData"] == champion and compared["LabelsData"] == f"s3://{BUCKET}/labels"
    assert compared["CaptureData"] == f"s3://{BUCKET}/capture/skin-lesion"
    package = account.client("s3").get_object(Bucket=BUCKET, Key="champion/skin-lesion/2/model.tar.gz")["Body"].read()
    assert compared["ChallengerData"] == f"s3://{BUCKET}/runs/{package.decode()}"
    assert statuses(account) == {1: "Approved", 2: "Approved"}

    second = ended(account, put_event(account, DRIFT))
    said = json.loads(second["output"])
    assert (second["status"], said["event"]) == ("SUCCEEDED", "refused")
    assert "cool-down: the last one ended 0.0 h ago, 72 h must have passed" in said["says"]
    assert len(account.starts) == 3
    assert [line["event"] for line in record(account, monkeypatch)] == ["started", "ended", "refused"]
    sent = messages(account)
    assert len(sent) == 2 and "Version 2 is approved" in sent[0] and "The approved version serves" in sent[1]


def test_what_an_isolated_monitor_writes_starts_it_and_the_next_run_finds_the_windows(account, tmp_path):
    """Its job reaches no service: S3 tells EventBridge of event.json, which the state machine and a function hear."""
    s3, place = account.client("s3"), "runs/e1/monitor/monitor"
    s3.put_bucket_notification_configuration(Bucket=BUCKET, NotificationConfiguration={"EventBridgeConfiguration": {}})
    days = [f"2026-03-0{day}T00:00:00+00:00" for day in range(1, 5)]
    windows = [{"start": a, "end": b, "alarm": b == days[-1]} for a, b in zip(days, days[1:])]
    drift = {
        "endpoint": "skin-lesion",
        "version": "v1",
        "windows": [w | {"aspects": [], "pictures": 40} for w in windows],
    }
    event = {"source": "skin-lesion.monitor", "detail": DRIFT | {"lasting": False}}
    for name, text in {"drift.json": json.dumps(drift), "metrics.jsonl": "", "event.json": json.dumps(event)}.items():
        s3.put_object(Bucket=BUCKET, Key=f"{place}/{name}", Body=text)
    done = ended(account, "written-")
    assert done["status"] == "SUCCEEDED" and "no drift that lasts" in json.loads(done["output"])["says"], done
    answer = account.client("lambda").invoke(FunctionName="publish_metrics", Payload=done["input"])
    kept = json.load(answer["Payload"])["history"]
    assert kept.startswith("monitoring/skin-lesion/") and kept.endswith("-e1.json")
    s3.download_file(BUCKET, kept, str(tmp_path / "kept.json"))
    assert read_history(tmp_path, days[-1], "v1") == windows
    assert read_history(tmp_path, days[1], "v1") == windows[:1], "what the next run decides anew is its own"


def test_an_alarm_that_does_not_last_is_no_reason(account, monkeypatch):
    done = ended(account, put_event(account, DRIFT | {"lasting": False}))
    assert done["status"] == "SUCCEEDED" and "no drift that lasts" in json.loads(done["output"])["says"]
    assert account.starts == [] and record(account, monkeypatch) == []


def test_a_failing_retrain_alarms_and_the_champion_serves_on(account, monkeypatch):
    why = "train: AlgorithmError: out of memory in account 123456789012"
    account.outcomes = {"skin-lesion-training": ("Failed", why)}
    done = ended(account, put_event(account, DRIFT))
    assert done["status"] == "FAILED" and done["error"] == "RetrainingFailed"
    [message] = messages(account)
    assert "champion goes on serving" in message and "out of memory" in message and ACCOUNT not in message
    assert statuses(account) == {1: "Approved"} and [name for name, _ in account.starts] == ["skin-lesion-training"]
    assert [line.get("outcome") for line in record(account, monkeypatch)] == [None, "failed"]
    refused = json.loads(ended(account, put_event(account, DRIFT))["output"])
    assert "cool-down" in refused["says"] and len(account.starts) == 1  # a failure is not tried again at once


def test_a_challenger_that_lost_is_rejected_and_nothing_is_deployed(account):
    account.jobs = {
        "skin-lesion-training": lambda e: register(account, e, "PendingManualApproval", evaluated(20, 4)),
    }
    done = ended(account, put_event(account, DRIFT))
    said = json.loads(done["output"])
    assert said["outcome"] == "kept" and "newest window: not compared" in said["says"], said
    assert statuses(account) == {1: "Approved", 2: "Rejected"}
    assert [name for name, _ in account.starts] == ["skin-lesion-training"]
    assert executions(account, "approved-") == []


def test_a_function_that_fails_alarms_too(account, monkeypatch):
    account.client("sagemaker").delete_pipeline(PipelineName="skin-lesion-training")
    done = ended(account, put_event(account, DRIFT))
    assert done["status"] == "FAILED", done
    [message] = messages(account)
    assert "retraining failed" in message
    assert [line.get("outcome") for line in record(account, monkeypatch)] == [None, "failed"]


def test_two_alarms_at_once_start_one(account, monkeypatch):
    names = [put_event(account, DRIFT) for _ in range(3)]
    account.jobs = {
        "skin-lesion-training": lambda e: register(account, e, "PendingManualApproval", evaluated(4, 20)),
    }
    for name in names:
        ended(account, name)
    lines = record(account, monkeypatch)
    assert sorted(line["event"] for line in lines) == ["ended", "refused", "refused", "started"]
    ended(account, "approved-")
    assert [name for name, _ in account.starts].count("skin-lesion-training") == 1


def test_a_person_asks_through_the_route(account):
    account.jobs = {
        "skin-lesion-training": lambda e: register(account, e, "PendingManualApproval", evaluated(4, 20)),
    }
    client = account.client("lambda")

    def call(body):
        caller = {"identity": {"userArn": f"arn:aws:iam::{ACCOUNT}:user/anna"}}
        payload = json.dumps({"body": body, "requestContext": caller})
        return json.load(client.invoke(FunctionName="retrain_ask", Payload=payload)["Payload"])

    assert call("{}")["statusCode"] == 400
    answer = call('{"reason": "a new dermatoscope in clinic B"}')
    assert answer["statusCode"] == 202, answer
    done = ended(account, json.loads(answer["body"])["execution"])
    assert json.loads(done["input"])["by"] == "user/anna"
    assert json.loads(done["output"])["outcome"] == "promoted"
    assert ended(account, "approved-")["status"] == "SUCCEEDED"


def test_the_command_line_goes_through_the_stages_under_the_same_guards(account, monkeypatch, project):
    account.jobs = {
        "skin-lesion-training": lambda e: register(account, e, "PendingManualApproval", evaluated(4, 20)),
    }
    project.env |= SETTINGS | {"AWS_ENDPOINT_URL": account.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    project.env["AWS_DEFAULT_REGION"] = REGION
    done = project.cli("retrain", "--reason", "a new dermatoscope", "--on", "sagemaker")
    assert done.returncode == 0 and "Version 2 is approved" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert ACCOUNT not in done.stdout
    again = project.cli("retrain", "--reason", "impatience", "--on", "sagemaker")
    assert again.returncode == 0 and "not retrained: cool-down" in again.stdout, again.stdout[-2000:]
    assert [line["event"] for line in record(account, monkeypatch)] == ["started", "ended", "refused"]


def test_plain_papermill_runs_the_same_notebook_with_texts_as_a_notebook_job_does(account, monkeypatch, tmp_path):
    out = tmp_path / "done.ipynb"
    event = '{"kind": "schedule", "text": "the monthly retraining"}'
    words = [
        "-m",
        "papermill",
        ROOT / "nbs/steps/70_retrain.ipynb",
        out,
        "-p",
        "event",
        event,
        "-p",
        "place",
        "sagemaker",
    ]
    env = os.environ | SETTINGS | {"AWS_ENDPOINT_URL": account.url, "SKIN_LESION_ROOT": str(tmp_path / "root")}
    env |= {"SKIN_LESION_RETRAIN_NEW_LABELS": "50", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = record(account, monkeypatch)
    assert line["reason"]["kind"] == "schedule" and line["event"] == "refused" and account.starts == []
    assert "new labels: 0 pictures were labelled since the last one, 50 are needed" in out.read_text()


def test_the_guard_refuses_above_the_budget_in_money(account, monkeypatch):
    """By the prices that are in the function's own zip."""
    client = account.client("lambda")
    variables = SETTINGS | {"SKIN_LESION_AWS_BUDGET": "1"}
    client.update_function_configuration(FunctionName="retrain_guard", Environment={"Variables": variables})
    payload = json.dumps({"id": "x", "event": {"kind": "person", "text": "a new dermatoscope"}})
    answer = json.load(client.invoke(FunctionName="retrain_guard", Payload=payload)["Payload"])
    assert answer["event"] == "refused", answer
    assert re.search(
        r"not retrained: budget: 0 started in \w+ \d{4}, 4 are allowed; "
        r"with this one US\$ \d+\.\d\d this month, 1 are allowed \(setting aws.budget\)$",
        answer["says"],
    ), answer["says"]
