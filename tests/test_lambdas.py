"""What stands beside the Lambdas' handlers: the policies, the zips, and the state machine that calls them."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

LAMBDAS = ROOT / "terraform" / "lambdas"
NAMES = sorted(p.parent.name for p in LAMBDAS.glob("*/handler.py"))


def statements():
    for path in sorted(LAMBDAS.glob("*/policy.json")):
        for statement in json.loads(path.read_text())["Statement"]:
            yield path.parent.name, statement


def test_no_policy_may_do_more_than_its_function():
    names = {name for name, _ in statements()}
    assert names == set(NAMES)
    for name, statement in statements():
        assert not any("*" in action for action in statement["Action"]), (name, statement)
        # PutMetricData knows no resource; its namespace is what can be bounded.
        bounded = "cloudwatch:namespace" in statement.get("Condition", {}).get("StringEquals", {})
        if "*" in statement["Resource"] and not (statement["Action"] == ["cloudwatch:PutMetricData"] and bounded):
            assert all(re.search(r":(List|Describe|Get)", action) for action in statement["Action"]), (name, statement)


def test_policies_hold_in_every_partition():
    for name, statement in statements():
        arns = [r for r in statement["Resource"] if r.startswith("arn:")]
        assert all(r.startswith("arn:${partition}:") for r in arns), (name, statement["Sid"])


def test_the_same_code_gives_the_same_zip(tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    for out in (once, again):
        subprocess.run([sys.executable, LAMBDAS / "build.py", out], check=True, capture_output=True)
    for name in NAMES:
        assert (again / f"{name}.zip").read_bytes() == (once / f"{name}.zip").read_bytes()
        files = {info.filename: info.date_time for info in zipfile.ZipFile(again / f"{name}.zip").infolist()}
        assert "settings.ini" in files and set(files.values()) == {(1980, 1, 1, 0, 0, 0)}


def test_the_state_machine_is_valid():
    statelint = shutil.which("statelint", path=Path(sys.executable).parent)
    if statelint is None:
        pytest.skip("statelint is not installed (pip install statelint)")
    done = subprocess.run([statelint, ROOT / "pipelines" / "retraining.asl.json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout
