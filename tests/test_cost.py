"""What things cost: by hand-made numbers, by runs on disk, by moto's account, and by a stub of AWS's price list."""

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws
from moto.sagemaker.models import sagemaker_backends
from moto.sagemaker.responses import SageMakerResponse

from skin_lesion.cli import main
from skin_lesion.cloud import cost
from skin_lesion.cloud.compile import jobs
from skin_lesion.cloud.sagemaker import TAGS, upsert
from skin_lesion.settings import load_settings, project_file

REGION, ACCOUNT, NAME = "eu-west-1", "123456789012", "skin-lesion-training"
DEFINITION = json.loads(project_file("pipelines", "definitions", "training.json").read_text())
SEARCH = json.loads(project_file("pipelines", "definitions", "search.json").read_text())
PRICES = {"date": "d", "instances": {"ml.m5.xlarge": 0.2, "ml.g5.xlarge": 1.0, "ml.c5.large": 0.1}}
PRICES |= {"volume_gb_month": 0.73, "s3_gb_month": 0.02, "source": "s"}  # 100 GiB: 0.1 an hour


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No credentials, and a folder without runs."""
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def aws(alone, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with mock_aws():
        yield boto3.Session(region_name=REGION)


def test_machines_disks_spot_and_limits_are_counted():
    past = {"train": cost.Past(1.95, 0.25, "e"), "prepare": cost.Past(0.45, None, "r")}
    found = {line.name: line for line in cost.pipeline_cost(DEFINITION, PRICES, past)}
    assert found["train"].expected == pytest.approx(2 * 1.0 * 0.25)  # its own disk; a quarter of the price was paid
    assert found["train"].most == pytest.approx(24 * 1.0)
    assert found["prepare"].expected == pytest.approx(0.5 * (0.2 + 0.1))
    assert found["prepare"].most == pytest.approx(6 * 0.3)
    assert found["evaluate"].expected == pytest.approx(1.05 * 0.3) and "assumed" in found["evaluate"].basis
    assert found["register"].expected == found["register"].most == pytest.approx(0.3)  # it may last no longer
    [tune] = [
        line for line in cost.pipeline_cost(SEARCH, PRICES, {"tune": cost.Past(10, None, "e")}) if line.name == "tune"
    ]
    assert tune.expected == pytest.approx(20 * (10 * 2 / 20 + 0.05) * 1.0)  # 20 trainings, two side by side for 10 h


def write_run(root, run, steps, **parameters):
    given = {p["Name"]: str(p.get("DefaultValue")) for p in DEFINITION["Parameters"]} | parameters
    began = datetime(2026, 1, 1, tzinfo=UTC)
    states = [
        {"StepName": name, "StepStatus": status, "StartTime": began.isoformat()}
        | {"EndTime": (began + timedelta(hours=hours)).isoformat()}
        | more
        for name, status, hours, more in steps
    ]
    (root / run).mkdir(parents=True)
    (root / run / "steps.json").write_text(
        json.dumps(
            {
                "PipelineName": NAME,
                "PipelineExecutionId": run,
                "PipelineExecutionStatus": "Failed",
                "CreationTime": run,
                "PipelineParameters": [{"Name": n, "Value": v} for n, v in given.items()],
                "PipelineExecutionSteps": states,
            }
        )
    )


def test_the_newest_run_here_of_the_same_kind_says_how_long(tmp_path):
    write_run(tmp_path, "1", [("prepare", "Succeeded", 1, {}), ("train", "Succeeded", 2, {})])
    cached = {"CacheHitResult": {"SourcePipelineExecutionArn": "a"}}
    write_run(
        tmp_path,
        "2",
        [("prepare", "Succeeded", 0, cached), ("train", "Succeeded", 3, {}), ("evaluate", "Failed", 9, {})],
    )
    write_run(tmp_path, "3", [("train", "Succeeded", 30, {})], DataDataset="ham10000")
    found = cost.past_here(NAME, DEFINITION, tmp_path)
    assert {name: past.hours for name, past in found.items()} == {"prepare": 1, "train": 3}
    assert found["train"].says == "run 2 on this machine"
    assert cost.past_here("skin-lesion-search", DEFINITION, tmp_path) == {}


def test_executions_in_the_account_come_first_and_say_what_spot_cost(aws, monkeypatch):
    sagemaker, looks = aws.client("sagemaker"), []
    assert cost.past_there(NAME, DEFINITION, sagemaker) == {}
    upsert(json.dumps(DEFINITION), NAME, f"arn:aws:iam::{ACCOUNT}:role/r", sagemaker)
    job = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/t"

    def list_pipeline_execution_steps(self):
        looks.append(self._get_param("PipelineExecutionArn"))
        step = lambda name, hours, **more: {
            "StepName": name,
            "StepStatus": "Succeeded",
            "StartTime": 0,
            "EndTime": 3600 * hours,
            **more,
        }
        steps = [step("train", 4, Metadata={"TrainingJob": {"Arn": job}}), step("prepare", 1, CacheHitResult={})]
        return json.dumps({"PipelineExecutionSteps": steps})

    def describe_training_job(self):
        assert self._get_param("TrainingJobName") == "t"
        return json.dumps({"TrainingTimeInSeconds": 1000, "BillableTimeInSeconds": 320})

    monkeypatch.setattr(
        SageMakerResponse, "list_pipeline_execution_steps", list_pipeline_execution_steps, raising=False
    )
    monkeypatch.setattr(SageMakerResponse, "describe_training_job", describe_training_job)
    start = lambda **given: sagemaker.start_pipeline_execution(
        PipelineName=NAME, PipelineParameters=[{"Name": n, "Value": v} for n, v in given.items()]
    )["PipelineExecutionArn"]
    arn = start()
    start(DataDataset="ham10000")
    found = cost.past_there(NAME, DEFINITION, sagemaker)
    assert found == {"train": cost.Past(4, 0.32, f"execution {arn.rsplit('/', 1)[1]}")} and looks == [arn]
    lines, notes = cost.estimate("training", load_settings(environ={}))
    train = next(line for line in lines if line.name == "train")
    assert train.expected == pytest.approx(4.05 * 0.32 * 1.57) and "32% of the price" in train.basis
    assert not any("not looked at" in note for note in notes)


def make_endpoint(sagemaker, name, hours, tags=TAGS, **variant):
    variant = variant or {"InstanceType": "ml.c5.large", "InitialInstanceCount": 2}
    model = {
        "ModelName": name,
        "ExecutionRoleArn": f"arn:aws:iam::{ACCOUNT}:role/r",
        "PrimaryContainer": {"Image": "i"},
    }
    sagemaker.create_model(**model)
    variants = [{"VariantName": "main", "ModelName": name, **variant}]
    sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=variants)
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name, Tags=tags)
    made = sagemaker_backends[ACCOUNT][REGION].endpoints[name]
    made.creation_time = datetime.now(UTC) - timedelta(hours=hours)


def test_idle_endpoints_are_named_with_their_price(aws):
    sagemaker, cloudwatch = aws.client("sagemaker"), aws.client("cloudwatch")
    for name, hours in {"idle": 48, "asked": 48, "new": 2}.items():
        make_endpoint(sagemaker, name, hours)
    make_endpoint(sagemaker, "serverless", 48, ServerlessConfig={"MemorySizeInMB": 2048, "MaxConcurrency": 1})
    for name, ago in {"asked": 3, "idle": 30}.items():
        dimensions = [{"Name": "EndpointName", "Value": name}, {"Name": "VariantName", "Value": "main"}]
        point = {"MetricName": "Invocations", "Value": 1, "Dimensions": dimensions}
        point["Timestamp"] = datetime.now(UTC) - timedelta(hours=ago)
        cloudwatch.put_metric_data(Namespace="AWS/SageMaker", MetricData=[point])
    [line] = cost.idle_endpoints(aws, PRICES)
    assert line.startswith("endpoint idle was not asked in 24 hours and costs US$ 146 a month")


def test_untagged_resources_are_named_and_others_left_alone(aws):
    s3, sagemaker = aws.client("s3"), aws.client("sagemaker")
    make_endpoint(sagemaker, "skin-lesion", 1)
    make_endpoint(sagemaker, "skin-lesion-old", 1, tags=TAGS[:1])
    for name in ("lesions", "skin-lesion-raw", "holiday-pictures"):
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_bucket_tagging(Bucket="skin-lesion-raw", Tagging={"TagSet": TAGS})
    aws.client("ecr").create_repository(repositoryName="skin-lesion-serve", tags=TAGS[:1])
    found = cost.untagged(aws, load_settings({"aws.bucket": "lesions"}, environ={}))
    assert [re.split("[:/]", line.split(" lacks ")[0])[-1] for line in found] == [
        "lesions",
        "skin-lesion-old",
        "skin-lesion-serve",
    ]
    assert ACCOUNT not in str(found)
    notes = cost.estimate("month", load_settings({"aws.bucket": "lesions"}, environ={}), DEFINITION)[1]
    assert set(found) <= set(notes)


def product(usd, **attributes):
    price = {"unit": "Hrs", "pricePerUnit": {"USD": str(usd)}}
    return json.dumps(
        {
            "product": {"attributes": attributes},
            "terms": {
                "OnDemand": {
                    "t": {"priceDimensions": {"free": {"unit": "Hrs", "pricePerUnit": {"USD": "0"}}, "p": price}}
                }
            },
        }
    )


LISTED = {
    "AmazonSageMaker": [
        [
            product(0.3, component="Training", instanceName="ml.m5.xlarge", usagetype="EU-Train:ml.m5.xlarge"),
            product(0.31, component="Hosting", instanceName="ml.m5.xlarge", usagetype="EU-Host:ml.m5.xlarge"),
            product(9, component="Notebook", instanceName="ml.m5.xlarge", usagetype="EU-Notebk:ml.m5.xlarge"),
        ],
        [
            product(0.9, component="Hosting", instanceName="ml.c5.large", usagetype="EU-Host:ml.c5.large"),
            product(0.15, volumeType="General Purpose-Hosting", usagetype="EU-Host:VolumeUsage.gp2"),
            product(0.00007, usagetype="EU-ServerlessInf:Mem-3GB"),
        ],
    ],
    "AmazonS3": [[product(0.024, usagetype="EU-TimedStorage-ByteHrs"), product(5, usagetype="EU-TimedStorage-Other")]],
    "AmazonVPC": [[product(0.012, usagetype="EU-VpcEndpoint-Hours"), product(7, usagetype="EU-VpcEndpoint-Bytes")]],
}


@pytest.fixture
def price_list(monkeypatch):
    """AWS's price list as a server on loopback; gives what it was asked."""
    asked, pages = [], dict(LISTED)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(sent)
            n, of_service = int(sent.get("NextToken", 0)), pages[sent["ServiceCode"]]
            answer = {"PriceList": of_service[n], **({"NextToken": str(n + 1)} if n + 1 < len(of_service) else {})}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    yield asked, pages
    server.shutdown()
    server.server_close()


