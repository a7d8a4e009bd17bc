"""Folders to S3 and back, against moto: what is sent, how it is encrypted, what is not sent again."""

import csv
import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from click.testing import CliRunner
from conftest import colours_package
from moto import mock_aws

from skin_lesion.cli import main
from skin_lesion.cloud import upload as module
from skin_lesion.cloud.sagemaker import clients
from skin_lesion.cloud.upload import fetch, upload
from skin_lesion.commands.monitoring import _has_come, _variables
from skin_lesion.execution.local import data_folder
from skin_lesion.serving.package import pack
from skin_lesion.settings import load_settings

BUCKET, PREFIX, KEY = "lesions", "raw/ham10000", "alias/skin-lesion"
ADDRESS = f"s3://{BUCKET}/{PREFIX}"


class Aws:
    """moto's S3, with a log of what is asked of it, and a request at which the line goes dead."""

    def __init__(self, s3):
        self.s3, self.before = s3, self.log
        self.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        self.calls, self.dead_after = [], {}
        self.s3.meta.events.register("before-call.s3", self.before)

    def log(self, model, params, **_):
        if self.count(model.name) == self.dead_after.get(model.name):
            raise EndpointConnectionError(endpoint_url="s3")
        self.calls.append((model.name, params["headers"]))

    def count(self, name):
        return sum(n == name for n, _ in self.calls)

    def upload(self, folder):
        self.calls.clear()
        return upload(folder, BUCKET, PREFIX, KEY, self.s3)

    def fetch(self, cache, address=ADDRESS):
        self.calls.clear()
        return fetch(address, cache, self.s3)


@pytest.fixture(scope="module")
def s3():
    """One client for all tests here: making it takes longer than any of them."""
    with mock_aws():  # which brings credentials, too
        return clients("eu-west-1")[1]


@pytest.fixture
def aws(s3):
    with mock_aws():
        aws = Aws(s3)
        yield aws
        s3.meta.events.unregister("before-call.s3", aws.before)


@pytest.fixture
def folder(tmp_path):
    """HAM10000 with two pictures, and what must stay here."""
    folder = tmp_path / "ham10000"
    (folder / "HAM10000_images_part_1").mkdir(parents=True)
    rows = ["lesion_id,image_id,dx,age,sex,localization", "H1,ISIC_1,nv,50,male,back", "H2,ISIC_2,mel,60,female,face"]
    (folder / "HAM10000_metadata.csv").write_text("\n".join(rows))
    for n in (1, 2):
        (folder / "HAM10000_images_part_1" / f"ISIC_{n}.jpg").write_bytes(os.urandom(1000 * n))
    (folder / ".download").mkdir()
    (folder / ".download" / "ISIC_3.jpg").write_bytes(b"half a file")
    return folder


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


def test_every_object_is_encrypted_with_the_key_and_a_second_upload_sends_nothing(aws, folder):
    assert aws.upload(folder) == (3, 0)
    sent = [headers for name, headers in aws.calls if name == "PutObject"]
    assert len(sent) == 3 and aws.count("HeadObject") == 0
    for headers in sent:
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == KEY
    keys = {o["Key"] for o in aws.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    pictures = {f"{PREFIX}/HAM10000_images_part_1/ISIC_{n}.jpg" for n in (1, 2)}
    assert keys == {f"{PREFIX}/HAM10000_metadata.csv"} | pictures
    assert aws.upload(folder) == (0, 3) and aws.count("PutObject") == 0


def test_a_changed_file_is_sent_again_also_one_of_the_same_size(aws, folder):
    aws.upload(folder)
    picture = folder / "HAM10000_images_part_1" / "ISIC_1.jpg"
    picture.write_bytes(bytes(1000))
    assert aws.upload(folder) == (1, 2) and aws.count("PutObject") == 1
    picture.write_bytes(bytes(999))
    assert aws.upload(folder) == (1, 2) and aws.count("HeadObject") == 2
    key = f"{PREFIX}/HAM10000_images_part_1/ISIC_1.jpg"
    assert aws.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == bytes(999)
    stored = {"sha256": hashlib.sha256(bytes(999)).hexdigest()}
    for plain in ({"Metadata": stored}, {"ServerSideEncryption": "aws:kms"}):  # not encrypted, or of unknown content
        aws.s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(999), **plain)
        assert aws.upload(folder) == (1, 2)


def test_an_interrupted_upload_goes_on(aws, folder, monkeypatch):
    monkeypatch.setattr(module, "PARALLEL", 1)
    aws.dead_after = {"PutObject": 2}
    with pytest.raises(ValueError, match="s3://lesions/raw/ham10000: AWS refused: .*start the same command again"):
        aws.upload(folder)
    aws.dead_after = {}
    assert aws.upload(folder) == (1, 2) and aws.count("PutObject") == 1


