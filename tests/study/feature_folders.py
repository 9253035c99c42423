"""Small random dictionaries of features in every public format, and each paper's formula in plain NumPy."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

Formula = Callable[[np.ndarray], np.ndarray]


@dataclass
class Written:
    """A written folder or file, with its formulas: x to features (n, S), and (features, x) to the output (n, D)."""

    path: Path
    encode: Formula
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    form: str


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype("f4") / max(1, shape[-1]) ** 0.5 for shape in shapes]


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)).contiguous() for name, array in arrays.items()}


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def largest(z: np.ndarray, k: int) -> np.ndarray:
    """z with zeros except for the k largest values of each row."""
    border = np.sort(z, axis=-1)[:, -k][:, None]
    return np.where(z >= border, z, 0)


def llama_scope(
    folder: Path,
    dim: int,
    n: int,
    seed: int = 0,
    *,
    layer: int = 1,
    kind: str = "R",
    unit_norm: bool = False,
    **changed: object,
) -> Written:
    """Decoder rows have arbitrary norms, so that a comparison without the norms would fail, unless `unit_norm`."""
    path = folder / f"Llama3_1-8B-Base-L{layer}{kind}-8x"
    w_enc, b_enc, w_dec, b_dec = numbers(seed, (n, dim), (n,), (n, dim), (dim,))
    w_dec *= 1 / np.linalg.norm(w_dec, axis=1, keepdims=True) if unit_norm else np.linspace(0.2, 3, n, dtype="f4")[:, None]
    reads = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out", "TC": "ln2.hook_normalized"}[kind]
    writes = "hook_mlp_out" if kind == "TC" else reads
    norm_in, norm_out, threshold = 3.5, 3.5 if kind != "TC" else 1.25, 0.4
    config = {
        "d_model": dim,
        "d_sae": n,
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "top_k": 50,
        "hook_point_in": f"blocks.{layer}.{reads}",
        "hook_point_out": f"blocks.{layer}.{writes}",
    }
    (path / "checkpoints").mkdir(parents=True)
    (path / "hyperparams.json").write_text(json.dumps(config | changed))
    arrays = {"encoder.weight": w_enc, "encoder.bias": b_enc, "decoder.weight": w_dec.T, "decoder.bias": b_dec}
    save_file(tensors(**arrays), path / "checkpoints/final.safetensors")

    def encode(x: np.ndarray) -> np.ndarray:
        """As the authors' code does: scales and norms are folded into the weights, then the threshold applies."""
        if kind == "TC":
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        norms = np.linalg.norm(w_dec * norm_out / dim**0.5, axis=1)
        folded_encoder = w_enc * (dim**0.5 / norm_in) * norms[:, None]
        features = x @ folded_encoder.T + b_enc * norms
        return np.where(features > threshold, features, 0) / norms

    return Written(path, encode, lambda f, x: (f @ w_dec + b_dec) * norm_out / dim**0.5, "Llama Scope")


def sparsify(
    folder: Path, dim: int, n: int, seed: int = 0, *, name: str = "layers.1", k: int = 5, skip: bool = False, **changed: object
) -> Written:
    """`num_latents` is 0, as in the published files, so n must be a multiple of dim."""
    path = folder / name
    w_enc, b_enc, w_dec, b_dec, w_skip = numbers(seed, (n, dim), (n,), (n, dim), (dim,), (dim, dim))
    config = {"expansion_factor": n // dim, "normalize_decoder": True, "num_latents": 0, "k": k, "signed": False, "d_in": dim}
    path.mkdir(parents=True)
    config |= changed
    (path / "cfg.json").write_text(json.dumps(config))
    arrays = {"encoder.weight": w_enc, "encoder.bias": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    save_file(tensors(**arrays, **({"W_skip": w_skip} if skip else {})), path / "sae.safetensors")

    def encode(x: np.ndarray) -> np.ndarray:
        x = x if config.get("transcode") else x - b_dec
        z = x @ w_enc.T + b_enc
        return largest(z if config["signed"] else relu(z), k)

    return Written(path, encode, lambda f, x: f @ w_dec + b_dec + (x @ w_skip.T if skip else 0), "sparsify")


def goodfire(folder: Path, dim: int, n: int, seed: int = 0, *, name: str = "Llama-3.1-8B-Instruct-SAE-l1.pth") -> Written:
    w_enc, b_enc, w_dec, b_dec = numbers(seed, (n, dim), (n,), (n, dim), (dim,))
    arrays = {"encoder_linear.weight": w_enc, "encoder_linear.bias": b_enc}
    arrays |= {"decoder_linear.weight": w_dec.T, "decoder_linear.bias": b_dec}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(tensors(**arrays)), folder / name)
    return Written(folder / name, lambda x: relu(x @ w_enc.T + b_enc), lambda f, x: f @ w_dec + b_dec, "Goodfire")


def dictionary_learning(
    folder: Path, dim: int, n: int, seed: int = 0, *, layer: int = 1, k: int | None = None, **changed: object
) -> Written:
    """BatchTopK; with a k, AutoEncoderTopK, whose threshold the formula does not use."""
    path = folder / f"resid_post_layer_{layer}" / "trainer_1"
    w_enc, b_enc, w_dec, b_dec = numbers(seed, (n, dim), (n,), (n, dim), (dim,))
    threshold = 0.3
    name = "BatchTopKSAE" if k is None else "AutoEncoderTopK"
    trainer = {"dict_class": name, "layer": layer, "activation_dim": dim, "dict_size": n, "k": k or 64}
    trainer |= {"submodule_name": f"resid_post_layer_{layer}", "lm_name": "Llama"}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"trainer": trainer | changed, "buffer": {}}))
    found = tensors(b_dec=b_dec, **{"encoder.weight": w_enc, "encoder.bias": b_enc, "decoder.weight": w_dec.T})
    torch.save(OrderedDict(found, k=torch.tensor(k or 64, dtype=torch.int), threshold=torch.tensor(threshold)), path / "ae.pt")

    def encode(x: np.ndarray) -> np.ndarray:
        z = relu((x - b_dec) @ w_enc.T + b_enc)
        return np.where(z > threshold, z, 0) if k is None else largest(z, k)

    return Written(path, encode, lambda f, x: f @ w_dec + b_dec, "dictionary_learning")


