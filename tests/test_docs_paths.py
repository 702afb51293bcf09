"""Everything that documents name exists: paths, functions, `python -m` modules, links; the map holds every room."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOCUMENTS = [*map(ROOT.joinpath, PAGES), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
FOLDERS = ("morphoquant_vllm", "calibration", "benchmarks", "tests", "docs", "scripts", "examples", ".ci")
# Stands in a path for whatever a reader puts there.
PLACEHOLDER = "NAME"
# Files of other projects that docs/guide/evaluate.md and docs/design/kernels_gpu.md quote.
FOREIGN = {
    *("utils.py", "models/base_prompt.py", "eval/eval_utils.py", "evaluation/eval_your_results.py"),
    *("Inference_Foundation.py", "score_foundation.py", "align_in_foundation.py"),
    *("Inference_Chat.py", "score_chat.py", "cal_score.py"),
    *("MorphoQuant-static_1.1/modules/evaluator.py", "llava/eval/eval_science_qa.py", "WGMMAPipeline.cpp"),
}

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python3? -m ([\w.]+)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
# A path from the root of the repository, and a function, class or constant in it.
NAMED = re.compile(r"([\w.*-]+(?:/[\w.*-]+)*/?)(?::([\w.]+))?")
SOURCE = re.compile(r"\.(py|h|cpp|toml|j2)$")
DOTTED = re.compile(r"(?<![\w./-])((?:morphoquant_vllm|calibration|benchmarks)(?:\.\w+)+)(?![\w/])")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def spans_of(text: str) -> list[str]:
    """Text in backticks, outside fenced blocks."""
    return SPAN.findall(FENCE.sub("", text))


def names_of(span: str) -> list[tuple[str, str]]:
    """Paths in a span, each with the name that follows its colon."""
    words = [word.strip("'\"(),;") for word in span.split()]
    matches = [match for word in words if (match := NAMED.fullmatch(word))]
    found = [(match.group(1), match.group(2) or "") for match in matches]
    return [
        (path, name)
        for path, name in found
        if path not in FOREIGN
        and PLACEHOLDER not in path
        and path != "__init__.py"
        and (SOURCE.search(path) or ("/" in path and path.partition("/")[0] in FOLDERS))
    ]


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines a name at its top, or a member of a class there."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = next((node for node in body if part in defined_by(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def module_file(module: str) -> Path | None:
    """The file that runs or is imported as a module of this repository."""
    place = ROOT.joinpath(*module.split("."))
    files = (place.with_suffix(".py"), place / "__main__.py", place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name of one."""
    module, _, name = dotted.rpartition(".")
    file = module_file(dotted) or module_file(module)
    return file is not None and (module_file(dotted) is not None or defines(file, name))


def anchors_of(document: Path) -> set[str]:
    """Anchors that GitHub gives a document's headings."""
    headings = HEADING.findall(FENCE.sub("", text_of(document)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
class TestADocument:
    def test_names_files_that_exist(self, document: Path) -> None:
        named = [item for span in spans_of(text_of(document)) for item in names_of(span)]
        assert [path for path, _ in named if not list(ROOT.glob(path.rstrip("/")))] == []
        assert [f"{path}:{name}" for path, name in named if name and not defines(ROOT / path, name)] == []

    def test_names_modules_that_exist(self, document: Path) -> None:
        text = text_of(document)
        commands = [module for module in COMMAND.findall(text) if module.partition(".")[0] in FOLDERS]
        commands = [module for module in commands if PLACEHOLDER not in module]
        assert [module for module in commands if module_file(module) is None] == []
        dotted = [name for span in spans_of(text) for name in DOTTED.findall(span) if PLACEHOLDER not in name]
        assert [name for name in dotted if not resolves(name)] == []

    def test_links_lead_somewhere(self, document: Path) -> None:
        broken = []
        for link in LINK.findall(FENCE.sub("", text_of(document))):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            if not target.exists() or (anchor and anchor not in anchors_of(target)):
                broken.append(link)
        assert broken == []


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    text = text_of(ROOT / "docs" / "guide" / "troubleshoot.md")
    tables = re.findall(r"^\| line \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    quoted = re.findall(r"^\| `([^`]+)`", "".join(tables), re.MULTILINE)
    assert len(quoted) > 30
    files = [path for package in FOLDERS[:2] for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(text_of(path)))]
    literals = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    pieces = [piece for line in quoted for piece in line.split("...")]
    assert [piece for piece in pieces if not any(piece in literal for literal in literals)] == []


def test_files_of_other_projects_are_still_quoted() -> None:
    quoted = "\n".join(span for document in DOCUMENTS for span in spans_of(text_of(document)))
    assert [path for path in sorted(FOREIGN) if path not in quoted] == []


def test_the_map_holds_every_room() -> None:
    rooms = [path.parent for package in FOLDERS[:3] for path in (ROOT / package).glob("*/__init__.py")]
    assert len(rooms) > 20
    spans = set(spans_of(text_of(ROOT / "docs" / "design" / "architecture.md")))
    assert [f"{room.relative_to(ROOT)}/" for room in rooms if f"{room.relative_to(ROOT)}/" not in spans] == []
