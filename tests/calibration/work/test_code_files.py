"""The files that decide a resume: those that calibration imports, whatever their folder and name."""

from pathlib import Path

import pytest

from calibration.work.code_files import code_files

ROOT = Path(__file__).resolve().parents[3]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write(
        tmp_path,
        {
            "calibration/__init__.py": "",
            "calibration/calibrate.py": "from calibration import steps\nfrom calibration.rooms.layer import f",
            "calibration/steps.py": "def late():\n    from morphoquant_vllm.cpu import backend",
            "calibration/unused.py": "",
            "calibration/rooms/__init__.py": "",
            "calibration/rooms/layer.py": "import torch\nfrom .near import g\nfrom ..steps import late",
            "calibration/rooms/near.py": "",
            "morphoquant_vllm/__init__.py": "",
            "morphoquant_vllm/cpu/__init__.py": "",
            "morphoquant_vllm/cpu/backend.py": "",
            "morphoquant_vllm/cpu/kernels/gemm.h": "",
            "morphoquant_vllm/plugin/__init__.py": "",
            "morphoquant_vllm/plugin/data.json": "",
        },
    )
    return tmp_path


def test_imports_are_followed_and_bring_the_data_beside_them(project: Path) -> None:
    assert list(code_files(project)) == [
        "calibration/__init__.py",
        "calibration/calibrate.py",
        "calibration/rooms/__init__.py",
        "calibration/rooms/layer.py",
        "calibration/rooms/near.py",
        "calibration/steps.py",
        "morphoquant_vllm/__init__.py",
        "morphoquant_vllm/cpu/__init__.py",
        "morphoquant_vllm/cpu/backend.py",
        "morphoquant_vllm/cpu/kernels/gemm.h",
    ]


def test_an_import_without_a_file_is_an_error(project: Path) -> None:
    (project / "calibration/steps.py").rename(project / "calibration/step_search.py")
    with pytest.raises(ModuleNotFoundError, match=r"calibration\.steps: is imported by calibration"):
        code_files(project)


def test_a_renamed_module_stays_in_the_hash(project: Path) -> None:
    (project / "morphoquant_vllm/cpu/backend.py").rename(project / "morphoquant_vllm/cpu/other.py")
    (project / "calibration/steps.py").write_text("from morphoquant_vllm.cpu.other import linear")
    assert "morphoquant_vllm/cpu/other.py" in code_files(project)


def test_kernels_numerics_and_schema_decide_a_resume_and_the_page_does_not() -> None:
    """Files are found by content, not by name: each holds something that changes bytes."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in code_files(ROOT).items()}
    for part in ("def act_quant(", "def quantize_input(", "def tensor_specs(", "def token_rows(", "void octet("):
        assert any(part in text for text in texts.values()), part
    assert not any("page" in Path(name).parts for name in texts)
