"""The account of terraform/, as `terraform test` makes it with an imitated provider, without an account or a network: valid,
closed, encrypted, on record, no role with more than it needs, and the same core in CloudFormation."""

import json
import re

import boto3
from cfnlint.decode import decode as decode_cfn
from infra import ROOT, TERRAFORM, init, listed, loaded, of_type, policies, run
from moto import mock_aws

from skin_lesion.cloud.compile import compile_pipeline, unsafe_jobs, validate
from skin_lesion.monitoring.windows import metric_lines
from skin_lesion.settings import load_settings

TEMPLATE = TERRAFORM / "cloudformation" / "core.yaml"
# Actions that change something, for which IAM has no resource: allowed on "*" with a condition, and no others.
WITHOUT_RESOURCE = {
    "cloudwatch:PutMetricData",
    "logs:CreateLogDelivery",
    "logs:UpdateLogDelivery",
    "logs:DeleteLogDelivery",
    "logs:PutResourcePolicy",
}


def too_much(statements):
    """What a policy allows beyond the rules of this project, a line each."""
    found = []
    for statement in statements:
        if statement["Effect"] != "Allow":
            continue
        actions, anywhere = listed(statement["Action"]), "*" in listed(statement["Resource"])
        found += [f"{action}: a wildcard" for action in actions if "*" in action]
        writes = [a for a in actions if not re.match(r"[a-z0-9-]+:(Describe|List|Get|BatchGet)", a)]
        if anywhere:
            found += [f"{a} on *" for a in writes if a not in WITHOUT_RESOURCE or "Condition" not in statement]
        if "iam:PassRole" in actions and "iam:PassedToService" not in json.dumps(statement.get("Condition", {})):
            found.append("iam:PassRole to any service")
    return found


def test_formatted_and_valid(staged):
    done = run("terraform", "fmt", "-check", "-recursive", "-no-color", cwd=staged)
    assert done.returncode == 0, f"run terraform fmt -recursive terraform: {done.stdout}"
    done = run("terraform", "validate", "-no-color", cwd=staged)
    assert done.returncode == 0, done.stderr
    init(staged / "bootstrap", "-backend=false")
    done = run("terraform", "validate", "-no-color", cwd=staged / "bootstrap")
    assert done.returncode == 0, done.stderr


def test_no_role_may_more_than_it_needs(resources):
    found = policies(resources)
    assert {a.split('"')[1] for a in found if a.startswith("module.roles.aws_iam_role_policy.this")} == {
        "pipeline",
        "serving",
        "deploy",
        "monitor",
        "retrain",
        "studio",
    }
    assert {a: problems for a, s in found.items() if (problems := too_much(s))} == {}
    assert not of_type(resources, "aws_iam_role_policy_attachment")  # no policy of AWS's own, so no *FullAccess
    assert "FullAccess" not in json.dumps(found)


def test_the_check_finds_what_it_looks_for():
    allow = {"Effect": "Allow", "Action": ["s3:PutObject"], "Resource": ["arn:aws:s3:::b/*"]}
    assert too_much([allow]) == []
    assert too_much([allow | {"Resource": "*"}]) == ["s3:PutObject on *"]
    assert too_much([allow | {"Action": "s3:*"}]) == ["s3:*: a wildcard"]
    assert too_much([allow | {"Action": "iam:PassRole"}]) == ["iam:PassRole to any service"]
    metrics = allow | {"Action": "cloudwatch:PutMetricData", "Resource": "*"}
    assert too_much([metrics]) == ["cloudwatch:PutMetricData on *"]
    assert too_much([metrics | {"Condition": {"StringEquals": {"cloudwatch:namespace": "n"}}}]) == []


def test_who_may_take_a_role_is_one_service_of_this_account(resources):
    for address, role in of_type(resources, "aws_iam_role").items():
        (statement,) = json.loads(role["assume_role_policy"])["Statement"]
        assert "*" not in json.dumps(statement["Principal"]), address
        if "lambda.amazonaws.com" not in json.dumps(statement):  # Lambda sends no account
            assert statement["Condition"], address


