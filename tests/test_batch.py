"""`skin-lesion batch`: the numbers of `predict`, every picture accounted for, bounded memory, and a kill costs one part."""

import json
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import colours_package
from moto import mock_aws
from PIL import Image

from skin_lesion.cli import main
from skin_lesion.cloud.sagemaker import clients
from skin_lesion.serving import batch as module
from skin_lesion.serving.answer import Answerer
from skin_lesion.serving.package import pack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return pack(colours_package(folder / "package"), folder / "model.tar.gz")


@pytest.fixture
def photos(tmp_path):
    """A folder with eight pictures in two folders, a file that is no picture, and one that only says it is."""
    folder, rng = tmp_path / "photos", np.random.default_rng(1)
    for n in range(8):
        (folder / f"visit{n % 2}").mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        colours.resize((120, 90)).save(folder / f"visit{n % 2}" / f"photo{n}.jpg")
    (folder / "visit0" / "broken.jpg").write_bytes(b"no picture")
    (folder / "table.csv").write_text("not for the model")
    return folder


def run(*words):
    done = CliRunner().invoke(main, [str(w) for w in words])
    return done.exit_code, done.output


def test_the_numbers_are_those_of_predict_and_no_picture_is_left_out(model, photos, tmp_path):
    for prevalence in ("equal", "dataset"):
        options = ["--prevalence", prevalence]
        assert run("predict", model, photos, "--out", tmp_path / "predict.csv", *options)[0] == 1  # one left out
        code, output = run("batch", model, photos, tmp_path / "batch.csv", *options)
        assert code == 0 and "9 pictures" in output and "1 of them refused" in output, output
        expected = pd.read_csv(tmp_path / "predict.csv", index_col="image")
        found = pd.read_csv(tmp_path / "batch.csv")
        assert found.image.tolist() == sorted(found.image) and len(found) == 9
        [refused] = found[found.refused.notna()].to_dict("records")
        assert refused["image"] == "visit0/broken.jpg" and "must be a JPEG" in refused["refused"]
        kept = found[found.refused.isna()].set_index("image").rename(index=lambda name: name[7:-4])
        columns = list(expected.columns)
        np.testing.assert_allclose(kept[columns], expected.loc[kept.index], atol=1e-6)
        assert (kept[columns].idxmax(axis=1) == kept.diagnosis).all()


