import numpy as np
import pytest
import torch

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.modeling_collaborative import COLLABORATIVE_MODELS
from tokenrec_hf.repository.repository import load_collaborative, resized, save_collaborative


@pytest.mark.parametrize("kind", COLLABORATIVE_MODELS)
def test_a_model_comes_back_as_what_it_was_with_the_ids_of_its_rows(kind, tmp_path):
    matrix = InteractionMatrix(np.array([0, 0, 1]), np.array([0, 2, 1]), 2, 3)
    model_class = COLLABORATIVE_MODELS[kind]
    model = model_class.from_interactions(model_class.config_class(embedding_dim=4), matrix)
    save_collaborative(model, {"user": ["u", "v"], "item": ["a", "b", "c"]}, tmp_path)
    loaded = load_collaborative(tmp_path)
    assert type(loaded) is model_class
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert {name: index.ids() for name, index in load_indexes(tmp_path / "ids.safetensors").items()} == {
        "user": ["u", "v"],
        "item": ["a", "b", "c"],
    }
    larger = resized(loaded, InteractionMatrix(np.array([0, 3]), np.array([4, 1]), 4, 5))
    assert type(larger) is model_class and larger.config.embedding_dim == 4
    assert larger.user_embeddings().shape == (4, 4) and larger.item_embeddings().shape == (5, 4)
