"""How the optimizer plugs into the Hugging Face libraries."""
