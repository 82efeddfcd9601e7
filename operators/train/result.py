"""What a finished training is known by: the manifest of a student, and the value of the asset `student`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

MANIFEST = "manifest.json"  # the last file of a student's folder: its TrainResult


class TrainResult(BaseModel):
    """A finished student and how it was trained. Losses in nats per supervised token, with the noise on.

    Attributes:
        version: name of the student under `students/`; "" where nothing named it.
        folder: its Hugging Face folder.
        student: the model that it was made from.
        identity: hash of packs, student and everything in the configuration that changes the result.
        packs, packs_digest: how many packs there were, and a hash of their rows and lengths.
        steps, tokens, supervised_tokens, examples: over the whole run; those before `train.resume_from` are not its.
        seconds: of the steps that count; wall_seconds: of the last call, with loading and export.
        tokens_per_second: tokens / seconds.
        losses, grad_norms: by step; a norm is None where DeepSpeed does not tell it.
        neft_l2: mean norm of the noise over all documents; None without noise.
        validation_losses: by finished steps, of packs kept out of training, without noise.
        best_step: after how many steps the exported weights were had; None where nothing was evaluated.
        mfu: mean share of the devices' peak; None where the peak is not known.
        goodput: share of the time from the first attempt on that went into steps which count.
        attention: of the configuration; attention_implementation: what carried out exact attention.
        hyper_attention_layers: how many layers used HyperAttention.
        zero_stage: that was used; num_workers, precision, backend: of the workers.
        peak_rss_bytes: by worker.
        notes: what the reader should know, such as a damaged checkpoint that was passed over.
        config: the configuration of the training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = ""
    folder: str
    student: str
    identity: str
    packs: int
    packs_digest: str
    steps: int
    tokens: int
    supervised_tokens: int
    examples: int
    seconds: float
    wall_seconds: float
    tokens_per_second: float
    first_loss: float
    last_loss: float
    losses: list[float]
    grad_norms: list[float | None]
    neft_l2: float | None
    validation_losses: dict[int, float] = {}
    best_step: int | None = None
    mfu: float | None = None
    goodput: float | None = None
    neftune_alpha: float
    attention: str
    attention_implementation: str
    hyper_attention_layers: int
    zero_stage: int
    num_workers: int
    precision: str
    backend: str
    peak_rss_bytes: list[int]
    notes: list[str]
    config: dict[str, Any]
