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

variable "buckets" {
  description = "Kind of data to name of its bucket, of module storage."
  type        = map(string)
  validation {
    condition     = length(setsubtract(["raw", "processed", "models", "capture", "reports"], keys(var.buckets))) == 0
    error_message = "buckets must have raw, processed, models, capture and reports."
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

variable "vpc_id" {
  description = "The network that the jobs lie in."
  type        = string
  validation {
    condition     = startswith(var.vpc_id, "vpc-")
    error_message = "vpc_id must begin with vpc-."
  }
}

variable "endpoint_name" {
  description = "Name of the endpoint: setting serving.endpoint."
  type        = string
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,45}$", var.endpoint_name))
    error_message = "endpoint_name must be 1 to 46 letters, digits or hyphens: deploy adds a version and a mark."
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

variable "github_repository" {
  description = "owner/name of the repository whose workflows may deploy by OIDC; empty: no role for it."
  type        = string
  default     = ""
  validation {
    condition     = var.github_repository == "" || can(regex("^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$", var.github_repository))
    error_message = "github_repository must be owner/name, or empty."
  }
}

variable "github_environment" {
  description = "Environment of the workflow that may deploy: its protection rules are the approval."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]*$", var.github_environment))
    error_message = "github_environment must be lower-case letters, digits or hyphens."
  }
}
