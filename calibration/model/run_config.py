"""What a config.json says about a run of the model in transformers, replaced by what calibration needs."""

from __future__ import annotations

from typing import Any

# They compute the same as any other, and need no further package.
_PLAIN_ATTENTION = ("eager", "sdpa")
# Settings of a run that its publisher left there. Each would change what modules return, and not their numbers.
_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def prepare_run(config: Any) -> Any:
    """transformers' config, changed in place: the usual outputs, and attention that every machine computes.

    A publisher may have named FlashAttention, which vLLM does not read there. If the model caps the scores of its
    attention, plain attention computes: the others leave the cap out.
    """
    capped = False
    parts = [config]
    while parts:
        part = parts.pop()
        capped |= bool(getattr(part, "attn_logit_softcapping", None))
        if part._attn_implementation not in _PLAIN_ATTENTION:
            # transformers chooses.
            part._attn_implementation = None
        for name, value in _OUTPUTS.items():
            setattr(part, name, value)
        parts += [getattr(part, name) for name in part.sub_configs if getattr(part, name, None) is not None]
    if capped:
        config._attn_implementation = "eager"
    return config
