"""What is read in the files of the account without making it: modules described whole, a clean template, checkov, parliament."""

import json
import re
import subprocess

import pytest
from cfnlint.api import lint
from infra import ROOT, TERRAFORM, loaded, policies, run

TOOLS = ROOT / ".venv-infra" / "bin"  # made by `make test-infra`: checkov needs other versions than sagemaker
FOLDERS = [TERRAFORM, TERRAFORM / "bootstrap", *sorted(p for p in (TERRAFORM / "modules").iterdir() if p.is_dir())]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_module_is_complete_and_each_variable_described_and_validated(folder):
    for name in ("main.tf", "variables.tf", "outputs.tf", "versions.tf", "README.md"):
        assert (folder / name).is_file(), f"{folder.name} has no {name}"
    text = (folder / "variables.tf").read_text()
    blocks = re.findall(r'^variable "(\w+)" \{\n(.*?)^\}', text, flags=re.M | re.S)
    assert len(blocks) == text.count('variable "') > 0
    for name, body in blocks:
        for part in ("description", "type ", "validation {", "error_message"):
            assert part in body, f"{folder.name}: variable {name} has no {part}"
    outputs = (folder / "outputs.tf").read_text()
    for name, body in re.findall(r'^output "(\w+)" \{\n(.*?)^\}', outputs, flags=re.M | re.S):
        assert "description" in body, f"{folder.name}: output {name} has no description"
    if folder.parent.name == "modules":
        readme = loaded(TERRAFORM / "readme.py")
        assert (folder / "README.md").read_text() == readme.rendered(folder), "run make infra-readme"


def test_the_template_is_clean():
    problems = [
        str(match) for match in lint((TERRAFORM / "cloudformation" / "core.yaml").read_text(), regions=["eu-west-1"])
    ]
    assert problems == []


def tool(name):
    if not (TOOLS / name).exists():
        pytest.skip(f"{name} is not there: make test-infra installs it into .venv-infra")
    return TOOLS / name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkov_has_nothing_to_say_that_no_reason_answers():
    words = ("-d", TERRAFORM, "--framework", "terraform", "cloudformation", "--compact", "-o", "json")
    done = run(tool("checkov"), *words, "--skip-download", cwd=ROOT, timeout=800)
    reports = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    failed = [f"{c['check_id']} {c['resource']}" for r in reports for c in r["results"]["failed_checks"]]
    assert failed == [] and sum(r["summary"]["passed"] for r in reports) > 150
    skipped = [c for r in reports for c in r["results"]["skipped_checks"]]
    assert all(len(c["check_result"]["suppress_comment"].split()) >= 4 for c in skipped)


@pytest.mark.slow
def test_parliament_knows_every_action_and_resource(resources):
    program, found = tool("parliament"), {}
    for address, statements in policies(resources).items():
        text = json.dumps({"Version": "2012-10-17", "Statement": statements})
        done = subprocess.run([program], input=text, capture_output=True, text=True)
        if done.returncode or done.stdout.strip():
            found[address] = done.stdout + done.stderr
    assert found == {}
