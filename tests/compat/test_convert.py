"""Checkpoints of other libraries, read and written: equal tensors after a round trip, and equal outputs of both models.

transformers is always there; timm, torchvision and open_clip are asked where they are installed, and written-out
shapes stand in for what is not.
"""

import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import florence_fast as ff
from florence_fast.cli import convert as cli_convert
from florence_fast.cli import main
from florence_fast.compat import layouts
from florence_fast.compat.convert import SOURCES, TARGETS, TEXT_CONFIG_KEY, convert
from florence_fast.compat.microsoft import coswin_from_swin
from florence_fast.models import CoSwin, Florence, FlorenceConfig, Swin, TextTower
from florence_fast.models.layers import resize_bias_table
from florence_fast.models.pretrained import load_checkpoint
from tests.compat import third_party
from tests.compat.test_microsoft import SPELLINGS, swin_layout, text_layout
from tests.models.test_pretrained import Opens, same
from tests.models.test_text import texts
from tests.models.tiny import COSWIN, FLORENCE, SWIN, TEXT

CLASSIFIER = dataclasses.replace(SWIN, num_classes=5)


@pytest.fixture
def swin():
    model = Swin(CLASSIFIER).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def importorskip_transformers():
    """transformers imports a torchvision that is there, and then it must import."""
    if importlib.util.find_spec("torchvision"):
        third_party.torchvision()
    return pytest.importorskip("transformers")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("to", TARGETS)
def test_a_swin_goes_to_every_layout_and_comes_back(swin, to, tmp_path):
    there = convert(swin.state_dict(), tmp_path / "there.safetensors", to=to)
    assert (there.config, there.missing, there.left_out, there.resized) == (
        dataclasses.replace(CLASSIFIER, img_size=224),
        [],
        [],
        [],
    )
    back = convert(tmp_path / "there.safetensors", tmp_path / "back")
    assert (back.read_as, back.matched) == (to, len(swin.state_dict()))
    assert same(back.state, swin.state_dict())
    assert same(Swin.from_pretrained(tmp_path / "back").state_dict(), swin.state_dict())
    assert same(convert(tmp_path / "there.safetensors", layout=to if to in SOURCES else "auto").state, back.state)


def missing(info):
    """What transformers found no tensor for, without the index that a layer computes when it is built."""
    return [name for name in info["missing_keys"] if not name.endswith(".relative_position_index")]


def test_hugging_face_loads_what_is_written_and_the_reverse(swin, tmp_path):
    transformers = importorskip_transformers()
    done = convert(swin.state_dict(), tmp_path / "theirs", to="hugging_face", image_size=32)
    theirs, info = transformers.SwinForImageClassification.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not missing(info) and not info["unexpected_keys"] and done.config.img_size == 32
    image = torch.randn(2, 3, 43, 62)
    with torch.no_grad():
        close(theirs.eval()(image).logits, swin(image))
        theirs.save_pretrained(tmp_path / "again")
        back = convert(tmp_path / "again", tmp_path / "back")
        close(ff.create_model(f"local-dir:{tmp_path / 'back'}")(image), swin(image))
    assert back.config == done.config and same(back.state, swin.state_dict())
    headless = convert(Swin(SWIN).state_dict(), tmp_path / "headless", to="hugging_face", image_size=32)
    body, info = transformers.SwinModel.from_pretrained(tmp_path / "headless", output_loading_info=True)
    assert not missing(info) and not info["unexpected_keys"] and headless.config.num_classes == 0
    assert body.config.window_size == 4


def test_timm_loads_what_is_written(swin, tmp_path):
    third_party.timm()
    from timm.models.swin_transformer import SwinTransformer

    theirs = SwinTransformer(
        img_size=64, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=5, drop_path_rate=0
    )
    convert(swin.state_dict(), tmp_path / "timm.safetensors", to="timm", image_size=64)
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(theirs.eval()(image), swin(image))
    assert same(convert(theirs.state_dict()).state, swin.state_dict())
    with pytest.raises(ValueError, match="timm shrinks windows to the map: at image size 16 the last stage has 2 x 2"):
        convert(swin.state_dict(), to="timm", image_size=16)


def test_torchvision_loads_what_is_written(swin, tmp_path):
    third_party.torchvision()
    from torchvision.models.swin_transformer import SwinTransformer

    theirs = SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=5, stochastic_depth_prob=0)
    convert(swin.state_dict(), tmp_path / "tv.pth", to="torchvision")
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    with torch.no_grad():
        for size in ((64, 64), (72, 88)):
            image = torch.randn(2, 3, *size)
            close(theirs.eval()(image), swin(image))
    back = convert(theirs.state_dict())
    assert back.read_as == "torchvision" and same(back.state, swin.state_dict())


