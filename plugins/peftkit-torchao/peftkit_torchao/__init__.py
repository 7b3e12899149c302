"""Weights quantised by torchao for peftkit; see `peftkit_torchao.layers`."""
