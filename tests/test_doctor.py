"""The doctor against moto: an account in which all is well, and each thing broken once. What moto lacks is the list of quotas."""

import copy
import json
import os
import shutil

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count
from moto.servicequotas.responses import ServiceQuotasResponse

from skin_lesion.cli import main
from skin_lesion.cloud import doctor as module
from skin_lesion.cloud.compile import compile_pipeline
from skin_lesion.cloud.sagemaker import upsert
from skin_lesion.settings import load_settings, project_file

ACCOUNT, REGION = "123456789012", "eu-west-1"  # moto's
COMMITTED = {p.stem: json.loads(p.read_text()) for p in project_file("pipelines", "definitions").glob("*.json")}
QUOTAS = [
    ("ml.m5.xlarge for processing job usage", 4),
    ("ml.m5.xlarge for training job usage", 1),
    ("ml.g5.xlarge for spot training job usage", 3),
    ("ml.g5.xlarge for training job usage", 2),
]


class Account:
    """moto's account as Terraform makes it, as far as the doctor looks."""

    def __init__(self):
        self.session = boto3.Session(region_name=REGION)
        client = self.session.client
        self.iam, self.s3, self.kms, self.ec2 = (client(name) for name in ("iam", "s3", "kms", "ec2"))
        self.ecr, self.sagemaker = client("ecr"), client("sagemaker")
        roles = {
            kind: self.role(kind, "sagemaker.amazonaws.com")
            for kind in ("pipeline", "serving", "deploy", "monitor", "retrain")
        }
        self.key = self.make_key("skin-lesion")
        self.kms.enable_key_rotation(KeyId=self.key)
        for bucket in ("lesions-processed", "lesions-capture"):
            self.make_bucket(bucket)
        vpc = self.ec2.create_vpc(CidrBlock="10.40.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            self.ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.40.{n}.0/24")["Subnet"]["SubnetId"] for n in range(2)
        ]
        group = self.ec2.create_security_group(GroupName="jobs", Description="jobs", VpcId=vpc)["GroupId"]
        for name in ("skin-lesion-steps", "skin-lesion-serve"):
            self.ecr.create_repository(repositoryName=name)
            self.ecr.put_image(
                repositoryName=name,
                imageManifest=json.dumps({"mediaType": "application/vnd.oci.image.manifest.v1+json", "of": name}),
                imageTag="abc123",
            )
        self.sagemaker.create_model_package_group(ModelPackageGroupName="skin-lesion")
        registry = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
        self.values = {
            "aws.bucket": "lesions-processed",
            "aws.role_arn": roles["pipeline"],
            **{f"aws.{kind}_role_arn": roles[kind] for kind in ("serving", "deploy", "monitor", "retrain")},
            "aws.schedule_role_arn": self.role("start-by-schedule", "scheduler.amazonaws.com"),
            "aws.image_uri": f"{registry}/skin-lesion-steps:abc123",
            "aws.serving_image_uri": f"{registry}/skin-lesion-serve:abc123",
            "aws.subnets": ",".join(subnets),
            "aws.security_groups": group,
            "serving.capture": "s3://lesions-capture",
        }

    def role(self, kind, service):
        trust = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
        text = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        return self.iam.create_role(RoleName=f"skin-lesion-{kind}", AssumeRolePolicyDocument=text)["Role"]["Arn"]

    def make_key(self, name):
        key = self.kms.create_key()["KeyMetadata"]["KeyId"]
        self.kms.create_alias(AliasName=f"alias/{name}", TargetKeyId=key)
        return key

    def make_bucket(self, name, region=REGION, versions="Enabled", blocked=True, **rule):
        """Its name. As Terraform makes it, or with something else."""
        there = self.session.client("s3", region_name=region)
        there.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})
        rule = rule or {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": self.key}
        rules = {"Rules": [{"ApplyServerSideEncryptionByDefault": rule}]}
        self.s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration=rules)
        self.s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": versions})
        kinds = ("BlockPublicAcls", "IgnorePublicAcls", "RestrictPublicBuckets")
        closed = dict.fromkeys(kinds, True) | {"BlockPublicPolicy": blocked}
        self.s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=closed)
        return name

    def dying_key(self):
        self.kms.schedule_key_deletion(KeyId=self.make_key("dying"))
        return "alias/dying"

    def public_subnet(self):
        vpc = self.ec2.create_vpc(CidrBlock="10.50.0.0/16")["Vpc"]["VpcId"]
        subnet = self.ec2.create_subnet(VpcId=vpc, CidrBlock="10.50.0.0/24")["Subnet"]["SubnetId"]
        self.ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
        return subnet

    def look(self, part, **values):
        """What a part of the doctor says, by name."""
        settings = load_settings(self.values | {f"aws.{k}": v for k, v in values.items()}, environ={})
        return {line.name: line for line in part(self.session, settings)}


