"""What augmentation promises: the same pictures whoever makes them, and no change where none was asked for."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from skin_lesion.data.augment import DRAWS, augment_batch, draw
from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.training.loop import batches

# what each number of a row does, in order
MEANING = "angle zoom flip right down saturation contrast brightness red green blue".split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment")
    table, _ = read_dataset("sample", write_sample(folder / "sample", lesions=24, seed=1))
    packed = pack_images(table, folder / "sample", 64, folder / "work")
    return Shards(write_shards(table, packed, folder / "shards"))


def changed(images, **numbers):
    """The pictures after draws that are zero but for these."""
    draws = np.zeros((len(images), DRAWS))
    for name, number in numbers.items():
        draws[:, MEANING.index(name)] = number
    return augment_batch(images, draws)


def by_row(shards, order, **options):
    """What each row of an epoch became."""
    rows = np.arange(len(shards))
    return {int(row): picture for x, y in batches(shards, rows, order, **options) for row, picture in zip(y, x)}


def test_a_picture_depends_on_seed_epoch_and_row_and_on_nothing_else(shards):
    rows = np.arange(len(shards))
    expected = augment_batch(shards[rows], draw(len(shards), (3, 5)))
    made = by_row(shards, rows[::-1], batch_size=len(rows), seed=(3, 5))
    before = torch.get_num_threads()
    for threads, batch_size, world in (1, 1, 1), (4, 7, 1), (2, 16, 2), (3, 9, 3):
        torch.set_num_threads(threads)
        try:
            order = np.random.default_rng(threads).permutation(rows)[: len(rows) // batch_size * batch_size]
            for rank in range(world):
                made |= by_row(shards, order, batch_size=batch_size, seed=(3, 5), rank=rank, world=world)
                assert all(np.array_equal(picture, expected[row]) for row, picture in made.items())
        finally:
            torch.set_num_threads(before)
    assert len(made) == len(rows)
    for other in (3, 6), (4, 5):
        assert (augment_batch(shards[rows], draw(len(shards), other)) != expected).any(axis=(1, 2, 3)).all()


def test_a_resumed_epoch_goes_on_with_the_same_batches(shards):
    rows = np.arange(len(shards))
    whole = list(batches(shards, rows, rows, 8, (1, 0)))
    resumed = list(batches(shards, rows, rows, 8, (1, 0), first=2))
    assert len(whole) == len(rows) // 8 and len(resumed) == len(whole) - 2
    assert all(torch.equal(a, b) for x, y in zip(whole[2:], resumed) for a, b in zip(x, y))


def test_a_pool_writes_every_picture_into_the_array_given(shards):
    images, draws = shards[:], draw(len(shards), (1, 0))
    out = np.zeros_like(images)
    with ThreadPoolExecutor(3) as pool:
        assert augment_batch(images, draws, pool, out) is out
    assert np.array_equal(out, augment_batch(images, draws))
    assert out.shape == images.shape and out.dtype == np.uint8


def test_zero_draws_change_nothing_and_each_draw_does_what_it_says(shards):
    images = shards[:8]
    assert np.array_equal(changed(images), images)
    assert np.array_equal(changed(images, flip=-0.1), images[:, :, ::-1])
    assert np.array_equal(changed(images, angle=0.5), np.rot90(images, -1, (1, 2)))
    step = round(0.1 * 64 * 0.625)
    assert np.array_equal(changed(images, right=0.625)[:, :, step:], images[:, :, :-step])
    assert np.array_equal(changed(images, down=0.625)[:, step:], images[:, :-step])
    brighter = images.astype(int) + 10
    assert np.array_equal(changed(images, brightness=10 / 25.5), brighter.clip(0, 255))
    assert changed(images, contrast=0.9).std() > images.std() > changed(images, contrast=-0.9).std()
    colourful = lambda x: np.ptp(x.astype(int), axis=-1).mean()
    assert colourful(changed(images, saturation=0.9)) > colourful(images) > colourful(changed(images, saturation=-0.9))
    redder = changed(images, red=0.9).astype(int) - images
    assert redder[..., 0].min() >= 0 < redder[..., 0].max() and not redder[..., 1:].any()
    assert not np.array_equal(changed(images, zoom=0.9), images)


def test_the_warp_is_bilinear_interpolation(shards):
    """A turn by 17 degrees, against the formula in floating point, where no point comes from outside."""
    images = shards[:4]
    angle, centre = np.radians(17), 31.5
    y, x = np.mgrid[20:44, 20:44] - centre
    back_x = np.cos(angle) * x + np.sin(angle) * y + centre
    back_y = np.cos(angle) * y - np.sin(angle) * x + centre
    left, top = np.floor(back_x).astype(int), np.floor(back_y).astype(int)
    right, down = (back_x - left)[..., None], (back_y - top)[..., None]
    upper = images[:, top, left] * (1 - right) + images[:, top, left + 1] * right
    lower = images[:, top + 1, left] * (1 - right) + images[:, top + 1, left + 1] * right
    expected = upper * (1 - down) + lower * down
    assert abs(changed(images, angle=17 / 180)[:, 20:44, 20:44] - expected).max() < 1
