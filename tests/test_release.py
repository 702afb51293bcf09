"""The version stands in several files, and all agree; workflows and templates are what a release needs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import morphoquant_vllm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_every_file_has_the_same_version() -> None:
    version = PROJECT["version"]
    assert morphoquant_vllm.__version__ == version
    assert read_yaml("CITATION.cff")["version"] == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflows_test_every_supported_python() -> None:
    oldest, newest = map(int, re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    expected = [f"3.{minor}" for minor in range(oldest, newest)]
    for path, job in ((".github/workflows/ci.yml", "test"), (".github/workflows/release.yml", "install")):
        assert read_yaml(path)["jobs"][job]["strategy"]["matrix"]["python"] == expected


def test_reports_of_bugs_have_the_doctors_output() -> None:
    templates = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(templates) >= 2
    for path in templates:
        fields = {entry["id"]: entry for entry in read_yaml(str(path.relative_to(ROOT)))["body"]}
        assert "morphoquant doctor" in fields["doctor"]["attributes"]["label"]
        assert fields["doctor"]["validations"]["required"] is True
