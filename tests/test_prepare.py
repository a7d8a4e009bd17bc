"""The step prepare: what it writes fits together, twice the same, and each fault ends it with a reason."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from skin_lesion.data.catalog import TABLE, account_counts
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards
from skin_lesion.data.splits import PARTS, check_proof


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("data") / "sample", lesions=24, seed=1)


def step(root, name, *args):
    return subprocess.run(
        [sys.executable, "-m", "skin_lesion.execution.step", name, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"SKIN_LESION_ROOT": str(root)},
    )


def prepare(root, sample, *args, spoil=None):
    "Runs the step as a process; the finished process and its output folder."
    raw = root / "processing" / "input" / "raw"
    shutil.copytree(sample, raw, symlinks=True)
    if spoil:
        spoil(raw)
    return step(root, "prepare", *args), root / "processing" / "output"


def read_json(path):
    return json.loads(path.read_text())


def contents(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.parent.name != "report"
    }


def test_all_outputs_fit_together_and_come_out_twice_the_same(sample, tmp_path):
    hashes = []
    for run in ("one", "two"):
        done, out = prepare(tmp_path / run, sample)
        assert done.returncode == 0, done.stderr
        assert "SYNTHETIC" in done.stdout and not (tmp_path / run / "processing" / "work").exists()
        parts = [Shards(out / p, verify=True) for p in PARTS]
        proof = read_json(out / "table" / "split_proof.json")
        check_proof(proof, *(p.rows for p in parts))
        assert set(proof["shared"].values()) == {0} and proof["random_split_leak"]["test_images"] > 0.2
        table = pd.read_parquet(out / "table" / "images.parquet")
        TABLE.validate(table.drop(columns=["group", "split"]))
        counts = account_counts(read_json(out / "table" / "accounting.json"))
        assert counts["rows"] == counts["kept"] == len(table) == sum(map(len, parts))
        hashes.append([p.content_hash for p in parts])
    assert hashes[0] == hashes[1]


def break_image(raw):
    (raw / "images" / "SYN_000003.jpg").write_bytes(b"\xff\xd8\xff rubbish")


def lose_image(raw):
    (raw / "images" / "SYN_000003.jpg").unlink()


def lose_table(raw):
    (raw / "metadata.csv").unlink()


def test_the_parts_of_several_hosts_join_to_the_same_bytes(sample, tmp_path):
    """Each host gets its part of the files, as SageMaker's ShardedByS3Key gives them; its outputs go to one prefix."""
    whole, broken = tmp_path / "whole", sorted(sample.rglob("*.jpg"))[5]
    shutil.copytree(sample, whole)
    (whole / broken.relative_to(sample)).write_bytes(broken.read_bytes()[:2000])
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    hosts = ["algo-1", "algo-2", "algo-3"]  # the last one gets no file
    for n, host in enumerate(hosts):
        root = tmp_path / host
        for file in files[n::2] if n < 2 else []:
            (root / "processing/input/raw" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file, root / "processing/input/raw" / file)
        (root / "config").mkdir(parents=True)
        (root / "config/resourceconfig.json").write_text(json.dumps({"current_host": host, "hosts": hosts}))
        done = step(root, "decode")
        assert done.returncode == 0, done.stderr
        report = root / "processing/output/report"
        assert [f.name for f in report.iterdir()] == ["05_decode.ipynb" if n == 0 else f"05_decode.{host}.ipynb"]
        shutil.copytree(root / "processing/output/decoded", tmp_path / "joined", dirs_exist_ok=True)
    one, out_one = prepare(tmp_path / "one", whole, "--allow_missing", "true")
    many, out_many = prepare(tmp_path / "many", tmp_path / "joined", "--allow_missing", "true")
    assert one.returncode == many.returncode == 0, one.stderr + many.stderr
    assert contents(out_one) == contents(out_many) and len(contents(out_one)) > 9
    assert read_json(out_many / "table/accounting.json")["unreadable"] == [broken.stem]


@pytest.mark.parametrize(
    "spoil, args, message",
    [
        (break_image, [], "1 of .* cannot be read"),
        (lose_table, [], "metadata.csv"),
        (None, ["--dataset", "ham"], "must be one of"),
        (None, ["--test_share", "0.9"], "sum below 1"),
    ],
)
def test_faults_end_with_their_reason(sample, tmp_path, spoil, args, message):
    done, out = prepare(tmp_path, sample, *args, spoil=spoil)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert not list(out.glob("*/shards.json")), "nothing can be taken for whole"


@pytest.mark.parametrize("spoil, reason", [(break_image, "unreadable"), (lose_image, "missing_file")])
def test_allowed_to_go_on_without(sample, tmp_path, spoil, reason):
    done, out = prepare(tmp_path, sample, "--allow_missing", "true", spoil=spoil)
    assert done.returncode == 0, done.stderr
    assert read_json(out / "table" / "accounting.json")[reason] == ["SYN_000003"]
    assert "SYN_000003" not in set(pd.read_parquet(out / "table" / "images.parquet").image_id)
