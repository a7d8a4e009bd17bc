"""What the local engine takes from its cache, and what it runs again."""

import json
import time

import pytest
from engine_project import hits, new_project, step, training
from test_definition import definition, get, out

from skin_lesion.execution import cache

project = pytest.fixture(new_project)


def chain(**options):
    return definition(
        step("a", cached=True, **options),
        training("b", out("a"), cached=True),
        step("c", get("Steps.b.ModelArtifacts.S3ModelArtifacts"), cached=True),
    )


def test_a_second_identical_run_takes_everything_from_the_cache(project):
    first = project.run(chain())
    started = time.perf_counter()
    second = project.run(chain())
    assert time.perf_counter() - started < 5 and project.began() == ["a", "b", "c"]
    assert hits(second) == {"a", "b", "c"} and second.status == "Succeeded"
    assert second.step("b")["CacheHitResult"] == {"SourcePipelineExecutionArn": first.state["PipelineExecutionArn"]}
    assert second.step("b")["Response"] == first.step("b")["Response"]
    assert hits(project.run(chain())) == {"a", "b", "c"}


def test_editing_a_notebook_reruns_its_step_and_those_after_it(project):
    project.run(chain())
    project.write_notebook("b", "1 + 2")
    assert hits(project.run(chain())) == {"a"} and project.began() == ["a", "b", "c", "b", "c"]
    assert hits(project.run(chain())) == {"a", "b", "c"}
    outputs = json.loads((project.work / "a.ipynb").read_text())
    outputs["cells"][0] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "2"}], "execution_count": 7}
    (project.work / "a.ipynb").write_text(json.dumps(outputs))
    assert hits(project.run(chain())) == {"a", "b", "c"}, "outputs are not source"


def test_other_arguments_input_bytes_or_library_code_are_another_step(project, monkeypatch):
    project.run(chain())
    assert hits(project.run(chain(score="{}"))) == set()
    (project.root / "s3/bucket/raw/raw.txt").write_text("other")
    assert hits(project.run(chain())) == set()
    (project.root / "s3/bucket/raw/raw.txt").write_text("raw")
    assert hits(project.run(chain())) == {"a", "b", "c"}
    real = cache.code_hash
    monkeypatch.setattr(cache, "code_hash", lambda notebook: real(notebook) + "changed" * (notebook.stem == "c"))
    assert hits(project.run(chain())) == {"a", "b"}


def test_the_cache_is_opt_in_and_only_of_successes(project):
    plain = definition(step("a"))
    assert hits(project.run(plain)) == hits(project.run(plain)) == set()
    broken = definition(step("b", cached=True, fail="no"))
    project.run(broken)
    assert project.run(broken).status == "Failed" and project.began() == ["a", "a", "b", "b"]
    after = definition(step("c"), step("d", out("c"), cached=True))
    project.run(after)
    assert hits(project.run(after)) == {"d"}, "the step before has no cache but made the same bytes"


def test_a_record_expires(project):
    short = definition(step("a") | {"CacheConfig": {"Enabled": True, "ExpireAfter": "PT1S"}})
    project.run(short)
    assert hits(project.run(short)) == {"a"}
    time.sleep(1)
    assert hits(project.run(short)) == set()


@pytest.mark.parametrize("harm", ["delete", "change"])
def test_a_record_whose_output_is_gone_or_changed_is_a_miss(project, harm):
    project.run(chain(), run_id="r")
    output = project.root / "s3/bucket/r/a/out.txt"
    output.unlink() if harm == "delete" else output.write_text("?")
    result = project.run(chain())
    assert "a" not in hits(result) and result.status == "Succeeded"


def test_hashing_thousands_of_images_takes_seconds(tmp_path):
    for i in range(4000):
        (tmp_path / f"{i}.jpg").write_bytes(i.to_bytes(2, "big") * 10_000)
    started = time.perf_counter()
    before = cache.hash_path(tmp_path)
    assert time.perf_counter() - started < 4
    (tmp_path / "77.jpg").write_bytes(b"x" * 20_000)
    assert cache.hash_path(tmp_path) != before