def test_an_emergency_needs_a_second_factor_reads_and_stops_only_and_is_told(resources):
    role = of_type(resources, "aws_iam_role")["module.roles.aws_iam_role.break_glass"]
    (trust,) = json.loads(role["assume_role_policy"])["Statement"]
    assert trust["Principal"] == {"AWS": "arn:aws:iam::000000000000:root"}  # no other account
    assert trust["Condition"]["Bool"] == {"aws:MultiFactorAuthPresent": "true"}
    assert int(trust["Condition"]["NumericLessThan"]["aws:MultiFactorAuthAge"]) <= role["max_session_duration"] == 3600
    statements = policies(resources)["module.roles.aws_iam_role_policy.break_glass"]
    actions = {a.split(":")[1] for s in statements for a in s["Action"]}
    assert actions and all(re.match("List|Get|Describe|Decrypt|Stop", action) for action in actions)
    (told,) = of_type(resources, "aws_cloudwatch_log_metric_filter").values()
    assert told["log_group_name"] == "/skin-lesion/trail" and '"AssumeRole"' in told["pattern"]
    assert f'"arn:aws:iam::000000000000:role/{role["name"]}"' in told["pattern"]
    (figure,) = told["metric_transformation"]
    alarm = of_type(resources, "aws_cloudwatch_metric_alarm")[
        'module.observability.aws_cloudwatch_metric_alarm.this["break-glass"]'
    ]
    assert (alarm["namespace"], alarm["metric_name"]) == (figure["namespace"], figure["name"])
    assert alarm["threshold"] == 1 and alarm["treat_missing_data"] == "notBreaching"


def test_buckets_are_closed_encrypted_versioned_and_tiered(resources):
    names = set(of_type(resources, "aws_s3_bucket"))
    assert len(names) == 6
    kinds = {name.split('"')[1] for name in names}
    for kind in ("versioning", "public_access_block", "server_side_encryption_configuration", "policy"):
        there = of_type(resources, f"aws_s3_bucket_{kind}")
        assert {a.split('"')[1] for a in there} == kinds, kind
    assert {a.split('"')[1] for a in of_type(resources, "aws_s3_bucket_lifecycle_configuration")} == kinds
    for address, block in of_type(resources, "aws_s3_bucket_public_access_block").items():
        closed = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
        assert all(block[name] for name in closed), address
    for address, policy in of_type(resources, "aws_s3_bucket_policy").items():
        statements = {s["Sid"]: s for s in json.loads(policy["policy"])["Statement"]}
        assert statements["OnlyByTLS"]["Effect"] == "Deny"
        assert ("OnlyByKMS" in statements) == ('"logs"' not in address)
    for address, value in of_type(resources, "aws_s3_bucket_lifecycle_configuration").items():
        assert value["rule"][0]["transition"][0]["storage_class"] == "INTELLIGENT_TIERING", address


def test_the_network_leads_nowhere_but_to_aws(resources):
    kinds = {r["type"] for r in resources}
    assert not kinds & {"aws_internet_gateway", "aws_nat_gateway", "aws_route", "aws_egress_only_internet_gateway"}
    services = {v["service_name"].split("eu-west-1.")[-1] for v in of_type(resources, "aws_vpc_endpoint").values()}
    assert {"s3", "sagemaker.api", "sagemaker.runtime", "ecr.api", "ecr.dkr", "logs", "kms", "sts"} <= services
    assert of_type(resources, "aws_flow_log")
    for address, rule in of_type(resources, "aws_vpc_security_group_egress_rule").items():
        assert rule["cidr_ipv4"] is None and rule["cidr_ipv6"] is None, address


def test_everything_that_keeps_something_is_encrypted(resources):
    for key in of_type(resources, "aws_kms_key").values():
        assert key["enable_key_rotation"] is True
    for kind, field in {
        "aws_cloudwatch_log_group": "kms_key_id",
        "aws_sns_topic": "kms_master_key_id",
        "aws_sqs_queue": "kms_master_key_id",
        "aws_cloudtrail": "kms_key_id",
        "aws_sagemaker_domain": "kms_key_id",
        "aws_lambda_function": "kms_key_arn",
        "aws_scheduler_schedule": "kms_key_arn",
    }.items():
        for address, value in of_type(resources, kind).items():
            assert value[field].startswith("arn:aws:kms:"), address
    for repository in of_type(resources, "aws_ecr_repository").values():
        assert repository["image_tag_mutability"] == "IMMUTABLE"
        assert repository["image_scanning_configuration"][0]["scan_on_push"]
        assert repository["encryption_configuration"][0]["encryption_type"] == "KMS"