def test_large_files_go_in_parts_under_the_same_key(aws, folder, monkeypatch):
    monkeypatch.setattr(module, "PART", 5 * 2**20)
    large = os.urandom(11 * 2**20)
    (folder / "large.bin").write_bytes(large)
    assert aws.upload(folder) == (4, 0)
    assert (aws.count("UploadPart"), aws.count("CompleteMultipartUpload")) == (3, 1)
    begun = next(headers for name, headers in aws.calls if name == "CreateMultipartUpload")
    assert begun["x-amz-server-side-encryption-aws-kms-key-id"] == KEY
    assert aws.upload(folder) == (0, 4) and aws.count("UploadPart") == 0
    here = aws.fetch(folder.parent / "cache")
    assert (here / "large.bin").read_bytes() == large


def test_a_file_that_is_written_to_while_it_is_sent_is_not_taken_for_whole(aws, folder):
    table = folder / "HAM10000_metadata.csv"
    touch = lambda **_: os.utime(table, (1, 1))
    aws.s3.meta.events.register("before-call.s3.PutObject", touch)
    with pytest.raises(ValueError, match="HAM10000_metadata.csv changed while it was sent"):
        aws.upload(folder)
    aws.s3.meta.events.unregister("before-call.s3.PutObject", touch)


def test_links_and_empty_folders_are_refused_before_anything_is_sent(aws, folder, tmp_path):
    (tmp_path / "outside").mkdir()
    for name, target in {"a.jpg": "/etc/hostname", "below": tmp_path / "outside", "dangling": "nowhere"}.items():
        link = folder / "HAM10000_images_part_1" / name
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"{name} is a link"):
            aws.upload(folder)
        link.unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is no file"):
        aws.upload(folder)
    with pytest.raises(ValueError, match="holds no file"):
        aws.upload(tmp_path / "outside")
    assert not aws.calls


def test_what_was_sent_comes_back_and_is_not_fetched_twice(aws, folder, tmp_path):
    aws.upload(folder)
    here = aws.fetch(tmp_path / "cache")
    assert here == tmp_path / "cache" / BUCKET / PREFIX and aws.count("GetObject") == 3
    expected = {n: b for n, b in content(folder).items() if not n.startswith(".")}
    assert content(here) == expected
    aws.fetch(tmp_path / "cache", ADDRESS + "/")
    assert aws.count("GetObject") == 0
    one = aws.fetch(tmp_path / "cache", f"{ADDRESS}/HAM10000_metadata.csv")
    assert one.read_bytes() == expected["HAM10000_metadata.csv"] and aws.count("GetObject") == 0


def test_the_copy_follows_the_bucket(aws, folder, tmp_path):
    aws.upload(folder)
    aws.s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}_old/a.jpg", Body=b"of another prefix")
    other = aws.fetch(tmp_path / "cache", f"{ADDRESS}_old")
    here = aws.fetch(tmp_path / "cache")
    picture = "HAM10000_images_part_1/ISIC_1.jpg"
    aws.s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{picture}", Body=bytes(1000))  # the same size, the same second
    aws.s3.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/HAM10000_images_part_1/ISIC_2.jpg")
    (here / "HAM10000_metadata.csv").write_text("damaged here")
    aws.fetch(tmp_path / "cache")
    assert aws.count("GetObject") == 2
    assert (here / picture).read_bytes() == bytes(1000)
    assert sorted(content(here)) == [picture, "HAM10000_metadata.csv"] and (other / "a.jpg").exists()
    assert (here / "HAM10000_metadata.csv").read_bytes() == (folder / "HAM10000_metadata.csv").read_bytes()


