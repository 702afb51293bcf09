"""The names of a checkpoint's layers behind the prefix of one of vLLM's layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Prefix that vLLM adds to the names of a draft model's layers.
DRAFT_PREFIX = "draft_model."


def local_name(prefix: str, stored: Mapping[str, str]) -> str:
    """`prefix` without the name of the model in which vLLM's model is a draft or a part.

    `stored` gives the name in the files of each layer, by vLLM's name. vLLM-Omni calls a layer of the thinker
    "thinker.language_model...". The thinker's mapper has dropped "thinker." from the names in the files.
    """
    prefix = prefix.removeprefix(DRAFT_PREFIX)
    part = prefix.partition(".")[0] + "."
    dropped = any(name.startswith(part) and not mapped.startswith(part) for mapped, name in stored.items())
    return prefix.removeprefix(part) if dropped else prefix


def packed_names(prefix: str, packed: Mapping[str, Collection[str]]) -> list[str]:
    """The names that the model class packs into a layer: ...qkv_proj -> q_proj, k_proj, v_proj; none if it packs none.

    The longest packed key wins: the towers have both `attn.qkv` and `qkv`.
    """
    keys = [key for key in packed if prefix.endswith("." + key)]
    if not keys:
        return []
    key = max(keys, key=len)
    return [prefix.removesuffix(key) + shard for shard in packed[key]]


def stacked_names(prefix: str, listed: Collection[str]) -> list[str]:
    """The names that vLLM stacks into a layer while it loads; model classes such as StableLM's list no packed ones.

    The name itself if the checkpoint quantizes none of them.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.model_loader.utils import get_model_cls

    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return [prefix]
    mapper = getattr(get_model_cls(config.model_config), "hf_to_vllm_mapper", None)
    stacked = {} if mapper is None else mapper.orig_to_new_stacked
    names = [prefix.removesuffix(fused) + part for part, (fused, _) in stacked.items() if prefix.endswith(fused)]
    return names if any(name in listed for name in names) else [prefix]
