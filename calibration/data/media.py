"""Decodes images, audio and video into the inputs of a Hugging Face processor."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata

from calibration.data.conversations import BadConversationError, Media
from morphoquant_vllm.errors import MorphoQuantError

if TYPE_CHECKING:
    import av

# Formats of pictures that are read. EPS would start Ghostscript; Pillow reads others too, which few people have.
IMAGE_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def decode_image(media: Media) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag, with transparency on white, as in vLLM.

    Raises BadConversationError naming the media if it is not an image or is truncated.
    """
    try:
        with Image.open(_open(media), formats=IMAGE_FORMATS) as opened:
            image = _upright(opened)
            # vLLM leaves RGB as it is, even if one colour of it counts as transparent.
            if image.mode != "RGB" and image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    # Pillow's decoders raise errors of any kind for broken files.
    except Exception as error:
        raise _undecodable(media, error) from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned by the orientation in its EXIF; EXIF that cannot be read says nothing of the picture."""
    image.load()
    try:
        image.getexif()
    except Exception:
        return image
    # It has been read. Pillow would also write it again for the turned picture, and fail if another tag is malformed.
    image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def decode_audio(media: Media, sampling_rate: int, limit: int | None = None) -> NDArray[np.float32]:
    """The first audio stream, [samples], mixed to mono and resampled to `sampling_rate` Hz, in [-1, 1].

    Raises BadConversationError naming the media if it has no audio, cannot be decoded, or holds NaN or infinity. So
    does a sound of more than `limit` samples, whose rest is not decoded.
    """
    library = _pyav()
    try:
        samples = _resampled(media, sampling_rate, limit)
        if not samples.size:
            raise ValueError("it holds no samples")
        if not np.isfinite(samples).all():
            raise ValueError("it holds samples that are NaN or infinite")
    except (library.FFmpegError, OSError, ValueError) as error:
        raise _undecodable(media, error) from error
    return samples


def _resampled(media: Media, sampling_rate: int, limit: int | None) -> NDArray[np.float32]:
    # The mean of the file's channels, as in vLLM: FFmpeg's mix to mono is up to 3 dB louder.
    library = _pyav()
    resampler = library.AudioResampler(format="fltp", rate=sampling_rate)
    pieces: list[NDArray[np.float32]] = []
    read, rate, length = 0, sampling_rate, 0

    def take(frames: Iterable[av.AudioFrame]) -> int:
        new = [frame.to_ndarray().mean(axis=0) for frame in frames]
        pieces.extend(new)
        return sum(map(len, new))

    with library.open(_open(media), mode="r", metadata_errors="replace") as container:
        if not container.streams.audio:
            raise ValueError("it has no audio stream")
        for frame in container.decode(container.streams.audio[0]):
            read, rate = read + frame.samples, frame.sample_rate
            length += take(resampler.resample(frame))
            if limit is not None and length > limit:
                raise BadConversationError(
                    f"{media.name}: longer than {limit / sampling_rate:.0f} s, which max_tokens allows; "
                    "raise max_tokens or use a shorter sound"
                )
        if read:
            take(resampler.resample(None))
    samples = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    # The length that vLLM's resampler gives: FFmpeg's filter adds or drops a few samples at the end.
    wanted = -(-read * sampling_rate // rate)
    return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))


def decode_video(
    media: Media, sample_frames: Callable[[VideoMetadata], Sequence[int]]
) -> tuple[NDArray[np.uint8], VideoMetadata]:
    """The frames that `sample_frames` selects, RGB uint8 [frames, height, width, 3], and their metadata.

    They stand upright, as in vLLM: a phone stores them as its sensor lies, and how they are turned beside them.
    `sample_frames` gets the metadata (frame count, frames per second, size) and returns frame numbers.
    Only those frames are held in memory. Raises BadConversationError naming the media if it has no video or cannot be
    decoded.
    """
    library = _pyav()
    # transformers' PyAV reader trusts the container's frame count: WebM has none, a truncated file states too many.
    try:
        total = sum(1 for _ in _video_frames(media))
        if not total:
            raise ValueError("it holds no frames")
        with library.open(_open(media), mode="r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise ValueError("it states no frame rate")
            metadata = VideoMetadata(
                total_num_frames=total,
                fps=float(rate),
                duration=total / float(rate),
                width=stream.width,
                height=stream.height,
                video_backend="pyav",
            )
        # The float steps of transformers' samplers can end one past the last frame.
        indices = [min(int(index), total - 1) for index in sample_frames(metadata)]
        wanted = set(indices)
        frames = {
            index: upright_frame(frame, frame.to_ndarray(format="rgb24"))
            for index, frame in enumerate(_video_frames(media))
            if index in wanted
        }
        metadata.frames_indices = indices
        return np.stack([frames[index] for index in indices]), metadata
    except (library.FFmpegError, OSError, ValueError) as error:
        raise _undecodable(media, error) from error


def upright_frame(frame: av.VideoFrame, pixels: NDArray[Any]) -> NDArray[Any]:
    """The `pixels` [height, width, 3] of a decoded frame, turned by whole quarters as its file says."""
    return np.rot90(pixels, round(frame.rotation / 90))


def _pyav() -> Any:
    """PyAV, which decodes sound and video; texts and images are calibrated without it."""
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise MorphoQuantError("sound and video need the Python package 'av'; pip install av") from error


def _open(media: Media) -> io.BytesIO | str:
    return io.BytesIO(media.content) if isinstance(media.content, bytes) else str(media.content)


def _video_frames(media: Media) -> Iterator[av.VideoFrame]:
    library = _pyav()
    with library.open(_open(media), mode="r", metadata_errors="replace") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield from container.decode(container.streams.video[0])


def _undecodable(media: Media, error: Exception) -> BadConversationError:
    reason = " ".join(str(error).split())
    return BadConversationError(f"{media.name}: not decodable as {media.kind} ({reason}); replace or re-encode it")
