terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0" # exactly: no lock file is committed, because its checksums are of one kind of machine
    }
  }

  # The bucket is made by bootstrap/; its name stands in environments/*.s3.tfbackend. use_lockfile lets one apply at a time.
  backend "s3" {
    key          = "skin-lesion/terraform.tfstate"
    encrypt      = true
    use_lockfile = true
  }
}
