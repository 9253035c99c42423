"""Meta's quantized releases: the tensors in their files, and the matrices that they become."""
