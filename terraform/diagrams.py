"""Draws the three pictures of nbs/guides/architecture.md from what is there: `python terraform/diagrams.py`, or `make diagrams`.

The compiled definitions, the state machine and its rules are read as JSON; of Terraform's files only a few plain forms are
read (module calls, resources, the roles' statements), so that neither terraform nor a parser has to be installed."""

import json
import re
from pathlib import Path

from skin_lesion.execution.definition import flatten, references

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "guides" / "architecture.md"
# How a kind of resource is called. What is not here is drawn under its own name, or is a part of something that is.
KINDS = {
    "aws_apigatewayv2_api": "HTTP API",
    "aws_appautoscaling_target": "auto-scaling",
    "aws_budgets_budget": "budget",
    "aws_cloudtrail": "CloudTrail",
    "aws_cloudwatch_dashboard": "dashboard",
    "aws_cloudwatch_event_rule": "EventBridge rules",
    "aws_cloudwatch_metric_alarm": "alarms",
    "aws_ecr_repository": "ECR, scanned, immutable tags",
    "aws_flow_log": "flow log",
    "aws_iam_openid_connect_provider": "OIDC of GitHub",
    "aws_kms_key": "KMS keys, rotated",
    "aws_lambda_function": "Lambdas",
    "aws_s3_bucket": "S3 buckets",
    "aws_sagemaker_domain": "Studio",
    "aws_sagemaker_model_package_group": "model package group",
    "aws_sagemaker_pipeline": "pipelines",
    "aws_scheduler_schedule": "schedules",
    "aws_security_group": "security groups",
    "aws_sfn_state_machine": "state machine",
    "aws_sns_topic": "SNS topic",
    "aws_sqs_queue": "dead letters",
    "aws_subnet": "private subnets",
    "aws_vpc": "VPC",
    "aws_vpc_endpoint": "endpoints of AWS services",
}
PARTS = re.compile(
    r"aws_(default_|iam_role|cloudwatch_log_|cloudwatch_event_target|route_|vpc_security_|kms_alias|ecr_lifecycle"
    r"|lambda_permission|apigatewayv2_|appautoscaling_policy|sagemaker_studio_|sagemaker_user_)"
)


def blocks(text: str, kind: str) -> list[tuple[str, str]]:
    """Labels and body of each block of a kind: `module "x" {` gives x, `resource "t" "n" {` gives 't" "n'."""
    return re.findall(rf'^{kind} "([^\n]+)" \{{\n(.*?)^\}}', text, flags=re.M | re.S)


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)


def kinds_of(terraform: Path, module: str) -> list[str]:
    """What a module makes, in words, in the order of its file."""
    types = [
        labels.split('"')[0]
        for labels, _ in blocks((terraform / "modules" / module / "main.tf").read_text(), "resource")
    ]
    part = lambda kind: kind not in KINDS and (PARTS.match(kind) or any(kind.startswith(f"{k}_") for k in KINDS))
    return list(dict.fromkeys(KINDS.get(kind, kind.removeprefix("aws_")) for kind in types if not part(kind)))


def access(terraform: Path) -> dict[str, dict[str, set[str]]]:
    """Role to bucket to what its policy allows there: `reads`, `writes` or both."""
    text = (terraform / "modules" / "roles" / "main.tf").read_text()
    shared = re.search(r"^  read_models = \[\n(.*?)^  \]", text, flags=re.M | re.S)[1]
    found = {}
    for role, body in re.findall(r"^    (\w+) = concat\(local\.container(.*?)^    \]\)", text, flags=re.M | re.S):
        found[role] = {}
        for actions, resources in re.findall(
            r"Action\s*=\s*\[(.*?)\].*?Resource\s*=\s*\[(.*?)\]",
            body + (shared if "local.read_models" in body else ""),
            flags=re.S,
        ):
            buckets = re.findall(r"local\.bucket\.(\w+)", resources) or (
                quoted(resources) if "for kind in" in resources else []
            )
            does = {
                word
                for action, word in {"s3:GetObject": "reads", "s3:PutObject": "writes"}.items()
                if action in actions
            }
            for bucket in buckets if does else ():
                found[role].setdefault(bucket, set()).update(does)
    return found


def role_of(definition: dict) -> str:
    """The role that the jobs of a compiled pipeline run under."""
    arguments = definition["Steps"][0]["Arguments"]
    role, defaults = arguments["RoleArn"], {p["Name"]: p.get("DefaultValue") for p in definition["Parameters"]}
    return (role if isinstance(role, str) else defaults[role["Get"].removeprefix("Parameters.")]).rsplit("-", 1)[1]


