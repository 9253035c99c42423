"""Pictures of what the study measures: `llama-ref lens … --png DIR`, or from Python.

Each `draw_…` writes a PNG file; the `…_figure` next to it returns the matplotlib Figure for further
changes. matplotlib (extra `study`) is imported only when a figure is drawn.
"""

from llama_ref.study.figures.attention import draw_attention, draw_pattern
from llama_ref.study.figures.attribution import draw_attribution
from llama_ref.study.figures.grid import draw_grid
from llama_ref.study.figures.image_attention import draw_image_attention, draw_image_layers
from llama_ref.study.figures.lens import draw_lens, draw_target
from llama_ref.study.figures.overview import draw_overview
from llama_ref.study.figures.residual import draw_norms
from llama_ref.study.figures.saliency import draw_saliency
from llama_ref.study.figures.saving import check_folder, check_pictures

__all__ = [
    "check_folder",
    "check_pictures",
    "draw_attention",
    "draw_attribution",
    "draw_grid",
    "draw_image_attention",
    "draw_image_layers",
    "draw_lens",
    "draw_norms",
    "draw_overview",
    "draw_pattern",
    "draw_saliency",
    "draw_target",
]
