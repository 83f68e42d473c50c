import pytest
import torch

from model.data.packing import Documents
from model.kernels.reference import exclude_own_value, rotate, rotation
from model.network.embeddings import BigramEmbedding
from model.network.gpt import GPT
from tests.helpers.models import SMALL, random_tokens, record_params, small_model

LENGTHS = [7, 1, 20, 32, 2]
OFF = [
    {"rope_width": 0},
    {"exclusive_attention": False},
    {"bigram_buckets": 0},
    {"smear_gate": False},
    {"value_layers": []},
    {"input_mix": False},
    {"branch_scales": False},
    {"depth_scaled_norm": False},
    {"skips": False},
    {"softcap": 0.0},
]


def test_record_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(record_params())
    assert sum(p.numel() for p in model.parameters()) == 27_067_484


@pytest.mark.parametrize("change", [{}, *OFF], ids=lambda change: next(iter(change), "all on"))
def test_packed_documents_equal_each_document_alone(change):
    model = small_model(**change)
    tokens = random_tokens(sum(LENGTHS))
    packed = model(tokens, Documents.from_lengths(LENGTHS))
    alone = [model(part, Documents.from_lengths([len(part)])) for part in tokens.split(LENGTHS)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_packed_gradients_equal_the_sum_over_documents_alone():
    tokens, targets = random_tokens(sum(LENGTHS)), random_tokens(sum(LENGTHS), seed=2)
    model = small_model()
    model.losses(tokens, targets, Documents.from_lengths(LENGTHS)).sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for part, target in zip(tokens.split(LENGTHS), targets.split(LENGTHS), strict=True):
        model.losses(part, target, Documents.from_lengths([len(part)])).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("change", OFF, ids=lambda change: next(iter(change)))
def test_every_component_has_an_effect_and_every_parameter_a_gradient(change):
    tokens, documents = random_tokens(sum(LENGTHS)), Documents.from_lengths(LENGTHS)
    full, without = small_model(), small_model(**change)
    shared = {n: p for n, p in full.state_dict().items() if n in without.state_dict()}
    without.load_state_dict(shared)
    assert not torch.allclose(full(tokens, documents), without(tokens, documents), atol=1e-4)
    without.losses(tokens, tokens, documents).sum().backward()
    assert not [n for n, p in without.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_logit_depends_on_no_later_token():
    model = small_model()
    tokens, documents = random_tokens(24), Documents.from_lengths([24])
    changed = tokens.clone()
    changed[15:] = (changed[15:] + 1) % SMALL["vocabulary"]
    before, after = model(tokens, documents), model(changed, documents)
    assert torch.equal(before[:15], after[:15])
    assert (before[15:] != after[15:]).any(1).all()


def test_empty_documents_at_the_end_change_nothing():
    model = small_model()
    tokens = random_tokens(24)
    plain = Documents.from_lengths([10, 14])
    padded = Documents(torch.tensor([0, 10, 24, 24, 24], dtype=torch.int32), 24, 32)
    torch.testing.assert_close(model(tokens, plain), model(tokens, padded))


def test_select_gives_the_logits_of_the_selected_tokens():
    model = small_model()
    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    select = torch.tensor([3, 9, 23])
    torch.testing.assert_close(
        model(tokens, documents, select=select), model(tokens, documents)[select]
    )


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]])
def test_cached_continuation_equals_the_whole_text(pieces):
    model = small_model()
    rows, length = 3, sum(pieces)
    tokens = random_tokens(rows * length).view(rows, length)
    whole = model(tokens.flatten(), Documents.from_rows(rows, length)).view(rows, length, -1)
    cache = model.new_cache(rows, length)
    with torch.no_grad():
        parts = [
            model(p.flatten(), Documents.from_rows(rows, p.shape[1]), cache=cache).view(
                rows, p.shape[1], -1
            )
            for p in tokens.split(pieces, dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == length


def test_cached_gradients_flow_through_the_new_tokens_only():
    model = small_model()
    tokens = random_tokens(12)
    cache = model.new_cache(1, 12)
    model(tokens[:8], Documents.from_rows(1, 8), cache=cache)
    model(tokens[8:], Documents.from_rows(1, 4), cache=cache).sum().backward()
    assert model.embedding.grad is not None
    assert not any(layer.keys.requires_grad for layer in cache.layers)


def test_a_full_cache_refuses_more_tokens():
    model = small_model()
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="do not fit"):
        model(random_tokens(5), Documents.from_rows(1, 5), cache=cache)


def test_exclusive_attention_removes_the_own_value():
    y, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    result = exclude_own_value(y, v)
    own = v.repeat_interleave(2, dim=1)
    assert (result * own).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(exclude_own_value(result, v), result)
    unit = torch.nn.functional.normalize(own, dim=-1)
    torch.testing.assert_close(result, y - (y * unit).sum(-1, keepdim=True) * unit)


def test_a_value_of_zero_excludes_nothing_and_has_finite_gradients():
    y, v = torch.randn(5, 4, 8), torch.zeros(5, 2, 8, requires_grad=True)
    result = exclude_own_value(y, v)
    assert torch.equal(result, y)
    result.sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(1, 1, 8).expand(20, 1, 8), torch.randn(1, 1, 8).expand(20, 1, 8)
    cos_sin = rotation(torch.arange(20), 4, 100.0)
    q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(20, 1))
    scores = (q[:, 0] @ k[:, 0].T).diagonal(-3)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-4)


def test_bigram_rows_follow_the_published_hash():
    table = BigramEmbedding(3072, 4, 8, 0.05)
    rows = table.bucket(torch.tensor([5, 1000]), torch.tensor([-1, 77])).tolist()
    assert rows == [3071, ((36313 * 1000) ^ (27191 * 77)) % 3071]


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(record_params(**SMALL))
    tokens = random_tokens(64)
    loss = model.losses(tokens, random_tokens(64, seed=3), Documents.from_lengths([64])).mean()
    assert abs(loss.item() - torch.tensor(64.0).log().item()) < 0.01
