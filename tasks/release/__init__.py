"""Releasing a model: a folder for other programs, and a repository on the Hugging Face hub."""
