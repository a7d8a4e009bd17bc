locals {
  place     = "${var.region}:${var.account_id}"
  sagemaker = "arn:${var.partition}:sagemaker:${local.place}"
  machine   = "arn:${var.partition}:states:${local.place}:stateMachine:${var.name}-retraining"
  packages  = ["${local.sagemaker}:model-package-group/${var.model_package_group}", "${local.sagemaker}:model-package/${var.model_package_group}/*"]
  runs      = ["${local.sagemaker}:pipeline/${var.name}-training", "${local.sagemaker}:pipeline/${var.name}-training/execution/*"]
  retrains  = var.state_machine != ""
  monitors  = contains(keys(var.pipelines), "monitoring")

  read_objects = [
    { Sid = "ReadResults", Effect = "Allow", Action = ["s3:GetObject"], Resource = [for kind in ["processed", "models", "reports"] : "arn:${var.partition}:s3:::${var.buckets[kind]}/*"] },
    { Sid = "ListResults", Effect = "Allow", Action = ["s3:ListBucket"], Resource = [for kind in ["processed", "models", "reports", "capture"] : "arn:${var.partition}:s3:::${var.buckets[kind]}"] },
    { Sid = "DataKey", Effect = "Allow", Action = ["kms:Decrypt", "kms:GenerateDataKey"], Resource = [var.data_key_arn] },
  ]
  read_packages = [
    { Sid = "ReadPackages", Effect = "Allow", Action = ["sagemaker:ListModelPackages", "sagemaker:DescribeModelPackage"], Resource = local.packages },
  ]
  notice = [
    { Sid = "Tell", Effect = "Allow", Action = ["sns:Publish"], Resource = [var.topic_arn] },
    { Sid = "TopicKey", Effect = "Allow", Action = ["kms:GenerateDataKey", "kms:Decrypt"], Resource = [var.logs_key_arn] },
  ]

  # What each Lambda may do, beside writing its own log. A folder of terraform/lambdas without a row here is refused.
  policies = {
    guard = concat(local.read_objects, local.read_packages, [
      { Sid = "WhatRuns", Effect = "Allow", Action = ["sagemaker:ListPipelineExecutions", "sagemaker:DescribePipelineExecution"], Resource = local.runs },
      { Sid = "WhatRan", Effect = "Allow", Action = ["states:ListExecutions"], Resource = [local.machine] },
      { Sid = "Cost", Effect = "Allow", Action = ["ce:GetCostAndUsage"], Resource = ["*"] },
      { Sid = "Record", Effect = "Allow", Action = ["s3:PutObject"], Resource = ["arn:${var.partition}:s3:::${var.buckets.reports}/retraining/*"] },
    ])
    start = concat(local.read_objects, local.read_packages, [
      { Sid = "Start", Effect = "Allow", Action = ["sagemaker:StartPipelineExecution", "sagemaker:DescribePipelineExecution", "sagemaker:ListPipelineExecutionSteps"], Resource = local.runs },
      { Sid = "PublishChampion", Effect = "Allow", Action = ["s3:PutObject"], Resource = ["arn:${var.partition}:s3:::${var.buckets.processed}/champion/*"] },
    ])
    compare = concat(local.read_objects, local.read_packages, [
      { Sid = "HowItEnded", Effect = "Allow", Action = ["sagemaker:DescribePipelineExecution", "sagemaker:ListPipelineExecutionSteps"], Resource = local.runs },
    ])
    promote = concat(local.read_objects, local.read_packages, [
      { Sid = "Approve", Effect = "Allow", Action = ["sagemaker:UpdateModelPackage"], Resource = local.packages },
      { Sid = "Deploy", Effect = "Allow", Action = ["sagemaker:StartPipelineExecution"], Resource = ["${local.sagemaker}:pipeline/${var.name}-deploy"] },
    ])
    notify = local.notice
  }
}

resource "aws_sqs_queue" "dead" {
  name                      = "${var.name}-dead-letters"
  kms_master_key_id         = var.logs_key_arn
  message_retention_seconds = 1209600
}