def test_an_interrupted_fetch_goes_on(aws, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PARALLEL", 1)
    aws.upload(folder)
    aws.dead_after = {"GetObject": 2}
    with pytest.raises(ValueError, match="AWS refused"):
        aws.fetch(tmp_path / "cache")
    aws.dead_after = {}
    with open(tmp_path / "cache" / f"{BUCKET}.index", "a") as f:
        f.write('{"raw/ham10000/HAM')  # killed while it wrote a line
    here = aws.fetch(tmp_path / "cache")
    assert aws.count("GetObject") == 1 and len(content(here)) == 3
    aws.fetch(tmp_path / "cache")


@pytest.mark.parametrize("key", ["raw/ham10000/../../../a.jpg", "raw/ham10000//a.jpg", "raw/ham10000/x\\..\\a.jpg"])
def test_a_key_cannot_lead_out_of_the_cache(aws, tmp_path, key):
    aws.s3.put_object(Bucket=BUCKET, Key=key, Body=b".")
    with pytest.raises(ValueError, match="leads out of the folder"):
        aws.fetch(tmp_path / "deep" / "cache")
    assert not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize("address", ["s3://", "s3://lesions", "s3://lesions/", "s3:/lesions/raw", "s3://Les ions/raw"])
def test_addresses_that_are_none(aws, tmp_path, address):
    with pytest.raises(ValueError, match="of the form s3://bucket/prefix"):
        aws.fetch(tmp_path, address)


def test_the_command_line_uploads_and_takes_addresses_for_folders(aws, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(main, [str(w) for w in words])
    done = run("data", "upload", folder, "--bucket", BUCKET)
    assert done.exit_code == 0 and f"{ADDRESS}: 3 files sent, 0 were there" in done.output, done.output
    checked = run("data", "check", "ham10000", ADDRESS)
    assert checked.exit_code == 0 and "kept                   2" in checked.output, checked.output
    assert data_folder("ham10000", ADDRESS) == Path("data/cache") / BUCKET / PREFIX
    refusals = {
        ("data", "check", "ham10000", f"s3://{BUCKET}/other"): "there is nothing at s3://lesions/other",
        ("predict", f"s3://{BUCKET}/model.tar.gz", ADDRESS): "there is nothing at s3://lesions/model.tar.gz",
        ("predict", f"{ADDRESS}/HAM10000_metadata.csv", ADDRESS): "HAM10000_metadata.csv",
        ("data", "upload", folder, "--bucket", "of-nobody"): "NoSuchBucket",
    }
    for words, expected in refusals.items():
        refused = run(*words)
        assert refused.exit_code == 1 and expected in refused.output, (words, refused.output, refused.exception)
        assert isinstance(refused.exception, SystemExit), words


@pytest.fixture
def command(aws, tmp_path, monkeypatch):
    """Runs `skin-lesion` with the words, beside a bucket that holds two pictures, a model, captures and labels."""
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name, pixels in {"pictures/a.png": picture, "pictures/more/b.png": picture[::-1]}.items():
        aws.s3.put_object(Bucket=BUCKET, Key=name, Body=cv2.imencode(".png", pixels)[1].tobytes())
    package = pack(colours_package(tmp_path / "package"), tmp_path / "model.tar.gz")
    aws.s3.put_object(Bucket=BUCKET, Key="model.tar.gz", Body=package.read_bytes())
    for name in ("capture/here/2026/03/01/09/a.jsonl", "labels/a.jsonl", "event.json"):
        aws.s3.put_object(Bucket=BUCKET, Key=name, Body=b"{}")
    return lambda *words: CliRunner().invoke(main, [str(w) for w in words])


def test_pictures_and_models_at_addresses(command):
    copies = command("data", "duplicates", f"s3://{BUCKET}/pictures")
    assert copies.exit_code == 0, copies.output
    assert [row["file"] for row in csv.DictReader(open("groups.csv"))] == ["a.png", "more/b.png"]
    features = command("data", "features", f"s3://{BUCKET}/model.tar.gz", f"s3://{BUCKET}/pictures", "--json")
    assert features.exit_code == 0 and json.loads(features.stdout)["pictures"] == 2, features.output
    sent = command("simulate", "http://127.0.0.1:9", f"s3://{BUCKET}/pictures", "--rate", "100", "--seconds", ".02")
    assert "ConnectionRefusedError: 2" in sent.output, sent.output  # two pictures, and nobody at port 9


def test_captures_and_labels_at_addresses(command):
    at = lambda name: f"s3://{BUCKET}/{name}"
    refusals = {
        ("monitor", "--capture", at("capture"), "--model", at("none")): f"nothing at {at('none')}",
        ("monitor", "--capture", at("capture"), "--labels", at("none")): f"nothing at {at('none')}",
        ("retrain", "--event", at("event.json"), "--reason", "both"): "Give either",
        ("retrain", "--reason", "new", "--capture", at("none")): f"nothing at {at('none')}",
        ("retrain", "--reason", "new", "--labels", at("none"), "--data-dir", "."): f"nothing at {at('none')}",
        ("serve", at("none")): f"nothing at {at('none')}",
        ("watch", "--capture", "none"): "'none' does not exist",
    }
    for words, expected in refusals.items():
        refused = command(*words)
        assert refused.exit_code != 0 and expected in refused.output, (words, refused.output, refused.exception)
        assert isinstance(refused.exception, SystemExit), words
    settings = load_settings({"retrain.labels": at("labels")}, environ={})
    fetched = Path(_variables(settings, "local")["SKIN_LESION_RETRAIN_LABELS"])
    assert fetched.is_absolute() and (fetched / "a.jsonl").read_bytes() == b"{}"
    assert _variables(settings, "sagemaker")["SKIN_LESION_RETRAIN_LABELS"] == at("labels")


def test_labels_may_come_to_an_address_later(command):
    assert _has_come(f"s3://{BUCKET}/labels") and not _has_come(f"s3://{BUCKET}/none") and not _has_come("none")
    assert _has_come("s3://of-nobody/labels")  # the round then says that there is no such bucket
