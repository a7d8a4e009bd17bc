environment        = "prod"
zones              = ["a", "b", "c"]
log_retention_days = 365
capture_days       = 180
logs_days          = 2192 # six years
monthly_budget_usd = 3000
