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


def prepare(root, sample, *args, spoil=None):
    "Runs the step as a process; the finished process and its output folder."
    raw = root / "processing" / "input" / "raw"
    shutil.copytree(sample, raw, symlinks=True)
    if spoil:
        spoil(raw)
    done = subprocess.run(
        [sys.executable, "-m", "skin_lesion.execution.step", "prepare", *args],
        capture_output=True,
        text=True,
        env=os.environ | {"SKIN_LESION_ROOT": str(root)},
    )
    return done, root / "processing" / "output"


def read_json(path):
    return json.loads(path.read_text())


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


def drop_column(raw):
    pd.read_csv(raw / "metadata.csv").drop(columns="lesion_id").to_csv(raw / "metadata.csv", index=False)


def break_image(raw):
    (raw / "images" / "SYN_000003.jpg").write_bytes(b"\xff\xd8\xff rubbish")


def lose_image(raw):
    (raw / "images" / "SYN_000003.jpg").unlink()


def lose_table(raw):
    (raw / "metadata.csv").unlink()


@pytest.mark.parametrize(
    "spoil, args, message",
    [
        (drop_column, [], "lesion_id"),
        (break_image, [], "1 of .* cannot be read"),
        (lose_image, [], "SYN_000003"),
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