def test_every_call_and_every_read_of_the_data_is_on_a_record_that_cannot_be_changed_unseen(resources):
    (trail,) = of_type(resources, "aws_cloudtrail").values()
    assert (
        trail["enable_log_file_validation"]
        and trail["is_multi_region_trail"]
        and trail["include_global_service_events"]
    )
    (selector,) = trail["event_selector"]
    assert selector["read_write_type"] == "All" and selector["include_management_events"]
    kinds = {"raw", "processed", "models", "capture", "reports"}
    names = {value.split(":::skin-lesion-staging-000000000000-")[1] for value in selector["data_resource"][0]["values"]}
    assert names == {f"{kind}/" for kind in kinds}
    logged = {a.split('"')[1] for a in of_type(resources, "aws_s3_bucket_logging")}
    assert logged == kinds
    (flow,) = of_type(resources, "aws_flow_log").values()
    assert flow["traffic_type"] == "ALL"


def test_captures_and_logs_are_kept_as_long_as_was_said_and_data_until_somebody_deletes_it(resources):
    rules = of_type(resources, "aws_s3_bucket_lifecycle_configuration")
    days = {
        address.split('"')[1]: [e["days"] for rule in value["rule"] for e in rule["expiration"]]
        for address, value in rules.items()
    }
    ends = {kind: found for kind, found in days.items() if found}
    assert ends == {"capture": [180], "logs": [2192]}  # six years
    for value in rules.values():
        assert value["rule"][0]["noncurrent_version_expiration"][0]["noncurrent_days"] >= 30
    for address, group in of_type(resources, "aws_cloudwatch_log_group").items():
        assert group["retention_in_days"] == 365, address


def test_each_alarm_tells_somebody_and_the_page_shows_everything(resources):
    alarms = of_type(resources, "aws_cloudwatch_metric_alarm")
    (topic,) = of_type(resources, "aws_sns_topic").values()
    for address, alarm in alarms.items():
        assert alarm["alarm_actions"] == alarm["ok_actions"] == [topic["arn"]], address
    names = {alarm["alarm_name"] for alarm in alarms.values()}
    for kind in ("latency-p99", "errors-5xx", "drift", "balanced-accuracy", "melanoma-sensitivity", "failed-training"):
        assert f"skin-lesion-watch-{kind}" in names
    (budget,) = of_type(resources, "aws_budgets_budget").values()
    assert all(n["subscriber_sns_topic_arns"] == [topic["arn"]] for n in budget["notification"])
    (page,) = of_type(resources, "aws_cloudwatch_dashboard").values()
    shown = page["dashboard_body"]
    widgets = json.loads(shown)["widgets"]
    for metric in [
        "quality_accuracy",
        "quality_precision_MEL",
        "quality_sensitivity_MEL",
        "drift_alarm",
        "p50",
        "p95",
        "p99",
        "CPUUtilization",
    ] + ["MemoryUtilization", "ExecutionSucceeded", "ExecutionFailed", "EstimatedCharges"]:
        assert f'"{metric}"' in shown, metric
    assert {a.split(":alarm:")[1] for a in widgets[0]["properties"]["alarms"]} == names


def test_pipelines_are_the_committed_definitions_in_this_account(resources):
    pipelines = of_type(resources, "aws_sagemaker_pipeline")
    committed = {p.stem.replace("_", "-") for p in (ROOT / "pipelines" / "definitions").glob("*.json")}
    assert {v["pipeline_name"] for v in pipelines.values()} == {f"skin-lesion-{name}" for name in committed}
    for value in pipelines.values():
        text = value["pipeline_definition"]
        definition = json.loads(text)
        assert "subnet-00000000000000000" not in text and "s3://skin-lesion/" not in text
        assert validate(definition) == []
        if value["pipeline_name"] != "skin-lesion-deploy":  # its job speaks to SageMaker, so it is not isolated
            assert unsafe_jobs(definition) == []
        defaults = {p["Name"]: p.get("DefaultValue", "") for p in definition["Parameters"]}
        assert ":abc123" in text and ":latest" not in text
        assert '_BUCKET": "skin-lesion"' not in text and "skin-lesion-staging-000000000000-processed" in text
        if "InputData" in defaults:
            assert defaults["InputData"].startswith("s3://skin-lesion-staging-000000000000-processed/raw/")


