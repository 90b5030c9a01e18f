"""POD: the words of a prompt distilled into vectors (Li, Zhang and Chen, CIKM 2023).

P5 with sequential ids and a few continuous vectors at the start of each prompt. In training, the words of a template follow in
half of the batches, so that the vectors learn to replace them; prompts for recommendations have vectors and ids only.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .p5 import P5SID, IdGenerator


class PromptedIdGenerator(IdGenerator):
    """An [`IdGenerator`] with `num_prompts` vectors before every prompt."""

    num_prompts = 3

    def __init__(self, config, num_symbols, max_words):
        super().__init__(config, num_symbols, max_words)
        self.prompts = nn.Parameter(torch.randn(self.num_prompts, config.d_model))

    def encode(self, ids, words):
        """See [`IdGenerator.encode`]; the prompt grows by the number of vectors."""
        prompts = self.prompts.expand(len(ids), -1, -1)
        mask = (ids != self.t5.config.pad_token_id).long()
        mask = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, self.num_prompts), mask], dim=1)
        embeds = torch.cat([prompts, self.embed(ids, words)], dim=1)
        return self.t5.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask


class POD(P5SID):
    """POD with sequential ids."""

    name, title = "pod", "POD"

    def build(self, train):
        """See [`P5.build`]; half of the wordings, the first among them, have no words."""
        super().build(train)
        nothing = [np.zeros(0, dtype=np.int64)] * 3
        self.wordings = [nothing] * len(self.wordings) + self.wordings

    def make_network(self, config, num_symbols, max_words):  # noqa: D102
        return PromptedIdGenerator(config, num_symbols, max_words)
