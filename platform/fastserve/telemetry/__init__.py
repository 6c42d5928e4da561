"""What stages report while they run."""
