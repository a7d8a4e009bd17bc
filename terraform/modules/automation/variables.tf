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


variable "lambdas" {
  description = "Folders of lambdas_folder, each a function: retrain_guard is the function <name>-retrain-guard."
  type        = list(string)
  validation {
    condition     = alltrue([for l in var.lambdas : can(regex("^[a-z][a-z_]*$", l))])
    error_message = "lambdas must be lower-case names with underscores."
  }
}

variable "lambdas_folder" {
  description = "Folder of the Lambdas, each with handler.py and policy.json, what it may do."
  type        = string
  validation {
    condition     = length(var.lambdas_folder) > 0
    error_message = "lambdas_folder must be a folder."
  }
}

variable "zips_folder" {
  description = "Folder of their zip files, made by `make lambdas`."
  type        = string
  validation {
    condition     = length(var.zips_folder) > 0
    error_message = "zips_folder must be a folder."
  }
}

variable "state_machine_file" {
  description = "The retraining state machine, pipelines/retraining.asl.json. Without Lambdas there is no state machine."
  type        = string
  validation {
    condition     = endswith(var.state_machine_file, ".asl.json")
    error_message = "state_machine_file must end in .asl.json."
  }
}

variable "rules_file" {
  description = "Which events start it and which one, lost, tells people: pipelines/retraining.rules.json."
  type        = string
  validation {
    condition     = endswith(var.rules_file, ".json")
    error_message = "rules_file must end in .json."
  }
}

variable "data_key_alias" {
  description = "Alias of the key of the data: setting aws.kms_key."
  type        = string
  validation {
    condition     = startswith(var.data_key_alias, "alias/")
    error_message = "data_key_alias must begin with alias/."
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

variable "automatic_approval" {
  description = "Whether a challenger that beats the champion is approved without a person: setting retrain.automatic."
  type        = bool
  validation {
    condition     = var.automatic_approval != null
    error_message = "automatic_approval must be true or false."
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

variable "monthly_budget_usd" {
  description = "US dollars a month; a retraining whose runs would cost more is refused by the guard."
  type        = number
  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd must be above 0."
  }
}
