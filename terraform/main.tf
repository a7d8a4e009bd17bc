provider "aws" {
  region = var.region
  default_tags {
    tags = local.tags
  }
}

data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}

locals {
  # cost allocation tags: on everything, and the same as the jobs of the pipelines carry
  tags       = { project = "skin-lesion", cost-center = "skin-lesion", environment = var.environment, managed-by = "terraform" }
  account_id = data.aws_caller_identity.this.account_id
  partition  = data.aws_partition.this.partition
  prefix     = var.bucket_prefix == "" ? "${var.name}-${var.environment}-${local.account_id}" : var.bucket_prefix

  repository  = "${path.root}/.."
  definitions = { for path in fileset("${local.repository}/pipelines/definitions", "*.json") : replace(trimsuffix(path, ".json"), "_", "-") => file("${local.repository}/pipelines/definitions/${path}") }
  lambdas     = [for path in fileset("${path.root}/lambdas", "*/handler.py") : dirname(path)]
}

module "keys" {
  source     = "./modules/keys"
  name       = var.name
  account_id = local.account_id
  partition  = local.partition
  region     = var.region
}

module "network" {
  source             = "./modules/network"
  name               = var.name
  account_id         = local.account_id
  partition          = local.partition
  region             = var.region
  cidr               = var.cidr
  zones              = var.zones
  services           = var.services
  logs_key_arn       = module.keys.logs_arn
  log_retention_days = var.log_retention_days
}

module "storage" {
  source        = "./modules/storage"
  prefix        = local.prefix
  account_id    = local.account_id
  partition     = local.partition
  data_key_arn  = module.keys.data_arn
  capture_days  = var.capture_days
  logs_days     = var.logs_days
  force_destroy = var.force_destroy
}

module "registry" {
  source        = "./modules/registry"
  name          = var.name
  data_key_arn  = module.keys.data_arn
  force_destroy = var.force_destroy
}

module "roles" {
  source              = "./modules/roles"
  name                = var.name
  account_id          = local.account_id
  partition           = local.partition
  region              = var.region
  buckets             = module.storage.names
  data_key_arn        = module.keys.data_arn
  vpc_id              = module.network.vpc_id
  endpoint_name       = var.endpoint_name
  model_package_group = var.model_package_group
  github_repository   = var.github_repository
  github_environment  = var.environment == "prod" ? "production" : var.environment
}

module "sagemaker" {
  source              = "./modules/sagemaker"
  name                = var.name
  account_id          = local.account_id
  region              = var.region
  data_key_arn        = module.keys.data_arn
  data_key_alias      = module.keys.data_alias
  vpc_id              = module.network.vpc_id
  subnet_ids          = module.network.subnet_ids
  security_group_id   = module.network.security_group_id
  buckets             = module.storage.names
  roles               = module.roles.arns
  images              = { for image, url in module.registry.urls : image => "${url}:${var.image_tag}" }
  model_package_group = var.model_package_group
  endpoint_name       = var.endpoint_name
  definitions         = local.definitions
  users               = var.users
}

module "endpoint" {
  count                 = var.manage_scaling ? 1 : 0
  source                = "./modules/endpoint"
  endpoint_name         = var.endpoint_name
  instances_max         = var.instances_max
  requests_per_instance = var.requests_per_instance
}

module "observability" {
  source                     = "./modules/observability"
  name                       = var.name
  account_id                 = local.account_id
  partition                  = local.partition
  region                     = var.region
  logs_key_arn               = module.keys.logs_arn
  buckets                    = module.storage.names
  email                      = var.email
  endpoint_name              = var.endpoint_name
  pipelines                  = keys(local.definitions)
  metrics_namespace          = var.metrics_namespace
  latency_p99_ms             = var.latency_p99_ms
  balanced_accuracy_floor    = var.balanced_accuracy_floor
  melanoma_sensitivity_floor = var.melanoma_sensitivity_floor
  monthly_budget_usd         = var.monthly_budget_usd
  log_retention_days         = var.log_retention_days
}

module "automation" {
  source              = "./modules/automation"
  name                = var.name
  account_id          = local.account_id
  partition           = local.partition
  region              = var.region
  logs_key_arn        = module.keys.logs_arn
  data_key_arn        = module.keys.data_arn
  topic_arn           = module.observability.topic_arn
  buckets             = module.storage.names
  lambdas             = local.lambdas
  lambdas_folder      = "${path.root}/lambdas"
  zips_folder         = "${path.root}/build"
  state_machine_file  = "${local.repository}/pipelines/retraining.asl.json"
  rules_file          = "${local.repository}/pipelines/retraining.rules.json"
  data_key_alias      = module.keys.data_alias
  endpoint_name       = var.endpoint_name
  automatic_approval  = var.automatic_approval
  monthly_budget_usd  = var.monthly_budget_usd
  metrics_namespace   = var.metrics_namespace
  pipelines           = module.sagemaker.pipelines
  model_package_group = var.model_package_group
  retraining_schedule = var.retraining_schedule
  monitoring_schedule = var.monitoring_schedule
  schedules_enabled   = var.schedules_enabled
  log_retention_days  = var.log_retention_days
}
