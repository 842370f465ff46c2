"""How many tokens a prompt has, before an engine has counted them; and what engines' counts teach about the next ones.

Pure. A prompt's text is measured in bytes, and a model's bytes per token are learned from the counts that engines give
with their answers. One mean for each endpoint and model: text in another language than the usual one (Chinese has about
3 bytes a token in its own UTF-8, 6 where a client escapes it) is estimated by the mean all the same.

`/generate` and `/v1/completions` carry text as it is. Of a chat the bytes are those of `messages` and `tools` as they
stand in the body, JSON and all, against the tokens that the engine's chat template makes of them: the means are kept
apart by endpoint, so that this overhead is part of the chat's own mean.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

BYTES_PER_TOKEN = 4.0
"""Before anything is known: a token of English text under a byte-pair vocabulary (OpenAI's rule of thumb)."""

MIN_BYTES_PER_TOKEN, MAX_BYTES_PER_TOKEN = 0.5, 16.0
"""No mean leaves these: a byte-level vocabulary has 1; escaped text (6 bytes a character), 2 characters a token, 12."""

PRIOR_TOKENS = 256
"""What the first guess counts for: a prompt of this length."""

KEEP = 1 - 1 / 32
"""Weight that is left of what was known, with each further count: about the last 32 count."""

FULL_WEIGHT_TOKENS = 4096
"""Long prompts make the load, so a count weighs by its tokens; up to this many, so that no single one decides."""

OUTLIER_FACTOR = 4.0
"""A prompt that is this far from the mean (base64 in a text, a run of blanks) counts as no farther than this."""

MEDIA_TOKENS = 765.0
"""Before anything is known: an image of 1024 x 1024, by OpenAI's table (170 tokens for each 512-pixel tile, and 85)."""

MAX_MEDIA_TOKENS = 16384.0
"""An image's or a video frame's most visual tokens (Qwen2-VL's largest setting)."""

LEARN_MEDIA = 1 / 16

ASK_FIRST, ASK_EVERY = 32, 16
"""The first 32 prompts of a model are asked for, then each 16th: the mean is known soon, and followed cheaply."""

MAX_COUNT_BYTES = 8 << 10
"""Longer prompts are not counted by a tokenizer: that takes 0.2 to 0.5 ms a KiB (docs/loads.md), and nobody is served
in that time. Their relative error by bytes is the smallest, too."""

MAX_MODELS = 64
MAX_NAME = 128
"""Means that are kept, least recently used out first, and characters of a model's name that tell them apart: clients
choose the names where no model is configured."""


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """What a prompt's length is estimated from."""

    text_bytes: int
    media: int = 0
    """Images, videos and sounds in it, whose own bytes are not in `text_bytes`."""
    prompts: int = 1


@dataclass(slots=True)
class Mean:
    """What is known of one endpoint and model."""

    text_bytes: float = BYTES_PER_TOKEN * PRIOR_TOKENS
    tokens: float = PRIOR_TOKENS
    media_tokens: float = MEDIA_TOKENS
    asked: int = 0
    learned: int = 0
    """Counts that came back."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens


_UNKNOWN = Mean()


class TokenEstimator:
    """Estimates prompts and learns from counts. One for the service; not thread-safe, no locks needed on one loop."""

    def __init__(self, count: Callable[[str], int] | None = None, max_count_bytes: int = MAX_COUNT_BYTES) -> None:
        """`count`: tokens of a text by the model's own tokenizer, for prompts up to `max_count_bytes`."""
        self.count = count
        self.max_count_bytes = max_count_bytes
        self._means: OrderedDict[tuple[str, str], Mean] = OrderedDict()

    def __repr__(self) -> str:
        return f"<TokenEstimator {self.known()}>"

    def tokens(self, endpoint: str, model: str | None, prompt: Prompt) -> float:
        """The estimate; at least 1 for each prompt."""
        mean = self._means.get((endpoint, (model or "")[:MAX_NAME]), _UNKNOWN)
        tokens = prompt.text_bytes * mean.tokens / mean.text_bytes
        if prompt.media:
            tokens += prompt.media * mean.media_tokens
        return tokens if tokens > prompt.prompts else float(prompt.prompts)

    def ask(self, endpoint: str, model: str | None) -> bool:
        """Whether an engine's count of this prompt is wanted. Call once for each request."""
        key = endpoint, (model or "")[:MAX_NAME]
        mean = self._means.get(key)
        if mean is None:
            mean = self._means[key] = Mean()
            if len(self._means) > MAX_MODELS:
                self._means.popitem(last=False)
        else:
            self._means.move_to_end(key)
        mean.asked += 1
        return mean.asked <= ASK_FIRST or mean.asked % ASK_EVERY == 0

    def learn(self, endpoint: str, model: str | None, prompt: Prompt, counted_tokens: float) -> None:
        """An engine has counted a prompt. A count of a model that was forgotten meanwhile is dropped."""
        mean = self._means.get((endpoint, (model or "")[:MAX_NAME]))
        if mean is None or counted_tokens <= 0:
            return
        mean.learned += 1
        ratio = mean.bytes_per_token
        if prompt.media:  # how its tokens divide is not known: the text is taken as estimated, the rest is media
            rest = (counted_tokens - prompt.text_bytes / ratio) / prompt.media
            mean.media_tokens += LEARN_MEDIA * (min(max(rest, 1.0), MAX_MEDIA_TOKENS) - mean.media_tokens)
            return
        usual = min(max(prompt.text_bytes / counted_tokens, ratio / OUTLIER_FACTOR), ratio * OUTLIER_FACTOR)
        weight = min(counted_tokens, FULL_WEIGHT_TOKENS)
        bounded = min(max(usual, MIN_BYTES_PER_TOKEN), MAX_BYTES_PER_TOKEN)
        mean.text_bytes = KEEP * mean.text_bytes + weight * bounded
        mean.tokens = KEEP * mean.tokens + weight

    def known(self) -> dict[tuple[str, str], Mean]:
        """What has been learned, by endpoint and model."""
        return {key: mean for key, mean in self._means.items() if mean.learned}
