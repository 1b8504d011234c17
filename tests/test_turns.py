"""A merger that several threads work on at once: each has its turn, and its masks are as they were. And pieces of answers, with every kind of tokenizer."""

import copy
import pickle
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, Tokenizer, trainers
from transformers import PreTrainedTokenizerFast

from merge_lab.asking import Asking, PieceStreamer, Voice
from merge_lab.chat import ChatCollator, load_task
from merge_lab.checkpoints import load_tokenizer
from merge_lab.evaluation import evaluate_tasks, generate_answers
from merge_lab.explorer import MergeExplorer
from merge_lab.held_out import HeldOut
from merge_lab.influence import token_influence
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.panel import ConfigPanel
from merge_lab.quick_look import QuickLook
from merge_lab.run_folder import bundled_path
from merge_lab.scoring import keeping_masks
from merge_lab.session import Bench
from merge_lab.tinylm import tiny_experts, tiny_tokenizer
from merge_lab.token_board import TokenBoard
from merge_lab.watch import component_losses

PATHS = [str(bundled_path(f"models/{name}")) for name in ("rewrite", "summarize")]
QUESTION = [{"role": "user", "content": "Say it in other words: The angry farmer kept the damp box by the shop."}]
SHARES = (0.1, 0.35, 0.6, 0.9)


def share_of(share: float):
    return lambda merger: merger.init_masks({"strategy": "blend", "selected_idx": 1, "parameters": {"default": share}})


@pytest.fixture
def merger():
    made = Merger.from_config(MergerConfig(model_paths=PATHS, dtype="float32"))
    made.init_masks({"strategy": "random", "seed": 5})
    return made


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(bundled_path(f"tasks/{name}"), "validation")[:4] for name in ("rewrite", "summarize")}


# --- turns ----------------------------------------------------------------------------


def works(merger: Merger, tasks: dict) -> dict:
    "What people do with a merger, each as if alone; no two share a lock."
    tokenizer = load_tokenizer(PATHS[0])
    asking = [Asking(lambda: merger, tokenizer, max_new_tokens=24) for _ in range(2)]
    explorer = MergeExplorer(lambda: merger, tokenizer, tasks, prompts=1, rows=4)
    look = QuickLook(merger, tokenizer, tasks)

    def hear(who, voice):
        return lambda: "".join(who.stream(voice, QUESTION))

    def glance():
        with keeping_masks(merger):
            share_of(0.2)(merger)
            return look.take(merger)[0]

    def score():
        return evaluate_tasks(merger, tokenizer, tasks, metrics=["loss"], progress=False)["loss"].tolist()

    def as_second():
        with merger.as_component(1):
            return generate_answers(merger, tokenizer, tasks["rewrite"][:2])

    found = {f"asked {i}": hear(asking[i % 2], Voice("blend", blend=share_of(share))) for i, share in enumerate(SHARES)}
    found |= {"first": hear(asking[0], Voice("first", 0)), "second": hear(asking[1], Voice("second", 1))}
    found["explored"] = lambda: explorer.evaluate({"strategy": "uniform"}).scores["loss"].tolist()
    found["board"] = lambda: board_of(explorer)
    found |= {"glance": glance, "score": score, "as second": as_second, "masks": merger.mask_state, "alphas": lambda: merger.alphas()["mean"].tolist()}
    ids = tokenizer.apply_chat_template(QUESTION, return_dict=False)
    found |= {"hangs on": lambda: token_influence(merger, ids, 4).loss, "knows": lambda: component_losses(merger, rows_of(tokenizer))}
    found["weights"] = lambda: {name: tensor.double().sum().item() for name, tensor in merger.merged_state_dict().items()}
    return found


def rows_of(tokenizer) -> HeldOut:
    rows = [{"input_ids": list(range(5, 15)), "labels": list(range(5, 15)), "source": i} for i in range(2)]
    return HeldOut(rows, ChatCollator(tokenizer))


def board_of(explorer: MergeExplorer) -> list:
    board = TokenBoard(explorer)
    assert board.worker.wait() and board.error is None
    return [board.found.log_probs.tolist(), board.influence.loss]


def test_whoever_works_on_a_merger_at_once_hears_what_he_hears_alone(merger, tasks):
    before = merger.mask_state()
    alone = {name: work() for name, work in works(merger, tasks).items()}
    every, gate = works(merger, tasks), threading.Barrier(len(alone))

    def start(work):
        gate.wait()
        return work()

    with ThreadPoolExecutor(len(every)) as pool:
        heard = {name: pool.submit(start, work) for name, work in every.items()}
        heard = {name: done.result(120) for name, done in heard.items()}
    masks, own = heard.pop("masks"), alone.pop("masks")
    for name, told in heard.items():
        assert told == (pytest.approx(alone[name]) if name == "weights" else alone[name]), name
    for state in (masks, own, merger.mask_state()):
        assert state.keys() == before.keys() and all(torch.equal(mask, before[name]) for name, mask in state.items())


