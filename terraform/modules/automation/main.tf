locals {
  place     = "${var.region}:${var.account_id}"
  sagemaker = "arn:${var.partition}:sagemaker:${local.place}"
  machine   = "arn:${var.partition}:states:${local.place}:stateMachine:${var.name}-retraining"
  retrains  = length(var.lambdas) > 0
  monitors  = contains(keys(var.pipelines), "monitoring")

  function = { for lambda in var.lambdas : lambda => "${var.name}-${replace(lambda, "_", "-")}" }
  rules = jsondecode(!local.retrains ? "{}" : templatefile(var.rules_file, {
    bucket              = var.buckets.processed
    model_package_group = var.model_package_group
    state_machine_arn   = local.machine
  }))
  kinds  = local.retrains ? keys(jsondecode(file(var.rules_file))) : []                            # known before anything is made
  states = !local.retrains ? "" : replace(file(var.state_machine_file), "$${...}", "Placeholders") # its comment speaks of them

  notice = [
    { Sid = "Tell", Effect = "Allow", Action = ["sns:Publish"], Resource = [var.topic_arn] },
    { Sid = "TopicKey", Effect = "Allow", Action = ["kms:GenerateDataKey", "kms:Decrypt"], Resource = [var.logs_key_arn] },
  ]
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

# ---- the Lambdas; what each may do stands beside its handler, in policy.json

resource "aws_cloudwatch_log_group" "lambda" {
  for_each          = local.function
  name              = "/aws/lambda/${each.value}"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

resource "aws_iam_role" "lambda" {
  for_each = local.function
  name     = each.value
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Principal = { Service = "lambda.amazonaws.com" }, Action = "sts:AssumeRole" }]
  })
}

resource "aws_iam_role_policy" "lambda" {
  for_each = local.function
  name     = each.value
  role     = aws_iam_role.lambda[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      jsondecode(templatefile("${var.lambdas_folder}/${each.key}/policy.json", {
        partition           = var.partition
        region              = var.region
        account             = var.account_id
        bucket              = var.buckets.processed
        kms_key_arn         = var.data_key_arn
        model_package_group = var.model_package_group
        metrics_namespace   = var.metrics_namespace
        state_machine_arn   = local.machine
        log_group_arn       = "arn:${var.partition}:logs:${local.place}:log-group:/aws/lambda/${each.value}"
      })).Statement,
      [
        { Sid = "DeadLetters", Effect = "Allow", Action = ["sqs:SendMessage"], Resource = ["arn:${var.partition}:sqs:${local.place}:${var.name}-dead-letters"] },
        { Sid = "DeadLettersKey", Effect = "Allow", Action = ["kms:GenerateDataKey", "kms:Decrypt"], Resource = [var.logs_key_arn] },
      ],
    )
  })
}

resource "aws_lambda_function" "this" {
  #checkov:skip=CKV_AWS_117:It calls AWS services only and no address of the network; inside, it would need four more endpoints
  #checkov:skip=CKV_AWS_272:The zip is built and applied from one commit; the deployment role of workflows cannot write functions
  #checkov:skip=CKV_AWS_50:X-Ray takes traces on Resource "*" only, and no role here writes on "*"; the log names each request
  for_each                       = local.function
  function_name                  = each.value
  description                    = "skin-lesion: ${each.key}"
  role                           = aws_iam_role.lambda[each.key].arn
  filename                       = "${var.zips_folder}/${each.key}.zip"
  source_code_hash               = filebase64sha256("${var.zips_folder}/${each.key}.zip")
  handler                        = "handler.handler"
  runtime                        = "python3.12"
  architectures                  = ["arm64"]
  memory_size                    = 512
  timeout                        = 300
  reserved_concurrent_executions = 2
  kms_key_arn                    = var.data_key_arn

  environment {
    variables = merge({
      SKIN_LESION_AWS_REGION              = var.region
      SKIN_LESION_AWS_BUCKET              = var.buckets.processed
      SKIN_LESION_AWS_KMS_KEY             = var.data_key_alias
      SKIN_LESION_AWS_MODEL_PACKAGE_GROUP = var.model_package_group
      SKIN_LESION_SERVING_CAPTURE         = "s3://${var.buckets.capture}"
      SKIN_LESION_SERVING_ENDPOINT        = var.endpoint_name
      SKIN_LESION_RETRAIN_LABELS          = "s3://${var.buckets.processed}/labels/${var.endpoint_name}"
      SKIN_LESION_RETRAIN_AUTOMATIC       = tostring(var.automatic_approval)
      SKIN_LESION_AWS_BUDGET              = tostring(var.monthly_budget_usd)
    }, each.key == "retrain_ask" ? { STATE_MACHINE_ARN = local.machine } : {}, each.key == "publish_metrics" ? { METRICS_NAMESPACE = var.metrics_namespace } : {})
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
      local.notice,
      [
        {
          Sid      = "ItsLambdas"
          Effect   = "Allow"
          Action   = ["lambda:InvokeFunction"]
          Resource = [for lambda, function in local.function : "arn:${var.partition}:lambda:${local.place}:function:${function}" if startswith(lambda, "retrain_") && lambda != "retrain_ask"]
        },
        {
          Sid      = "LookAtPipelines"
          Effect   = "Allow"
          Action   = ["sagemaker:DescribePipelineExecution"]
          Resource = ["${local.sagemaker}:pipeline/${var.name}-*/execution/*"]
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
  #checkov:skip=CKV_AWS_284:X-Ray takes traces on Resource "*" only; the history of an execution shows each step
  #checkov:skip=CKV_AWS_285:The history is logged at level ALL, without its data: events may name pictures
  count    = local.retrains ? 1 : 0
  name     = "${var.name}-retraining"
  role_arn = aws_iam_role.machine[0].arn
  definition = templatestring(local.states, merge(
    { topic = var.topic_arn },
    { for lambda, function in local.function : lambda => "arn:${var.partition}:lambda:${local.place}:function:${function}" },
  ))

  logging_configuration {
    level                  = "ALL"
    include_execution_data = false # events may name pictures
    log_destination        = "${aws_cloudwatch_log_group.machine[0].arn}:*"
  }

  depends_on = [aws_lambda_function.this, aws_iam_role_policy.machine]
}

# ---- who starts it: an event of the monitor, the calendar, a person by the API

resource "aws_iam_role" "starter" {
  for_each = { for kind, service in { event = "events.amazonaws.com", schedule = "scheduler.amazonaws.com" } : kind => service if local.retrains || kind == "schedule" }
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
        Resource = [for name in setintersection(["training", "monitoring", "notebook-jobs"], keys(var.pipelines)) :
        "${local.sagemaker}:pipeline/${var.name}-${name}"]
      }],
    )
  })
}

