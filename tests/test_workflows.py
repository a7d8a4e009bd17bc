"""The workflows of .github: pinned by commit, no more rights than they need, and nothing that a linter finds."""

import os
import re
import shutil
import subprocess
import textwrap
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOOLS = ROOT / ".venv-infra" / "bin"  # made by `make test-infra`


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_and_rights_are_given_a_job(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used and all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", u) and re.search(r"# v\d", c) for u, c in used)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        publishes = (path.stem, name) == ("release", "publish")  # GitHub's releases are contents
        assert job["permissions"]["contents"] == ("write" if publishes else "read") and job["timeout-minutes"], name
        if job["permissions"].get("id-token") == "write":
            pages = (path.stem, name) == ("docs", "publish")  # the role does not trust this one
            assert pages or job["environment"] in ("staging", "production"), name  # the role trusts these only
    assert "secrets." not in text  # OIDC: no stored key


def test_production_waits_for_the_smoke_test_and_for_a_person():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "deploy.yml").read_text())["jobs"]
    assert jobs["production"]["needs"] == "smoke" and jobs["smoke"]["needs"] == "staging"
    assert jobs["production"]["environment"] == "production"  # its required reviewers are the approval


@pytest.mark.parametrize("job", ["staging", "production"])
def test_a_deployment_is_the_command_with_the_settings_of_terraform_and_this_commit(job, tmp_path):
    """The steps between checkout and install are run here for real; the account's side is in test_infra_moto.py."""
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "deploy.yml").read_text())["jobs"][job]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    program = "../.venv/bin/skin-lesion "
    assert [c.removeprefix(program) for c in commands if c.startswith(program)] == [
        "doctor --before-deploy",
        "deploy --on sagemaker --all",
        "doctor",
    ]
    assert all(step["working-directory"] == "account" for step in steps if program in step.get("run", ""))
    output = (ROOT / "terraform" / "outputs.tf").read_text().split("EOT\n")[1]
    text = re.sub(r"\$\{.*?\}", "skin", textwrap.dedent(output)).replace("skin:skin", "1.dkr.ecr/skin-lesion:old")
    env = os.environ | {"SETTINGS": text, "GITHUB_SHA": "f" * 40}
    subprocess.run(["bash", "-e", "-c", commands[0]], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    made = ConfigParser()
    made.read(tmp_path / "account" / "settings.ini")
    uris = [made["aws"][key] for key in ("image_uri", "serving_image_uri")]
    assert uris == [f"1.dkr.ecr/skin-lesion:{'f' * 40}"] * 2
    assert {"role_arn", "schedule_role_arn", "kms_key"} <= set(made["aws"]) and made["serving"]["capture"]
    env["SETTINGS"] = ""  # the variable is not there
    shutil.rmtree(tmp_path / "account")
    assert subprocess.run(["bash", "-e", "-c", commands[0]], cwd=tmp_path, env=env, capture_output=True).returncode


def test_who_may_write_runs_nothing_of_the_repository_and_waits_for_the_tested_wheel():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "test" and jobs["test"]["needs"] == "build"
    assert not any("checkout" in step.get("uses", "") for step in jobs["publish"]["steps"] + jobs["test"]["steps"])
    assert [step["run"].split()[0] for step in jobs["publish"]["steps"] if "run" in step] == ["gh"]


def test_who_publishes_the_site_runs_nothing_of_the_repository():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())["jobs"]["publish"]
    assert job["needs"] == "build" and job["environment"]["name"] == "github-pages"
    assert [step["uses"].split("@")[0] for step in job["steps"]] == ["actions/deploy-pages"]


def test_make_knows_each_target_that_a_workflow_calls():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    called = {t for p in WORKFLOWS for t in re.findall(r"run: make ([a-z-]+)", p.read_text())}
    assert called and called <= targets


def tool(name):
    if not (TOOLS / name).exists():
        pytest.skip(f"{name} is not there: make test-infra installs it into .venv-infra")
    return TOOLS / name


def test_zizmor_finds_nothing():
    words = [tool("zizmor"), "--offline", "--no-progress", ROOT / ".github" / "workflows"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_actionlint_finds_nothing():
    if not shutil.which("java"):
        pytest.skip("jactionlint needs Java, which is not installed")
    done = subprocess.run([tool("jactionlint"), *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
