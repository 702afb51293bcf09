"""Decoding of images, audio and video, against signals whose content is known."""

import io
import math
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata

from calibration.data.conversations import Media
from calibration.data.media import decode_audio, decode_image, decode_video
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.media_files import encode_audio, encode_video, png, sine, turned_video


def media(kind: str, content: bytes | Path) -> Media:
    return Media(kind, content, "data.jsonl:7: thing")


def test_images_need_no_pyav_and_sound_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes an import fail as if the package were missing.
    monkeypatch.setitem(sys.modules, "av", None)
    assert decode_image(media("image", png(Image.new("RGB", (5, 3))))).size == (5, 3)
    for decode in (lambda: decode_audio(media("audio", b""), 16000), lambda: decode_video(media("video", b""), list)):
        with pytest.raises(MorphoQuantError, match="need the Python package 'av'; pip install av"):
            decode()


def test_importing_calibration_does_not_import_pyav() -> None:
    code = "import sys; sys.modules['av'] = None; import calibration.calibrate, calibration.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_image_from_bytes_and_file(tmp_path: Path) -> None:
    data = png(Image.new("RGB", (5, 3), (10, 20, 30)))
    (tmp_path / "a.png").write_bytes(data)
    for content in (data, tmp_path / "a.png"):
        image = decode_image(media("image", content))
        assert (image.mode, image.size, image.getpixel((4, 2))) == ("RGB", (5, 3), (10, 20, 30))


def test_transparent_image_lies_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    decoded = decode_image(media("image", png(image)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


def test_a_transparent_colour_of_rgb_is_left_as_it_is_as_in_vllm() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 1), (200, 0, 0)).save(buffer, "PNG", transparency=(200, 0, 0))
    assert decode_image(media("image", buffer.getvalue())).getpixel((0, 0)) == (200, 0, 0)