resource "aws_cloudwatch_event_rule" "start" {
  for_each      = setsubtract(local.kinds, ["lost"])
  name          = "${var.name}-${each.key}"
  description   = "Starts the state machine of retraining: ${each.key}"
  event_pattern = jsonencode(local.rules[each.key])
}

resource "aws_cloudwatch_event_target" "start" {
  for_each  = aws_cloudwatch_event_rule.start
  rule      = each.value.name
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

# The figures of a monitoring run go into CloudWatch when its event.json is there.
resource "aws_cloudwatch_event_target" "metrics" {
  count     = contains(local.kinds, "written") && contains(var.lambdas, "publish_metrics") ? 1 : 0
  rule      = aws_cloudwatch_event_rule.start["written"].name
  target_id = "metrics"
  arn       = aws_lambda_function.this["publish_metrics"].arn
  dead_letter_config {
    arn = aws_sqs_queue.dead.arn
  }
}

resource "aws_lambda_permission" "metrics" {
  count         = length(aws_cloudwatch_event_target.metrics)
  statement_id  = "ByTheRule"
  action        = "lambda:InvokeFunction"
  function_name = aws_lambda_function.this["publish_metrics"].function_name
  principal     = "events.amazonaws.com"
  source_arn    = "arn:${var.partition}:events:${local.place}:rule/${var.name}-written"
}

# What fails or ends badly is told to people at once.
resource "aws_cloudwatch_event_rule" "failure" {
  for_each = merge({ for kind in setintersection(local.kinds, ["lost"]) : "retraining" => local.rules[kind] }, {
    pipeline = { source = ["aws.sagemaker"], detail-type = ["SageMaker Model Building Pipeline Execution Status Change"], detail = { currentPipelineExecutionStatus = ["Failed"] } }
    training = { source = ["aws.sagemaker"], detail-type = ["SageMaker Training Job State Change"], detail = { TrainingJobStatus = ["Failed"] } }
    endpoint = { source = ["aws.sagemaker"], detail-type = ["SageMaker Endpoint State Change"], detail = { EndpointStatus = ["FAILED", "UPDATE_ROLLBACK_FAILED"] } }
  })
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
    input    = local.retrains ? jsonencode({ kind = "schedule", text = "monthly retraining" }) : null
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

# SageMaker refuses an input under which nothing lies: until there are labels and a history, these stand in.
resource "aws_s3_object" "kept" {
  for_each               = local.monitors ? toset(["labels", "monitoring"]) : toset([])
  bucket                 = var.buckets.processed
  key                    = "${each.value}/${var.endpoint_name}/.keep"
  content                = "\n"
  server_side_encryption = "aws:kms"
  kms_key_id             = var.data_key_arn
}

# By hand: POST /retrain {"reason": "..."}, signed with the caller's credentials.
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
  integration_uri        = aws_lambda_function.this["retrain_ask"].invoke_arn
  payload_format_version = "2.0"
}

resource "aws_lambda_permission" "retrain" {
  count         = local.retrains ? 1 : 0
  statement_id  = "ByTheRoute"
  action        = "lambda:InvokeFunction"
  function_name = aws_lambda_function.this["retrain_ask"].function_name
  principal     = "apigateway.amazonaws.com"
  source_arn    = "${aws_apigatewayv2_api.this[0].execution_arn}/*/POST/retrain"
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
