"""Quantise a small model at 3 to 8 bits and let routers choose the bits of each layer.

    python examples/train_router.py

Everything is made on this machine in a minute or two. Use your own model by changing the first two lines of `main`;
the same from the command line:

    merge-lab quantize MODEL --dataset prose code tasks --output_dir runs/quantized
    merge-lab router runs/quantized --dataset prose code tasks --target_bits 4
"""

import logging

from merge_lab.components import load_tokenizer
from merge_lab.core import bundled_path
from merge_lab.systems import router


def main():
    text = dict(dataset=["tasks"], seq_len=96)
    quantized = router.run_quantize(
        router.QuantizeConfig(
            model_path=str(bundled_path("models/base")),
            output_dir="runs/example-quantized",
            dtype="float32",
            num_examples=24,
            overwrite=True,
            **text,
        )
    )
    config = router.RouterConfig(
        model_path=str(quantized),
        save_dir="runs/example-router",
        target_bits=4.0,
        pretrain="sensitivity",
        straight_through=True,
        prefix_length=24,
        num_examples=48,
        num_validation=24,
        num_epochs=2,
        learning_rate=1e-3,
        overwrite=True,
        **text,
    )
    model, epochs = router.run(config)
    print(epochs[["epoch", "ce", "average_bits"]].to_string(index=False))

    tokenizer = load_tokenizer(quantized)
    windows = router.text_windows(tokenizer, text["dataset"], text["seq_len"], 24, "test")
    print("\nbits of each layer on held-out text")
    scores = router.score_windows(model, windows, config.prefix_length)
    print(router.bits_by_kind(scores).round(2).to_string())
    print(f"\ncross-entropy {scores.ce.mean():.4f} at {scores.bits.mean():.2f} bits")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