def test_refreshed_prices_count_from_then_on(alone, price_list):
    asked, pages = price_list
    done = CliRunner().invoke(main, ["cost", "--refresh"])
    assert done.exit_code == 0, done.output
    prices = cost.load_prices(load_settings(environ={}))
    assert prices["instances"] == {"ml.m5.xlarge": 0.31, "ml.c5.large": 0.9}  # the dearest use
    assert prices["serverless_second"] == {"3072": 0.00007} and prices["source"] == "AWS Price List"
    assert (prices["volume_gb_month"], prices["s3_gb_month"], prices["interface_endpoint_hour"]) == (0.15, 0.024, 0.012)
    filters = [{f["Field"]: f["Value"] for f in sent["Filters"]} for sent in asked]
    assert all(f["regionCode"] == REGION for f in filters) and len(asked) == 4  # the first list has two pages
    pages["AmazonVPC"] = [[]]
    done = CliRunner().invoke(main, ["cost", "--refresh"])
    assert done.exit_code == 1 and "lacks interface_endpoint_hour" in done.output
    assert cost.load_prices(load_settings(environ={})) == prices


def test_a_refresh_without_credentials_says_what_it_takes(alone):
    done = CliRunner().invoke(main, ["cost", "--refresh"])
    assert done.exit_code == 1 and "pricing:GetProducts" in done.output and not (alone / "runs").exists()


