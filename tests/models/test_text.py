"""The text tower against torch's own transformer and CLIP's rules."""

import dataclasses

import pytest
import torch

from florence_fast.models import TextTower
from tests.models.tiny import TEXT

END = TEXT.vocab_size - 1


def texts(*lengths, width=TEXT.context_length):
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, END, (length,))
        row[length - 1] = END
    return tokens


def test_equal_to_torch_transformer():
    tower, tokens = TextTower(TEXT).eval(), texts(3, 12, 7)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    x = tower.token_embedding(tokens) + tower.positional_embedding
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "attn": "self_attn"}
    mask = torch.nn.Transformer.generate_square_subsequent_mask(12)
    for block in tower.resblocks:
        state = {}
        for name, tensor in block.state_dict().items():
            ours = next(prefix for prefix in names if name.startswith(prefix))
            state[names[ours] + name.removeprefix(ours)] = tensor
        theirs.load_state_dict(state)
        x = theirs(x, src_mask=mask)
    expected = tower.ln_final(x)[torch.arange(3), torch.tensor([2, 11, 6])]
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-5)


def test_what_follows_the_end_changes_nothing_and_may_be_cut():
    tower, tokens = TextTower(TEXT).eval(), texts(3, 5)
    noisy = tokens.clone()
    noisy[:, 6:] = 7
    expected = tower(tokens)
    torch.testing.assert_close(tower(noisy), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tower(tokens[:, :5]), expected, rtol=1e-5, atol=1e-6)


def test_what_precedes_the_end_matters():
    tower, tokens = TextTower(TEXT).eval(), texts(5, 5)
    tokens[1] = tokens[0]
    tokens[1, 1] = tokens[0, 1] % 60 + 1
    assert not torch.equal(*tower(tokens))


def test_factorised_embedding():
    tower = TextTower(dataclasses.replace(TEXT, token_embed_dim=4))
    assert tower.token_embedding.weight.shape == (64, 4)
    assert tower.token_projection.bias is None
    assert tower(texts(4)).shape == (1, 16)
    assert 0.04 < tower.token_embedding.weight.std() < 0.06


def test_quick_gelu_is_another_activation():
    gelu, quick = TextTower(TEXT), TextTower(dataclasses.replace(TEXT, act="quick_gelu"))
    quick.load_state_dict(gelu.state_dict())
    tokens = texts(6)
    assert not torch.equal(gelu(tokens), quick(tokens))
    x = torch.randn(9)
    torch.testing.assert_close(quick.resblocks[0].mlp.gelu(x), x / (1 + torch.exp(-1.702 * x)))


def test_checkpointing_changes_no_gradient():
    tower, tokens, found = TextTower(TEXT), texts(4, 9), []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        found.append(torch.autograd.grad(tower(tokens).square().sum(), list(tower.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(2, 13), (2, 0), (4,)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="N from 1 to context_length=12, got"):
        TextTower(TEXT)(torch.zeros(shape, dtype=torch.long))


def test_text_itself_is_refused():
    with pytest.raises(TypeError, match=r"integer ids, got torch\.float32"):
        TextTower(TEXT)(torch.zeros(1, 12))
