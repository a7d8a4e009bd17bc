"""The monitoring pipeline: one step, which compares captured requests with the reference in the package that answered them.

SageMaker refuses an input address under which nothing lies: where there are no labels or no history yet, an empty object
such as `labels/.keep` stands in. The step is never answered from the cache, whose key knows addresses and not what lies
there."""

from sagemaker.core.workflow.parameters import ParameterString
from sagemaker.mlops.workflow.pipeline import Pipeline

from skin_lesion.settings import pipeline_settings

from .training import setting_parameter, wiring


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-monitoring` with the defaults of `settings` (section.key to `Setting`)."""
    wired = wiring(settings, "monitor_role_arn")
    bucket, endpoint = wired.aws["bucket"], settings["serving.endpoint"].value
    parameter = {
        name.removeprefix("monitoring."): setting_parameter(name, s.value)
        for name, s in pipeline_settings(settings).items()
        if name.startswith("monitoring.")
    }
    inputs = {
        "capture": ParameterString("CaptureData", wired.captures),
        "package": ParameterString(
            "PackageData", f"s3://{bucket}/champion/{wired.aws['model_package_group']}/model.tar.gz"
        ),
        "labels": ParameterString("LabelsData", f"s3://{bucket}/labels/{endpoint}"),
        "history": ParameterString("HistoryData", f"s3://{bucket}/monitoring/{endpoint}"),
    }
    asked = {
        "endpoint": ParameterString("EndpointName", endpoint),
        "since": ParameterString("Since", "first"),
        "until": ParameterString("Until", "now"),
    }
    options = {name: p.to_string() for name, p in parameter.items()}
    monitor = wired.processing("monitor", inputs, ["monitor"], asked | options, hours=4, cache_config=None)
    places = [p for p in wired.places if p.name in ("ImageUri", "RoleArn", "ProcessingInstance")]
    return Pipeline(
        name="skin-lesion-monitoring",
        parameters=[*parameter.values(), *inputs.values(), *asked.values(), *places],
        pipeline_experiment_config=None,
        steps=[monitor],
        sagemaker_session=wired.session,
    )
