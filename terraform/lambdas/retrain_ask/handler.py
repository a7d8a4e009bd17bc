"""Starts a retraining by hand: API Gateway's route, authorised by IAM."""

import os

from skin_lesion.cloud.retraining import ask_by_hand


def handler(event, context):
    return ask_by_hand(event, os.environ["STATE_MACHINE_ARN"])
