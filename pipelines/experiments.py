"""The experiments: one split, a training, an evaluation and a package for each architecture, and one table of them all."""

import re

from sagemaker.core.workflow.parameters import ParameterString
from sagemaker.mlops.workflow.pipeline import Pipeline

from .training import wiring

MAX_NETWORKS = 16  # three steps each, beside `prepare` and `compare`: SageMaker takes 50 steps


def step_suffix(architecture):
    """What the name of a step may hold: letters, digits and inner hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", architecture).strip("-")


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-experiments`. The list of architectures is settled here, because each makes steps; its
    parameter allows no other value, so that nobody starts this definition for another list."""
    listed = settings["experiments.architectures"].value
    architectures = [name.strip() for name in listed.split(",") if name.strip()]
    names = {step_suffix(architecture): architecture for architecture in architectures}
    if not architectures or len(names) < len(architectures) or len(names) > MAX_NETWORKS:
        raise ValueError(
            f"experiments.architectures = {listed!r} must name 1 to {MAX_NETWORKS} architectures, each once, with a comma "
            "between two. A pipeline of SageMaker has 50 steps at most: compare more in two runs."
        )
    wired = wiring(settings)
    parameter = {name: p for name, p in wired.parameter.items() if name != "train.architecture"}
    list_parameter = ParameterString("ExperimentsArchitectures", listed, enum_values=[listed])

    *decode, prepare = wired.prepare()
    # A Processing job takes ten inputs, so all packages lie in one folder of the execution, which is one input. What an
    # earlier execution has packed lies in that one's folder: packing, which takes seconds, is never taken from a cache.
    steps, packages = [*decode, prepare], []
    for suffix, architecture in names.items():
        train = wired.train(prepare, f"train-{suffix}", architecture=architecture)
        model = train.properties.ModelArtifacts.S3ModelArtifacts
        evaluate = wired.evaluate(prepare, model, f"evaluate-{suffix}")
        place = {"package": wired.run_uri("packages", suffix)}
        package = wired.package(model, evaluate, f"package-{suffix}", places=place, cache_config=None)
        packages.append(package)
        steps += [train, evaluate, package]
    compare = wired.processing(
        "compare",
        {"packages": wired.run_uri("packages")},
        ["experiments"],
        {"architectures": list_parameter},
        hours=1,
        depends_on=packages,
    )

    return Pipeline(
        name="skin-lesion-experiments",
        parameters=[*parameter.values(), list_parameter, *wired.places],
        pipeline_experiment_config=None,
        steps=[*steps, compare],
        sagemaker_session=wired.session,
    )
