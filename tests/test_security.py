"""The table of nbs/guides/security.ipynb: whatever it names is there, and it promises no more than it may."""

import json
import re

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "nbs" / "guides" / "security.ipynb"
CELLS = [
    "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "markdown"
]
ROWS = [line.strip("| ").split(" | ") for cell in CELLS for line in cell.splitlines() if line.startswith("| ")][1:]


def missing(name):
    """Why a name of the table leads nowhere; None if it does not."""
    if name.startswith("module."):
        _, module, kind, resource = name.split(".")
        text = (ROOT / "terraform" / "modules" / module / "main.tf").read_text()
        return None if f'resource "{kind}" "{resource}" {{' in text else f"{name} is not in terraform/modules/{module}"
    file, _, function = name.partition("::")
    if not (ROOT / file).is_file():
        return f"there is no file {file}"
    text = (ROOT / file).read_text()
    return None if not function or re.search(rf"^def {function}\(", text, re.M) else f"{file} has no {function}"


@pytest.mark.parametrize("safeguard, _, by, shown", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_safeguard_names_is_there(safeguard, _, by, shown):
    resources, tests = re.findall("`([^`]+)`", by), re.findall("`([^`]+)`", shown)
    assert resources and tests and all(re.fullmatch(r"tests/test_\w+\.py::test_\w+", test) for test in tests)
    assert [problem for name in resources + tests if (problem := missing(name))] == []


def test_the_check_finds_what_is_not_there():
    assert missing("module.keys.aws_kms_key.data") is None and missing("module.keys.aws_kms_key.other")
    assert missing("tests/test_security.py::test_the_check_finds_what_is_not_there") is None
    assert missing("tests/test_security.py::test_of_nothing") and missing("pipelines/nothing.json")


def test_every_safeguard_has_its_row_and_nothing_is_certified():
    asked = {"encryption at rest", "encryption in transit", "access control", "audit", "integrity", "transmission"}
    assert asked | {"minimum necessary", "retention", "break-glass"} <= {row[0] for row in ROWS}
    assert "no certification" in CELLS[0]
    assert not re.search("(HIPAA|GDPR)[- ](compliant|certified|ready)|complies with HIPAA", " ".join(CELLS))
