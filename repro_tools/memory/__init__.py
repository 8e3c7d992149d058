"""`repro memory`: device memory and time of every phase, found on fake tensors."""
