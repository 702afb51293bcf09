"""The process that configured the engine prints a worker's refusal when it ends."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.last_word import LastWord


def refuse(word: LastWord, line: str) -> None:
    """The steps of a worker, in a separate process."""
    with pytest.raises(MorphoQuantError), word.keep_refusal():
        raise MorphoQuantError(line)


def in_worker(word: LastWord, line: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=refuse, args=(word, line))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_first_refusal_of_the_workers_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    word = LastWord(tmp_path / "word", os.getpid())
    in_worker(word, "layer 3: wrong\nsize; choose another")
    in_worker(word, "second")
    assert (tmp_path / "word").stat().st_mode & 0o777 == 0o600
    capfd.readouterr()
    word.print_refusal()
    word.print_refusal()
    assert capfd.readouterr().err == "MorphoQuantError: layer 3: wrong\\nsize; choose another\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_in_the_process_itself_stands_in_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    word = LastWord(tmp_path / "word", os.getpid())
    refuse(word, "here")
    word.print_refusal()
    assert capfd.readouterr().err == ""


def test_other_errors_and_a_folder_that_is_gone_change_nothing(tmp_path: Path) -> None:
    word = LastWord(tmp_path / "gone" / "word", os.getpid() + 1)
    refuse(word, "the error goes on its way")
    here = LastWord(tmp_path / "word", os.getpid() + 1)
    with pytest.raises(ValueError), here.keep_refusal():
        raise ValueError("not ours")
    assert list(tmp_path.iterdir()) == []


def test_it_comes_after_the_traceback() -> None:
    program = """
        import os
        from morphoquant_vllm.errors import MorphoQuantError
        from morphoquant_vllm.plugin.last_word import open_last_word
        word = open_last_word()
        if os.fork() == 0:
            try:
                with word.keep_refusal():
                    raise MorphoQuantError("refused below")
            finally:
                os._exit(0)
        os.wait()
        raise RuntimeError("Engine core initialization failed")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-2:] == [
        "RuntimeError: Engine core initialization failed",
        "MorphoQuantError: refused below",
    ]
