# The whole account against a provider that is imitated: `terraform test`, offline. tests/test_terraform.py runs it and reads
# policies and alarms from the state that it prints.

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "000000000000" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-west-1:000000000000:key/00000000-0000-0000-0000-000000000000", key_id = "00000000-0000-0000-0000-000000000000" }
  }
  mock_resource "aws_vpc" {
    defaults = { id = "vpc-00000000000000000" }
  }
  mock_resource "aws_subnet" {
    defaults = { id = "subnet-11111111111111111" }
  }
  mock_resource "aws_security_group" {
    defaults = { id = "sg-11111111111111111" }
  }
  mock_resource "aws_cloudwatch_log_group" {
    defaults = { arn = "arn:aws:logs:eu-west-1:000000000000:log-group:mock" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::000000000000:role/mock" }
  }
  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws:iam::000000000000:oidc-provider/token.actions.githubusercontent.com" }
  }
  mock_resource "aws_sns_topic" {
    defaults = { arn = "arn:aws:sns:eu-west-1:000000000000:skin-lesion-alarms" }
  }
  mock_resource "aws_sqs_queue" {
    defaults = { id = "https://sqs.eu-west-1.amazonaws.com/000000000000/skin-lesion-dead-letters", arn = "arn:aws:sqs:eu-west-1:000000000000:skin-lesion-dead-letters" }
  }
  mock_resource "aws_sagemaker_pipeline" {
    defaults = { arn = "arn:aws:sagemaker:eu-west-1:000000000000:pipeline/mock" }
  }
  mock_resource "aws_sagemaker_studio_lifecycle_config" {
    defaults = { arn = "arn:aws:sagemaker:eu-west-1:000000000000:studio-lifecycle-config/mock" }
  }
  mock_resource "aws_ecr_repository" {
    defaults = { repository_url = "000000000000.dkr.ecr.eu-west-1.amazonaws.com/mock" }
  }
  mock_resource "aws_apigatewayv2_api" {
    defaults = { execution_arn = "arn:aws:execute-api:eu-west-1:000000000000:mock", api_endpoint = "https://mock.execute-api.eu-west-1.amazonaws.com" }
  }
  mock_resource "aws_lambda_function" {
    defaults = { invoke_arn = "arn:aws:apigateway:eu-west-1:lambda:path/2015-03-31/functions/mock/invocations", arn = "arn:aws:lambda:eu-west-1:000000000000:function:mock" }
  }
  mock_resource "aws_sfn_state_machine" {
    defaults = { arn = "arn:aws:states:eu-west-1:000000000000:stateMachine:skin-lesion-retraining" }
  }
}

# each role its own ARN, so that a wrong one shows
override_resource {
  target = module.roles.aws_iam_role.this["deploy"]
  values = { arn = "arn:aws:iam::000000000000:role/mock-deploy" }
}
override_resource {
  target = module.roles.aws_iam_role.this["monitor"]
  values = { arn = "arn:aws:iam::000000000000:role/mock-monitor" }
}
override_resource {
  target = module.roles.aws_iam_role.this["serving"]
  values = { arn = "arn:aws:iam::000000000000:role/mock-serving" }
}
override_resource {
  target = module.roles.aws_iam_role.this["retrain"]
  values = { arn = "arn:aws:iam::000000000000:role/mock-retrain" }
}

variables {
  environment       = "staging"
  github_repository = "owner/skin-lesion"
  manage_scaling    = true
  email             = "people@example.org"
  image_tag         = "abc123"
}

run "account" {
  command = apply

  assert {
    condition     = length(module.network.subnet_ids) == 2
    error_message = "Two zones must give two private subnets."
  }
  assert {
    condition     = strcontains(output.settings, "role_arn = ") && strcontains(output.settings, ":abc123") && strcontains(output.settings, "kms_key = alias/skin-lesion\n")
    error_message = "The output `settings` must hold the values of settings.ini [aws]."
  }
  assert {
    condition     = alltrue([for kind, bucket in output.buckets : bucket == "skin-lesion-staging-000000000000-${kind}"]) && length(output.buckets) == 6
    error_message = "There must be six buckets, named after environment and account."
  }
}

# Every value here is wrong: each must be refused by its own variable.
run "refuses_bad_values" {
  command = plan
  variables {
    name                       = "Skin Lesion"
    environment                = "production"
    region                     = "Ireland"
    bucket_prefix              = "Under_Score"
    image_tag                  = "latest"
    cidr                       = "10.0.0.0/28"
    zones                      = ["a"]
    services                   = ["logs"]
    log_retention_days         = 7
    capture_days               = 1
    logs_days                  = 30
    endpoint_name              = "under_score"
    instances_max              = 0
    requests_per_instance      = 0
    model_package_group        = "under_score"
    metrics_namespace          = "AWS/SageMaker"
    github_repository          = "skin-lesion"
    users                      = ["some body"]
    email                      = "people"
    latency_p99_ms             = 0
    balanced_accuracy_floor    = 1
    melanoma_sensitivity_floor = 0
    monthly_budget_usd         = 0
    retraining_schedule        = "every month"
    monitoring_schedule        = "every night"
  }
  expect_failures = [
    var.name, var.environment, var.region, var.bucket_prefix, var.image_tag, var.cidr, var.zones, var.services,
    var.log_retention_days, var.capture_days, var.logs_days, var.endpoint_name, var.instances_max,
    var.requests_per_instance, var.model_package_group, var.metrics_namespace, var.github_repository, var.users, var.email,
    var.latency_p99_ms, var.balanced_accuracy_floor, var.melanoma_sensitivity_floor, var.monthly_budget_usd,
    var.retraining_schedule, var.monitoring_schedule,
  ]
}

run "refuses_approval_without_a_person_in_prod" {
  command = plan
  variables {
    environment        = "prod"
    automatic_approval = true
  }
  expect_failures = [var.automatic_approval]
}
