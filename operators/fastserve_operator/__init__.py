"""The operator: `kubectl apply` a Model, and it is brought about by the same decisions as on a laptop."""
