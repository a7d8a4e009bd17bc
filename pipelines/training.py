"""The training pipeline: prepare, train, evaluate, gate, then register or fail. It only wires; the steps are nbs/steps."""

from types import SimpleNamespace

from sagemaker.core.drift_check_baselines import DriftCheckBaselines
from sagemaker.core.model_metrics import MetricsSource, ModelMetrics
from sagemaker.core.network import NetworkConfig
from sagemaker.core.processing import Processor
from sagemaker.core.shapes import (
    CheckpointConfig,
    OutputDataConfig,
    ProcessingInput,
    ProcessingOutput,
    ProcessingS3Input,
    ProcessingS3Output,
)
from sagemaker.core.workflow.conditions import ConditionGreaterThanOrEqualTo
from sagemaker.core.workflow.execution_variables import ExecutionVariables
from sagemaker.core.workflow.functions import Join, JsonGet
from sagemaker.core.workflow.parameters import ParameterFloat, ParameterInteger, ParameterString
from sagemaker.core.workflow.pipeline_context import PipelineSession
from sagemaker.core.workflow.properties import PropertyFile
from sagemaker.mlops.workflow.condition_step import ConditionStep
from sagemaker.mlops.workflow.fail_step import FailStep
from sagemaker.mlops.workflow.model_step import ModelStep
from sagemaker.mlops.workflow.pipeline import Pipeline
from sagemaker.mlops.workflow.retry import (
    SageMakerJobExceptionTypeEnum,
    SageMakerJobStepRetryPolicy,
    StepExceptionTypeEnum,
    StepRetryPolicy,
)
from sagemaker.mlops.workflow.steps import CacheConfig, ProcessingStep, TrainingStep
from sagemaker.serve.model_builder import ModelBuilder
from sagemaker.train.configs import Compute, InputData, MetricDefinition, Networking, StoppingCondition, Tag
from sagemaker.train.model_trainer import ModelTrainer

from skin_lesion.cloud.compile import has_local_storage
from skin_lesion.serving.formats import ACCEPTED, ANSWERED
from skin_lesion.settings import parameter_name, pipeline_settings

ENTRYPOINT = ["skin-lesion", "step"]
HOUR = 3600
NUMBER = r"([-+0-9.eE]+)"
METRICS = ["train_loss", "validation_loss", "validation_balanced_accuracy", "chosen_balanced_accuracy"]
THROTTLED = StepRetryPolicy([StepExceptionTypeEnum.THROTTLING], interval_seconds=10, max_attempts=5)
BUSY = SageMakerJobStepRetryPolicy(
    exception_types=[SageMakerJobExceptionTypeEnum.RESOURCE_LIMIT],
    failure_reason_types=[SageMakerJobExceptionTypeEnum.CAPACITY_ERROR],
    interval_seconds=60,
    max_attempts=5,
)
JOB = dict(retry_policies=[THROTTLED, BUSY], cache_config=CacheConfig(enable_caching=True, expire_after="P30D"))


class ContainerTrainingStep(TrainingStep):
    """A training step with what `ModelTrainer` has no argument for: the container's command, as the Processing steps
    have it, and a role that is a pipeline parameter."""

    def __init__(self, name, step_args, role, **options):
        super().__init__(name, step_args, **options)
        self.role = role

    @property
    def arguments(self):
        request = super().arguments
        request["RoleArn"] = self.role
        request["AlgorithmSpecification"]["ContainerEntrypoint"] = ENTRYPOINT
        request["AlgorithmSpecification"]["ContainerArguments"] = ["train"]
        return request


def setting_parameter(name, value):
    """The pipeline parameter of one setting. A boolean is a string of two allowed values: `Std:Join` would
    print a Boolean in a form of its own."""
    name = parameter_name(name)
    if isinstance(value, bool):
        return ParameterString(name, str(value).lower(), enum_values=["true", "false"])
    kind = {int: ParameterInteger, float: ParameterFloat, str: ParameterString}[type(value)]
    return kind(name, default_value=value)


def output(step, name):
    """The address of an output of a Processing step."""
    return step.properties.ProcessingOutputConfig.Outputs[name].S3Output.S3Uri


