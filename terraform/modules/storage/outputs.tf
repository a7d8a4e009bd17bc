output "names" {
  description = "Kind (raw, processed, models, capture, reports, logs) to name of the bucket; it exists with its policy."
  value       = { for kind in local.kinds : kind => "${var.prefix}-${kind}" }
  depends_on  = [aws_s3_bucket_policy.this]
}
