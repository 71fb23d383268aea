"""Functional adapters for any JAX model, in the language of Hugging Face PEFT."""
