"""The method of the paper, beside the kit in repro/."""
