"""The KV cache of prompts that a prefill rank keeps for later ones with the same beginning. No I/O."""

from collections import OrderedDict
from collections.abc import Sequence

from extproc.lab.request import BLOCK_TOKENS


class PrefixCache:
    """Blocks of a trace, least recently used out first; a prompt's later blocks go before its earlier ones."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def hit_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Tokens at the prompt's front that are here. At least one token is always left to compute."""
        hits = 0
        for block in blocks:
            if block not in self._blocks:
                break
            hits += 1
        return min(hits * BLOCK_TOKENS, prompt_tokens - 1)

    def add(self, blocks: Sequence[int], prompt_tokens: int) -> None:
        """A prompt has been computed. Its last, partly filled block is not kept."""
        for block in reversed(blocks[: prompt_tokens // BLOCK_TOKENS]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