resource "aws_sqs_queue_policy" "dead" {
  queue_url = aws_sqs_queue.dead.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid       = "RulesOfThisAccount"
        Effect    = "Allow"
        Principal = { Service = "events.amazonaws.com" }
        Action    = "sqs:SendMessage"
        Resource  = "arn:${var.partition}:sqs:${local.place}:${var.name}-dead-letters"
        Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
      },
      {
        Sid       = "OnlyByTLS"
        Effect    = "Deny"
        Principal = "*"
        Action    = "sqs:*"
        Resource  = "arn:${var.partition}:sqs:${local.place}:${var.name}-dead-letters"
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      },
    ]
  })
}

# ---- the Lambdas

resource "aws_cloudwatch_log_group" "lambda" {
  for_each          = var.lambdas
  name              = "/aws/lambda/${var.name}-${each.key}"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

resource "aws_iam_role" "lambda" {
  for_each = var.lambdas
  name     = "${var.name}-lambda-${each.key}"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Principal = { Service = "lambda.amazonaws.com" }, Action = "sts:AssumeRole" }]
  })
}

resource "aws_iam_role_policy" "lambda" {
  for_each = var.lambdas
  name     = each.key
  role     = aws_iam_role.lambda[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(lookup(local.policies, each.key, []), [
      {
        Sid      = "OwnLog"
        Effect   = "Allow"
        Action   = ["logs:CreateLogStream", "logs:PutLogEvents"]
        Resource = ["arn:${var.partition}:logs:${local.place}:log-group:/aws/lambda/${var.name}-${each.key}:*"]
      },
      { Sid = "DeadLetters", Effect = "Allow", Action = ["sqs:SendMessage"], Resource = ["arn:${var.partition}:sqs:${local.place}:${var.name}-dead-letters"] },
      { Sid = "LogsKey", Effect = "Allow", Action = ["kms:GenerateDataKey", "kms:Decrypt"], Resource = [var.logs_key_arn] },
    ])
  })
  lifecycle {
    precondition {
      condition     = contains(keys(local.policies), each.key)
      error_message = "The Lambda ${each.key} has no policy: add what it may do to local.policies of modules/automation."
    }
  }
}

resource "aws_lambda_function" "this" {
  for_each                       = var.lambdas
  function_name                  = "${var.name}-${each.key}"
  description                    = "Retraining: ${each.key}"
  role                           = aws_iam_role.lambda[each.key].arn
  filename                       = each.value
  source_code_hash               = filebase64sha256(each.value)
  handler                        = "handler.handler"
  runtime                        = "python3.12"
  architectures                  = ["arm64"]
  memory_size                    = 512
  timeout                        = 300
  reserved_concurrent_executions = 2
  kms_key_arn                    = var.data_key_arn

  environment {
    variables = {
      SKIN_LESION_AWS_REGION              = var.region
      SKIN_LESION_AWS_BUCKET              = var.buckets.processed
      SKIN_LESION_AWS_KMS_KEY             = var.data_key_arn
      SKIN_LESION_AWS_MODEL_PACKAGE_GROUP = var.model_package_group
      REPORTS_BUCKET                      = var.buckets.reports
      MODELS_BUCKET                       = var.buckets.models
      STATE_MACHINE_ARN                   = local.machine
      TOPIC_ARN                           = var.topic_arn
    }
  }

  dead_letter_config {
    target_arn = aws_sqs_queue.dead.arn
  }

  depends_on = [aws_cloudwatch_log_group.lambda, aws_iam_role_policy.lambda]
}

# ---- the state machine: guard, train, compare, promote, notify

