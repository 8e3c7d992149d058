"""`repro notebook`: a run on a platform whose sessions end."""
