"""The local registry survives restarts, registers once, and keeps lineage and decisions."""

import io
import json
import random
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from skin_lesion.cloud.registry import approve, champion, champion_folder, package_path, register, versions
from skin_lesion.settings import project_file

GROUP = "skin-lesion"
ARGUMENTS = {
    "ModelPackageGroupName": GROUP,
    "ModelApprovalStatus": "PendingManualApproval",
    "CustomerMetadataProperties": {"execution": "e1", "dataset": "sample"},
}


def package(path, commit="c0ffee", accuracy=0.7):
    files = {
        "model.json": {"provenance": {"git_commit": commit, "data_hash": "d1", "settings": {"train.epochs": 3}}},
        "evaluation.json": {
            "balanced_accuracy": {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1},
            "champion": {"version": None, "difference": None, "margin_left": 0.01},
            "confusion": [[1, 0], [0, 1]],
        },
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def in_another_process(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=args[0],
        env={"PYTHONPATH": str(project_file()), "HOME": str(args[0])},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_lineage_and_decisions_survive_a_restart(tmp_path):
    root = tmp_path / "runs"
    register(package(tmp_path / "a.tar.gz"), ARGUMENTS, root)
    approve(root, 1, by="Dr Roe", reason="looked at the errors")
    done = in_another_process(
        "import sys, json; from pathlib import Path; from skin_lesion.cloud.registry import champion\n"
        "print(json.dumps(champion(Path(sys.argv[1])/'runs', 'skin-lesion')))",
        tmp_path,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert (found["version"], found["status"]) == (1, "Approved")
    assert found["provenance"] == {"git_commit": "c0ffee", "data_hash": "d1", "settings": {"train.epochs": 3}}
    assert found["metrics"]["balanced_accuracy.low"] == pytest.approx(0.6)
    assert found["metrics"]["champion.margin_left"] == 0.01 and "confusion" not in found["metrics"]
    assert found["arguments"] == ARGUMENTS and found["ModelPackageVersion"] == 1
    assert found["ModelPackageArn"].endswith(":model-package/skin-lesion/1")
    assert [(h["status"], h["by"]) for h in found["history"]] == [
        ("PendingManualApproval", "pipeline"),
        ("Approved", "Dr Roe"),
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "runs"}


def test_the_same_bytes_are_registered_once(tmp_path):
    root = tmp_path / "runs"
    one, two = package(tmp_path / "a.tar.gz"), package(tmp_path / "b.tar.gz", commit="beef")
    assert [register(p, ARGUMENTS, root)["version"] for p in (one, two, one, two)] == [1, 2, 1, 2]
    other = ARGUMENTS | {"ModelPackageGroupName": "other"}
    assert register(one, other, root)["version"] == 1
    one.unlink()  # the registry has its own copy
    assert package_path(root, 1).is_file()


def test_two_runs_that_end_together_register_one_version(tmp_path):
    root, one = tmp_path / "runs", package(tmp_path / "a.tar.gz")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: register(one, ARGUMENTS, root)["version"], range(4)))
    assert found == [1, 1, 1, 1] and len(versions(root, GROUP)) == 1


def test_the_registry_can_be_moved(tmp_path):
    register(package(tmp_path / "a.tar.gz"), ARGUMENTS, tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert package_path(tmp_path / "moved", 1).read_bytes() == (tmp_path / "a.tar.gz").read_bytes()


def test_champion_is_the_newest_approved_and_its_folder_changes_with_it_only(tmp_path):
    root = tmp_path / "runs"
    folder = champion_folder(root, GROUP)
    assert json.loads((folder / "champion.json").read_text()) == {"version": None}
    packages = [package(tmp_path / f"{n}.tar.gz", accuracy=0.5 + n / 10) for n in range(3)]
    for p in packages:
        register(p, ARGUMENTS, root)
    assert champion(root, GROUP) is None
    approve(root, 2)
    approve(root, 1)
    assert champion(root, GROUP)["version"] == 2
    champion_folder(root, GROUP)
    assert (folder / "model.tar.gz").read_bytes() == packages[1].read_bytes()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    approve(root, 3, "Rejected")
    assert champion_folder(root, GROUP) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    approve(root, 2, "Rejected")
    assert json.loads((champion_folder(root, GROUP) / "champion.json").read_text())["version"] == 1
    approve(root, 1, "Rejected")
    assert [p.name for p in champion_folder(root, GROUP).iterdir()] == ["champion.json"]


def test_refusals_say_what_to_do(tmp_path):
    root = tmp_path / "runs"
    assert versions(root, GROUP) == [] and not root.exists()
    register(package(tmp_path / "a.tar.gz"), ARGUMENTS, root)
    with pytest.raises(ValueError, match="no version 2 of 'skin-lesion'.*Versions: 1"):
        package_path(root, 2)
    with pytest.raises(ValueError, match="'Yes' is none of Approved"):
        approve(root, 1, "Yes")
    (tmp_path / "no.tar.gz").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a model package"):
        register(tmp_path / "no.tar.gz", ARGUMENTS, root)
    damaged = bytearray(package(tmp_path / "no.tar.gz", commit=random.Random(1).randbytes(20_000).hex()).read_bytes())
    damaged[5000:5020] = b"\xff" * 20  # zlib's own error, which tarfile lets through
    (tmp_path / "no.tar.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="is not a model package"):
        register(tmp_path / "no.tar.gz", ARGUMENTS, root)
    assert len(versions(root, GROUP)) == 1
