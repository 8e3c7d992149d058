"""`repro preflight`: what can be known before a run."""