CONFIG = """model_name: "meta-llama/Llama-3.2-1B"
model_kind: {kind}
feature_input_hook: "mlp.hook_in"  # before the matrices
feature_output_hook: "mlp.hook_out"
transcoders:
- "hf://somewhere/layer_0.safetensors"
"""


def transcoders(
    folder: Path, dim: int, n: int, seed: int = 0, *, layer: int = 1, thresholds: bool = False, skip: bool = False
) -> Written:
    path = folder / "transcoder-Llama-3.2-1B"
    w_enc, b_enc, w_dec, b_dec, w_skip, least = numbers(seed, (n, dim), (n,), (n, dim), (dim,), (dim, dim), (n,))
    least = np.abs(least) * 3 if thresholds else np.zeros(n, "f4")
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG.format(kind="transcoder_set"))
    arrays = {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    arrays |= {"W_skip": w_skip} if skip else {}
    arrays |= {"activation_function.threshold": least} if thresholds else {}
    save_file(tensors(**arrays), path / f"layer_{layer}.safetensors")

    def encode(x: np.ndarray) -> np.ndarray:
        z = x @ w_enc.T + b_enc
        return np.where(z > least, z, 0)

    return Written(
        path / f"layer_{layer}.safetensors",
        encode,
        lambda f, x: f @ w_dec + b_dec + (x @ w_skip.T if skip else 0),
        "circuit-tracer",
    )


@dataclass
class CrossLayer:
    """A cross-layer transcoder's folder and arrays: encoders (S, D), biases, and decoders (S, layers left, D)."""

    path: Path
    w_enc: list[np.ndarray]
    b_enc: list[np.ndarray]
    w_dec: list[np.ndarray]
    b_dec: list[np.ndarray]
    least: list[np.ndarray]

    def encode(self, layer: int, x: np.ndarray) -> np.ndarray:
        z = x @ self.w_enc[layer].T + self.b_enc[layer]
        return np.where(z > self.least[layer], z, 0)

    def decode(self, layer: int, features: list[np.ndarray]) -> np.ndarray:
        """The sum of what all layers up to this one write to it."""
        return self.b_dec[layer] + sum(f @ self.w_dec[n][:, layer - n] for n, f in enumerate(features[: layer + 1]))


def cross_layer(
    folder: Path, dim: int, n: int, n_layers: int, seed: int = 0, *, biases: bool = True, thresholds: bool = False
) -> CrossLayer:
    path = folder / "clt"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG.format(kind="cross_layer_transcoder"))
    made = CrossLayer(path, [], [], [], [], [])
    for i in range(n_layers):
        w_enc, b_enc, w_dec, b_dec, least = numbers(seed + i, (n, dim), (n,), (n, n_layers - i, dim), (dim,), (n,))
        least = np.abs(least) * 3 if thresholds else np.zeros(n, "f4")
        arrays = {f"W_enc_{i}": w_enc, f"b_enc_{i}": b_enc} | ({f"b_dec_{i}": b_dec} if biases else {})
        arrays |= {f"threshold_{i}": least} if thresholds else {}
        save_file(tensors(**arrays), path / f"W_enc_{i}.safetensors")
        b_dec = b_dec if biases else np.zeros_like(b_dec)
        save_file(tensors(**{f"W_dec_{i}": w_dec}), path / f"W_dec_{i}.safetensors")
        lists = (made.w_enc, made.b_enc, made.w_dec, made.b_dec, made.least)
        for own, array in zip(lists, (w_enc, b_enc, w_dec, b_dec, least), strict=True):
            own.append(array)
    return made
