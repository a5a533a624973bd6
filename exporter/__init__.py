"""From a model to an artifact folder: quantise and write ONNX. Needs the extra `export`."""
