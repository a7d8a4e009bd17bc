"""Puts the figures of a finished monitoring run into CloudWatch, and what it decided to where the next run reads it: the run's
own job has no network to do so, and each writes to a place of its own."""

import json
import os

import boto3


def handler(event, context):
    bucket, key = event["detail"]["bucket"]["name"], event["detail"]["object"]["key"]
    s3, folder = boto3.client("s3"), key.rsplit("/", 1)[0]
    text = s3.get_object(Bucket=bucket, Key=f"{folder}/metrics.jsonl")["Body"].read()
    lines = [json.loads(line) for line in text.decode().splitlines()]
    for line in lines:  # the alarms know the endpoint only
        line["Dimensions"] = [d for d in line["Dimensions"] if d["Name"] == "Endpoint"]
    for start in range(0, len(lines), 1000):  # as many as one call takes
        data = lines[start : start + 1000]
        boto3.client("cloudwatch").put_metric_data(Namespace=os.environ["METRICS_NAMESPACE"], MetricData=data)
    found = s3.get_object(Bucket=bucket, Key=f"{folder}/drift.json")
    drift = json.load(found["Body"])
    windows = [{name: window[name] for name in ("start", "end", "alarm")} for window in drift["windows"]]
    # named by the time, so that of two decisions on a window the later one counts
    history = f"monitoring/{drift['endpoint']}/{found['LastModified']:%Y%m%dT%H%M%S}-{key.split('/')[1]}.json"
    kept = {"version": drift["version"], "windows": windows}
    s3.put_object(Bucket=bucket, Key=history, Body=json.dumps(kept).encode())
    return {"published": len(lines), "history": history}