@pytest.fixture(scope="module")
def account():
    """What the tests break they make themselves, so that all can share it."""

    def quota(n, name, value):
        return {"QuotaName": name, "QuotaCode": f"L-{n:08}", "Value": value, "ServiceCode": "sagemaker"}

    def of_account(self):
        return json.dumps({"Quotas": [quota(n, *q) for n, q in enumerate(QUOTAS)]})

    def defaults(self):
        return json.dumps({"Quotas": [quota(9, "ml.c5.large for endpoint usage", 5), quota(0, QUOTAS[0][0], 0)]})

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "x")
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setattr(ServiceQuotasResponse, "list_service_quotas", of_account, raising=False)
        patch.setattr(ServiceQuotasResponse, "list_aws_default_service_quotas", defaults)
        yield Account()


def test_where_all_is_well_the_command_says_so_and_no_account_number(account, monkeypatch, tmp_path):
    """With one pipeline, because compiling all seven twice takes long."""
    (tmp_path / "pipelines" / "definitions").mkdir(parents=True)
    shutil.copy(project_file("pipelines", "definitions", "window.json"), tmp_path / "pipelines" / "definitions")
    monkeypatch.setattr(module, "project_file", lambda *parts: tmp_path.joinpath(*parts))
    words = [word for name, value in account.values.items() for word in ("--set", f"{name}={value}")]
    text = compile_pipeline("window", load_settings(account.values, environ={}))
    role = account.values["aws.role_arn"]
    upsert(text, "skin-lesion-window", role, account.sagemaker)
    done = CliRunner().invoke(main, ["doctor", *words])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 28 and all(line.startswith("ok ") for line in lines), done.output
    assert ACCOUNT not in done.output
    upsert('{"Steps": []}', "skin-lesion-window", role, account.sagemaker)
    done = CliRunner().invoke(main, ["doctor", "--json", *words])
    wrong = [line for line in json.loads(done.output) if line["state"] != "ok"]
    assert done.exit_code == 1 and [line["name"] for line in wrong] == ["pipeline skin-lesion-window"]
    assert "terraform apply" in wrong[0]["advice"]


REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"


@pytest.mark.parametrize(
    "part, name, what, values",
    [
        ("roles", "serving_role_arn", "no role of the account", lambda a: "arn:aws:iam::000000000000:role/x"),
        ("roles", "role_arn", "not found", lambda a: f"arn:aws:iam::{ACCOUNT}:role/nobody"),
        (
            "roles",
            "deploy_role_arn",
            "sagemaker.amazonaws.com may not take",
            lambda a: a.role("function", "lambda.amazonaws.com"),
        ),
        (
            "roles",
            "schedule_role_arn",
            "scheduler.amazonaws.com may not take",
            lambda a: a.values["aws.role_arn"],
        ),
        ("key", "kms_key", "is not found", lambda a: "alias/none"),
        ("key", "kms_key", "PendingDeletion", lambda a: a.dying_key()),
        ("key", "kms_key, rotation", "off", lambda a: a.make_key("unrotated") and "alias/unrotated"),
        ("buckets", "bucket", "Not Found", lambda a: "nowhere"),
        ("buckets", "bucket", "in eu-north-1", lambda a: a.make_bucket("far", "eu-north-1")),
        ("buckets", "bucket, encryption", "AES256", lambda a: a.make_bucket("aes", SSEAlgorithm="AES256")),
        (
            "buckets",
            "bucket, encryption",
            "another key",
            lambda a: a.make_bucket("other", SSEAlgorithm="aws:kms", KMSMasterKeyID=a.make_key("other")),
        ),
        ("buckets", "bucket, versions", "Suspended", lambda a: a.make_bucket("once", versions="Suspended")),
        ("buckets", "bucket, public access", "BlockPublicPolicy off", lambda a: a.make_bucket("open", blocked=False)),
        ("network", "subnets", "gives public addresses", lambda a: a.public_subnet()),
        ("network", "security_groups", "does not exist", lambda a: "sg-00000000000000000"),
        (
            "network",
            "security_groups",
            "1 of vpc-",
            lambda a: a.ec2.create_security_group(GroupName="elsewhere", Description="g")["GroupId"],
        ),
        ("images", "image_uri", "does not exist", lambda a: f"{REGISTRY}/skin-lesion-steps:abc124"),
        ("images", "image_uri", "does not exist", lambda a: f"{REGISTRY}/skin-lesion-steps@sha256:{'0' * 64}"),
        ("images", "serving_image_uri", "no address in ECR", lambda a: "docker.io/x:1"),
        (
            "images",
            "serving_image_uri",
            "is in us-east-1",
            lambda a: f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/skin-lesion-serve:abc123",
        ),
        ("group", "model_package_group", "does not exist", lambda a: "none"),
    ],
)
def test_what_is_broken_is_named_with_what_to_do(account, part, name, what, values):
    found = account.look(getattr(module, f"check_{part}"), **{name.split(",")[0]: values(account)})
    line = found[f"aws.{name}"]
    assert line.state == "wrong" and what in line.value and line.advice
    assert ACCOUNT not in str(found)
    # a security group of another network than the subnets' is wrong with them
    also = {"aws.security_groups"} if name == "subnets" else set()
    assert {line.name for line in found.values() if line.state != "ok"} == {line.name} | also


