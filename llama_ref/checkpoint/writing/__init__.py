"""New folders from old ones: converted, resharded or quantized."""
