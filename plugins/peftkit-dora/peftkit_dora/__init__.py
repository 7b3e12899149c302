"""DoRA for peftkit; see `peftkit_dora.dora`."""
