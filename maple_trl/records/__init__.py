"""What runs and evaluations write, and others read."""
