"""Our models through Hugging Face's Auto classes: written, found again by model type, and the same numbers."""

import builtins

import pytest
import torch
from PIL import Image

import florence_fast as ff
from florence_fast.compat.transformers_registry import register_with_transformers, save_for_transformers

TEXTS = ["a photo of a cat", "Fish &amp; chips, it's  HOT! 100", "a dog " * 40, ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The shipped model and where it was written for transformers."""
    pytest.importorskip("transformers")
    model = ff.create_model("florence_nano", pretrained="artists")
    return model, save_for_transformers(model, tmp_path_factory.mktemp("nano"))


@pytest.fixture
def image():
    return Image.effect_noise((90, 70), 80).convert("RGB")


def test_registering_twice_changes_nothing():
    pytest.importorskip("transformers")
    assert register_with_transformers() == register_with_transformers()
    assert "FlorenceFastModel" in register_with_transformers()


def test_the_auto_classes_find_what_was_written(saved, image):
    import transformers

    register_with_transformers()
    ours, directory = saved
    model = transformers.AutoModel.from_pretrained(directory)
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    pixels = processor([image, image.rotate(90)], return_tensors="pt").pixel_values
    tokens = tokenizer(TEXTS[:2], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=pixels, **tokens, return_loss=True)
        images, texts, scale = ours(pixels, ff.get_tokenizer("florence_nano")(TEXTS[:2]))
    assert not model.training and model.config.projection_dim == 256
    assert torch.equal(found.image_embeds, images) and torch.equal(found.text_embeds, texts)
    torch.testing.assert_close(found.logits_per_image, scale * images @ texts.T)
    torch.testing.assert_close(found.loss, ff.ClipLoss()(images, texts, scale))
    assert torch.equal(model.get_text_features(**tokens), ours.encode_text(tokens.input_ids))
    assert len(model(pixel_values=pixels, return_dict=False)) == 1


def test_the_way_of_resizing_is_written_with_the_processor(image, tmp_path):
    transformers = pytest.importorskip("transformers")

    register_with_transformers()
    keywords = {"image_resize_mode": "longest", "image_interpolation": "bilinear"}
    model, _, transform = ff.create_model_and_transforms("florence_nano", **keywords)
    save_for_transformers(model, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.resize_mode, processor.interpolation) == ("longest", "bilinear")
    assert torch.equal(processor(image).pixel_values[0], transform(image))


def test_a_new_model_from_a_configuration_draws_its_weights(saved):
    import transformers

    register_with_transformers()
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(saved[1]))
    torch.manual_seed(0)
    drawn = ff.create_model("florence_nano")
    assert all(torch.equal(tensor, drawn.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_images_and_texts_are_prepared_as_ours_are(saved, image, tmp_path):
    import transformers

    register_with_transformers()
    _, transform = ff.create_model_from_pretrained("florence_nano", "artists")
    processor = transformers.AutoImageProcessor.from_pretrained(saved[1])
    assert torch.equal(processor(image).pixel_values[0], transform(image))
    image.save(tmp_path / "noise.png")
    assert torch.equal(processor(str(tmp_path / "noise.png")).pixel_values[0], transform(image))
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved[1])
    expected = ff.get_tokenizer("florence_nano")(TEXTS)
    found = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert found.input_ids.shape == expected.shape == (4, 16)
    for row, mask, ours in zip(found.input_ids, found.attention_mask, expected, strict=True):
        length = int(mask.sum())
        assert torch.equal(row[:length], ours[:length]) and set(row[length:].tolist()) <= {49407}
        assert not ours[length:].any()
    assert tokenizer.decode(found.input_ids[0], skip_special_tokens=True) == TEXTS[0]


def test_the_file_is_also_ours(saved):
    ours, directory = saved
    again = ff.create_model("florence_nano", pretrained=directory / "model.safetensors")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_what_cannot_be_is_refused(saved, monkeypatch):
    register_with_transformers()
    model = __import__("transformers").AutoModel.from_pretrained(saved[1])
    with pytest.raises(ValueError, match="give pixel_values, input_ids or both"):
        model()
    with pytest.raises(ValueError, match="return_loss needs"):
        model(input_ids=torch.tensor([[49406, 49407]]), return_loss=True)
    with pytest.raises(TypeError, match="model must be a Florence, got CoSwin"):
        save_for_transformers(ff.create_model("coswin_nano"), "nowhere")
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install transformers"):
        register_with_transformers()


def test_save_pretrained_writes_what_pipelines_and_processors_read(saved, image, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours, _ = saved
    directory = str(ours.save_pretrained(tmp_path / "nano"))
    warned: list[str] = []
    monkeypatch.setattr(transformers.processing_utils.logger, "warning_once", warned.append, raising=False)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    assert type(processor).__name__ == "FlorenceFastProcessor" and warned == []
    inputs = processor(text=TEXTS[:2], images=[image], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        images, texts, scale = ours(inputs["pixel_values"], ff.get_tokenizer("florence_nano")(TEXTS[:2]))
        model = transformers.AutoModel.from_pretrained(directory)
        torch.testing.assert_close(model(**inputs).logits_per_image, scale * images @ texts.T)
    classify = transformers.pipeline("zero-shot-image-classification", model=directory, device="cpu")
    found = classify(image, candidate_labels=["cat", "red circle"], hypothesis_template="{}")
    with torch.no_grad():
        _, texts, _ = ours(text=ff.get_tokenizer("florence_nano")(["cat", "red circle"]))
    expected = dict(zip(["cat", "red circle"], (scale * images @ texts.T).softmax(-1)[0].tolist(), strict=True))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-5)
    # what transformers writes again is ours still
    model.save_pretrained(tmp_path / "again")
    again = ff.create_model(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_push_to_hub_uploads_what_save_pretrained_writes(saved, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            asked["private"] = private
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **options):
            asked.update(options, files=sorted(file.name for file in folder_path.iterdir()))
            asked["config"] = ff.Florence.from_pretrained(folder_path).config
            return f"commit in {repo_id}"

    monkeypatch.setattr(mixin, "HfApi", Api)
    ours, _ = saved
    assert ours.push_to_hub("user/nano", private=True, commit_message="first") == "commit in user/nano"
    assert asked["files"] == ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"]
    assert (asked["config"], asked["private"], asked["commit_message"]) == (ours.config, True, "first")