def test_the_command_shows_its_sources_and_ends_with_1_above_the_budget(alone):
    done = CliRunner().invoke(main, ["cost", "endpoint"])
    assert done.exit_code == 0 and "1 to 5 × ml.c5.large" in done.output and "prices of eu-west-1, 2026-" in done.output
    done = CliRunner().invoke(main, ["cost", "month", "--json", "--set", "aws.budget=100"])
    told = json.loads(done.output[: done.output.rindex("}") + 1])
    assert done.exit_code == 1 and told["expected"] > told["budget"] == 100 < told["most"]
    assert any("no AWS credentials" in note for note in told["notes"])
    assert "A month is expected to cost" in done.output


def test_the_bundled_prices_cover_the_settings_and_terraform_agrees():
    table = json.loads(project_file("nbs", "cloud", "prices.json").read_text())
    settings = load_settings(environ={})
    named = {
        job.instance
        for name in ("training", "experiments", "deploy")
        for job in jobs(json.loads(project_file("pipelines", "definitions", f"{name}.json").read_text()))
    }
    for prices in table.values():
        assert named | {settings["serving.instance"].value} <= prices["instances"].keys()
        assert all(usd > 0 for usd in prices["instances"].values())
        assert datetime.fromisoformat(prices["date"]) and "not checked with AWS" in prices["source"]
    variables = project_file("terraform", "variables.tf").read_text()
    default = lambda name: re.search(rf'variable "{name}" {{.*?default +=\s*(.*?)\n', variables, re.S)[1]
    assert len(json.loads(default("services"))) == cost.INTERFACES and len(json.loads(default("zones"))) == cost.ZONES
    assert int(default("monthly_budget_usd")) == settings["aws.budget"].value


@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_a_quiet_month_of_each_environment_is_within_its_budget_and_below_its_first_notice(alone, environment):
    text = project_file("terraform", "environments", f"{environment}.tfvars").read_text()
    value = lambda name: json.loads(re.search(rf"^{name} *= (\S.*?)(?: #.*)?$", text, re.M)[1])
    assert "services" not in text  # then the endpoints would not be those that are counted
    budget, zones = value("monthly_budget_usd"), value("zones")
    settings = load_settings({"aws.budget": str(budget), "aws.subnets": ",".join(zones)}, environ={})
    lines, _ = cost.estimate("month", settings)
    (network,) = (line for line in lines if line.name == "network")
    assert f"in {len(zones)} zones" in network.what
    cost.refuse_over_budget("A month", lines, settings["aws.budget"].value)
    main = project_file("terraform", "modules", "observability", "main.tf").read_text()
    share = int(re.search(r'"FORECASTED".*?threshold += (\d+)', main, re.S)[1]) / 100
    assert cost.total(lines)[0] < share * budget
