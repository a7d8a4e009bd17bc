terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0" # exactly: no lock file is committed, because its checksums are of one kind of machine
    }
  }
}
