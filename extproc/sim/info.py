"""What the engine says about itself: `/server_info`, `/model_info`, `/v1/models`. No I/O."""

from typing import Any

from extproc.sim.config import EngineConfig
from extproc.sim.job import Role
from extproc.sim.loads_text import VERSION


def server_info(config: EngineConfig, port: int, bootstrap_port: int, used_tokens: list[int]) -> dict[str, Any]:
    """Resolved start-up arguments (with the key in clear, sgl-project/sglang#30166), and one state for each rank."""
    states = [
        {
            "dp_rank": rank,
            "last_gen_throughput": 0.0,
            "memory_usage": {"token_capacity": config.gpu.kv_capacity_tokens},
            "effective_max_running_requests_per_dp": config.gpu.max_running_requests,
            "max_total_num_tokens": config.gpu.kv_capacity_tokens,
            "num_used_tokens": used,
        }
        for rank, used in enumerate(used_tokens)
    ]
    return {
        "model_path": config.model,
        "tokenizer_path": config.model,
        "served_model_name": config.model,
        "host": config.host,
        "port": port,
        "tp_size": config.dp_size,
        "dp_size": config.dp_size,
        "pp_size": 1,
        "enable_dp_attention": config.dp_size > 1,
        "enable_metrics": True,
        "context_length": config.context_tokens,
        "chunked_prefill_size": config.gpu.chunk_tokens,
        "max_running_requests": config.gpu.max_running_requests * config.dp_size,
        "max_total_tokens": config.gpu.kv_capacity_tokens,
        "max_total_num_tokens": config.gpu.kv_capacity_tokens,
        "disaggregation_mode": config.role.value,
        "disaggregation_bootstrap_port": bootstrap_port,
        "api_key": config.api_key,
        "load_balance_method": "round_robin" if config.role is Role.NULL else "follow_bootstrap_room",
        "status": "ready",
        "version": VERSION,
        "internal_states": states,
    }


def model_info(config: EngineConfig) -> dict[str, Any]:
    """The model, as routers ask for it."""
    return {
        "model_path": config.model,
        "tokenizer_path": config.model,
        "served_model_name": config.model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "simulated",
        "architectures": ["SimulatedForCausalLM"],
        "disaggregation_mode": config.role.value,
    }


def models(config: EngineConfig, created: int) -> dict[str, Any]:
    """OpenAI's list of models."""
    card = {
        "id": config.model,
        "object": "model",
        "created": created,
        "owned_by": "sglang",
        "root": config.model,
        "parent": None,
        "max_model_len": config.context_tokens,
    }
    return {"object": "list", "data": [card]}
