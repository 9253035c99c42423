"""The hash that identifies the output matrix to which a published tuned lens was fitted.

It is the SHA-256 of the text that NumPy prints for the matrix in float32 with one decimal: only its
corners, if it has more than 1,000 entries. Two fine-tunings of one model may have the same hash.
"""

import hashlib
import sys

import numpy as np

from llama_ref.model import Transformer
from llama_ref.parallel.division import division_of
from llama_ref.quantization.linear import QuantizedMatrix
from llama_ref.study.analyses.attribution import matrix_rows

EDGE, PRINTED_WHOLE = 3, 1000  # NumPy's defaults: rows and columns of a corner; entries that are printed in full


def unembed_hash(model: Transformer) -> str | None:
    """The hash of a model's output matrix, in hex; None if it is quantized or split across processes."""
    if isinstance(model.output, QuantizedMatrix) or division_of(model).job.is_parallel:
        return None
    V, D = model.args.vocab_size, model.args.dim
    is_cut = V * D > PRINTED_WHOLE
    # Rows between the corners are not printed: one of them is enough.
    rows = [*range(EDGE + 1), *range(V - EDGE, V)] if is_cut and V > 2 * EDGE else list(range(V))
    printed = np.array2string(
        matrix_rows(model.output, rows).cpu().numpy(),
        precision=1,
        max_line_width=75,
        suppress_small=False,
        threshold=0 if is_cut else sys.maxsize,
        edgeitems=EDGE,
        floatmode="maxprec",
        sign="-",
    )
    return hashlib.sha256(printed.encode()).hexdigest()
