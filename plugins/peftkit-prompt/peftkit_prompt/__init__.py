"""Learned prompts for whole language models, one module a method."""
