"""Several data sets as one: no photograph is counted twice, no lesion goes under two names."""

import cv2
import numpy as np
import pandas as pd
import pytest

from skin_lesion.data.catalog import TABLE, account_counts, read_dataset
from skin_lesion.data.combine import drop_copies, drop_seen, held, image_key, merge_tables, read_datasets
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, drop_unreadable, pack_images, write_shards
from skin_lesion.data.splits import PARTS, check_proof, prove_split, split_table


def table_of(dataset, *rows):
    table = pd.DataFrame(rows, columns=["image_id", "lesion_id", "diagnosis"])
    return table.assign(
        dataset=dataset, source=dataset, age=None, sex=None, site=None, patient_id=None, path=table.image_id + ".jpg"
    )


def test_names_of_one_lesion_are_joined_along_chains():
    isic = table_of("isic2019", ("A", "1", "MEL"), ("B", "2", "MEL"), ("C", "3", "NV"))
    bcn = table_of("bcn20000", ("A", "x", "MEL"), ("D", "x", "MEL"), ("B", "y", "MEL"), ("E", "y", "MEL"))
    ham = table_of("ham10000", ("D", "z", "MEL"), ("B_downsampled", "z", "MEL"))
    table, repeated = merge_tables([isic, bcn, ham])
    assert sorted(repeated) == ["A", "B", "B_downsampled", "D"]
    joined = table.set_index("image_id").lesion_id
    assert set(joined[["A", "B", "D", "E"]]) == {"1"} and joined["C"] == "3"


def test_real_tables_count_every_image_once(shared_data):
    table, accounting = read_datasets("isic2019,ham10000", shared_data)
    counts = account_counts(accounting)
    assert counts["rows"] == 25_331 + 10_015 and counts["repeated"] == 10_015
    assert counts["kept"] == len(table) == 10_015 + 2_677 and not image_key(table.image_id).duplicated().any()
    ham, _ = read_dataset("ham10000", shared_data / "ham10000")
    ours = table.set_index("image_id").loc[ham.image_id]
    assert (ours.lesion_id.to_numpy() == ham.lesion_id).all() and (ours.source.to_numpy() == ham.source).all()
    relabelled = ours.diagnosis.to_numpy() != ham.diagnosis
    assert relabelled.sum() == 197 and set(ours.diagnosis[relabelled.to_numpy()]) == {"SCC"}
    assert (ours.age.isna().to_numpy() <= ham.age.isna()).all()
    split = split_table(table, np.empty((0, 2), int), 0.15, 0.15, 1)
    assert set(prove_split(split, [])["shared"].values()) == {0}


def bcn_copy_of(sample, table, folder):
    """Half of the sample's pictures as the Figshare layout of BCN20000 would have them, and one of them as ISIC 2019."""
    names = {image: f"BCN_{i:010}" for i, image in enumerate(table.image_id)}
    (folder / "bcn20000").mkdir(parents=True), (folder / "isic2019").mkdir()
    for image, path in zip(table.image_id, table.path):
        pixels = cv2.imread(str(sample / path))
        smaller = cv2.resize(pixels, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "bcn20000" / f"{names[image]}.jpg"), smaller, [cv2.IMWRITE_JPEG_QUALITY, 85])
    about = pd.DataFrame(
        {"bcn_filename": [f"{names[i]}.jpg" for i in table.image_id], "diagnosis": table.diagnosis, "age_approx": 50}
    ).assign(anatom_site_general="back", lesion_id="B" + table.lesion_id, sex="male")
    about.to_csv(folder / "bcn20000" / "bcn_20k_train.csv", index=False)
    chosen = table.drop_duplicates("lesion_id")  # one picture a lesion: the others must follow it into its group
    for image, path in zip(chosen.image_id, chosen.path):
        (folder / "isic2019" / f"{image}.jpg").write_bytes((sample / path).read_bytes())
    truth = pd.get_dummies(chosen.diagnosis).astype(int)
    truth = truth.reindex(columns=["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"], fill_value=0)
    truth.insert(0, "image", chosen.image_id)
    truth.to_csv(folder / "isic2019" / "ISIC_2019_Training_GroundTruth.csv", index=False)
    meta = {"image": chosen.image_id, "age_approx": 50, "anatom_site_general": "back", "lesion_id": None, "sex": "male"}
    pd.DataFrame(meta).to_csv(folder / "isic2019" / "ISIC_2019_Training_Metadata.csv", index=False)
    return chosen


