"""Read and write tensor files: .pth and safetensors."""
