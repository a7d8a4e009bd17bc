"""How fast the input pipeline is: `make bench-training` measures it beside timm's own loader, in one run."""

import time

import numpy as np
import pytest
import torch
from conftest import keep
from timm.data import ImageDataset, create_loader
from torch.nn import functional as F

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.training.loop import batches
from skin_lesion.training.models import Classifier

pytestmark = pytest.mark.slow
IMAGES, SIZE, BATCH, ROUNDS = 2000, 224, 64, 5


@pytest.fixture(scope="module")
def table(shared_data):
    return read_dataset("ham10000", shared_data / "ham10000")[0].iloc[:IMAGES]


@pytest.fixture(scope="module")
def shards(shared_data, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    packed = pack_images(table, shared_data / "ham10000", SIZE, folder / "work")
    return Shards(write_shards(table, packed, folder / "train"))


def epoch(shards, number, batch_size=BATCH):
    """The augmented batches of one pass in random order."""
    order = np.random.default_rng(number).permutation(len(shards))
    return batches(shards, np.zeros(len(shards), np.int64), order, batch_size, (1, number))


def rate(loader):
    """Images a second of one pass."""
    started = time.perf_counter()
    images = sum(len(pixels) for pixels, _ in loader)
    return images / (time.perf_counter() - started)


def test_the_pipeline_is_four_times_as_fast_as_timms_loader(shared_data, table, shards, tmp_path):
    """Both hand over uint8 batches on the CPU: normalising is the network's part here, and timm's is left out.

    timm reads the JPEGs as they are in ../shared/data, 256 px at most, which is in its favour: the originals are
    600 x 450. Ours reads the shards that were made of the same files once. Ours also rotates and shifts."""
    (tmp_path / "jpeg/all").mkdir(parents=True)
    for path in table.path:
        (tmp_path / "jpeg/all" / path.split("/")[-1]).symlink_to(shared_data / "ham10000" / path)
    augmentation = {"scale": (0.6, 1.0), "hflip": 0.5, "vflip": 0.5, "color_jitter": 0.2, "interpolation": "bilinear"}
    dataset, cpu = ImageDataset(str(tmp_path / "jpeg")), torch.device("cpu")
    timm = create_loader(dataset, (3, SIZE, SIZE), BATCH, True, num_workers=2, device=cpu, **augmentation).loader
    pixels, _ = next(iter(timm))
    assert len(dataset) == IMAGES and pixels.shape == (BATCH, 3, SIZE, SIZE) and pixels.dtype == torch.uint8
    rate(timm), rate(epoch(shards, 0))  # workers are started and files are read
    ours, theirs = zip(
        *((rate(epoch(shards, n)), rate(timm)) for n in range(1, ROUNDS + 1))
    )  # in turn: others work here
    ratio = np.median(ours) / np.median(theirs)
    figures = {"images": IMAGES, "pixels": SIZE, "timm_workers": 2, "threads": torch.get_num_threads()}
    rates = {"images_per_second": round(np.median(ours)), "timm_images_per_second": round(np.median(theirs))}
    keep("input_pipeline", figures | rates | {"ratio": round(ratio, 2)})
    assert ratio >= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, whose training step this measures")
@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet50"])
def test_a_gpu_does_not_wait_for_the_pipeline(shards, architecture):
    """The same training step, fed by the pipeline and fed again and again with one batch that is on the GPU already."""
    gpu, batch_size = torch.device("cuda"), 128
    model = Classifier(architecture, 7).to(gpu).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def stepped(loader):
        """Trains on every batch, and hands it on to be counted."""
        for pixels, labels in loader:
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(pixels.to(gpu, non_blocking=True))
            loss = F.cross_entropy(logits.float(), labels.to(gpu))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield pixels, labels
        torch.cuda.synchronize()

    one = (
        torch.zeros(batch_size, SIZE, SIZE, 3, dtype=torch.uint8, device=gpu),
        torch.zeros(batch_size, dtype=torch.int64),
    )
    synthetic = [one] * (4 * len(shards) // batch_size)
    real = lambda n: (batch for i in range(4) for batch in epoch(shards, 4 * n + i, batch_size))
    rate(stepped(synthetic)), rate(stepped(real(0)))
    fed, ideal = zip(*((rate(stepped(real(n))), rate(stepped(synthetic))) for n in range(1, ROUNDS + 1)))
    share = np.median(fed) / np.median(ideal)
    rates = {"images_per_second": round(np.median(fed)), "synthetic_images_per_second": round(np.median(ideal))}
    keep(f"gpu_{architecture}", {"gpu": torch.cuda.get_device_name()} | rates | {"share": round(share, 3)})
    assert share >= 0.95
