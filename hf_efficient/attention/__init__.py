"""Efficient attention: `convert_attention` gives a model cheaper attention with the same weights."""
