"""The Space of NDCG@K: the demo of `evaluate`."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("ndcg_at_k.py"))
