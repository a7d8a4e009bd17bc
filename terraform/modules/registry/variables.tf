variable "name" {
  description = "Beginning of every name, e.g. skin-lesion."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "name must be 3 to 21 lower-case letters, digits or hyphens, and begin with a letter."
  }
}

variable "repositories" {
  description = "Images, each a repository <name>-<image>."
  type        = list(string)
  default     = ["steps", "serve"]
  validation {
    condition     = length(var.repositories) > 0 && alltrue([for r in var.repositories : can(regex("^[a-z][a-z0-9-]*$", r))])
    error_message = "repositories must be lower-case names such as steps."
  }
}

variable "data_key_arn" {
  description = "ARN of the KMS key of the images."
  type        = string
  validation {
    condition     = startswith(var.data_key_arn, "arn:")
    error_message = "data_key_arn must be an ARN."
  }
}

variable "keep_images" {
  description = "Images of each repository that are kept; older ones expire."
  type        = number
  default     = 50
  validation {
    condition     = var.keep_images >= 5
    error_message = "keep_images must be at least 5: an endpoint may have to go back."
  }
}

variable "force_destroy" {
  description = "Whether destroy also deletes repositories with images."
  type        = bool
  default     = false
  validation {
    condition     = var.force_destroy != null
    error_message = "force_destroy must be true or false."
  }
}
