"""Muon for the Hugging Face Trainer: ``optim="muon"``."""
