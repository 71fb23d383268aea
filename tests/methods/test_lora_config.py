import json
import math

import numpy as np
import pytest

from peftjax.methods.adalora import AdaLoraConfig
from peftjax.methods.loha import LoHaConfig
from peftjax.methods.lora import LoraConfig


def test_defaults_are_pefts():
    data = LoraConfig().to_dict()
    assert data == {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "revision": None,
        "task_type": None,
    }
    assert LoraConfig.from_dict(data) == LoraConfig()


def test_config_is_hashable_with_patterns():
    config = LoraConfig(rank_pattern={"q": 4, "k": 2}, alpha_pattern={"q": 1.5})
    assert hash(config) == hash(LoraConfig.from_dict(config.to_dict()))
    assert list(config.rank_pattern) == ["q", "k"]


@pytest.mark.parametrize("r", [0, -1, 2.5, None, True])
def test_rank_is_positive(r):
    message = f"`r` should be a positive integer value but the value passed is {r}"
    with pytest.raises(ValueError, match=message):
        LoraConfig(r=r)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q'\]` should be a positive integer"):
        LoraConfig(rank_pattern={"k": 1, "q": r})


@pytest.mark.parametrize("alpha", [None, "3", math.nan, math.inf, True])
def test_alpha_is_a_number(alpha):
    makers = [
        ("lora_alpha", lambda: LoraConfig(lora_alpha=alpha)),
        (r"alpha_pattern\['q'\]", lambda: LoraConfig(alpha_pattern={"k": 1, "q": alpha})),
        ("alpha", lambda: LoHaConfig(alpha=alpha)),
        (r"alpha_pattern\['q'\]", lambda: LoHaConfig(alpha_pattern={"q": alpha})),
        ("lora_alpha", lambda: AdaLoraConfig(lora_alpha=alpha)),
    ]
    for field, make in makers:
        with pytest.raises(ValueError, match=f"`{field}` must be a finite number, got {alpha!r}"):
            make()


@pytest.mark.parametrize("alpha", [0, -4])
def test_pissa_needs_a_scale_to_divide_by(alpha):
    for init in ("pissa", "pissa_niter_4"):
        with pytest.raises(ValueError, match=f"above 0: got `lora_alpha` = {alpha}"):
            LoraConfig(lora_alpha=alpha, init_lora_weights=init)
        with pytest.raises(ValueError, match=r"above 0: got `alpha_pattern\['q'\]` = "):
            LoraConfig(alpha_pattern={"q": alpha}, init_lora_weights=init)
    LoraConfig(lora_alpha=alpha, init_lora_weights="olora")


def test_numbers_of_numpy_become_pythons():
    config = LoraConfig(
        r=np.int64(4),
        lora_alpha=np.float32(3),
        use_rslora=np.bool_(True),
        rank_pattern={"q": np.int32(2)},
        layers_to_transform=np.arange(3),
        target_modules=["q"],
    )
    same = LoraConfig(
        r=4,
        lora_alpha=3.0,
        use_rslora=True,
        rank_pattern={"q": 2},
        layers_to_transform=[0, 1, 2],
        target_modules=["q"],
    )
    assert config == same
    assert json.loads(json.dumps(config.to_dict())) == same.to_dict()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_dropout_is_a_probability_below_one(dropout):
    with pytest.raises(ValueError, match=r"`lora_dropout` must be in \[0, 1\)"):
        LoraConfig(lora_dropout=dropout)
    assert LoraConfig(lora_dropout=0.999).lora_dropout == 0.999


def test_bias_values():
    for bias in ("none", "all", "lora_only"):
        assert LoraConfig(bias=bias).bias == bias
    with pytest.raises(ValueError, match="`bias` must be one of none, all, lora_only; got 'hra_"):
        LoraConfig(bias="hra_only")


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16"]
)
def test_inits(init):
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init


@pytest.mark.parametrize("init", ["mica", "eva", "corda", "loftq", "lora_ga"])
def test_inits_that_only_peft_has(init):
    with pytest.raises(ValueError, match=f'`init_lora_weights="{init}"` is not supported'):
        LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", ["gausian", "pissa_niter_", "pissa_niter_x", "", None, 1, []])
def test_unknown_inits(init):
    with pytest.raises(ValueError, match="`init_lora_weights` must be True, False, 'gaussian'"):
        LoraConfig(init_lora_weights=init)


def test_orthogonal_needs_even_ranks():
    with pytest.raises(ValueError, match="needs even ranks, got r = 3"):
        LoraConfig(r=3, init_lora_weights="orthogonal")
    with pytest.raises(ValueError, match=r"needs even ranks, got rank_pattern\['q'\] = 5"):
        LoraConfig(rank_pattern={"q": 5}, init_lora_weights="orthogonal")


def test_lora_bias_excludes():
    for init in (True, False):
        assert LoraConfig(lora_bias=True, init_lora_weights=init).lora_bias
    for init in ("gaussian", "olora", "pissa_niter_2"):
        with pytest.raises(ValueError, match="`lora_bias` needs `init_lora_weights`"):
            LoraConfig(lora_bias=True, init_lora_weights=init)
    with pytest.raises(ValueError, match="`lora_bias` does not work with `use_dora`"):
        LoraConfig(lora_bias=True, use_dora=True)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys_are_regular_expressions(field):
    with pytest.raises(ValueError, match=f"`{field}` holds 'q\\('"):
        LoraConfig(**{field: {"q(": 2}})


SET = {
    "alora_invocation_tokens": [1],
    "arrow_config": {},
    "corda_config": {},
    "ensure_weight_tying": True,
    "eva_config": {},
    "kasa_config": {},
    "layer_replication": [[0, 2]],
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {},
    "megatron_config": {},
    "monteclora_config": {},
    "target_parameters": ["experts.w"],
    "trainable_token_indices": [0],
    "use_bdlora": {},
    "use_qalora": True,
    "velora_config": {},
}


@pytest.mark.parametrize("field", SET)
def test_unsupported_fields_raise_by_name(field):
    with pytest.raises(ValueError, match=f"`{field}` is not supported by peftjax's LoraConfig"):
        LoraConfig(**{field: SET[field]})
    with pytest.raises(ValueError, match=f"`{field}` is not supported"):
        LoraConfig.from_dict({"peft_type": "LORA", field: SET[field]})


def test_a_file_of_peft_with_its_defaults_loads_in_silence():
    data = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "org/model",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 32,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": ["classifier"],
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["value", "query"],
        "target_parameters": None,
        "task_type": "SEQ_CLS",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    config = LoraConfig.from_dict(data)
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (4, 32, True)
    assert config.target_modules == ("value", "query")


def test_scaling():
    assert LoraConfig().scaling(r=4, alpha=6) == 1.5
    assert LoraConfig(use_rslora=True).scaling(r=3, alpha=6) == pytest.approx(6 / math.sqrt(3))