def test_the_output_names_the_settings_that_a_person_puts_in(staged):
    text = (staged / "outputs.tf").read_text()
    named = set(re.findall(r"^    (\w+) = ", text.split("[serving]")[0], flags=re.M))
    there = {name.removeprefix("aws.") for name in load_settings(environ={}) if name.startswith("aws.")}
    assert named == {n for n in there if n not in ("volume_size",) and not re.search("instance", n)}


def test_what_is_applied_is_what_the_account_s_settings_compile(state, resources, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(state["outputs"]["settings"]["value"])
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environ={})
    assert settings["aws.deploy_role_arn"].value != settings["aws.role_arn"].value
    applied = {
        v["pipeline_name"]: v["pipeline_definition"] for v in of_type(resources, "aws_sagemaker_pipeline").values()
    }
    for name in ("deploy", "window", "notebook_jobs"):
        there = json.loads(applied[f"skin-lesion-{name.replace('_', '-')}"])
        assert there == json.loads(compile_pipeline(name, settings)), name


def test_the_state_machine_calls_what_is_there(resources):
    (machine,) = of_type(resources, "aws_sfn_state_machine").values()
    assert "${" not in machine["definition"]
    functions = {v["function_name"] for v in of_type(resources, "aws_lambda_function").values()}
    called = set(re.findall(r":function:([\w-]+)", machine["definition"]))
    assert called and called <= functions
    started = {
        v["name"]: json.loads(v["event_pattern"]) for v in of_type(resources, "aws_cloudwatch_event_rule").values()
    }
    assert started["skin-lesion-approved"]["detail"]["ModelPackageGroupName"] == ["skin-lesion"]
    assert "${" not in json.dumps(started)
    (route,) = of_type(resources, "aws_apigatewayv2_route").values()
    assert route["authorization_type"] == "AWS_IAM"


def test_the_figures_of_a_monitoring_run_are_published_for_the_alarms(resources, monkeypatch):
    publish = loaded(TERRAFORM / "lambdas" / "publish_metrics" / "handler.py")
    window = {"end": "2026-01-02T00:00:00+00:00", "requests": 9, "pictures": 9, "abstained": 1, "alarm": True}
    window |= {"aspects": [{"aspect": "brightness", "effect": 0.4}], "ms": {"p50": 5.0}}
    quality = {"balanced_accuracy": 0.4, "sensitivity MEL": 0.3}
    lines = metric_lines(window, quality, "skin-lesion", "schedule")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METRICS_NAMESPACE", "skin-lesion")
    with mock_aws():
        s3, cloudwatch = boto3.client("s3"), boto3.client("cloudwatch")
        s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        body = "".join(json.dumps(line) + "\n" for line in lines)
        s3.put_object(Bucket="bucket", Key="runs/e/monitor/monitor/metrics.jsonl", Body=body.encode())
        s3.put_object(
            Bucket="bucket",
            Key="runs/e/monitor/monitor/drift.json",
            Body=b'{"endpoint": "a", "version": "v", "windows": []}',
        )
        key = "runs/e/monitor/monitor/event.json"
        answer = publish.handler({"detail": {"bucket": {"name": "bucket"}, "object": {"key": key}}}, None)
        assert answer["published"] == len(lines)
        found = {
            (m["MetricName"], tuple((d["Name"], d["Value"]) for d in m["Dimensions"]))
            for m in cloudwatch.list_metrics(Namespace="skin-lesion")["Metrics"]
        }
    watched = {
        (v["metric_name"], tuple(v["dimensions"].items()))
        for v in of_type(resources, "aws_cloudwatch_metric_alarm").values()
        if v["namespace"] == "skin-lesion"
    }
    assert len(watched) == 3 and watched <= found


# ---- the core for accounts without Terraform


def of_template(kind):
    """Logical name to properties, the template's functions as {"Fn::Sub": text} and the like."""
    template, _ = decode_cfn(str(TEMPLATE))
    return {n: r["Properties"] for n, r in template["Resources"].items() if r["Type"] == kind}


