from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.mixer_config import RopeConfig, RopeType
from models.model import Model
from models.sequence import SequenceContext
from tests.models.tiny import REFERENCE_KERNELS, packed, random_tokens, tiny_config, tiny_model
from tests.support.closeness import assert_close


def _labels(tokens: torch.Tensor, sequence: SequenceContext) -> torch.Tensor:
    """Next tokens of the same document; -100 at each document's end."""
    labels = torch.full_like(tokens, -100)
    ids = sequence.document_ids
    inside = ids[:, 1:] == ids[:, :-1]
    labels[:, :-1] = torch.where(inside, tokens[:, 1:], -100)
    return labels


def _gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("mixers", ["L*4", "S*4", "F*4", "L S F _"])
def test_packed_documents_are_separate_documents(mixers: str) -> None:
    model = tiny_model(tiny_config(mixers=mixers))
    lengths = [[4, 9, 1], [13, 1]]
    tokens, sequence = random_tokens(2, 14), packed(lengths)
    labels = _labels(tokens, sequence)
    logits = model(tokens, sequence)
    total = torch.zeros((), dtype=torch.float64)
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            where = (slice(row, row + 1), slice(start, start + length))
            alone = SequenceContext.one_document_per_row(1, length)
            assert_close(model(tokens[where], alone), logits[where], relative=1e-12)
            total = total + model(tokens[where], alone, labels=labels[where])
            start += length
    loss = model(tokens, sequence, labels=labels)
    assert_close(loss, total, relative=1e-12)
    wanted = _gradients(model, total)
    for name, gradient in _gradients(model, loss).items():
        assert_close(gradient, wanted[name], relative=1e-12, name=name)


def test_later_tokens_never_matter() -> None:
    model = tiny_model()
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 61
    sequence = SequenceContext.one_document_per_row(1, 12)
    assert_close(model(changed, sequence)[:, :8], model(tokens, sequence)[:, :8], relative=1e-12)


def test_default_kernels_are_the_reference() -> None:
    tokens, sequence = random_tokens(2, 14), packed([[4, 10], [13, 1]])
    labels = _labels(tokens, sequence)
    fast, slow = tiny_model(), tiny_model(kernels=REFERENCE_KERNELS)
    loss, expected = fast(tokens, sequence, labels=labels), slow(tokens, sequence, labels=labels)
    assert_close(loss, expected, relative=1e-12)
    wanted = _gradients(slow, expected)
    for name, gradient in _gradients(fast, loss).items():
        assert_close(gradient, wanted[name], relative=1e-10, name=name)


def test_losses_are_cross_entropies_of_the_logits() -> None:
    model = tiny_model(loss_chunk_tokens=3)
    tokens, sequence = random_tokens(2, 14), packed([[4, 10], [13, 1]])
    labels = _labels(tokens, sequence)
    logits = model(tokens, sequence)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert_close(model(tokens, sequence, labels=labels), expected.sum(), relative=1e-13)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        per_token = model.token_losses(tokens, sequence, labels)
    assert not saved
    assert_close(per_token, expected.view(2, 14), relative=1e-13)
    assert not per_token.requires_grad


def test_a_tied_head_is_the_embedding_forward_and_backward() -> None:
    tied = tiny_model(tiny_config(tie_word_embeddings=True))
    untied = tiny_model(tiny_config())
    state = dict(tied.named_parameters())
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            source = "embedding.weight" if name == "head.weight" else name
            parameter.copy_(state[source])
    tokens, sequence = random_tokens(2, 6), SequenceContext.one_document_per_row(2, 6)
    labels = _labels(tokens, sequence)
    one, other = (model(tokens, sequence, labels=labels) for model in (tied, untied))
    assert_close(one, other, relative=1e-14)
    apart = _gradients(untied, other)
    together = _gradients(tied, one)["embedding.weight"]
    assert_close(together, apart["embedding.weight"] + apart["head.weight"], relative=1e-13)


def test_bf16_weights_give_float32_losses_and_bf16_gradients() -> None:
    exact = tiny_model()
    model = tiny_model(dtype=torch.bfloat16)
    tokens, sequence = random_tokens(2, 14), packed([[4, 10], [13, 1]])
    labels = _labels(tokens, sequence)
    loss = model(tokens, sequence, labels=labels)
    assert loss.dtype == torch.float32
    assert model(tokens, sequence).dtype == torch.float32
    assert_close(loss, exact(tokens, sequence, labels=labels), relative=2e-2)
    for name, gradient in _gradients(model, loss).items():
        assert gradient.dtype == torch.bfloat16, name
        assert gradient.isfinite().all(), name


def test_a_parameter_nobody_filled_makes_the_loss_nan() -> None:
    model = tiny_model()
    with torch.no_grad():
        fresh = Model(tiny_config()).blocks[1].ffn.up_proj.weight
        model.blocks[1].ffn.up_proj.weight.copy_(fresh)
    tokens, sequence = random_tokens(1, 5), SequenceContext.one_document_per_row(1, 5)
    assert model(tokens, sequence, labels=tokens).isnan()


def test_a_model_built_on_the_meta_device_computes_the_same_once_filled() -> None:
    yarn = RopeConfig(type=RopeType.yarn, factor=2.0, original_max_position_embeddings=16)
    config = tiny_config(rope=yarn)
    plain = tiny_model(config)
    with torch.device("meta"):
        late = Model(config)
    late.to_empty(device="cpu").double().load_state_dict(plain.state_dict())
    tokens, sequence = random_tokens(2, 14), packed([[4, 10], [13, 1]])
    assert torch.equal(late(tokens, sequence), plain(tokens, sequence))


@pytest.mark.parametrize("lengths", [[14], [4, 10]], ids=["whole", "packed"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(lengths: list[int]) -> None:
    model, tokens, sequence = tiny_model(), random_tokens(1, 14), packed([lengths])
    with torch.inference_mode():
        expected = model(tokens, sequence, labels=tokens)
    loss = model(tokens, sequence, labels=tokens)
    loss.backward()
    assert_close(loss, expected)
