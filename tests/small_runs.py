"""Runs that several test files begin with."""

from merge_lab.run_folder import bundled_path
from merge_lab.systems.mask_merge import demo_config, MaskMergeConfig


def small(folder, **options) -> MaskMergeConfig:
    "A short mask merge of the bundled experts, in `run` below the folder."
    defaults = dict(
        dataset_configs={str(bundled_path(f"tasks/{task}")): 48 for task in ("rewrite", "summarize")},
        max_steps=6, eval_samples=4, per_device_train_batch_size=4, report=False,
    )  # fmt: skip
    return demo_config(output_dir=str(folder / "run"), **defaults | options)


def stopping_at(call: int, function):
    "The function, which is stopped as by Ctrl-C at one of its calls; `calls` counts them."
    calls = []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    stops.calls = calls
    return stops
