"""The command line: one of the doors to the same plan, and the only place that prints."""
