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

variable "region" {
  description = "Region, e.g. eu-west-1."
  type        = string
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be the name of an AWS region, such as eu-west-1."
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

variable "data_key_alias" {
  description = "Alias of that key: setting aws.kms_key."
  type        = string
  validation {
    condition     = startswith(var.data_key_alias, "alias/")
    error_message = "data_key_alias must begin with alias/."
  }
}

variable "vpc_id" {
  description = "The network of Studio."
  type        = string
  validation {
    condition     = startswith(var.vpc_id, "vpc-")
    error_message = "vpc_id must begin with vpc-."
  }
}

variable "subnet_ids" {
  description = "Private subnets of Studio and of the jobs."
  type        = list(string)
  validation {
    condition     = length(var.subnet_ids) > 0 && alltrue([for s in var.subnet_ids : startswith(s, "subnet-")])
    error_message = "subnet_ids must be subnets."
  }
}

variable "security_group_id" {
  description = "Security group of Studio and of the jobs."
  type        = string
  validation {
    condition     = startswith(var.security_group_id, "sg-")
    error_message = "security_group_id must begin with sg-."
  }
}

variable "buckets" {
  description = "Kind of data to name of its bucket, of module storage."
  type        = map(string)
  validation {
    condition     = length(setsubtract(["raw", "processed", "capture", "reports"], keys(var.buckets))) == 0
    error_message = "buckets must have raw, processed, capture and reports."
  }
}

variable "roles" {
  description = "Kind of job to ARN of its role, of module roles."
  type        = map(string)
  validation {
    condition     = length(setsubtract(["pipeline", "serving", "deploy", "monitor", "retrain", "studio"], keys(var.roles))) == 0
    error_message = "roles must have pipeline, serving, deploy, monitor, retrain and studio."
  }
}

variable "images" {
  description = "Image (steps, serve) to its address with tag or digest."
  type        = map(string)
  validation {
    condition     = alltrue([for image in ["steps", "serve"] : can(regex("(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$", var.images[image]))])
    error_message = "images must have steps and serve, each with a tag or a digest."
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

variable "endpoint_name" {
  description = "Name of the endpoint, whose labels the retraining notebook counts: setting serving.endpoint."
  type        = string
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,45}$", var.endpoint_name))
    error_message = "endpoint_name must be 1 to 46 letters, digits or hyphens."
  }
}

variable "definitions" {
  description = "Pipeline to its compiled definition, JSON as it is committed under pipelines/definitions."
  type        = map(string)
  validation {
    condition     = alltrue([for text in values(var.definitions) : can(jsondecode(text).Steps)])
    error_message = "definitions must be JSON with Steps: compile them with `make definitions`."
  }
}

variable "users" {
  description = "Names of the user profiles of Studio."
  type        = list(string)
  validation {
    condition     = alltrue([for user in var.users : can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", user))])
    error_message = "users must be names of letters, digits and hyphens."
  }
}

variable "idle_minutes" {
  description = "Minutes after which an idle notebook of Studio is stopped."
  type        = number
  default     = 120
  validation {
    condition     = var.idle_minutes >= 60 && var.idle_minutes <= 525600
    error_message = "idle_minutes must be 60 to 525600: SageMaker allows no other."
  }
}
