"""The definition as a whole: what is refused before anything starts, and what references come to."""

import copy
import json
from pathlib import Path

import pytest

from skin_lesion.execution.definition import PipelineError, Scope, describe, flatten, holds, lookup, plan, resolve

DEFINITION = Path(__file__).resolve().parent.parent / "pipelines/definitions/training.json"


def get(ref):
    return {"Get": ref}


def join(on, *values):
    return {"Std:Join": {"On": on, "Values": list(values)}}


def json_get(step, file, path):
    return {"Std:JsonGet": {"PropertyFile": get(f"Steps.{step}.PropertyFiles.{file}"), "Path": path}}


def processing(name, inputs=(), arguments=(), **extra):
    """A Processing step with one output `out` and the property file `score`."""
    uri = join("/", "s3://bucket", get("Execution.PipelineExecutionId"), name)
    return {
        "Name": name,
        "Type": "Processing",
        "Arguments": {
            "AppSpecification": {
                "ContainerEntrypoint": ["skin-lesion", "step"],
                "ContainerArguments": [name, *arguments],
            },
            "ProcessingInputs": [
                {"InputName": f"in{i}", "S3Input": {"S3Uri": u, "LocalPath": f"/opt/ml/processing/input/in{i}"}}
                for i, u in enumerate(inputs)
            ],
            "ProcessingOutputConfig": {
                "Outputs": [
                    {"OutputName": "out", "S3Output": {"S3Uri": uri, "LocalPath": "/opt/ml/processing/output/out"}}
                ]
            },
        },
        "PropertyFiles": [{"PropertyFileName": "score", "OutputName": "out", "FilePath": "score.json"}],
        **extra,
    }


def condition(name, conditions, then=(), otherwise=(), **extra):
    arguments = {"Conditions": conditions, "IfSteps": list(then), "ElseSteps": list(otherwise)}
    return {"Name": name, "Type": "Condition", "Arguments": arguments, **extra}


def fail(name, message="no"):
    return {"Name": name, "Type": "Fail", "Arguments": {"ErrorMessage": message}}


def definition(*steps, parameters=()):
    return {"Version": "2020-12-01", "Parameters": list(parameters), "Steps": list(steps)}


def parameter(name, kind, default=None, **extra):
    return {"Name": name, "Type": kind, **({} if default is None else {"DefaultValue": default}), **extra}


def out(step):
    return get(f"Steps.{step}.ProcessingOutputConfig.Outputs['out'].S3Output.S3Uri")


def problems(*args, **kwargs):
    with pytest.raises(PipelineError) as error:
        plan(*args, **kwargs)
    return str(error.value)


def test_the_committed_definition_can_run():
    steps, values = plan(json.loads(DEFINITION.read_text()), {"TrainEpochs": "3"})
    names = [s.name for s in steps]
    assert (
        names.index("prepare")
        < names.index("train")
        < names.index("evaluate")
        < names.index("gate")
        < names.index("register")
    )
    assert values["TrainEpochs"] == 3 and isinstance(values["TrainLearningRate"], float)


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("Integer", "-3", -3),
        ("Float", "1e-4", 1e-4),
        ("Float", "2", 2.0),
        ("Boolean", "True", True),
        ("String", "007", "007"),
    ],
)
def test_a_parameter_is_read_by_its_type(kind, text, value):
    values = plan(definition(processing("a"), parameters=[parameter("P", kind)]), {"P": text})[1]
    assert values["P"] == value and type(values["P"]) is type(value)


@pytest.mark.parametrize(
    "kind, text",
    [("Integer", "1.0"), ("Integer", "1e3"), ("Integer", "true"), ("Float", "nan"), ("Float", "x"), ("Boolean", "1")],
)
def test_a_mistyped_parameter_is_refused(kind, text):
    message = problems(definition(processing("a"), parameters=[parameter("P", kind)]), {"P": text})
    assert f"P = {text!r} is not of type {kind}" in message


def test_unknown_missing_empty_and_not_allowed_parameters_are_named_together():
    declared = [
        parameter("A", "String"),
        parameter("B", "String", "b"),
        parameter("C", "String", "x", EnumValues=["x", "y"]),
    ]
    message = problems(definition(processing("a"), parameters=declared), {"B": " ", "C": "z", "D": "1"})
    assert "parameter A (String) has no default" in message
    assert "parameter B is empty" in message
    assert "'z' must be one of x, y" in message
    assert "no parameter 'D'" in message


