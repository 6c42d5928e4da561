"""Rows and what a model learns from them: read, checked, rendered in the chat template, tokenised. Light: no torch."""
