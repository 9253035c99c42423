"""Compute the answers of one peer of compare_study.py, in the peer's own environment.

    PYTHON oracles.py PEER INPUTS.json ARRAYS.safetensors ANSWERS.safetensors

PEER is the name of a package on PyPI. Prints its version as JSON, or what is not installed.
"""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Answers = dict[str, Tensor]


def main(peer: str, inputs: str, arrays: str, answers: str) -> None:
    printed = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    given = json.loads(Path(inputs).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    try:
        found = {"version": version(peer)}
        own = answer(peer, given, load_file(arrays))
        save_file({name: value.detach().contiguous() for name, value in own.items()}, answers)
    except PackageNotFoundError:
        found = {"missing": "not installed"}
    except ModuleNotFoundError as error:
        found = {"missing": f"not installed: {error.name}"}
    print(json.dumps(found), file=printed, flush=True)


def answer(peer: str, given: dict[str, Any], arrays: Answers) -> Answers:
    if peer not in DICTIONARIES:
        return MODELS[peer](given, arrays)
    found = {}
    for title, path in given["dictionaries"][peer].items():
        with torch.no_grad():
            found[f"{title}: features"], found[f"{title}: output"] = DICTIONARIES[peer](Path(path), arrays[title])
    return found


# ---- dictionaries: (path, activations) to (features, output)


def sparsify(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path)
    found = coder.encode(x)
    features = torch.zeros(len(x), coder.num_latents).scatter(-1, found.top_indices, found.top_acts)
    return features, coder(x).sae_out


def dictionary_learning(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from dictionary_learning.utils import load_dictionary

    autoencoder, _ = load_dictionary(str(path), "cpu")
    return autoencoder.encode(x), autoencoder(x)


def sae_lens(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Llama Scope's folder, or Goodfire's file. SAELens folds the former's scale into the weights when loaded."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE

    def local(repo_id: str, filename: str, subfolder: str = "", **others: Any) -> str:
        return str(path.parent / subfolder / filename)

    loaders.hf_hub_download = local  # type: ignore[assignment]
    settings = {"dtype": "float32", "device": "cpu"}
    if path.is_dir():
        config, weights, _ = loaders.llama_scope_sae_huggingface_loader("fnlp/any", path.name, cfg_overrides=settings)
    else:
        shape = {"d_in": x.shape[1], "d_sae": len(torch.load(path)["encoder_linear.bias"])}
        config, weights, _ = loaders.get_goodfire_huggingface_loader(
            f"Goodfire/{path.stem}", path.name, cfg_overrides=settings | shape
        )
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.process_state_dict_for_loading(weights)
    sae.load_state_dict(weights)
    if path.is_dir():
        norms = json.loads((path / "hyperparams.json").read_text(encoding="utf-8"))["dataset_average_activation_norm"]
        sae.fold_activation_norm_scaling_factor(x.shape[1] ** 0.5 / norms["in"])
    return sae.encode(x), sae(x)


def llamascopium(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Llama Scope's folder with its authors' code, which folds the scales into the weights before inference."""
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    file = json.loads((path / "hyperparams.json").read_text(encoding="utf-8"))
    kept = ("d_model", "act_fn", "norm_activation", "sparsity_include_decoder_norm", "hook_point_in", "hook_point_out")
    factor = file["d_sae"] / file["d_model"]
    sae = SparseAutoEncoder(SAEConfig(expansion_factor=factor, dtype=torch.float32, **{key: file[key] for key in kept}))
    stored = load_file(path / "checkpoints/final.safetensors")
    weights = {"W_E": stored["encoder.weight"].T, "b_E": stored["encoder.bias"]}
    weights |= {"W_D": stored["decoder.weight"].T, "b_D": stored["decoder.bias"]}
    least = torch.full((file["d_sae"],), file["jump_relu_threshold"]).log()
    sae.load_state_dict(weights | {"activation_function.log_jumprelu_threshold": least})
    norms = file["dataset_average_activation_norm"]
    sae.set_dataset_average_activation_norm({file["hook_point_in"]: norms["in"], file["hook_point_out"]: norms["out"]})
    sae.standardize_parameters_of_dataset_norm()
    if file["hook_point_in"].endswith("hook_normalized"):  # of TransformerLens: normed, before the norm's weights
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5)
    features = sae.encode(x)
    return features * file["d_model"] ** 0.5 / norms["in"], sae.decode(features)  # features before folding


def circuit_tracer(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """A file of one layer with x (T, D), or a cross-layer transcoder's folder with x (L, T, D)."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    if path.is_dir():
        every = load_clt(str(path), device=torch.device("cpu"), dtype=torch.float32)
        return every.encode(x), every(x)
    one = load_relu_transcoder(str(path), 1, device=torch.device("cpu"))
    return one.encode(x), one(x)


# ---- with the demo model in transformers' form


def hugging_face(given: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model in float32, and the ids (1, T) of a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given["converted"], dtype=torch.float32).requires_grad_(False)
    return model, torch.tensor([given["ids"]])


def captum(given: dict[str, Any], arrays: Answers) -> Answers:
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    model, ids = hugging_face(given)
    table = model.get_input_embeddings()

    def logit(embedded: Tensor) -> Tensor:
        return model(inputs_embeds=embedded).logits[:, -1, given["target"]]

    end = table(ids).requires_grad_()
    begin = table.weight.mean(0).repeat(1, ids.shape[1], 1)
    begin[:, 0] = end[:, 0].detach()  # begin-of-text does not move
    settings = {"n_steps": given["steps"], "method": "gausslegendre", "internal_batch_size": 8}
    integrated = IntegratedGradients(logit).attribute(end, begin, **settings)
    return {
        "integrated gradients": integrated[0].sum(-1),
        "input × gradient": InputXGradient(logit).attribute(end)[0].sum(-1),
        "length of the gradient": Saliency(logit).attribute(end, abs=False)[0].norm(dim=-1),
    }


def tuned_lens(given: dict[str, Any], arrays: Answers) -> Answers:
    from tuned_lens.nn.lenses import TunedLens
    from tuned_lens.nn.unembed import Unembed

    model, ids = hugging_face(given)
    unembed = Unembed(model)
    lens = TunedLens.from_unembed_and_pretrained(unembed, given["lens"])
    with torch.no_grad():
        streams = model(ids, output_hidden_states=True).hidden_states
        logprobs = [lens(streams[i][0], i).log_softmax(-1) for i in range(len(lens))]
        return {
            "translated residuals": torch.stack([lens.transform_hidden(h, i) for i, h in enumerate(arrays["residuals"])]),
            "entropy at every layer": torch.stack([-(each.exp() * each).sum(-1) for each in logprobs]),
            "hash of the output matrix": torch.tensor(list(bytes.fromhex(unembed.unembedding_hash()))),
        }


def repeng(given: dict[str, Any], arrays: Answers) -> Answers:
    np.float_ = np.float64  # type: ignore[attr-defined]  # repeng 0.4.0 uses this name of NumPy 1
    from repeng import ControlModel, ControlVector

    vector = ControlVector.import_gguf(given["control_vector"])
    model, ids = hugging_face(given)
    steered = ControlModel(model, sorted(vector.directions))
    steered.set_control(vector, given["scale"])
    with torch.no_grad():
        logits = steered(ids).logits[0]
    directions = [torch.from_numpy(vector.directions[layer]) for layer in sorted(vector.directions)]
    return {"control vector from GGUF": torch.stack(directions), "logits steered by it": logits}


DICTIONARIES = {
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "llamascopium": llamascopium,
    "circuit-tracer": circuit_tracer,
}
MODELS = {"captum": captum, "tuned-lens": tuned_lens, "repeng": repeng}

if __name__ == "__main__":
    main(*sys.argv[1:])
