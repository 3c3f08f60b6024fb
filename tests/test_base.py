"""base/: what the bundled base is trained on. (That it is an ordinary pipeline, test_models.py says.)"""

import json

import pytest
from conftest import make_picture

from minilora.base import build, pictures


@pytest.fixture
def data(tmp_path):
    """A data folder with five things, of which three are to be learnt."""
    rows = []
    for number, (names, category, unified) in enumerate(
        [
            (["apple"], "Food & Drink", "1F34E"),
            (["runner", "running"], "People & Body", "1F3C3"),
            (["woman-running"], "People & Body", "1F3C3-200D-2640-FE0F"),  # a double of the one before
            (["flag-fr"], "Flags", "1F1EB-1F1F7"),
            (["dog"], "Animals & Nature", "1F436"),
        ]
    ):
        row = {"image": f"{number}.png", "short_names": names, "name": f"THE {names[0].upper()}"}
        rows.append(row | {"category": category, "unified": unified, "has_img_google": True, "has_img_twitter": True})
        for package in pictures.STYLES.values():
            folder = tmp_path / f"emoji-datasource-{package}" / "img" / package / "64"
            folder.mkdir(parents=True, exist_ok=True)
            make_picture(number, 64, 64).save(folder / f"{number}.png")
    (tmp_path / "emoji-datasource-google" / "emoji.json").write_text(json.dumps(rows))
    return tmp_path


def test_things_are_read_once_and_without_flags(data):
    names = [names for _, names, _ in pictures.read_things(data)]
    assert names == [("apple", "the apple"), ("runner", "running", "the runner"), ("dog", "the dog")]


def test_a_thing_that_is_held_out_is_known_from_the_other_style(data):
    drawings = pictures.read_drawings(data)
    assert len(drawings) == 6
    assert all(drawing.path.is_file() for drawing in drawings)
    [held_out] = [drawing for drawing in drawings if drawing.held_out]
    assert any(d.names == held_out.names and d.style != held_out.style and not d.held_out for d in drawings)


def test_captions_are_names_with_or_without_style_or_empty(data):
    drawing = pictures.read_drawings(data)[2]
    captions = [pictures.caption_at(drawing, position) for position in range(1000)]
    assert set(captions) == {"", *drawing.names, *(f"{name}, noto style" for name in drawing.names)}
    assert 60 < captions.count("") < 140  # 1000 draws of 0.1: four deviations are 38


def test_the_build_says_which_data_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        build.main()
    assert end.value.code == 2
    assert "lacks emoji-datasource-google, emoji-datasource-twitter, lomiri" in capsys.readouterr().err


def test_the_tokenizer_learns_the_names_and_their_styles(data):
    tokenizer = build.train_tokenizer(pictures.read_drawings(data))
    tokens = tokenizer("apple, noto style").input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "apple,notostyle"
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_learning_rate_rises_holds_and_falls():
    rates = [build.learning_rate_at(step, 3000, 1.0) for step in range(3000)]
    assert rates[:100] == sorted(rates[:100])
    assert set(rates[100:2001]) == {1.0}
    assert rates[2000:] == sorted(rates[2000:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)
