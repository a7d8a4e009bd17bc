"""The search: prepare, then a tuning job over the space of section `search`, judged on validation. Nothing is registered.

A tuning job has no argument for the container's command. SageMaker starts the image with the word `train`, so the image's
own entrypoint must be `skin-lesion step`."""

from sagemaker.core.parameter import CategoricalParameter, ContinuousParameter
from sagemaker.mlops.workflow.pipeline import Pipeline
from sagemaker.mlops.workflow.steps import TuningStep
from sagemaker.train.tuner import HyperparameterTuner

from skin_lesion.training.space import read_space

from .training import JOB, METRICS, NUMBER, wiring

SCALES = {"log": "Logarithmic", "linear": "Linear"}


class ClosedTuningStep(TuningStep):
    """A tuning step with what the SDK's tuner leaves out of its training jobs: role, keys and isolation."""

    def __init__(self, name, step_args, role, volume_key, **options):
        super().__init__(name, step_args, **options)
        self.role, self.volume_key = role, volume_key

    @property
    def arguments(self):
        request = super().arguments
        job = request["TrainingJobDefinition"]
        job |= {"RoleArn": self.role, "EnableNetworkIsolation": True, "EnableInterContainerTrafficEncryption": True}
        if self.volume_key:
            job["ResourceConfig"]["VolumeKmsKeyId"] = self.volume_key
        return request


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-search`. Space and limits are settled here; the settings that are not searched are
    parameters."""
    wired, space = wiring(settings), read_space(settings)
    tuned = {f"train.{name}" for name in space}
    parameter = {
        name: p for name, p in wired.parameter.items() if name.split(".")[0] in ("data", "train") and name not in tuned
    }
    ranges = {
        name: CategoricalParameter(list(found.values))
        if found.scale == "one of"
        else ContinuousParameter(*found.values, scaling_type=SCALES[found.scale])
        for name, found in space.items()
    }
    *decode, prepare = wired.prepare()
    tuner = HyperparameterTuner(
        # Not on spot machines: the jobs of a tuning job have one checkpoint address, and training refuses a checkpoint
        # of other settings.
        model_trainer=wired.trainer("tune", wired.section("train"), spot=False),
        objective_metric_name="chosen_balanced_accuracy",
        hyperparameter_ranges=ranges,
        metric_definitions=[{"Name": metric, "Regex": f"{metric}={NUMBER}"} for metric in METRICS],
        max_jobs=settings["search.trials"].value,
        max_parallel_jobs=settings["search.parallel"].value,
        tags=wired.tags,
        random_seed=settings["train.seed"].value,
    )
    tune = ClosedTuningStep(
        "tune", tuner.tune(wired.channels(prepare)), wired.role, wired.volume_key["training_instance"], **JOB
    )
    return Pipeline(
        name="skin-lesion-search",
        parameters=[
            *parameter.values(),
            *(place for place in wired.places if place.name not in ("ChampionData", "UnknownData")),
        ],
        pipeline_experiment_config=None,
        steps=[*decode, prepare, tune],
        sagemaker_session=wired.session,
    )
