"""LoRA trained otherwise: AdaLoRA (`adalora`), LoRA+ (`lora_plus`) and LoRA-FA (`lora_fa`)."""
