"""Techniques that are off in the presets: by their definitions, and wherever a model is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.artifact.format import load_artifact, pack
from model.data.packing import Documents
from model.network.block_context import BlockContext
from model.network.checkpoint import load_checkpoint, save_checkpoint
from model.network.gpt import GPT
from model.network.kv_cache import NO_TOKEN, RingKVCache
from model.network.learned_exclusion import LearnedExclusion
from model.network.mlp import MLP
from model.network.mudd_skips import DynamicMix
from model.network.parallel_lanes import Lanes, ParallelLanesBlock, merge_lanes
from model.network.token_smear import TokenSmear
from model.quantization.hessian import collect_hessians
from model.quantization.quantize_model import solved_modules, store_model
from model.runtime.distributed import Group
from model.runtime.settings import ImpossibleValue
from tests.helpers.kernels import kept_for_backward
from tests.helpers.models import (
    SMALL,
    TECHNIQUES,
    case_name,
    random_tokens,
    record_params,
    small_model,
)

LENGTHS = [7, 1, 20, 32, 2]
ALONE = Group(0, 1, torch.device("cpu"))
each_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=case_name)


@each_technique
def test_documents_packed_together_equal_each_alone(technique: dict[str, Any]) -> None:
    model, tokens = small_model(**technique), random_tokens(sum(LENGTHS))
    packed = model(tokens, Documents.from_lengths(LENGTHS))
    alone = [model(part, Documents.from_lengths([len(part)])) for part in tokens.split(LENGTHS)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@each_technique
@pytest.mark.parametrize("ring", [False, True])
def test_a_cached_continuation_equals_the_whole_text(technique: dict[str, Any], ring: bool) -> None:
    model, tokens = small_model(**technique), random_tokens(24).view(2, 12)
    whole = model(tokens.flatten(), Documents.from_rows(2, 12)).view(2, 12, -1)
    cache = model.new_cache(2, 12)
    if ring:
        cache = RingKVCache(model.config, 2, 12, "cpu", torch.float32)
        cache.reset(2)
    parts = []
    with torch.no_grad():
        for start in range(0, 12, 4):
            if isinstance(cache, RingKVCache):
                cache.seek(start, 12)
                cache.begin_forward(record=True)
            chunk = tokens[:, start : start + 4].flatten()
            parts.append(model(chunk, Documents.from_rows(2, 4), cache=cache).view(2, 4, -1))
            if isinstance(cache, RingKVCache):
                cache.commit()
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@each_technique
def test_no_logit_depends_on_a_later_token(technique: dict[str, Any]) -> None:
    model, tokens = small_model(**technique), random_tokens(24)
    changed = tokens.clone()
    changed[15:] = (changed[15:] + 1) % SMALL["vocabulary"]
    before, after = (model(text, Documents.from_lengths([24])) for text in (tokens, changed))
    assert torch.equal(before[:15], after[:15])


@each_technique
def test_it_has_an_effect_and_every_parameter_a_gradient(technique: dict[str, Any]) -> None:
    model, tokens = small_model(**technique), random_tokens(24)
    documents = Documents.from_lengths([24])
    assert not torch.allclose(model(tokens, documents), small_model()(tokens, documents), atol=1e-4)
    model.losses(tokens, tokens, documents).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@each_technique
def test_checkpoint_and_artifact_rebuild_the_model(
    technique: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = small_model(**technique), random_tokens(24)
    documents = Documents.from_lengths([24])
    save_checkpoint(tmp_path / "model.safetensors", model)
    restored = load_checkpoint(tmp_path / "model.safetensors")
    assert restored.config == model.config
    assert torch.equal(restored(tokens, documents), model(tokens, documents))
    artifact = pack(model.architecture(), store_model(model, {}), ["lzma"])
    (tmp_path / "model.pocket").write_bytes(artifact.content)
    unpacked = load_artifact(tmp_path / "model.pocket")
    assert unpacked.config == model.config
    halves = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(halves[name], t) for name, t in unpacked.state_dict().items())


@each_technique
def test_hessians_are_means_over_all_inputs_of_a_layer(technique: dict[str, Any]) -> None:
    model, tokens = small_model(**technique), random_tokens(24).view(2, 12)
    seen: dict[str, list[Tensor]] = {}
    modules = solved_modules(model)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach())
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(tokens.flatten(), Documents.from_rows(2, 12))
    for hook in hooks:
        hook.remove()
    found = collect_hessians(model, modules, tokens, 24, ALONE)
    times = {name: model.config.executed_layers.count(int(name.split(".")[1]))
             for name in model.matrices()}  # fmt: skip
    for name, inputs in seen.items():
        assert len(inputs) == times.get(name, 1)
        x = torch.cat(inputs).double()
        torch.testing.assert_close(found[name], x.T @ x / len(x))


def test_recurrence_equals_a_deeper_model_with_copies_of_the_layers() -> None:
    order = [0, 1, 2, 1, 2, 3]
    options: dict[str, Any] = {"depth_scaled_norm": False, "value_layers": [2]}
    model = small_model(layer_order=order, **options)
    deeper = small_model(layers=6, **{**options, "value_layers": [2, 4]})
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    for position, layer in enumerate(order):
        names = {n for n in model.state_dict() if n.startswith(f"blocks.{layer}.")}
        state |= {n.replace(f".{layer}.", f".{position}.", 1): model.state_dict()[n] for n in names}
    deeper.load_state_dict(state)
    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    assert torch.equal(model(tokens, documents), deeper(tokens, documents))


def test_before_it_begins_each_layer_is_executed_once() -> None:
    model = small_model(layer_order=[0, 1, 2, 1, 2, 3])
    plain = small_model()
    state = model.state_dict()
    plain.load_state_dict({**state, "skip_weights": state["skip_weights"][:2]})
    model.execute(range(4))
    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    assert torch.equal(model(tokens, documents), plain(tokens, documents))


@pytest.mark.parametrize("lanes", [None, 1, 3])
def test_the_last_pass_alone_has_a_gradient(lanes: int | None) -> None:
    """As if earlier visits added constants; the losses are the same bits."""
    order = [0, 1, 2, 1, 2, 1, 2, 3]
    model = small_model(layer_order=order, parallel_from_layer=lanes, value_layers=[2])
    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    left = {layer: order.count(layer) for layer in order}

    def add_a_constant(block: nn.Module, inputs: tuple[Any, ...], after: Any) -> Any:
        layer = list(model.blocks).index(block)
        left[layer] -= 1
        if not left[layer]:
            return after
        if isinstance(after, Tensor):
            return inputs[0] + (after - inputs[0]).detach()
        before = inputs[0] if isinstance(inputs[0], Lanes) else (inputs[0],) * 2
        return Lanes(*(b + (a - b).detach() for a, b in zip(after, before, strict=True)))

    def gradients() -> list[Tensor]:
        losses = model.losses(tokens, tokens, documents)
        found.append(losses.detach())
        return list(torch.autograd.grad(losses.sum(), list(model.parameters())))

    found: list[Tensor] = []
    whole = gradients()
    model.execute(order, last_pass_gradient=True)
    approximate = gradients()
    model.execute(order)
    for block in model.blocks:
        block.register_forward_hook(add_a_constant)
    expected = gradients()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(approximate, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(approximate[0], whole[0], rtol=1e-2)


def test_earlier_passes_keep_nothing_for_the_backward_pass() -> None:
    def kept(layer_order: Sequence[int]) -> int:
        model = small_model(layer_order=layer_order)
        model.execute(layer_order, last_pass_gradient=True)
        with kept_for_backward() as tensors:
            model.losses(tokens, tokens, documents)
        return len({tensor.untyped_storage().data_ptr() for tensor in tensors})

    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    assert kept([0, 1, 2, 1, 2, 1, 2, 3]) <= kept([0, 1, 2, 1, 2, 3]) + 2  # pushed outputs


@pytest.mark.parametrize("last_pass", [False, True])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_after_both_orders_ran_a_change_compiles_nothing(last_pass: bool) -> None:
    torch._dynamo.reset()
    model, tokens = small_model(**TECHNIQUES[-1]), random_tokens(24)
    model.compile_parts(backend="eager")

    def graphs_after(layer_order: Sequence[int]) -> int:
        model.execute(layer_order, last_pass)
        model.losses(tokens, tokens, Documents.from_rows(2, 12)).sum().backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    once, order = range(4), model.config.executed_layers
    warm = [graphs_after(order), graphs_after(once)][-1]
    assert [graphs_after(once), graphs_after(order), graphs_after(once)] == [warm] * 3


def test_a_block_with_lanes_by_its_definition() -> None:
    model = small_model(parallel_from_layer=2)
    block = model.blocks[2]
    assert isinstance(block, ParallelLanesBlock)
    assert block.mix is not None
    first, second, x0, pushed = torch.randn(4, 10, 32).unbind()
    weight = torch.randn(32)
    documents = Documents.from_lengths([10])
    cos_sin = (torch.ones(10, 1, 2), torch.zeros(10, 1, 2))
    context = BlockContext(documents, cos_sin)
    found = block(Lanes(first, second), x0, (pushed, weight), context)
    u = block.mix[0] * (first + weight * pushed) + block.mix[1] * x0
    scale = 3**-0.5
    n, r = (scale * nn.functional.rms_norm(x, (32,), eps=1e-7) for x in (u, second))
    attention = block.attention(n, None, context)[0] * block.attention_scale
    mlp = block.mlp(r) * block.mlp_scale
    for lane, old, (keep, of_attention, of_mlp) in zip(
        found, (u, second), block.lane_weights, strict=True
    ):
        expected = keep * old + of_attention * attention + of_mlp * mlp
        torch.testing.assert_close(lane, expected, rtol=1e-4, atol=1e-4)


def test_gates_are_one_half_at_first() -> None:
    torch.manual_seed(0)
    gated, plain = (GPT(record_params(**SMALL, output_gate=on)) for on in (True, False))
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if "output_gate" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("attention.output.weight"):
                parameter.mul_(0.5)
    tokens, documents = random_tokens(24), Documents.from_lengths([24])
    torch.testing.assert_close(gated(tokens, documents), plain(tokens, documents))


def test_initial_weights_are_those_of_the_settings() -> None:
    model = GPT(record_params(**SMALL, skip_init=0.0, input_mix_init=0.25))
    assert model.skip_weights is not None
    assert not model.skip_weights.any()
    for layer in range(4):
        mix = model.get_parameter(f"blocks.{layer}.mix")
        assert torch.equal(mix, torch.tensor([[1.0] * 32, [0.25] * 32]))
    torch.manual_seed(0)
    silent = GPT(record_params(**SMALL, skip_init=0.0))
    torch.manual_seed(0)
    without = GPT(record_params(**SMALL, skips=False))
    with torch.no_grad():
        for model in (silent, without):
            for name, parameter in model.named_parameters():
                if name.endswith(("output.weight", "down.weight")):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    tokens, documents = random_tokens(24), Documents.from_lengths([24])
    assert torch.equal(silent(tokens, documents), without(tokens, documents))


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5])
def test_the_mlp_by_its_definition(slope: float) -> None:
    mlp = small_model(mlp_slope=slope).get_submodule("blocks.0.mlp")
    assert isinstance(mlp, MLP)
    r = torch.randn(10, 32)
    h = r @ mlp.up.weight.T
    expected = torch.where(h > 0, h, slope * h) ** 2 @ mlp.down.weight.T
    torch.testing.assert_close(mlp(r), expected)


def test_what_heads_leave_out_goes_from_nothing_to_all() -> None:
    learned = small_model(exclusive_init=0.0)
    tokens, documents = random_tokens(24), Documents.from_lengths([10, 14])
    state = {n: t for n, t in learned.state_dict().items() if "exclusion" not in n}
    for alpha, exclusive in ((0.0, False), (10.0, True)):
        for layer in range(4):
            learned.get_parameter(f"blocks.{layer}.attention.exclusion.alpha").data.fill_(alpha)
        plain = small_model(exclusive_attention=exclusive)
        plain.load_state_dict(state)
        torch.testing.assert_close(learned(tokens, documents), plain(tokens, documents))


def test_each_head_leaves_out_its_share() -> None:
    exclusion = LearnedExclusion(4, 0.0)
    exclusion.alpha.data = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    y, v = torch.randn(10, 32), torch.randn(10, 2, 8)
    found = exclusion(y, v).unflatten(1, (4, 8))
    for head, alpha in enumerate(exclusion.alpha):
        unit = nn.functional.normalize(v[:, head // 2], dim=1)
        before = y.unflatten(1, (4, 8))[:, head]
        along = (before * unit).sum(1, keepdim=True)
        torch.testing.assert_close(found[:, head], before - alpha.tanh() * along * unit)


def test_tokens_take_in_their_predecessor_as_they_say() -> None:
    smear = TokenSmear()
    table, tokens = torch.randn(64, 16), random_tokens(9)
    x, documents = table[tokens], Documents.from_lengths([4, 5])
    assert torch.equal(smear(x, documents, table, NO_TOKEN), x)  # off at first
    torch.nn.init.normal_(smear.weight)
    torch.nn.init.constant_(smear.strength, 0.7)
    found = smear(x, documents, table, torch.tensor([NO_TOKEN, 3]))
    assert torch.equal(found[0], x[0])
    for t in range(1, 9):
        before = table[3] if t == 4 else x[t - 1]
        gate = torch.sigmoid(smear.weight @ x[t, :12])
        torch.testing.assert_close(found[t], x[t] + 0.7 * gate * before)


@pytest.mark.parametrize("lanes", [None, 3])
def test_earlier_states_are_mixed_in_before_and_after_the_last_block(lanes: int | None) -> None:
    order = [0, 1, 2, 1, 2, 3]
    model = small_model(layer_order=order, mudd_skips=True, parallel_from_layer=lanes)
    assert model.mudd_skips is not None
    seen: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    tokens, documents = random_tokens(24), Documents.from_lengths([24])
    x = model.hidden(tokens, documents)
    embedding, middle = seen[0][0][0], seen[3][1]
    last = seen[4][1]

    def mixed(x: Tensor, mix: DynamicMix) -> Tensor:
        hidden = nn.functional.rms_norm(x, (32,), eps=1e-7) @ mix.projection.weight.T
        weights = (mix.bias + nn.functional.gelu(hidden) @ mix.mix.T) / 10
        return x + torch.einsum("ts,stw->tw", weights, torch.stack((embedding, middle, last)))

    torch.testing.assert_close(seen[5][0][0], mixed(last, model.mudd_skips.before))
    torch.testing.assert_close(x, mixed(merge_lanes(seen[5][1]), model.mudd_skips.after))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_order": [0, 1, 2]}, "layer_order"),
        ({"layer_order": [0, 1, 2, 3, 4]}, "layer_order"),
        ({"layer_order": [0, 1, 2, 3, 1], "parallel_from_layer": 2}, "layer_order"),
        ({"parallel_from_layer": 4}, "parallel_from_layer"),
        ({"output_gate": True, "width": 8}, "output_gate"),
        ({"token_smear_gate": True, "width": 8}, "token_smear_gate"),
        ({"mudd_skips": True, "layers": 2, "value_layers": []}, "mudd_skips"),
        ({"exclusive_init": 1.0, "exclusive_attention": False}, "exclusive_init"),
    ],
)
def test_what_cannot_work_together_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ImpossibleValue) as error:
        record_params(**{**SMALL, **changes})
    assert error.value.key == key
