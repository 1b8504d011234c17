"Nested precision: properties that hold for any dtype, shape and sensitivity."

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from merge_lab.anyprec import (
    NestedLinear,
    WeightSlot,
    nested_codes,
    pack_planes,
    quantize_weight,
    unpack_planes,
)
from merge_lab.rounding import round_weight

SHAPES = [(1, 1), (3, 7), (5, 64), (4, 129), (2, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_codes_are_the_models_of_every_precision(shape, dtype):
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    weight = torch.randn(shape, generator=generator).to(dtype)
    sensitivity = torch.rand(shape, generator=generator)
    nested = quantize_weight(weight, sensitivity)
    errors = []
    for bits in range(3, 9):
        codes, tables = nested_codes(weight, sensitivity, parent_precision=bits)
        values = nested.dequantize(bits)
        assert values.dtype == dtype and values.shape == shape
        assert torch.equal(values, tables[bits].gather(1, codes.long()))
        errors.append((values.double() - weight.double()).abs().mean().item())
    assert errors[-1] <= errors[0]
    if shape[1] <= 64:  # a value of its own for each weight, nearly
        assert errors[-1] < 0.02


def test_blocks_do_not_change_the_result():
    weight, sensitivity = torch.randn(9, 40), torch.rand(9, 40)
    whole = quantize_weight(weight, sensitivity)
    parts = quantize_weight(weight, sensitivity, block=1)
    assert torch.equal(whole.planes, parts.planes)
    assert all(torch.equal(whole.tables[b], parts.tables[b]) for b in range(3, 9))


def test_sensitive_weights_are_kept_better():
    torch.manual_seed(0)
    weight, sensitivity = torch.randn(32, 256), torch.ones(32, 256)
    sensitivity[:, :32] = 100
    flat = (quantize_weight(weight).dequantize(3) - weight).square()
    aware = (quantize_weight(weight, sensitivity).dequantize(3) - weight).square()
    assert aware[:, :32].mean() < 0.5 * flat[:, :32].mean()
    assert (aware * sensitivity).sum() < (flat * sensitivity).sum()


@pytest.mark.parametrize("seed, parent", [(1, 1), (1, 8), (4, 4), (2, 6)])
def test_other_ranges(seed, parent):
    weight = torch.randn(3, 50)
    nested = quantize_weight(weight, None, seed, parent)
    assert sorted(nested.tables) == list(range(seed, parent + 1))
    assert len(nested.planes) == parent


@pytest.mark.parametrize("seed, parent", [(0, 8), (3, 9), (5, 4)])
def test_impossible_ranges(seed, parent):
    with pytest.raises(ValueError, match=f"seed_precision={seed}"):
        quantize_weight(torch.randn(2, 4), None, seed, parent)


def test_degenerate_rows_are_exact():
    repeated = torch.tensor([[0.0] * 9, [2.0] * 9, [1.0, 2.0, 4.0] * 3])
    nested = quantize_weight(repeated, torch.zeros_like(repeated))
    assert all(torch.equal(nested.dequantize(b), repeated) for b in range(3, 9))


def test_nan_sensitivity_is_an_error():
    with pytest.raises(ValueError, match="sensitivity holds NaN"):
        quantize_weight(torch.randn(2, 4), torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("precision", [1, 5, 8])
def test_planes_round_trip(columns, precision):
    codes = torch.randint(0, 2**precision, (3, columns), dtype=torch.uint8)
    planes = pack_planes(codes, precision)
    assert planes.shape == (precision, 3, -(-columns // 8))
    assert torch.equal(unpack_planes(planes, precision, columns), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_batch_with_several_precisions_is_each_sample_alone(dtype, with_bias):
    bias = torch.randn(6).to(dtype) if with_bias else None
    layer = NestedLinear(quantize_weight(torch.randn(6, 20).to(dtype)), bias)
    x = torch.randn(4, 3, 20).to(dtype)
    choice = torch.tensor([3, 8, 5, 3])
    layer.choice = choice
    grouped = layer(x)
    for sample, bits, y in zip(x, choice.tolist(), grouped):
        alone = F.linear(sample, layer.nested(bits).dequantize(bits), bias)
        torch.testing.assert_close(y, alone)
    layer.choice = F.one_hot(choice - 3, 6).float().requires_grad_()
    torch.testing.assert_close(layer(x), grouped)


def test_gradients_at_a_fixed_precision_reach_the_input():
    layer = NestedLinear(quantize_weight(torch.randn(6, 20)))
    layer.choice = 4
    x = torch.randn(2, 3, 20, requires_grad=True)
    layer(x).sum().backward()
    wanted = layer.nested(4).dequantize(4).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("keep_all", [False, True])
def test_what_was_dequantised_follows_the_layer(keep_all):
    "Other planes, another dtype: nothing of the old weight is computed with."
    layer, other = (
        NestedLinear(quantize_weight(torch.randn(6, 20)), slot=WeightSlot(keep_all))
        for _ in range(2)
    )
    x = torch.randn(2, 3, 20)
    assert not torch.allclose(layer(x), other(x))
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(x), other(x))
        layer.load_state_dict(
            NestedLinear(quantize_weight(torch.randn(6, 20))).state_dict()
        )
        layer(x)
    assert layer.double()(x.double()).dtype == torch.float64
    wanted = F.linear(x.double(), layer.nested(8).dequantize(8))
    assert torch.equal(layer(x.double()), wanted)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_a_seed_of_many_bits_is_no_worse_than_a_nested_model_of_as_many(bits):
    weight, sensitivity = torch.randn(6, 640), torch.rand(6, 640)
    share = sensitivity / sensitivity.mean(1, keepdim=True) + 1e-3

    def error(nested):
        return (share * (nested.dequantize(bits) - weight).square()).sum()

    alone = quantize_weight(weight, sensitivity, bits, bits)
    assert error(alone) < 1.15 * error(quantize_weight(weight, sensitivity, 3, bits))


def correlated(columns, generator):
    "A Hessian of inputs whose columns are alike."
    x = torch.randn(256, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    x = x + 0.3 * torch.randn(256, columns, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_tables_hold_the_model_of_every_precision(shape, dtype, calibrated):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    hessian = correlated(shape[1], generator) if calibrated else None
    nested = round_weight(weight, hessian)
    for bits in range(3, 9):
        values = nested.dequantize(bits)
        assert values.dtype == dtype and values.shape == shape
        codes = unpack_planes(nested.planes, 8, shape[1]) >> (8 - bits)
        lower = dataclasses.replace(nested, planes=pack_planes(codes, bits))
        assert torch.equal(values, lower.dequantize(bits))  # truncation is the lower precision, bit for bit
    assert (nested.dequantize(8).double() - weight.double()).abs().mean() < 0.02


@pytest.mark.parametrize("rows, columns", [(192, 576), (576, 576), (1536, 576), (576, 1536)])
def test_what_is_read_beside_the_codes_is_small(rows, columns):
    generator = torch.Generator().manual_seed(0)
    nested = round_weight(torch.randn(rows, columns, generator=generator).bfloat16(), correlated(columns, generator))
    assert nested.kept.shape == (rows, 3 if columns == 576 else 8)
    for bits in range(3, 9):
        assert nested.read_bytes(bits) * 8 / (rows * columns) - bits < 0.3
    assert nested.stored_bytes() < 1.05 * nested.read_bytes(8)


def test_errors_are_made_good_and_rows_do_not_know_of_blocks():
    generator = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(48, 128, generator=generator), correlated(128, generator)

    def lost(nested, bits):
        error = nested.dequantize(bits) - weight
        return ((error @ hessian) * error).sum()

    nearest, compensated = round_weight(weight), round_weight(weight, hessian)
    assert all(lost(compensated, bits) < 0.8 * lost(nearest, bits) for bits in (3, 4, 5, 8))
    assert torch.equal(round_weight(weight, hessian).planes, compensated.planes)


def test_a_row_of_zeros_and_an_input_that_never_came():
    weight, hessian = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), torch.eye(20)
    weight[2], hessian[3, 3] = 0, 0
    nested = round_weight(weight, hessian)
    assert all((nested.dequantize(bits)[2] == 0).all() and torch.isfinite(nested.dequantize(bits)).all() for bits in range(3, 9))
    with pytest.raises(ValueError, match="hessian holds NaN"):
        round_weight(weight, hessian * float("nan"))


def test_a_column_that_nothing_makes_good_is_kept():
    generator = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(16, 256, generator=generator).bfloat16(), correlated(256, generator)
    hessian[7] = hessian[:, 7] = 0
    hessian[7, 7] = 1e4  # large and like no other
    nested = round_weight(weight, hessian)
    assert 7 in nested.kept_columns
    assert all(torch.equal(nested.dequantize(bits)[:, 7], weight[:, 7]) for bits in range(3, 9))
