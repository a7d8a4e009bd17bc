output "state_machine_arn" {
  description = "ARN of the retraining state machine; empty where there is none."
  value       = local.retrains ? aws_sfn_state_machine.retraining[0].arn : ""
}

output "schedule_role_arn" {
  description = "Role that EventBridge Scheduler takes; it may start retraining, monitoring and the two notebook jobs."
  value       = aws_iam_role.starter["schedule"].arn
}

output "retrain_url" {
  description = "Where a signed POST starts retraining; empty where there is none."
  value       = local.retrains ? "${aws_apigatewayv2_api.this[0].api_endpoint}/retrain" : ""
}

output "lambda_names" {
  description = "Names of the Lambda functions."
  value       = [for lambda in aws_lambda_function.this : lambda.function_name]
}

output "dead_letter_queue" {
  description = "Name of the queue of what could not be delivered."
  value       = aws_sqs_queue.dead.name
}
