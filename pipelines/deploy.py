"""The deployment: one step, which lets the newest approved version answer and makes it the endpoint.

The job calls SageMaker and S3, so it is not isolated: it lies in the private network of all jobs, which leads to AWS's own
endpoints and nowhere else. It is never taken from the cache, because the account may have changed."""

from sagemaker.core.workflow.parameters import ParameterString
from sagemaker.mlops.workflow.pipeline import Pipeline

from skin_lesion.settings import as_variables

from .training import wiring

NOT_ITS = ("aws.budget", "aws.retrain_role_arn", "aws.schedule_role_arn")


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-deploy`. The settings of serving and of the account are settled here; the job gets them as
    the variables that override settings.ini anywhere."""
    wired = wiring(settings, "deploy_role_arn")
    place = ParameterString("DeployPlace", "sagemaker", enum_values=["local", "sagemaker"])
    environment = as_variables(
        {n: s for n, s in settings.items() if n.split(".")[0] in ("serving", "aws") and n not in NOT_ITS}
    )
    deploy = wired.processing(
        "deploy",
        {"champion": wired.champion},
        ["deployment"],
        {"place": place},
        hours=6,
        isolated=False,
        environment=environment,
        cache_config=None,
    )
    used = ("ChampionData", "ImageUri", "RoleArn", "ProcessingInstance")
    return Pipeline(
        name="skin-lesion-deploy",
        parameters=[place, *(p for p in wired.places if p.name in used)],
        pipeline_experiment_config=None,
        steps=[deploy],
        sagemaker_session=wired.session,
    )
