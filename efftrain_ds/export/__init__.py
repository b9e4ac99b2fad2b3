"""From a checkpoint to files that other programs load: timm weights, ONNX, a folder for a model hub."""
