"""Two notebooks as SageMaker notebook jobs, each month: the monitor's report and the retraining, the same `60_monitor` and
`70_retrain` that papermill runs anywhere.

`NotebookJobStep` uploads while it compiles, to an address with the time in it. Here the address has the notebook's content in
it instead, and `skin_lesion.cloud.notebook_jobs` uploads: so compiling needs no network and gives equal bytes. A notebook job's
parameters are all texts. `retrain` speaks to SageMaker and is not isolated; `monitor` reads channels, as a training job
does, and is. The image must hold `sagemaker-headless-execution-driver`, which starts papermill."""

import hashlib
import re
from pathlib import Path

from sagemaker.mlops.workflow.notebook_job_step import NotebookJobStep
from sagemaker.mlops.workflow.pipeline import Pipeline

from skin_lesion.settings import as_variables, project_file

from .training import wiring

SECTIONS = ("data", "gate", "serving", "retrain", "aws")
MONITOR = tuple(f"monitoring.{n}" for n in ("window_hours", "false_alarm_rate", "effect_floor", "need", "of"))
NOT_ITS = ("aws.retrain_role_arn", "aws.schedule_role_arn")


class UploadedNotebook(NotebookJobStep):
    """A notebook job whose input lies at an address made of its content, and is put there by somebody else; `channels`, name to
    address, are more inputs. A job with these needs no network and gets none."""

    channels: dict = {}

    def _upload_job_files(self, s3_base_uri, paths_to_upload, kms_key, sagemaker_session):
        pass

    @property
    def arguments(self):
        request = super().arguments
        mark = hashlib.sha256(Path(self.input_notebook).read_bytes()).hexdigest()[:16]
        source = request["InputDataConfig"][0]["DataSource"]["S3DataSource"]
        source["S3Uri"] = re.sub(r"/input-[^/]+$", f"/input-{mark}", source["S3Uri"])
        for name, address in self.channels.items():
            data = {"S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated", "S3Uri": address}
            request["InputDataConfig"].append({"ChannelName": name, "DataSource": {"S3DataSource": data}})
        return request | ({"EnableNetworkIsolation": True} if self.channels else {})


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-notebook-jobs` with the defaults of `settings` (section.key to `Setting`)."""
    wired = wiring(settings)
    aws = wired.aws
    environment = as_variables({n: s for n, s in settings.items() if n.split(".")[0] in SECTIONS and n not in NOT_ITS})
    bucket, endpoint = aws["bucket"], settings["serving.endpoint"].value
    common = dict(
        image_uri=aws["image_uri"],
        kernel_name="python3",
        s3_kms_key=aws["kms_key"],
        instance_type=aws["processing_instance"],
        volume_size=aws["volume_size"],
        volume_kms_key=wired.volume_key["processing_instance"],
        subnets=aws["subnets"].split(","),
        security_group_ids=aws["security_groups"].split(","),
        tags=wired.tags,
    )
    monitor = UploadedNotebook(
        name="monitor",
        notebook_job_name="skin-lesion-monitor",
        input_notebook=str(project_file("nbs", "steps", "60_monitor.ipynb")),
        role=aws["monitor_role_arn"],
        s3_root_uri=f"s3://{bucket}/runs/notebook-jobs",  # where this role may read and write
        parameters={"endpoint": endpoint}
        | {n.split(".")[1]: str(s.value) for n, s in settings.items() if n in MONITOR},
        environment_variables={
            "monitor_inputs": "/opt/ml/input/data",
            "dataset_source": "/opt/ml/input/data/capture",
            "output_path": "/opt/ml/output/data/monitor",
        },
        **common,
    )
    monitor.channels = {
        "capture": wired.captures,
        "package": f"s3://{bucket}/champion/{aws['model_package_group']}/model.tar.gz",
        "labels": f"s3://{bucket}/labels/{endpoint}",
        "history": f"s3://{bucket}/monitoring/{endpoint}",
    }
    retrain = UploadedNotebook(
        name="retrain",
        notebook_job_name="skin-lesion-retrain",
        input_notebook=str(project_file("nbs", "steps", "70_retrain.ipynb")),
        role=aws["retrain_role_arn"],
        s3_root_uri=f"s3://{bucket}/notebook-jobs",
        parameters={"event": '{"kind": "schedule", "text": "the monthly retraining"}', "place": "sagemaker"},
        environment_variables=environment,
        **common,
    )
    return Pipeline(
        name="skin-lesion-notebook-jobs",
        parameters=[],
        pipeline_experiment_config=None,
        steps=[monitor, retrain],
        sagemaker_session=wired.session,
    )
