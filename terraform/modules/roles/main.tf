# A role a job kind. ARNs are built from names, so that a plan shows each policy in full. Where an action has no resource
# of its own (ecr:GetAuthorizationToken, cloudwatch:PutMetricData, ec2:Describe*) "*" stands with a condition where IAM
# has one; tests/test_terraform.py holds the list of those actions and refuses any other.
locals {
  place     = "${var.region}:${var.account_id}"
  sagemaker = "arn:${var.partition}:sagemaker:${local.place}"
  bucket    = { for kind, name in var.buckets : kind => "arn:${var.partition}:s3:::${name}" }
  role      = { for kind in ["pipeline", "serving", "deploy", "monitor", "retrain", "studio"] : kind => "arn:${var.partition}:iam::${var.account_id}:role/${var.name}-${kind}" }

  trust = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "sagemaker.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
    }]
  })

  # what every container of SageMaker in the network needs
  container = [
    { Sid = "RegistryToken", Effect = "Allow", Action = ["ecr:GetAuthorizationToken"], Resource = ["*"] },
    {
      Sid      = "Images"
      Effect   = "Allow"
      Action   = ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"]
      Resource = ["arn:${var.partition}:ecr:${local.place}:repository/${var.name}-*"]
    },
    {
      Sid      = "Logs"
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams", "logs:CreateLogGroup"]
      Resource = ["arn:${var.partition}:logs:${local.place}:log-group:/aws/sagemaker/*"]
    },
    {
      Sid       = "NetworkLooks"
      Effect    = "Allow"
      Action    = ["ec2:DescribeNetworkInterfaces", "ec2:DescribeVpcs", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeDhcpOptions", "ec2:DescribeVpcEndpoints"]
      Resource  = ["*"]
      Condition = { StringEquals = { "aws:RequestedRegion" = var.region } }
    },
    {
      Sid      = "NetworkInterfacesInTheirNetwork"
      Effect   = "Allow"
      Action   = ["ec2:CreateNetworkInterface"]
      Resource = ["arn:${var.partition}:ec2:${local.place}:subnet/*", "arn:${var.partition}:ec2:${local.place}:security-group/*", "arn:${var.partition}:ec2:${local.place}:network-interface/*"]
      Condition = { ArnEqualsIfExists = {
        "ec2:Vpc" = "arn:${var.partition}:ec2:${local.place}:vpc/${var.vpc_id}"
      } }
    },
    {
      Sid      = "NetworkInterfacesOfTheirNetwork"
      Effect   = "Allow"
      Action   = ["ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface", "ec2:DeleteNetworkInterfacePermission"]
      Resource = ["arn:${var.partition}:ec2:${local.place}:network-interface/*"]
      Condition = { ArnEquals = {
        "ec2:Vpc" = "arn:${var.partition}:ec2:${local.place}:vpc/${var.vpc_id}"
      } }
    },
    {
      Sid      = "DataKey"
      Effect   = "Allow"
      Action   = ["kms:Decrypt", "kms:GenerateDataKey", "kms:DescribeKey"]
      Resource = [var.data_key_arn]
    },
    {
      Sid       = "DataKeyForVolumes"
      Effect    = "Allow"
      Action    = ["kms:CreateGrant"]
      Resource  = [var.data_key_arn]
      Condition = { Bool = { "kms:GrantIsForAWSResource" = "true" } }
    },
  ]

  read_models = [
    { Sid = "ListRuns", Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = [local.bucket.processed, local.bucket.models] },
    { Sid = "ReadModels", Effect = "Allow", Action = ["s3:GetObject"], Resource = ["${local.bucket.processed}/runs/*", "${local.bucket.processed}/champion/*", "${local.bucket.models}/*"] },
  ]

  policies = {
    # training, experiments, search: SageMaker makes the steps' jobs under it, and the jobs read and write their data
    pipeline = concat(local.container, [
      {
        Sid    = "JobsOfPipelines"
        Effect = "Allow"
        Action = [
          "sagemaker:CreateProcessingJob", "sagemaker:DescribeProcessingJob", "sagemaker:StopProcessingJob",
          "sagemaker:CreateTrainingJob", "sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob",
          "sagemaker:CreateHyperParameterTuningJob", "sagemaker:DescribeHyperParameterTuningJob", "sagemaker:StopHyperParameterTuningJob",
          "sagemaker:ListTrainingJobsForHyperParameterTuningJob", "sagemaker:AddTags",
        ]
        Resource = ["${local.sagemaker}:processing-job/pipelines-*", "${local.sagemaker}:training-job/pipelines-*", "${local.sagemaker}:hyper-parameter-tuning-job/*"]
      },
      {
        Sid      = "TrainingsOfTuning"
        Effect   = "Allow"
        Action   = ["sagemaker:DescribeTrainingJob"]
        Resource = ["${local.sagemaker}:training-job/*"]
      },
      {
        Sid      = "Register"
        Effect   = "Allow"
        Action   = ["sagemaker:CreateModelPackage", "sagemaker:CreateModelPackageGroup", "sagemaker:DescribeModelPackage", "sagemaker:DescribeModelPackageGroup", "sagemaker:AddTags"]
        Resource = ["${local.sagemaker}:model-package-group/${var.model_package_group}", "${local.sagemaker}:model-package/${var.model_package_group}/*"]
      },
      {
        Sid       = "RolesOfTheJobs"
        Effect    = "Allow"
        Action    = ["iam:PassRole"]
        Resource  = [local.role.pipeline, local.role.deploy, local.role.monitor, local.role.retrain]
        Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
      },
      { Sid = "ListData", Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = [local.bucket.raw, local.bucket.processed, local.bucket.models, local.bucket.capture] },
      # captures: the data set `captured`
      { Sid = "ReadData", Effect = "Allow", Action = ["s3:GetObject"], Resource = ["${local.bucket.raw}/*", "${local.bucket.processed}/*", "${local.bucket.models}/*", "${local.bucket.capture}/*"] },
      { Sid = "WriteRuns", Effect = "Allow", Action = ["s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.processed}/runs/*"] },
    ])

    # the container that answers requests: a model, and captures
    serving = concat(local.container, local.read_models, [
      { Sid = "Capture", Effect = "Allow", Action = ["s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.capture}/*"] },
      { Sid = "Asynchronous", Effect = "Allow", Action = ["s3:GetObject", "s3:PutObject"], Resource = ["${local.bucket.processed}/asynchronous/*"] },
    ])

    # the job of the pipeline deploy
    deploy = concat(local.container, local.read_models, [
      { Sid = "WriteRuns", Effect = "Allow", Action = ["s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.processed}/runs/*", "${local.bucket.processed}/asynchronous/${var.endpoint_name}/smoke/*"] },
      { Sid = "ReadAnswers", Effect = "Allow", Action = ["s3:GetObject"], Resource = ["${local.bucket.processed}/asynchronous/${var.endpoint_name}/*"] },
      {
        Sid    = "TheEndpoint"
        Effect = "Allow"
        Action = [
          "sagemaker:CreateModel", "sagemaker:DescribeModel", "sagemaker:DeleteModel",
          "sagemaker:CreateEndpointConfig", "sagemaker:DescribeEndpointConfig", "sagemaker:DeleteEndpointConfig",
          "sagemaker:CreateEndpoint", "sagemaker:DescribeEndpoint", "sagemaker:UpdateEndpoint", "sagemaker:DeleteEndpoint",
          "sagemaker:UpdateEndpointWeightsAndCapacities", "sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointAsync", "sagemaker:AddTags",
        ]
        Resource = [
          "${local.sagemaker}:model/${lower(var.endpoint_name)}-v*", "${local.sagemaker}:endpoint-config/${lower(var.endpoint_name)}-v*",
          "${local.sagemaker}:endpoint/${lower(var.endpoint_name)}",
        ]
      },
      {
        Sid      = "Lists"
        Effect   = "Allow"
        Action   = ["sagemaker:ListModels", "sagemaker:ListEndpointConfigs", "sagemaker:ListModelPackageGroups"]
        Resource = ["*"]
      },
      {
        Sid      = "Approved"
        Effect   = "Allow"
        Action   = ["sagemaker:ListModelPackages", "sagemaker:DescribeModelPackage"]
        Resource = ["${local.sagemaker}:model-package-group/${var.model_package_group}", "${local.sagemaker}:model-package/${var.model_package_group}/*"]
      },
      {
        Sid       = "RoleOfTheContainer"
        Effect    = "Allow"
        Action    = ["iam:PassRole"]
        Resource  = [local.role.serving]
        Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
      },
      {
        Sid    = "Scaling"
        Effect = "Allow"
        Action = [
          "application-autoscaling:RegisterScalableTarget", "application-autoscaling:DeregisterScalableTarget",
          "application-autoscaling:PutScalingPolicy", "application-autoscaling:DeleteScalingPolicy",
        ]
        Resource  = ["arn:${var.partition}:application-autoscaling:${local.place}:scalable-target/*"]
        Condition = { StringEquals = { "application-autoscaling:service-namespace" = "sagemaker" } }
      },
      {
        Sid       = "ScalingsOwnRole"
        Effect    = "Allow"
        Action    = ["iam:CreateServiceLinkedRole"]
        Resource  = ["arn:${var.partition}:iam::${var.account_id}:role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/*"]
        Condition = { StringEquals = { "iam:AWSServiceName" = "sagemaker.application-autoscaling.amazonaws.com" } }
      },
      {
        Sid      = "Alarms"
        Effect   = "Allow"
        Action   = ["cloudwatch:PutMetricAlarm", "cloudwatch:DeleteAlarms", "cloudwatch:DescribeAlarms"]
        Resource = ["arn:${var.partition}:cloudwatch:${local.place}:alarm:${var.endpoint_name}-*", "arn:${var.partition}:cloudwatch:${local.place}:alarm:TargetTracking-endpoint/${var.endpoint_name}/*"]
      },
    ])

    # the jobs of the pipelines monitoring and window, and the notebook job monitor (60_monitor): isolated, so an object that they write is the event
    monitor = concat(local.container, [
      { Sid = "ListCaptures", Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = [local.bucket.capture, local.bucket.processed, local.bucket.models] },
      { Sid = "ReadCaptures", Effect = "Allow", Action = ["s3:GetObject"], Resource = ["${local.bucket.capture}/*", "${local.bucket.processed}/runs/*", "${local.bucket.processed}/champion/*", "${local.bucket.processed}/challenger/*", "${local.bucket.processed}/labels/*", "${local.bucket.processed}/monitoring/*", "${local.bucket.models}/*"] },
      { Sid = "WriteReports", Effect = "Allow", Action = ["s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.processed}/runs/*", "${local.bucket.processed}/monitoring/*", "${local.bucket.reports}/*"] },
    ])

    # the notebook job retrain (70_retrain), the other one of the pipeline notebook_jobs: asks the guards, runs two pipelines, decides
    retrain = concat(local.container, local.read_models, [
      { Sid = "TheNotebook", Effect = "Allow", Action = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.processed}/notebook-jobs/*"] },
      { Sid = "Record", Effect = "Allow", Action = ["s3:GetObject", "s3:PutObject"], Resource = ["${local.bucket.processed}/retraining/record.jsonl"] },
      { Sid = "Labels", Effect = "Allow", Action = ["s3:GetObject"], Resource = ["${local.bucket.processed}/labels/*"] },
      { Sid = "PackageTags", Effect = "Allow", Action = ["s3:GetObjectTagging"], Resource = ["${local.bucket.processed}/runs/*"] },
      { Sid = "PublishChampion", Effect = "Allow", Action = ["s3:PutObject", "s3:PutObjectTagging", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.processed}/champion/*"] },
      {
        Sid      = "RunPipelines"
        Effect   = "Allow"
        Action   = ["sagemaker:StartPipelineExecution", "sagemaker:DescribePipelineExecution", "sagemaker:ListPipelineExecutionSteps"]
        Resource = flatten([for name in ["training", "window"] : ["${local.sagemaker}:pipeline/${var.name}-${name}", "${local.sagemaker}:pipeline/${var.name}-${name}/execution/*"]])
      },
      {
        Sid      = "Decide"
        Effect   = "Allow"
        Action   = ["sagemaker:ListModelPackages", "sagemaker:DescribeModelPackage", "sagemaker:UpdateModelPackage"]
        Resource = ["${local.sagemaker}:model-package-group/${var.model_package_group}", "${local.sagemaker}:model-package/${var.model_package_group}/*"]
      },
      { Sid = "Lists", Effect = "Allow", Action = ["sagemaker:ListModelPackageGroups"], Resource = ["*"] },
    ])

    # a person in Studio: reads the data, starts and follows the pipelines, decides about packages
    studio = concat(local.container, [
      { Sid = "ListData", Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = [for kind in ["raw", "processed", "models", "reports"] : local.bucket[kind]] },
      { Sid = "ReadData", Effect = "Allow", Action = ["s3:GetObject"], Resource = [for kind in ["raw", "processed", "models", "reports"] : "${local.bucket[kind]}/*"] },
      { Sid = "WriteData", Effect = "Allow", Action = ["s3:PutObject", "s3:AbortMultipartUpload"], Resource = ["${local.bucket.raw}/raw/*", "${local.bucket.processed}/champion/*", "${local.bucket.processed}/studio/*"] },
      {
        Sid      = "RunPipelines"
        Effect   = "Allow"
        Action   = ["sagemaker:StartPipelineExecution", "sagemaker:StopPipelineExecution", "sagemaker:DescribePipeline", "sagemaker:DescribePipelineExecution", "sagemaker:ListPipelineExecutions", "sagemaker:ListPipelineExecutionSteps", "sagemaker:ListPipelineParametersForExecution", "sagemaker:UpdatePipeline", "sagemaker:CreatePipeline", "sagemaker:AddTags"]
        Resource = ["${local.sagemaker}:pipeline/${var.name}-*"]
      },
      {
        Sid      = "Packages"
        Effect   = "Allow"
        Action   = ["sagemaker:ListModelPackages", "sagemaker:DescribeModelPackage", "sagemaker:UpdateModelPackage"]
        Resource = ["${local.sagemaker}:model-package-group/${var.model_package_group}", "${local.sagemaker}:model-package/${var.model_package_group}/*"]
      },
      {
        Sid      = "OwnApps"
        Effect   = "Allow"
        Action   = ["sagemaker:CreateApp", "sagemaker:DeleteApp", "sagemaker:DescribeApp", "sagemaker:CreateSpace", "sagemaker:UpdateSpace", "sagemaker:DeleteSpace", "sagemaker:DescribeSpace", "sagemaker:DescribeDomain", "sagemaker:DescribeUserProfile", "sagemaker:CreatePresignedDomainUrl", "sagemaker:AddTags"]
        Resource = ["${local.sagemaker}:app/*", "${local.sagemaker}:space/*", "${local.sagemaker}:domain/*", "${local.sagemaker}:user-profile/*"]
      },
      {
        Sid      = "Lists"
        Effect   = "Allow"
        Action   = ["sagemaker:ListPipelines", "sagemaker:ListModelPackageGroups", "sagemaker:ListApps", "sagemaker:ListSpaces", "sagemaker:ListDomains", "sagemaker:ListUserProfiles", "sagemaker:ListTrainingJobs", "sagemaker:ListProcessingJobs", "cloudwatch:GetMetricData", "cloudwatch:ListMetrics"]
        Resource = ["*"]
      },
      {
        Sid       = "RoleOfThePipelines"
        Effect    = "Allow"
        Action    = ["iam:PassRole"]
        Resource  = [local.role.pipeline]
        Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
      },
    ])
  }
}

resource "aws_iam_role" "this" {
  for_each             = local.policies
  name                 = "${var.name}-${each.key}"
  assume_role_policy   = local.trust
  max_session_duration = 43200
}

resource "aws_iam_role_policy" "this" {
  for_each = local.policies
  name     = each.key
  role     = aws_iam_role.this[each.key].id
  policy   = jsonencode({ Version = "2012-10-17", Statement = each.value })
}

# For an emergency: a person of this account whose own policy allows it, and who has proved a second factor within the hour,
# reads everything that is kept and stops what runs; nothing else. Each use is an alarm (module observability).
resource "aws_iam_role" "break_glass" {
  name                 = "${var.name}-break-glass"
  max_session_duration = 3600
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = "arn:${var.partition}:iam::${var.account_id}:root" }
      Action    = "sts:AssumeRole"
      Condition = {
        Bool            = { "aws:MultiFactorAuthPresent" = "true" }
        NumericLessThan = { "aws:MultiFactorAuthAge" = "3600" }
      }
    }]
  })
}

resource "aws_iam_role_policy" "break_glass" {
  name = "emergency"
  role = aws_iam_role.break_glass.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Sid = "ListEverything", Effect = "Allow", Action = ["s3:ListBucket", "s3:ListBucketVersions", "s3:GetBucketLocation"], Resource = [for kind in ["raw", "processed", "models", "capture", "reports"] : local.bucket[kind]] },
      { Sid = "ReadEverything", Effect = "Allow", Action = ["s3:GetObject", "s3:GetObjectVersion"], Resource = [for kind in ["raw", "processed", "models", "capture", "reports"] : "${local.bucket[kind]}/*"] },
      { Sid = "DataKey", Effect = "Allow", Action = ["kms:Decrypt", "kms:DescribeKey"], Resource = [var.data_key_arn] },
      {
        Sid      = "StopPipelines"
        Effect   = "Allow"
        Action   = ["sagemaker:StopPipelineExecution", "sagemaker:ListPipelineExecutions", "sagemaker:DescribePipelineExecution"]
        Resource = ["${local.sagemaker}:pipeline/${var.name}-*"]
      },
      {
        Sid      = "StopRetraining"
        Effect   = "Allow"
        Action   = ["states:StopExecution"]
        Resource = ["arn:${var.partition}:states:${local.place}:execution:${var.name}-retraining:*"]
      },
    ]
  })
}

# GitHub's workflows get short-lived credentials by OIDC; no key is stored anywhere.
resource "aws_iam_openid_connect_provider" "github" {
  count          = var.github_repository == "" ? 0 : 1
  url            = "https://token.actions.githubusercontent.com"
  client_id_list = ["sts.amazonaws.com"]
}

# A workflow pushes images, deploys, and starts pipelines and retraining. What makes the account itself is applied by a
# person, who has more rights than any workflow should.
resource "aws_iam_role" "github" {
  count = var.github_repository == "" ? 0 : 1
  name  = "${var.name}-github"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Federated = aws_iam_openid_connect_provider.github[0].arn }
      Action    = "sts:AssumeRoleWithWebIdentity"
      Condition = { StringEquals = {
        "token.actions.githubusercontent.com:aud" = "sts.amazonaws.com"
        "token.actions.githubusercontent.com:sub" = "repo:${var.github_repository}:environment:${var.github_environment}"
      } }
    }]
  })
}

resource "aws_iam_role_policy" "github" {
  count = var.github_repository == "" ? 0 : 1
  name  = "deploy"
  role  = aws_iam_role.github[0].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([for s in local.container : s if contains(["RegistryToken", "DataKey"], s.Sid)], local.read_models,
      [for s in local.policies.deploy : s if contains(["TheEndpoint", "Lists", "Approved", "RoleOfTheContainer", "Scaling", "ScalingsOwnRole", "Alarms"], s.Sid)], [
        {
          Sid      = "PushImages"
          Effect   = "Allow"
          Action   = ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage", "ecr:InitiateLayerUpload", "ecr:UploadLayerPart", "ecr:CompleteLayerUpload", "ecr:PutImage", "ecr:DescribeImages", "ecr:DescribeImageScanFindings"]
          Resource = ["arn:${var.partition}:ecr:${local.place}:repository/${var.name}-*"]
        },
        {
          Sid      = "Pipelines"
          Effect   = "Allow"
          Action   = ["sagemaker:CreatePipeline", "sagemaker:UpdatePipeline", "sagemaker:DescribePipeline", "sagemaker:StartPipelineExecution", "sagemaker:DescribePipelineExecution", "sagemaker:ListPipelineExecutionSteps", "sagemaker:AddTags"]
          Resource = ["${local.sagemaker}:pipeline/${var.name}-*"]
        },
        { Sid = "ListPipelines", Effect = "Allow", Action = ["sagemaker:ListPipelines"], Resource = ["*"] },
        # what `skin-lesion doctor` looks at
        { Sid = "LookAtRoles", Effect = "Allow", Action = ["iam:GetRole"], Resource = ["arn:${var.partition}:iam::${var.account_id}:role/${var.name}-*"] },
        { Sid = "LookAtKey", Effect = "Allow", Action = ["kms:GetKeyRotationStatus"], Resource = [var.data_key_arn] },
        {
          Sid      = "LookAtBuckets"
          Effect   = "Allow"
          Action   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:GetEncryptionConfiguration", "s3:GetBucketVersioning", "s3:GetBucketPublicAccessBlock"]
          Resource = [local.bucket.processed, local.bucket.capture]
        },
        { Sid = "LookAtGroup", Effect = "Allow", Action = ["sagemaker:DescribeModelPackageGroup"], Resource = ["${local.sagemaker}:model-package-group/${var.model_package_group}"] },
        {
          Sid       = "LookAtNetworkAndQuotas"
          Effect    = "Allow"
          Action    = ["ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeRegions", "servicequotas:ListServiceQuotas", "servicequotas:ListAWSDefaultServiceQuotas"]
          Resource  = ["*"]
          Condition = { StringEquals = { "aws:RequestedRegion" = var.region } }
        },
        { Sid = "PublishChampion", Effect = "Allow", Action = ["s3:PutObject"], Resource = ["${local.bucket.processed}/champion/*"] },
        {
          Sid      = "Retrain"
          Effect   = "Allow"
          Action   = ["states:StartExecution"]
          Resource = ["arn:${var.partition}:states:${local.place}:stateMachine:${var.name}-retraining"]
        },
        {
          Sid       = "RoleOfThePipelines"
          Effect    = "Allow"
          Action    = ["iam:PassRole"]
          Resource  = [local.role.pipeline]
          Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
        },
    ])
  })
}
