import pytest
from huggingface_hub.errors import StrictDataclassError

from tokenrec_hf.models.configuration_tokenrec import (
    FISMConfig,
    LightGCNConfig,
    MatrixFactorizationConfig,
    MQTokenizerConfig,
    T5GenerativeRetrievalConfig,
)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
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
