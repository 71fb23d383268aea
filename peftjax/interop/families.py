"""Ready-made names for the Flax models of transformers, by their ``config.model_type``."""

from peftjax.interop.names import ModuleNames

# What a family calls the list of its layers; None if its layers share their weights. Otherwise
# transformers' Flax modules have the names of its torch modules, but for those further below.
_LAYERS = {
    "albert": None,
    "bart": "layers",
    "bert": "layer",
    "big_bird": "layer",
    "blenderbot": "layers",
    "blenderbot-small": "layers",
    "bloom": "h",
    "clip": "layers",
    "clip_text_model": "layers",
    "clip_vision_model": "layers",
    "dinov2": "layer",
    "distilbert": "layer",
    "electra": "layer",
    "gemma": "layers",
    "gpt2": "h",
    "gpt_neo": "h",
    "gptj": "h",
    "llama": "layers",
    "marian": "layers",
    "mbart": "layers",
    "mistral": "layers",
    "opt": "layers",
    "pegasus": "layers",
    "roberta": "layer",
    "roberta-prelayernorm": "layer",
    "roformer": "layer",
    "vit": "layer",
    "whisper": "layers",
    "xglm": "layers",
    "xlm-roberta": "layer",
}

# Modules whose names differ.
_RENAMED = {"whisper": (("lm_head", "proj_out"),)}

# The modules that are transformers' Conv1D in torch.
_CONV1D = {"gpt2": ("c_attn", "q_attn", "c_proj", "c_fc")}


def module_names(model_type: str) -> ModuleNames:
    """The names of one of transformers' Flax models.

    A model of your own has them too if it calls its modules as transformers does. Its layers may
    then also be stacked in one array each, as under ``flax.linen.scan``, where transformers has
    one module for every layer: ``model.layers.mlp.up_proj`` for ``model.layers.0.mlp.up_proj``
    and all that follow it.

    Args:
      model_type: the family, as ``model.config.model_type`` has it.

    Raises:
      ValueError: the family is not known.

    Example:
      >>> import peftjax
      >>> names = peftjax.module_names("gpt2")
      >>> names.to_torch("transformer.h.0.attn.c_attn")
      'transformer.h.0.attn.c_attn'
      >>> names.to_torch("transformer.h.attn.c_attn", (11,))  # scanned
      'transformer.h.11.attn.c_attn'
      >>> names.keeps_inputs_first("transformer.h.11.attn.c_attn")
      True
    """
    if model_type not in _LAYERS:
        known = ", ".join(_LAYERS)
        raise ValueError(
            f"no names are known for the model type {model_type!r}, only for {known}; for another "
            f"model write the rules yourself: ModuleNames() if torch has the same names, else "
            f"ModuleNames(((name here, name in torch), ...))"
        )
    rules = [*_RENAMED.get(model_type, ()), ("{*rest}", "{*rest}")]
    if layers := _LAYERS.get(model_type):
        rules.insert(0, (f"{{*head}}.{layers}.{{*rest}}", f"{{*head}}.{layers}.{{i}}.{{*rest}}"))
    conv1d = (f"{{*head}}.{name}" for name in _CONV1D.get(model_type, ()))
    return ModuleNames(tuple(rules), tuple(conv1d))
