"""The door for clients: a light process that knows keys, models and weights, and passes streams on untouched."""
