"""Updates of high rank from small matrices: `loha` and `lokr`, each in a module of its own."""
