"""Chat with a served checkpoint about a sound and a picture; answers are printed as they are written.

vllm serve OUT --limit-mm-per-prompt '{"image": 1, "audio": 1}' &
python examples/streaming_chat.py --sound recording.wav --image cat.png

Each line of the input is a question. The sound and the picture go with the first one.
"""

import argparse
import base64
import mimetypes
import sys
from pathlib import Path
from typing import Any

from openai import APIConnectionError, OpenAI, OpenAIError


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def image_part(path: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded(path)}"}}


def sound_part(path: Path) -> dict[str, Any]:
    """OpenAI's `input_audio` takes wav and mp3. vLLM takes other formats as `audio_url`."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in ("wav", "mp3"):
        return {"type": "input_audio", "input_audio": {"data": encoded(path), "format": suffix}}
    return {"type": "audio_url", "audio_url": {"url": f"data:audio/{suffix};base64,{encoded(path)}"}}


def stream_answer(client: OpenAI, model: str, messages: list[Any], max_tokens: int) -> str:
    """Print an answer piece by piece, and return it."""
    pieces = []
    chunks = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    )
    for chunk in chunks:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            print(piece, end="", flush=True)
            pieces.append(piece)
    print()
    return "".join(pieces)


def chat(client: OpenAI, content: list[dict[str, Any]], max_tokens: int) -> None:
    """Ask every line of the input; `content` goes with the first one, and the conversation with each."""
    model = client.models.list().data[0].id
    messages: list[Any] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": line.strip()}]})
        content = []
        answer = stream_answer(client, model, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a served checkpoint about a sound and a picture.")
    parser.add_argument("--sound", type=Path, help="wav, mp3, flac or ogg, of any rate")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()

    content = [image_part(arguments.image)] if arguments.image else []
    content += [sound_part(arguments.sound)] if arguments.sound else []
    try:
        chat(OpenAI(base_url=arguments.base_url, api_key="none"), content, arguments.max_tokens)
    except APIConnectionError:
        sys.exit(f"error: no server answers at {arguments.base_url}; start one with vllm serve OUT")


if __name__ == "__main__":
    try:
        main()
    except (OpenAIError, OSError) as error:
        sys.exit(f"error: {error}")
