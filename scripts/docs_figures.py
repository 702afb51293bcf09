"""Figures of the documents' prose: `python scripts/docs_figures.py`; with `--list` the long sentences, too."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS, WIDTH = 25, 120
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
# Names that begin a sentence without a capital.
NAMES = "vLLM|bf16|oneDNN|zentorch|transformers|glibc|torchrun|lm-eval|q/k/v"
STOP = re.compile(rf"(?<=[.!?])[*_)\"]* +(?=[*`\[(]*(?:[A-Z]|{NAMES}))")
HABITS = {
    "what": r"\bwhat\b",
    "so that": r"\bso that\b",
    "is/are no": r"\b(?:is|are|was|were) no\b",
    "besides, as a rule, of which, ...": r"\b(?:besides|as a rule|of which|so many|in the place of|mend|cure)s?\b",
    "told, own, found": r"\b(?:told|own|found)\b",
}


def prose_of(text: str) -> list[str]:
    """Paragraphs and list items, without code, tables, headings and the targets of links."""
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", FENCE.sub("", text))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"`[^`\n]*`", "Code", text)
    lines = [line for line in text.splitlines() if not re.match(r" *[|#!]", line)]
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", "\n".join(lines))]


def sentences_of(text: str) -> list[str]:
    sentences = [one for part in prose_of(text) for one in STOP.split(part)]
    return [one for one in sentences if one.strip(" -*")]


def words_of(text: str) -> int:
    return len(re.findall(r"\S*\w\S*", text))


def main() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    sentences = [(page, one) for page, text in texts.items() for one in sentences_of(text)]
    long = [(page, one) for page, one in sentences if words_of(one) > MOST_WORDS]
    prose = "\n".join(part for text in texts.values() for part in prose_of(text))
    lines = [line for text in texts.values() for line in FENCE.sub("", text).splitlines()]
    print("words of README.md:", len(texts[pages[0]].split()))
    print(f"sentences: {len(sentences)}, over {MOST_WORDS} words: {len(long)}")
    print(f"lines over {WIDTH}, outside tables:", sum(len(line) > WIDTH and line[:1] != "|" for line in lines))
    for name, pattern in HABITS.items():
        print(f"{name}:", len(re.findall(pattern, prose, re.IGNORECASE)))
    if "--list" in sys.argv:
        for page, one in long:
            print(f"{page.relative_to(ROOT)}: {words_of(one)}: {one}")


if __name__ == "__main__":
    main()
