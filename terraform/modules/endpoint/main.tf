resource "aws_appautoscaling_target" "this" {
  service_namespace  = "sagemaker"
  resource_id        = "endpoint/${var.endpoint_name}/variant/main"
  scalable_dimension = "sagemaker:variant:DesiredInstanceCount"
  min_capacity       = var.instances_min
  max_capacity       = var.instances_max
  lifecycle {
    precondition {
      condition     = var.instances_min <= var.instances_max
      error_message = "instances_min must not be above instances_max."
    }
  }
}

resource "aws_appautoscaling_policy" "this" {
  name               = "${var.endpoint_name}-load" # the name that `skin-lesion deploy` gives it
  policy_type        = "TargetTrackingScaling"
  service_namespace  = aws_appautoscaling_target.this.service_namespace
  resource_id        = aws_appautoscaling_target.this.resource_id
  scalable_dimension = aws_appautoscaling_target.this.scalable_dimension
  target_tracking_scaling_policy_configuration {
    target_value       = var.requests_per_instance
    scale_in_cooldown  = 300
    scale_out_cooldown = 60
    predefined_metric_specification {
      predefined_metric_type = "SageMakerVariantInvocationsPerInstance"
    }
  }
}
