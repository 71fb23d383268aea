"""Hugging Face's files: names, layouts and configs of torch PEFT, written and read without torch.

From the bottom up:

- ``names``, ``families``: module names here and in torch, and the rules between them.
- ``layouts``, ``limits``: how PEFT lays out the arrays of each method; what it cannot run.
- ``modules``: which torch modules and tensors a params tree is.
- ``configs``: ``adapter_config.json`` under either side's names.
- ``exporting``; ``stored``, ``whole``, ``importing``: an adapter as config and tensors, and back.
- ``mixture``: the same for X-LoRA, whose experts are adapters of their own.
- ``pretrained``, ``low_level``, ``base``: what users call.
"""