def test_drift_is_named_by_its_path(account):
    role = account.values["aws.role_arn"]
    for name in COMMITTED.keys() - {"search"}:
        upsert(json.dumps(COMMITTED[name]), f"skin-lesion-{name.replace('_', '-')}", role, account.sagemaker)
    compiled, wanted = copy.deepcopy(COMMITTED), copy.deepcopy(COMMITTED)
    train = next(s for s in compiled["training"]["Steps"] if s["Name"] == "train")
    train["Arguments"]["ResourceConfig"]["InstanceCount"] = 2
    next(p for p in wanted["deploy"]["Parameters"] if p["Name"] == "RoleArn")["DefaultValue"] = role
    settings = load_settings(account.values, environ={})
    found = list(module.check_definitions(account.session, settings, COMMITTED, compiled, wanted))
    wrong = {line.name: line for line in found if line.state != "ok"}
    assert set(wrong) == {"definition training", "pipeline skin-lesion-search", "pipeline skin-lesion-deploy"}
    assert wrong["definition training"].value == "Steps.train.Arguments.ResourceConfig.InstanceCount is 1, not 2"
    assert "skin-lesion compile training -o" in wrong["definition training"].advice
    assert wrong["pipeline skin-lesion-deploy"].value.startswith("Parameters.RoleArn.DefaultValue is ")
    assert ACCOUNT not in str(found)


def test_a_quota_that_is_too_low_names_the_request(account):
    settings = load_settings(account.values | {"serving.instance": "ml.c5.xlarge"}, environ={})
    definitions = copy.deepcopy(list(COMMITTED.values()))
    found = {line.name: line for line in module.check_quotas(account.session, settings, definitions)}
    assert {line.state for name, line in found.items() if "c5" not in name} == {"ok"}
    assert found["quota ml.c5.xlarge for endpoint usage"].state == "not checked"
    settings = load_settings(
        account.values | {"serving.instance": "ml.c5.large", "serving.instances_max": "6"}, environ={}
    )
    *_, endpoint = module.check_quotas(account.session, settings, definitions)
    assert (endpoint.state, endpoint.value) == ("wrong", "5, and 6 needed")
    assert "--quota-code L-00000009 --desired-value 6" in endpoint.advice


def test_an_unknown_region_and_a_wrong_key_end_the_questions(account):
    *_, last = module.doctor(load_settings({"aws.region": "eu-nowhere-1"}, environ={}))
    assert (last.state, last.name) == ("wrong", "aws.region")
    with_keys = set_initial_no_auth_action_count(0)  # from here on moto knows who asks
    [only] = with_keys(lambda: list(module.doctor(load_settings(environ={}))))()
    assert (only.state, only.name) == ("wrong", "credentials") and "aws sso login" in only.advice


def test_what_may_not_be_looked_at_is_not_checked(account, monkeypatch):
    """A user without any permission asks."""
    account.iam.create_user(UserName="nobody")
    keys = account.iam.create_access_key(UserName="nobody")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
    settings, session = load_settings(account.values, environ={}), boto3.Session(region_name=REGION)
    parts = (module.check_key, module.check_network, module.check_group)
    found = set_initial_no_auth_action_count(0)(lambda: [line for part in parts for line in part(session, settings)])()
    assert {line.state for line in found} == {"not checked"} and len(found) == 4
    assert "permission to DescribeKey" in found[0].advice and ACCOUNT not in str(found)


SIGNED_OUT = """[profile signed-out]
sso_session = s
sso_account_id = 123456789012
sso_role_name = r
[sso-session s]
sso_start_url = https://example.org/start
sso_region = eu-west-1
"""


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))  # where a sign-in is kept
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "config").write_text(SIGNED_OUT)


@pytest.mark.parametrize("profile", [None, "nobody", "signed-out"])
def test_without_credentials_it_says_just_that(monkeypatch, nobody, profile):
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    assert done.output.startswith("wrong       credentials: ") and "aws sso login" in done.output
    [told] = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert told["state"] == "wrong" and told["name"] == "credentials"


def test_without_a_way_to_aws_nothing_is_called_wrong(monkeypatch, nobody):
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
    [only] = module.doctor(load_settings(environ={}))
    assert (only.state, only.name) == ("not checked", "credentials") and "reaches AWS" in only.advice