def test_image_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert decode_image(media("image", buffer.getvalue())).size == (4, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (3, 2))
    picture.putdata([(40 * index, 0, 0) for index in range(6)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        expected = ImageOps.exif_transpose(opened)
        assert decode_image(media("image", buffer.getvalue())).tobytes() == expected.tobytes()


@pytest.mark.parametrize("tag", [0x011A, 0x0128, 0x8769])
def test_malformed_exif_does_not_lose_the_picture(tag: int) -> None:
    """Cameras write tags with wrong types; Pillow's own transposing then fails."""
    # Little-endian TIFF with two tags: orientation 6 (SHORT), and one of type ASCII, "72".
    entries = [(0x0112, 3, 1, 6), (tag, 2, 3, 0x3237)]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + bytes(4)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert decode_image(media("image", buffer.getvalue())).size == (4, 8)


def test_names_in_a_sound_that_are_not_utf8_do_not_matter() -> None:
    wave = encode_audio([sine(0.1, 16000, 440)], 16000, "wav", "pcm_s16le")
    tag = b"LIST" + struct.pack("<I", 16) + b"INFOIART" + struct.pack("<I", 4) + b"Bj\xf6\0"
    named = wave[:12] + tag[:4] + struct.pack("<I", len(tag) - 8) + tag[8:] + wave[12:]
    named = named[:4] + struct.pack("<I", len(named) - 8) + named[8:]
    assert len(decode_audio(media("audio", named), 16000)) == 1600


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac")])
def test_audio_is_resampled_and_keeps_its_tone(container: str, codec: str) -> None:
    encoded = encode_audio([sine(1.0, 48000, 440)], 48000, container, codec)
    samples = decode_audio(media("audio", encoded), 16000)
    assert samples.dtype == np.float32 and samples.ndim == 1
    # The resampler's filter may round the length at the ends: a filter's width, 32 samples.
    assert abs(len(samples) - 16000) <= 32
    spectrum = np.abs(np.fft.rfft(samples))
    assert round(np.argmax(spectrum) * 16000 / len(samples)) == 440
    # 16-bit rounding and the filter's ripple: a percent.
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, rel=0.01)


def test_stereo_becomes_the_mean_of_its_channels() -> None:
    wave = sine(0.2, 16000, 200)
    samples = decode_audio(media("audio", encode_audio([wave, 0 * wave], 16000, "wav", "pcm_s16le")), 16000)
    # Two roundings to 16 bits.
    np.testing.assert_allclose(samples, wave / 2, atol=2 / 32768)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("count", [1, 100, 12345])
def test_sound_has_the_length_that_vllm_gives_it(rate: int, count: int) -> None:
    encoded = encode_audio([sine(count / rate, rate, 440)], rate, "wav", "pcm_s16le")
    assert len(decode_audio(media("audio", encoded), 16000)) == math.ceil(count * 16000 / rate)


def test_decoding_of_sound_stops_at_the_limit() -> None:
    encoded = encode_audio([sine(3.0, 48000, 440)], 48000, "flac", "flac")
    assert len(decode_audio(media("audio", encoded), 16000, 48000)) == 48000
    # The damaged end would be another error.
    damaged = encoded[: len(encoded) // 2] + bytes(len(encoded) // 2)
    with pytest.raises(MorphoQuantError, match=r"data.jsonl:7: thing: longer than 1 s, which max_tokens allows; raise"):
        decode_audio(media("audio", damaged), 16000, 16000)


def test_twenty_minutes_of_silence_in_a_small_file_takes_little_memory() -> None:
    encoded = encode_audio([np.zeros(16000 * 1200)], 16000, "flac", "flac")
    assert len(encoded) < 1e6
    tracemalloc.start()
    with pytest.raises(MorphoQuantError, match="longer than 60 s"):
        decode_audio(media("audio", encoded), 16000, 16000 * 60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * 16000 * 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    buffer = io.BytesIO()
    wave = np.zeros(16000, np.float32)
    wave[500] = value
    soundfile.write(buffer, wave, 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(MorphoQuantError, match=r"data.jsonl:7: thing: .* samples that are NaN or infinite"):
        decode_audio(media("audio", buffer.getvalue()), 16000)


def test_eps_is_no_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(MorphoQuantError, match=r"data.jsonl:7: thing: not decodable as image \(cannot identify"):
        decode_image(media("image", buffer.getvalue()))


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx-vp9")])
def test_video_frames_are_the_ones_asked_for(container: str, codec: str, tmp_path: Path) -> None:
    data = encode_video(20, 10, container, codec)
    (tmp_path / "clip").write_bytes(data)
    for content in (data, tmp_path / "clip"):
        frames, metadata = decode_video(media("video", content), every_fifth)
        assert frames.shape == (4, 32, 64, 3) and frames.dtype == np.uint8
        # Lossy coding of flat frames: half a step between frames is 4 levels.
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 40, 80, 120], atol=4)
        assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (20, 10.0, 2.0)
        assert (metadata.width, metadata.height, metadata.frames_indices) == (64, 32, [0, 5, 10, 15])
        assert metadata.sampled_fps == 2.0


# The place of the white quarter: above or below, left or right.
@pytest.mark.parametrize(("quarters", "place"), [(0, (0, 0)), (1, (0, 1)), (2, (1, 1)), (3, (1, 0))])
def test_a_phone_s_video_is_turned_upright(quarters: int, place: tuple[int, int]) -> None:
    (frame,), _ = decode_video(media("video", turned_video(quarters)), lambda info: [0])
    assert frame.shape == ((64, 32, 3) if quarters % 2 else (32, 64, 3))
    halves = frame.reshape(2, frame.shape[0] // 2, 2, frame.shape[1] // 2, 3).mean((1, 3, 4))
    assert np.argwhere(halves > 200).tolist() == [list(place)]


def test_video_index_past_the_end_is_the_last_frame() -> None:
    frames, metadata = decode_video(media("video", encode_video(6, 10)), lambda info: [0, 6])
    assert metadata.frames_indices == [0, 5] and len(frames) == 2


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_undecodable_media_names_it_and_the_remedy(kind: str, damage: str) -> None:
    whole = {
        "image": png(Image.effect_noise((64, 64), 50)),
        "audio": encode_audio([sine(0.1, 16000, 440)], 16000, "flac", "flac"),
        "video": encode_video(6, 10),
    }[kind]
    data = {"garbage": b"not media" * 20, "empty": b"", "truncated": whole[: len(whole) // 3]}[damage]
    if (kind, damage) == ("audio", "truncated"):
        data = whole[:40]  # a cut FLAC still plays as far as it goes; cut inside its header it does not
    with pytest.raises(MorphoQuantError) as caught:
        decode(media(kind, data))
    message = str(caught.value)
    assert message.startswith(f"data.jsonl:7: thing: not decodable as {kind} (") and "re-encode" in message
    assert "\n" not in message


def test_stream_of_the_wrong_kind() -> None:
    with pytest.raises(MorphoQuantError, match="no audio stream"):
        decode(media("audio", encode_video(6, 10)))
    with pytest.raises(MorphoQuantError, match="no video stream"):
        decode(media("video", encode_audio([sine(0.1, 16000, 440)], 16000, "wav", "pcm_s16le")))


def test_file_that_vanished(tmp_path: Path) -> None:
    for kind in ("image", "audio", "video"):
        with pytest.raises(MorphoQuantError, match="No such file"):
            decode(media(kind, tmp_path / "gone"))


def every_fifth(info: VideoMetadata) -> range:
    return range(0, info.total_num_frames, 5)


def decode(item: Media) -> object:
    if item.kind == "image":
        return decode_image(item)
    if item.kind == "audio":
        return decode_audio(item, 16000)
    return decode_video(item, lambda info: range(info.total_num_frames))
