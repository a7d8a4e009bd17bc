output "bucket" {
  description = "The bucket of the state."
  value       = aws_s3_bucket_policy.state.bucket
}
