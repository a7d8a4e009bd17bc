"""The monitor step as a process: drift that was planted is found and named, none where there is none; Model Monitor's contract."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from conftest import ROOT

from skin_lesion.cli import main
from skin_lesion.monitoring.example import write_example
from skin_lesion.monitoring.reference import load_reference

ENVIRONMENT = (
    "dataset_source",
    "output_path",
    "start_time",
    "end_time",
    "baseline_constraints",
    "publish_cloudwatch_metrics",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Four days of requests whose last two are out of focus, with the pictures; and four without drift and with wrong labels."""
    folder = tmp_path_factory.mktemp("drawn")
    write_example(folder / "drift", days=4, blurred=2, pictures=True)
    write_example(folder / "none", days=4, wrong=0.5)
    return folder


def make_root(folder, drawn, parts=("capture", "package", "labels")):
    for part in parts:
        shutil.copytree(drawn / part, folder / "processing/input" / part)
    return folder


def monitor(root, environ=None, **parameters):
    words = [word for k, v in parameters.items() for word in (f"--{k}", str(v))]
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | (environ or {})
    done = subprocess.run(
        [sys.executable, "-m", "skin_lesion.execution.step", "monitor", *words],
        capture_output=True,
        text=True,
        env=env | {"SKIN_LESION_ROOT": str(root), "OMP_NUM_THREADS": "1"},
    )
    return done


def outputs(root, folder="processing/output/monitor"):
    return {path.name: json.loads(path.read_text()) for path in (root / folder).glob("*.json")}


@pytest.fixture(scope="module")
def drifted(drawn, tmp_path_factory):
    root = make_root(tmp_path_factory.mktemp("root") / "a", drawn / "drift")
    done = monitor(root)
    assert done.returncode == 0, done.stderr
    return root, outputs(root), done


def test_planted_drift_is_found_named_and_lasting(drifted):
    root, found, done = drifted
    assert [w["alarm"] for w in found["drift.json"]["windows"]] == [False, False, True, True]
    detail = found["event.json"]["detail"]
    assert detail["alarm"] and detail["drift"] and detail["lasting"] and not detail["quality"]
    named = {a["aspect"] for a in detail["aspects"]}
    assert "sharpness" in named and not named & {"sex", "age", "site", "brightness"}
    [sharpness] = [v for v in found["constraint_violations.json"]["violations"] if v["feature_name"] == "sharpness"]
    assert sharpness["constraint_check_type"] == "baseline_drift_check"
    assert re.search(r"differ by up to \d\d%", sharpness["description"])
    assert "sharpness: the cumulative shares differ" in done.stdout


