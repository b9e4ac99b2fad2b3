"""ElasticViT: supernet training with conflict-aware sampling, and the search for deployable sub-networks."""
