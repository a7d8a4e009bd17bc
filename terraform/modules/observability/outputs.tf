output "topic_arn" {
  description = "ARN of the topic of alarms and failures; it exists with its policy."
  value       = aws_sns_topic_policy.alarms.arn
}

output "dashboard_url" {
  description = "The page with everything on it."
  value       = "https://${var.region}.console.aws.amazon.com/cloudwatch/home?region=${var.region}#dashboards:name=${var.name}"
}

output "alarms" {
  description = "Names of the alarms."
  value       = [for alarm in aws_cloudwatch_metric_alarm.this : alarm.alarm_name]
}
