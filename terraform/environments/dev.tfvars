# An account to try things in: short memory, smaller budget, nothing starts by itself, and destroy leaves nothing.
environment        = "dev"
zones              = ["a", "b"]
log_retention_days = 30
capture_days       = 30
logs_days          = 365
force_destroy      = true
schedules_enabled  = false
# `skin-lesion cost month` expects about 293, two thirds of it for the network, which runs whether anything else does or not:
# below 366 the notice at 80% would come each month
monthly_budget_usd = 400