def test_microsofts_buffers_are_those_that_their_code_computes(swin, tmp_path):
    convert(swin.state_dict(), tmp_path / "ms.pth", to="microsoft", image_size=64)
    written = torch.load(tmp_path / "ms.pth", weights_only=True)["model"]
    assert written.keys() - swin.state_dict().keys() == {
        f"layers.{s}.blocks.{b}.attn.relative_position_index" for s in (0, 1) for b in (0, 1)
    } | {f"layers.{s}.blocks.1.attn_mask" for s in (0, 1)}
    # two tokens one row apart read the row of the table one stride of 2w - 1 away from the middle
    index = written["layers.0.blocks.0.attn.relative_position_index"]
    assert index.shape == (16, 16) and index[0, 0] == 24 and index[4, 0] == 24 + 7 and index[0, 1] == 24 - 1
    # against rolled coordinates: tokens may see each other if they were within one window's reach before the roll
    mask = layouts.microsoft.attention_mask(8, 4)
    rolled = torch.arange(8).roll(-2)
    for window, (rows, columns) in enumerate([(range(r, r + 4), range(c, c + 4)) for r in (0, 4) for c in (0, 4)]):
        places = [(int(rolled[r]), int(rolled[c])) for r in rows for c in columns]
        seen = [[max(abs(a - c), abs(b - d)) < 4 for c, d in places] for a, b in places]
        assert torch.equal(mask[window] == 0, torch.tensor(seen))
    with pytest.raises(ValueError, match=r"windows of 4 that divide .* at image size 224 stage 1 has 28|image size 72"):
        convert(swin.state_dict(), to="microsoft", image_size=72)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_unicl_becomes_a_dual_encoder_and_its_tower_a_swin_for_others(spelling, tmp_path):
    image, text, image_projection, text_projection = SPELLINGS[spelling]
    state = swin_layout(image) | text_layout(text) | {"logit_scale": torch.tensor(1.5)}
    state |= {image_projection: torch.randn(16, 12), text_projection: torch.randn(16, 12)}
    torch.save({"model": state}, tmp_path / "unicl.pth")
    done = convert(tmp_path / "unicl.pth", tmp_path / "ours.safetensors")
    assert (done.read_as, done.missing, done.left_out) == ("unicl", [], [])
    assert (done.config.text.act, done.config.text.norm_eps, done.config.max_logit_scale) == ("quick_gelu", 1e-12, None)
    model = Florence.from_pretrained(tmp_path / "ours.safetensors")
    assert torch.equal(model.image_projection.weight, state[image_projection].T)
    alone = convert(tmp_path / "unicl.pth", to="timm")
    assert "image_projection.weight" in alone.left_out and "layers.1.downsample.reduction.weight" in alone.state


def hugging_face_clip(act="quick_gelu"):
    transformers = importorskip_transformers()
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=12,
        hidden_act=act,
        eos_token_id=63,
        bos_token_id=62,
        pad_token_id=0,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_hugging_faces_clip_text_tower(act, tmp_path):
    theirs = hugging_face_clip(act)
    theirs.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "text.safetensors")
    assert (done.read_as, done.missing, done.left_out) == ("hugging_face", [], [])
    assert (done.config.heads, done.config.act) == (2, act)
    tower, tokens = TextTower(done.config).eval(), texts(5, 12, 3)
    written = load_file(tmp_path / "text.safetensors")
    tower.load_state_dict({k.removeprefix("text."): t for k, t in written.items() if k.startswith("text.")})
    with torch.no_grad():
        close(tower(tokens) @ written["text_projection.weight"].T, theirs(tokens).text_embeds)
    with safe_open(tmp_path / "text.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[TEXT_CONFIG_KEY])["context_length"] == 12
    bare = convert(theirs.text_model.state_dict())
    assert bare.read_as == "hugging_face" and bare.matched == done.matched - 1
    model = Florence(dataclasses.replace(FLORENCE, text=done.config))
    assert "logit_scale" in load_checkpoint(model, tmp_path / "text.safetensors", strict=False)
    assert torch.equal(model.text.ln_final.weight, tower.ln_final.weight)


def test_open_clips_text_tower(tmp_path):
    third_party.timm()
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    text = CLIPTextCfg(context_length=12, vocab_size=64, width=16, heads=2, layers=2)
    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=32)
    for cls in (CLIP, CustomTextCLIP):
        theirs = cls(12, vision, text).eval()
        done = convert(theirs.state_dict(), tmp_path / cls.__name__)
        assert (done.read_as, done.missing) == ("open_clip", [])
        assert done.left_out and all(name.startswith("visual.") for name in done.left_out)
        tower = TextTower(dataclasses.replace(done.config, heads=2)).eval()
        tower.load_state_dict({k[5:]: t for k, t in done.state.items() if k.startswith("text.")})
        tokens = texts(5, 12, 3)
        with torch.no_grad():
            close(tower(tokens) @ done.state["text_projection.weight"].T, theirs.encode_text(tokens))


