variable "name" {
  description = "Beginning of every name, e.g. skin-lesion."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "name must be 3 to 21 lower-case letters, digits or hyphens, and begin with a letter."
  }
}

variable "account_id" {
  description = "The account, 12 digits."
  type        = string
  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id must be 12 digits."
  }
}

variable "partition" {
  description = "aws, aws-cn or aws-us-gov."
  type        = string
  validation {
    condition     = contains(["aws", "aws-cn", "aws-us-gov"], var.partition)
    error_message = "partition must be aws, aws-cn or aws-us-gov."
  }
}

variable "region" {
  description = "Region, e.g. eu-west-1."
  type        = string
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be the name of an AWS region, such as eu-west-1."
  }
}

variable "logs_key_arn" {
  description = "ARN of the KMS key of logs, topics and queues."
  type        = string
  validation {
    condition     = startswith(var.logs_key_arn, "arn:")
    error_message = "logs_key_arn must be an ARN."
  }
}

variable "buckets" {
  description = "Kind of data to name of its bucket, of module storage."
  type        = map(string)
  validation {
    condition     = length(setsubtract(["raw", "processed", "models", "capture", "reports", "logs"], keys(var.buckets))) == 0
    error_message = "buckets must have raw, processed, models, capture, reports and logs."
  }
}

variable "email" {
  description = "Address that alarms and budget notices are sent to; empty: people subscribe to the topic themselves."
  type        = string
  default     = ""
  validation {
    condition     = var.email == "" || can(regex("^[^@ ]+@[^@ ]+\\.[^@ ]+$", var.email))
    error_message = "email must be an address, or empty."
  }
}

variable "endpoint_name" {
  description = "Name of the endpoint: setting serving.endpoint."
  type        = string
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", var.endpoint_name))
    error_message = "endpoint_name must be 1 to 63 letters, digits or hyphens."
  }
}

variable "pipelines" {
  description = "Names of the pipelines, without the beginning."
  type        = list(string)
  validation {
    condition     = contains(var.pipelines, "training")
    error_message = "pipelines must have training."
  }
}

variable "metrics_namespace" {
  description = "CloudWatch namespace of the monitor's own figures."
  type        = string
  validation {
    condition     = !startswith(var.metrics_namespace, "AWS/") && length(var.metrics_namespace) > 0
    error_message = "metrics_namespace must not be empty, and not one of AWS's own."
  }
}

variable "latency_p99_ms" {
  description = "Milliseconds: p99 of the model's latency above this for 15 minutes is an alarm."
  type        = number
  default     = 2000
  validation {
    condition     = var.latency_p99_ms > 0
    error_message = "latency_p99_ms must be above 0."
  }
}

variable "errors_5xx" {
  description = "Answers 5xx in 5 minutes: this many are an alarm."
  type        = number
  default     = 5
  validation {
    condition     = var.errors_5xx >= 1
    error_message = "errors_5xx must be at least 1."
  }
}

variable "balanced_accuracy_floor" {
  description = "Balanced accuracy on late labels below this is an alarm: setting gate.balanced_accuracy_low."
  type        = number
  default     = 0.5
  validation {
    condition     = var.balanced_accuracy_floor > 0 && var.balanced_accuracy_floor < 1
    error_message = "balanced_accuracy_floor must be between 0 and 1."
  }
}

variable "melanoma_sensitivity_floor" {
  description = "Share of melanomas that are called melanoma; below it is an alarm: setting gate.melanoma_sensitivity."
  type        = number
  default     = 0.5
  validation {
    condition     = var.melanoma_sensitivity_floor > 0 && var.melanoma_sensitivity_floor < 1
    error_message = "melanoma_sensitivity_floor must be between 0 and 1."
  }
}

variable "monthly_budget_usd" {
  description = "US dollars a month; notices at 80% forecast and 100% spent, an alarm at 100%."
  type        = number
  default     = 500
  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd must be above 0."
  }
}

variable "log_retention_days" {
  description = "Days that logs are kept."
  type        = number
  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_retention_days)
    error_message = "log_retention_days must be one that CloudWatch offers, and at least 30."
  }
}

