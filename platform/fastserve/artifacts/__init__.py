"""What stages hand on: records, the store that keeps them, and the sources that models and data come from."""
