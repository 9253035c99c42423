"""Int8 layers work at any address and row length, though PyTorch's kernel supports only some."""

import subprocess
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

RUN = textwrap.dedent("""
    import itertools
    import torch
    from llama_ref.compiled.int8_layout import PiecewiseInt8Linear
    from llama_ref.quantization.linear import Int8Linear

    def moved(tensor, residue):
        '''A copy that begins `residue` items behind a multiple of 64 bytes.'''
        memory = torch.empty(tensor.numel() + 128, dtype=tensor.dtype)
        start = -memory.data_ptr() % 64 // tensor.element_size() + residue
        return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)

    def check(layer, x):
        expected = x.float() @ layer.dequantize().T
        error = (layer(x).float() - expected).norm() / expected.norm()
        assert error < 0.01, (x.shape, x.dtype, error)

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for columns, n_rows in itertools.product((16, 20, 30, 2731, 576), (1, 3, 4, 5)):
            plain = Int8Linear.from_weight(torch.randn(40, columns))
            x = torch.randn(n_rows, columns).to(dtype)
            for residue in range(16):
                check(Int8Linear(moved(plain.q, residue), plain.scale), x)
                check(Int8Linear(plain.q, moved(plain.scale, residue)), x)
                check(plain, moved(x, residue))
        pieces = PiecewiseInt8Linear(Int8Linear.from_weight(torch.randn(40, 5120)))
        for n_rows, residue in itertools.product((1, 4), range(16)):
            check(pieces, moved(torch.randn(n_rows, 5120).to(dtype), residue))
""")


def test_layers_take_matrices_and_inputs_at_any_address(warm):
    """Run in a separate process, because a misaligned kernel call would crash it."""
    done = subprocess.run([warm / "python", "-c", RUN], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, (done.returncode, done.stderr)
