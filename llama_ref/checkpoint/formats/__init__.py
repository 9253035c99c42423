"""Files of tensors: .pth and safetensors, read and written."""
