"""Hugging Face's files: names, layouts and configs of torch, written and read without torch."""
