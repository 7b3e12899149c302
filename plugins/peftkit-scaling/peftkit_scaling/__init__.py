"""Methods that learn vectors alone, each in a module of its own: scales, biases, norms, and rows of embeddings."""