def test_open_clips_names_where_it_is_not_installed():
    state = text_layout("")
    state = {k.replace("resblocks.", "transformer.resblocks."): t for k, t in state.items()}
    state |= {"text_projection": torch.randn(16, 12), "logit_scale": torch.zeros(()), "visual.proj": torch.zeros(2, 2)}
    done = convert(state)
    assert (done.read_as, done.missing, done.left_out) == ("open_clip", [], ["visual.proj"])
    assert "taken for the text tower: 1 heads, gelu, norm eps 1e-05" in str(done)
    assert torch.equal(done.state["text_projection.weight"], state["text_projection"].T)
    trunk = {f"visual.trunk.{k}": t for k, t in convert(Swin(SWIN).state_dict(), to="timm").state.items()}
    both = {k: t for k, t in state.items() if k != "visual.proj"} | trunk
    both = convert(both | {"visual.head.proj.weight": torch.randn(12, 16)})
    assert (both.missing, both.left_out) == ([], [])
    assert both.config.image == dataclasses.replace(SWIN, img_size=224) and both.config.embed_dim == 12


def test_a_new_window_size_and_context(swin, tmp_path):
    done = convert(swin.state_dict(), tmp_path / "wide", window_size=6, image_size=48)
    assert (done.config.window_size, done.config.img_size) == (6, 48)
    assert done.resized == [name for name in swin.state_dict() if name.endswith("bias_table")]
    for name in done.resized:
        assert torch.equal(done.state[name], resize_bias_table(swin.state_dict()[name], (6, 6)))
    assert Swin.from_pretrained(tmp_path / "wide").layers[0].blocks[0].attn.window_size == 6
    state = Florence(FLORENCE).state_dict()
    name = "text.positional_embedding"
    for length in (8, 20):
        longer = convert(state, tmp_path / str(length), context_length=length)
        assert longer.resized == [name] and longer.state[name].shape == (length, 16)
        assert torch.equal(longer.state[name][0], state[name][0])
        assert Florence.from_pretrained(tmp_path / str(length)).context_length == length
    torch.testing.assert_close(longer.state[name][-1], state[name][-1])


def test_our_own_file_keeps_its_configuration(tmp_path):
    image = dataclasses.replace(COSWIN, drop_path_rate=0.25)
    model = Florence(dataclasses.replace(FLORENCE, image=image))
    done = convert(model.save_pretrained(tmp_path / "a"), tmp_path / "b")
    assert done.read_as == "florence_fast" and done.config == model.config
    assert same(Florence.from_pretrained(tmp_path / "b").state_dict(), model.state_dict())


@pytest.mark.parametrize("image_size", [None, 16])
def test_the_table_of_a_window_that_was_cut_to_its_map_is_centred(image_size, tmp_path):
    """timm and Microsoft's code cut the window of a stage to its map, and its table with it; it computes the same."""
    torch.manual_seed(0)
    whole = Swin(dataclasses.replace(SWIN, img_size=16, window_size=4, num_classes=5)).eval()
    tables = {n: p for n, p in whole.named_parameters() if n.endswith("bias_table")}
    for table in tables.values():
        torch.nn.init.normal_(table)
    state, last = dict(whole.state_dict()), f"layers.{len(SWIN.depths) - 1}."
    side = 16 // 4 // 2 ** (len(SWIN.depths) - 1)
    margin = 4 - side
    assert side < 4
    cut = {name for name in tables if name.startswith(last)}
    for name in cut:
        grid = state[name].unflatten(0, (7, 7))[margin:-margin, margin:-margin]
        state[name] = grid.flatten(0, 1).contiguous()
    save_file(state, tmp_path / "cut.safetensors")
    done = convert(tmp_path / "cut.safetensors", tmp_path / "out", image_size=image_size)
    assert done.resized == [] and cut
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(Swin.from_pretrained(tmp_path / "out").eval()(images), whole(images))
    larger = convert(tmp_path / "cut.safetensors", tmp_path / "larger", image_size=32)
    assert set(larger.resized) == cut


