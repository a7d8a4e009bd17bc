"""What each knob of the training recipe does in a short training on HAM10000; `make bench-recipe` keeps it in bench/recipe.json."""

import numpy as np
import pytest
import torch
from conftest import keep

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.evaluation.metrics import MELANOMA, paired_difference, score
from skin_lesion.execution.explore import lesion_folds
from skin_lesion.training import loop
from skin_lesion.training.loop import Recipe, predict_logits, train
from skin_lesion.training.models import VIEWS, Classifier, load_pretrained

SIZE, EPOCHS, NAEVI = 64, 4, 1000
BASE = {"learning_rate": 1e-3, "ema_decay": 0.99}
KNOBS = {  # what differs from the base
    "another seed, nothing else": {"seed": 2},
    "mix = mixup": {"mix": "mixup"},
    "mix = cutmix": {"mix": "cutmix"},
    "layer_decay = 0.9": {"layer_decay": 0.9},
    "imbalance = focal": {"imbalance": "focal"},
    "imbalance = class_balanced": {"imbalance": "class_balanced"},
    "imbalance = ldam_drw": {"imbalance": "ldam_drw"},
    "no augmentation": {},
    "twice the augmentation": {},
    "ema_decay = 0": {"ema_decay": 0.0},
}
STRENGTHS = {"no augmentation": 0.0, "twice the augmentation": 2.0}
CPU = torch.device("cpu")


class Turned(torch.nn.Module):
    """What the served graph averages, without making the graph."""

    def __init__(self, model, views):
        super().__init__()
        self.model, self.views = model, VIEWS[:views]

    def forward(self, images):
        return torch.stack([self.model((images.transpose(1, 2) if t else images).flip(m)) for t, m in self.views]).mean(
            0
        )


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_what_the_knobs_of_the_recipe_do_in_a_short_training(shared_data, tmp_path, monkeypatch):
    """One fold by lesion, trainings that differ in nothing else, intervals of the paired difference over lesions."""
    folder = shared_data / "ham10000"
    table, _ = read_dataset("ham10000", folder)
    held = lesion_folds(table, np.zeros((0, 2), np.int64)) == 0
    learned = table[~held]
    naevi = learned[learned.diagnosis == "NV"].sample(NAEVI, random_state=1)
    learned = learned[(learned.diagnosis != "NV") | learned.index.isin(naevi.index)]
    packed = pack_images(table, folder, SIZE, tmp_path / "work")
    parts = {"train": learned, "held": table[held]}
    training, validation = (Shards(write_shards(rows, packed, tmp_path / part)) for part, rows in parts.items())
    assert not set(training.rows.lesion_id) & set(validation.rows.lesion_id)
    classes, lesions = training.classes, validation.rows.lesion_id.to_numpy(str)
    y = np.array([classes.index(d) for d in validation.rows.diagnosis])
    counts = np.bincount([classes.index(d) for d in training.rows.diagnosis])

    def answers(name, options, views=1):
        monkeypatch.setattr(loop, "draw", lambda *a, drawn=loop_draw: STRENGTHS.get(name, 1.0) * drawn(*a))
        torch.manual_seed(1)
        model = load_pretrained(Classifier("efficientnet_lite0", len(classes)), "efficientnet_lite0")
        recipe = Recipe(EPOCHS, 32, **BASE | options)
        train(model, training, validation, classes, recipe, tmp_path / name, CPU)
        shares = torch.tensor(counts / counts.sum(), dtype=torch.float32)
        weights = loop.class_weights(shares, len(training), recipe.imbalance)
        prior = loop.learned_shares(shares, weights, recipe.imbalance).numpy()
        made = [predict_logits(Turned(model, n), validation, CPU, torch.float32) for n in (1, views)[: 1 + (views > 1)]]
        return [np.exp(z - z.max(1, keepdims=True)) / prior for z in made]

    loop_draw = loop.draw
    base, eight = answers("base", {}, views=8)
    found = {}

    def note(name, p):
        p = p / p.sum(1, keepdims=True)
        scores = score(p, y, lesions, tuple(classes), p, 1000, 0.95, 2)
        difference = paired_difference(p, base / base.sum(1, keepdims=True), y, lesions, 1000)
        found[name] = {
            what: [round(interval[end], 3) for end in ("value", "low", "high")]
            for what, interval in {
                "balanced_accuracy": scores["balanced_accuracy"],
                "melanoma_sensitivity": scores["per_class"][MELANOMA]["sensitivity"],
                "difference": difference,
            }.items()
        }
        about = {"pixels": SIZE, "epochs": EPOCHS, "images": len(training), "held": len(validation)}
        keep("recipe", about | {"lesions_held": len(set(lesions)), "rows": found})

    note("base", base)
    note("views = 8", eight)
    for name, options in KNOBS.items():
        note(name, answers(name, options)[0])
    # what would make the comparison void: a base that learns nothing
    assert found["base"]["balanced_accuracy"][1] > 1.5 / len(classes)