def wiring(settings, role="role_arn") -> SimpleNamespace:
    """What the pipelines share, with the defaults of `settings` (section.key to `Setting`): parameters, and the jobs as
    functions. The jobs run under the role of setting aws.`role`. A step that is there several times runs the notebook
    `notebook` under a name of its own."""
    aws = {name.removeprefix("aws."): s.value for name, s in settings.items() if name.startswith("aws.")}
    bucket, group, key = aws["bucket"], aws["model_package_group"], aws["kms_key"]
    subnets, security_groups = aws["subnets"].split(","), aws["security_groups"].split(",")
    # SageMaker refuses a volume key where the volume is the instance's own disk, which encrypts itself. So the kind of
    # instance is settled here: another kind needs another compilation, not only another parameter.
    volume_key = {
        name: None if has_local_storage(aws[name]) else key for name in ("processing_instance", "training_instance")
    }
    parameter = {
        name: setting_parameter(name, s.value)
        for name, s in pipeline_settings(settings).items()
        if name.split(".")[0] not in ("experiments", "monitoring")
    }
    input_data = ParameterString("InputData", f"s3://{bucket}/raw/sample")
    champion_data = ParameterString("ChampionData", f"s3://{bucket}/champion/{group}")
    unknown_data = ParameterString("UnknownData", f"s3://{bucket}/raw/unknown")
    image = ParameterString("ImageUri", aws["image_uri"])
    processing_instance = ParameterString("ProcessingInstance", aws["processing_instance"])
    training_instance = ParameterString("TrainingInstance", aws["training_instance"])
    role = ParameterString("RoleArn", aws[role])
    session = PipelineSession(default_bucket=bucket)
    session._default_bucket = bucket  # otherwise the SDK asks S3 whether the bucket is there
    place, endpoint = settings["serving.capture"].value, settings["serving.endpoint"].value
    captures = f"{place if place.startswith('s3://') else f's3://{bucket}/capture'}/{endpoint}"
    captured = {}  # the data set `captured` has two more inputs, so it is another definition
    if "captured" in settings["data.dataset"].value.split(","):
        captured["captures"] = ParameterString("CaptureData", captures)
        captured["labels"] = ParameterString("LabelsData", f"s3://{bucket}/labels/{endpoint}")
    tags = [{"Key": "project", "Value": "skin-lesion"}, {"Key": "cost-center", "Value": "skin-lesion"}]

    def section(name):
        return {k.split(".")[1]: v.to_string() for k, v in parameter.items() if k.startswith(f"{name}.")}

    def run_uri(*parts):
        return Join("/", [f"s3://{bucket}/runs", ExecutionVariables.PIPELINE_EXECUTION_ID, *parts])

    def processing(
        name,
        inputs,
        outputs,
        arguments,
        hours,
        property_files=None,
        notebook=None,
        instances=1,
        isolated=True,
        environment=None,
        places=None,
        **options,
    ):
        processor = Processor(
            role=role,
            image_uri=image,
            instance_count=instances,
            instance_type=processing_instance,
            entrypoint=ENTRYPOINT,
            volume_size_in_gb=aws["volume_size"],
            volume_kms_key=volume_key["processing_instance"],
            output_kms_key=key,
            max_runtime_in_seconds=hours * HOUR,
            sagemaker_session=session,
            tags=tags,
            env=environment,
            network_config=NetworkConfig(isolated, security_groups, subnets, encrypt_inter_container_traffic=True),
        )
        folder = "/opt/ml/processing"
        step_args = processor.run(
            inputs=[
                ProcessingInput(
                    input_name=channel,
                    s3_input=ProcessingS3Input(
                        s3_uri=uri,
                        local_path=f"{folder}/input/{channel}",
                        s3_data_type="S3Prefix",
                        s3_data_distribution_type="FullyReplicated" if instances == 1 else "ShardedByS3Key",
                    ),
                )
                for channel, uri in inputs.items()
            ],
            outputs=[
                ProcessingOutput(
                    output_name=channel,
                    s3_output=ProcessingS3Output(
                        s3_uri=(places or {}).get(channel) or run_uri(name, channel),
                        local_path=f"{folder}/output/{channel}",
                        s3_upload_mode="EndOfJob",
                    ),
                )
                for channel in [*outputs, "report"]
            ],
            arguments=[
                notebook or name,
                *(word for option, value in arguments.items() for word in (f"--{option}", value)),
            ],
        )
        return ProcessingStep(name, step_args, property_files=property_files, **JOB | options)

    def prepare():
        """The steps that make the shards, `prepare` last. With several hosts each of them decodes its own part of the
        files first: they join through S3, because the hosts of a Processing job that is isolated cannot speak."""
        raw, steps = input_data, []
        if captured and aws["prepare_instances"] > 1:
            raise ValueError("Captured pictures are decoded by one host: set aws.prepare_instances = 1.")
        if (hosts := aws["prepare_instances"]) > 1:
            size = {"image_size": section("data")["image_size"]}
            steps = [processing("decode", {"raw": raw}, ["decoded"], size, hours=6, instances=hosts)]
            raw = output(steps[0], "decoded")
        outputs = ["train", "validation", "test", "table"]
        # SageMaker's cache key knows addresses and not what lies there: more is captured at the same address
        cache = {"cache_config": None} if captured else {}
        return [*steps, processing("prepare", {"raw": raw} | captured, outputs, section("data"), hours=6, **cache)]

    # Input mode File, the SDK's default, and every host gets all of it. A batch is a draw from the whole training set, of
    # which each process reads its own pictures: random access to memory-mapped shards, which FastFile's streaming would
    # answer with one request to S3 a picture, in each epoch anew. The packed pictures are few bytes (3.8 GB for 25,000 at
    # 224 px) and are copied once. ShardedByS3Key would tie pictures to hosts: the batches, and so the result, would
    # depend on their number.
    def channels(prepare):
        return [InputData(channel_name=c, data_source=output(prepare, c)) for c in ("train", "validation", "table")]

    def trainer(name, hyperparameters, spot=True):
        return ModelTrainer(
            sagemaker_session=session,
            role=aws["role_arn"],
            base_job_name=name,
            training_image=image,
            compute=Compute(
                instance_type=training_instance,
                instance_count=aws["training_instances"],
                volume_size_in_gb=aws["volume_size"],
                volume_kms_key_id=volume_key["training_instance"],
                enable_managed_spot_training=spot,
            ),
            networking=Networking(
                subnets=subnets,
                security_group_ids=security_groups,
                enable_network_isolation=True,
                enable_inter_container_traffic_encryption=True,
            ),
            stopping_condition=StoppingCondition(
                max_runtime_in_seconds=24 * HOUR, max_wait_time_in_seconds=36 * HOUR if spot else None
            ),
            output_data_config=OutputDataConfig(s3_output_path=run_uri(name), kms_key_id=key),
            # An address of its own for each execution: checkpoints of other code or data are never picked up. The price is
            # that SageMaker, whose cache key holds this address, repeats training in each execution; the local engine does
            # not.
            checkpoint_config=CheckpointConfig(s3_uri=run_uri(name, "checkpoints"), local_path="/opt/ml/checkpoints")
            if spot
            else None,
            hyperparameters=hyperparameters,
            tags=[Tag(key=tag["Key"], value=tag["Value"]) for tag in tags],
        ).with_metric_definitions([MetricDefinition(name=metric, regex=f"{metric}={NUMBER}") for metric in METRICS])

    def train(prepare, name="train", **hyperparameters):
        training = trainer(name, section("train") | hyperparameters)
        return ContainerTrainingStep(name, training.train(channels(prepare)), role, **JOB)

    def evaluate(prepare, model, name="evaluate", property_files=None):
        parts = {c: output(prepare, c) for c in ("validation", "test", "table")}
        return processing(
            name,
            {"model": model, **parts, "champion": champion_data, "unknown": unknown_data},
            ["evaluation"],
            section("evaluate") | section("gate"),
            hours=6,
            property_files=property_files,
            notebook="evaluate",
        )

    def package(model, evaluate, name="register", **options):
        return processing(
            name,
            {"model": model, "evaluation": output(evaluate, "evaluation")},
            ["package"],
            {},
            hours=1,
            notebook="register",
            **options,
        )

    return SimpleNamespace(
        aws=aws,
        volume_key=volume_key,
        parameter=parameter,
        places=[
            input_data,
            *captured.values(),
            champion_data,
            unknown_data,
            image,
            role,
            processing_instance,
            training_instance,
        ],
        image=image,
        run_uri=run_uri,
        champion=champion_data,
        captures=captures,
        role=role,
        session=session,
        tags=tags,
        section=section,
        processing=processing,
        prepare=prepare,
        channels=channels,
        trainer=trainer,
        train=train,
        evaluate=evaluate,
        package=package,
    )


