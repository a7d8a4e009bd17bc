"""Two hosts' worth of processes on loopback: SageMaker's own files, the real step in a root each, gloo between them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import prove_split, split_table
from skin_lesion.training.loop import Recipe, predict_logits, train
from skin_lesion.training.models import Classifier

HOSTS = ["algo-1", "algo-2"]
ARCHITECTURE, EPOCHS = "test_efficientnet", 8  # with BatchNorm and dropout, as the named ones have
RECIPE = Recipe(
    EPOCHS,
    16,
    learning_rate=1e-4,
    optimizer="sgd",
    warmup_epochs=0,
    layer_decay=0.9,
    imbalance="weighting",
    mix="mixup",
    ema_decay=0.5,
)
# Sums over two processes round otherwise than the sum over one. After 40 updates that makes up to 3e-5 in a loss and 2e-4
# in a logit of up to 5.5; BatchNorm that saw only its own process's pictures would make 1 and 5. Training amplifies any
# difference, here tenfold every few epochs at ten times this learning rate, so the bound belongs to this recipe.
LOSS_TOLERANCE, LOGIT_TOLERANCE = 1e-3, 5e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The channels of a training job."""
    folder = tmp_path_factory.mktemp("data")
    sample = write_sample(folder / "sample", lesions=60, seed=1)
    table, _ = read_dataset("sample", sample)
    packed = pack_images(table, sample, 32, folder / "work")
    pairs = near_duplicates(packed.fingerprints)
    table = split_table(table, pairs, 0.2, 0.2, 1)
    channels = folder / "channels"
    for part in ("train", "validation"):
        write_shards(table[table.split == part], packed, channels / part)
    (channels / "table").mkdir()
    (channels / "table" / "split_proof.json").write_text(json.dumps(prove_split(table, pairs)))
    return channels


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The network that one process trains, and its history."""
    parts = [Shards(data / part) for part in ("train", "validation")]
    torch.manual_seed(RECIPE.seed)
    model = Classifier(ARCHITECTURE, 7)
    return model, train(model, *parts, parts[0].classes, RECIPE, tmp_path_factory.mktemp("alone"), torch.device("cpu"))


def address():
    """A free port, which stands for the first host's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def hold_to_one_process(data, alone, network, written):
    model, history = alone
    for loss in ("train_loss", "validation_loss"):
        assert np.abs(written[loss] - history[loss]).max() < LOSS_TOLERANCE
    held, cpu = Shards(data / "validation"), torch.device("cpu")
    one, two = (predict_logits(n, held, cpu, torch.float32) for n in (model, network))
    assert np.abs(one - two).max() < LOGIT_TOLERANCE


HOST = """
import sys
from pathlib import Path
from skin_lesion.training.distributed import launch
from skin_lesion.training.loop import Recipe
data, checkpoints, host, hosts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
launch((ARCHITECTURE, False, data / "train", data / "validation", RECIPE, checkpoints, 1, "auto"), 1, host, hosts, "lo")
"""


def test_two_hosts_train_what_one_process_trains(data, alone, tmp_path):
    script = HOST.replace("ARCHITECTURE", repr(ARCHITECTURE)).replace("RECIPE", repr(RECIPE))
    env = os.environ | {"SKIN_LESION_RENDEZVOUS": address(), "OMP_NUM_THREADS": "1"}
    hosts = [
        subprocess.Popen([sys.executable, "-c", script, str(data), str(tmp_path / host), host, *HOSTS], env=env)
        for host in HOSTS
    ]
    assert [p.wait(250) for p in hosts] == [0, 0]
    parts, network = [Shards(data / part) for part in ("train", "validation")], Classifier(ARCHITECTURE, 7)
    history = train(network, *parts, parts[0].classes, RECIPE, tmp_path / HOSTS[0], torch.device("cpu"))
    hold_to_one_process(data, alone, network, history)


