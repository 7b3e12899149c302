"""Methods whose sites share their large tensors: VeRA (`peftkit_vera.vera`) and VB-LoRA (`peftkit_vera.vblora`)."""
