"""NEFTune's noise for a student: divided by the constant with which the student multiplies its embeddings."""

from contextlib import AbstractContextManager
from typing import Any

from kernels.neftune import EmbeddingNoise, neftune
from operators.student.embedding_gain import embedding_gain
from operators.train.config import TrainConfig


def configured_noise(model: Any, config: TrainConfig) -> AbstractContextManager[EmbeddingNoise]:
    """The context in which the student's embeddings get the configured noise; every worker must call this.

    Raises:
        ValueError: the noise cannot have the norm alpha / sqrt(3) at the student's first layer.
    """
    gain = 1.0
    if config.neftune_alpha:
        found = embedding_gain(model)
        if found.problem:
            raise ValueError(f"train: train.neftune_alpha: {found.problem}")
        gain = found.factor
    return neftune(model.get_input_embeddings(), config.neftune_alpha, config.seed, config.neftune_noise, gain)


def note_of(noise: EmbeddingNoise) -> str:
    """What the report says about the noise; "" if there is nothing to say."""
    if noise.gain == 1:
        return ""
    return (
        f"NEFTune: the student multiplies its embeddings by {noise.gain:.6g} after the noise, which was divided by "
        "this factor"
    )
