"""The command line ``hf-muon``, and what only it needs."""
