"""How the graph passes get into vLLM's compiler."""

import logging
import pickle
from copy import deepcopy

import pytest

from morphoquant_vllm.plugin import fusion
from morphoquant_vllm.plugin.fusion import Fusions


def test_vllm_s_compiler_takes_the_passes_where_asked_and_keeps_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation.passes.inductor_pass import CallableInductorPass, InductorPass
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.platforms import current_platform

    config = VllmConfig()
    before = config.compilation_config.compute_hash()
    fusion.install(config, "triton")
    assert current_platform.pass_key not in config.compilation_config.inductor_compile_config
    monkeypatch.setenv("MORPHOQUANT_FUSION", "1")
    fusion.install(config, "cpu")
    assert current_platform.pass_key not in config.compilation_config.inductor_compile_config
    fusion.install(config, "triton")
    # vLLM copies its settings, and hashes them for its compilation cache.
    installed = deepcopy(config.compilation_config.inductor_compile_config)[current_platform.pass_key]
    assert isinstance(installed, InductorPass) and isinstance(installed, Fusions)
    assert pickle.loads(pickle.dumps(installed)).uuid() == installed.uuid()
    assert config.compilation_config.compute_hash() != before
    users = CallableInductorPass(lambda graph: None, uuid="mine")
    named = CompilationConfig(inductor_compile_config={current_platform.pass_key: users})
    config = VllmConfig(compilation_config=named)
    fusion.install(config, "triton")
    assert config.compilation_config.inductor_compile_config[current_platform.pass_key] is users


def test_the_passes_are_off_for_adapters_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.config import VllmConfig
    from vllm.config.lora import LoRAConfig
    from vllm.platforms import current_platform

    monkeypatch.setenv("MORPHOQUANT_FUSION", "1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = VllmConfig()
    config.lora_config = LoRAConfig()
    fusion.install(config, "triton")
    assert current_platform.pass_key not in config.compilation_config.inductor_compile_config
    assert [line for line in caplog.messages if "MORPHOQUANT_FUSION is off: adapters (LoRA)" in line]
