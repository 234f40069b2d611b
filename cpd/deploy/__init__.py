"""What runs the result: export, timing, prediction of latency, quantization."""