@pytest.mark.parametrize("work", [lambda merger: token_influence(merger, list(range(5, 15)), 4), lambda merger: component_losses(merger, rows_of(load_tokenizer(PATHS[0])))], ids=["influence", "losses"])
def test_a_look_at_the_merger_waits_for_its_turn_and_changes_nothing_before(merger, work):
    merger.train()
    leaf = next(iter(merger.leaves().values()))
    with ThreadPoolExecutor(1) as pool:
        with merger.lock:
            done = pool.submit(work, merger)
            with pytest.raises(TimeoutError):
                done.result(0.5)
            assert merger.training and "alphas" not in vars(leaf) and merger.state.component is None
        assert done.result(60)
    assert merger.training and "alphas" not in vars(leaf)


def test_two_conversations_take_turns(merger):
    "Each with masks of its own, over and over: without turns the one restores what the other has set."
    tokenizer, before = load_tokenizer(PATHS[0]), merger.mask_state()
    first, second = (Asking(lambda: merger, tokenizer, lambda share=share: {"mine": share_of(share)}, max_new_tokens=16) for share in (0.05, 0.95))
    alone = []
    for asking in (first, second):
        asking.ask(QUESTION[0]["content"])
        alone.append([answer.text for answer in asking.wait()])
    for _ in range(3):
        for asking in (first, second):
            asking.ask(QUESTION[0]["content"])
        assert [[answer.text for answer in asking.wait()] for asking in (first, second)] == alone
    assert all(torch.equal(mask, before[name]) for name, mask in merger.mask_state().items())


def test_a_copy_of_a_merger_has_a_lock_of_its_own():
    merger = Merger(tiny_experts("llama", 2), MergerConfig(model_paths=[]))
    with merger.lock:
        for other in (copy.deepcopy(merger), pickle.loads(pickle.dumps(merger))):
            assert other.lock is not merger.lock
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(other.mask_state).result(10).keys() == merger.mask_state().keys()
    assert merger.to(torch.bfloat16).lock is merger.lock


def test_the_masks_of_a_training_step_are_nobody_elses(merger, tasks):
    "A thread that trains holds the lock over a step; who explores meanwhile waits for it, and spoils nothing."
    optimizer = torch.optim.SGD([mask for mask in merger.parameters() if mask.requires_grad], lr=0.1)
    ids, losses, stop = torch.tensor([[5, 6, 7, 8, 9, 10]]), [], threading.Event()
    own = copy.deepcopy(merger)

    def train(model, optimizer, steps):
        found = []
        for _ in range(steps):
            with model.lock:
                loss = model(ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        stop.set()
        return found

    wanted = train(own, torch.optim.SGD([mask for mask in own.parameters() if mask.requires_grad], lr=0.1), 12)
    stop.clear()
    explorer = MergeExplorer(lambda: merger, load_tokenizer(PATHS[0]), tasks, prompts=1, rows=2)
    with ThreadPoolExecutor(1) as pool:
        losses = pool.submit(train, merger, optimizer, 12)
        while not stop.is_set():
            explorer.evaluate({"strategy": "uniform"})
    assert losses.result() == wanted
    assert all(torch.equal(mask, own.mask_state()[name]) for name, mask in merger.mask_state().items())


def free(lock) -> bool:
    "Whether another thread would get it."
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: lock.acquire(blocking=False) and (lock.release() or True)).result()


def test_two_benches_that_load_one_merger_take_turns(merger):
    "The merger keeps its lock, and that of each bench is one with it: none works on it while another does."
    lock, panel = merger.lock, ConfigPanel(MergerConfig(PATHS, dtype="float32"))
    first, second = (Bench(panel, lambda config: merger) for _ in range(2))
    with first.lock:  # held before there is a merger, and through its coming
        assert first.merger is second.merger is merger and merger.lock is lock
        assert not free(first.lock) and not free(second.lock) and not free(lock)
    assert free(first.lock)
    with second.lock:
        assert not free(first.lock) and not free(lock)
    panel.set("mode", "scalar")  # each is handed the same once more
    with second.lock:
        assert second.merger is first.merger and merger.lock is lock and not free(first.lock)


