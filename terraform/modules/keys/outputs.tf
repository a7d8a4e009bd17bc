output "data_arn" {
  description = "ARN of the key of pictures, models and volumes."
  value       = aws_kms_key.data.arn
}

output "data_alias" {
  description = "Its alias: setting aws.kms_key."
  value       = aws_kms_alias.data.name
}

output "logs_arn" {
  description = "ARN of the key of logs, topics, queues and the audit trail."
  value       = aws_kms_key.logs.arn
}
