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

variable "data_key_arn" {
  description = "ARN of the KMS key of the data."
  type        = string
  validation {
    condition     = startswith(var.data_key_arn, "arn:")
    error_message = "data_key_arn must be an ARN."
  }
}

variable "topic_arn" {
  description = "ARN of the SNS topic that people are told by."
  type        = string
  validation {
    condition     = startswith(var.topic_arn, "arn:")
    error_message = "topic_arn must be an ARN."
  }
}

variable "buckets" {
  description = "Kind of data to name of its bucket, of module storage."
  type        = map(string)
  validation {
    condition     = length(setsubtract(["raw", "processed", "models", "capture", "reports"], keys(var.buckets))) == 0
    error_message = "buckets must have raw, processed, models, capture and reports."
  }
}

variable "lambdas" {
  description = "Lambda (a folder of terraform/lambdas) to its zip file, made by `make lambdas`."
  type        = map(string)
  validation {
    condition     = alltrue([for zip in values(var.lambdas) : endswith(zip, ".zip")])
    error_message = "lambdas must be zip files."
  }
}

variable "state_machine" {
  description = "The retraining state machine in Amazon States Language, as it is committed; empty: there is none."
  type        = string
  validation {
    condition     = var.state_machine == "" || can(jsondecode(var.state_machine).States)
    error_message = "state_machine must be JSON with States, or empty."
  }
}

variable "pipelines" {
  description = "Pipeline to its ARN, of module sagemaker."
  type        = map(string)
  validation {
    condition     = contains(keys(var.pipelines), "training")
    error_message = "pipelines must have training."
  }
}


variable "model_package_group" {
  description = "Model package group: setting aws.model_package_group."
  type        = string
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", var.model_package_group))
    error_message = "model_package_group must be 1 to 63 letters, digits or hyphens."
  }
}

variable "retraining_schedule" {
  description = "When retraining starts by itself, in EventBridge Scheduler's form."
  type        = string
  default     = "cron(0 3 1 * ? *)"
  validation {
    condition     = can(regex("^(cron|rate)\\(.+\\)$", var.retraining_schedule))
    error_message = "retraining_schedule must be cron(...) or rate(...), such as cron(0 3 1 * ? *)."
  }
}

variable "monitoring_schedule" {
  description = "When the monitor looks at what was captured, in EventBridge Scheduler's form."
  type        = string
  default     = "cron(30 2 * * ? *)"
  validation {
    condition     = can(regex("^(cron|rate)\\(.+\\)$", var.monitoring_schedule))
    error_message = "monitoring_schedule must be cron(...) or rate(...), such as cron(30 2 * * ? *)."
  }
}

variable "schedules_enabled" {
  description = "Whether the schedules start anything."
  type        = bool
  default     = true
  validation {
    condition     = var.schedules_enabled != null
    error_message = "schedules_enabled must be true or false."
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

