resource "aws_sagemaker_model_package_group" "this" {
  model_package_group_name        = var.model_package_group
  model_package_group_description = "Versions of the skin-lesion model, registered by the training pipeline"
}

locals {
  # The committed definitions hold placeholders of settings.ini [aws]; here the account's own values take their place.
  role = "arn:aws:iam::000000000000:role/skin-lesion"
  roled = { for name, text in var.definitions : name => replace(replace(replace(replace(replace(text,
    "${local.role}-pipeline", var.roles.pipeline), "${local.role}-serving", var.roles.serving),
  "${local.role}-deploy", var.roles.deploy), "${local.role}-monitor", var.roles.monitor), "${local.role}-retrain", var.roles.retrain) }
  registry = "000000000000.dkr.ecr.eu-west-1.amazonaws.com"
  imaged = { for name, text in local.roled : name => replace(replace(text,
    "${local.registry}/skin-lesion-steps:latest", var.images.steps),
  "${local.registry}/skin-lesion-serve:latest", var.images.serve) }
  placed = { for name, text in local.imaged : name => replace(replace(replace(
    replace(text, ": \"subnet-00000000000000000\"", ": \"${join(",", var.subnet_ids)}\""), # of an environment
    "\"subnet-00000000000000000\"", join(", ", [for id in var.subnet_ids : jsonencode(id)])),
    "sg-00000000000000000", var.security_group_id),
  "\"alias/skin-lesion\"", jsonencode(var.data_key_alias)) }
  stored = { for name, text in local.placed : name => replace(replace(replace(text,
    "AWS_BUCKET\": \"skin-lesion\"", "AWS_BUCKET\": \"${var.buckets.processed}\""),
    "SERVING_CAPTURE\": \"\"", "SERVING_CAPTURE\": \"s3://${var.buckets.capture}\""),
  "RETRAIN_LABELS\": \"\"", "RETRAIN_LABELS\": \"s3://${var.buckets.processed}/labels/${var.endpoint_name}\"") }
  definitions = { for name, text in local.stored : name => replace(replace(replace(text,
    "s3://skin-lesion/capture/", "s3://${var.buckets.capture}/"),
    "s3://skin-lesion/", "s3://${var.buckets.processed}/"),
  "eu-west-1", var.region) }
}

resource "aws_sagemaker_pipeline" "this" {
  for_each              = local.definitions
  pipeline_name         = "${var.name}-${each.key}"
  pipeline_display_name = "${var.name}-${each.key}"
  role_arn              = var.roles.pipeline
  pipeline_definition   = each.value
  lifecycle {
    precondition {
      condition     = !strcontains(each.value, "000000000000") || var.account_id == "000000000000"
      error_message = "The definition ${each.key} holds a placeholder account that nothing here replaces: add it to modules/sagemaker."
    }
  }
}

# Opens the repository ready to run. There is no internet: it comes from the bucket (make studio puts it there).
resource "aws_sagemaker_studio_lifecycle_config" "this" {
  studio_lifecycle_config_name     = "${var.name}-ready"
  studio_lifecycle_config_app_type = "JupyterLab"
  studio_lifecycle_config_content  = base64encode(replace(file("${path.module}/on_start.sh"), "BUCKET", var.buckets.processed))
}

resource "aws_sagemaker_domain" "this" {
  domain_name             = var.name
  auth_mode               = "IAM"
  vpc_id                  = var.vpc_id
  subnet_ids              = var.subnet_ids
  app_network_access_type = "VpcOnly"
  kms_key_id              = var.data_key_arn
  tag_propagation         = "ENABLED"

  default_user_settings {
    execution_role  = var.roles.studio
    security_groups = [var.security_group_id]
    jupyter_lab_app_settings {
      lifecycle_config_arns = [aws_sagemaker_studio_lifecycle_config.this.arn]
      default_resource_spec {
        instance_type        = "ml.t3.medium"
        lifecycle_config_arn = aws_sagemaker_studio_lifecycle_config.this.arn
      }
      app_lifecycle_management {
        idle_settings {
          lifecycle_management    = "ENABLED"
          idle_timeout_in_minutes = var.idle_minutes
        }
      }
    }
    sharing_settings {
      notebook_output_option = "Disabled" # outputs may hold pictures
    }
  }

  retention_policy {
    home_efs_file_system = "Delete"
  }
}

resource "aws_sagemaker_user_profile" "this" {
  for_each          = toset(var.users)
  domain_id         = aws_sagemaker_domain.this.id
  user_profile_name = each.value
  user_settings {
    execution_role = var.roles.studio
  }
}
