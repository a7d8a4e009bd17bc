"""The report of runs in every state, read back from its HTML as a browser would take it in."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from skin_lesion.execution.report import write_report
from skin_lesion.settings import load_settings, project_file

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAoAAAAKCAIAAAACUFjqAAAAEklEQVR4nGP4z8CABzGMSjNgCQB/n1sBl7V4rQAAAABJRU5ErkJggg=="
DEFINITION = json.loads(project_file("pipelines", "definitions", "training.json").read_text())


class Page(HTMLParser):
    """Text, links, what the page would load, and elements that were left open."""

    VOID = {"meta", "img", "br", "hr", "link", "input", "!doctype"}

    def __init__(self, path):
        super().__init__()
        self.text, self.links, self.loads, self.scripts, self.open, self.boxes, self.folder = (
            "",
            [],
            [],
            0,
            [],
            {},
            path.parent,
        )
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], f"left open in {path.name}: {self.open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loads += [values[k] for k in ("src", "srcset", "data", "poster") if values.get(k)]
        if tag == "link":
            self.loads.append(values.get("href"))
        self.scripts += tag in ("script", "iframe", "object") or any(k.startswith("on") for k in values)
        if tag == "li":
            self.state = values.get("class")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "@import" not in data and "url(" not in data
            return
        self.text += data
        if self.open[-2:] == ["li", "strong"]:
            self.boxes[data] = self.state

    def check_closed(self):
        """Nothing is loaded, nothing runs, and every link leads to a file."""
        assert self.scripts == 0
        assert [x for x in self.loads if not x.startswith("data:image/")] == []
        for link in self.links:
            assert (self.folder / link).exists() or link.startswith("#"), f"dead link {link}"
        return self


def step(name, kind, status, **fields):
    times = {"StartTime": "2026-01-02T03:04:10.000+00:00"} | (
        {} if status == "Executing" else {"EndTime": "2026-01-02T03:05:15.000+00:00"}
    )
    return {"StepName": name, "StepType": kind, "StepStatus": status, "AttemptCount": 1} | times | fields


PREPARE = step("prepare", "Processing", "Succeeded", CacheHitResult={"SourcePipelineExecutionArn": "arn:x"})
TRAIN = step("train", "Training", "Succeeded", AttemptCount=2)
EVALUATE = step("evaluate", "Processing", "Succeeded")


def gate_step(outcome):
    return step("gate", "Condition", "Succeeded", Metadata={"Condition": {"Outcome": outcome}})


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def evaluation(low=0.655):
    none = {"value": None, "low": None, "high": None, "reason": "2 lesions of this class; 10 are needed"}
    good = interval(0.9, 0.85, 0.95)
    return {
        "balanced_accuracy": interval(0.712, low, 0.768), "melanoma_sensitivity": interval(0.64, 0.52, 0.75), "ece": interval(0.041, 0.02, 0.06),
        "synthetic": True, "dataset": "sample", "images": 1200, "lesions": 40, "classes": ["MEL", "DF"],
        "per_class": {"MEL": {"images": 25, "lesions": 19, "sensitivity": good, "specificity": good, "auc": interval(0.913, 0.87, 0.95)},
                      "DF": {"images": 3, "lesions": 2, "sensitivity": none, "specificity": none, "auc": none}},
        "confusion_matrix": [[16, 9], [1, 2]],
        "calibration": {"temperature": 1.3, "before": {"ece": 0.123}, "after": {"ece": 0.041}},
        "subgroups": [{"factor": "sex", "group": "female", "images": 60, "lesions": 20, "balanced_accuracy": good, "melanoma_sensitivity": none, "melanoma_auc": none}],
        "model": {"architecture": "resnet50", "image_size": 128},
        "champion": {"version": None, "lesions": 0, "difference": 0.0, "low": None, "high": None, "reason": "no champion is registered", "margin_left": 0.01},
        "gate": {"passed": True, "reasons": [], "rules": []},
    }  # fmt: skip


PROOF = {
    "shared": {"images": 0, "lesions": 0, "patients": 0, "near_duplicates": 0},
    "images": {"train": 4000, "validation": 100, "test": 1200}, "lesions": {"train": 130, "validation": 20, "test": 40},
    "images_by_class": {p: {"MEL": 25, "DF": 3} for p in ("train", "validation", "test")},
    "random_split_leak": {"test_images": 0.4123, "test_lesions": 0.35, "test_images_with_validation": 0.45, "seeds": 10},
    "near_duplicates_of_two_lesions": 7, "near_duplicates": [], "sha256": {},
}  # fmt: skip


def notebook(title, *outputs, code="1 + 1"):
    return new_notebook(
        cells=[new_markdown_cell(f"# {title}"), new_code_cell(code, outputs=list(outputs), execution_count=1)]
    )


@pytest.fixture
def make_run(tmp_path):
    def make(status, steps, notebooks=(), files=None, parameters=None, **state):
        run = tmp_path / "20260102T030405-ab12"
        (run / "notebooks").mkdir(parents=True)
        values = {p["Name"]: str(p["DefaultValue"]) for p in DEFINITION["Parameters"]} | (parameters or {})
        state = {
            "PipelineName": "skin-lesion-training", "PipelineExecutionId": run.name, "PipelineExecutionStatus": status,
            "CreationTime": "2026-01-02T03:04:05.000+00:00", "LastModifiedTime": "2026-01-02T04:14:05.000+00:00", "SkippedSteps": [],
            "PipelineParameters": [{"Name": n, "Value": v} for n, v in values.items()], "PipelineExecutionSteps": steps,
        } | state  # fmt: skip
        for name, value in ({"steps.json": state, "definition.json": DEFINITION} | (files or {})).items():
            (run / name).write_text(json.dumps(value))
        for name, nb in dict(notebooks).items():
            nbformat.write(nb, run / "notebooks" / name)
        return run

    return make


def test_succeeded_run_shows_states_figures_gate_split_and_what_was_turned(make_run):
    rate, epochs = (load_settings(environ={})[f"train.{name}"].value for name in ("learning_rate", "epochs"))
    picture = new_output("display_data", {"image/png": PNG})
    run = make_run(
        "Succeeded",
        [PREPARE, TRAIN, EVALUATE, gate_step("True"), step("register", "Processing", "Succeeded"), step("model", "RegisterModel", "Succeeded", Response={"ModelPackageVersion": 3})],
        {"10_prepare.ipynb": notebook("Prepare"), "20_train.ipynb": notebook("Train"), "30_evaluate.ipynb": notebook("Confusion", picture)},
        {"evaluation.json": evaluation(), "split_proof.json": PROOF, "model.tar.gz": 0},
        {"TrainEpochs": "3", "TrainLearningRate": f"{rate:e}", "EvaluateConfidence": "0.950"},
        SkippedSteps=["below-the-gate"],
    )  # fmt: skip
    index = write_report(run)
    assert index == run / "report" / "index.html"
    page = Page(index).check_closed()
    assert page.boxes == dict.fromkeys(["prepare", "train", "evaluate", "gate", "register", "model"], "Succeeded")
    for part in ["skin-lesion-training", run.name, "2026-01-02 03:04 UTC", "took 1 h 10 min", "1 min 5 s", "from cache", "2 attempts", "version 3",
                 "SYNTHETIC", "Research use only", "0.712", "0.655 to 0.768", "0.913", "0.041", "before calibration 0.123", "resnet50 at 128 pixels. 1,200 images, 40 lesions of sample.",
                 "Gate: passed", "+0.155", "no champion is registered", "not estimable", "sex: female", "41.2%", "Holds: none of images, lesions",
                 "7 pairs", "4,000"]:  # fmt: skip
        assert part in page.text, part
    parameters = len(json.loads(project_file("pipelines", "definitions", "training.json").read_text())["Parameters"])
    turned = page.text[page.text.index("other than in settings.ini") : page.text.index(f"All {parameters}")]
    assert f"TrainEpochs3{epochs}" in turned and "TrainLearningRate" not in turned and "Confidence" not in turned
    assert page.loads == [f"data:image/png;base64,{PNG}"]
    assert {"10_prepare.html", "20_train.html", "30_evaluate.html", "../model.tar.gz", "../split_proof.json"} <= set(
        page.links
    )
    for name in ("10_prepare", "20_train", "30_evaluate"):
        Page(run / "report" / f"{name}.html").check_closed()
    assert sorted(p.name for p in index.parent.iterdir()) == [
        "10_prepare.html",
        "20_train.html",
        "30_evaluate.html",
        "index.html",
    ]


def test_failed_run_names_step_reason_and_partial_notebook(make_run):
    error = new_output(
        "error",
        ename="ValueError",
        evalue="<b> & 'x'",
        traceback=["\x1b[0;31mValueError\x1b[0m: <script>alert(1)</script>"],
    )
    reason = "train, cell 4: ValueError: <script>alert(1)</script>"
    run = make_run(
        "Failed", [PREPARE, step("train", "Training", "Failed", FailureReason=reason)], {"20_train.ipynb": notebook("Train", error, code="raise")},
        FailureReason=f"train: {reason}",
    )  # fmt: skip
    (run / "steps" / "train").mkdir(parents=True)
    (run / "steps" / "train" / "log.txt").write_text("x")
    page = Page(write_report(run)).check_closed()
    assert "Step train failed" in page.text and reason in page.text and "failed after 1 h 10 min" in page.text
    assert page.boxes == {
        "prepare": "Succeeded",
        "train": "Failed",
        "evaluate": "not-run",
        "gate": "not-run",
        "register": "not-run",
        "model": "not-run",
    }
    assert page.links.count("20_train.html") == 3 and "../steps/train/log.txt" in page.links
    assert "There is no evaluation yet" in page.text
    cells = Page(run / "report" / "20_train.html").check_closed()
    assert "ValueError" in cells.text and "<script>alert(1)</script>" in cells.text


def test_run_below_the_gate_shows_the_rule_that_was_not_met(make_run):
    why = "The model is below the gate and is not registered. balanced_accuracy.low = 0.45, needed 0.5"
    run = make_run(
        "Failed", [PREPARE, TRAIN, EVALUATE, gate_step("False"), step("below-the-gate", "Fail", "Failed", FailureReason=why)],
        files={"evaluation.json": evaluation(low=0.45)}, SkippedSteps=["register", "model"], FailureReason=f"below-the-gate: {why}",
    )  # fmt: skip
    page = Page(write_report(run)).check_closed()
    assert "The pipeline ended the run" in page.text and why in page.text
    assert "Gate: not passed" in page.text and "0.4500.5-0.050not met" in page.text and page.text.count("not met") == 1
    assert "Branch not taken: register, model" in page.text and "register" not in page.boxes


def test_floors_are_the_runs_own(make_run):
    run = make_run(
        "Succeeded", [EVALUATE], files={"evaluation.json": evaluation()}, parameters={"GateBalancedAccuracyLow": "0.7"}
    )
    page = Page(write_report(run))
    assert "0.6550.7-0.045not met" in page.text and "Gate: undecided" in page.text


@pytest.mark.parametrize("kind, verdict", [("GreaterThan", "not met"), ("GreaterThanOrEqualTo", "met")])
def test_a_figure_on_the_line_is_judged_as_the_condition_does(make_run, kind, verdict):
    definition = json.loads(json.dumps(DEFINITION).replace('"GreaterThanOrEqualTo"', f'"{kind}"'))
    run = make_run(
        "Succeeded", [EVALUATE], files={"evaluation.json": evaluation(low=0.5), "definition.json": definition}
    )
    assert f"0.5000.5+0.000{verdict}" in Page(write_report(run)).text


def test_running_run_and_a_run_that_was_stopped_before_its_first_step(make_run, tmp_path):
    run = make_run(
        "Executing", [PREPARE, step("train", "Training", "Executing")], {"10_prepare.ipynb": notebook("Prepare")}
    )
    page = Page(write_report(run)).check_closed()
    assert "Executing" in page.text and page.boxes["train"] == "Executing" and page.boxes["evaluate"] == "not-run"
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "bare" in Page(write_report(bare)).check_closed().text


def test_times_may_be_seconds_as_on_sagemaker(make_run):
    train = step("train", "Training", "Succeeded", StartTime=1767323050.0, EndTime=1767323052.5)
    page = Page(write_report(make_run("Succeeded", [train], CreationTime=1767323045, LastModifiedTime=1767323060)))
    assert "2.5 s" in page.text and "2026-01-02 03:04 UTC" in page.text and "took 15 s" in page.text


def test_split_that_leaks_is_not_called_sound(make_run):
    leaky = PROOF | {"shared": {"lesions": 2, "near_duplicates": 1, "patients": 0}}
    text = Page(write_report(make_run("Succeeded", [PREPARE], files={"split_proof.json": leaky}))).text
    assert "Leaks: 2 lesions, 1 near-duplicates" in text and "Holds" not in text


def test_figure_that_only_stands_in_says_why(make_run):
    stand_in = interval(0.0, 0.0, 1.0) | {"reason": "no melanoma among the test images; counted as 0"}
    run = make_run("Failed", [EVALUATE], files={"evaluation.json": evaluation() | {"melanoma_sensitivity": stand_in}})
    assert "no melanoma among the test images; counted as 0" in Page(write_report(run)).text


def test_real_data_is_not_called_synthetic(make_run):
    real = evaluation() | {"synthetic": False, "dataset": "ham10000"}
    text = Page(
        write_report(make_run("Succeeded", [], files={"evaluation.json": real}, parameters={"DataDataset": "ham10000"}))
    ).text
    assert "SYNTHETIC" not in text and "Research use only" in text


def test_half_written_files_do_not_cost_the_report(make_run):
    run = make_run("Stopped", [PREPARE], {"10_prepare.ipynb": notebook("Prepare")}, {"split_proof.json": PROOF})
    (run / "evaluation.json").write_text('{"balanced_accuracy": {"val')
    (run / "notebooks" / "20_train.ipynb").write_text('{"cells": [{"cell_type": "code", "sour')
    page = Page(write_report(run)).check_closed()
    assert "stopped after" in page.text and "Holds" in page.text
    assert "20_train.ipynb cannot be shown" in Page(run / "report" / "20_train.html").text


def test_scripts_among_outputs_are_forbidden_to_run(make_run):
    hostile = new_output("display_data", {"text/html": "<p>table</p><script>alert(1)</script>"})
    run = make_run("Succeeded", [PREPARE], {"10_prepare.ipynb": notebook("Prepare", hostile)})
    write_report(run)
    html = (run / "report" / "10_prepare.html").read_text()
    assert html.index("default-src 'none'") < html.index("<p>table</p>")


def test_notebook_is_rendered_again_only_when_it_is_newer(make_run):
    run = make_run("Executing", [PREPARE], {"10_prepare.ipynb": notebook("Prepare")})
    write_report(run)
    rendered = run / "report" / "10_prepare.html"
    before = rendered.stat().st_mtime_ns
    write_report(run)
    assert rendered.stat().st_mtime_ns == before
    nbformat.write(notebook("Another title"), run / "notebooks" / "10_prepare.ipynb")
    os.utime(run / "notebooks" / "10_prepare.ipynb", ns=(before + 1, before + 1))
    write_report(run)
    assert "Another title" in rendered.read_text()


def test_two_runs_are_put_side_by_side(make_run, tmp_path):
    """By the command: what was turned, the differences, and links to both reports; none for different test pictures."""
    judged = evaluation() | {"test": {"content_hash": "ab12"}}
    better = judged | {"balanced_accuracy": interval(0.95, 0.93, 0.97)}
    for name, found, parameters in (("one", judged, {}), ("other", better, {"TrainEpochs": "40"})):
        run = make_run("Succeeded", [PREPARE, TRAIN, EVALUATE], files={"evaluation.json": found}, parameters=parameters)
        run.rename(tmp_path / name)
    words = ["-c", "from skin_lesion.cli import main; main()", "report", "one", "other"]
    command = [sys.executable, *words]
    env = os.environ | {"SKIN_LESION_LOCAL_RUNS": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    page = Page(path)
    assert path.is_relative_to(tmp_path / "one") and not page.loads
    assert "TrainEpochs" in page.text and "TrainImbalance" not in page.text and "same test pictures" in page.text
    gained = 0.95 - judged["balanced_accuracy"]["value"]
    assert f"{gained:+.3f}" in page.text
    assert all((page.folder / link).exists() for link in page.links) and len(page.links) == 2
    (tmp_path / "other" / "evaluation.json").write_text(json.dumps(better | {"test": {"content_hash": "cd34"}}))
    subprocess.run(command, env=env, capture_output=True, check=True)
    page = Page(path)
    assert f"{gained:+.3f}" not in page.text and "different test pictures" in page.text
    lost = subprocess.run([*command[:-1], "gone"], env=env, capture_output=True, text=True)
    assert lost.returncode in (1, 2) and "There is no run 'gone'" in lost.stderr and "Traceback" not in lost.stderr


def test_import_is_light():
    code = "import sys, skin_lesion.execution.report; print(*({'nbconvert', 'nbformat', 'pandas', 'torch', 'boto3', 'papermill'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_page_fits_a_phone(make_run, tmp_path):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    run = make_run(
        "Succeeded",
        [PREPARE, TRAIN, EVALUATE, gate_step("True")],
        files={"evaluation.json": evaluation(), "split_proof.json": PROOF},
    )
    html = write_report(run).read_text()
    # The policy of the page lets no script run, so the copy that is measured goes without.
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"
    copy = tmp_path / "probe.html"
    copy.write_text(html.replace("default-src 'none'", "default-src * 'unsafe-inline'").replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom"]  # fmt: skip
    dom = subprocess.run(
        [chromium, *flags, copy.as_uri()], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    width, _, window = dom[dom.index("<title>") + 7 : dom.index("</title>")].partition(" of ")
    assert int(width) <= int(window) <= 500
