"""apps/vision.py: the Fréchet distance by its formula, and models that see what they are asked to."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from helpers import CPU
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from minilora.apps.evaluate import EvaluateConfig, evaluate
from minilora.apps.vision import frechet_distance, inception_score, shares_of_classes, vectors_of
from minilora.data.pictures import as_tensor
from minilora.settings.errors import UserError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SEEN = {"image_size": 28, "patch_size": 14}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def gaussian(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [50, 5])  # 5: fewer than features
def test_the_frechet_distance_is_its_formula(n):
    x, y = gaussian(n, 8, 0), gaussian(40, 8, 1) * torch.arange(1, 9) + 1
    one, other = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    # (S₁ S₂)^½ by the eigenvalues of S₁ S₂, which is not symmetric
    roots = np.sqrt(np.linalg.eigvals(one @ other).real.clip(0)).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(one) + np.trace(other) - 2 * roots
    # An eigenvalue that is 0 comes out at about 1e-13, and its root counts.
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9 if n == 50 else 1e-5)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))
    turn = torch.linalg.qr(gaussian(8, 8, 2)).Q
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)


def test_of_what_is_only_moved_and_stretched_it_is_the_move_and_the_stretch():
    x = gaussian(30, 4, 0)
    spread = x.var(0).sum().item()  # tr S; S and 9 S commute: tr(S + 9 S − 2 · 3 S) = 4 tr S
    mean = ((2 * x.mean(0) + 5) ** 2).sum().item()
    assert frechet_distance(x, 3 * x + 5) == pytest.approx(mean + 4 * spread)


def save(folder: Path, model, **about) -> str:
    model.eval().save_pretrained(folder)
    about = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "do_rescale": True, "do_resize": True} | about
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return str(folder)


CUT = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}


def prepared(pictures: list) -> torch.Tensor:
    pixels = torch.stack([as_tensor(picture) for picture in pictures]) / 2 + 0.5  # in [0, 1]
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.fixture
def pictures_28() -> list:
    """Pictures of the models' own size, so that nothing is resized."""
    return [make_picture(number, 28, 28) for number in range(20)]


@torch.no_grad()
def test_each_kind_of_model_gives_its_own_vector_of_a_picture(tmp_path, pictures_28):
    torch.manual_seed(0)
    x = prepared(pictures_28)
    dino, eye = Dinov2Model(Dinov2Config(**SMALL, **SEEN)), CLIPVisionModel(CLIPVisionConfig(**SMALL, **SEEN))
    text = SMALL | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL | SEEN, projection_dim=12))
    classifier = ViTForImageClassification(ViTConfig(**SMALL, **SEEN))
    vit = ViTModel(ViTConfig(**SMALL, **SEEN), add_pooling_layer=False)
    vit.load_state_dict(classifier.vit.state_dict())
    folders = [
        save(tmp_path / "dino", dino, image_processor_type="BitImageProcessor", **CUT),
        save(tmp_path / "eye", eye, image_processor_type="CLIPImageProcessor", **CUT),
        save(tmp_path / "clip", clip, feature_extractor_type="CLIPFeatureExtractor", size=28, crop_size=28),
        save(tmp_path / "vit", classifier, image_processor_type="ViTImageProcessor", size={"height": 28, "width": 28}),
    ]
    wanted = [
        dino.eval()(x).last_hidden_state[:, 0],
        eye.eval()(x).pooler_output,
        clip.visual_projection(clip.vision_model(x).pooler_output),  # where pictures and texts meet
        vit.eval()(x).last_hidden_state[:, 0],  # its file has no pooler
    ]
    for folder, vectors in zip(folders, wanted, strict=True):
        [seen] = vectors_of(folder, [pictures_28], CPU)
        torch.testing.assert_close(seen, vectors, atol=1e-5, rtol=1e-4)  # float32, in other batches


def test_evaluate_prints_both_distances_and_warns_where_pictures_are_few(pictures, tmp_path, tiny_base, capsys):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL, **SEEN))
    folder = save(tmp_path / "dino", model, image_processor_type="BitImageProcessor", **CUT)
    words = {"model": str(tiny_base), "output": str(tmp_path / "out"), "features": folder}
    figures = evaluate(EvaluateConfig(folders=(str(pictures), str(pictures)), **words))
    assert figures[f"Fréchet distance by {folder}"] == pytest.approx(0, abs=1e-9)  # the same pictures
    assert -1 <= figures[f"likeness by {folder}"] < 1
    assert figures[f"Fréchet distance by {folder}; of the halves of the reference"] > 0.01
    printed = capsys.readouterr()
    assert f"kernel distance by {folder}: " in printed.out
    assert "warning: 5 and 5 pictures are too few for 16 features" in printed.err


def test_the_inception_score_is_its_formula_and_has_its_limits():
    p = gaussian(12, 5, 0).softmax(1)
    wanted = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(p) == pytest.approx(wanted)
    assert inception_score(torch.eye(5).double().repeat(3, 1)) == pytest.approx(5)  # sure, and all classes come
    assert inception_score(torch.eye(5).double()[:1].repeat(3, 1)) == pytest.approx(1)  # sure, and always of one


def test_evaluate_prints_the_inception_score_by_a_classifier(pictures, tmp_path, tiny_base):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, **SEEN, num_labels=3))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    folder = save(tmp_path / "vit", model, **processor)
    shown = [make_picture(number, 28, 28) for number in range(3)]
    shares = shares_of_classes(folder, shown, CPU)
    torch.testing.assert_close(shares, model(prepared(shown)).logits.double().softmax(-1), atol=1e-6, rtol=1e-5)
    words = {"model": str(tiny_base), "output": str(tmp_path / "out"), "classifier": folder}
    figures = evaluate(EvaluateConfig(folders=(str(pictures), str(pictures)), **words))
    assert figures[f"Inception Score by {folder}"] == figures[f"Inception Score by {folder}; of the reference"] >= 1


def test_what_is_no_vision_model_in_safetensors_is_said(tmp_path, pictures_28):
    def refusal(folder: Path | str) -> str:
        with pytest.raises(UserError) as error:
            vectors_of(str(folder), [pictures_28], CPU)
        return str(error.value)

    assert refusal(tmp_path / "nowhere").startswith(f"--features {tmp_path / 'nowhere'}: ")
    about = {"image_processor_type": "BitImageProcessor"} | CUT
    folder = Path(save(tmp_path / "dino", Dinov2Model(Dinov2Config(**SMALL, **SEEN)), **about))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)
    folder = Path(save(tmp_path / "half", Dinov2Model(Dinov2Config(**SMALL, **SEEN)), **about))
    deeper = Dinov2Config(**SMALL | {"num_hidden_layers": 2}, **SEEN)
    (folder / "config.json").write_text(deeper.to_json_string())
    assert "weights are missing in the file, for example encoder.layer" in refusal(folder)
