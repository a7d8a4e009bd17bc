"""Archives that are not to be trusted: none writes outside its folder, or more than it may."""

import os
import stat
import zipfile

import pytest
from bad_server import BODY, zipped

from skin_lesion.data import archives
from skin_lesion.data.archives import unpack


def write_zip(path, entries):
    path.write_bytes(zipped(entries))
    return path


ESCAPES = ["../a.jpg", "x/../../a.jpg", "/a.jpg", "..\\a.jpg", "C:/a.jpg", "C:\\a.jpg"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_path_out_of_the_folder_refuses_the_archive(tmp_path, name):
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="leads out of the folder; nothing of it was unpacked"):
        unpack(write_zip(tmp_path / "i.zip", [("good.jpg", b"."), (name, b".")]), folder)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "folder", "i.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_refuse_the_archive(tmp_path, kind):
    info = zipfile.ZipInfo("a.jpg")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    with pytest.raises(ValueError, match="is a link or a device"):
        unpack(write_zip(tmp_path / "i.zip", [(info, b"/etc/passwd")]), tmp_path)


def test_bombs_refuse_the_archive(tmp_path, monkeypatch):
    bomb = write_zip(tmp_path / "i.zip", [("a.jpg", bytes(30_000_000))])
    with pytest.raises(ValueError, match="1 files of 30,000,000 bytes"):
        unpack(bomb, tmp_path)
    monkeypatch.setattr(archives, "MEMBERS", 10)
    with pytest.raises(ValueError, match="holds 11 files"):
        unpack(write_zip(bomb, [(f"{n}.jpg", b".") for n in range(11)]), tmp_path)
    with pytest.raises(ValueError, match="two files of one name"):
        unpack(write_zip(bomb, [("a.jpg", b"."), ("i/A.JPG", b".")]), tmp_path)
    # the list says 9 bytes, the data are a megabyte: no more than 9 are written, and their CRC is wrong
    data = bytearray(zipped([("a.jpg", bytes(1_000_000))]))
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (9).to_bytes(4, "little")
    bomb.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        unpack(bomb, tmp_path)
    assert not list(tmp_path.rglob("*.jpg*"))


def test_a_link_in_the_folder_is_not_followed_out_of_it(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    (folder / "i").symlink_to(outside)
    with pytest.raises(ValueError, match="by a link in it"):
        unpack(write_zip(tmp_path / "i.zip", [("a.jpg", b".")]), folder)
    assert not list(outside.iterdir())


def test_only_expected_endings_are_unpacked_each_in_its_folder(tmp_path):
    entries = ["a.jpg", "b/c.PNG", "i/d.jpeg", "t.csv", "LICENSE.txt", "run.sh", "x.exe", "__MACOSX/._a.jpg"]
    found = unpack(write_zip(tmp_path / "i.zip", [(n, n) for n in entries]), tmp_path)
    assert found == {"i/a.jpg": 5, "i/b/c.PNG": 7, "i/d.jpeg": 8, "i/t.csv": 5, "i/LICENSE.txt": 11}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "i").rglob("*.*")) == sorted(found)


def test_unpacking_goes_on_where_it_was(tmp_path):
    path = write_zip(tmp_path / "i.zip", [(f"{n}.jpg", BODY[n : n + 5000]) for n in range(5)])
    unpack(path, tmp_path)
    files = sorted((tmp_path / "i").iterdir())
    for f in files:
        os.utime(f, (1, 1))
    files[1].unlink()
    files[3].write_bytes(bytes(5000))
    os.utime(files[3], (1, 1))
    unpack(path, tmp_path)
    assert [f.stat().st_mtime > 1 for f in files] == [False, True, False, True, False]
    assert [f.read_bytes() for f in files] == [BODY[n : n + 5000] for n in range(5)]
