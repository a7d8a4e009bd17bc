"""The synthetic data set: reproducible, atomic, and what the other modules rely on."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skin_lesion.data import sample
from skin_lesion.data.catalog import classes_of, read_dataset
from skin_lesion.data.images import decode
from skin_lesion.data.sample import CAMERAS, MIX, PAINTERS, draw_people, paint, photograph, write_sample


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("data") / "sample", lesions=28, seed=3)


def test_the_catalog_reads_all_of_it(small):
    table, accounting = read_dataset("sample", small)
    assert accounting["kept"] == accounting["rows"] == len(list(small.glob("images/*.jpg"))) > 28
    assert table.lesion_id.nunique() == 28 and set(table.diagnosis) == set(classes_of("sample"))
    assert table.groupby("diagnosis").lesion_id.nunique().min() >= 3
    assert table.groupby("lesion_id").image_id.size().between(1, 4).all()
    same = table.groupby("lesion_id")[["diagnosis", "site", "age", "source"]].nunique()
    assert (same <= 1).all(axis=None)
    assert decode(small / table.path[0]).shape == (192, 256, 3)
    assert "SYNTHETIC" in (small / "README.txt").read_text() and "MEDICAL" in (small / "README.txt").read_text()


def test_same_seed_same_bytes_in_another_process(small, tmp_path):
    code = f"from skin_lesion.data.sample import write_sample; write_sample({str(tmp_path / 'again')!r}, lesions=28, seed=3)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert digest(tmp_path / "again") == digest(small)
    other = digest(write_sample(tmp_path / "other", lesions=7, seed=4))
    assert other["SYN_000000.jpg"] != digest(small)["SYN_000000.jpg"]


def test_same_sample_is_left_and_another_replaces_it(tmp_path):
    folder = write_sample(tmp_path / "s", lesions=7, seed=1)
    before = (folder / "metadata.csv").stat().st_mtime_ns
    assert write_sample(folder, lesions=7, seed=1) == folder and (folder / "metadata.csv").stat().st_mtime_ns == before
    write_sample(folder, lesions=8, seed=1)
    assert read_dataset("sample", folder)[0].lesion_id.nunique() == 8
    assert os.listdir(tmp_path) == ["s"]


def test_what_is_not_a_sample_is_not_touched(tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        write_sample(tmp_path, lesions=7)
    assert os.listdir(tmp_path) == ["thesis.doc"]
    (tmp_path / "empty").mkdir()
    assert (write_sample(tmp_path / "empty", lesions=7) / "metadata.csv").is_file()


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    calls = []

    def full_disk(*args):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return photograph(*args)

    monkeypatch.setattr(sample, "photograph", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_sample(tmp_path / "s", lesions=7)
    assert os.listdir(tmp_path) == []


def test_too_few(tmp_path):
    with pytest.raises(ValueError, match="lesions is 6"):
        write_sample(tmp_path / "s", lesions=6)


@pytest.mark.parametrize("lesions", [7, 20, 21, 50, 260, 1000])
def test_mix(lesions):
    people = draw_people(np.random.default_rng(0), lesions)
    counts = people.diagnosis.value_counts()
    assert len(people) == lesions == counts.sum() and set(counts.index) == set(MIX)
    assert counts.min() >= min(3, lesions // 7)
    if lesions >= 100:
        assert counts.min() > 0.06 * lesions and counts.idxmax() == "NV"


def test_people():
    people = draw_people(np.random.default_rng(0), 1000)
    known = people.dropna(subset="patient_id")
    assert known.groupby("patient_id").size().between(1, 3).all() and known.patient_id.duplicated().sum() > 100
    assert (known.groupby("patient_id").tone.nunique() == 1).all()
    assert known.groupby("patient_id").age.nunique().max() == 1
    assert people[["patient_id", "age", "sex", "site"]].isna().mean().between(0.01, 0.15).all()
    ages = people.groupby("diagnosis").age.median()
    assert ages["NV"] < ages["DF"] + 10 < ages["AK"]
    assert people.tone.min() < 0.05 and people.tone.max() > 0.8
    # neither the camera nor the order gives the diagnosis away
    nevi = people.diagnosis == "NV"
    assert abs(nevi[people.source == "camera_b"].mean() - nevi.mean()) < 0.06
    assert abs(nevi[:500].mean() - nevi[500:].mean()) < 0.08


@pytest.mark.parametrize("diagnosis", PAINTERS)
def test_painters_give_pictures_whatever_the_seed(diagnosis):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        painted = paint(rng, diagnosis, rng.random(), rng.random())
        assert painted.shape == (384, 384, 3) and np.isfinite(painted).all() and painted.dtype == np.float32
        photo = photograph(rng, painted, list(CAMERAS)[seed % 3])
        assert photo.shape == (192, 256, 3) and photo.dtype == np.uint8 and 25 < photo.mean() < 235 and photo.std() > 4


def test_the_lesion_is_in_the_middle_and_darker():
    lighter = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        img = paint(rng, "NV", 0.2, 0).mean(2)
        lighter += img[:40].mean() > img[172:212, 172:212].mean() + 8
    assert lighter >= 18


def test_columns(small):
    assert list(pd.read_csv(small / "metadata.csv", nrows=1)) == [
        "image_id",
        "lesion_id",
        "diagnosis",
        "site",
        "source",
        "patient_id",
        "age",
        "sex",
    ]
