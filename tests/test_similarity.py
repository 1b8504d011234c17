"Similarity of layers on real (tiny) transformers: one pass, outputs and not inputs, padding left out."

import pytest
import torch

from merge_lab.similarity import (
    METHODS,
    cka,
    collect_outputs,
    diffusion_embedding,
    npib,
    similarity_matrix,
)
from merge_lab.tinylm import tiny_model


def decoder_layers(model):
    return (
        model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_outputs_equal_the_next_layers_input(architecture):
    model = tiny_model(architecture, num_hidden_layers=3)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = collect_outputs(
        model, decoder_layers(model), [{"input_ids": ids}], n_rows=18
    )
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in range(
        2
    ):  # hidden_states[i] is the input of layer i; the last one has passed the final norm
        torch.testing.assert_close(
            outputs[layer], hidden[layer + 1].flatten(0, 1), rtol=0, atol=0
        )
    assert outputs[2].shape == (18, 32)


def test_one_forward_pass_and_state_restored():
    model = tiny_model("llama", num_hidden_layers=4).train()
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    batches = [{"input_ids": torch.randint(3, 64, (2, 6))} for _ in range(3)]
    collect_outputs(model, model.model.layers, batches, n_rows=9)
    handle.remove()
    assert len(calls) == 3 and model.training
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_padding_never_counts():
    model = tiny_model("llama")
    ids = torch.randint(3, 64, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 2:] = 0
    first, second = (torch.where(mask.bool(), ids, fill) for fill in (0, 7))
    results = [
        collect_outputs(
            model, model.model.layers, [{"input_ids": x, "attention_mask": mask}]
        )
        for x in (first, second)
    ]
    for one, other in zip(*results):
        assert len(one) == int(mask.sum())
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_matrix_is_a_similarity(method):
    model = tiny_model("llama", num_hidden_layers=5)
    batches = [
        {
            "input_ids": torch.randint(
                3, 64, (8, 32), generator=torch.Generator().manual_seed(3)
            )
        }
    ]
    outputs = collect_outputs(model, model.model.layers, batches, n_rows=256)
    matrix = similarity_matrix([*outputs, outputs[0]], method)
    values = torch.tensor(matrix.to_numpy())
    torch.testing.assert_close(values, values.T)
    torch.testing.assert_close(values.diagonal(), torch.ones(6, dtype=torch.float64))
    assert values[0, 5] == pytest.approx(1.0) and (values.abs() <= 1 + 1e-9).all()


@pytest.mark.parametrize("method", ["cosine", "cka"])
def test_similarity_falls_along_the_residual_stream(method):
    model = tiny_model("llama", num_hidden_layers=5)
    ids = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(3))
    outputs = collect_outputs(model, model.model.layers, [{"input_ids": ids}], 256)
    row = similarity_matrix(outputs, method).loc[0].to_list()
    assert row == sorted(row, reverse=True)


def test_npib_sees_dependence_that_is_not_linear():
    generator = torch.Generator().manual_seed(4)
    angle = torch.rand(500, generator=generator) * 3
    arc = torch.stack([angle.cos(), angle.sin()], 1)
    bent = torch.stack([angle.pow(3), (2 * angle).sin()], 1)
    noise = torch.randn(500, 2, generator=generator)
    assert npib(arc, bent) > 3 * npib(arc, noise)
    assert npib(arc, bent) == pytest.approx(npib(bent, arc).item())
    assert cka(arc.double(), noise.double()) < 0.05


def walk(seed=5, steps=6, still=3):
    "Outputs that drift apart; one step is small."
    generator = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(300, 12, generator=generator)]
    for step in range(1, steps):
        noise = torch.randn(300, 12, generator=generator)
        outputs.append(outputs[-1] + (0.05 if step == still else 0.7) * noise)
    return outputs


@pytest.mark.parametrize(("n_far", "spread"), [(4, 800.0), (60, 0.01)])
def test_first_tokens_far_from_all_others_do_not_hide_them(n_far, spread, caplog):
    "Few that are apart, or many that are nearly one: as first tokens of texts are."
    generator = torch.Generator().manual_seed(6)
    plain = walk()
    first = 800 + spread * torch.randn(n_far, 12, generator=generator)
    # in the first layer they are near
    layers = [plain[0], *(torch.cat([first, x[n_far:]]) for x in plain[1:])]
    caplog.set_level("INFO", "merge_lab.similarity")
    found = similarity_matrix(layers, "npib")
    assert f"{n_far} of 300 tokens" in caplog.text
    assert found.equals(similarity_matrix([x[n_far:] for x in plain], "npib"))
    beside = [found.loc[i, i + 1] for i in range(5)]
    assert max(range(5), key=beside.__getitem__) == 2


def test_rows_that_fall_apart_are_said():
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(7))
    rows[40:] += 1e4
    with pytest.raises(ValueError, match="fall apart into groups"):
        diffusion_embedding(rows)