def test_a_default_of_the_wrong_type_is_refused():
    assert "is not of type Integer" in problems(
        definition(processing("a"), parameters=[parameter("P", "Integer", "many")])
    )


@pytest.mark.parametrize(
    "reference, why",
    [
        ("Parameters.Nope", "no parameter 'Nope'"),
        ("Execution.Nope", "no execution variable 'Nope'"),
        ("Steps.nope.X", "no step 'nope'"),
        ("Steps.a.ProcessingOutputConfig.Outputs['tou'].S3Output.S3Uri", "'tou' is not there, only out"),
        ("Steps.a.ModelArtifacts.S3ModelArtifacts", "'ModelArtifacts' is not there"),
        ("Steps.a.PropertyFiles.nope", "no property file 'nope'"),
        ("Elsewhere.x", "neither of Parameters, Execution nor Steps"),
    ],
)
def test_a_reference_into_the_void_is_refused(reference, why):
    assert why in problems(definition(processing("a"), processing("b", arguments=["--x", get(reference)])))


@pytest.mark.parametrize("kind", ["Lambda", "Transform", "Callback", "EMR", "CreateModel", None])
def test_an_unknown_step_type_is_refused(kind):
    assert "is not one the local engine knows" in problems(
        definition(processing("a"), {"Name": "b", "Type": kind, "Arguments": {}})
    )


def test_cycles_twins_nested_conditions_bad_names_and_versions_are_refused():
    cyclic = definition(processing("a", [out("b")]), processing("b", [out("a")]))
    assert "a cycle: " in problems(cyclic)
    assert "two steps are named 'a'" in problems(definition(processing("a"), processing("a")))
    assert "condition inside the condition outer" in problems(
        definition(condition("outer", [], [condition("inner", [])]))
    )
    assert "letters, digits and inner hyphens" in problems(definition(processing("../a")))
    assert "no step 'z'" in problems(definition(processing("a", DependsOn=["z"])))
    assert "condition type 'Equal'" in problems(
        definition(condition("c", [{"Type": "Not", "Condition": {"Type": "Equal"}}]))
    )
    assert "Version" in problems(definition(processing("a")) | {"Version": "1"})
    assert "no steps" in problems(definition())


def test_what_the_api_takes_as_text_must_be_text():
    declared = [parameter("N", "Integer", 1)]
    wrong = definition(processing("a", arguments=["--n", get("Parameters.N")]), parameters=declared)
    assert "ContainerArguments[2]" in problems(wrong) and "to_string" in problems(wrong)
    plan(definition(processing("a", arguments=["--n", join("", get("Parameters.N"))]), parameters=declared))
    assert "Environment.X = 3" in problems(
        definition(processing("a") | {"Arguments": processing("a")["Arguments"] | {"Environment": {"X": 3}}})
    )


def test_order_follows_references_dependson_and_branches():
    steps = [
        condition(
            "gate",
            [{"Type": "Equals", "LeftValue": json_get("b", "score", "x"), "RightValue": 1}],
            [processing("d")],
            [fail("stop")],
        ),
        processing("c", DependsOn=["b"]),
        processing("b", [out("a")]),
        processing("a"),
    ]
    planned, _ = plan(definition(*steps))
    waits = {s.name: set(s.waits_for) for s in planned}
    assert waits == {"a": set(), "b": {"a"}, "c": {"b"}, "gate": {"b"}, "d": {"gate"}, "stop": {"gate"}}
    order = [s.name for s in planned]
    assert all(order.index(w) < order.index(n) for n, names in waits.items() for w in names)
    assert {s.name: s.branch for s in flatten(definition(*steps))}["stop"] == ("gate", False)


@pytest.fixture
def scope(tmp_path):
    """A scope in which step `a` has ended; its property file is tmp_path/s3/bucket/run/a/score.json."""
    scope = Scope(
        {"I": 3, "B": True, "F": 0.5, "S": "x"},
        {"PipelineExecutionId": "run"},
        {},
        {"a": processing("a")["PropertyFiles"]},
        tmp_path,
    )
    scope.responses["a"] = describe("Processing", resolve(processing("a")["Arguments"], scope), "job")
    (tmp_path / "s3/bucket/run/a").mkdir(parents=True)
    return scope


