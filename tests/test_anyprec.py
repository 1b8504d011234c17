"Nested precision: properties that hold for any dtype, shape and sensitivity."

import copy
import dataclasses
import shutil
import subprocess

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
from merge_lab import plane_products
from merge_lab.nested_model import layer_linears
from merge_lab.routed_model import LayerwiseQuantizeForCausalLM
from merge_lab.rounding import round_weight
from merge_lab.run_folder import bundled_path
from merge_lab.systems.quantize import QuantizeConfig, run_quantize

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


needs_compiler = pytest.mark.skipif(plane_products.products() is None, reason="no C compiler")
PLANE_SHAPES = [(33, 576), (8, 1536), (16, 96), (5, 40), (3, 200), (7, 9)]  # blocks of 64 columns, of whole bytes, of no whole bytes


def library_for(folder, *flags):
    "The products compiled as for another machine."
    compiler, library = plane_products.find_compiler(), folder / "other.so"
    words = [compiler, "-O2", "-std=c11", "-shared", "-fPIC", *flags, str(plane_products.HERE / "plane_products.c"), "-o", str(library)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} knows no {flags}")
    return plane_products.declared(plane_products.ctypes.CDLL(str(library)))


@needs_compiler
@pytest.mark.parametrize("flags", [(), ("-march=x86-64",), ("-march=skylake-avx512",), ("-march=native",)], ids=["plain", "sse", "avx512", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_planes_are_those_with_the_plain_weight(dtype, flags, tmp_path, monkeypatch):
    if flags[0:1] == ("-march=skylake-avx512",) and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("no AVX-512")
    library = library_for(tmp_path, *flags)
    monkeypatch.setattr(plane_products, "products", lambda: library)
    for rows, columns in PLANE_SHAPES:
        weight = torch.randn(rows, columns).to(dtype)
        layer = NestedLinear(round_weight(weight, torch.eye(columns) + 0.1), torch.randn(rows).to(dtype))
        for bits in layer.precisions:
            assert (layer.as_planes(bits) is None) == (columns == 200), columns  # 200 columns are four blocks of 50
            layer.choice, plain = bits, layer.nested(bits).dequantize(bits).double()
            for inputs in (1, 5, 16, 17):
                x = torch.randn(inputs, 1, columns).to(dtype)
                exact = x.double() @ plain.T + layer.bias.double()
                torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=(1e-5 if dtype == torch.float32 else 2e-2) * exact.abs().max().item())


@needs_compiler
def test_what_a_layer_reads_as_planes_follows_its_tensors():
    layers = [NestedLinear(round_weight(torch.randn(4, 64))) for _ in range(2)]
    x = torch.randn(1, 64)
    first, other = (layer(x) for layer in layers)
    assert not torch.equal(first, other)
    for change in (
        lambda layer: layer.load_state_dict(layers[1].state_dict()),
        lambda layer: layer.load_state_dict(layers[1].state_dict(), assign=True),
        lambda layer: [setattr(layer, name, tensor.clone()) for name, tensor in layers[1].named_buffers()],
    ):
        layer = copy.deepcopy(layers[0])
        assert torch.equal(layer(x), first) and layer.ready
        change(layer)
        assert torch.equal(layer(x), other)
    assert copy.deepcopy(layers[0]).ready == {}
    x = x.clone().requires_grad_()
    layers[0](x).sum().backward()  # gradients go through a plain weight
    assert x.grad is not None


def test_without_a_compiler_weights_are_made_plain(monkeypatch):
    monkeypatch.setattr(plane_products, "products", lambda: None)
    layer = NestedLinear(round_weight(torch.randn(4, 64)))
    x = torch.randn(2, 64)
    assert layer.as_planes(8) is None
    assert torch.equal(layer(x), F.linear(x, layer.nested(8).dequantize(8)))


DAMAGED = {  # what a file may hold: place among the tensors of `plane_weight`, and what is there instead
    "planes of too few bytes": (1, lambda planes: planes[..., :1].contiguous()),
    "too few planes": (1, lambda planes: planes[:2].contiguous()),
    "planes in another dtype": (1, lambda planes: planes.to(torch.int8)),
    "a table in another dtype": (0, lambda table: table.float()),
    "a table of another length": (0, lambda table: table[:, :-1].contiguous()),
    "one scale for all rows": (2, lambda scale: scale[:1].contiguous()),
    "scales of too few rows": (3, lambda scale: scale[:3].contiguous()),
    "kept weights in another dtype": (4, lambda _: torch.zeros(64, 1, dtype=torch.bfloat16)),
    "kept weights of too few rows": (4, lambda _: torch.zeros(3, 1)),
    "places in another dtype": (5, lambda _: torch.zeros(1, dtype=torch.int8)),
}


@needs_compiler
@pytest.mark.parametrize(("place", "instead"), DAMAGED.values(), ids=DAMAGED)
def test_tensors_that_do_not_fit_are_not_given_to_the_c_code(place, instead):
    "It reads what it is pointed to, without asking."
    layer = NestedLinear(round_weight(torch.randn(64, 128)))
    held = [layer._buffers[name] for name in ("table_8", "planes", "row_scale", "block_scale")] + [torch.zeros(64, 1), torch.zeros(1, dtype=torch.int32)]
    assert plane_products.plane_weight(128, *held) is not None
    held[place] = instead(held[place])
    assert plane_products.plane_weight(128, *held) is None


@needs_compiler
@pytest.mark.parametrize("column", [-1, 128, 2**28])
def test_kept_columns_that_are_none_are_refused(column):
    layer = NestedLinear(round_weight(torch.randn(64, 128)))
    held = [layer._buffers[name] for name in ("table_8", "planes", "row_scale", "block_scale")] + [torch.zeros(64, 1), torch.tensor([column], dtype=torch.int32)]
    with pytest.raises(ValueError, match="beyond the 128"):
        plane_products.plane_product(torch.randn(1, 128), plane_products.plane_weight(128, *held))


@needs_compiler
def test_a_layer_that_is_traced_or_cast_takes_the_plain_weight():
    layer, x = NestedLinear(round_weight(torch.randn(64, 128))), torch.randn(2, 128)
    assert torch.allclose(torch.jit.trace(layer, x, check_trace=False)(x), layer(x), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@needs_compiler
def test_a_compiler_that_fails_is_no_compiler(tmp_path):
    assert plane_products.compile_products(shutil.which("false") or "false", tmp_path) is None


@needs_compiler
def test_tokens_that_are_decoded_from_planes_are_those_of_plain_weights(tmp_path):
    config = QuantizeConfig(str(bundled_path("models/base")), str(tmp_path / "any"), method="nearest", dtype="float32", dataset=["tasks"], num_samples=1, max_length=32, device="cpu")
    model = LayerwiseQuantizeForCausalLM.from_quantized(run_quantize(config), [3, 4, 8])
    linears = [linear for layer in model.model.get_decoder().layers for linear in layer_linears(layer, NestedLinear).values()]
    assert all(linear.as_planes(4) is not None for linear in linears)
    ids = torch.randint(5, 200, (3, 20))
    each = torch.tensor([3, 8, 4])[:, None].repeat(1, len(model._linears))  # a precision for each sample
    for precision in (3, 8, each):
        tokens = {}
        for direct in (True, False):
            model.slot.direct = direct
            with model.set_precision(precision):
                tokens[direct] = model.generate(ids, max_new_tokens=16, do_sample=False)
        assert torch.equal(tokens[True], tokens[False])
