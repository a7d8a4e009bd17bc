"""What the tests of terraform/ share: Terraform run without an account, and what is read out of its plan."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TERRAFORM = ROOT / "terraform"


def run(*words, cwd, timeout=280):
    env = os.environ | {"TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": os.devnull}
    return subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env)


def init(folder, *words):
    plugins = os.environ.get("TF_PLUGIN_DIR")
    done = run("terraform", "init", "-no-color", *words, *([f"-plugin-dir={plugins}"] if plugins else []), cwd=folder)
    if done.returncode and not plugins:
        pytest.skip(
            f"the AWS provider cannot be had here and TF_PLUGIN_DIR names no folder with it: {done.stderr[-300:]}"
        )
    assert done.returncode == 0, done.stderr


def flattened(module):
    yield from module.get("resources", [])
    for child in module.get("child_modules", []):
        yield from flattened(child)


def of_type(resources, kind):
    return {r["address"]: r["values"] for r in resources if r["type"] == kind}


def policies(resources):
    """Address to the statements of every policy of a role."""
    return {a: json.loads(v["policy"])["Statement"] for a, v in of_type(resources, "aws_iam_role_policy").items()}


def listed(value):
    return [value] if isinstance(value, str) else value


def loaded(path):
    """A Python file outside of the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
