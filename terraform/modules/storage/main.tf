locals {
  encrypted = toset(["raw", "processed", "models", "capture", "reports"])
  kinds     = setunion(local.encrypted, ["logs"])
  expire    = { capture = var.capture_days, logs = var.logs_days }
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18:All buckets but that of the logs have access logging; its own would fill it without end
  #checkov:skip=CKV2_AWS_62:The monitor reads captures by the calendar; no bucket has to announce objects
  #checkov:skip=CKV_AWS_144:Pictures of patients stay in one region; versions are kept, and the data sets can be had again
  for_each      = local.kinds
  bucket        = "${var.prefix}-${each.value}"
  force_destroy = var.force_destroy
  tags          = { data = each.value }
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each                = local.kinds
  bucket                  = aws_s3_bucket.this[each.value].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  for_each = local.kinds
  bucket   = aws_s3_bucket.this[each.value].id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = local.kinds
  bucket   = aws_s3_bucket.this[each.value].id
  versioning_configuration {
    status = "Enabled"
  }
}

# S3 delivers access logs only to a bucket with its own key; all others have the key of the data.
resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = local.kinds
  bucket   = aws_s3_bucket.this[each.value].id
  rule {
    bucket_key_enabled = contains(local.encrypted, each.value)
    apply_server_side_encryption_by_default {
      sse_algorithm     = contains(local.encrypted, each.value) ? "aws:kms" : "AES256"
      kms_master_key_id = contains(local.encrypted, each.value) ? var.data_key_arn : null
    }
  }
}

# The monitor's job has no way to EventBridge: what it writes is the event.
resource "aws_s3_bucket_notification" "events" {
  bucket      = aws_s3_bucket.this["processed"].id
  eventbridge = true
}

resource "aws_s3_bucket_logging" "this" {
  depends_on    = [aws_s3_bucket_policy.this]
  for_each      = local.encrypted
  bucket        = aws_s3_bucket.this[each.value].id
  target_bucket = aws_s3_bucket.this["logs"].id
  target_prefix = "access/${each.value}/"
}

resource "aws_s3_bucket_intelligent_tiering_configuration" "this" {
  for_each = local.encrypted
  bucket   = aws_s3_bucket.this[each.value].id
  name     = "archive"
  tiering {
    access_tier = "ARCHIVE_ACCESS"
    days        = 180
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  for_each   = local.kinds
  bucket     = aws_s3_bucket.this[each.value].id
  depends_on = [aws_s3_bucket_versioning.this]

  rule {
    id     = "tier"
    status = "Enabled"
    filter {}
    transition {
      days          = 0
      storage_class = "INTELLIGENT_TIERING"
    }
    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  dynamic "rule" {
    for_each = contains(keys(local.expire), each.value) ? [local.expire[each.value]] : []
    content {
      id     = "expire"
      status = "Enabled"
      filter {}
      expiration {
        days = rule.value
      }
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  for_each   = local.kinds
  bucket     = aws_s3_bucket.this[each.value].id
  depends_on = [aws_s3_bucket_public_access_block.this]
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      [{
        Sid       = "OnlyByTLS"
        Effect    = "Deny"
        Principal = "*"
        Action    = "s3:*"
        Resource  = ["arn:${var.partition}:s3:::${var.prefix}-${each.value}", "arn:${var.partition}:s3:::${var.prefix}-${each.value}/*"]
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      }],
      [for kind in setintersection(local.encrypted, [each.value]) : {
        Sid       = "OnlyByKMS"
        Effect    = "Deny"
        Principal = "*"
        Action    = "s3:PutObject"
        Resource  = ["arn:${var.partition}:s3:::${var.prefix}-${kind}/*"]
        # an upload that names no encryption gets the bucket's own, which is KMS
        Condition = { StringNotEqualsIfExists = { "s3:x-amz-server-side-encryption" = "aws:kms" }, Null = { "s3:x-amz-server-side-encryption" = "false" } }
      }],
      [for kind in setintersection(["logs"], [each.value]) : {
        Sid       = "AccessLogsOfThisAccount"
        Effect    = "Allow"
        Principal = { Service = "logging.s3.amazonaws.com" }
        Action    = "s3:PutObject"
        Resource  = ["arn:${var.partition}:s3:::${var.prefix}-${kind}/access/*"]
        Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
      }],
      [for kind in setintersection(["logs"], [each.value]) : {
        Sid       = "TrailLooks"
        Effect    = "Allow"
        Principal = { Service = "cloudtrail.amazonaws.com" }
        Action    = "s3:GetBucketAcl"
        Resource  = ["arn:${var.partition}:s3:::${var.prefix}-${kind}"]
        Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
      }],
      [for kind in setintersection(["logs"], [each.value]) : {
        Sid       = "TrailWrites"
        Effect    = "Allow"
        Principal = { Service = "cloudtrail.amazonaws.com" }
        Action    = "s3:PutObject"
        Resource  = ["arn:${var.partition}:s3:::${var.prefix}-${kind}/trail/AWSLogs/${var.account_id}/*"]
        Condition = { StringEquals = { "aws:SourceAccount" = var.account_id, "s3:x-amz-acl" = "bucket-owner-full-control" } }
      }],
    )
  })
}
