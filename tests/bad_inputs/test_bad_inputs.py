"""Bad inputs end with one message and exit code 2, or work: never a traceback, never a file half-written."""

import json
from pathlib import Path

import pytest
from bad_inputs.cases import CASES, PAGE, ROOMS, Place, page
from conftest import make_picture

from minilora.settings import command_line as commands

COMMANDS = {"train": commands.train, "sample": commands.sample, "merge": commands.merge}
MOST_LINES = 4  # of a message


@pytest.fixture(scope="session")
def finished_run(tiny_base, tmp_path_factory) -> Path:
    """The output folder of a run of three steps, with the words that made it."""
    folder = tmp_path_factory.mktemp("run")
    for number in range(2):
        Place(folder, tiny_base, folder).write(f"pictures/{number}.png")
        make_picture(number).save(folder / "pictures" / f"{number}.png")
    words = (
        f"--data {folder / 'pictures'} --caption x --model {tiny_base} --cache {folder / 'cache'} --rank 2 --steps 3"
    )
    words = [*words.split(), "--checkpoint-every", "1", "--checkpoints-kept", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *words, "--output", str(folder / "out")])
        commands.train()
    (folder / "out" / "words.json").write_text(json.dumps(words))
    return folder / "out"


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.room}: {case.given}" for case in CASES])
def test_what_comes_of_it(case, tmp_path, tiny_base, finished_run, monkeypatch, capfd):
    command, *words = ROOMS[case.room][1](Place(tmp_path, tiny_base, finished_run), case.what)
    before = files_in(tmp_path)
    monkeypatch.setattr("sys.argv", [command, *words])
    code = 0
    try:
        COMMANDS[command]()
    except SystemExit as end:
        code = end.code
    out, err = capfd.readouterr()
    print(code, err)
    assert "Traceback" not in err
    assert case.said in out + err
    if case.works:
        assert code == 0
    else:
        assert code == 2
        [_, message] = err.split("error: ")  # before it there may be a bar of progress
        assert len(message.splitlines()) <= MOST_LINES
        assert files_in(tmp_path) == before


def test_the_page_has_all_cases():
    assert len(CASES) >= 80
    assert PAGE.read_text() == page(), "run python tests/bad_inputs/cases.py"
