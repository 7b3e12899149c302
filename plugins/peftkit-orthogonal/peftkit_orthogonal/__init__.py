"""Methods that turn the weight by an orthogonal matrix: `oft` and `hra`, each in a module of its own."""