def measured(evaluation, path):
    """A number of evaluation.json."""
    return JsonGet(step_name="evaluate", property_file=evaluation, json_path=path)


def registration(wired, package, evaluate) -> ModelStep:
    """Puts the package into the model registry, where it waits for a person."""
    aws = wired.aws
    evaluated = {
        name: MetricsSource("application/json", Join("/", [output(evaluate, "evaluation"), f"{name}.json"]))
        for name in ("evaluation", "statistics", "constraints")
    }
    baselines = DriftCheckBaselines(
        model_statistics=evaluated["evaluation"],
        model_data_statistics=evaluated["statistics"],
        model_data_constraints=evaluated["constraints"],
    )
    model = ModelBuilder(
        image_uri=wired.image,
        s3_model_data_url=package,
        role_arn=aws["role_arn"],
        sagemaker_session=wired.session,
    )
    registered = model.register(
        model_package_group_name=aws["model_package_group"],
        content_types=list(ACCEPTED),
        response_types=list(ANSWERED),
        inference_instances=["ml.m5.large", "ml.m5.xlarge", "ml.c5.xlarge"],
        transform_instances=["ml.m5.xlarge", "ml.c5.xlarge"],
        model_metrics=ModelMetrics(model_statistics=evaluated["evaluation"]),
        drift_check_baselines=baselines,
        approval_status="PendingManualApproval",
        customer_metadata_properties={
            "execution": ExecutionVariables.PIPELINE_EXECUTION_ID,
            "architecture": wired.parameter["train.architecture"],
        },
    )
    return ModelStep("model", registered, retry_policies=[THROTTLED])


