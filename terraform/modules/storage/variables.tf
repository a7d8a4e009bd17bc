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

variable "prefix" {
  description = "Beginning of the names of the buckets; with it they must be unique in the world."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{2,50}$", var.prefix))
    error_message = "prefix must be 3 to 51 lower-case letters, digits or hyphens."
  }
}

variable "data_key_arn" {
  description = "ARN of the KMS key that every object but access logs is encrypted with."
  type        = string
  validation {
    condition     = startswith(var.data_key_arn, "arn:")
    error_message = "data_key_arn must be an ARN."
  }
}

variable "noncurrent_days" {
  description = "Days that an overwritten or deleted object can be taken back."
  type        = number
  default     = 90
  validation {
    condition     = var.noncurrent_days >= 1 && var.noncurrent_days <= 3650
    error_message = "noncurrent_days must be 1 to 3650."
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
  description = "Whether destroy also deletes buckets that are not empty; never where pictures are kept."
  type        = bool
  default     = false
  validation {
    condition     = var.force_destroy != null
    error_message = "force_destroy must be true or false."
  }
}