def test_the_lock_of_a_bench_is_that_of_what_it_loads(merger):
    bench = Bench(ConfigPanel(MergerConfig(PATHS, dtype="float32")), lambda config: merger)
    with bench.merger.lock:
        assert not free(bench.lock)
    asking = Asking(lambda: bench.merger, load_tokenizer(PATHS[0]), max_new_tokens=4)
    heard = []
    with bench.lock:
        thread = threading.Thread(target=lambda: heard.extend(asking.stream(Voice("first", 0), QUESTION)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not heard
    thread.join(60)
    assert heard


# --- pieces ---------------------------------------------------------------------------

TEXTS = [
    "We do n't know it . it ' s that , she said .", "I ' ve been there ! you ' re n ' t here ? no .", "x ' ' y ' ' ' z . . . end",
    "Été 😀 naïve 日本語 👩‍👩‍👧.", "  two  spaces\nand a\n\nline ", "' ' '", "a � b �", "n't 's 're", "",
]


def by_bytes() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def by_pieces(fallback: bool) -> PreTrainedTokenizerFast:
    "As SentencePiece's models are kept: a mark for a space, the first of which is no space; bytes for what has no piece."
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    seen = sorted({letter for text in TEXTS[:3] for letter in text.replace(" ", "▁")})
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in seen), ("▁it", -2.0), ("▁'", -2.0)], 0, byte_fallback=fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    if fallback:
        backend.pre_tokenizer, backend.normalizer = None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def by_words(tidy: bool, cleanup: bool, plain: bool = False) -> PreTrainedTokenizerFast:
    letters = sorted({letter for text in TEXTS for letter in text if not letter.isspace()})
    vocabulary = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "that", "know", "##now"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if plain else pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=tidy, unk_token="[UNK]")


def with_ends() -> PreTrainedTokenizerFast:
    "As the first GPT's: words have an end."
    letters = sorted({letter for text in TEXTS for letter in text if not letter.isspace()})
    vocabulary = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)


KINDS = {
    "bundled": lambda: load_tokenizer(PATHS[0]), "tiny": tiny_tokenizer, "bytes": by_bytes, "pieces": lambda: by_pieces(False),
    "pieces and bytes": lambda: by_pieces(True), "words": lambda: by_words(False, False), "words that are tidied": lambda: by_words(True, False),
    "words that are tidied twice": lambda: by_words(True, True), "words that decode tidily": lambda: by_words(False, True),
    "split words that are tidied": lambda: by_words(True, False, True), "ends that are tidied": with_ends,
}


def told(tokenizer, ids: list[int]) -> list[str]:
    streamer = PieceStreamer(tokenizer, queue.Queue())
    for each in ([0, 1], *([i] for i in ids)):
        streamer.put(torch.tensor(each))
    streamer.end()
    return [streamer.pieces.get_nowait() for _ in range(streamer.pieces.qsize())]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_together_are_the_text(kind):
    tokenizer = KINDS[kind]()
    generator = torch.Generator().manual_seed(1)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    flat = [i for row in rows for i in row]
    every = list(range(len(tokenizer)))
    if kind == "pieces and bytes":  # which makes all bytes of a run unreadable, if one is
        flat, every = ([i for i in some if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")] for some in (flat, every))
    rows += [[some[i] for i in torch.randint(len(some), (40,), generator=generator)] for some in (flat, every) for _ in range(40)]
    for ids in rows:
        pieces = told(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), ids
        assert all(pieces)


@pytest.mark.parametrize("kind", ["bundled", "bytes", "pieces and bytes", "words"])
def test_nothing_is_held_back_where_nothing_changes(kind):
    "With one token a second, a word that is held back is a long wait."
    tokenizer = KINDS[kind]()
    ids = tokenizer("We know it. it is that", add_special_tokens=False)["input_ids"]
    streamer = PieceStreamer(tokenizer, queue.Queue())
    for number, each in enumerate(([0], *([i] for i in ids))):
        streamer.put(torch.tensor(each))
        assert streamer.said == tokenizer.decode(ids[:number], skip_special_tokens=True)


def test_a_decoder_that_nobody_knew_of_repeats_nothing_that_stands():
    "It takes back what was told: the pieces cannot, but the answer that is kept has the text."
    class Odd:
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [0]}

        def decode(self, ids, **options):
            words = ["abc"[i] for i in ids]
            return " ".join(words[:-2] + ["".join(words[-2:]).upper()])

    streamer = PieceStreamer(Odd(), queue.Queue())
    for each in ([0], [0], [1], [2], [0], [1]):
        streamer.put(torch.tensor(each))
    streamer.end()
    assert streamer.text == Odd().decode([0, 1, 2, 0, 1]) and streamer.said.endswith("AB")
