"""Compares the challenger with the champion, and approves or rejects it."""

from skin_lesion.cloud.retraining import decide
from skin_lesion.settings import load_settings


def handler(event, context):
    now, run = event["now"], event["run"]  # the last stage, and the ARN of its execution
    window = run if now["stage"] == "window" else None
    return decide(event["id"], now.get("training", run), window, load_settings())