def told(statement):
    """What a statement says, apart from how an ARN is written."""
    fields = {"Sid": statement["Sid"], "Effect": statement["Effect"], "Action": sorted(listed(statement["Action"]))}
    conditions = {op: sorted(of) for op, of in statement.get("Condition", {}).items()}
    return fields | {"resources": len(listed(statement["Resource"])), "Condition": conditions}


def test_the_template_has_the_same_core_as_terraform(resources):
    kinds = {
        b["BucketName"]["Fn::Sub"].removeprefix("${BucketPrefix}-"): b for b in of_template("AWS::S3::Bucket").values()
    }
    assert set(kinds) == {a.split('"')[1] for a in of_type(resources, "aws_s3_bucket")}
    policies_of = of_template("AWS::S3::BucketPolicy")
    for address, value in of_type(resources, "aws_s3_bucket_policy").items():
        kind = address.split('"')[1]
        here = {s["Sid"] for s in policies_of[f"{kind.capitalize()}Policy"]["PolicyDocument"]["Statement"]}
        there = {s["Sid"] for s in json.loads(value["policy"])["Statement"]} - {"TrailLooks", "TrailWrites"}
        assert here == there, kind  # the trail is Terraform's only
        bucket = kinds[kind]
        assert bucket["VersioningConfiguration"]["Status"] == "Enabled"
        assert all(bucket["PublicAccessBlockConfiguration"].values())
        assert bucket["LifecycleConfiguration"]["Rules"][0]["Transitions"][0]["StorageClass"] == "INTELLIGENT_TIERING"

    found = policies(resources)
    others = {"schedule": 'module.automation.aws_iam_role_policy.starter["schedule"]'}
    others |= {"breakglass": "module.roles.aws_iam_role_policy.break_glass"}
    roles = of_type(resources, "aws_iam_role").values()
    trusts = {
        r["name"].removeprefix("skin-lesion-").removeprefix("start-by-").replace("-", ""): json.loads(
            r["assume_role_policy"]
        )
        for r in roles
    }
    assert set(of_template("AWS::IAM::Role")) == {
        f"{kind}Role" for kind in ("Pipeline", "Serving", "Deploy", "Monitor", "Retrain", "Schedule", "BreakGlass")
    }
    for name, role in of_template("AWS::IAM::Role").items():
        kind = name.removesuffix("Role").lower()
        there = found[others.get(kind, f'module.roles.aws_iam_role_policy.this["{kind}"]')]
        there = [told(s) for s in there if (kind, s["Sid"]) != ("schedule", "Retraining")]  # Terraform's only
        assert [told(s) for s in role["Policies"][0]["PolicyDocument"]["Statement"]] == there, kind
        (here,), (trust,) = role["AssumeRolePolicyDocument"]["Statement"], trusts[kind]["Statement"]
        principal = {"AWS": "root"} if "AWS" in trust["Principal"] else trust["Principal"]
        assert {k: "root" if "Fn::Sub" in v else v for k, v in here["Principal"].items()} == principal, kind
        assert {op: sorted(of) for op, of in here["Condition"].items()} == {
            op: sorted(of) for op, of in trust["Condition"].items()
        }, kind

    for repository in of_template("AWS::ECR::Repository").values():
        assert (
            repository["ImageTagMutability"] == "IMMUTABLE" and repository["ImageScanningConfiguration"]["ScanOnPush"]
        )
    assert len(of_template("AWS::ECR::Repository")) == len(of_type(resources, "aws_ecr_repository"))
    (key,) = of_template("AWS::KMS::Key").values()
    assert key["EnableKeyRotation"] is True
    service = lambda name: name["Fn::Sub"].replace("${AWS::Region}", "eu-west-1")
    here = {service(e["ServiceName"]) for e in of_template("AWS::EC2::VPCEndpoint").values()}
    there = {v["service_name"] for v in of_type(resources, "aws_vpc_endpoint").values()}
    assert here == there - {"aws.sagemaker.eu-west-1.studio"}  # Studio is Terraform's only
    assert not of_template("AWS::EC2::InternetGateway") and not of_template("AWS::EC2::NatGateway")
    (target,) = of_template("AWS::ApplicationAutoScaling::ScalableTarget").values()
    (same,) = of_type(resources, "aws_appautoscaling_target").values()
    assert target["ScalableDimension"] == same["scalable_dimension"] and target["MinCapacity"] == same["min_capacity"]
