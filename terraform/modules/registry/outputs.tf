output "urls" {
  description = "Image to the address of its repository, without tag."
  value       = { for image, repository in aws_ecr_repository.this : image => repository.repository_url }
}
