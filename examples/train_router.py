"""Quantise a small model at 3 to 8 bits and let routers choose the bits of each layer.

    python examples/train_router.py

Takes a minute on two cores: the bundled model of twelve layers, on the kind of text that it was trained on (documentation)
and on two that it does not know (code and tasks). Use your own model by changing the first lines of `main`; the same from the command line:

    merge-lab quantize MODEL --dataset prose code tasks --output_dir runs/quantized
    merge-lab router runs/quantized --dataset prose code tasks --target_bits 4.5
"""

import logging

from merge_lab.checkpoints import load_tokenizer
from merge_lab.run_folder import bundled_path
from merge_lab.nested_model import memory_table
from merge_lab.systems.quantize import QuantizeConfig, run_quantize
from merge_lab.systems.router import RouterConfig, run
from merge_lab.text_windows import bits_by_kind, score_windows, text_windows


def main():
    model_path = str(bundled_path("models/deep"))
    text = dict(dataset=["prose", "code", "tasks"], max_length=96)
    quantized = run_quantize(
        QuantizeConfig(
            model_path=model_path,
            output_dir="runs/example-quantized",
            dtype="float32",
            num_samples=24,
            overwrite=True,
            **text,
        )
    )
    config = RouterConfig(
        model_path=str(quantized),
        output_dir="runs/example-router",
        target_bits=4.0,  # bits a weight that are read, tables and scales included
        prefix_length=24,
        num_samples=60,
        num_validation=24,
        num_train_epochs=1,
        learning_rate=1e-3,
        overwrite=True,
        **text,
    )
    model, epochs = run(config)
    print(epochs[["epoch", "ce", "average_bits", "real_bits"]].to_string(index=False))

    tokenizer = load_tokenizer(quantized)
    windows = text_windows(
        tokenizer, text["dataset"], text["max_length"], 48, "test"
    )
    scores = score_windows(model, windows, config.prefix_length)
    ce, bits = scores.ce.mean(), scores.bits.mean()
    print(f"\nheld-out text: cross-entropy {ce:.4f} at {bits:.2f} bits")
    for bits in (3, 4, 8):
        with model.set_precision(bits):
            fixed = score_windows(model, windows, config.prefix_length)
        print(f"  {bits} bits everywhere: {fixed.ce.mean():.4f}")
    print("\nbits of each layer, by kind of text")
    print(bits_by_kind(scores).round(2).to_string())
    print("\nbytes of the decoder layers: held, and read for each token")
    print(memory_table(model).to_string())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
