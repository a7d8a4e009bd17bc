"""moto's server with the links that it lacks: Lambda functions run their real handlers as processes, EventBridge starts state
machines, approving a model is an event, and pipeline executions take time and end as a test says."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import boto3
import pytest
import requests
from moto.awslambda_simple.models import LambdaSimpleBackend
from moto.events.models import Rule, events_backends
from moto.s3.responses import S3Response
from moto.sagemaker.models import FakePipelineExecution, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.server import ThreadedMotoServer
from moto.utilities.arns import parse_arn

REGION, ACCOUNT = "eu-west-1", "123456789012"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION}
# what is not in a Lambda function's Python is not to be had here either
CALL = """import json, sys
folder, event = sys.argv[1], json.load(sys.stdin)
sys.path.insert(0, folder)
for name in ('numpy', 'pandas', 'scipy', 'torch', 'sagemaker', 'click', 'fastcore'): sys.modules[name] = None
out, sys.stdout = sys.stdout, sys.stderr
try:
    import handler, skin_lesion
    assert skin_lesion.__file__.startswith(folder), skin_lesion.__file__
    answer = handler.handler(event, None)
except BaseException as error: answer = {'errorType': type(error).__name__, 'errorMessage': str(error)}; code = 1
else: code = 0
json.dump(answer, out)
sys.exit(code)"""


class Account:
    """The account: clients, and what a test decides about pipelines."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.session, self.clients = boto3.session.Session(), {}
        self.outcomes = {}  # pipeline to (status, reason); Succeeded where a test says nothing
        self.jobs = {}  # pipeline to what its jobs leave behind, called with the id of the execution
        self.starts = []  # (pipeline, parameters)
        self.logs = []  # of the functions
        self.unpacking = threading.Lock()  # a function is invoked by several executions at once

    def client(self, service):
        if service not in self.clients:
            keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
            self.clients[service] = self.session.client(service, region_name=REGION, endpoint_url=self.url, **keys)
        return self.clients[service]

    def run_handler(self, function, body) -> tuple[int, bytes]:
        folder = self.folder / function.function_name
        with self.unpacking:
            if not folder.exists():
                zipfile.ZipFile(io.BytesIO(function.code_bytes)).extractall(folder)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SKIN_LESION_", "PYTHON"))}
        env = kept | KEYS | {"AWS_ENDPOINT_URL": self.url} | function.environment_vars
        done = subprocess.run(
            [sys.executable, "-c", CALL, str(folder)], input=body, capture_output=True, env=env, cwd=self.folder
        )
        self.logs.append(done.stderr.decode())
        return done.returncode, done.stdout


def chain(account: Account, patch: pytest.MonkeyPatch):
    """Adds the links to moto's classes, until `patch` is undone."""

    def invoke(backend, function_name, qualifier, body, headers, response_headers):
        code, answer = account.run_handler(
            backend.get_function(function_name, qualifier), body.encode() if isinstance(body, str) else body
        )
        if code:
            response_headers["x-amz-function-error"] = "Unhandled"
        return answer

    def send_to_targets(rule, event, transform_input=True):
        if rule.event_pattern.matches_event(event):
            for target in rule.targets:
                assert parse_arn(target["Arn"]).service == "states"
                name = f"{rule.name}-{event['id']}"
                sent = dict(stateMachineArn=target["Arn"], input=json.dumps(event, default=str), name=name)
                account.client("stepfunctions").start_execution(**sent)

    made, described = FakePipelineExecution.__init__, SageMakerModelBackend.describe_pipeline_execution

    def begun(execution, *args, **kwargs):
        made(execution, *args, **kwargs)
        execution.pipeline_execution_status, execution.looks = "Executing", 0
        sent = {p["Name"]: p["Value"] for p in execution.pipeline_parameters}
        account.starts.append((execution.arn.split(":pipeline/")[1].split("/")[0], sent))

    def describe(backend, arn):
        pipeline, _, number = arn.split(":pipeline/")[1].split("/")
        execution = backend.pipelines[pipeline].pipeline_executions[arn]
        execution.looks += 1
        if execution.looks == 2:
            status, reason = account.outcomes.get(pipeline, ("Succeeded", None))
            if status == "Succeeded" and pipeline in account.jobs:
                account.jobs[pipeline](number)
            execution.pipeline_execution_status, execution.pipeline_execution_failure_reason = status, reason
        answer = described(backend, arn)
        return answer | {"FailureReason": execution.pipeline_execution_failure_reason or ""}

    answer_about_key, one_at_a_time = S3Response.key_response, threading.RLock()

    def key_response(*args, **kwargs):  # S3 checks If-Match and writes in one act, moto in two
        with one_at_a_time:
            return answer_about_key(*args, **kwargs)

    update = SageMakerModelBackend.update_model_package

    def updated(backend, model_package_arn, model_approval_status, *args, **kwargs):
        arn = update(backend, model_package_arn, model_approval_status, *args, **kwargs)
        group = arn.split("/")[-2]
        event = {
            "Source": "aws.sagemaker",
            "DetailType": "SageMaker Model Package State Change",
            "Detail": json.dumps({"ModelPackageGroupName": group, "ModelApprovalStatus": model_approval_status}),
        }
        threading.Thread(target=events_backends[ACCOUNT][REGION].put_events, args=([event],)).start()
        return arn

    patch.setattr(LambdaSimpleBackend, "invoke", invoke)
    patch.setattr(Rule, "send_to_targets", send_to_targets)
    patch.setattr(S3Response, "key_response", key_response)
    patch.setattr(FakePipelineExecution, "__init__", begun)
    patch.setattr(SageMakerModelBackend, "describe_pipeline_execution", describe)
    patch.setattr(SageMakerModelBackend, "update_model_package", updated)
    no_steps = lambda self: json.dumps({"PipelineExecutionSteps": []})  # moto has no such answer at all
    patch.setattr(SageMakerResponse, "list_pipeline_execution_steps", no_steps, raising=False)


def serve(folder: Path, patch: pytest.MonkeyPatch):
    """A server with the links, until the generator is closed."""
    for name, value in KEYS.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("MOTO_PORT", str(port))
    url = f"http://{host}:{port}"
    config = {"stepfunctions": {"execute_state_machine": True}, "lambda": {"use_docker": False}}
    requests.post(f"{url}/moto-api/reset").raise_for_status()
    requests.post(f"{url}/moto-api/config", json=config).raise_for_status()
    account = Account(folder, url)
    chain(account, patch)
    try:
        yield account
    finally:
        server.stop()
