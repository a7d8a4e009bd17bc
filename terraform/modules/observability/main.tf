locals {
  place = "${var.region}:${var.account_id}"
  topic = "arn:${var.partition}:sns:${local.place}:${var.name}-alarms"
  trail = "arn:${var.partition}:cloudtrail:${local.place}:trail/${var.name}"
  of    = { EndpointName = var.endpoint_name, VariantName = "main" }
}

# ---- people

resource "aws_sns_topic" "alarms" {
  name              = "${var.name}-alarms"
  kms_master_key_id = var.logs_key_arn
}

resource "aws_sns_topic_policy" "alarms" {
  arn = aws_sns_topic.alarms.arn
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid       = "ServicesOfThisAccount"
        Effect    = "Allow"
        Principal = { Service = ["cloudwatch.amazonaws.com", "events.amazonaws.com", "budgets.amazonaws.com"] }
        Action    = "sns:Publish"
        Resource  = local.topic
        Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
      },
      {
        Sid       = "OnlyByTLS"
        Effect    = "Deny"
        Principal = "*"
        Action    = "sns:Publish"
        Resource  = local.topic
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      },
    ]
  })
}

resource "aws_sns_topic_subscription" "email" {
  count     = var.email == "" ? 0 : 1
  topic_arn = aws_sns_topic.alarms.arn
  protocol  = "email"
  endpoint  = var.email
}

# ---- logs of the jobs; SageMaker would make these groups itself, without key and for ever

