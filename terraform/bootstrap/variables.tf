variable "bucket" {
  description = "Name of the bucket of the state, unique in the world; it goes into environments/*.s3.tfbackend."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{2,61}[a-z0-9]$", var.bucket))
    error_message = "bucket must be 4 to 63 lower-case letters, digits or hyphens."
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

