"""How evenly work is spread over DP ranks, from the engines' own records. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from extproc.demo.verify import EngineRecords


@dataclass(slots=True)
class RankUse:
    """What one DP rank has done."""

    engine: EngineRecords
    dp_rank: int
    requests: int = 0
    """A batch whose prompts ran on several ranks counts on each."""
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """What took room in the rank's KV cache: prompts on a prefill rank, prompts and output on a decode rank."""
        return self.prompt_tokens + (self.output_tokens if self.engine.role == "decode" else 0)


def use_of_ranks(engines: Sequence[EngineRecords]) -> list[RankUse]:
    """Every rank of every engine, in order."""
    uses = []
    for engine in engines:
        ranks = [RankUse(engine, dp_rank) for dp_rank in range(engine.dp_size)]
        for record in engine.records:
            for dp_rank in set(record["ranks"]):
                ranks[dp_rank].requests += 1
            rows = zip(record["ranks"], record["prompt_tokens"], record["output_tokens"], strict=False)
            for dp_rank, prompt_tokens, output_tokens in rows:
                ranks[dp_rank].prompt_tokens += prompt_tokens
                ranks[dp_rank].output_tokens += output_tokens
        uses.extend(ranks)
    return uses


def spread(tokens: Sequence[int]) -> float | None:
    """Largest over mean: 1 is even, the number of ranks is all on one. None: there was nothing to spread."""
    return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else None