def test_decisions_are_the_endpoints(model, photos, tmp_path):
    Image.new("RGB", (120, 90), (5, 5, 5)).save(photos / "visit0" / "dark.jpg")
    sharp = np.random.default_rng(1).integers(60, 220, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(sharp).resize((128, 96), Image.NEAREST).save(photos / "visit0" / "sharp.png")
    (photos / "visit0" / "broken.jpg").unlink()
    for ending in ("csv", "jsonl"):
        assert run("batch", model, photos, tmp_path / f"out.{ending}")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = Answerer(model).answer_files([photos / row["image"] for row in rows])
    assert {row["decision"] == "abstain" for row in rows} == {True, False}
    for row, answer in zip(rows, answers, strict=True):
        assert row["reasons"] == [doubt["reason"] for doubt in answer["reasons"]]
        for name in ("diagnosis", "decision", "probabilities", "prediction_set", "malignant", "unknown"):
            assert row[name] == answer[name], name
    table = pd.read_csv(tmp_path / "out.csv", index_col="image")
    assert "too dark" in table.reasons["visit0/dark.jpg"] and table.decision["visit0/dark.jpg"] == "abstain"


def test_lists_and_manifests_keep_their_order_and_their_words(model, photos, tmp_path):
    names = [f"visit0/{p.name}" for p in sorted((photos / "visit0").glob("*.jpg"))][::-1] + ["visit1/gone.jpg"]
    (photos / "list.txt").write_text("\n".join(names))
    pd.DataFrame({"age": 50, "path": names}).to_csv(photos / "list.csv", index=False)
    (photos / "list.manifest").write_text(json.dumps([{"prefix": f"{photos}/"}, *names]))
    tables = []
    for ending in ("txt", "csv", "manifest"):
        code, output = run("batch", model, photos / f"list.{ending}", tmp_path / "out.parquet")
        assert code == 0, output
        tables.append(pd.read_parquet(tmp_path / "out.parquet"))
        assert tables[-1].image.tolist() == names and tables[-1].refused.notna().sum() == 2
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def test_refusals_say_what_is_wrong(model, photos, tmp_path):
    (photos / "no.csv").write_text("image\na.jpg\n")
    (photos / "no.json").write_text('["a.jpg"]')
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.csv"
    for words, expected in {
        (model, photos / "no.csv", out): "one of them must be `path`",
        (model, photos / "no.json", out): "is no manifest",
        (model, photos / "visit0" / "broken.jpg", tmp_path / "out.xlsx"): "must end with .csv, .jsonl, .parquet",
        (model, tmp_path / "empty", out): "There is no picture in",
        (model, tmp_path / "nowhere", out): "There is no folder or list",
        (tmp_path / "no.tar.gz", photos, out): "There is no model package",
    }.items():
        code, output = run("batch", *words)
        assert code in (1, 2) and expected in output, output
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("kind", ["prefix", "manifest"])
def test_objects_are_read_one_after_another_and_nothing_is_kept(model, photos, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with mock_aws():
        s3 = clients("eu-west-1")[1]
        s3.create_bucket(Bucket="lesions", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        files = {p.relative_to(photos).as_posix(): p for p in photos.rglob("*.*")}
        for name, path in files.items():
            s3.upload_file(str(path), "lesions", f"raw/night/{name}")
        names = sorted(name for name in files if name.endswith(".jpg"))
        (tmp_path / "in.manifest").write_text(json.dumps([{"prefix": "s3://lesions/raw/night/"}, *names]))
        source = "s3://lesions/raw/night" if kind == "prefix" else tmp_path / "in.manifest"
        code, output = run("batch", model, source, "objects.csv")
        assert code == 0, output
    assert run("batch", model, photos, "files.csv")[0] == 0
    assert pd.read_csv("objects.csv").equals(pd.read_csv("files.csv"))
    assert not (tmp_path / "data").exists()


def peak(project, model, listed, output):
    """The process's own peak of memory, in MB."""
    code = (
        "import sys; from skin_lesion.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    words = [project.command()[0], "-c", code, "batch", str(model), str(listed), str(output)]
    done = subprocess.run(words, env=project.env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024


def test_memory_does_not_grow_with_the_number_of_pictures(project, model, photos, tmp_path):
    picture = next((photos / "visit1").glob("*.jpg"))
    peaks = []
    for count in (500, 6000):
        (tmp_path / "list.txt").write_text(f"{picture}\n" * count)
        peaks.append(peak(project, model, tmp_path / "list.txt", tmp_path / f"{count}.parquet"))
    assert len(pd.read_parquet(tmp_path / "6000.parquet")) == 6000
    assert peaks[1] - peaks[0] < 30, peaks  # 6,000 squares of 32 px alone are 18 MB, their results as objects 10 MB


def test_after_a_kill_the_same_command_goes_on_and_writes_the_same_bytes(project, model, photos, tmp_path):
    pictures = sorted((photos / "visit1").glob("*.jpg"))
    (tmp_path / "list.txt").write_text("".join(f"{pictures[n % len(pictures)]}\n" for n in range(4 * module.PART + 10)))
    words = project.command("batch", model, tmp_path / "list.txt", tmp_path / "out.csv")
    parts = tmp_path / "out.csv.parts"
    started = subprocess.Popen(words, env=project.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (parts / "00000001.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and not (tmp_path / "out.csv").exists()
    whole = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.jsonl")}
    assert 2 <= len(whole) < 5
    seen = []
    tell = lambda place: seen.append(place) or module.file_content(place)
    listed = module.pictures_of_list(tmp_path / "list.txt")
    assert module.batch(model, listed, tmp_path / "out.csv", content=tell) == (len(listed), 0)
    assert len(seen) == len(listed) - len(whole) * module.PART
    assert not parts.exists()
    assert module.batch(model, listed, tmp_path / "again.csv") == (len(listed), 0)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "again.csv").read_bytes()
