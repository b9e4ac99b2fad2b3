"""Console, TensorBoard and journal."""