def test_a_photograph_under_two_names_is_counted_once(tmp_path):
    sample = write_sample(tmp_path / "sample", lesions=24, seed=1)
    drawn, _ = read_dataset("sample", sample)
    chosen = bcn_copy_of(sample, drawn, tmp_path / "raw")
    table, accounting = read_datasets("bcn20000,isic2019", tmp_path / "raw")
    assert len(table) == len(drawn) + len(chosen) and not accounting["repeated"]
    packed = pack_images(table, tmp_path / "raw", 64, tmp_path / "work")
    table, prints, accounting = drop_unreadable(table, packed, accounting, False)
    pairs = near_duplicates(prints)
    table, prints, pairs, accounting = drop_copies(table, prints, pairs, accounting)
    assert len(table) == len(drawn) == account_counts(accounting)["kept"]
    assert len(prints) == len(table) and pairs.max(initial=0) < len(table)
    assert set(table.dataset[table.image_id.isin(chosen.image_id)]) == {"isic2019"}
    assert table.lesion_id.nunique() == drawn.lesion_id.nunique(), "the other pictures of its lesion go with it"
    TABLE.validate(table)
    split = split_table(table, pairs, 0.2, 0.2, 1)
    parts = [Shards(write_shards(split[split.split == p], packed, tmp_path / p)) for p in PARTS]
    check_proof(prove_split(split, pairs), *(p.rows for p in parts))
    assert {p.dataset for p in parts} == {"isic2019,bcn20000"} and {len(p.classes) for p in parts} == {8}


def captured_from(folders, out):
    """A data set of captured pictures: JPEG copies of those of other samples, as a dermatoscope's app would send them."""
    (out / "pictures").mkdir(parents=True)
    rows = []
    tables = [read_dataset("sample", folder)[0].assign(folder=folder) for folder in folders]
    for n, row in enumerate(pd.concat(tables).itertuples()):
        name = f"captured-{n:04x}{n % 16:x}"
        cv2.imwrite(str(out / "pictures" / f"{name}.jpg"), cv2.imread(str(row.folder / row.path)))
        shows = f"{row.folder.name} {row.image_id}"
        rows.append({"image_id": name, "diagnosis": row.diagnosis, "source": "captured", "shows": shows})
    table = pd.DataFrame(rows)
    table.assign(lesion_id=None, patient_id=None, age=None, sex=None, site=None).to_csv(
        out / "metadata.csv", index=False
    )
    return table.set_index("image_id").shows


def test_captured_pictures_are_trained_on_and_the_test_stays(tmp_path):
    """Every picture of the data set was captured again, and so were those of new lesions; only some of these may be used."""
    raw = tmp_path / "raw"
    mine, new = write_sample(raw / "sample", lesions=24, seed=1), write_sample(tmp_path / "new", lesions=12, seed=2)
    shows = captured_from([mine, new], raw / "captured")
    table, accounting = read_datasets("sample,captured", raw)
    packed = pack_images(table, raw, 64, tmp_path / "work")
    table, prints, accounting = drop_unreadable(table, packed, accounting, False)
    given = int((table.dataset == "sample").sum())
    pairs = near_duplicates(prints[:given])
    alone = split_table(table[:given], pairs, 0.2, 0.2, 1)
    table, prints, pairs, accounting = drop_seen(*drop_copies(table, prints, pairs, accounting))
    assert account_counts(accounting)["kept"] == len(table) == len(prints)
    left = table.image_id[table.dataset == "captured"]
    assert len(left) > 0 and not held(left).any() and not shows[left].str.startswith("sample ").any()
    assert set(accounting["held"]) == set(shows.index[held(shows.index.to_series())])
    split = split_table(table, pairs, 0.2, 0.2, 1)
    assert split.split[:given].tolist() == alone.split.tolist() and set(split.split[given:]) == {"train"}
    parts = [Shards(write_shards(split[split.split == p], packed, tmp_path / p)) for p in PARTS]
    proof, before = prove_split(split, pairs), prove_split(alone, pairs[(pairs < given).all(axis=1)])
    check_proof(proof, *(p.rows for p in parts))
    assert {p: proof["sha256"][p] == before["sha256"][p] for p in PARTS} == {
        "train": False,
        "validation": True,
        "test": True,
    }
    assert parts[0].dataset == "sample,captured" and parts[0].synthetic and len(parts[0].classes) == 7


@pytest.mark.slow
def test_prepare_mixes_the_real_pictures(shared_data, tmp_path):
    """The step itself, as a run of `--dataset isic2019,ham10000` starts it."""
    from test_prepare import prepare, read_json

    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("ham10000", "isic2019"):
        (raw / name).symlink_to(shared_data / name)
    done, out = prepare(tmp_path / "root", raw, "--dataset", "isic2019,ham10000", "--allow_missing", "true")
    assert done.returncode == 0, done.stderr
    table, proof = pd.read_parquet(out / "table" / "images.parquet"), read_json(out / "table" / "split_proof.json")
    accounting = account_counts(read_json(out / "table" / "accounting.json"))
    print(accounting, proof["images"], proof["random_split_leak"])
    assert len(table) == accounting["kept"] and not image_key(table.image_id).duplicated().any()
    assert set(proof["shared"].values()) == {0}
