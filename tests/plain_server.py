"""The endpoint as one would write it in an afternoon: FastAPI under uvicorn, with PyTorch or with ONNX Runtime."""

import subprocess
import sys

PLAIN = """
import io, json, sys
import numpy as np
from fastapi import FastAPI, Request
from PIL import Image
{load}
app = FastAPI()

@app.post("/invocations")
async def invocations(request: Request):
    image = Image.open(io.BytesIO(await request.body())).convert("RGB").resize(({size}, {size}), Image.BILINEAR)
    logits = run(np.asarray(image)[None])
    e = np.exp(logits - logits.max())
    return {{"probabilities": (e / e.sum()).ravel().tolist()}}
"""
EAGER = """
import torch
from safetensors.torch import load_file
from skin_lesion.training.models import Classifier
model = Classifier("efficientnet_lite0", {classes}).eval()
model.net.load_state_dict(load_file("{folder}/model.safetensors"))
def run(images):
    with torch.no_grad(): return model(torch.from_numpy(images.copy())).numpy()
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession("{folder}/model.onnx")
def run(images): return session.run(["logits"], {{"images": images}})[0]
"""


class Plain:
    """One of the two afternoon servers, under uvicorn."""

    def __init__(self, folder, name, load, package, classes, size):
        load = load.format(folder=package, classes=classes)
        (folder / f"{name}.py").write_text(PLAIN.format(load=load, size=size))
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            f"{name}:app",
            "--port",
            "0",
            "--log-level",
            "info",
            "--no-access-log",
        ]
        self.process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if "running on" in line:
                self.address = line.split("http://")[1].split()[0]
                return
        raise AssertionError(f"{name} did not start")
