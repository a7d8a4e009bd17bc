variable "name" {
  description = "Beginning of every name, e.g. skin-lesion."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "name must be 3 to 21 lower-case letters, digits or hyphens, and begin with a letter."
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

variable "partition" {
  description = "aws, aws-cn or aws-us-gov."
  type        = string
  validation {
    condition     = contains(["aws", "aws-cn", "aws-us-gov"], var.partition)
    error_message = "partition must be aws, aws-cn or aws-us-gov."
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
  validation {
    condition     = contains(var.services, "sagemaker.api") && contains(var.services, "logs") && alltrue([for s in var.services : can(regex("^[a-z0-9.-]+$", s))])
    error_message = "services must be endpoint names such as sagemaker.api, and hold at least sagemaker.api and logs: without them no job starts and no log leaves it."
  }
}

variable "logs_key_arn" {
  description = "ARN of the KMS key of logs."
  type        = string
  validation {
    condition     = startswith(var.logs_key_arn, "arn:")
    error_message = "logs_key_arn must be an ARN."
  }
}

variable "log_retention_days" {
  description = "Days that flow logs are kept."
  type        = number
  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_retention_days)
    error_message = "log_retention_days must be one that CloudWatch offers, and at least 30."
  }
}