class Job:
    """A training job, each of its hosts with a root of its own."""

    def __init__(self, folder, data, hosts=HOSTS, **hyperparameters):
        self.roots = {host: folder / host for host in hosts}
        given = vars(RECIPE) | {"architecture": ARCHITECTURE, "pretrained": "false"} | hyperparameters
        for host, root in self.roots.items():
            config = root / "input" / "config"
            config.mkdir(parents=True)
            (root / "input" / "data").symlink_to(data)
            resources = {"current_host": host, "hosts": hosts, "network_interface_name": "lo"}
            (config / "resourceconfig.json").write_text(json.dumps(resources))
            (config / "hyperparameters.json").write_text(json.dumps({k: str(v) for k, v in given.items()}))

    def start(self) -> dict[str, subprocess.Popen]:
        env = os.environ | {"SKIN_LESION_RENDEZVOUS": address(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "skin_lesion.execution.step", "train"]
        return {
            host: subprocess.Popen(
                command,
                env=env | {"SKIN_LESION_ROOT": str(root)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for host, root in self.roots.items()
        }

    def checkpoint(self, host):
        kept = self.roots[host] if host == HOSTS[0] else self.roots[host] / "scratch"
        return kept / "checkpoints" / "last.pt"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_in_an_epoch_and_in_the_export_ends_the_step_at_once_and_nothing_is_lost(data, tmp_path):
    """SageMaker kills a spot job 120 s after SIGTERM; the step ends in far less, and starts again at the epoch it was in."""
    job, epochs = Job(tmp_path, data, HOSTS[:1]), []
    root = job.roots[HOSTS[0]]
    for said, written in (("epoch=0 ", "checkpoints"), ("folder = kept", "model/model.safetensors")):
        process = job.start()[HOSTS[0]]
        output = ""
        while said not in output:
            output += process.stdout.readline()
            assert process.poll() is None, output
        while not (root / written).exists():  # in the export the weights are written, and the graph is being made
            assert process.poll() is None
        told = time.monotonic()
        process.terminate()
        output += process.communicate(timeout=110)[0]
        print(f"told to stop at {said!r}: ended after {time.monotonic() - told:.1f} s")
        assert time.monotonic() - told < 60 and process.returncode == 128 + signal.SIGTERM, output
        assert not (root / "model/model.json").exists()
        epochs.append(torch.load(job.checkpoint(HOSTS[0]), weights_only=True)["epoch"])
    assert 0 < epochs[0] < epochs[1] == EPOCHS and f"resumed at epoch {epochs[0]}, batch" in output
    process = job.start()[HOSTS[0]]
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0 and f"resumed at epoch {EPOCHS}" in output, output
    assert "train_loss=" not in output and (root / "model/model.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_stop_together_go_on_and_end_as_one_process_does(data, alone, tmp_path):
    job = Job(tmp_path, data)
    hosts = job.start()
    while not job.checkpoint("algo-1").exists():
        assert all(p.poll() is None for p in hosts.values()), [p.communicate()[0][-2000:] for p in hosts.values()]
        time.sleep(0.01)
    hosts["algo-2"].terminate()
    outputs = {host: hosts[host].communicate(timeout=120)[0] for host in reversed(HOSTS)}
    assert hosts["algo-2"].returncode == 128 + signal.SIGTERM and hosts["algo-1"].returncode == 1, outputs
    assert "Stopped: " in (job.roots["algo-1"] / "output/failure").read_text()
    first, second = (torch.load(job.checkpoint(host), weights_only=True) for host in HOSTS)
    assert (first["epoch"], first["done"]) == (second["epoch"], second["done"]) and first["epoch"] < EPOCHS
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])

    shutil.rmtree(job.roots["algo-2"] / "scratch")  # SageMaker starts anew, with what was in the checkpoint folder
    hosts = job.start()
    outputs = {host: p.communicate(timeout=500)[0] for host, p in hosts.items()}
    assert [p.returncode for p in hosts.values()] == [0, 0], outputs
    assert f"resumed at epoch {first['epoch']}, batch {first['done']} of" in outputs["algo-1"]
    assert outputs["algo-1"].count("validation_balanced_accuracy=") == EPOCHS - first["epoch"], "one process speaks"
    assert "algo-1 writes the model" in outputs["algo-2"] and not any((job.roots["algo-2"] / "model").glob("*"))

    trained = Classifier(ARCHITECTURE, 7)
    trained.net.load_state_dict(load_file(job.roots["algo-1"] / "model" / "model.safetensors"))
    hold_to_one_process(data, alone, trained, pd.read_csv(job.roots["algo-1"] / "model" / "history.csv"))
