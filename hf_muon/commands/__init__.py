"""The command line ``hf-muon``, and the modules that only it uses."""
