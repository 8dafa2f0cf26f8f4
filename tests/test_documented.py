"""What the pages show: every command runs, and prints what is shown."""

from pathlib import Path

import pytest

from tests.documented import PAGES, Block, blocks_of, masked, run_page, write

SHOWN = [page for page in PAGES if blocks_of(page)]


@pytest.mark.processes
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_every_command_prints_what_its_page_shows(page: Path) -> None:
    result = run_page(page)
    assert not result.differences, "python -m tests.documented --write\n" + "\n".join(result.differences)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    blocks = blocks_of(page)
    for block, below in zip(blocks, [*blocks[1:], None], strict=True):
        assert _is_run(block, below) or block.says("not run") or block.language in ("text", "json", "yaml"), block.line


def _is_run(block: Block, below: Block | None) -> bool:
    runs_below = block.language == "python" and below is not None and bool(below.says("output"))
    return block.language == "console" or bool(block.notes) or runs_below


def test_times_and_machines_are_masked_and_texts_are_not() -> None:
    line = "4 tokens in, 8 out in 1.7 s: 5 tokens/s (1 job; float32)"
    assert masked(line) == masked(line.replace("1.7", "12.0").replace("1 job", "2 jobs"))
    assert masked(line) != masked(line.replace("8 out", "9 out"))


def test_every_output_of_a_block_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ echo one\n?\n$ echo two\nof\ntwo\n```\n\n```console\n$ echo three\n?\n```\n", encoding="utf-8"
    )
    write(page, run_page(page))
    assert page.read_text(encoding="utf-8") == (
        "```console\n$ echo one\none\n$ echo two\ntwo\n```\n\n```console\n$ echo three\nthree\n```\n"
    )