def below_the_gate(evaluation, floors, margin) -> FailStep:
    """Ends the run, and says each figure beside its floor."""
    figures = [
        part
        for path, floor in floors.items()
        for part in (
            path,
            " = ",
            measured(evaluation, path),
            ", needed ",
            floor if isinstance(floor, ParameterFloat) else str(floor),
            "; ",
        )
    ]
    said = [
        "The model is below the gate and is not registered. ",
        *figures,
        "champion.margin_left is the difference to the champion plus the margin ",
        margin,
        ". See evaluation.json.",
    ]
    return FailStep("below-the-gate", Join("", said))


def build(settings) -> Pipeline:
    """The pipeline `skin-lesion-training` with the defaults of `settings` (section.key to `Setting`)."""
    wired = wiring(settings)
    parameter = wired.parameter
    *decode, prepare = wired.prepare()
    train = wired.train(prepare)
    model = train.properties.ModelArtifacts.S3ModelArtifacts
    evaluation = PropertyFile("evaluation", output_name="evaluation", path="evaluation.json")
    evaluate = wired.evaluate(prepare, model, property_files=[evaluation])
    register = wired.package(model, evaluate)
    package = Join("/", [output(register, "package"), "model.tar.gz"])
    floors = {
        "balanced_accuracy.low": parameter["gate.balanced_accuracy_low"],
        "melanoma_sensitivity.value": parameter["gate.melanoma_sensitivity"],
        "champion.margin_left": 0.0,
    }
    gate = ConditionStep(
        "gate",
        conditions=[ConditionGreaterThanOrEqualTo(measured(evaluation, path), floor) for path, floor in floors.items()],
        if_steps=[register, registration(wired, package, evaluate)],
        else_steps=[below_the_gate(evaluation, floors, parameter["gate.champion_margin"])],
    )

    return Pipeline(
        name="skin-lesion-training",
        parameters=[*parameter.values(), *wired.places],
        pipeline_experiment_config=None,
        steps=[*decode, prepare, train, evaluate, gate],
        sagemaker_session=wired.session,
    )