def account(root: Path) -> str:
    """The account: what each module of Terraform makes, and which job may read and write which bucket."""
    terraform = root / "terraform"
    calls = dict(blocks((terraform / "main.tf").read_text(), "module"))
    uses = {name: set(re.findall(r"module\.(\w+)", body)) for name, body in calls.items()}
    roles = {
        p.stem: role_of(json.loads(p.read_text())) for p in sorted((root / "pipelines" / "definitions").glob("*.json"))
    }
    buckets = re.search(
        r"^  encrypted = (.*)\n  kinds .*= (.*)$", (terraform / "modules/storage/main.tf").read_text(), re.M
    )
    images = quoted(
        dict(blocks((terraform / "modules/registry/variables.tf").read_text(), "variable"))["repositories"]
        .split("default")[1]
        .split("\n")[0]
    )
    unlisted = re.findall(r'"aws_iam_role" "(?!this")(\w+)"', (terraform / "modules" / "roles" / "main.tf").read_text())
    lists = {
        "registry": images,
        "roles": ["a role for each of " + ", ".join([*access(terraform), *unlisted])],
        "keys": ["for " + ", ".join(sorted(name for name in uses if "keys" in uses[name] and name != "roles"))],
        "automation": sorted(p.parent.name for p in (terraform / "lambdas").glob("*/handler.py")),
    }
    lines = ["flowchart TB", '  github["GitHub: workflows"] -->|"images, pipelines, deployment"| roles']
    lines.append('  subgraph account["An AWS account: dev, staging or prod"]')
    for module in calls:
        if module not in ("network", "storage"):
            words = [
                module,
                ", ".join(kinds_of(terraform, module)),
                *([", ".join(lists[module])] if module in lists else []),
            ]
            lines.append(f'    {module}["{"<br/>".join(words)}"]')
    lines.append(f'    subgraph network["network: {", ".join(kinds_of(terraform, "network"))}"]')
    for role in access(terraform):
        names = [name for name in roles if roles[name] == role]
        others = {"serving": "endpoint", "studio": "Studio: people", "retrain": "notebook job: retraining"}
        text = "jobs of " + ", ".join(names) if names else others[role]
        lines.append(f'      {role}["{text}<br/>role {role}"]')
    lines += ["    end", f'    subgraph storage["storage: {", ".join(kinds_of(terraform, "storage"))}"]']
    lines += [f'      bucket_{name}[("{name}")]' for name in quoted(buckets[1]) + quoted(buckets[2])]
    lines += ["    end", "  end"]
    for role, found in access(terraform).items():
        lines += [f"  {role} {'-->' if 'writes' in does else '-.->'} bucket_{bucket}" for bucket, does in found.items()]
    lines += [
        f"  {m} --> bucket_logs"
        for m in calls
        if "var.buckets.logs" in (terraform / "modules" / m / "main.tf").read_text()
    ]
    lines += [
        f"  {user} --> {used}"
        for user in ("automation", "sagemaker")
        for used in sorted(uses[user] & {"observability", "sagemaker"})
    ]
    lines += [
        "  registry --> sagemaker",
        "  sagemaker --> pipeline & deploy & monitor & studio",
        "  endpoint --> serving",
    ]
    return "\n".join(lines)


def inputs_of(step) -> list[tuple[str, str]]:
    """Name and reference of each input of a step; what is no data input has no name."""
    arguments, found = step.arguments, []
    for item in arguments.get("ProcessingInputs") or ():
        found.append((item["InputName"], item["S3Input"]["S3Uri"]))
    for item in arguments.get("InputDataConfig") or ():
        found.append((item["ChannelName"], item["DataSource"]["S3DataSource"]["S3Uri"]))
    if step.type == "Condition":
        for item in arguments["Conditions"]:
            value = item["LeftValue"]["Std:JsonGet"]
            found.append((value["Path"], value["PropertyFile"]))
    return [(name, uri["Get"]) for name, uri in found if isinstance(uri, dict) and "Get" in uri]


def pipeline(root: Path) -> str:
    """The training pipeline: its steps, what goes from one to the next, and the gate."""
    definition = json.loads((root / "pipelines" / "definitions" / "training.json").read_text())
    defaults = {p["Name"]: p.get("DefaultValue") for p in definition["Parameters"]}
    steps = flatten(definition)
    shape = {"Condition": ("{", "}"), "Fail": ("([", "])"), "RegisterModel": ("[[", "]]")}
    node = lambda name: re.sub(r"\W", "_", name)
    lines, stores, edges = ["flowchart TB"], [], {}
    for step in steps:
        machine = step.arguments.get("ResourceConfig") or step.arguments.get("ProcessingResources", {}).get(
            "ClusterConfig", {}
        )
        kind = defaults.get((machine.get("InstanceType") or {}).get("Get", "").removeprefix("Parameters."))
        words = [
            step.name,
            step.type,
            *([kind] if kind else []),
            *(["spot"] if step.arguments.get("EnableManagedSpotTraining") else []),
        ]
        opening, closing = shape.get(step.type, ("[", "]"))
        lines.append(f'  {node(step.name)}{opening}"{words[0]}<br/>{", ".join(words[1:])}"{closing}')
        named = inputs_of(step)
        for name, reference in named:
            where, source = reference.split(".")[:2]
            if where == "Parameters" and source not in stores:
                stores.append(source)
            edges.setdefault((source, step.name), []).append(name)
        for reference in references(step.arguments):
            where, _, rest = reference.partition(".")
            if where == "Steps" and step.type != "Fail":  # which only speaks of figures
                edges.setdefault((rest.split(".")[0], step.name), [])
        if step.branch:
            edges[(step.branch[0], step.name)] = ["holds" if step.branch[1] else "does not hold"]
    lines += [f'  {name}[("{name}")]' for name in stores]
    for (source, target), names in edges.items():
        if source != target:
            lines.append(
                f"  {node(source)} -->" + (f'|"{", ".join(dict.fromkeys(names))}"| ' if names else " ") + node(target)
            )
    return "\n".join(lines)


