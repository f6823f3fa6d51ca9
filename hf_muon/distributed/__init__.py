"""Where each matrix of a parameter lives."""
