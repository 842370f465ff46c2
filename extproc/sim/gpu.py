"""How long the modelled GPU takes: every constant of the model, in one place. No I/O, no clocks.

The calibration point is one DP rank of the DeepSeek-R1 deployment in "Deploying DeepSeek with PD Disaggregation and
Large-Scale Expert Parallelism on 96 H100 GPUs" (LMSYS blog, 2025-05): 52.3k prompt tokens/s and 22.3k output tokens/s
for a node of 8 ranks with 2,000-token prompts. Where a constant is our own choice, its comment says so.
"""

from dataclasses import dataclass

EXTRA_ROOM_PER_REQUEST_TOKENS = 512
"""KV cache that decode keeps free for each active request (SGLang's `--num-reserved-decode-tokens` default)."""


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One DP rank's speed and size. All times are virtual GPU time."""

    prefill_tokens_per_s: float = 6_500.0
    """52.3k tokens/s a node / 8 ranks."""
    prefill_batch_overhead_ms: float = 5.0
    """Launch and scheduling time of one prefill batch, whatever its size (our choice)."""
    chunk_tokens: int = 8_192
    """SGLang's `--chunked-prefill-size` default on large GPUs: the most prompt tokens in one prefill batch."""
    decode_base_ms: float = 15.0
    """Time of a decode step that does nothing: weights read once (our choice)."""
    decode_per_request_ms: float = 0.1
    """With base and KV cost this puts batch 256 x 2,000 tokens at 91.8 ms, i.e. 22.3k tokens/s a node."""
    decode_per_kv_token_us: float = 0.1
    """Attention reads the whole KV cache of the batch in every step."""
    kv_capacity_tokens: int = 600_000
    """KV cache of one rank (`max_total_num_tokens`): holds the calibration point's 512k tokens with some room."""
    max_running_requests: int = 256
    """Largest decode batch (the golden files' value)."""
    reserved_decode_tokens: int = EXTRA_ROOM_PER_REQUEST_TOKENS
    kv_bytes_per_token: int = 70_272
    """DeepSeek-V3's MLA cache: 61 layers x 576 values x 2 bytes."""
    kv_transfer_gb_per_s: float = 25.0
    """Half of a 400 Gb/s NIC (our choice)."""
    kv_transfer_base_ms: float = 1.0
    """Handshake and first write of a transfer (our choice)."""
    metrics_decode_interval: int = 40
    """Decode iterations between two updates of the /metrics gauges (SGLang's `--decode-log-interval` default)."""
    metrics_idle_s: float = 30.0
    """An idle scheduler refreshes its /metrics gauges when they are this old."""
    loads_decode_interval: int = 15
    """Decode iterations between two published /v1/loads snapshots."""
    loads_stalled_s: float = 0.05
    """Oldest a /v1/loads snapshot gets while no batch runs."""

    def prefill_s(self, tokens: int) -> float:
        """Duration of one prefill batch of that many prompt tokens."""
        return self.prefill_batch_overhead_ms / 1e3 + tokens / self.prefill_tokens_per_s

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Duration of one decode step over that many requests and cached tokens."""
        milliseconds = self.decode_base_ms + self.decode_per_request_ms * batch
        return milliseconds / 1e3 + self.decode_per_kv_token_us * kv_tokens / 1e6

    def transfer_s(self, tokens: int) -> float:
        """Time from the end of prefill to the end of the KV transfer.

        Only the last chunk counts: the engine sends earlier chunks while it computes later ones.
        """
        return self.kv_transfer_base_ms / 1e3 + tokens * self.kv_bytes_per_token / (self.kv_transfer_gb_per_s * 1e9)