resource "aws_cloudwatch_log_group" "sagemaker" {
  for_each          = toset(["ProcessingJobs", "TrainingJobs", "Endpoints/${var.endpoint_name}", "studio"])
  name              = "/aws/sagemaker/${each.value}"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

# ---- alarms: each tells people, also when it is over

locals {
  own = { Endpoint = var.endpoint_name } # as the monitor names it
  alarms = {
    latency-p99 = {
      says = "p99 of the model's latency is above ${var.latency_p99_ms} ms"
      ns   = "AWS/SageMaker", metric = "ModelLatency", extended = "p99", dimensions = local.of
      over = true, limit = var.latency_p99_ms * 1000, period = 300, times = 3
    }
    errors-5xx = {
      says = "${var.errors_5xx} answers or more are 5xx in 5 minutes"
      ns   = "AWS/SageMaker", metric = "Invocation5XXErrors", statistic = "Sum", dimensions = local.of
      over = true, limit = var.errors_5xx, period = 300, times = 1
    }
    drift = {
      says = "The monitor found drift: the pictures are not those that the model was trained on"
      ns   = var.metrics_namespace, metric = "drift_alarm", statistic = "Maximum", dimensions = local.own
      over = true, limit = 1, period = 3600, times = 1
    }
    balanced-accuracy = {
      says = "Balanced accuracy on late labels is below ${var.balanced_accuracy_floor}"
      ns   = var.metrics_namespace, metric = "quality_balanced_accuracy", statistic = "Minimum", dimensions = local.own
      over = false, limit = var.balanced_accuracy_floor, period = 3600, times = 1
    }
    melanoma-sensitivity = {
      says = "Fewer melanomas than ${var.melanoma_sensitivity_floor} are called melanoma"
      ns   = var.metrics_namespace, metric = "quality_sensitivity_MEL", statistic = "Minimum", dimensions = local.own
      over = false, limit = var.melanoma_sensitivity_floor, period = 3600, times = 1
    }
    dead-letters = {
      says = "An event or a call of a Lambda could not be delivered"
      ns   = "AWS/SQS", metric = "ApproximateNumberOfMessagesVisible", statistic = "Maximum", dimensions = { QueueName = "${var.name}-dead-letters" }
      over = true, limit = 1, period = 300, times = 1
    }
    break-glass = {
      says = "Somebody took the role of an emergency, or tried to: ${var.name}-break-glass"
      ns   = "${var.metrics_namespace}/audit", metric = "break_glass", statistic = "Sum", dimensions = {}
      over = true, limit = 1, period = 300, times = 1
    }
  }
  failures = merge(
    { for name in var.pipelines : "failed-${name}" => {
      says = "The pipeline ${name} failed"
      ns   = "AWS/Sagemaker/ModelBuildingPipeline", metric = "ExecutionFailed", statistic = "Sum", dimensions = { PipelineName = "${var.name}-${name}" }
      over = true, limit = 1, period = 300, times = 1
    } },
    { failed-retraining = {
      says = "The state machine of retraining failed"
      ns   = "AWS/States", metric = "ExecutionsFailed", statistic = "Sum", dimensions = { StateMachineArn = "arn:${var.partition}:states:${local.place}:stateMachine:${var.name}-retraining" }
      over = true, limit = 1, period = 300, times = 1
    } },
  )
}

resource "aws_cloudwatch_metric_alarm" "this" {
  for_each            = merge(local.alarms, local.failures)
  alarm_name          = "${var.name}-watch-${each.key}"
  alarm_description   = each.value.says
  namespace           = each.value.ns
  metric_name         = each.value.metric
  statistic           = lookup(each.value, "statistic", null)
  extended_statistic  = lookup(each.value, "extended", null)
  dimensions          = each.value.dimensions
  comparison_operator = each.value.over ? "GreaterThanOrEqualToThreshold" : "LessThanThreshold"
  threshold           = each.value.limit
  period              = each.value.period
  evaluation_periods  = each.value.times
  treat_missing_data  = "notBreaching"
  alarm_actions       = [aws_sns_topic.alarms.arn]
  ok_actions          = [aws_sns_topic.alarms.arn]
}

# ---- cost. AWS counts it in us-east-1 only, where an alarm of this region sees nothing: the budget is the alarm.

resource "aws_budgets_budget" "month" {
  name         = "${var.name}-month"
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = tostring(var.monthly_budget_usd)
  limit_unit   = "USD"

  cost_filter {
    name   = "TagKeyValue"
    values = ["user:project$skin-lesion"]
  }

  notification {
    notification_type         = "FORECASTED"
    comparison_operator       = "GREATER_THAN"
    threshold                 = 80
    threshold_type            = "PERCENTAGE"
    subscriber_sns_topic_arns = [aws_sns_topic.alarms.arn]
  }

  notification {
    notification_type         = "ACTUAL"
    comparison_operator       = "GREATER_THAN"
    threshold                 = 100
    threshold_type            = "PERCENTAGE"
    subscriber_sns_topic_arns = [aws_sns_topic.alarms.arn]
  }

  depends_on = [aws_sns_topic_policy.alarms]
}

# ---- audit: every call of the account, and every read and write of an object of the data

resource "aws_cloudtrail" "this" {
  #checkov:skip=CKV_AWS_252:A notice for every delivered file helps nobody; alarms go by the topic
  name                          = var.name
  s3_bucket_name                = var.buckets.logs
  s3_key_prefix                 = "trail"
  kms_key_id                    = var.logs_key_arn
  enable_log_file_validation    = true
  is_multi_region_trail         = true
  include_global_service_events = true
  cloud_watch_logs_group_arn    = "${aws_cloudwatch_log_group.trail.arn}:*"
  cloud_watch_logs_role_arn     = aws_iam_role.trail.arn

  event_selector {
    read_write_type           = "All"
    include_management_events = true
    data_resource {
      type   = "AWS::S3::Object"
      values = [for kind in ["raw", "processed", "models", "capture", "reports"] : "arn:${var.partition}:s3:::${var.buckets[kind]}/"]
    }
  }

  depends_on = [aws_iam_role_policy.trail]
}

resource "aws_cloudwatch_log_group" "trail" {
  name              = "/${var.name}/trail"
  kms_key_id        = var.logs_key_arn
  retention_in_days = var.log_retention_days
}

resource "aws_cloudwatch_log_metric_filter" "break_glass" {
  name           = "${var.name}-break-glass"
  log_group_name = aws_cloudwatch_log_group.trail.name
  pattern        = "{ $.eventName = \"AssumeRole\" && $.requestParameters.roleArn = \"arn:${var.partition}:iam::${var.account_id}:role/${var.name}-break-glass\" }"
  metric_transformation {
    name      = "break_glass"
    namespace = "${var.metrics_namespace}/audit"
    value     = "1"
  }
}

resource "aws_iam_role" "trail" {
  name = "${var.name}-trail"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "cloudtrail.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceArn" = local.trail } }
    }]
  })
}

