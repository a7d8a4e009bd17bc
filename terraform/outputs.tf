output "settings" {
  description = "The values of this account as a settings.ini. `terraform output -raw settings` prints them."
  value       = <<-EOT
    [aws]
    region = ${var.region}
    bucket = ${module.storage.names.processed}
    role_arn = ${module.roles.arns.pipeline}
    serving_role_arn = ${module.roles.arns.serving}
    deploy_role_arn = ${module.roles.arns.deploy}
    monitor_role_arn = ${module.roles.arns.monitor}
    retrain_role_arn = ${module.roles.arns.retrain}
    schedule_role_arn = ${module.automation.schedule_role_arn}
    image_uri = ${module.registry.urls.steps}:${var.image_tag}
    serving_image_uri = ${module.registry.urls.serve}:${var.image_tag}
    kms_key = ${module.keys.data_alias}
    subnets = ${join(",", module.network.subnet_ids)}
    security_groups = ${module.network.security_group_id}
    model_package_group = ${var.model_package_group}
    budget = ${var.monthly_budget_usd}

    [serving]
    endpoint = ${var.endpoint_name}
    capture = s3://${module.storage.names.capture}

    [retrain]
    labels = s3://${module.storage.names.processed}/labels/${var.endpoint_name}
  EOT
}

output "buckets" {
  description = "Kind of data to name of its bucket."
  value       = module.storage.names
}

output "roles" {
  description = "Kind of job to ARN of its role."
  value       = module.roles.arns
}

output "repositories" {
  description = "Image to the address of its repository."
  value       = module.registry.urls
}

output "github_role_arn" {
  description = "Role of GitHub's workflows: variable AWS_ROLE_ARN of the environment there."
  value       = module.roles.github_arn
}

output "studio_url" {
  description = "Where Studio opens."
  value       = module.sagemaker.domain_url
}

output "dashboard_url" {
  description = "The page with model, latency, utilisation, training, drift, cost and alarms."
  value       = module.observability.dashboard_url
}

output "topic_arn" {
  description = "Topic of alarms and failures."
  value       = module.observability.topic_arn
}

output "state_machine_arn" {
  description = "Retraining; empty where pipelines/retraining.asl.json is not there."
  value       = module.automation.state_machine_arn
}

output "retrain_url" {
  description = "Where a signed POST starts retraining; empty without the state machine."
  value       = module.automation.retrain_url
}