resource "aws_cloudwatch_log_group" "machine" {
  count             = local.retrains ? 1 : 0
  name              = "/aws/vendedlogs/states/${var.name}-retraining"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

resource "aws_iam_role" "machine" {
  count = local.retrains ? 1 : 0
  name  = "${var.name}-retraining"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "states.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "machine" {
  count = local.retrains ? 1 : 0
  name  = "retraining"
  role  = aws_iam_role.machine[0].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      length(var.lambdas) == 0 ? [] : [{
        Sid      = "ItsLambdas"
        Effect   = "Allow"
        Action   = ["lambda:InvokeFunction"]
        Resource = [for name in keys(var.lambdas) : "arn:${var.partition}:lambda:${local.place}:function:${var.name}-${name}"]
      }],
      local.notice,
      [
        {
          Sid      = "PipelinesDirectly"
          Effect   = "Allow"
          Action   = ["sagemaker:StartPipelineExecution", "sagemaker:DescribePipelineExecution"]
          Resource = flatten([for name in keys(var.pipelines) : ["${local.sagemaker}:pipeline/${var.name}-${name}", "${local.sagemaker}:pipeline/${var.name}-${name}/execution/*"]])
        },
        {
          # CloudWatch Logs knows no resource for these, which hand a log group to a service
          Sid       = "LogDelivery"
          Effect    = "Allow"
          Action    = ["logs:CreateLogDelivery", "logs:GetLogDelivery", "logs:UpdateLogDelivery", "logs:DeleteLogDelivery", "logs:ListLogDeliveries", "logs:PutResourcePolicy", "logs:DescribeResourcePolicies", "logs:DescribeLogGroups"]
          Resource  = ["*"]
          Condition = { StringEquals = { "aws:RequestedRegion" = var.region } }
        },
    ])
  })
}

resource "aws_sfn_state_machine" "retraining" {
  count      = local.retrains ? 1 : 0
  name       = "${var.name}-retraining"
  role_arn   = aws_iam_role.machine[0].arn
  definition = replace(replace(replace(var.state_machine, "000000000000", var.account_id), "eu-west-1", var.region), ":function:skin-lesion-", ":function:${var.name}-")

  logging_configuration {
    level                  = "ALL"
    include_execution_data = false # events may name pictures
    log_destination        = "${aws_cloudwatch_log_group.machine[0].arn}:*"
  }

  depends_on = [aws_lambda_function.this, aws_iam_role_policy.machine]
}

# ---- who starts it: an event of the monitor, the calendar, a person by the API

resource "aws_iam_role" "starter" {
  for_each = { for kind, service in { event = "events.amazonaws.com", schedule = "scheduler.amazonaws.com", api = "apigateway.amazonaws.com" } : kind => service if local.retrains || kind == "schedule" }
  name     = "${var.name}-start-by-${each.key}"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = each.value }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "starter" {
  for_each = aws_iam_role.starter
  name     = "start"
  role     = each.value.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      local.retrains ? [{ Sid = "Retraining", Effect = "Allow", Action = ["states:StartExecution"], Resource = [local.machine] }] : [],
      each.key != "schedule" ? [] : [{
        Sid    = "PipelinesByTheCalendar"
        Effect = "Allow"
        Action = ["sagemaker:StartPipelineExecution"]
        Resource = [for name in setintersection(["training", "monitoring"], keys(var.pipelines)) :
        "${local.sagemaker}:pipeline/${var.name}-${name}"]
      }],
    )
  })
}

resource "aws_cloudwatch_event_rule" "drift" {
  count         = local.retrains ? 1 : 0
  name          = "${var.name}-drift"
  description   = "The monitor found drift, or quality below the baseline"
  event_pattern = jsonencode({ source = ["skin-lesion.monitor"] })
}

resource "aws_cloudwatch_event_target" "drift" {
  count     = local.retrains ? 1 : 0
  rule      = aws_cloudwatch_event_rule.drift[0].name
  target_id = "retraining"
  arn       = aws_sfn_state_machine.retraining[0].arn
  role_arn  = aws_iam_role.starter["event"].arn
  dead_letter_config {
    arn = aws_sqs_queue.dead.arn
  }
  retry_policy {
    maximum_event_age_in_seconds = 3600
    maximum_retry_attempts       = 3
  }
}

# What fails or ends badly is told to people at once.
resource "aws_cloudwatch_event_rule" "failure" {
  for_each = {
    pipeline = { source = ["aws.sagemaker"], detail-type = ["SageMaker Model Building Pipeline Execution Status Change"], detail = { currentPipelineExecutionStatus = ["Failed"] } }
    training = { source = ["aws.sagemaker"], detail-type = ["SageMaker Training Job State Change"], detail = { TrainingJobStatus = ["Failed"] } }
    endpoint = { source = ["aws.sagemaker"], detail-type = ["SageMaker Endpoint State Change"], detail = { EndpointStatus = ["FAILED", "UPDATE_ROLLBACK_FAILED"] } }
  }
  name          = "${var.name}-${each.key}-failed"
  description   = "A ${each.key} failed"
  event_pattern = jsonencode(each.value)
}

