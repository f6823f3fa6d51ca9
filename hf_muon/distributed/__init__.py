"""Where the pieces of each matrix are, and how whole matrices are brought together."""
