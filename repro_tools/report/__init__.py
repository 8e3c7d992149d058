"""`repro report`: verdicts, the results page, the note, the checklist."""
