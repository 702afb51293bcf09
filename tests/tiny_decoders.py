"""Tiny random decoders of many architectures, in the published layout: those that calibration lists, and others."""

from pathlib import Path
from typing import Any

import transformers

from benchmarks.models.tiny_omni.processor import write_tokenizer
from tests.tiny_models import DECODER, write_model

_FACTORS = {"short_factor": [1 + i / 20 for i in range(12)], "long_factor": [2 + i / 10 for i in range(12)]}
# By model_type, with an ending for further ones of a type: transformers' class, and settings of its config that differ
# from those of DECODER.
# Every token id that a config names must exist, and head_dim is 32, the smallest that vLLM's CPU attention takes.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {"head_dim": 32, "sliding_window": 32}),
    # Stretched positions, and queries that are scaled more from every 16th token on.
    "ministral3": (
        "Ministral3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 256.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    # One block of three has full attention, as published: local and global positions both occur.
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    # q, k and v, and gate and up, are one matrix each.
    "phi3": ("Phi3ForCausalLM", {}),
    # Every fourth block has no rotary positions.
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "granite": (
        "GraniteForCausalLM",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    # Norms after attention and MLP, and of whole q and k.
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}),
    # LayerNorm with bias, a quarter of each head is rotated, biases of q, k and v.
    "stablelm": ("StableLmForCausalLM", {"use_qkv_bias": True}),
    # No gate, biases everywhere.
    "starcoder2": ("Starcoder2ForCausalLM", {"use_bias": True, "sliding_window": None}),
    # Attention and MLP read the same tensor. vLLM takes RMSNorm if the config names its epsilon.
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.5, "tie_word_embeddings": True, "rms_norm_eps": None}),
    # Norms around attention and MLP, gate and up in one matrix, interleaved positions.
    "glm4": ("Glm4ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "glm": ("GlmForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    # An MLP without a gate, whose activation is the square of relu.
    "nemotron": ("NemotronForCausalLM", {"head_dim": 32}),
    "phi": ("PhiForCausalLM", {}),
    # q, k and v in one matrix beside the MLP's first; blocks return tuples.
    "falcon": (
        "FalconForCausalLM",
        {
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_kv_heads": 1,
            "parallel_attn": True,
            "alibi": False,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 32}),
    # An MLP without a gate, whose activation is the square of relu, on Llama's attention.
    "arcee": ("ArceeForCausalLM", {}),
    "helium": ("HeliumForCausalLM", {"head_dim": 32}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "olmo": ("OlmoForCausalLM", {"clip_qkv": 2.0, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "vaultgemma": (
        "VaultGemmaForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "sliding_window": 32, "query_pre_attn_scalar": 32},
    ),
    "cwm": (
        "CwmForCausalLM",
        {"head_dim": 32, "bos_token_id": 0, "sliding_window": 32, "layer_types": ["sliding_attention"] * 2},
    ),
    "jais2": ("Jais2ForCausalLM", {"head_dim": 32}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {"head_dim": 32}),
    "granite_swa": ("GraniteSWAForCausalLM", {"head_dim": 32}),
    # Neither experts nor a state space: the third kind of Granite 4.
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
        },
    ),
    # vLLM's window is one token longer than transformers', so this one is longer than the prompt.
    "cohere2": (
        "Cohere2ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "logit_scale": 0.5,
            "tie_word_embeddings": True,
            "rms_norm_eps": None,
        },
    ),
    # Blocks might leave keys and values for later ones, but share none.
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "tie_word_embeddings": True,
        },
    ),
    "ministral": (
        "MinistralForCausalLM",
        {"head_dim": 32, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # transformers draws some weights by name after it has loaded them.
    "nanochat": ("NanoChatForCausalLM", {"head_dim": 32}),
    # vLLM replicates the linears of models without a tensor-parallel plan, as these two.
    "bitnet": ("BitNetForCausalLM", {"head_dim": 32}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"multi_query": True, "tie_word_embeddings": True}),
    # Its blocks hold a table of positions that no file holds.
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 16}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True}),
    # Norms come after attention and MLP; embeddings are narrower than the blocks.
    "opt-350m": (
        "OPTForCausalLM",
        {"ffn_dim": 256, "word_embed_proj_dim": 64, "do_layer_norm_before": False, "tie_word_embeddings": True},
    ),
    # Groups of queries share keys; q, k and v are one matrix, group by group.
    "falcon-40b": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    # Positions are scaled by two lists of factors, for short and for long prompts.
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                **_FACTORS,
            },
            "tie_word_embeddings": True,
        },
    ),
    "granite-bias": (
        "GraniteForCausalLM",
        {"logits_scaling": 2.0, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
}


def build_tiny_decoder(model_type: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model of `model_type` in DECODERS into `directory`; return it. `changes` are settings of its config."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, "text")
    name, settings = DECODERS[model_type]
    model_class = getattr(transformers, name)
    tokens = {"bos_token_id": None, "eos_token_id": ids["im_end"], "pad_token_id": ids["end"]}
    config = model_class.config_class(**{**DECODER, **tokens, **settings, **changes})
    return write_model(directory, model_class, config, seed, ids)
