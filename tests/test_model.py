"""The PyTorch network: its fake quantisation is the NumPy definition, and padding never changes an answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitvla import quantization
from bitvla.config import ActionConfig, Camera, LanguageConfig, PolicyConfig, VisionConfig
from bitvla.model.network import Batch, BitVLA
from bitvla.model.ternary import TernaryLinear, quantize_activations, ternarize
from checkpoints import processing_config

IMAGE, PROPRIO = 5, 6


def tiny_config(**changes) -> PolicyConfig:
    values = {
        "name": "tiny",
        "vision": VisionConfig(
            image_size=16, patch_size=8, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2
        ),
        "language": LanguageConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_positions=64,
            **changes.pop("language", {}),
        ),
        "action": ActionConfig(horizon=3, dim=3, state_dim=3, slots_per_step=2, head_hidden_size=16, head_blocks=1),
        "processing": processing_config(
            cameras=(Camera(name="front", height=16, width=16),), state_dim=3, action_dim=3, execute_horizon=3
        ),
    }
    return PolicyConfig(**{**values, **changes})


def random_batch(padding: int = 0, size: int = 2, max_prefix: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(3)
    prompt = [0] * padding + [9, IMAGE, IMAGE, IMAGE, IMAGE, PROPRIO, 10, 11] + [1] * 6 + [4]
    token_ids = torch.tensor([prompt] * size)
    return Batch(
        pixels=torch.randn(size, 1, 3, 16, 16, generator=generator),
        token_ids=token_ids,
        padding=torch.arange(len(prompt)).expand(size, -1) < padding,
        state=torch.randn(size, 3, generator=generator),
        prefix=torch.randn(size, max_prefix, 3, generator=generator),
        decided=torch.ones(size, max_prefix, dtype=torch.bool),
    )


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 2**31), scale=st.floats(1e-8, 1e4))
def test_fake_quantisation_equals_the_definition(rows, columns, seed, scale):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
    codes, alpha = ternarize(torch.from_numpy(values))
    expected_codes, expected_alpha = quantization.ternarize(values)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert alpha.numpy() == expected_alpha
    codes, token_scale = quantize_activations(torch.from_numpy(values))
    expected_codes, expected_scale = quantization.quantize_activations(values)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(token_scale.numpy()[:, 0], expected_scale)


@pytest.mark.parametrize("columns", [1, 3, 192, 1152, 4304, 6912])
def test_ternary_linear_accumulates_the_same_integers(columns):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((5, columns)).astype(np.float32)
    layer = TernaryLinear(columns, 7, bias=False)
    expected = quantization.ternary_linear(x, layer.weight.detach().numpy())
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-6, atol=0)


def test_gradients_pass_straight_through():
    layer = TernaryLinear(8, 4, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    codes, alpha = ternarize(layer.weight)
    x_codes, scale = quantize_activations(x)
    torch.testing.assert_close(x.grad, (codes.detach() * alpha).sum(0).expand(3, -1))
    torch.testing.assert_close(layer.weight.grad, (x_codes * scale).detach().sum(0).expand(4, -1))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("precision", ["full", "ternary"])
def test_left_padding_does_not_change_the_chunk(precision, bidirectional):
    torch.manual_seed(0)
    network = BitVLA(tiny_config(precision=precision, language={"bidirectional": bidirectional}), IMAGE, PROPRIO).eval()
    with torch.no_grad():
        plain, padded = network(random_batch()).actions, network(random_batch(padding=5)).actions
    # Rotary angles differ by a constant, so float rounding may flip an activation code: the bound is one code's worth.
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-5 if precision == "full" else 3e-2)


def test_slots_see_state_images_and_text():
    torch.manual_seed(0)
    network = BitVLA(tiny_config(precision="full"), IMAGE, PROPRIO).eval()
    batch = random_batch()
    with torch.no_grad():
        answer = network(batch).actions
        token_ids = batch.token_ids.clone()
        token_ids[:, 6] = 12
        for changed in (
            batch._replace(state=batch.state + 1),
            batch._replace(pixels=batch.pixels + 1),
            batch._replace(token_ids=token_ids),
        ):
            assert (network(changed).actions - answer).abs().max() > 1e-4


def test_only_tower_and_decoder_layers_are_ternary():
    network = BitVLA(tiny_config(), IMAGE, PROPRIO)
    ternary = {name for name, module in network.named_modules() if isinstance(module, TernaryLinear)}
    assert len(ternary) == 2 * 6 + 2 * 7
    assert all(".layers." in name for name in ternary)


def test_only_decided_actions_are_seen_and_only_then():
    """Without one the network is the one that has no prefix, bit for bit."""
    action = ActionConfig(
        horizon=3, dim=3, state_dim=3, slots_per_step=2, head_hidden_size=16, head_blocks=1, max_prefix=2
    )
    torch.manual_seed(0)
    network = BitVLA(tiny_config(precision="full", action=action), IMAGE, PROPRIO).eval()
    plain = BitVLA(tiny_config(precision="full"), IMAGE, PROPRIO).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("prefix_projector")})
    batch = random_batch(max_prefix=2)
    first = torch.tensor([[True, False]] * 2)
    other = batch._replace(prefix=batch.prefix + torch.tensor([[[0.0], [1.0]]]))
    with torch.no_grad():
        none, one, both = (
            network(batch._replace(decided=decided)).actions for decided in (~first & False, first, first | True)
        )
        assert torch.equal(none, plain(random_batch()).actions)
        assert torch.equal(one, network(other._replace(decided=first)).actions)
        assert not torch.equal(both, network(other).actions)
        assert (none - one).abs().max() > 1e-3
        assert (one - both).abs().max() > 1e-3
