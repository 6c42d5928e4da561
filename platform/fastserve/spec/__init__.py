"""What the user wants: the manifest as typed, closed sections. No I/O but reading text, no clock, nothing heavy."""
