"""Chooses the implementation of exact attention for a student: torch's fast one where the architecture can use it."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig


def exact_attention(student: str) -> str:
    """Name for `attn_implementation`: "sdpa", or "eager" for architectures without it (GPT-Neo, BLOOM, MPT, Mamba).

    It is always named, so that an implementation in the student's config.json, for which a package may be missing here,
    is never used.

    Args:
        student: folder or hub id, as `resolve_model` returns it.

    Raises:
        ValueError: there is no causal language model for its configuration.
    """
    config = AutoConfig.from_pretrained(student, trust_remote_code=False)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise ValueError(f"student.model: {student} is a {config.model_type}, not a causal language model; use another")
    return "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"
