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
from skin_lesion.training.imbalance import class_shares
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


class Pictures:
    """One fold by lesion to judge, the other four to learn from, with fewer naevi."""

    def __init__(self, shared_data, work):
        folder = shared_data / "ham10000"
        table, _ = read_dataset("ham10000", folder)
        held = lesion_folds(table, np.zeros((0, 2), np.int64)) == 0
        learned = table[~held]
        naevi = learned[learned.diagnosis == "NV"].sample(NAEVI, random_state=1)
        learned = learned[(learned.diagnosis != "NV") | learned.index.isin(naevi.index)]
        packed = pack_images(table, folder, SIZE, work / "work")
        parts = {"train": learned, "held": table[held]}
        self.training, self.held = (Shards(write_shards(rows, packed, work / part)) for part, rows in parts.items())
        assert not set(self.training.rows.lesion_id) & set(self.held.rows.lesion_id)
        self.classes, self.lesions = self.training.classes, self.held.rows.lesion_id.to_numpy(str)
        self.y, learned = (
            np.array([self.classes.index(d) for d in part.rows.diagnosis]) for part in (self.held, self.training)
        )
        self.shares = torch.tensor(class_shares(learned, self.classes), dtype=torch.float32)

    def answers(self, folder, options, views=1, new_head=False):
        """Probabilities of the held pictures for equal classes, in one view and, if asked, in the mean of several."""
        recipe = Recipe(EPOCHS, 32, **BASE | options)
        torch.manual_seed(recipe.seed)
        model = load_pretrained(Classifier("efficientnet_lite0", len(self.classes)), "efficientnet_lite0")
        train(model, self.training, self.held, self.classes, recipe, folder, CPU, new_head=new_head)
        weights = loop.class_weights(self.shares, len(self.training), recipe.imbalance)
        prior = loop.learned_shares(self.shares, weights, recipe.imbalance).numpy()
        made = [predict_logits(Turned(model, n), self.held, CPU, torch.float32) for n in {1: 0, views: 0}]
        p = [np.exp(z - z.max(1, keepdims=True)) / prior for z in made]
        return [x / x.sum(1, keepdims=True) for x in p]

    def figures(self, p, base):
        """Balanced accuracy, melanoma sensitivity, and the difference to the base."""
        scores = score(p, self.y, self.lesions, tuple(self.classes), p, 1000, 0.95, 2)
        found = {"balanced_accuracy": scores["balanced_accuracy"]}
        found |= {"melanoma_sensitivity": scores["per_class"][MELANOMA]["sensitivity"]}
        found |= {"difference": paired_difference(p, base, self.y, self.lesions, 1000)}
        return {what: [round(interval[end], 3) for end in ("value", "low", "high")] for what, interval in found.items()}

    def keep(self, name, rows):
        """Writes the rows, and what they were made of."""
        about = {"pixels": SIZE, "epochs": EPOCHS, "images": len(self.training), "held": len(self.held)}
        keep(name, about | {"lesions_held": len(set(self.lesions)), "rows": rows})


@pytest.fixture(scope="module")
def pictures(shared_data, tmp_path_factory):
    return Pictures(shared_data, tmp_path_factory.mktemp("pictures"))


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_what_the_knobs_of_the_recipe_do_in_a_short_training(pictures, tmp_path, monkeypatch):
    """Trainings that differ in nothing else, intervals of the paired difference over lesions."""
    drawn = loop.draw
    base, eight = pictures.answers(tmp_path / "base", {}, views=8)
    found = {"base": pictures.figures(base, base), "views = 8": pictures.figures(eight, base)}
    for name, options in KNOBS.items():
        strength = STRENGTHS.get(name, 1.0)
        monkeypatch.setattr(loop, "draw", lambda *a, strength=strength: strength * drawn(*a))
        found[name] = pictures.figures(pictures.answers(tmp_path / name, options)[0], base)
        pictures.keep("recipe", found)
    # what would make the comparison void: a base that learns nothing
    assert found["base"]["balanced_accuracy"][1] > 1.5 / len(pictures.classes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_head_that_is_fitted_first_is_worth_passes(pictures, tmp_path):
    """Three seeds, each with the new layer drawn at random and fitted; nothing else differs."""
    found = {}
    for seed in (1, 2, 3):
        drawn = pictures.answers(tmp_path / f"drawn{seed}", {"seed": seed})[0]
        fitted = pictures.answers(tmp_path / f"fitted{seed}", {"seed": seed}, new_head=True)[0]
        found |= {f"drawn, seed {seed}": pictures.figures(drawn, drawn)}
        found |= {f"fitted, seed {seed}": pictures.figures(fitted, drawn)}
        pictures.keep("head", found)
    assert all(found[f"fitted, seed {seed}"]["difference"][1] > 0 for seed in (1, 2, 3)), "surely better, in each seed"