def test_the_report_shows_histograms_and_pictures(drifted):
    notebook = json.loads((drifted[0] / "processing/output/report/60_monitor.ipynb").read_text())
    figures = [o for c in notebook["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(figures) == 2, "distributions, and the nearest and farthest pictures"


def test_a_report_without_captured_pictures_says_how_to_get_them(drawn, tmp_path):
    root = make_root(tmp_path / "a", drawn / "none")
    done = monitor(root)
    assert done.returncode == 0, done.stderr
    words = "no pictures were captured; turn serving.capture_pictures on"
    assert words in done.stdout
    assert words in (root / "processing/output/report/60_monitor.ipynb").read_text()


def test_files_have_model_monitors_schema(drifted):
    _, found, _ = drifted
    statistics, constraints = found["statistics.json"], found["constraints.json"]
    assert statistics["version"] == constraints["version"] == 0
    pictures = found["drift.json"]["lines"]["pictures"]
    assert statistics["dataset"] == {"item_count": pictures}
    for feature in statistics["features"]:
        kind = "numerical" if feature["inferred_type"] == "Fractional" else "string"
        common = feature[f"{kind}_statistics"]["common"]
        assert common["num_present"] + common["num_missing"] == pictures, feature["name"]
    assert {f["name"] for f in statistics["features"]} == {f["name"] for f in constraints["features"]}
    assert constraints["monitoring_config"]["distribution_constraints"]["comparison_threshold"] == 0.1


def test_metrics_are_lines_as_cloudwatch_takes_them(drifted):
    root, found, _ = drifted
    path = root / "output/metrics/cloudwatch/cloudwatch_metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (root / "processing/output/monitor/metrics.jsonl").read_text() == path.read_text()
    values = {line["MetricName"]: line["Value"] for line in lines}
    assert values["drift_alarm"] == 1 and values["drift_sharpness"] > 0.5 and values["requests"] > 50
    assert 0 < values["latency_p50"] < values["latency_p95"] <= values["latency_p99"] < 200
    assert 0.5 < values["quality_accuracy"] <= 1 and 0.5 < values["quality_accuracy_estimated"] <= 1
    for line in lines:
        datetime.strptime(line["Timestamp"], "%Y-%m-%dT%H:%M:%SZ")
        assert [d["Name"] for d in line["Dimensions"]] == ["Endpoint", "MonitoringSchedule"]
    import boto3
    from botocore.stub import Stubber

    client = boto3.client("cloudwatch", "eu-west-1", aws_access_key_id="x", aws_secret_access_key="x")
    stub = Stubber(client)
    stub.add_response("put_metric_data", {})
    stub.activate()
    client.put_metric_data(Namespace="n", MetricData=lines)  # held to the service's own model


def test_no_drift_and_bad_labels_alarm_by_quality_alone(drawn, tmp_path):
    root = make_root(tmp_path / "b", drawn / "none")
    done = monitor(root)
    assert done.returncode == 0, done.stderr
    found = outputs(root)
    assert [w["alarm"] for w in found["drift.json"]["windows"]] == [False] * 4
    detail = found["event.json"]["detail"]
    assert detail["alarm"] and not detail["drift"] and not detail["lasting"] and "accuracy" in detail["quality"]
    assert found["quality.json"]["estimate"]["estimated"] is True
    assert found["quality.json"]["estimate_checked"]["holds"] is False and "DOES NOT HOLD" in done.stdout
    assert 7 < found["quality.json"]["delay_days"]["median"] < 12


def test_late_labels_count_for_quality_and_not_for_drift_and_bad_lines_are_set_aside(drawn, tmp_path):
    root = make_root(tmp_path / "c", drawn / "none")
    path = sorted((root / "processing/input/capture").rglob("*.jsonl"))[0]
    lines = path.read_text().splitlines()
    future = re.sub(
        r'"inferenceTime": "\d{4}', '"inferenceTime": "2999', lines[1].replace('eventId": "', 'eventId": "x')
    )
    path.write_text("\n".join([*lines, lines[0], future, "[]", lines[2][:200]]))
    done = monitor(root, since="2026-03-04", window_hours=0)
    assert done.returncode == 0, done.stderr
    found = outputs(root)
    [window] = found["drift.json"]["windows"]
    assert found["quality.json"]["labels"]["judged"] == 4 * window["pictures"] > 0
    bad = ("duplicate", "future", "foreign", "truncated")
    assert {k: found["drift.json"]["lines"].get(k) for k in bad} == dict.fromkeys(bad, 1)
    aside = [json.loads(x) for x in (root / "processing/output/monitor/set_aside.jsonl").read_text().splitlines()]
    assert [a["line"] for a in aside] == [len(lines) + i for i in range(1, 5)]


def test_model_monitors_environment_counts_before_the_parameters(drawn, tmp_path):
    root = make_root(tmp_path / "e", drawn / "drift", ("package",))
    shutil.copytree(drawn / "drift/capture", root / "processing/endpointdata")
    limits = json.loads((drawn / "drift/work/constraints.json").read_text())
    limits["monitoring_config"]["distribution_constraints"]["comparison_threshold"] = 0.99
    (root / "processing/baseline").mkdir()
    (root / "processing/baseline/constraints.json").write_text(json.dumps(limits))
    done = monitor(
        root,
        {
            "dataset_source": "/opt/ml/processing/endpointdata",
            "output_path": "/opt/ml/processing/resultdata",
            "start_time": "2026-03-03T00:00:00Z",
            "end_time": "2026-03-04T00:00:00Z",
            "baseline_constraints": "/opt/ml/processing/baseline/constraints.json",
            "publish_cloudwatch_metrics": "Disabled",
            "sagemaker_endpoint_name": "theirs",
        },
        since="2020-01-01",
    )
    assert done.returncode == 0, done.stderr
    found = outputs(root, "processing/resultdata")
    [window] = found["drift.json"]["windows"]
    assert window["start"].startswith("2026-03-03") and found["drift.json"]["endpoint"] == "theirs"
    assert found["drift.json"]["floor"] == 0.99 and window["alarm"] is False
    assert not (root / "output/metrics").exists()


def test_earlier_windows_make_an_alarm_lasting(drawn, drifted, tmp_path):
    root = make_root(tmp_path / "f", drawn / "drift", ("capture", "package"))
    (root / "processing/input/history").mkdir()
    told = drifted[1]["drift.json"]
    told = {"version": told["version"], "windows": [w for w in told["windows"] if w["start"] < "2026-03-04"]}
    (root / "processing/input/history/one.json").write_text(json.dumps(told))
    done = monitor(root, since="2026-03-04")
    assert done.returncode == 0, done.stderr
    found = outputs(root)["drift.json"]
    assert (len(found["history"]), len(found["windows"]), found["lasting"]) == (3, 1, True)


def test_a_package_without_a_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no reference.safetensors"):
        load_reference(tmp_path)


def test_the_command_says_by_its_exit_code(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        places = ["--capture", str(drawn / name / "capture"), "--model", str(drawn / name / "package/model.tar.gz")]
        return CliRunner().invoke(main, ["monitor", *places, *words])

    quiet = run("none")
    assert quiet.exit_code == 0 and "no alarm" in quiet.output, quiet.output
    alarm = run("drift", "--labels", str(drawn / "drift/labels"), "--since", "2026-03-03")
    assert alarm.exit_code == 4, alarm.output
    assert re.search(r"ALARM drift: sharpness \(effect 0\.\d\d\).*, lasting", alarm.output)
    report = re.search(r"report: (\S+)", alarm.output)[1]
    assert "sharpness: the cumulative shares differ" in open(report).read()
    [first, second] = sorted((tmp_path / "runs/monitoring/history/skin-lesion").glob("*.json"))
    assert not (tmp_path / "runs/latest").exists()


def test_the_command_refuses_what_it_cannot_do(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capture = ["monitor", "--capture", str(drawn / "none/capture")]
    for words, reason in (
        ([*capture], "No version is approved"),
        ([*capture, "--since", "tomorrow"], "no time of ISO 8601"),
        (["monitor", "--capture", "nowhere"], "does not exist"),
        ([*capture, "--model", "x.tar.gz", "--set", "monitoring.needs=1"], "no setting 'monitoring.needs'"),
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code in (1, 2) and reason in done.output, done.output
    assert "4 with one" in CliRunner().invoke(main, ["monitor", "--help"]).output


def test_the_event_is_put_where_a_setting_says_so(moto):
    import boto3

    from skin_lesion.monitoring.windows import event, put_event

    events = boto3.client("events")
    events.create_event_bus(Name="ours")
    events.create_archive(ArchiveName="kept", EventSourceArn=events.describe_event_bus(Name="ours")["Arn"])
    window = {"start": datetime(2026, 3, 1, tzinfo=UTC).isoformat(), "end": "x", "alarm": None, "pictures": 3}
    put_event(event("skin-lesion", "v1", [window], False, []), "ours")
    assert events.describe_archive(ArchiveName="kept")["EventCount"] == 1


def test_plain_papermill_runs_it_as_the_notebook_job_does(drawn, tmp_path):
    """With the parameters, variables and channels of the committed definition."""
    steps = json.loads((ROOT / "pipelines/definitions/notebook_jobs.json").read_text())["Steps"]
    job = next(step["Arguments"] for step in steps if step["Name"] == "monitor")
    assert job["Environment"]["SM_INPUT_NOTEBOOK_NAME"] == "60_monitor.ipynb" and job["EnableNetworkIsolation"]
    channels = [c["ChannelName"] for c in job["InputDataConfig"]][1:]
    assert channels == ["capture", "package", "labels", "history"]
    for name in ("capture", "package", "labels"):
        shutil.copytree(drawn / "drift" / name, tmp_path / "input/data" / name)
    given = [word for name, text in job["HyperParameters"].items() for word in ("-r", name, text)]
    words = ["-m", "papermill", str(ROOT / "nbs/steps/60_monitor.ipynb"), str(tmp_path / "done.ipynb"), *given]
    env = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | job["Environment"]
    env |= {"SKIN_LESION_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = outputs(tmp_path, "output/data/monitor")
    assert [w["alarm"] for w in found["drift.json"]["windows"]] == [False, False, True, True]
    assert found["event.json"]["detail"]["lasting"]
