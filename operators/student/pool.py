"""Where a student runs that only reads: how many actors, on what, and how much at a time."""

from typing import Any

from pydantic import Field

from operators.stage import Operational, StageConfig


class StudentPoolConfig(StageConfig):
    """Actors that each hold one copy of the student, and what one forward pass may use."""

    batch_rows: Operational[int] = Field(
        64, ge=1, description="rows handed to an actor at a time, and sorted by length there"
    )
    batch_tokens: Operational[int] = Field(
        4096, ge=1, description="padded tokens of one forward pass; bounds the logits' memory"
    )
    max_tokens: int = Field(2048, ge=2, description="longest sequence that is read, tokens; longer ones are not scored")
    actors: Operational[int] = Field(1, ge=1, description="copies of the student")
    gpus_per_actor: Operational[float] = Field(
        0, ge=0, description="0 runs the student on CPUs in float32, else in bfloat16"
    )
    cpus_per_actor: Operational[float] = Field(1, gt=0, description="CPUs that an actor reserves")
    threads: Operational[int] = Field(1, ge=1, description="torch threads of an actor on CPUs")

    def resources(self) -> dict[str, Any]:
        """What one actor asks of Ray."""
        gpus = {"num_gpus": self.gpus_per_actor} if self.gpus_per_actor else {}
        return {"num_cpus": self.cpus_per_actor, **gpus}
