output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "subnet_ids" {
  description = "Private subnets: setting aws.subnets."
  value       = [for zone in var.zones : aws_subnet.private[zone].id]
}

output "security_group_id" {
  description = "Of jobs, endpoints and notebooks: setting aws.security_groups."
  value       = aws_security_group.jobs.id
}
