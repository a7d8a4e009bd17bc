"""The pictures of nbs/guides/architecture.md are what Terraform, the definitions and the state machine say."""

import importlib.util
import re
import shutil

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("diagrams", ROOT / "terraform" / "diagrams.py")
diagrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagrams)
PAGE = diagrams.PAGE.read_text()


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that the pictures are drawn from; gives a function that edits one and draws."""
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "terraform", tmp_path / "terraform", ignore=shutil.ignore_patterns(".terraform*", "build"))

    def edited(path, old, new):
        file = tmp_path / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        page = diagrams.rendered(PAGE, tmp_path)
        return set(page.splitlines()) - set(PAGE.splitlines()), set(PAGE.splitlines()) - set(page.splitlines())

    return edited


def test_the_pictures_are_those_of_the_files():
    assert diagrams.rendered(PAGE, ROOT) == PAGE, "run make diagrams"


def test_a_change_of_a_definition_changes_the_picture(copy):
    training = "pipelines/definitions/training.json"
    new, gone = copy(training, '"InputName": "champion"', '"InputName": "best"')
    assert new == {'  ChampionData -->|"best"| evaluate'} and gone == {'  ChampionData -->|"champion"| evaluate'}
    new, _ = copy(training, '"EnableManagedSpotTraining": true', '"EnableManagedSpotTraining": false')
    assert '  train["train<br/>Training, ml.g5.xlarge"]' in new


def test_a_change_of_the_account_changes_the_picture(copy):
    new, gone = copy(
        "terraform/modules/roles/main.tf",
        'Sid = "Capture", Effect = "Allow", Action = ["s3:PutObject",',
        'Sid = "Capture", Effect = "Allow", Action = [',
    )
    assert "  serving --> bucket_capture" in gone
    new, _ = copy(
        "terraform/modules/registry/main.tf", 'resource "aws_ecr_lifecycle_policy"', 'resource "aws_new_thing"'
    )
    assert any("new_thing" in line for line in new)  # a kind that the generator does not know is drawn, not left out


def test_a_change_of_the_state_machine_changes_the_picture(copy):
    new, gone = copy("pipelines/retraining.asl.json", '"Next": "CompareOnWindow"', '"Next": "Decide"')
    assert new == {'  Ended -->|"stage = training and labels above 0"| Decide'} and len(gone) == 1
    new, _ = copy("pipelines/retraining.rules.json", '"asked"', '"called"')
    assert '  rule_called(["event called, of skin-lesion.monitor"]) --> FromAService' in new


def test_every_node_that_an_arrow_names_is_drawn_with_its_words():
    for picture in re.findall(r"```mermaid\n(.*?)```", PAGE, re.S):
        plain = re.sub(r'"[^"]*"', '""', picture)
        named = set(re.findall(r"(\w+)(?:\[|\(|\{)", plain)) | set(re.findall(r"subgraph (\w+)", plain))
        arrows = [re.sub(r"(-->|-\.->)(\|\"\"\|)?", "->", line) for line in plain.splitlines() if "->" in line]
        ends = {re.match(r"\w+", end.strip())[0] for line in arrows for end in re.split("->|&", line)}
        assert len(ends) > 5 and ends <= named, ends - named


def test_a_page_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="must have the picture pipeline once"):
        diagrams.rendered(PAGE.replace("<!-- pipeline:", "<!-- flow:"), ROOT)
