"""What the user sees of a run: meters, console, TensorBoard, pictures and the journal."""
