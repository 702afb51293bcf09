"""The samples that calibration is given, and its process."""

import io
import json
import sys
from pathlib import Path

import av
import pytest

from benchmarks.common.questions.items import Item, Media
from benchmarks.paper import calibration
from calibration.data.data_files import load_conversations
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.paper.published import options, write_published
from tests.calibration.media_files import turned_video
from tests.tiny_conversations import image_bytes, sound_bytes, write_video

PYTHON = sys.executable
NAMES = ("scienceqa", "mmmu", "video-mme", "air-bench")


def test_samples_are_of_training_splits_and_of_held_out_media(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    sources = calibration.prepare(tmp_path / "data", tmp_path / "out", NAMES, options(tmp_path))
    assert sources["samples"] == {"scienceqa": 4, "mmmu": 3, "video-mme": 1, "air-bench": 1}
    assert sources["held_out"] == {"video-mme": ["data/aBc-1.mp4"], "air-bench": ["Music_Genre_fma/0.wav"]}
    conversations = load_conversations(tmp_path / "out" / calibration.DATA_FILE)
    kinds = [
        part.kind
        for conversation in conversations
        for message in conversation.messages  # type: ignore[union-attr]
        for part in message.parts
        if hasattr(part, "kind")
    ]
    assert {kind: kinds.count(kind) for kind in kinds} == {"image": 6, "video": 1, "audio": 1}
    assert all(conversation.messages[-1].role == "assistant" for conversation in conversations)  # type: ignore[union-attr]


def test_samples_are_made_once(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    first = calibration.prepare(tmp_path / "data", tmp_path / "out", NAMES, options(tmp_path))
    written = (tmp_path / "out" / calibration.DATA_FILE).read_bytes()
    # Had the data changed since, what is held out would still be what calibration saw.
    again = calibration.prepare(tmp_path / "nowhere", tmp_path / "out", NAMES, options(tmp_path))
    assert again == first
    # The same data make the same bytes, by which calibration knows its work again.
    calibration.prepare(tmp_path / "data", tmp_path / "other", NAMES, options(tmp_path))
    assert (tmp_path / "other" / calibration.DATA_FILE).read_bytes() == written


def test_nothing_is_held_out_on_demand(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    sources = calibration.prepare(tmp_path / "data", tmp_path / "out", NAMES, options(tmp_path, "--no-hold-out"))
    assert sources["samples"] == {"scienceqa": 4, "mmmu": 3} and sources["held_out"] == {}
    with pytest.raises(MorphoQuantError, match="no calibration sample in it; give some with --calibration-data"):
        calibration.prepare(tmp_path / "data", tmp_path / "none", ["air-bench"], options(tmp_path, "--no-hold-out"))


def test_the_shares_make_the_papers_number_of_samples() -> None:
    shares = calibration.SHARES
    assert sum(calibration.SAMPLES * share // sum(shares.values()) for share in shares.values()) == 128


def sample(*media: Media, duration: str = "short") -> Item:
    return Item("1", (*media, "?"), {}, ("A",), {"duration": duration})


def test_media_that_are_missing_large_or_long_make_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tmp_path / "a.wav"
    sound.write_bytes(sound_bytes(0))
    heard = Media("audio", "wav", sound)
    picture = Media("image", "png", image_bytes(0))
    assert calibration.fits(sample(picture)) and calibration.fits(sample(heard))
    assert not calibration.fits(sample(picture, duration="long"))
    assert not calibration.fits(sample(Media("audio", "wav", tmp_path / "none.wav")))
    monkeypatch.setattr(calibration, "SOUND_SECONDS", 1.0)
    assert not calibration.fits(sample(heard))
    for broken in (b"", b"RIFF"):
        sound.write_bytes(broken)
        assert not calibration.fits(sample(heard))
    monkeypatch.setattr(calibration, "PIXELS", 112 * 84)
    assert calibration.fits(sample(picture)) and not calibration.fits(sample(picture, picture))


def test_a_clip_shows_evenly_spaced_frames_of_the_whole_video(tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", 0, frames=64)
    with av.open(io.BytesIO(calibration.clip((tmp_path / "long.mp4").read_bytes())), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == calibration.RATE  # type: ignore[arg-type]
    assert len(frames) == calibration.FRAMES and frames[0].shape == (64, 96, 3)
    # The square has left the field after a few frames of 64, so it is in few of those shown.
    assert sum(bool((frame[..., 0] > 180).sum() > 100) for frame in frames) < 5
    with pytest.raises(MorphoQuantError, match="cannot be decoded"):
        calibration.clip(b"no video")


def test_a_clip_of_a_phone_s_video_is_turned_upright() -> None:
    with av.open(io.BytesIO(calibration.clip(turned_video(1))), "r") as container:
        frame = next(container.decode(video=0))
    assert (frame.width, frame.height, frame.rotation) == (32, 64, 0)


def run(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """`calibrate` with another program in the place of calibration."""
    program = tmp_path / "program"
    program.write_text(f"#!{PYTHON}\nimport sys, time\n{code}")
    program.chmod(0o755)
    monkeypatch.setattr(calibration.sys, "executable", str(program))
    (tmp_path / "out").mkdir(exist_ok=True)
    return calibration.calibrate(tmp_path / "model", [tmp_path / "d"], tmp_path / "out", ["--dtype", "bfloat16"])


def test_its_last_line_says_why_calibration_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MorphoQuantError, match=r"^calibration failed: no room; its log is .*calibration.log$"):
        run(tmp_path, "print('block 1'); sys.exit('error: no room')", monkeypatch)


def test_time_is_added_up_over_interrupted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TICK_SECONDS", 0.05)
    with pytest.raises(MorphoQuantError):
        run(tmp_path, "time.sleep(0.4); sys.exit(1)", monkeypatch)
    kept = json.loads((tmp_path / "out" / calibration.SECONDS_FILE).read_text())
    assert kept > 0.3
    seconds = run(tmp_path, "time.sleep(0.1)", monkeypatch)
    assert seconds > kept + 0.1
    words = "import pathlib; pathlib.Path('words').write_text(' '.join(sys.argv))"
    monkeypatch.chdir(tmp_path)
    run(tmp_path, words, monkeypatch)
    assert (tmp_path / "words").read_text().endswith(f"--output {tmp_path / 'out' / 'checkpoint'} --dtype bfloat16")


def test_a_checkpoint_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "out" / calibration.SECONDS_FILE).write_text("12.5")
    assert run(tmp_path, "sys.exit(1)", monkeypatch) == 12.5
