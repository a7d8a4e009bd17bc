"""Downloads from a server that cuts, lies, changes its mind and serves rubbish; archives that are not to be trusted."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from click.testing import CliRunner

from skin_lesion.cli import main
from skin_lesion.data import archives
from skin_lesion.data import download as module
from skin_lesion.data.archives import unpack
from skin_lesion.data.download import RemoteFile, download_dataset, download_files, listed_files

BODY = random.Random(1).randbytes(700_000)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges and ETags; `server.script[path]` says what to do wrong, one word a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.requests.append((path, self.headers.get("Range"), self.headers.get("If-Range")))
        wrong = server.script[path].pop(0) if server.script.get(path) else "nothing"
        body, version = server.files[path], server.versions.get(path, '"1"')
        if isinstance(wrong, int):
            return self.answer(wrong, b"no", 2)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if wrong != "ignore If-Range" and self.headers.get("If-Range") != version or wrong == "ignore Range":
            start = 0
        headers = {"ETag": version} if version else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        if wrong == "another range":
            headers["Content-Range"] = f"bytes {start + 7}-{len(body) - 1}/{len(body)}"
        if wrong == "corrupt":
            rest = rest[:-9] + b"corrupted"
        length = {"long": len(rest) + 1000, "short": len(rest) // 2}.get(wrong, len(rest))
        sent = len(rest) // 2 if wrong in ("cut", "no length") else min(length, len(rest))
        self.answer(206 if start else 200, rest[:sent], None if wrong == "no length" else length, headers)

    def answer(self, status, body, length, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)
        self.close_connection = length != len(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that hangs up is what some tests are about
    server.files, server.script, server.versions, server.requests, server.sent = {"/a.csv": BODY}, {}, {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def md5(body):
    return "md5:" + hashlib.md5(body).hexdigest()


def a_csv(server, **options):
    return RemoteFile("a.csv", server.url + "/a.csv", **options)


def get(server, folder, *files):
    return download_files(list(files) or [a_csv(server)], folder, wait=0.001)


def zipped(entries):
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return out.getvalue()


# -- receiving


def test_cut_connections_are_resumed_and_nothing_is_sent_twice(server, tmp_path):
    server.script["/a.csv"] = ["cut", "cut", "cut"]
    get(server, tmp_path, a_csv(server, size=len(BODY), checksum=md5(BODY)))
    assert (tmp_path / "a.csv").read_bytes() == BODY
    starts = [int(r[6:-1]) if r else 0 for _, r, _ in server.requests]
    assert starts == sorted(set(starts)) and len(starts) == 4, starts
    assert {mark for _, _, mark in server.requests[1:]} == {'"1"'}
    assert server.sent < len(BODY) + 3 * module._BLOCK  # a piece that was cut is asked for again, no more
    assert sorted(p.name for p in (tmp_path / ".download").iterdir()) == ["a.csv.done", "lock"]


def test_it_gives_up_keeps_what_arrived_and_goes_on_at_the_next_start(server, tmp_path):
    server.script["/a.csv"] = ["cut", 503, 500, 429, 503, 503]
    with pytest.raises(RuntimeError, match="failed 5 times in a row .*start the same command again"):
        get(server, tmp_path)
    kept = (tmp_path / ".download" / "a.csv.part").stat().st_size
    assert len(server.requests) == module.ATTEMPTS and 0 < kept < len(BODY)
    server.script.clear()
    get(server, tmp_path)
    assert server.requests[-1][1] == f"bytes={kept}-" and (tmp_path / "a.csv").read_bytes() == BODY


def test_progress_resets_the_count_but_only_new_progress(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS", module._BLOCK)
    server.script["/a.csv"] = ["cut", 503, 503, 503, "cut", 503, 503, 503]
    get(server, tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == BODY and len(server.requests) == 9
    server.script["/a.csv"] = ["cut"] * 30
    server.versions["/a.csv"] = None  # nothing to resume by: the same half arrives again and again
    with pytest.raises(RuntimeError, match="failed 5 times"):
        get(server, tmp_path / "other")


@pytest.mark.parametrize("wrong", ["ignore Range", "another range", 416])
def test_a_server_that_cannot_resume_makes_it_start_over(server, tmp_path, wrong):
    server.script["/a.csv"] = ["cut", wrong]
    get(server, tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == BODY


@pytest.mark.parametrize("manners", ["nothing", "ignore If-Range"])
def test_a_file_that_changes_between_two_attempts_is_never_spliced(server, tmp_path, manners):
    server.script["/a.csv"] = ["cut", 503, 503, 503, 503]
    with pytest.raises(RuntimeError):
        get(server, tmp_path)
    new = BODY[::-1]
    server.files["/a.csv"], server.versions["/a.csv"], server.script["/a.csv"] = new, '"2"', [manners]
    get(server, tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == new
    assert server.requests[5][2] == '"1"'


@pytest.mark.parametrize("mark", [None, 'W/"1"'])
def test_without_a_strong_mark_nothing_is_resumed(server, tmp_path, mark):
    server.versions["/a.csv"], server.script["/a.csv"] = mark, ["cut"]
    get(server, tmp_path)
    assert [r for _, r, _ in server.requests] == [None, None] and (tmp_path / "a.csv").read_bytes() == BODY


def test_a_length_that_is_a_lie(server, tmp_path):
    server.script["/a.csv"] = ["long"] * 9
    with pytest.raises(RuntimeError, match="failed 5 times"):
        get(server, tmp_path)
    server.script["/a.csv"] = ["short"]
    with pytest.raises(ValueError, match="announces 350,000 bytes; a.csv must have 700,000"):
        get(server, tmp_path / "known", a_csv(server, size=len(BODY)))
    server.files["/i.zip"], server.script["/i.zip"] = zipped([("a.jpg", BODY)]), ["short"]
    with pytest.raises(ValueError, match="damaged .*downloaded anew"):  # no size and no checksum: the archive tells
        get(server, tmp_path / "z", RemoteFile("i.zip", server.url + "/i.zip"))
    assert not list(tmp_path.rglob("a.csv")) and not list(tmp_path.rglob("a.jpg*"))


def test_a_server_that_does_not_say_the_length(server, tmp_path):
    server.script["/a.csv"] = ["no length"]
    with pytest.raises(ValueError, match="does not say how long a.csv is"):
        get(server, tmp_path)
    server.script["/a.csv"] = ["no length"]  # it hangs up in the middle, which looks like the end
    get(server, tmp_path, a_csv(server, size=len(BODY)))
    assert (tmp_path / "a.csv").read_bytes() == BODY and len(server.requests) == 3


def test_corrupt_bytes_are_fetched_once_more_and_never_kept(server, tmp_path):
    file = a_csv(server, checksum=md5(BODY))
    server.script["/a.csv"] = ["corrupt"]
    get(server, tmp_path, file)
    assert (tmp_path / "a.csv").read_bytes() == BODY and len(server.requests) == 2
    server.script["/a.csv"] = ["corrupt", "corrupt"]
    with pytest.raises(ValueError, match="arrived twice with other bytes than md5:"):
        get(server, tmp_path / "other", file)
    assert sorted(p.name for p in (tmp_path / "other").rglob("*")) == [".download", "lock"]


def test_a_missing_file_is_asked_for_once(server, tmp_path):
    server.script["/a.csv"] = [404]
    with pytest.raises(ValueError, match="answers 404 Not Found"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_killed_in_the_middle(server, tmp_path):
    code = (
        "import os, signal, sys\nfrom skin_lesion.data import download as d\nreceive = d._append\n"
        "def stop(part, have, size, answer, tell, stop):\n"
        "    def tell2(before, now, size):\n"
        "        if now > 300_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    receive(part, have, size, answer, tell2, stop)\nd._append = stop\n"
        "d.download_files([d.RemoteFile('a.csv', sys.argv[1])], sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, server.url + "/a.csv", tmp_path], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = (tmp_path / ".download" / "a.csv.part").stat().st_size
    get(server, tmp_path)
    assert kept > 0 and server.requests[-1][1] == f"bytes={kept}-" and (tmp_path / "a.csv").read_bytes() == BODY


def test_files_come_side_by_side_with_plain_lines_and_a_failure_keeps_the_others(server, tmp_path, capsys):
    names = [f"{n}.csv" for n in range(6)]
    server.files |= {f"/{n}": BODY for n in names}
    files = [RemoteFile(n, f"{server.url}/{n}") for n in names]
    server.script["/3.csv"] = [404]
    with pytest.raises(ValueError, match="3.csv answers 404"):
        get(server, tmp_path, *files)
    get(server, tmp_path, *files)
    assert all((tmp_path / n).read_bytes() == BODY for n in names)
    assert "3.csv: 0.7 of 0.7 MB" in capsys.readouterr().out.splitlines()


def test_a_failure_ends_the_patience_of_the_others(server, tmp_path):
    server.script = {"/a.csv": [503], "/b.csv": [404]}
    server.files["/b.csv"] = BODY
    with pytest.raises(ValueError, match="404"):
        download_files([a_csv(server), RemoteFile("b.csv", server.url + "/b.csv")], tmp_path, wait=1000)


def test_one_download_at_a_time_into_a_folder(server, tmp_path):
    (tmp_path / ".download").mkdir()
    with open(tmp_path / ".download" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another download"):
            get(server, tmp_path)


def test_too_small_a_disk_is_said_before_anything_is_sent(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(10**9, 0, 1_000_000))
    file = RemoteFile("i.zip", server.url + "/i.zip", size=600_000)  # and as much again when it is unpacked
    with pytest.raises(OSError, match="1.2 MB are needed and 1.0 MB are free") as full:
        get(server, tmp_path, file)
    assert full.value.errno == errno.ENOSPC and not server.requests
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(10**9, 0, 500_000))
    with pytest.raises(OSError, match="0.7 MB are needed"):  # a length that only the server knew
        get(server, tmp_path)
    assert not (tmp_path / ".download" / "a.csv.part").exists()


# -- unpacking


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


# -- data sets


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
