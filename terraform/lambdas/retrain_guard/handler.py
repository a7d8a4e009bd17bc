"""Asks the guards whether an event starts a retraining."""

from skin_lesion.cloud.retraining import guard
from skin_lesion.settings import load_settings


def handler(event, context):
    return guard(event["id"], event["event"], load_settings())
