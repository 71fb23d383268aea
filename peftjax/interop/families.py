"""Ready-made names for the Flax models of transformers, by their ``config.model_type``."""

from peftjax.interop.names import ModuleNames

# The modules that can have an adapter and those around them, in the order in which torch's models
# register them, for families alike in one.
_BERT = (
    "albert bert dinov2 distilbert electra roberta roberta_prelayernorm roformer vit "
    "embeddings embeddings_project encoder transformer pooler "
    "patch_embeddings projection word_embeddings position_embeddings token_type_embeddings "
    "embedding_hidden_mapping_in albert_layer_groups albert_layers embed_positions layer "
    "attention crossattention intermediate mlp ffn ffn_output self output "
    "query key value q_lin k_lin v_lin out_lin "
    "weights_in weights_out fc1 fc2 lin1 lin2 "
    "cls predictions seq_relationship sop_classifier lm_head "
    "generator_predictions generator_lm_head discriminator_predictions "
    "vocab_transform vocab_projector pre_classifier sequence_summary summary classifier "
    "transform dense dense_prediction decoder out_proj qa_classifier qa_outputs"
)
_BART = (
    "model text_model vision_model visual_projection text_projection "
    "shared embeddings encoder decoder conv1 conv2 "
    "embed_tokens token_embedding patch_embedding embed_positions position_embedding "
    "project_out project_in layers self_attn encoder_attn mlp fc1 fc2 "
    "lm_head proj_out projector classification_head classifier "
    "k_proj v_proj q_proj dense out_proj qa_outputs"
)
_GPT = (
    "transformer wte wpe word_embeddings h self_attention attn attention crossattention mlp "
    "query_key_value c_attn q_attn k_proj v_proj q_proj out_proj dense "
    "dense_h_to_4h dense_4h_to_h c_fc c_proj fc_in fc_out lm_head"
)
_LLAMA = (
    "model embed_tokens layers self_attn q_proj k_proj v_proj o_proj "
    "mlp gate_proj up_proj down_proj lm_head"
)

# What a family calls the list of its layers, None if they share their weights; and its order.
# Otherwise transformers' Flax modules have the names of its torch modules, but for those further
# below.
_FAMILIES: dict[str, tuple[str | None, str]] = {
    "albert": (None, _BERT),
    "bart": ("layers", _BART),
    "bert": ("layer", _BERT),
    "big_bird": ("layer", _BERT),
    "blenderbot": ("layers", _BART),
    "blenderbot-small": ("layers", _BART),
    "bloom": ("h", _GPT),
    "clip": ("layers", _BART),
    "clip_text_model": ("layers", _BART),
    "clip_vision_model": ("layers", _BART),
    "dinov2": ("layer", _BERT),
    "distilbert": ("layer", _BERT),
    "electra": ("layer", _BERT),
    "gemma": ("layers", _LLAMA),
    "gpt2": ("h", _GPT),
    "gpt_neo": ("h", _GPT),
    "gptj": ("h", _GPT),
    "llama": ("layers", _LLAMA),
    "marian": ("layers", _BART),
    "mbart": ("layers", _BART),
    "mistral": ("layers", _LLAMA),
    "opt": ("layers", _BART),
    "pegasus": ("layers", _BART),
    "roberta": ("layer", _BERT),
    "roberta-prelayernorm": ("layer", _BERT),
    "roformer": ("layer", _BERT),
    "vit": ("layer", _BERT),
    "whisper": ("layers", _BART),
    "xglm": ("layers", _BART),
    "xlm-roberta": ("layer", _BERT),
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
    if model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(
            f"no names are known for the model type {model_type!r}, only for {known}; for another "
            f"model write the rules yourself: ModuleNames() if torch has the same names, else "
            f"ModuleNames(((name here, name in torch), ...))"
        )
    rules = [*_RENAMED.get(model_type, ()), ("{*rest}", "{*rest}")]
    layers, order = _FAMILIES[model_type]
    if layers:
        rules.insert(0, (f"{{*head}}.{layers}.{{*rest}}", f"{{*head}}.{layers}.{{i}}.{{*rest}}"))
    conv1d = (f"{{*head}}.{name}" for name in _CONV1D.get(model_type, ()))
    return ModuleNames(tuple(rules), tuple(conv1d), tuple(order.split()))
