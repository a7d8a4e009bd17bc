"""Splits: groups stay together, shares and classes hold, the proof proves, and what random splits of the real tables leak."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.splits import (
    PARTS,
    LeakError,
    check_proof,
    group_images,
    prove_split,
    random_split_leak,
    split_table,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NONE = np.zeros((0, 2), int)


def make_table(rng, lesions=300, classes="NV MEL BCC DF", patients=0.4):
    n = rng.choice([1, 2, 3, 6], lesions, p=[0.6, 0.25, 0.1, 0.05])
    table = pd.DataFrame(
        {
            "lesion_id": [f"L{i}" for i in range(lesions)],
            "patient_id": [f"P{rng.integers(lesions)}" if rng.random() < patients else None for _ in range(lesions)],
            "diagnosis": rng.choice(classes.split(), lesions),
        }
    )
    table = table.loc[np.repeat(np.arange(lesions), n)].reset_index(drop=True)
    table.insert(0, "image_id", [f"I{i:05}" for i in rng.permutation(len(table))])
    return table


def parts_of(table):
    return [table[table.split == p] for p in PARTS]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_shared_and_shares_hold(seed):
    rng = np.random.default_rng(seed)
    table = make_table(rng)
    pairs = rng.integers(len(table), size=(40, 2))
    split = split_table(table, pairs, 0.2, 0.1, seed)
    for column in ("lesion_id", "patient_id", "group"):
        assert split.groupby(column).split.nunique().max() == 1
    assert (split.split.to_numpy()[pairs[:, 0]] == split.split.to_numpy()[pairs[:, 1]]).all()
    assert split.split.value_counts(normalize=True)[list(PARTS)].to_numpy() == pytest.approx([0.7, 0.2, 0.1], abs=0.04)
    proof = prove_split(split, pairs)
    assert set(proof["shared"].values()) == {0}
    check_proof(proof, *parts_of(split))


def test_groups_equal_a_slow_union_find():
    rng = np.random.default_rng(3)
    table = make_table(rng, 60)
    pairs = rng.integers(len(table), size=(10, 2))
    group = list(range(len(table)))
    links = [tuple(p) for p in pairs] + [
        (i, j)
        for i in range(len(table))
        for j in range(i)
        if table.lesion_id[i] == table.lesion_id[j]
        or (table.patient_id[i] == table.patient_id[j] and pd.notna(table.patient_id[i]))
    ]
    for i, j in links:
        a, b = group[i], group[j]
        group = [a if g == b else g for g in group]
    expected = pd.Series(table.image_id).groupby(group).transform("min").tolist()
    assert group_images(table, pairs).tolist() == expected


def test_order_of_rows_does_not_matter_and_seed_does():
    rng = np.random.default_rng(0)
    table = make_table(rng)
    pairs = rng.integers(len(table), size=(20, 2))
    one = split_table(table, pairs, 0.15, 0.15, 1).set_index("image_id").split
    order = rng.permutation(len(table))
    two = split_table(table.iloc[order], np.argsort(order)[pairs], 0.15, 0.15, 1).set_index("image_id").split
    pd.testing.assert_series_equal(one.sort_index(), two.sort_index())
    assert (split_table(table, pairs, 0.15, 0.15, 2).set_index("image_id").split != one).any()


def test_three_groups_of_a_class_are_one_for_each_part():
    rng = np.random.default_rng(1)
    table = make_table(rng, 200, "NV", patients=0)
    table.loc[table.lesion_id.isin(["L1", "L2", "L3"]), "diagnosis"] = "DF"
    table.loc[table.lesion_id.isin(["L4", "L5"]), "diagnosis"] = "VASC"
    for seed in range(10):
        split = split_table(table, NONE, 0.15, 0.15, seed)
        assert split[split.diagnosis == "DF"].groupby("split").lesion_id.nunique().to_dict() == dict.fromkeys(PARTS, 1)
        absent = prove_split(split, NONE)["classes_absent"]
        assert "VASC" in absent["validation"] + absent["test"] and "DF" not in sum(absent.values(), [])


def test_a_tiny_table_fills_every_part():
    table = make_table(np.random.default_rng(2), 3, "NV", patients=0)
    assert set(split_table(table, NONE, 0.15, 0.15, 1).split) == set(PARTS)
    with pytest.raises(ValueError, match="2 groups"):
        split_table(table[table.lesion_id != "L0"].reset_index(drop=True), NONE, 0.15, 0.15, 1)


def test_large_lesions_are_in_every_part():
    split = split_table(make_table(np.random.default_rng(4), 1000, patients=0), NONE, 0.15, 0.15, 1)
    mean = split.groupby("split").size() / split.groupby("split").lesion_id.nunique()
    assert mean.max() / mean.min() < 1.05


@pytest.mark.parametrize("shares", [(0, 0.1), (0.1, 0), (0.5, 0.5), (-0.1, 0.3)])
def test_shares_that_make_no_sense(shares):
    with pytest.raises(ValueError, match="sum below 1"):
        split_table(make_table(np.random.default_rng(0)), NONE, *shares, 1)


@pytest.fixture
def proved():
    table = split_table(make_table(np.random.default_rng(5)), NONE, 0.15, 0.15, 1)
    return table, prove_split(table, NONE)


@pytest.mark.parametrize("proof", [None, {}, {"shared": {"lesions": 0}}])
def test_missing_proof(proved, proof):
    with pytest.raises(LeakError, match="proof"):
        check_proof(proof, *parts_of(proved[0]))


def test_written_zeros_prove_nothing(proved):
    table, proof = proved
    moved = table.copy()
    lesion = table.groupby("lesion_id").filter(lambda r: len(r) > 1 and (r.split == "train").all()).lesion_id.iloc[0]
    moved.loc[moved.index[moved.lesion_id == lesion][0], "split"] = "test"
    forged = prove_split(moved, NONE)
    assert forged["shared"]["lesions"] == 1
    train, validation, test = parts_of(moved)
    with pytest.raises(LeakError, match="1 lesions"):
        check_proof(forged | {"shared": proof["shared"]}, train, validation, test)
    with pytest.raises(LeakError, match="1 lesions"):
        check_proof(forged, train, validation)  # test is not at hand, the proof confesses


def test_near_duplicates_over_two_parts(proved):
    table, _ = proved
    pair = np.array([[np.flatnonzero(table.split == "train")[0], np.flatnonzero(table.split == "validation")[0]]])
    proof = prove_split(table, pair)
    assert proof["shared"]["near_duplicates"] == 1
    with pytest.raises(LeakError, match="near-duplicates"):
        check_proof(proof, *parts_of(table))
    with pytest.raises(LeakError, match="near-duplicates"):
        check_proof(proof | {"shared": dict.fromkeys(proof["shared"], 0)}, *parts_of(table)[:2])


@pytest.mark.parametrize("change", ["dropped row", "other label", "other seed"])
def test_other_rows(proved, change):
    table, proof = proved
    if change == "other seed":
        table = split_table(table.drop(columns=["group", "split"]), NONE, 0.15, 0.15, 2)
    train, validation, _ = parts_of(table)
    if change == "dropped row":
        train = train.iloc[1:]
    if change == "other label":
        train = train.assign(diagnosis=train.diagnosis.iloc[::-1].to_numpy())
    with pytest.raises(LeakError, match="other rows"):
        check_proof(proof, train, validation)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real tables are not in {DATA}")
def test_random_splits_of_the_real_tables_leak():
    ham, _ = read_dataset("ham10000", DATA / "ham10000")
    assert random_split_leak(ham, 0, 0.2, seeds=5)["test_images"] == pytest.approx(0.40, abs=0.02)
    assert random_split_leak(ham, 0.15, 0.15, seeds=5)["test_images"] == pytest.approx(0.35, abs=0.02)
    isic = pd.read_csv(
        DATA / "isic2019" / "ISIC_2019_Training_Metadata.csv"
    )  # all 25,331 rows, also those without a file
    isic["lesion_id"] = isic.lesion_id.fillna(isic.image)
    assert random_split_leak(isic, 0, 0.2, seeds=5)["test_images"] == pytest.approx(0.60, abs=0.02)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real tables are not in {DATA}")
def test_ham10000_keeps_its_classes_in_every_part():
    ham, _ = read_dataset("ham10000", DATA / "ham10000")
    split = split_table(ham, NONE, 0.15, 0.15, 1)
    shares = pd.crosstab(split.diagnosis, split.split, normalize="index")[list(PARTS)]
    assert np.abs(shares - [0.7, 0.15, 0.15]).to_numpy().max() < 0.01
