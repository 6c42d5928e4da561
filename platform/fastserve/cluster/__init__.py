"""Where it happens: Ray and, later, Kubernetes. Observe and apply; the only room that submits to Ray."""
