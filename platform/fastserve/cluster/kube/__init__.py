"""A namespace as a cluster: objects for a home, RayClusters for heads, pods for a gateway, and a person's door."""
