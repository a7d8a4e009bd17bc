variable "endpoint_name" {
  description = "Name of the endpoint: setting serving.endpoint."
  type        = string
  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9-]{0,62}$", var.endpoint_name))
    error_message = "endpoint_name must be 1 to 63 letters, digits or hyphens."
  }
}

variable "instances_min" {
  description = "Instances at least: setting serving.instances_min."
  type        = number
  default     = 1
  validation {
    condition     = var.instances_min >= 1
    error_message = "instances_min must be at least 1."
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

