import json

import pytest
from huggingface_hub.errors import StrictDataclassError

from tokenrec_hf.models.configuration_tokenrec import (
    CollaborativeConfig,
    FISMConfig,
    LightGCNConfig,
    MatrixFactorizationConfig,
    MQTokenizerConfig,
    T5GenerativeRetrievalConfig,
)
from tokenrec_hf.models.modeling_collaborative import FISMModel, LightGCNModel
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (CollaborativeConfig, {"embedding_dim": 2.5}),
        (MatrixFactorizationConfig, {"l2_weight": "much"}),
        (LightGCNConfig, {"num_layers": 2.5}),
        (FISMConfig, {"half_life": True}),
        (MQTokenizerConfig, {"num_codebooks": 2.5}),
        (T5GenerativeRetrievalConfig, {"projection_dim": "64"}),
    ],
)
def test_settings_of_another_type_are_named(config_class, settings):
    with pytest.raises(StrictDataclassError, match=f"Field '{next(iter(settings))}'"):
        config_class(**settings)


def test_the_projection_is_twice_as_wide_as_t5_by_default():
    assert T5GenerativeRetrievalConfig(d_model=8).projection_dim == 16


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MQTokenizerModel, MQTokenizerConfig(num_codebooks=1, codebook_size=2)),
        (LightGCNModel, LightGCNConfig(num_users=1, num_items=1)),
        (FISMModel, FISMConfig(num_users=1, num_items=1)),
    ],
)
def test_a_model_names_its_code(model_class, config, tmp_path):
    model_class(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        name: f"{one.__module__.rpartition('.')[2]}.{one.__name__}"
        for name, one in (("AutoConfig", type(config)), ("AutoModel", model_class))
    }
