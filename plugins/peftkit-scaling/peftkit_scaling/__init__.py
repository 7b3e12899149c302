"""Methods that learn vectors alone: `ia3`, `bitfit` and `ln_tuning`, each in a module of its own."""
