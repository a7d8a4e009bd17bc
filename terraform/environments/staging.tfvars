# As production, with less money and a shorter memory.
environment        = "staging"
zones              = ["a", "b"]
log_retention_days = 90
capture_days       = 90
logs_days          = 365
schedules_enabled  = false
monthly_budget_usd = 500
