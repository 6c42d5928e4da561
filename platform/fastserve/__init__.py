"""FastServe: one `Model` manifest takes a language model from data to an endpoint."""

__version__ = "0.1.0"
