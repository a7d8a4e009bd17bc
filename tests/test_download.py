"""Downloads from a server that cuts, lies, changes its mind and serves rubbish."""

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
from bad_server import BODY, md5, serving, zipped

from skin_lesion.data import download as module
from skin_lesion.data.download import RemoteFile, download_files

server = pytest.fixture(serving)


def a_csv(server, **options):
    return RemoteFile("a.csv", server.url + "/a.csv", **options)


def get(server, folder, *files):
    return download_files(list(files) or [a_csv(server)], folder, wait=0.001)


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
