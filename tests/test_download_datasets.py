"""Whole data sets as their publishers lay them out, from a server on loopback; the licence; the table of addresses."""

import hashlib
import json
import shutil
from collections import namedtuple

import pytest
from bad_server import BODY, md5, serving, zipped
from click.testing import CliRunner

from skin_lesion.cli import main
from skin_lesion.data import download as module
from skin_lesion.data.download import RemoteFile, download_dataset, listed_files

server = pytest.fixture(serving)


def table(header, *rows):
    return ("\n".join([header, *rows]) + "\n").encode()


HAM = table("lesion_id,image_id,dx,age,sex,localization", "H1,ISIC_1,nv,50,male,back", "H2,ISIC_2,mel,60,female,face")


def ham(server):
    """HAM10000 with a picture in each of its two archives."""
    contents = {
        "HAM10000_metadata.csv": HAM,
        "HAM10000_images_part_1.zip": zipped([("ISIC_1.jpg", BODY[:5000])]),
        "HAM10000_images_part_2.zip": zipped([("ISIC_2.jpg", BODY[:6000])]),
    }
    server.files = {f"/{name}": body for name, body in contents.items()}
    return [RemoteFile(name, f"{server.url}/{name}", len(body), md5(body)) for name, body in contents.items()]


def test_the_catalog_reads_what_was_downloaded_and_it_is_never_fetched_twice(server, tmp_path, capsys):
    files = ham(server)
    assert download_dataset("ham10000", tmp_path, True, files)["kept"] == 2
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert (tmp_path / "HAM10000_images_part_1" / "ISIC_1.jpg").is_file() and not list(tmp_path.rglob("*.zip"))
    server.requests.clear()
    download_dataset("ham10000", tmp_path, True, files)
    assert not server.requests and "part_1.zip: complete, not downloaded again" in capsys.readouterr().out
    (tmp_path / "HAM10000_images_part_2" / "ISIC_2.jpg").unlink()
    download_dataset("ham10000", tmp_path, True, files)
    assert [path for path, _, _ in server.requests] == ["/HAM10000_images_part_2.zip"]


def test_isic2019_and_bcn20000_have_the_layout_that_the_catalog_reads(server, tmp_path):
    bodies = {
        "ISIC_2019_Training_GroundTruth.csv": table(
            "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", "ISIC_1,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0"
        ),
        "ISIC_2019_Training_Metadata.csv": table(
            "image,age_approx,anatom_site_general,lesion_id,sex", "ISIC_1,55,torso,,male"
        ),
        "ISIC_2019_Training_Input.zip": zipped([("ISIC_2019_Training_Input/ISIC_1.jpg", b"jpeg")]),
        "bcn_20k_train.csv": table(
            "bcn_filename,diagnosis,age_approx,anatom_site_general,lesion_id,sex", "BCN_1.jpg,NV,50,torso,B1,male"
        ),
        "BCN_20k_train.zip": zipped([("bcn_20k_train/BCN_1.jpg", b"jpeg")]),
        "BCN_20k_test.zip": b"not asked for",
        "readme.md": b"not asked for",
    }
    server.files = {f"/{name}": body for name, body in bodies.items()}
    listing = [
        {"name": n, "download_url": f"{server.url}/{n}", "size": len(b), "computed_md5": md5(b)[4:]}
        for n, b in bodies.items()
        if not n.startswith("ISIC")
    ]
    server.files["/files"] = json.dumps(listing).encode()
    isic = [RemoteFile(n, f"{server.url}/{n}") for n in bodies if n.startswith("ISIC")]
    assert download_dataset("isic2019", tmp_path / "isic2019", True, isic)["kept"] == 1
    assert (tmp_path / "isic2019" / "ISIC_2019_Training_Input" / "ISIC_1.jpg").is_file()
    bcn = listed_files(server.url + "/files")
    assert [f.name for f in bcn] == ["bcn_20k_train.csv", "BCN_20k_train.zip"]
    assert download_dataset("bcn20000", tmp_path / "bcn20000", True, bcn)["kept"] == 1


