"""The configuration of training, and values that it determines: DeepSpeed's settings and the learning rate."""

import hashlib
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from operators.stage import CustomResources, Operational, StageConfig, on_nodes_with
from operators.train import quantise, zero
from operators.train.lora import LoraConfig
from operators.train.optimizer import OptimizerName, deepspeed_settings, refusal
from operators.train.refusals import impossible
from operators.train.schedule import Schedule, remaining
from operators.train.trackers import TrackerName
from operators.train.zero import Offload, zero_settings

if TYPE_CHECKING:  # torch takes seconds to import
    from kernels.hyper_attention import HyperAttentionConfig

# Keys that students of earlier releases were made without.
_LATER = ("start", "optimizer", "muon_rate_factor", "quantize")


class TrainConfig(StageConfig):
    """Supervised fine-tuning with NEFTune.

    NEFTune's authors (arXiv:2310.05914) train 7B models with AdamW, learning rate 5e-5 in the paper and 2e-5 in
    their script, 3 epochs, 128 examples per step, bf16, cosine schedule, warm-up 3 %, no weight decay, gradients
    clipped to 1, and alpha 5, 10 or 15; 70B: weight decay 0.1, 64 examples per step, 2e-5, alpha 15.
    """

    num_workers: Operational[int] = Field(
        default=1, ge=1, description="Number of training processes; the loss curve does not depend on it."
    )
    min_workers: Operational[int] = Field(
        default=0,
        ge=0,
        description="Smallest number of training processes with which a training starts, and goes on after nodes were "
        "lost; 0 always waits for `num_workers`.",
    )
    sequence_parallel: Operational[int] = Field(
        default=1,
        ge=1,
        description="Number of workers that share a pack, each with a slice of its tokens, so that its activations are "
        "divided (DeepSpeed Ulysses); it divides `num_workers` and the student's heads of attention.",
    )
    zero_stage: Operational[Literal[0, 1, 2, 3]] = Field(
        default=2,
        description="What DeepSpeed ZeRO shards over the workers; with bf16, 0 runs as 1, with the same result.",
    )
    offload: Operational[Offload] = Field(
        default="none",
        description="What is kept in the memory of the host instead of the GPU's, which is slower: the optimizer with "
        "its step, or with ZeRO stage 3 also the weights.",
    )
    max_steps: int = Field(default=0, ge=0, description="Number of optimizer steps; 0 means as many as `epochs` takes.")
    epochs: int = Field(default=3, ge=1, description="Number of passes over the packs; unused if `max_steps` is set.")
    packs_per_step: int = Field(
        default=8,
        ge=1,
        description="Packs of one optimizer step over all workers; unused if examples or tokens are counted.",
    )
    examples_per_step: int = Field(
        default=0,
        ge=0,
        description="Examples of one optimizer step over all workers, as nearly as whole packs allow; 0 counts packs.",
    )
    tokens_per_step: int = Field(
        default=0,
        ge=0,
        description="Tokens of one optimizer step over all workers, as nearly as whole packs allow; 0 counts packs.",
    )
    optimizer: OptimizerName = Field(
        default="adamw",
        description="The optimizer; adamw_8bit needs bitsandbytes, adafactor ZeRO stage 0 in fp32, and muon trains the "
        "matrices of the layers, adamw the rest.",
    )
    muon_rate_factor: float = Field(
        default=10, gt=0, description="Learning rate of Muon's matrices, as a multiple of `learning_rate`."
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="The learning rate at the end of the warm-up.")
    schedule: Schedule = Field(
        default="cosine",
        description="How the rate falls after the warm-up; wsd stays constant and falls linearly over the last fifth.",
    )
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1, description="Fraction of the steps with linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="Largest 2-norm of the gradient; a larger one is scaled down. Unused by muon, whose "
        "updates have a fixed size.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Number format of the training; bf16 keeps fp32 master weights."
    )
    activation_checkpointing: Operational[bool] = Field(
        default=False, description="Recompute activations in the backward pass instead of storing them."
    )
    packs_per_pass: Operational[int] = Field(
        default=1,
        ge=1,
        description="Packs that a worker reads in one forward pass; several keep a GPU busier, and need as many times "
        "the memory. With dropout it is always one.",
    )
    compile: Operational[bool] = Field(
        default=False,
        description="Compile the student's layers with torch.compile: faster on GPUs, after a minute of compiling.",
    )
    neftune_alpha: float = Field(default=5.0, ge=0, description="Alpha of NEFTune's noise; 0 switches the noise off.")
    neftune_noise: Literal["uniform", "gaussian", "symmetric"] = Field(
        default="uniform",
        description="Distribution of the noise; all three have the variance of the paper's uniform one.",
    )
    attention: Literal["sdpa", "hyper_attention"] = Field(
        default="sdpa", description="Attention of the student during training; sdpa is exact."
    )
    hyper_attention: dict[str, int | str] = Field(
        default={},
        description="Mode and sizes of HyperAttention, as in `kernels.hyper_attention.HyperAttentionConfig`.",
    )
    hyper_attention_layers: str | list[int] = Field(
        default="all",
        description="Layers with HyperAttention: all, last:n, first:n, even, odd or a list; the others stay exact.",
    )
    start: Literal["base", "released"] = Field(
        default="base",
        description="Where training starts: from the base model, or from the released student if it was made from this "
        "base model. With released, pack.mixture chooses the earlier data that is trained on again.",
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="Low-rank adapters instead of all weights.")
    quantize: Literal["none", "4bit"] = Field(
        default="none",
        description="Number format of the frozen weights under adapters: 4bit (QLoRA, needs bitsandbytes) takes a "
        "quarter of the memory of bf16.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order of the packs, of noise, dropout and adapters.")
    evaluate_every_steps: int = Field(
        default=0,
        ge=0,
        description="Number of steps between two evaluations on packs that are kept out of training; the weights with "
        "the lowest loss are exported. 0 keeps no pack out and exports the last weights.",
    )
    validation_share: float = Field(
        default=0.05, gt=0, lt=1, description="Fraction of the packs that is kept out of training for evaluations."
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="Number of evaluations without a lower loss after which training stops; 0 never stops early.",
    )
    checkpoint_every_steps: Operational[int] = Field(
        default=100,
        ge=0,
        description="Number of steps between two checkpoints; 0 saves none. A restart without one begins at step 0.",
    )
    checkpoint_every_minutes: Operational[float] = Field(
        default=0, ge=0, description="Minutes after which a checkpoint is saved in any case; 0 counts only steps."
    )
    checkpoint_in_background: Operational[bool] = Field(
        default=True, description="Write checkpoints while training goes on, from a copy in the host's memory."
    )
    keep_checkpoints: Operational[int] = Field(
        default=2, ge=1, description="Number of checkpoints that are kept during training; all are deleted at its end."
    )
    resume_from: str = Field(
        default="",
        description="Folder `step-<number>` of another run's checkpoint, from which this run takes weights, optimizer "
        "and step, such as one before a divergence; empty begins with the student.",
    )
    trackers: Operational[list[TrackerName]] = Field(
        default=[],
        description="Experiment trackers beside TensorBoard: wandb, mlflow; each has to be installed, and is set up by "
        "its own environment variables.",
    )
    max_failures: Operational[int] = Field(
        default=3, ge=0, description="Number of restarts of the workers before the run fails."
    )
    gpus_per_worker: Operational[float] = Field(
        default=0, ge=0, le=1, description="GPUs of a worker; 0 trains on the CPU with gloo."
    )
    cpus_per_worker: Operational[float] = Field(default=1, gt=0, description="Logical CPUs that a worker reserves.")
    threads_per_worker: Operational[int] = Field(
        default=0, ge=0, description="Number of torch threads of a worker; 0 leaves the choice to Ray."
    )
    custom_resources: CustomResources = on_nodes_with("worker")

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> Self:
        if self.examples_per_step and self.tokens_per_step:
            raise ValueError(
                f"examples_per_step: {self.examples_per_step} together with tokens_per_step: "
                f"{self.tokens_per_step}; set one"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if problem := refusal(self) or quantise.refusal(self) or zero.refusal(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _fewer_workers_are_fewer(self) -> Self:
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than num_workers: {self.num_workers}")
        return self

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience and not self.evaluate_every_steps:
            raise ValueError(f"patience: {self.patience} without evaluations; set evaluate_every_steps")
        return self

    @model_validator(mode="after")
    def _sizes_are_known(self) -> Self:
        if self.attention == "sdpa" and not self.hyper_attention:
            return self
        try:
            self.hyper_attention_config()
        except TypeError as error:
            from kernels.hyper_attention import HyperAttentionConfig

            known = ", ".join(field.name for field in fields(HyperAttentionConfig))
            raise ValueError(
                f"hyper_attention: {str(error).rpartition(' ')[2]}: no such key; there are {known}"
            ) from None
        return self

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if problem := impossible(self):
            raise ValueError(problem)
        return self

    def hyper_attention_config(self) -> "HyperAttentionConfig":
        """Mode and sizes for the layers that use HyperAttention; mode "causal_local" unless configured otherwise."""
        from kernels.hyper_attention import HyperAttentionConfig

        values: dict[str, Any] = {"mode": "causal_local", **self.hyper_attention}
        return HyperAttentionConfig(**values)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or self.epochs * steps_per_epoch

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Linear warm-up, then the schedule; `step` counts from 0 and its rate is never zero."""
        warmup = math.ceil(self.warmup_fraction * total_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * remaining(self.schedule, progress)

    @model_validator(mode="after")
    def _a_released_student_has_all_weights(self) -> Self:
        if self.start == "released" and self.lora.r and not self.lora.merge:
            raise ValueError("start: released with lora.merge: false, whose students are adapters alone; merge them")
        return self

    def identity(self) -> dict[str, Any]:
        """Leave out newer keys unless they are set, so that older work stays valid."""
        return {key: chosen for key, chosen in super().identity().items() if key not in self._unset()}

    def run_identity(self, digest: str, student: str) -> str:
        """Hash of everything that determines the trained weights, up to rounding.

        Args:
            digest: of the packs.
            student: the model that is trained.
        """
        chosen = self.model_dump_json(exclude={*self.operational(), *self._unset()})
        return hashlib.blake2b(f"{digest} {student} {chosen}".encode(), digest_size=16).hexdigest()

    def _unset(self) -> set[str]:
        return {key for key in _LATER if getattr(self, key) == type(self).model_fields[key].default}

    @property
    def sharding(self) -> int:
        """The ZeRO stage that is used: at least 1 with bf16, as stage 0 does not accumulate its gradients in fp32."""
        return max(1, self.zero_stage) if self.precision == "bf16" else self.zero_stage

    def deepspeed(self, workers: int = 0, weights: int = 0) -> dict[str, object]:
        """DeepSpeed's own configuration: one pack per micro-step, no operation that compiles at run time.

        The loop itself marks the micro-step that ends an optimizer step, because steps have different numbers of packs.
        """
        config: dict[str, object] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            **deepspeed_settings(self),
            "zero_optimization": zero_settings(self, workers, weights),
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if self.precision == "bf16":
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return config
