"""`bootstrap_room`: the engine decides, by `bootstrap_room % dp_size` (SGLang's `follow_bootstrap_room`)."""

from collections.abc import Sequence

from extproc.load import WorkerState


class BootstrapRoom:
    """What happens without a scheduler; selected by switching `dp_minimum_tokens_scheduler` off."""

    def select_dp_rank(
        self, state: WorkerState, tokens: float, rank_tokens: Sequence[float] | None = None
    ) -> int | None:
        """None: no rank is injected."""
        return None