def test_warm_start_of_coswin(tmp_path):
    torch.save({"model": swin_layout(num_classes=3)}, tmp_path / "swin.pth")
    done = convert(tmp_path / "swin.pth", tmp_path / "coswin", warm_start_coswin=True, window_size=6)
    tower = CoSwin.from_pretrained(tmp_path / "coswin")
    florence = {"image": dataclasses.replace(COSWIN, window_size=6), "text": TEXT, "embed_dim": 12}
    (tmp_path / "florence_small_test.json").write_text(json.dumps(FlorenceConfig(**florence).to_dict()))
    ff.add_model_config(tmp_path / "florence_small_test.json")
    whole = convert(tmp_path / "swin.pth", model="florence_small_test", warm_start_coswin=True)
    assert same(
        {k.removeprefix("visual."): t for k, t in whole.state.items()}, dict(list(tower.named_parameters())[:-2])
    )
    assert "logit_scale" in whole.missing and whole.left_out == ["visual.head.bias", "visual.head.weight"]
    assert tower.config.kind == "coswin" and (done.missing, done.left_out) == ([], [])
    expected = coswin_from_swin(convert(tmp_path / "swin.pth", window_size=6).state)
    assert same(tower.state_dict(), expected)
    with pytest.raises(ValueError, match="a plain Swin has patch_embed"):
        convert(tower.state_dict(), warm_start_coswin=True)


def test_partial_matches_are_listed_and_none_is_an_error(swin, tmp_path):
    state = {k: t for k, t in swin.state_dict().items() if not k.startswith("norm.")} | {"extra": torch.zeros(1)}
    done = convert(state, tmp_path / "part.safetensors")
    assert (done.missing, done.left_out) == (["norm.weight", "norm.bias"], ["extra"])
    assert "2 missing:\n  norm.weight\n  norm.bias" in str(done) and "1 left out:\n  extra" in str(done)
    assert not {"norm.weight", "extra"} & load_file(tmp_path / "part.safetensors").keys()
    with pytest.raises(ValueError, match="missing norm"):
        Swin.from_pretrained(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="no name in state_dict belongs to this model"):
        convert({"encoder.weight": torch.zeros(1)}, model="swin_tiny")
    with pytest.raises(ValueError, match="have another shape"):
        convert(swin.state_dict(), model="swin_tiny")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"encoder.weight": torch.zeros(1)}, "a Swin has patch_embed.proj.weight .* found nothing"),
        ({"features.1.0.attn.cpb_mlp.0.weight": torch.zeros(1)}, "this is a Swin V2"),
        ({"absolute_pos_embed": torch.zeros(1)}, "absolute position embeddings"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "no stage may lack"),
    ],
    ids=["nothing", "v2", "absolute", "no-blocks"],
)
def test_what_no_model_of_ours_is_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        convert(state)


def test_what_the_others_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only a plain Swin can be written as timm, and this is a CoSwin"):
        convert(CoSwin(COSWIN).state_dict(), to="timm")
    text = {f"text.{name}": tensor for name, tensor in TextTower(TEXT).state_dict().items()}
    with pytest.raises(ValueError, match="this is a text tower"):
        convert(text, to="hugging_face")
    with pytest.raises(ValueError, match="window_size cannot be changed: what is written is a text tower"):
        convert(text, window_size=7)
    with pytest.raises(ValueError, match="did you mean 'timm'"):
        convert(text, to="tim")
    with pytest.raises(ValueError, match="did you mean 'unicl'"):
        convert(text, layout="unic")


def test_the_command_knows_the_same_layouts():
    assert (cli_convert.SOURCES, cli_convert.TARGETS) == (SOURCES, TARGETS)


def test_the_command(swin, tmp_path, capsys):
    source = tmp_path / "swin.safetensors"
    save_file(swin.state_dict(), source)
    args = ["convert", str(source), str(tmp_path / "out"), "--window-size", "6", "--image-size", "48"]
    assert main([*args, "--from", "microsoft"]) == 0
    shown = capsys.readouterr().out
    assert f"read as microsoft, {len(swin.state_dict())} tensors carried over" in shown and "4 resized" in shown
    assert Swin.from_pretrained(tmp_path / "out").config.window_size == 6
    torch.save({"model": swin.state_dict(), "args": Opens()}, tmp_path / "bad.pth")
    for more, said in [
        ([str(tmp_path / "bad.pth"), "x"], "does not hold plain tensors alone"),
        ([str(tmp_path / "gone.pth"), "x"], "no checkpoint at"),
        ([str(source), "x", "--to", "tim"], "did you mean 'timm'"),
        ([str(source), "x", "--model", "swin_tini"], "did you mean 'swin_tiny'"),
    ]:
        assert main(["convert", *more]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and "executed" not in captured.out + captured.err
