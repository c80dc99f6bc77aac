"""Static quantization of networks to int8: programs on maps of bytes."""
