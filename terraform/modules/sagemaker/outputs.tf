output "pipelines" {
  description = "Pipeline to its ARN."
  value       = { for name, pipeline in aws_sagemaker_pipeline.this : name => pipeline.arn }
}

output "domain_url" {
  description = "Where Studio opens."
  value       = aws_sagemaker_domain.this.url
}
