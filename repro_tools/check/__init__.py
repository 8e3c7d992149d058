"""`repro check`: the spec held against itself, the configurations, the paper's text and the runs."""
