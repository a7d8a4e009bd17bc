"""moto's server for `terraform apply`, with what it lacks for this account: python tests/moto_account.py PORT [MODEL'S ADDRESS]

Each gap is filled in moto's own classes, in memory, with the answers that botocore's model of the service asks for. Two
leniencies: moto wants one form of the policy that lets S3 deliver access logs, AWS takes every form that means it; and moto
takes a Deny with a condition for one without, here it is none, so what TLS and KMS are asked for is not tried."""

import json
import sys
import time
import urllib.error
import urllib.request

from moto.applicationautoscaling.responses import ApplicationAutoScalingResponse
from moto.budgets.responses import BudgetsResponse
from moto.core.responses import ActionResult, EmptyResult
from moto.iam.access_control import IAMPolicy
from moto.s3.models import FakeBucket
from moto.s3.responses import S3Response
from moto.sagemaker.exceptions import ResourceNotFound
from moto.sagemaker.models import SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse
from moto.server import ThreadedMotoServer
from moto.servicequotas.responses import ServiceQuotasResponse
from moto.stepfunctions.responses import StepFunctionResponse


def fill_s3():
    """Intelligent-Tiering configurations of a bucket."""
    configurations = {}  # (bucket, id) to XML

    def filled(method, lacking):
        def answer(self, *args, **kwargs):
            bucket, query = [*args, *kwargs.values()][-2:]
            if "intelligent-tiering" not in query:
                return lacking(self, *args, **kwargs)
            key = (bucket, query["id"][0])
            if method == "put":
                configurations[key] = self.body
                return 200, {}, ""
            if method == "delete":
                configurations.pop(key, None)
                return 204, {}, ""
            if key not in configurations:
                return 404, {}, "<Error><Code>NoSuchConfiguration</Code></Error>"
            return 200, {}, configurations[key]

        return answer

    def get_permission(self, action, resource):
        policy = json.loads(self.policy or '{"Statement": []}')
        statements = [statement for statement in policy["Statement"] if "Condition" not in statement]
        return IAMPolicy(json.dumps({"Statement": statements})).is_action_permitted(action, resource)

    for method in ("put", "get", "delete"):
        name = f"_bucket_response_{method}"
        setattr(S3Response, name, filled(method, getattr(S3Response, name)))
    FakeBucket.get_permission = get_permission
    FakeBucket._log_permissions_enabled_policy = staticmethod(
        lambda target_bucket, target_prefix: b"logging.s3.amazonaws.com" in (target_bucket.policy or b"")
    )


def fill_sagemaker():
    """Studio: lifecycle configurations, user profiles, and a domain that tells its id; model package groups can go."""
    kept = {}  # (kind, name) to what describe answers

    def keep(kind, name, facts):
        arn = f"arn:aws:sagemaker:eu-west-1:123456789012:{kind}/{name}"
        kept[kind, name] = facts | {"CreationTime": time.time(), "LastModifiedTime": time.time()}
        return arn

    def found(kind, name):
        if (kind, name) not in kept:
            raise ResourceNotFound(message=f"{kind} {name} does not exist")
        return ActionResult(kept[kind, name])

    def forget(kind, name):
        found(kind, name)
        del kept[kind, name]
        return EmptyResult()

    def create_studio_lifecycle_config(self):
        names = ("Name", "Content", "AppType")
        facts = {f"StudioLifecycleConfig{n}": self._get_param(f"StudioLifecycleConfig{n}") for n in names}
        name = facts["StudioLifecycleConfigName"]
        arn = keep("studio-lifecycle-config", name, facts)
        kept["studio-lifecycle-config", name]["StudioLifecycleConfigArn"] = arn
        return ActionResult({"StudioLifecycleConfigArn": arn})

    def create_user_profile(self):
        facts = {n: self._get_param(n) for n in ("DomainId", "UserProfileName", "UserSettings")}
        name = f"{facts['DomainId']}/{facts['UserProfileName']}"
        arn = keep("user-profile", name, facts | {"Status": "InService"})
        kept["user-profile", name]["UserProfileArn"] = arn
        return ActionResult({"UserProfileArn": arn})

    def profile(self):
        return f"{self._get_param('DomainId')}/{self._get_param('UserProfileName')}"

    def lifecycle(self):
        return self._get_param("StudioLifecycleConfigName")

    created, described = SageMakerModelBackend.create_domain, SageMakerModelBackend.describe_domain

    def create_domain(self, **arguments):
        answer = created(self, **arguments)
        return answer | {"DomainId": f"d-{arguments['domain_name']}"}

    def describe_domain(self, domain_id):
        if domain_id not in self.domains:
            raise ResourceNotFound(message=f"domain {domain_id} does not exist")
        return described(self, domain_id)

    def delete_model_package_group(self):
        del self.sagemaker_backend.model_package_groups[self._get_param("ModelPackageGroupName")]
        return EmptyResult()

    listed = SageMakerModelBackend.list_tags

    def list_tags(self, arn, **page):
        if any(kind in arn for kind in ("studio-lifecycle-config", "user-profile", ":domain/")):
            return [], None
        return listed(self, arn=arn, **page)

    SageMakerModelBackend.create_domain = create_domain
    SageMakerModelBackend.describe_domain = describe_domain
    SageMakerModelBackend.list_tags = list_tags
    for name, method in {
        "create_studio_lifecycle_config": create_studio_lifecycle_config,
        "describe_studio_lifecycle_config": lambda self: found("studio-lifecycle-config", lifecycle(self)),
        "delete_studio_lifecycle_config": lambda self: forget("studio-lifecycle-config", lifecycle(self)),
        "create_user_profile": create_user_profile,
        "describe_user_profile": lambda self: found("user-profile", profile(self)),
        "delete_user_profile": lambda self: forget("user-profile", profile(self)),
        "delete_model_package_group": delete_model_package_group,
    }.items():
        setattr(SageMakerResponse, name, method)


