"""The challenger and the champion on the newest labelled window: one step, which the state machine of retraining starts.

Its figures are read by the function that decides. Nothing is cached: the window is another one each time."""

from sagemaker.core.workflow.parameters import ParameterString
from sagemaker.mlops.workflow.pipeline import Pipeline

from .training import wiring


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-window` with the defaults of `settings` (section.key to `Setting`)."""
    wired = wiring(settings, "monitor_role_arn")
    bucket = wired.aws["bucket"]
    challenger = ParameterString("ChallengerData", f"s3://{bucket}/challenger")
    captures = ParameterString("CaptureData", wired.captures)
    labels = ParameterString("LabelsData", f"s3://{bucket}/labels/{settings['serving.endpoint'].value}")
    inputs = {"challenger": challenger, "champion": wired.champion, "captures": captures, "labels": labels}
    window = wired.processing("window", inputs, ["comparison"], {}, hours=2, cache_config=None)
    used = ("ChampionData", "ImageUri", "RoleArn", "ProcessingInstance")
    return Pipeline(
        name="skin-lesion-window",
        parameters=[challenger, captures, labels, *(p for p in wired.places if p.name in used)],
        pipeline_experiment_config=None,
        steps=[window],
        sagemaker_session=wired.session,
    )
