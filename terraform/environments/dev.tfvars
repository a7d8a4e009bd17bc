# An account to try things in: short memory, small budget, nothing starts by itself, and destroy leaves nothing.
environment        = "dev"
zones              = ["a", "b"]
log_retention_days = 30
capture_days       = 30
logs_days          = 365
force_destroy      = true
schedules_enabled  = false
monthly_budget_usd = 200