def said(rule: dict) -> str:
    """A rule of a Choice state in a few words."""
    for word in ("And", "Or"):
        if word in rule:
            return f" {word.lower()} ".join(said(part) for part in rule[word])
    if "Not" in rule:
        return f"not {said(rule['Not'])}"
    name = rule["Variable"].split(".")[-1]
    (test,) = set(rule) - {"Variable", "Next"}
    return f"{name} is there" if test == "IsPresent" else f"{name} {'above' if 'Greater' in test else '='} {rule[test]}"


def told(state: dict) -> str:
    """What a state calls, in a few words."""
    given = state.get("Parameters") or state.get("Result") or {}
    if "FunctionName" in given:
        return "Lambda " + given["FunctionName"].strip("${}")
    if "Subject" in given:
        return "SNS: " + given["Subject"].replace("skin-lesion: ", "")
    if "stage" in given:
        return f"pipeline {given['stage']}"
    return {"Task": state.get("Resource", "").rsplit(":", 1)[-1], "Wait": "a minute, by setting"}.get(state["Type"], "")


def monitoring(root: Path) -> str:
    """From captured requests to a new version: what starts the state machine, its states, and their ends."""
    machine = json.loads((root / "pipelines" / "retraining.asl.json").read_text())
    rules = json.loads((root / "pipelines" / "retraining.rules.json").read_text())
    automation = (root / "terraform" / "modules" / "automation" / "main.tf").read_text()
    first = machine["StartAt"]
    lines = ["flowchart TB"]
    for role, found in access(root / "terraform").items():
        if role == "serving":
            lines += [
                f'  endpoint["endpoint"] --> bucket_{b}[("{b}")]' for b, does in found.items() if does == {"writes"}
            ]
        if role == "monitor":
            lines += [f"  bucket_{b} --> monitor" for b, does in found.items() if b == "capture"]
    lines += ['  monitor["pipeline monitoring"] -->|"event.json, metrics.jsonl"| rule_written']
    for labels, body in blocks(automation, "resource"):
        kind, name = labels.split('" "')
        if kind == "aws_scheduler_schedule":
            lines.append(f'  schedule_{name}(["schedule {name}"]) --> {"monitor" if name == "monitoring" else first}')
        if kind == "aws_apigatewayv2_route":
            lines.append(f'  api(["{quoted(body)[0]}"]) -->|"Lambda retrain_ask"| {first}')
    if 'resource "aws_cloudwatch_event_target" "metrics"' in automation:
        lines.append('  rule_written -->|"Lambda publish_metrics"| alarms["CloudWatch: metrics, alarms"] --> people')
    for name, rule in rules.items():
        lines.append(
            f'  rule_{name}(["event {name}, of {rule["source"][0]}"]) --> {"people" if name == "lost" else first}'
        )
    lines.append('  people(["SNS topic: people"])')
    shape = {"Choice": ("{", "}"), "Succeed": ("([", "])"), "Fail": ("([", "])"), "Wait": ("(", ")")}
    for name, state in machine["States"].items():
        opening, closing = shape.get(state["Type"], ("[", "]"))
        lines.append(f'  {name}{opening}"' + "<br/>".join(filter(None, [name, told(state)])) + f'"{closing}')
        lines += [f'  {name} -->|"{said(choice)}"| {choice["Next"]}' for choice in state.get("Choices", ())]
        if "Default" in state:
            lines.append(f'  {name} -->|"else"| {state["Default"]}')
        if "Next" in state:
            lines.append(f"  {name} --> {state['Next']}")
        lines += [f"  {name} -.-> {catch['Next']}" for catch in state.get("Catch", ())]
    return "\n".join(lines)


def rendered(page: str, root: Path) -> str:
    """The page with its pictures drawn anew from the files below `root`."""
    for name, draw in {"account": account, "pipeline": pipeline, "monitoring": monitoring}.items():
        fence = re.compile(rf"(<!-- {name}: .*? -->\n```mermaid\n).*?(```\n)", re.S)
        text = draw(root)
        page, count = fence.subn(lambda found, text=text: found[1] + text + "\n" + found[2], page)
        if count != 1:
            raise ValueError(
                f"{PAGE.name} must have the picture {name} once, after <!-- {name}: ... -->, and has it {count} times"
            )
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(), ROOT))
