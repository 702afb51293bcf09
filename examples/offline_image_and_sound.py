"""Ask a checkpoint about an image and a sound in this process, without a server.

python examples/offline_image_and_sound.py OUT cat.png purr.wav --question "What do you see and hear?"
"""

import argparse

import soundfile
from PIL import Image
from transformers import AutoProcessor
from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a checkpoint about an image and a sound.")
    parser.add_argument("checkpoint", help="directory that `morphoquant calibrate` wrote")
    parser.add_argument("image")
    parser.add_argument("sound", help="wav, mp3, flac or ogg, of any rate")
    parser.add_argument("--question", default="What do you see and hear?")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--eager", action="store_true", help="start sooner, and run without a C++ compiler")
    arguments = parser.parse_args()

    media = {
        "image": Image.open(arguments.image).convert("RGB"),
        # Samples and their rate: vLLM mixes the channels and resamples them to the model's rate.
        "audio": soundfile.read(arguments.sound, dtype="float32"),
    }

    # The chat template puts the model's placeholder tokens where the media stand in the message.
    content = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": arguments.question}]
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )

    # No quantization argument is needed: the checkpoint's config.json names its method.
    llm = LLM(
        arguments.checkpoint,
        max_model_len=arguments.max_model_len,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 1, "audio": 1, "video": 0},
        enforce_eager=arguments.eager,
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    (output,) = llm.generate({"prompt": prompt, "multi_modal_data": media}, sampling)
    answer = output.outputs[0]
    print(answer.text)
    print(f"({len(output.prompt_token_ids)} tokens read, {len(answer.token_ids)} written)")


# vLLM may start processes that import this file, so nothing runs at import.
if __name__ == "__main__":
    main()
