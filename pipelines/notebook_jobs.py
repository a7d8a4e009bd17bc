"""The retraining notebook as a SageMaker notebook job, each month: the same `70_retrain` that papermill runs anywhere.

`NotebookJobStep` uploads while it compiles, to an address with the time in it. Here the address has the notebook's content in
it instead, and `skin_lesion.cloud.notebook_jobs` uploads: so compiling needs no network and gives equal bytes. A notebook job's
parameters are all texts, so only those are given. The job speaks to SageMaker and is not isolated. Its image must hold
`sagemaker-headless-execution-driver`, which starts papermill."""

import hashlib
import re
from pathlib import Path

from sagemaker.mlops.workflow.notebook_job_step import NotebookJobStep
from sagemaker.mlops.workflow.pipeline import Pipeline

from skin_lesion.settings import as_variables, project_file

from .training import wiring

SECTIONS = ("data", "gate", "serving", "retrain", "aws")
NOT_ITS = ("aws.budget", "aws.retrain_role_arn", "aws.schedule_role_arn")


class UploadedNotebook(NotebookJobStep):
    """A notebook job whose input lies at an address made of its content, and is put there by somebody else."""

    def _upload_job_files(self, s3_base_uri, paths_to_upload, kms_key, sagemaker_session):
        pass

    @property
    def arguments(self):
        request = super().arguments
        mark = hashlib.sha256(Path(self.input_notebook).read_bytes()).hexdigest()[:16]
        source = request["InputDataConfig"][0]["DataSource"]["S3DataSource"]
        source["S3Uri"] = re.sub(r"/input-[^/]+$", f"/input-{mark}", source["S3Uri"])
        return request


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-notebook-jobs` with the defaults of `settings` (section.key to `Setting`)."""
    wired = wiring(settings)
    aws = wired.aws
    environment = as_variables({n: s for n, s in settings.items() if n.split(".")[0] in SECTIONS and n not in NOT_ITS})
    retrain = UploadedNotebook(
        name="retrain",
        notebook_job_name="skin-lesion-retrain",
        input_notebook=str(project_file("nbs", "steps", "70_retrain.ipynb")),
        image_uri=aws["image_uri"],
        kernel_name="python3",
        role=aws["retrain_role_arn"],
        s3_root_uri=f"s3://{aws['bucket']}/notebook-jobs",
        parameters={"event": '{"kind": "schedule", "text": "the monthly retraining"}', "place": "sagemaker"},
        environment_variables=environment,
        s3_kms_key=aws["kms_key"],
        instance_type=aws["processing_instance"],
        volume_size=aws["volume_size"],
        volume_kms_key=wired.volume_key["processing_instance"],
        subnets=aws["subnets"].split(","),
        security_group_ids=aws["security_groups"].split(","),
        tags=wired.tags,
    )
    return Pipeline(
        name="skin-lesion-notebook-jobs",
        parameters=[],
        pipeline_experiment_config=None,
        steps=[retrain],
        sagemaker_session=wired.session,
    )
