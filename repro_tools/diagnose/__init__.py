"""`repro diagnose`: why it does not train."""
