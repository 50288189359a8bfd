"""Memory and time of a training step, computed from a model's sizes before anything is rented or loaded."""
