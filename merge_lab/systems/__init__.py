"""The systems, and the names of rooms that were once here, for whoever imports from them."""

import importlib
import sys
import types

MOVED = {  # older module -> where its names are now
    "lora_parts": ("sft_data", "diagnosis", "adapters", "sft_trainer", "systems.lora"),
    "router_parts": ("nested_model", "routed_model", "text_windows", "precision_costs", "systems.quantize", "systems.router"),
    "layer_merge_parts": ("calibration", "depth", "student", "mergeable", "systems.layer_merge"),
}


class Moved(types.ModuleType):
    "A module by its older name: looks a name up in the rooms that it was divided into. Raises `AttributeError` if none has it."

    def __getattr__(self, name: str):
        if not name.startswith("__"):
            for room in MOVED[self.__name__.rpartition(".")[2]]:
                module = importlib.import_module(f"merge_lab.{room}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"{self.__name__} has no {name!r}; it was divided into {', '.join(MOVED[self.__name__.rpartition('.')[2]])}.")


for _name in MOVED:
    sys.modules[f"{__name__}.{_name}"] = Moved(f"{__name__}.{_name}", "Divided into rooms named for what is in them.")
