"""How the optimizer enters the Hugging Face libraries."""
