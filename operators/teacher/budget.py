"""Hard limits on the cost of the teacher, over all calls in the ledger of a storage."""

from dataclasses import dataclass

from pydantic import Field

from operators.stage import Operational, StageConfig

MILLION = 1_000_000


class BudgetConfig(StageConfig):
    """Limits on the whole ledger, all stages and runs together; none by default. Costs are in your own currency."""

    max_tokens: Operational[int | None] = Field(
        None,
        ge=1,
        description="Largest number of tokens, prompt and generated, of all calls of this storage; null: no limit.",
    )
    max_cost: Operational[float | None] = Field(
        None,
        gt=0,
        description="Largest cost of all calls of this storage, in your currency; null: no limit.",
    )
    prompt_price: float = Field(0.0, ge=0, description="Price of a million prompt tokens, in your currency.")
    generated_price: float = Field(0.0, ge=0, description="Price of a million generated tokens, in your currency.")

    def is_limited(self) -> bool:
        """Whether a limit is set."""
        return self.max_tokens is not None or self.max_cost is not None

    def cost(self, tokens: "Tokens") -> float:
        """What these tokens cost, in the unit of the prices."""
        return (tokens.prompt * self.prompt_price + tokens.generated * self.generated_price) / MILLION

    def exceeded_by(self, tokens: "Tokens") -> str:
        """Key and value of the limit that these tokens exceed; "" if they exceed none."""
        if self.max_tokens is not None and tokens.prompt + tokens.generated > self.max_tokens:
            return f"budget.max_tokens: {self.max_tokens}"
        if self.max_cost is not None and self.cost(tokens) > self.max_cost:
            return f"budget.max_cost: {self.max_cost:g}"
        return ""


@dataclass(frozen=True)
class Tokens:
    """Tokens read and written by a teacher."""

    prompt: int = 0
    generated: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.generated + other.generated)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.generated - other.generated)