def fill_others():
    """Whom a budget tells, tags of budgets and of scalable targets, questions about state machines, and quotas."""

    def describe_subscribers_for_notification(self):
        budget = self.backend.budgets[self._get_param("AccountId")][self._get_param("BudgetName")]
        asked = {k: v for k, v in self._get_param("Notification").items() if k != "NotificationState"}
        subscribers = next(
            n.subscribers
            for n in budget.notifications
            if {k: v for k, v in n.details.items() if k != "NotificationState"} == asked
        )
        return json.dumps({"Subscribers": subscribers})

    BudgetsResponse.list_tags_for_resource = lambda self: json.dumps({"ResourceTags": []})
    BudgetsResponse.describe_subscribers_for_notification = describe_subscribers_for_notification
    StepFunctionResponse.validate_state_machine_definition = lambda self: ActionResult(
        {"result": "OK", "diagnostics": []}
    )
    StepFunctionResponse.list_state_machine_versions = lambda self: ActionResult({"stateMachineVersions": []})
    ApplicationAutoScalingResponse.list_tags_for_resource = lambda self: json.dumps({"Tags": {}})
    uses = ("processing job", "training job", "spot training job", "endpoint")
    quotas = [f"{name} for {use} usage" for name in ("ml.m5.xlarge", "ml.g5.xlarge", "ml.c5.large") for use in uses]
    ServiceQuotasResponse.list_service_quotas = lambda self: json.dumps({"Quotas": []})
    ServiceQuotasResponse.list_aws_default_service_quotas = lambda self: json.dumps(
        {"Quotas": [{"QuotaName": q, "QuotaCode": f"L-{n:08}", "Value": 8.0} for n, q in enumerate(quotas)]}
    )


def fill_runs(model: str):
    """Steps of an execution, which moto lets end at once; answers of an endpoint, by the server at `model`."""

    def list_pipeline_execution_steps(self):
        arn = self._get_param("PipelineExecutionArn")
        stored = self.sagemaker_backend.describe_pipeline_definition_for_execution(arn)["PipelineDefinition"]
        names = [step["Name"] for step in json.loads(stored)["Steps"]]
        return json.dumps({"PipelineExecutionSteps": [{"StepName": n, "StepStatus": "Succeeded"} for n in names]})

    made = SageMakerRuntimeResponse.setup_class

    def bytes_as_they_are(self, request, full_url, headers, use_raw_body=False):
        return made(self, request, full_url, headers, use_raw_body=True)

    def invoke_endpoint(self):
        kind = {"Content-Type": self.headers["Content-Type"]}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{model}/invocations", self.body, kind)) as answer:
                return 200, {"Content-Type": "application/json"}, answer.read()
        except urllib.error.HTTPError as error:
            told = {"Message": "model", "OriginalStatusCode": error.code, "OriginalMessage": error.read().decode()}
            return 424, {"status": 424, "x-amzn-errortype": "ModelError"}, json.dumps(told)

    SageMakerResponse.list_pipeline_execution_steps = list_pipeline_execution_steps
    SageMakerRuntimeResponse.setup_class = bytes_as_they_are
    SageMakerRuntimeResponse.invoke_endpoint = invoke_endpoint


def main(port: int, model: str = ""):
    fill_runs(model)
    fill_s3()
    fill_sagemaker()
    fill_others()
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    print(f"moto listens on {port}", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