resource "aws_iam_role_policy" "trail" {
  name = "write-trail"
  role = aws_iam_role.trail.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid      = "ItsOwnLogGroup"
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:PutLogEvents"]
      Resource = ["arn:${var.partition}:logs:${local.place}:log-group:/${var.name}/trail:*"]
    }]
  })
}

# ---- one page for all of it

locals {
  endpoint = ["EndpointName", var.endpoint_name, "VariantName", "main"]
  quality  = ["Endpoint", var.endpoint_name]
  widgets = [
    { title = "Model: accuracy, precision and recall (sensitivity) on late labels", stat = "Average", metrics = [for m in ["accuracy", "accuracy_estimated", "balanced_accuracy", "precision_MEL", "sensitivity_MEL", "precision_BCC", "sensitivity_BCC", "precision_SCC", "sensitivity_SCC", "precision_NV", "sensitivity_NV"] : concat([var.metrics_namespace, "quality_${m}"], local.quality)] },
    { title = "Latency of the model: p50, p95, p99 (microseconds)", stat = "p50", metrics = [for p in ["p50", "p95", "p99"] : concat(["AWS/SageMaker", "ModelLatency"], local.endpoint, [{ stat = p, label = p }])] },
    { title = "Endpoint: utilisation of processor and memory (%)", stat = "Average", metrics = [for m in ["CPUUtilization", "MemoryUtilization", "DiskUtilization"] : concat(["/aws/sagemaker/Endpoints", m], local.endpoint)] },
    { title = "Endpoint: requests and errors", stat = "Sum", metrics = [for m in ["Invocations", "Invocation4XXErrors", "Invocation5XXErrors"] : concat(["AWS/SageMaker", m], local.endpoint)] },
    { title = "Training: executions of the pipelines", stat = "Sum", metrics = concat([for name in var.pipelines : [for m in ["ExecutionStarted", "ExecutionSucceeded", "ExecutionFailed"] : ["AWS/Sagemaker/ModelBuildingPipeline", m, "PipelineName", "${var.name}-${name}"]]]...) },
    { title = "Drift: effects of the newest window, and alarms", stat = "Maximum", metrics = [for m in ["alarm", "features", "diagnosis", "decision", "confidence", "brightness", "sharpness", "skin_tone", "hair"] : concat([var.metrics_namespace, "drift_${m}"], local.quality)] },
    { title = "Cost of the month so far (US dollars)", stat = "Maximum", region = "us-east-1", metrics = [["AWS/Billing", "EstimatedCharges", "Currency", "USD"]] },
  ]
}

resource "aws_cloudwatch_dashboard" "this" {
  dashboard_name = var.name
  dashboard_body = jsonencode({
    widgets = concat(
      [{
        type = "alarm", x = 0, y = 0, width = 24, height = 3
        properties = {
          title  = "Alarms"
          alarms = [for name in keys(merge(local.alarms, local.failures)) : "arn:${var.partition}:cloudwatch:${local.place}:alarm:${var.name}-watch-${name}"]
        }
      }],
      [for n, widget in local.widgets : {
        type = "metric", x = (n % 2) * 12, y = 3 + floor(n / 2) * 6, width = 12, height = 6
        properties = {
          title  = widget.title, region = lookup(widget, "region", var.region), view = "timeSeries"
          period = 300, stat = widget.stat, metrics = widget.metrics
        }
      }],
    )
  })
}