def test_join_stringifies(scope):
    values = [get(f"Parameters.{n}") for n in "IBFS"]
    assert resolve(join("-", *values, False, 1e-05, join("+", 1, 2)), scope) == "3-true-0.5-x-false-1e-05-1+2"
    assert resolve(out("a"), scope) == "s3://bucket/run/a"


def test_json_get_reads_the_property_file(scope):
    (scope.root / "s3/bucket/run/a/score.json").write_text('{"m": {"low": 0.7, "by-sex": [{"n": 4}]}, "ok": true}')
    assert resolve(json_get("a", "score", "m.low"), scope) == 0.7
    assert resolve(json_get("a", "score", "$.m['by-sex'][0].n"), scope) == 4
    assert resolve(json_get("a", "score", "ok"), scope) is True
    by_uri = {"Std:JsonGet": {"S3Uri": join("/", out("a"), "score.json"), "Path": "m.low"}}
    assert resolve(by_uri, scope) == 0.7


@pytest.mark.parametrize(
    "content, path, why",
    [
        (None, "m", "cannot be read: No such file"),
        ("{not json", "m", "is not JSON"),
        ('{"m": 1}', "n", "has nothing at 'n'"),
        ('{"m": [1]}', "m[1]", "has nothing at"),
        ('{"m": 1}', "m..n", "has nothing at"),
        ('{"m": {}}', "m", "must be text, a number or a boolean"),
        ('{"m": null}', "m", "must be text, a number or a boolean"),
    ],
)
def test_a_property_file_that_does_not_answer_is_an_error(scope, content, path, why):
    if content is not None:
        (scope.root / "s3/bucket/run/a/score.json").write_text(content)
    with pytest.raises(PipelineError, match="property file s3://bucket/run/a/score.json") as error:
        resolve(json_get("a", "score", path), scope)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "kind, left, right, outcome",
    [
        ("Equals", "a", "a", True), ("Equals", 1, "1", False), ("Equals", 1, True, False), ("Equals", 1, 1.0, True),
        ("GreaterThan", 2, 2, False), ("GreaterThanOrEqualTo", 2, 2.0, True), ("LessThan", 1, 2, True), ("LessThanOrEqualTo", 3, 2, False),
    ],
)  # fmt: skip
def test_comparisons(scope, kind, left, right, outcome):
    one = {"Type": kind, "LeftValue": left, "RightValue": right}
    assert holds(one, scope) is outcome
    assert holds({"Type": "Not", "Condition": one}, scope) is not outcome


def test_in_and_or(scope):
    def inside(value, *values):
        return {"Type": "In", "QueryValue": value, "Values": list(values)}

    assert holds(inside(get("Parameters.I"), 1, get("Parameters.I")), scope)
    assert not holds(inside("3", 3), scope)
    assert holds({"Type": "Or", "Conditions": [inside(1, 2), inside(2, 2)]}, scope)
    assert not holds({"Type": "Or", "Conditions": [inside(1, 2)]}, scope)


@pytest.mark.parametrize("left, right", [("0.9", 0.5), (True, 0), ("a", "b")])
def test_only_numbers_are_larger_than_one_another(scope, left, right):
    with pytest.raises(PipelineError, match="only numbers"):
        holds({"Type": "GreaterThan", "LeftValue": left, "RightValue": right}, scope)


def test_nan_passes_no_gate(scope):
    (scope.root / "s3/bucket/run/a/score.json").write_text('{"m": NaN}')
    assert not holds({"Type": "GreaterThanOrEqualTo", "LeftValue": json_get("a", "score", "m"), "RightValue": 0}, scope)


def test_resolving_changes_nothing_in_the_definition(scope):
    step = processing("a", arguments=["--s", get("Parameters.S")])
    before = copy.deepcopy(step)
    resolve(step["Arguments"], scope)
    assert step == before


def test_lookup_by_name_and_by_position():
    channels = [{"ChannelName": "train", "x": 1}, {"ChannelName": "table", "x": 2}]
    assert lookup({"c": channels}, "c['table'].x") == lookup({"c": channels}, "c[1].x") == 2
    with pytest.raises(KeyError, match="is not a path"):
        lookup({"c": channels}, "c[")