@pytest.mark.parametrize("body", [b"[]", b"<html>", b'{"message": "no"}', b'[{"name": "a.zip"}]'])
def test_a_listing_that_is_none(server, body):
    server.files["/files"] = body
    with pytest.raises(RuntimeError, match="/files (did not list|lists)"):
        listed_files(server.url + "/files")


def test_a_name_in_a_listing_cannot_lead_out_of_the_folder(server):
    entry = {"name": "../../a.zip", "download_url": server.url, "size": 1, "computed_md5": ""}
    server.files["/files"] = json.dumps([entry]).encode()
    with pytest.raises(RuntimeError, match="by hand"):
        listed_files(server.url + "/files")


def test_what_the_user_has_put_there_is_used_or_left_alone(server, tmp_path):
    files = ham(server)
    (tmp_path / "HAM10000_metadata.csv").write_bytes(HAM)
    (tmp_path / "HAM10000_images_part_1.zip").write_bytes(server.files["/HAM10000_images_part_1.zip"])
    download_dataset("ham10000", tmp_path, True, files)
    assert [path for path, _, _ in server.requests] == ["/HAM10000_images_part_2.zip"]
    assert (tmp_path / "HAM10000_images_part_1.zip").exists(), "the user's own archive stays"
    (tmp_path / "HAM10000_metadata.csv").write_bytes(HAM + b"edited")
    with pytest.raises(ValueError, match="does not overwrite it; move it away"):
        download_dataset("ham10000", tmp_path, True, files)
    assert (tmp_path / "HAM10000_metadata.csv").read_bytes() == HAM + b"edited"


def test_the_licence_is_shown_and_must_be_accepted(server, tmp_path):
    with pytest.raises(ValueError, match="--accept-license"):
        download_dataset("ham10000", tmp_path / "new", files=ham(server))
    refused = CliRunner().invoke(main, ["data", "download", "isic2019", "--output-dir", str(tmp_path)])
    assert refused.exit_code == 1 and "--accept-license" in refused.output and "arXiv:1710.05006" in refused.output
    assert not server.requests and not list(tmp_path.iterdir())
    for name, expected in {"sample": "data sample", "ham1000": "must be one of"}.items():
        refused = CliRunner().invoke(main, ["data", "download", name, "--accept-license"])
        assert refused.exit_code == 1 and expected in refused.output


def test_the_command_downloads_below_the_output_folder(server, tmp_path, monkeypatch):
    monkeypatch.setitem(module.FILES, "ham10000", ham(server))
    words = ["data", "download", "ham10000", "--output-dir", str(tmp_path), "--accept-license"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and f"{tmp_path}/ham10000" in done.output, done.output
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(10**9, 0, 10))
    full = CliRunner().invoke(main, [*words[:4], str(tmp_path / "full"), words[-1]])
    assert full.exit_code == 1 and "are free" in full.output and full.exception.__class__ is SystemExit


# -- the table


def test_the_table_is_well_formed():
    for name, files in module.FILES.items():
        assert sum(f.archive for f in files) >= 1 and len({f.name for f in files}) == len(files), name
        for f in files:
            kind, digest = f.checksum.split(":")
            assert f.url.startswith("https://") and f.size and len(digest) == {"md5": 32, "sha256": 64}[kind]


def test_the_checksums_of_the_tables_are_those_of_the_files_at_hand(shared_data):
    expected = {f.name: f for files in module.FILES.values() for f in files}
    for path in ("ham10000/HAM10000_metadata.csv", "isic2019/ISIC_2019_Training_Metadata.csv"):
        file = expected[path.split("/")[1]]
        assert (shared_data / path).stat().st_size == file.size
        assert module.has_checksum(shared_data / path, file.checksum)
    truth = (shared_data / "isic2019" / "ISIC_2019_Training_GroundTruth.csv").read_bytes().split(b"\r\n")
    published = b"\r\n".join([truth[0], *(row.replace(b",0", b",0.0").replace(b",1", b",1.0") for row in truth[1:])])
    file = expected["ISIC_2019_Training_GroundTruth.csv"]
    assert len(published) == file.size and "sha256:" + hashlib.sha256(published).hexdigest() == file.checksum
