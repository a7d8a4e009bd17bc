"""Starts the pipeline of a stage of the retraining."""

from skin_lesion.cloud.retraining import start_stage
from skin_lesion.settings import load_settings


def handler(event, context):
    return start_stage(event["id"], event["now"]["stage"], event["now"].get("training"), load_settings())
