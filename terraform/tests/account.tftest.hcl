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

run "refuses_an_unknown_environment" {
  command = plan
  variables {
    environment = "production"
  }
  expect_failures = [var.environment]
}

run "refuses_a_moving_tag" {
  command = plan
  variables {
    image_tag = "latest"
  }
  expect_failures = [var.image_tag]
}

run "refuses_a_network_that_is_too_small" {
  command = plan
  variables {
    cidr = "10.0.0.0/28"
  }
  expect_failures = [var.cidr]
}

run "refuses_one_zone" {
  command = plan
  variables {
    zones = ["a"]
  }
  expect_failures = [var.zones]
}

run "refuses_a_network_without_the_way_to_sagemaker" {
  command = plan
  variables {
    services = ["logs"]
  }
  expect_failures = [var.services]
}

run "refuses_a_retention_that_cloudwatch_does_not_offer" {
  command = plan
  variables {
    log_retention_days = 7
  }
  expect_failures = [var.log_retention_days]
}

run "refuses_a_schedule_that_is_none" {
  command = plan
  variables {
    retraining_schedule = "every month"
  }
  expect_failures = [var.retraining_schedule]
}

run "refuses_a_budget_of_nothing" {
  command = plan
  variables {
    monthly_budget_usd = 0
  }
  expect_failures = [var.monthly_budget_usd]
}

run "refuses_a_repository_without_owner" {
  command = plan
  variables {
    github_repository = "skin-lesion"
  }
  expect_failures = [var.github_repository]
}

run "refuses_metrics_in_the_name_of_aws" {
  command = plan
  variables {
    metrics_namespace = "AWS/SageMaker"
  }
  expect_failures = [var.metrics_namespace]
}

run "refuses_a_name_that_is_no_address" {
  command = plan
  variables {
    email = "people"
  }
  expect_failures = [var.email]
}
