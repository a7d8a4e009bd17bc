"""The catalog against the real tables (where they are) and against broken ones."""

import time
from pathlib import Path

import pandas as pd
import pytest

from skin_lesion.data.catalog import (
    ARCHIVE_DIAGNOSES,
    DATASETS,
    DIAGNOSES,
    REJECTED,
    TABLE,
    account_counts,
    account_error,
    classes_in,
    classes_of,
    find_images,
    read_dataset,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"


def real(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the real images are not here ({folder})")
    return folder


def adds_up(table, accounting):
    assert accounting["kept"] == len(table)
    assert accounting["kept"] + sum(len(accounting.get(r, ())) for r in REJECTED) == accounting["rows"]
    assert set(table.image_id).isdisjoint(accounting["missing_file"] + accounting["unknown_label"])
    TABLE.validate(table)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# The real ones


def test_ham10000_is_complete():
    folder = real("ham10000")
    started = time.process_time()
    table, accounting = read_dataset("ham10000", folder)
    assert time.process_time() - started < 2
    adds_up(table, accounting)
    assert account_counts(accounting) == {
        "rows": 10015,
        "kept": 10015,
        "duplicate_id": 0,
        "unknown_label": 0,
        "missing_file": 0,
        "repeated": 0,
        "unreadable": 0,
        "without_lesion": 0,
    }
    assert table.diagnosis.value_counts().to_dict() == {
        "NV": 6705,
        "MEL": 1113,
        "BKL": 1099,
        "BCC": 514,
        "AK": 327,
        "VASC": 142,
        "DF": 115,
    }
    assert table.lesion_id.nunique() == 7470
    assert table.source.value_counts().to_dict() == {
        "vidir_molemax": 3954,
        "vidir_modern": 3363,
        "rosendahl": 2259,
        "vienna_dias": 439,
    }
    assert table.age.isna().sum() == 57 and table.sex.isna().sum() == 57 and table.site.isna().sum() == 234
    assert all((folder / p).is_file() for p in table.path[::1000])
    account_error(accounting)


def test_isic2019_without_the_files_of_the_others():
    table, accounting = read_dataset("isic2019", real("isic2019"))
    adds_up(table, accounting)
    assert (accounting["rows"], accounting["kept"], len(accounting["missing_file"])) == (25331, 2677, 22654)
    assert table.image_id.str.endswith("_downsampled").sum() == 1821
    assert table.source.value_counts()["BCN"] == 84
    with pytest.raises(ValueError, match=r"22,654 of 25,331 images are missing, for example ISIC_.*--allow-missing"):
        account_error(accounting)
    account_error(accounting, allow_missing=True)


def test_isic2019_table_with_all_its_files(tmp_path):
    folder = real("isic2019")
    for csv in folder.glob("*.csv"):
        (tmp_path / csv.name).symlink_to(csv)
    images = tmp_path / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input"  # as some unzip it
    images.mkdir(parents=True)
    for name in pd.read_csv(folder / "ISIC_2019_Training_GroundTruth.csv").image:
        (images / f"{name}.jpg").touch()
    started = time.process_time()
    table, accounting = read_dataset("isic2019", tmp_path)
    assert time.process_time() - started < 2
    adds_up(table, accounting)
    assert accounting["kept"] == 25331 and len(accounting["without_lesion"]) == 2084
    assert table.diagnosis.value_counts().to_dict() == {
        "NV": 12875,
        "MEL": 4522,
        "BCC": 3323,
        "BKL": 2624,
        "AK": 867,
        "SCC": 628,
        "VASC": 253,
        "DF": 239,
    }
    assert table.source.value_counts().to_dict() == {"BCN": 12413, "HAM": 10015, "unknown": 2084, "MSK": 819}
    assert table.image_id.str.endswith("_downsampled").sum() == 2074
    assert [int(table[c].isna().sum()) for c in ("age", "sex", "site")] == [437, 384, 2631]
    alone = table[table.image_id.isin(accounting["without_lesion"])]
    assert (alone.lesion_id == alone.image_id).all()
    real("ham10000")
    ham = read_dataset("ham10000", SHARED / "ham10000")[0].set_index("image_id").diagnosis
    both = table.set_index("image_id").diagnosis.loc[ham.index]
    assert pd.crosstab(ham, both).loc["AK"].loc[lambda n: n > 0].to_dict() == {"AK": 130, "SCC": 197}


# Layouts and troubles, made on the spot

ISIC = "image," + ",".join(DIAGNOSES) + "\n"
META = "image,age_approx,anatom_site_general,lesion_id,sex\n"


def hot(image, *codes):
    return image + "".join(f",{float(d in codes)}" for d in DIAGNOSES) + "\n"


def test_isic2019_labels_and_metadata(tmp_path):
    write(
        tmp_path / "ISIC_2019_Training_GroundTruth.csv",
        ISIC + hot("a", "NV") + hot("b") + hot("c", "MEL", "NV") + hot("d", "UNK") + hot("e", "SCC") + hot("f", "MEL"),
    )
    write(
        tmp_path / "ISIC_2019_Training_Metadata.csv",
        META + "a,50,back,MSK4_01,female\na,50,back,MSK4_01,female\ne,200,,BCN_2,other\n",
    )
    for n in "abcde":
        write(tmp_path / f"ISIC_2019_Training_Input/{n}.jpg", "")
    table, accounting = read_dataset("isic2019", tmp_path)
    adds_up(table, accounting)
    assert accounting["unknown_label"] == ["b", "c", "d"] and accounting["missing_file"] == ["f"]
    assert table.image_id.tolist() == ["a", "e"] and table.source.tolist() == ["MSK", "BCN"]
    assert table.loc[1, ["age", "sex", "site"]].isna().all()


def test_duplicates_that_agree_keep_one_and_those_that_differ_keep_none(tmp_path):
    write(
        tmp_path / "metadata.csv",
        "image_id,lesion_id,patient_id,diagnosis,age,sex,site,source\n"
        + "".join(
            f"{i},L,,{d},1,male,,x\n" for i, d in [("a", "NV"), ("a", "NV"), ("b", "NV"), ("b", "MEL"), ("c", "DF")]
        ),
    )
    for n in "abc":
        write(tmp_path / f"images/{n}.jpg", "")
    table, accounting = read_dataset("sample", tmp_path)
    adds_up(table, accounting)
    assert table.image_id.tolist() == ["a", "c"] and accounting["duplicate_id"] == ["a", "b", "b"]


def test_bcn20000_from_the_isic_archive(tmp_path):
    rows = [
        ("Nevus", "Benign melanocytic proliferations"),
        ("", "Benign soft tissue proliferations - Vascular"),
        ("Squamous cell carcinoma, NOS", "x"),
        ("Scar", "x"),
        ("", ""),
    ]
    write(
        tmp_path / "bcn20000_metadata_2025-05-22.csv",
        "isic_id,attribution,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,lesion_id,sex,patient_id\n"
        + "".join(
            f'ISIC_{i},Barcelona,55.0,anterior torso,Benign,"{two}","{three}",IL_{i},female,IP_1\n'
            for i, (three, two) in enumerate(rows)
        ),
    )
    for i in range(len(rows)):
        write(tmp_path / f"ISIC-images/ISIC_{i}.jpg", "")
    table, accounting = read_dataset("bcn20000", tmp_path)
    adds_up(table, accounting)
    assert table.diagnosis.tolist() == ["NV", "VASC", "SCC"] and accounting["unknown_label"] == ["ISIC_3", "ISIC_4"]
    assert set(table.patient_id) == {"IP_1"} and set(table.source) == {"BCN"}


def test_bcn20000_from_figshare(tmp_path):
    write(
        tmp_path / "bcn_20k_train.csv",
        "bcn_filename,age_approx,anatom_site_general,diagnosis,lesion_id,capture_date,sex,split\n"
        "BCN_0000000001.jpg,55.0,anterior torso,MEL,BCN_0003884,2012-05-16,male,train\n",
    )
    write(tmp_path / "BCN_20k_train/bcn_20k_train/BCN_0000000001.jpg", "")
    table, accounting = read_dataset("bcn20000", tmp_path)
    adds_up(table, accounting)
    assert table.loc[0, ["image_id", "diagnosis", "lesion_id", "path"]].tolist() == [
        "BCN_0000000001",
        "MEL",
        "BCN_0003884",
        "BCN_20k_train/bcn_20k_train/BCN_0000000001.jpg",
    ]
    assert table.patient_id.isna().all()


def test_missing_column_names_what_was_found(tmp_path):
    write(tmp_path / "HAM10000_metadata.csv", "lesion_id,image_id,age\n")
    with pytest.raises(
        ValueError,
        match=r"\['dx', 'sex', 'localization'\] are missing; expected .* found \['lesion_id', 'image_id', 'age'\]",
    ):
        read_dataset("ham10000", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 a picture \x00\x9c"])
def test_unreadable_table(tmp_path, content):
    (tmp_path / "HAM10000_metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match="HAM10000_metadata.csv"):
        read_dataset("ham10000", tmp_path)


def test_missing_table_folder_and_name(tmp_path):
    with pytest.raises(ValueError, match="holds no HAM10000_metadata.csv .*found: nothing"):
        read_dataset("ham10000", tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_dataset("ham10000", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'ISIC2019'; it must be one of"):
        read_dataset("ISIC2019", tmp_path)


def test_nothing_left_is_refused_even_when_missing_is_allowed(tmp_path):
    write(tmp_path / "HAM10000_metadata.csv", "lesion_id,image_id,dx,age,sex,localization\nH,a,nv,1,male,back\n")
    table, accounting = read_dataset("ham10000", tmp_path)
    adds_up(table, accounting)
    with pytest.raises(ValueError, match="no image is left of 1 rows"):
        account_error(accounting, allow_missing=True)


def test_accounting_that_does_not_add_up():
    accounting = dict(dataset="sample", rows=3, kept=1, without_lesion=[], **{r: [] for r in REJECTED})
    with pytest.raises(ValueError, match="does not add up"):
        account_counts(accounting)


def test_images_in_hidden_folders_and_other_files_do_not_count(tmp_path):
    for p in "a.JPG", "x/b.png", ".cache/c.jpg", "__MACOSX/._d.jpg", "e.txt", "f.jpg.part":
        write(tmp_path / p, "")
    assert find_images(tmp_path) == {"a": "a.JPG", "b": "x/b.png"}


def test_mappings_lead_into_the_classes():
    assert set(ARCHIVE_DIAGNOSES.values()) == set(DIAGNOSES)
    sizes = {n: len(classes_of(n)) for n in DATASETS if n != "captured"}
    assert sizes == {"sample": 7, "ham10000": 7, "isic2019": 8, "bcn20000": 8, "own": 8}
    assert classes_of("isic2019,captured") == classes_of("isic2019")
    assert "dx_type" not in TABLE.columns


def test_own_pictures_need_three_columns_and_no_more_classes_than_they_have(tmp_path):
    (tmp_path / "a").mkdir()
    rows = [("P1.JPG", "L1", "MEL"), ("P2.jpeg", "L1", "MEL"), ("P3", "L2", "NV"), ("P4.png", "L3", "melanoma"), ("P5.jpg", "L4", "NV")]  # fmt: skip
    for name in ("P1.JPG", "P2.jpeg", "P3.jpg", "P4.png"):
        (tmp_path / "a" / name).touch()
    pd.DataFrame(rows, columns=["image_id", "lesion_id", "diagnosis"]).to_csv(tmp_path / "metadata.csv", index=False)
    table, accounting = read_dataset("own", tmp_path)
    assert table.path.tolist() == ["a/P1.JPG", "a/P2.jpeg", "a/P3.jpg"] and table.source.unique().tolist() == [
        "unknown"
    ]
    assert accounting["unknown_label"] == ["P4"] and accounting["missing_file"] == ["P5"]
    assert table[["patient_id", "age", "sex", "site"]].isna().all(axis=None)
    assert classes_in(table, "own") == ["MEL", "NV"]
    assert classes_in(table, "own,ham10000") == ["MEL", "NV"] and len(classes_in(table, "ham10000")) == 7
    pd.DataFrame(rows, columns=["image_id", "lesion_id", "label"]).to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"columns \['diagnosis'\] are missing"):
        read_dataset("own", tmp_path)
