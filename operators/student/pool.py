"""Where a student runs for inference: how many actors, on which devices, and how much at a time."""

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from operators.stage import CustomResources, Operational, StageConfig, on_nodes_with


class StudentPoolConfig(StageConfig):
    """Actors that each hold one copy of the student, and what one forward pass may use."""

    batch_rows: Operational[int] = Field(
        64, ge=1, description="Number of rows that an actor gets at a time and sorts by length."
    )
    batch_tokens: Operational[int] = Field(
        4096,
        ge=1,
        description="Largest number of tokens of one forward pass, with padding; limits the memory of the logits.",
    )
    max_tokens: int = Field(
        2048,
        ge=2,
        description="Length of the longest sequence that is scored, in tokens; the report counts longer ones.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format of the student, on CPUs and on GPUs; bf16 takes half the memory and gives less "
        "precise scores.",
    )
    actors: Operational[int] = Field(1, ge=1, description="Number of actors, each with a copy of the student.")
    gpus_per_actor: Operational[float] = Field(
        0,
        ge=0,
        description="GPUs that an actor reserves; 0 runs the student on CPUs.",
    )
    cpus_per_actor: Operational[float] = Field(1, gt=0, description="Logical CPUs that an actor reserves.")
    custom_resources: CustomResources = on_nodes_with("actor")
    threads: Operational[int] = Field(1, ge=1, description="Number of torch threads of an actor on CPUs.")

    def resources(self) -> dict[str, Any]:
        """The resources of one actor, as options for Ray."""
        gpus = {"num_gpus": self.gpus_per_actor} if self.gpus_per_actor else {}
        custom = {"resources": self.custom_resources} if self.custom_resources else {}
        return {"num_cpus": self.cpus_per_actor, **gpus, **custom}


@lru_cache(maxsize=8)
def longest_context(model: str, max_tokens: int) -> int:
    """The configured limit, or the number of positions of a model, folder or hub id, where that is smaller."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    return min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
