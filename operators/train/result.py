"""The result of a finished training: the manifest of a student, and the value of the asset `student`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

MANIFEST = "manifest.json"  # the last file of a student's folder: its TrainResult


class TrainResult(BaseModel):
    """A finished student and how it was trained. Losses are in nats per supervised token, with noise.

    Attributes:
        version: name of the student under `students/`; "" if it has none.
        folder: its Hugging Face folder.
        student: the base model.
        identity: hash of packs, student and everything in the configuration that changes the result.
        packs, packs_digest: number of packs, and a hash of their rows and lengths.
        steps, tokens, supervised_tokens, examples: over the whole run, without those before `train.resume_from`.
        seconds: of the finished steps; wall_seconds: of the last call, with loading and export.
        tokens_per_second: tokens / seconds.
        losses, grad_norms: by step; a norm is None in students of older versions, trained under ZeRO 0 in fp32.
        neft_l2: mean norm of the noise over all documents; None without noise.
        validation_losses: number of finished steps -> loss on packs kept out of training, without noise.
        best_step: number of finished steps of the exported weights; None if nothing was evaluated.
        mfu: mean share of the devices' peak; None if the peak is unknown.
        goodput: share of the time since the first attempt that was spent in finished steps.
        attention: as configured; attention_implementation: the code that ran exact attention.
        hyper_attention_layers: number of layers that used HyperAttention.
        zero_stage: the one that was used; num_workers, precision, backend: of the workers.
        peak_rss_bytes: by worker.
        notes: sentences for the reader, for example about a damaged checkpoint that was skipped.
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
    chat_template: str = ""
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
