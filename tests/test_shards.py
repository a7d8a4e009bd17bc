"""Shards: decoded once, restartable, bounded, atomic; what is damaged or half-written is not taken for whole."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from skin_lesion.data import shards as module
from skin_lesion.data.catalog import classes_of, read_dataset
from skin_lesion.data.images import load_square
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, check_space, drop_unreadable, pack_images, write_shards


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("data") / "sample", lesions=20, seed=1)


@pytest.fixture
def small(monkeypatch):
    "Several chunks and shards from a handful of images."
    monkeypatch.setattr(module, "CHUNK", 8), monkeypatch.setattr(module, "SHARD", 7)


@pytest.fixture
def table(sample):
    return read_dataset("sample", sample)[0]


@pytest.fixture
def packed(small, sample, table, tmp_path):
    return pack_images(table, sample, 32, tmp_path / "work")


def test_every_pixel_and_row_arrives(packed, table, sample, tmp_path):
    s = Shards(write_shards(table, packed, tmp_path / "out"), verify=True)
    assert len(s) == len(table) and len(s._files) == -(-len(table) // 7)
    expected = table.sort_values("image_id").reset_index(drop=True)
    pd.testing.assert_frame_equal(s.rows, expected, check_dtype=False)
    pixels = np.stack([load_square(sample / p, 32) for p in expected.path])
    assert np.array_equal(s[np.arange(len(s))], pixels)
    assert (s.dataset, s.synthetic, s.classes, s.image_size) == ("sample", True, list(classes_of("sample")), 32)


def test_indexing_is_numpys(packed, table, tmp_path):
    s = Shards(write_shards(table, packed, tmp_path / "out"))
    every = s[:]
    rng = np.random.default_rng(0)
    for i in [
        3,
        -1,
        np.int64(8),
        slice(5, 20, 3),
        rng.integers(len(s), size=50),
        np.arange(len(s)) % 3 == 0,
        np.array([], int),
    ]:
        assert np.array_equal(s[i], every[i]) and s[i].dtype == np.uint8
    with pytest.raises(IndexError):
        s[len(s)]
    s[0][:] = 0  # a copy: the files stay as they are
    assert np.array_equal(s[:], every)


def test_content_hash_is_of_the_content(packed, table, tmp_path):
    one = Shards(write_shards(table, packed, tmp_path / "one"))
    assert Shards(write_shards(table.iloc[::-1], packed, tmp_path / "two")).content_hash == one.content_hash
    assert Shards(write_shards(table.assign(age=1.0), packed, tmp_path / "three")).content_hash != one.content_hash
    assert Shards(write_shards(table.iloc[1:], packed, tmp_path / "four")).content_hash != one.content_hash


def test_writing_again_replaces_all_that_was_there(packed, table, tmp_path):
    write_shards(table, packed, tmp_path / "out")
    s = Shards(write_shards(table.iloc[:5], packed, tmp_path / "out"), verify=True)
    assert len(s) == 5
    assert sorted(p.name for p in s.folder.iterdir()) == ["rows.parquet", "shard-00000.npy", "shards.json"]


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}


def test_a_second_run_decodes_only_what_is_missing_changed_or_broken(packed, table, sample, tmp_path):
    work, copy = tmp_path / "work", tmp_path / "copy"
    before = times(work)
    assert (
        np.array_equal(pack_images(table, sample, 32, work).fingerprints, packed.fingerprints) and times(work) == before
    )
    (work / "chunk-00001.npy").unlink()
    (work / "chunk-00002.npy").write_bytes((work / "chunk-00002.npy").read_bytes()[:1000])
    (work / "chunk-00003.json").unlink()
    again = pack_images(table, sample, 32, work)
    changed = {n for n, t in times(work).items() if t != before[n]}
    assert changed == {"chunk-00001.npy", "chunk-00002.npy", "chunk-00003.npy"}
    assert np.array_equal(again.squares(table.image_id), packed.squares(table.image_id))
    pack_images(table, sample, 16, work)
    assert not set(times(work).values()) & set(before.values()), "another size is another chunk"
    shutil.copytree(sample, copy)
    first = pack_images(table, copy, 32, tmp_path / "work2")
    (copy / table.path[0]).write_bytes((copy / table.path[1]).read_bytes())
    second = pack_images(table, copy, 32, tmp_path / "work2")
    assert not np.array_equal(first.fingerprints[0], second.fingerprints[0]), "a replaced file is decoded again"


def test_killed_in_the_middle(small, table, sample, tmp_path):
    code = (
        "import os, signal, sys\nfrom skin_lesion.data import shards\nfrom skin_lesion.data.catalog import read_dataset\n"
        "shards.CHUNK = 8\nwrite, sample, work = shards._write_chunk, *sys.argv[1:]\n"
        'def stop(path, *a):\n    if path.name == "chunk-00002.npy": os.kill(os.getpid(), signal.SIGKILL)\n    write(path, *a)\n'
        'shards._write_chunk = stop\nshards.pack_images(read_dataset("sample", sample)[0], sample, 32, work)\n'
    )
    done = subprocess.run([sys.executable, "-c", code, sample, tmp_path / "work"], capture_output=True)
    assert done.returncode == -9
    before = times(tmp_path / "work")
    assert set(before) == {"chunk-00000.npy", "chunk-00001.npy"}
    packed = pack_images(table, sample, 32, tmp_path / "work")
    assert {n: t for n, t in times(tmp_path / "work").items() if n in before} == before
    fresh = pack_images(table, sample, 32, tmp_path / "fresh")
    assert np.array_equal(packed.squares(table.image_id), fresh.squares(table.image_id))


def test_unreadable_images_are_named_with_their_reason(small, sample, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sample, copy)
    table, accounting = read_dataset("sample", copy)
    (copy / table.path[2]).write_bytes(b"")
    (copy / table.path[9]).write_bytes((copy / table.path[9]).read_bytes()[:3000])
    (copy / table.path[10]).unlink()
    packed = pack_images(table, copy, 32, tmp_path / "work")
    assert list(packed.unreadable) == table.image_id[[2, 9, 10]].tolist()
    assert [w in r for w, r in zip(["empty", "truncated", "no such file"], packed.unreadable.values())] == [True] * 3
    assert pack_images(table, copy, 32, tmp_path / "work").unreadable == packed.unreadable, (
        "remembered beside the chunk"
    )
    with pytest.raises(ValueError, match="3 of .* cannot be read.*allow-missing"):
        drop_unreadable(table, packed, accounting, False)
    kept, prints, account = drop_unreadable(table, packed, accounting, True)
    assert len(kept) == len(prints) == account["kept"] == len(table) - 3 and prints.any(axis=1).all()
    assert account["unreadable"] == list(packed.unreadable)


def test_no_space_is_found_before_anything_is_written(packed, table, tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"needed and .* free") as e:
        check_space(tmp_path, 10**18)
    assert e.value.errno == errno.ENOSPC
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=1000))
    with pytest.raises(OSError, match=str(tmp_path / "out")):
        write_shards(table, packed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(OSError, match="image_size"):
        pack_images(table, tmp_path, 64, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(packed, table, tmp_path):
    "No file of this process may grow beyond 12 kB, as if the disk were full: the write itself fails."
    out, limit = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_shards(table.iloc[:3], packed, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limit[1]))
    try:
        with pytest.raises(OSError, match="shard-00000.npy could not be written.*needed.*free"):
            write_shards(table, packed, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(out.iterdir()) == []
    with pytest.raises(ValueError, match="no shards.json"):
        Shards(out)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(sample, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        table = read_dataset("sample", sample)[0]
        with pytest.raises(OSError, match="MB are needed and 0.3 MB are free") as e:
            pack_images(table, sample, 64, disk / "work")
        assert e.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "fault, message",
    [("no manifest", "no shards.json"), ("cut", "has 100 bytes"), ("gone", "has 0 bytes"), ("manifest cut", "damaged")],
)
def test_a_folder_that_is_not_whole(packed, table, tmp_path, fault, message):
    out = write_shards(table, packed, tmp_path / "out")
    if fault == "no manifest":
        (out / "shards.json").unlink()
    if fault == "cut":
        (out / "shard-00001.npy").write_bytes((out / "shard-00001.npy").read_bytes()[:100])
    if fault == "gone":
        (out / "rows.parquet").unlink()
    if fault == "manifest cut":
        (out / "shards.json").write_text(json.dumps(json.loads((out / "shards.json").read_text()))[:50])
    with pytest.raises(ValueError, match=message):
        Shards(out)


def test_one_changed_byte_is_found_by_verifying(packed, table, tmp_path):
    out = write_shards(table, packed, tmp_path / "out")
    data = bytearray((out / "shard-00002.npy").read_bytes())
    data[-1] ^= 1
    (out / "shard-00002.npy").write_bytes(data)
    Shards(out)
    with pytest.raises(ValueError, match="shard-00002.npy is not what was written"):
        Shards(out, verify=True)
