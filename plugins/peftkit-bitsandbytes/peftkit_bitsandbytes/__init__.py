"""Quantised layers of bitsandbytes for peftkit; see `peftkit_bitsandbytes.layers`."""
