"""The built-in workloads of `peftkit bench`, each written as a third party's plugin would be.

A module is imported when one of its workloads is asked for; what a workload needs besides is imported, and
downloaded, by its methods. So that a listing imports nothing, the names stand here.
"""

MODULES = {
    "tiny-mlp": "synthetic",
    "tiny-llama": "synthetic",
    "tiny-bert": "synthetic",
    "mlp": "synthetic",
    "llama-small": "synthetic",
    "gpt2-small": "synthetic",
    "bert-small": "synthetic",
    "vit-small": "synthetic",
    "vit-digits": "digits",
    "cnn-pitch": "pitch",
    "lstm-voices": "voices",
    "minilm-sentiment": "text",
    "smollm2-reviews": "text",
}
"""Each workload's name, with the module of this package that offers it."""
