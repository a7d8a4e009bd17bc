variable "name" {
  description = "Beginning of every name. The command line looks for pipelines that begin with skin-lesion-."
  type        = string
  default     = "skin-lesion"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "name must be 3 to 21 lower-case letters, digits or hyphens, and begin with a letter."
  }
}

variable "environment" {
  description = "dev, staging or prod; each has an account of its own, so that names need no addition."
  type        = string
  validation {
    condition     = contains(["dev", "staging", "prod"], var.environment)
    error_message = "environment must be dev, staging or prod."
  }
}

variable "region" {
  description = "Region, e.g. eu-west-1."
  type        = string
  default     = "eu-west-1"
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be the name of an AWS region, such as eu-west-1."
  }
}

variable "bucket_prefix" {
  description = "Beginning of the names of the buckets, unique in the world; empty: name, environment and account."
  type        = string
  default     = ""
  validation {
    condition     = var.bucket_prefix == "" || can(regex("^[a-z0-9][a-z0-9-]{2,50}$", var.bucket_prefix))
    error_message = "bucket_prefix must be 3 to 51 lower-case letters, digits or hyphens, or empty."
  }
}

variable "image_tag" {
  description = "Tag of the images steps and serve, e.g. the commit they were built from; a repository takes each tag once."
  type        = string
  default     = "unset"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image_tag)) && var.image_tag != "latest"
    error_message = "image_tag must be a tag, and not latest: tags here never move."
  }
}

variable "cidr" {
  description = "Addresses of the network, a /16 to /24."
  type        = string
  default     = "10.40.0.0/16"
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && try(tonumber(split("/", var.cidr)[1]) >= 16 && tonumber(split("/", var.cidr)[1]) <= 24, false)
    error_message = "cidr must be a network such as 10.40.0.0/16, from /16 to /24."
  }
}

variable "zones" {
  description = "Letters of the availability zones, a private subnet in each."
  type        = list(string)
  default     = ["a", "b"]
  validation {
    condition     = length(var.zones) >= 2 && length(distinct(var.zones)) == length(var.zones) && alltrue([for z in var.zones : can(regex("^[a-f]$", z))])
    error_message = "zones must be at least two different letters from a to f."
  }
}

variable "services" {
  description = "AWS services that are reached by an interface endpoint; each costs by the hour and zone."
  type        = list(string)
  default     = ["sagemaker.api", "sagemaker.runtime", "studio", "ecr.api", "ecr.dkr", "logs", "monitoring", "events", "sts", "kms", "states", "application-autoscaling"]
  validation {
    condition     = contains(var.services, "sagemaker.api") && contains(var.services, "logs") && alltrue([for s in var.services : can(regex("^[a-z0-9.-]+$", s))])
    error_message = "services must be endpoint names such as sagemaker.api, and hold at least sagemaker.api and logs: without them no job starts and no log leaves it."
  }
}

variable "log_retention_days" {
  description = "Days that logs are kept."
  type        = number
  default     = 365
  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_retention_days)
    error_message = "log_retention_days must be one that CloudWatch offers, and at least 30."
  }
}

variable "capture_days" {
  description = "Days that captured requests are kept: no longer than monitoring and late labels need them."
  type        = number
  default     = 180
  validation {
    condition     = var.capture_days >= 30 && var.capture_days <= 3650
    error_message = "capture_days must be 30 to 3650: labels come late."
  }
}

variable "logs_days" {
  description = "Days that access logs and the audit trail are kept. Six years are usual where HIPAA applies."
  type        = number
  default     = 2192
  validation {
    condition     = var.logs_days >= 365
    error_message = "logs_days must be at least 365."
  }
}

variable "force_destroy" {
  description = "Whether destroy also deletes buckets and repositories that are not empty; never where pictures are kept."
  type        = bool
  default     = false
  validation {
    condition     = var.force_destroy != null
    error_message = "force_destroy must be true or false."
  }
}

variable "endpoint_name" {
  description = "Name of the endpoint: setting serving.endpoint."
  type        = string
  default     = "skin-lesion"
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,45}$", var.endpoint_name))
    error_message = "endpoint_name must be 1 to 46 letters, digits or hyphens: deploy adds a version and a mark."
  }
}

variable "manage_scaling" {
  description = "Whether Terraform sets the endpoint's auto-scaling. `skin-lesion deploy` does that itself; true only for an endpoint that is there and was made otherwise."
  type        = bool
  default     = false
  validation {
    condition     = var.manage_scaling != null
    error_message = "manage_scaling must be true or false."
  }
}

variable "instances_max" {
  description = "Instances at most: setting serving.instances_max."
  type        = number
  default     = 5
  validation {
    condition     = var.instances_max >= 1 && var.instances_max <= 20
    error_message = "instances_max must be 1 to 20."
  }
}

variable "requests_per_instance" {
  description = "Requests a minute and instance that are aimed at: setting serving.requests_per_instance."
  type        = number
  default     = 600
  validation {
    condition     = var.requests_per_instance > 0
    error_message = "requests_per_instance must be above 0."
  }
}

variable "model_package_group" {
  description = "Model package group: setting aws.model_package_group."
  type        = string
  default     = "skin-lesion"
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", var.model_package_group))
    error_message = "model_package_group must be 1 to 63 letters, digits or hyphens."
  }
}

variable "metrics_namespace" {
  description = "CloudWatch namespace of the monitor's own figures."
  type        = string
  default     = "skin-lesion"
  validation {
    condition     = can(regex("^[A-Za-z0-9._/#-]+$", var.metrics_namespace)) && !startswith(var.metrics_namespace, "AWS/")
    error_message = "metrics_namespace must be a CloudWatch namespace, and not one of AWS's own."
  }
}

variable "github_repository" {
  description = "owner/name of the repository whose workflows may deploy by OIDC; empty: no role for it."
  type        = string
  default     = ""
  validation {
    condition     = var.github_repository == "" || can(regex("^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$", var.github_repository))
    error_message = "github_repository must be owner/name, or empty."
  }
}

variable "users" {
  description = "Names of the user profiles of Studio."
  type        = list(string)
  default     = ["researcher"]
  validation {
    condition     = alltrue([for user in var.users : can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", user))])
    error_message = "users must be names of letters, digits and hyphens."
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

variable "latency_p99_ms" {
  description = "Milliseconds: p99 of the model's latency above this for 15 minutes is an alarm."
  type        = number
  default     = 2000
  validation {
    condition     = var.latency_p99_ms > 0
    error_message = "latency_p99_ms must be above 0."
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


variable "automatic_approval" {
  description = "Whether a challenger that beats the champion is approved without a person: setting retrain.automatic. Never in prod."
  type        = bool
  default     = false
  validation {
    condition     = !(var.automatic_approval && var.environment == "prod")
    error_message = "automatic_approval must be false in prod: a person approves what answers there."
  }
}