resource "aws_cloudwatch_event_target" "failure" {
  for_each  = aws_cloudwatch_event_rule.failure
  rule      = each.value.name
  target_id = "people"
  arn       = var.topic_arn
}

# Monthly retraining: through the state machine, with its guards, where there is one; else the pipeline itself.
resource "aws_scheduler_schedule" "retraining" {
  name                = "${var.name}-retraining"
  description         = "Monthly retraining"
  state               = var.schedules_enabled ? "ENABLED" : "DISABLED"
  schedule_expression = var.retraining_schedule
  kms_key_arn         = var.data_key_arn
  flexible_time_window {
    mode                      = "FLEXIBLE"
    maximum_window_in_minutes = 60
  }
  target {
    arn      = local.retrains ? local.machine : var.pipelines["training"]
    role_arn = aws_iam_role.starter["schedule"].arn
    input    = local.retrains ? jsonencode({ source = "schedule", reason = "monthly retraining" }) : null
    retry_policy {
      maximum_retry_attempts       = 3
      maximum_event_age_in_seconds = 3600
    }
  }
  depends_on = [aws_sfn_state_machine.retraining]
}

resource "aws_scheduler_schedule" "monitoring" {
  count               = local.monitors ? 1 : 0
  name                = "${var.name}-monitoring"
  description         = "The monitor looks at what was captured"
  state               = var.schedules_enabled ? "ENABLED" : "DISABLED"
  schedule_expression = var.monitoring_schedule
  kms_key_arn         = var.data_key_arn
  flexible_time_window {
    mode = "OFF"
  }
  target {
    arn      = var.pipelines["monitoring"]
    role_arn = aws_iam_role.starter["schedule"].arn
    retry_policy {
      maximum_retry_attempts       = 3
      maximum_event_age_in_seconds = 3600
    }
  }
}

# By hand: POST /retrain {"source": "api", "reason": "..."} signed with the caller's credentials.
resource "aws_apigatewayv2_api" "this" {
  count         = local.retrains ? 1 : 0
  name          = var.name
  description   = "Retraining by hand"
  protocol_type = "HTTP"
}

resource "aws_apigatewayv2_integration" "retrain" {
  count                  = local.retrains ? 1 : 0
  api_id                 = aws_apigatewayv2_api.this[0].id
  integration_type       = "AWS_PROXY"
  integration_subtype    = "StepFunctions-StartExecution"
  credentials_arn        = aws_iam_role.starter["api"].arn
  payload_format_version = "1.0"
  request_parameters = {
    StateMachineArn = aws_sfn_state_machine.retraining[0].arn
    Input           = "$request.body"
  }
}

resource "aws_apigatewayv2_route" "retrain" {
  count              = local.retrains ? 1 : 0
  api_id             = aws_apigatewayv2_api.this[0].id
  route_key          = "POST /retrain"
  authorization_type = "AWS_IAM"
  target             = "integrations/${aws_apigatewayv2_integration.retrain[0].id}"
}

resource "aws_cloudwatch_log_group" "api" {
  count             = local.retrains ? 1 : 0
  name              = "/aws/vendedlogs/api/${var.name}"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

resource "aws_apigatewayv2_stage" "this" {
  count       = local.retrains ? 1 : 0
  api_id      = aws_apigatewayv2_api.this[0].id
  name        = "$default"
  auto_deploy = true
  default_route_settings {
    throttling_burst_limit = 5
    throttling_rate_limit  = 1
  }
  access_log_settings {
    destination_arn = aws_cloudwatch_log_group.api[0].arn
    format          = jsonencode({ time = "$context.requestTime", caller = "$context.identity.userArn", route = "$context.routeKey", status = "$context.status", request = "$context.requestId" })
  }
}
