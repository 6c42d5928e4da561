"""What to do about it: pure functions over frozen snapshots. No I/O, no clock, nothing heavy."""
