"""Puts a failed retraining on the record."""

from skin_lesion.cloud.retraining import failed
from skin_lesion.settings import load_settings


def handler(event, context):
    return failed(event["id"], event.get("arn"), event.get("error"), load_settings())
