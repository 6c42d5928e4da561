"""What runs on a worker. The stages do not know each other; they meet through artifacts alone."""
