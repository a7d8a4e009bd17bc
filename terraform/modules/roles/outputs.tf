output "arns" {
  description = "Kind of job (pipeline, serving, deploy, monitor, retrain, studio) to the ARN of its role; it exists with its policy."
  value       = { for kind, policy in aws_iam_role_policy.this : kind => aws_iam_role.this[kind].arn }
}

output "github_arn" {
  description = "ARN of the role of GitHub's workflows; empty where there is none."
  value       = one(aws_iam_role.github[*].arn) == null ? "" : one(aws_iam_role.github[*].arn)
}
