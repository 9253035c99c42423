"""Study a model: record its activations, change them, and measure what its parts do.

Every activation has a name (names.py). `trace(model, tokens, names)` runs one text, or several of any
lengths, and keeps the activations whose names match; `trace_each` does so for many texts in turn, and
`recording(model, names)` for every pass in its block, generation included. A Trace converts to arrays
(`numpy()`) or a safetensors file (`save`, `Trace.load`). `collect(model, prompts, names, to=…)` stores the
activations of thousands of prompts, and `Collected` reads them.

`patch(model, {name: edit})` changes activations in its block: `zero()`, `mean()`, `scale(2)`,
`set_to(tensor)`, `swap_from(trace)`, each `.at(heads=…, positions=…, rows=…)`, or any function of a
tensor. `patch_grid(model, clean, corrupted, metric, over=…)` finds the activations that carry the
difference between two texts, and `attribution_patch` estimates this with a gradient. `logit_lenses` and
`patch_grids` take several texts at once.

`attribute_edges` scores the edges between parts, and `run_circuit` runs only some of them. `patch_path`
measures the direct effect of one part on others, and `cut` hides tokens from others. `composition`,
`copying` and `HeadCircuit` analyze heads by their weights alone. `sweep` measures what is lost without each
part, `ablate_together` without several, and `contrast_units` finds units that tell two kinds of texts apart.

`trace` and other functions take a vision release's images as `images=`, and `image_attention` finds where
in an image a text looks.

`mean_difference`, `principal_components` and `fit_probe` find directions, `steer` adds and `ablate`
removes them, and `log_likelihoods` and `answer_margins` measure the effect.

`open_features` reads sparse autoencoders and transcoders, `open_cross_layer` all layers of a cross-layer
transcoder. `firing` finds the features that fire in a text; `set_features`, `ablate_features` and others
make edits for `patch`; `measure_reconstruction` and `top_contexts` evaluate and describe features.
`TunedLens.fit` fits a tuned lens for `logit_lens(…, lens=…)`, and `score_lens` compares it with the logit lens.

`logit_lens`, `predict`, `attribute`, `saliency`, `summarize_attention`, `residual_stream`, `rope_waves`,
`spectra` and `quantization_errors` each answer one common question. `overview` answers most of them for one
text, and `write_report` writes the answers as an HTML page (pictures: `llama_ref.study.figures`).

Functions that read or edit activations, without gradients, also work on a model that is split across
processes: each process gets whole values (docs/parallel.md).

model.py does not depend on this package: hooks are installed on a model and removed again. Tracing does
not change a bit of the logits.
"""

from llama_ref.study.ablation.contrast import UnitContrast, contrast_units
from llama_ref.study.ablation.resample import resample
from llama_ref.study.ablation.sweep import Joint, Sweep, ablate_together, sweep
from llama_ref.study.analyses.attention import attention_pattern, summarize_attention
from llama_ref.study.analyses.attribution import attribute
from llama_ref.study.analyses.logit_lens import logit_lens, logit_lenses, predict
from llama_ref.study.analyses.overview import Overview, overview
from llama_ref.study.analyses.residual import residual_stream
from llama_ref.study.analyses.rope import rope_waves
from llama_ref.study.analyses.saliency import Saliency, saliency
from llama_ref.study.analyses.weights import quantization_errors, spectra
from llama_ref.study.circuits.composition import Composition, composition
from llama_ref.study.circuits.edges import attribute_edges
from llama_ref.study.circuits.faithfulness import CircuitCurve, circuit_curve, run_circuit
from llama_ref.study.circuits.graph import Edge, EdgeScores
from llama_ref.study.circuits.knockout import CutWindows, cut, cut_windows
from llama_ref.study.circuits.paths import PathEffects, patch_path
from llama_ref.study.circuits.vocabulary import Copying, HeadCircuit, copying
from llama_ref.study.datasets.collect import collect
from llama_ref.study.datasets.collected import Collected
from llama_ref.study.directions.control_vector import read_control_vector, write_control_vector
from llama_ref.study.directions.extraction import mean_difference, principal_components
from llama_ref.study.directions.probes import fit_probe
from llama_ref.study.directions.steering import ablate, answer_margins, log_likelihoods, share_of_tokens, steer
from llama_ref.study.features.active import Active
from llama_ref.study.features.contexts import Context, top_contexts
from llama_ref.study.features.cross_layer import CrossLayerTranscoder
from llama_ref.study.features.dictionary import Features
from llama_ref.study.features.edits import (
    ablate_features,
    clamp_features,
    scale_features,
    set_features,
    steer_features,
)
from llama_ref.study.features.firing import Firing, firing
from llama_ref.study.features.opening import open_cross_layer, open_features
from llama_ref.study.features.reconstruction import Reconstruction, measure_reconstruction
from llama_ref.study.names import all_names, axes
from llama_ref.study.patch import Edit, edit, mean, patch, scale, set_to, swap_from, zero
from llama_ref.study.patching.exact import patch_grid, patch_grids
from llama_ref.study.patching.gradient import attribution_grids, attribution_patch, attribution_patches
from llama_ref.study.patching.grid import Agreement, Grid
from llama_ref.study.patching.metrics import log_probability, logit_difference, probability
from llama_ref.study.patching.noise import Noise, noise
from llama_ref.study.report.writer import write_report
from llama_ref.study.trace import Recording, Trace, recording, trace, trace_each
from llama_ref.study.tuned.lens import TunedLens
from llama_ref.study.tuned.scores import LensScores, score_lens
from llama_ref.study.vision.image_attention import image_attention

__all__ = [
    "Active",
    "Agreement",
    "CircuitCurve",
    "Collected",
    "Composition",
    "Context",
    "Copying",
    "CrossLayerTranscoder",
    "CutWindows",
    "Edge",
    "EdgeScores",
    "Edit",
    "Features",
    "Firing",
    "Grid",
    "HeadCircuit",
    "Joint",
    "LensScores",
    "Noise",
    "Overview",
    "PathEffects",
    "Reconstruction",
    "Recording",
    "Saliency",
    "Sweep",
    "Trace",
    "TunedLens",
    "UnitContrast",
    "ablate",
    "ablate_features",
    "ablate_together",
    "all_names",
    "answer_margins",
    "attention_pattern",
    "attribute",
    "attribute_edges",
    "attribution_grids",
    "attribution_patch",
    "attribution_patches",
    "axes",
    "circuit_curve",
    "clamp_features",
    "collect",
    "composition",
    "contrast_units",
    "copying",
    "cut",
    "cut_windows",
    "edit",
    "firing",
    "fit_probe",
    "image_attention",
    "log_likelihoods",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "logit_lenses",
    "mean",
    "mean_difference",
    "measure_reconstruction",
    "noise",
    "open_cross_layer",
    "open_features",
    "overview",
    "patch",
    "patch_grid",
    "patch_grids",
    "patch_path",
    "predict",
    "principal_components",
    "probability",
    "quantization_errors",
    "read_control_vector",
    "recording",
    "resample",
    "residual_stream",
    "rope_waves",
    "run_circuit",
    "saliency",
    "scale",
    "scale_features",
    "score_lens",
    "set_features",
    "set_to",
    "share_of_tokens",
    "spectra",
    "steer",
    "steer_features",
    "summarize_attention",
    "swap_from",
    "sweep",
    "top_contexts",
    "trace",
    "trace_each",
    "write_control_vector",
    "write_report",
    "zero",
]
